"""Every kept row comes once a pass, in the same order for the same seed, whoever asks and from wherever it is gone on."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from evalkit.errors import AssetError, CorpusError, DictionaryError, DiskFailed, SuiteError
from evalkit.training.data.batches import DataExhausted, VectorSupply
from evalkit.training.data.chunks import LEAST, Chunks, Rule
from evalkit.training.data.shards import Manifest, ShardFolder
from evalkit.training.data.stream import StreamSupply

WINDOWS, CONTEXT, D = 23, 10, 3
MASSIVE = 7
"""Token whose activation is massive."""


class Counted:
    """A model whose activation says where it comes from: (token id, hook point, window) of a made-up text; counts its runs."""

    identity = "counted"

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.runs: list[tuple[str, ...]] = []
        self.poison: int | None = None

    def width(self, hook_point: str) -> int:
        return D

    def activations_at(self, tokens: torch.Tensor, hook_points: Sequence[str]) -> dict[str, torch.Tensor]:
        self.runs.append(tuple(hook_points))
        x = torch.stack([tokens, torch.zeros_like(tokens), torch.ones_like(tokens) * 500], dim=-1).float()
        x[tokens % 100 == MASSIVE] *= 100
        if self.poison is not None:
            x[tokens == self.poison] = float("nan")
        return {name: x + torch.tensor([0.0, float(len(name)), 0.0]) for name in hook_points}


# every position has an id of its own: 230 ids, of which those at 7, 107 and 207 are massive
TOKENS = torch.arange(WINDOWS * CONTEXT).reshape(WINDOWS, CONTEXT)
KEPT = sorted(int(t) for t in TOKENS[:, 2:].flatten() if t % 100 != MASSIVE)


def chunks(model: Counted, hooks: Sequence[str] = ("a",), shards: Path | None = None, multiple: float = 5.0) -> Chunks:
    """Chunks of three windows: eight of them."""
    return Chunks(model, TOKENS, "windows", hooks, Rule(2, multiple), shards=shards, positions=3 * CONTEXT)


def side_by_side(supplies: dict[str, StreamSupply]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of several hook points, as long as all have one."""
    while True:
        yield {hook_point: one.next() for hook_point, one in supplies.items()}


def supply(of: Chunks, hook: str = "a", batch: int = 5, seed: int = 0, rows: int = 60, **more: bool) -> StreamSupply:
    """A buffer for ``rows`` rows of float32."""
    return StreamSupply(of, hook, batch, seed, buffer_bytes=rows * 4 * D, **more)


def ids(batches: Sequence[torch.Tensor]) -> list[int]:
    return [int(value) for value in torch.cat(list(batches))[:, 0]]


def test_a_pass_presents_every_kept_position_once_and_no_massive_one() -> None:
    stream = supply(chunks(Counted()), batch=1, repeat=False)
    seen: list[torch.Tensor] = []
    with pytest.raises(DataExhausted, match="181 batches"):
        while True:
            seen.append(stream.next())
    assert sorted(ids(seen)) == KEPT
    assert ids(seen) != KEPT


def test_repeated_passes_visit_every_position_as_often_in_other_orders() -> None:
    stream = supply(chunks(Counted()), batch=len(KEPT), rows=10_000)
    many = ids([stream.next() for _ in range(12)])
    counts = np.bincount(many, minlength=WINDOWS * CONTEXT)[KEPT]
    # a refill's later half waits: the last of twelve passes may lack half
    assert counts.min() >= 11 and counts.max() <= 13
    assert many[: len(KEPT)] != many[len(KEPT) : 2 * len(KEPT)]


def test_neighbouring_refills_mix() -> None:
    stream = supply(chunks(Counted()), batch=1, rows=60)
    assert stream.group == 1
    refills = []
    for _ in range(40):
        stream.next()
        if stream._offset == 1:
            refills.append({number // (3 * CONTEXT) for number in ids([stream._rows])})
    assert len(refills) >= 3 and len(refills[0]) == 1
    assert all(len(now) == 2 and len(now & before) == 1 for before, now in zip(refills, refills[1:], strict=False))


def test_another_hook_point_beside_it_changes_nothing_and_costs_no_run() -> None:
    alone, both = Counted(), Counted()
    one = supply(chunks(alone))
    shared = chunks(both, ("a", "bb"))
    pair = side_by_side({"a": supply(shared, "a"), "bb": supply(shared, "bb")})
    for _ in range(60):
        found = next(pair)
        assert torch.equal(found["a"], one.next())
        assert torch.equal(found["bb"] - torch.tensor([0.0, 1.0, 0.0]), found["a"])
    assert len(both.runs) == len(alone.runs) > 8
    assert not shared._kept.keys() - {("a", n) for n in range(8)} - {("bb", n) for n in range(8)}
    assert len(shared._kept) <= 2


class Uneven(Counted):
    """Three of eight positions are massive at hook point 'bb': it needs more chunks for the same rows."""

    def activations_at(self, tokens: torch.Tensor, hook_points: Sequence[str]) -> dict[str, torch.Tensor]:
        found = super().activations_at(tokens, hook_points)
        if "bb" in found:
            found["bb"][(tokens % 2 == 1) & (tokens % 10 > 2) & (tokens % 10 < 9)] *= 100
        return found


def test_a_hook_point_that_falls_behind_keeps_no_more_than_it_may_and_gets_the_same_rows() -> None:
    model = Uneven()
    shared = Chunks(model, TOKENS, "windows", ("a", "bb"), Rule(2, 3.0), positions=CONTEXT, waiting_bytes=1)
    alone = {
        hook: supply(Chunks(Uneven(), TOKENS, "windows", (hook,), Rule(2, 3.0), positions=CONTEXT), hook) for hook in ("a", "bb")
    }
    pair, most = side_by_side({"a": supply(shared, "a"), "bb": supply(shared, "bb")}), 0
    for _ in range(200):
        found = next(pair)
        for hook, x in found.items():
            assert torch.equal(x, alone[hook].next())
        most = max(most, len(shared._kept))
    assert shared.count == 23 and shared._room == {"a": LEAST, "bb": LEAST}
    assert LEAST <= most <= 2 * LEAST
    # what had room was read in one run with the other's
    assert ("a", "bb") in model.runs and len(model.runs) < sum(len(one.chunks.model.runs) for one in alone.values())


def test_nothing_is_kept_for_a_hook_point_that_was_closed() -> None:
    model = Counted()
    shared = chunks(model, ("a", "bb"))
    one, other = supply(shared, "a"), supply(shared, "bb")
    first = [one.next() for _ in range(6)]
    assert any(hook == "bb" for hook, _ in shared._kept)
    other.close()
    model.runs.clear()
    later = [one.next() for _ in range(60)]
    assert not any(hook == "bb" for hook, _ in shared._kept)
    assert set(model.runs) == {("a",)}
    plain = supply(chunks(Counted()))
    assert all(torch.equal(x, plain.next()) for x in first + later)


@pytest.mark.parametrize("given", [0, 1, 2, 5, 12, 36, 37, 80])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_goes_on_bit_for_bit(given: int, overlap: bool) -> None:
    whole = supply(chunks(Counted()))
    for _ in range(given):
        whole.next()
    state = whole.state()
    assert all(isinstance(value, int) for value in state.values())
    expected = [whole.next() for _ in range(50)]
    model = Counted()
    later = supply(chunks(model), overlap=overlap)
    later.load_state(state)
    assert torch.equal(later.next(), expected[0])
    if not overlap:
        assert len(model.runs) <= 4  # the limit, and up to three refills of one chunk: not the text from its start
    assert all(torch.equal(later.next(), batch) for batch in expected[1:])
    later.close()


def test_other_seeds_give_other_orders() -> None:
    first, second = (ids([supply(chunks(Counted()), seed=seed).next() for _ in range(1)]) for seed in (0, 1))
    assert first != second


def test_the_sample_is_of_kept_rows_and_moves_nothing_on() -> None:
    model = Counted()
    stream = supply(chunks(model))
    drawn = stream.sample(40, 0)
    assert drawn.shape == (40, D) and set(ids([drawn])) <= set(KEPT)
    assert torch.equal(stream.next(), supply(chunks(Counted())).next())


def test_shards_are_read_instead_of_running_the_model_and_a_killed_run_makes_what_lacks(tmp_path: Path) -> None:
    plain = supply(chunks(Counted()))
    expected = [plain.next() for _ in range(40)]
    first = Counted()
    stream = supply(chunks(first, ("a", "bb"), tmp_path))
    assert all(torch.equal(stream.next(), batch) for batch in expected)
    assert len(first.runs) == 8  # every chunk once, whatever the number of passes
    for hook in ("a", "bb"):
        second = Counted()
        again = supply(chunks(second, ("a", "bb"), tmp_path), hook)
        batches = [again.next() for _ in range(40)]
        assert not second.runs
        assert hook == "bb" or all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))
    made = sorted(tmp_path.glob("*/*.npy"))
    assert len(made) == 16
    one = chunks(Counted(), ("a", "bb")).identity("a")
    for file in sorted((tmp_path / one).glob("*.npy"))[5:]:  # as after a kill in the middle
        file.unlink()
    third = Counted()
    rest = supply(chunks(third, ("a", "bb"), tmp_path))
    for _ in range(40):
        rest.next()
    assert third.runs == [("a",)] * 3  # where the other hook point has them, it is not asked for
    other = Counted()
    supply(chunks(other, ("a", "bb"), tmp_path, multiple=4.0)).next()
    assert other.runs  # another rule is another folder


def test_a_damaged_shard_names_its_file(tmp_path: Path) -> None:
    supply(chunks(Counted(), shards=tmp_path)).next()
    for file in tmp_path.glob("*/*.npy"):
        file.write_bytes(b"nothing")
    with pytest.raises(Exception, match="cannot be read") as caught:
        supply(chunks(Counted(), shards=tmp_path)).next()
    assert ".npy" in str(caught.value)


def save(rows: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


GARBAGE = {
    "empty": b"",
    "truncated": save(np.zeros((24, D), np.float32))[:-5],
    "width": save(np.zeros((24, D + 1), np.float32)),
    "one dimension": save(np.zeros(24, np.float32)),
    "type": save(np.zeros((24, D), np.float64)),
    "objects": save(np.array([{}, {}], dtype=object)),
    "archive": archive(),
    "torn archive": archive()[:40],
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=list(GARBAGE))
def test_a_shard_that_is_not_what_was_written_is_refused_by_name_and_made_again(tmp_path: Path, garbage: bytes) -> None:
    supply(chunks(Counted(), shards=tmp_path)).next()
    (file,) = tmp_path.glob("*/000000.npy")
    whole = file.read_bytes()
    file.write_bytes(garbage)
    with pytest.raises(AssetError, match="cannot be read") as caught:
        supply(chunks(Counted(), shards=tmp_path)).sample(10, 0)
    assert caught.value.where == str(file) and "remove that file" in caught.value.fix
    file.unlink()
    model = Counted()
    supply(chunks(model, shards=tmp_path)).sample(10, 0)
    assert file.read_bytes() == whole and model.runs == [("a",)]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'{"limit": 1.0}',
        b'{"limit": "x", "width": 3}',
        b'{"limit": NaN, "width": 3}',
        b"\xff\xfe\x00",
    ]
    + [b'{"limit": 1.0, "width": null}', b'{"limit": 1.0, "width": 0}', b'{"limit": 1.0, "width": Infinity}'],
)
def test_a_damaged_manifest_is_refused_by_name_and_its_chunks_are_kept(tmp_path: Path, garbage: bytes) -> None:
    before = supply(chunks(Counted(), shards=tmp_path)).next()
    (file,) = tmp_path.glob("*/manifest.json")
    whole = file.read_text()
    file.write_bytes(garbage)
    with pytest.raises(AssetError, match="description of a folder of activations") as caught:
        chunks(Counted(), shards=tmp_path)
    assert caught.value.where == str(file) and "remove that file" in caught.value.fix
    file.unlink()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.npy")}
    model = Counted()
    assert torch.equal(supply(chunks(model, shards=tmp_path)).next(), before)
    assert file.read_text() == whole
    assert {path: path.stat().st_mtime_ns for path in stamps if path.name != "000000.npy"}.items() <= stamps.items()


def test_foreign_files_among_the_shards_and_chunks_without_rows_do_no_harm(tmp_path: Path) -> None:
    expected = supply(chunks(Counted(), shards=tmp_path)).next()
    (folder,) = tmp_path.iterdir()
    for name in ("notes.txt", "000003.npy.bak", ".000001.npy.0123.tmp"):
        (folder / name).write_bytes(b"nothing")
    assert torch.equal(supply(chunks(Counted(), shards=tmp_path)).next(), expected)
    empty = ShardFolder(tmp_path / "empty")
    empty.begin(Manifest(1.0, D))
    empty.write(0, torch.empty(0, D))
    assert empty.read(0).shape == (0, D)


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle, rows) -> None:
        handle.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evalkit.training.data.shards.np.save", full)
    with pytest.raises(DiskFailed, match="No space left on device"):
        supply(chunks(Counted(), shards=tmp_path)).next()
    assert [path.name for path in tmp_path.glob("*/*")] == ["manifest.json"]


def test_the_models_error_reaches_the_reader_from_the_thread() -> None:
    model = Counted()
    model.poison = 150
    stream = supply(chunks(model), overlap=True)
    with pytest.raises(DictionaryError, match="NaN"):
        for _ in range(200):
            stream.next()
    stream.close()


def test_a_thread_that_is_not_read_ends_when_it_is_closed() -> None:
    stream = supply(chunks(Counted()), overlap=True)
    stream.next()
    thread = stream._thread
    assert thread is not None and thread._thread.is_alive()
    stream.close()
    assert not thread._thread.is_alive()


def test_the_norm_limit_is_that_of_the_first_chunk_and_goes_into_the_details() -> None:
    model = Counted()
    stream = supply(chunks(model))
    stream.next()
    x = model.activations_at(TOKENS[:3], ["a"])["a"]
    expected = 5 * float(np.median(x[:, 2:].norm(dim=-1).flatten()))
    assert stream.details()["norm_limit"] == pytest.approx(expected)
    unlimited = supply(chunks(Counted(), multiple=0.0), batch=1, repeat=False)
    assert unlimited.details()["norm_limit"] is None


def test_a_rule_that_leaves_nothing_is_refused() -> None:
    empty = Chunks(Counted(), TOKENS, "windows", ["a"], Rule(CONTEXT, 0.0), positions=30)
    with pytest.raises(CorpusError, match="leaves no position"):
        StreamSupply(empty, "a", 5, 0).next()


def test_too_little_text_is_said_or_refused() -> None:
    assert supply(chunks(Counted())).note(184) == ""
    assert "about 5.0 times" in supply(chunks(Counted())).note(920)
    with pytest.raises(SuiteError, match="185 activations"):
        supply(chunks(Counted()), repeat=False).note(185)
    x = torch.randn(30, 4)
    assert "about 2.0 times" in VectorSupply(x, 10, 0).note(60)
    with pytest.raises(SuiteError, match="31 activations"):
        VectorSupply(x, 10, 0, repeat=False).note(31)


def test_vectors_that_may_not_repeat_run_out() -> None:
    once = VectorSupply(torch.arange(60.0).reshape(30, 2), 10, 0, repeat=False)
    rows = torch.cat([once.next() for _ in range(3)])
    assert sorted(rows[:, 0].tolist()) == [float(2 * n) for n in range(30)]
    with pytest.raises(DataExhausted):
        once.next()


@pytest.mark.parametrize("given", [0, 1, 6, 7, 8, 40])
@pytest.mark.parametrize("buffer", [64, 10_000])
def test_vectors_go_on_bit_for_bit(tmp_path: Path, given: int, buffer: int) -> None:
    np.save(tmp_path / "x.npy", np.arange(406, dtype=np.float32).reshape(203, 2))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for x in (mapped, torch.from_numpy(np.array(mapped))):
        whole = VectorSupply(x, 29, 3, buffer=buffer)
        for _ in range(given):
            whole.next()
        later = VectorSupply(x, 29, 3, buffer=buffer)
        later.load_state(whole.state())
        assert all(torch.equal(later.next(), whole.next()) for _ in range(20))


def test_other_rows_have_another_identity() -> None:
    x = torch.randn(50, 4)
    changed = x.clone()
    changed[17, 2] += 1
    assert VectorSupply(x, 5, 0).identity == VectorSupply(x.clone(), 5, 0).identity
    assert VectorSupply(changed, 5, 0).identity != VectorSupply(x, 5, 0).identity != VectorSupply(x[:49], 5, 0).identity
    one, other = (supply(chunks(Counted(), multiple=multiple)).identity for multiple in (5.0, 6.0))
    assert one != other


def test_a_real_model_gives_several_hook_points_from_one_run_that_ends_at_the_last(tmp_path: Path) -> None:
    from judge_fakes import tiny_model

    from evalkit.models.language_model import load_model

    model = load_model(str(tiny_model(tmp_path / "model")))
    tokens = torch.arange(24).reshape(2, 12)
    hooks = ["blocks.0.hook_resid_post", "blocks.0.mlp.hook_post", "blocks.0.hook_resid_pre"]
    ran: list[int] = []
    handles = [block.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(model._blocks)]
    found = model.activations_at(tokens, hooks)
    for handle in handles:
        handle.remove()
    assert 1 not in ran
    assert list(found) != [] and set(found) == set(hooks)
    for hook in hooks:
        assert torch.equal(found[hook], model.activations(tokens, hook))
