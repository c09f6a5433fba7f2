"""A run that was saved and loaded goes on bit for bit; whatever ends a run leaves the last good checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_case import largest_file

from evalkit.errors import DiskFailed, SuiteError
from evalkit.training.architectures.base import TRAINABLES
from evalkit.training.data.batches import DataExhausted, Supply, VectorSupply
from evalkit.training.loop.checkpoint import Checkpoint, CheckpointError, pack, unpack
from evalkit.training.loop.members import Member, Trained, load
from evalkit.training.loop.together import Together
from evalkit.training.loop.train import carry_out, train
from evalkit.training.loop.trainer import Trainer
from evalkit.training.settings.config import TrainConfig, TrainingFailed, train_config
from evalkit.util.progress import Progress

HOOK = "blocks.0.hook_resid_post"
PLACE = {"hook_point": HOOK, "model": "toy"}
QUIET = Progress(quiet=True)
K = {"topk", "batchtopk", "matryoshka"}


def settings(architecture: str, **more: Any) -> TrainConfig:
    sparse = {"k": 3} if architecture in K else {}
    # features die within the run, so that the dead take part
    table = {"architecture": architecture, "features": 40, "tokens": 200 * 32, "batch": 32, "dead_after": 500}
    return train_config({**table, **sparse, **more})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    codes = torch.rand(500, 30, generator=generator) * (torch.rand(500, 30, generator=generator) < 0.1)
    return codes @ torch.randn(30, 12, generator=generator)


class Run(Together):
    """A run of one member."""

    def __init__(self, config: TrainConfig, supply: Supply, checkpoint: Checkpoint | None = None, hook_point: str = HOOK) -> None:
        members, supplies = [Member("SAE", config, hook_point)], {hook_point: supply}
        saved = load(checkpoint, members, supplies, "toy")
        super().__init__(members, supplies, model="toy", checkpoint=checkpoint, saved=saved)

    @property
    def trainer(self) -> Trainer:
        return self.trainers[0]

    def finish(self) -> Trained:
        """The result; a failure is raised."""
        (result,) = carry_out(self, QUIET)
        if not isinstance(result, Trained):
            raise result
        return result


def begin(config: TrainConfig, x: torch.Tensor, checkpoint: Checkpoint | None = None) -> Run:
    return Run(config, VectorSupply(x, config.batch, config.seed), checkpoint)


def steps(run: Run, count: int) -> Run:
    for _ in range(count):
        run.step()
    return run


def same(a: Any, b: Any) -> bool:
    first, second = pack(a), pack(b)
    return first.frame == second.frame and all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


def measures(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


@pytest.mark.parametrize("architecture", TRAINABLES.names())
def test_two_hundred_steps_equal_one_hundred_and_one_hundred(architecture: str, x: torch.Tensor, tmp_path: Path) -> None:
    config = settings(architecture)
    whole = steps(begin(config, x), 199)
    half = steps(begin(config, x, Checkpoint(tmp_path / "here", every_s=1e9)), 100)
    half.save()
    other = steps(begin(config, x, Checkpoint(tmp_path / "here", every_s=1e9)), 99)
    assert other.trainer.steps_done == whole.trainer.steps_done == 199
    assert same(other.trainer.state(), whole.trainer.state())
    assert not same(half.trainer.state(), whole.trainer.state())
    one, two = other.finish(), whole.finish()
    assert measures(one.history) == measures(two.history)
    assert one.dictionary.identity.hash == two.dictionary.identity.hash
    assert torch.equal(other.supplies[HOOK].next(), whole.supplies[HOOK].next())


def test_going_on_from_every_third_step_changes_nothing(x: torch.Tensor, tmp_path: Path) -> None:
    config = settings("topk", tokens=61 * 32)
    whole = train(config, x, progress=QUIET, **PLACE)
    done = 0
    while done < 61:
        run = begin(config, x, Checkpoint(tmp_path / "here", every_steps=3))
        assert run.number == done - done % 3
        # two steps behind the last checkpoint are lost each time
        steps(run, min(5, 61 - run.number))
        done = run.number
    again = run.finish()
    assert again.dictionary.identity.hash == whole.dictionary.identity.hash
    assert measures(again.history) == measures(whole.history)


def test_a_finished_run_whose_dictionary_was_not_kept_is_frozen_again(x: torch.Tensor, tmp_path: Path) -> None:
    config = settings("topk", tokens=640)
    checkpoint = Checkpoint(tmp_path / "here")
    first = train(config, x, progress=QUIET, checkpoint=checkpoint, **PLACE)
    seen: list[Any] = []
    second = train(config, x, progress=QUIET, checkpoint=checkpoint, observe=seen.append, **PLACE)
    assert second.dictionary.identity.hash == first.dictionary.identity.hash
    assert not seen and second.history == first.history
    checkpoint.discard()
    assert not checkpoint.folder.exists()


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"k": 4}, {"seed": 1}, {"tokens": 3200}])
def test_other_settings_are_refused_and_named(change: dict, x: torch.Tensor, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "here")
    steps(begin(settings("topk"), x, checkpoint), 3).save()
    with pytest.raises(CheckpointError, match="another run") as caught:
        begin(settings("topk", **change), x, checkpoint)
    (key,) = change
    assert key in caught.value.what and str(change[key]) in caught.value.what
    assert str(tmp_path) in caught.value.where and "begin anew" in caught.value.fix


def test_other_data_and_places_are_refused(x: torch.Tensor, tmp_path: Path) -> None:
    config, checkpoint = settings("topk"), Checkpoint(tmp_path / "here")
    steps(begin(config, x, checkpoint), 3).save()
    with pytest.raises(CheckpointError, match="data was"):
        begin(config, x + 1, checkpoint)
    with pytest.raises(CheckpointError, match="hook_point was"):
        Run(config, VectorSupply(x, config.batch, config.seed), checkpoint, "blocks.1.hook_resid_post")
    assert begin(config, x, checkpoint).trainer.steps_done == 3


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all", None])
def test_a_damaged_checkpoint_names_its_file(damage: bytes | None, x: torch.Tensor, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "here")
    steps(begin(settings("topk"), x, checkpoint), 3).save()
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        begin(settings("topk"), x, checkpoint)
    assert str(checkpoint.path) in caught.value.where


def test_divergence_keeps_the_last_checkpoint_with_finite_weights(x: torch.Tensor, tmp_path: Path) -> None:
    config, checkpoint = settings("topk"), Checkpoint(tmp_path / "here", every_steps=5)
    run = steps(begin(config, x, checkpoint), 12)
    with torch.no_grad():
        next(run.trainer.module.parameters()).fill_(float("nan"))
    run.save()  # as one that is due before the next loss is looked at
    with pytest.raises(TrainingFailed, match="became nan at step 13 of 200"):
        run.finish()
    kept = begin(config, x, checkpoint)
    assert kept.trainer.steps_done == 10 and kept.trainer.finite


@pytest.mark.parametrize("number", [1, 3])
def test_a_checkpoint_of_another_format_is_refused_and_says_what_to_do(number: int, x: torch.Tensor, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "here")
    steps(begin(settings("topk"), x, checkpoint), 3).save()
    data = checkpoint.path.read_bytes()
    assert data.count(b'\\"format\\": 2') == 1
    checkpoint.path.write_bytes(data.replace(b'\\"format\\": 2', b'\\"format\\": %d' % number))
    with pytest.raises(CheckpointError, match=f"format {number}.*reads format 2") as caught:
        begin(settings("topk"), x, checkpoint)
    assert ("older" in caught.value.what) == (number == 1)
    assert str(tmp_path) in caught.value.where and "to begin anew" in caught.value.fix


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(x: torch.Tensor, tmp_path: Path) -> None:
    config, checkpoint = settings("topk"), Checkpoint(tmp_path / "here", every_steps=10)
    run = steps(begin(config, x, checkpoint), 19)
    before = checkpoint.path.read_bytes()
    with largest_file(1000), pytest.raises(DiskFailed, match="can be written") as caught:
        run.step()
    assert str(checkpoint.path) in caught.value.where and "is kept" in caught.value.fix and caught.value.exit_code == 4
    assert checkpoint.path.read_bytes() == before
    assert [path.name for path in checkpoint.folder.iterdir()] == [checkpoint.path.name]
    assert begin(config, x, checkpoint).trainer.steps_done == 10


def test_exhausted_data_leave_a_checkpoint_of_all_that_was_done(x: torch.Tensor, tmp_path: Path) -> None:
    class Short(VectorSupply):
        """Has fewer rows than it said: as a stream whose rule left out more than the first positions."""

        @property
        def vectors(self) -> int:
            return 6400 if not self._given else 500

    config, checkpoint = settings("topk"), Checkpoint(tmp_path / "here")
    supply = Short(x, config.batch, config.seed, repeat=False, identity="x")
    run = Run(config, supply, checkpoint)
    with pytest.raises(DataExhausted, match="15 batches"):
        steps(run, 200)
    longer = VectorSupply(x, config.batch, config.seed, identity="x")
    assert Run(config, longer, checkpoint).trainer.steps_done == 15
    with pytest.raises(SuiteError, match=r"6,400 activations.*500"):
        train(config, VectorSupply(x, config.batch, 0, repeat=False), progress=QUIET, **PLACE)


def test_states_of_every_shape_come_back_as_they_were(tmp_path: Path) -> None:
    shared = torch.arange(6, dtype=torch.float64)
    state = {
        "a": [shared, shared[2:4], {3: (1, None, "x"), "tensor": True}],
        "b": {"none": None, "bits": torch.tensor([True, False]), "zero": torch.tensor(2.5, dtype=torch.bfloat16)},
        "inf": float("inf"),
        "empty": torch.empty(0, 4, dtype=torch.int64),
    }
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.save({"of": (1, 2)}, state)
    found = checkpoint.load({"of": (1, 2)})
    assert same(found, state)
    assert found["a"][2][3] == (1, None, "x") and found["inf"] == float("inf")
    assert unpack(*pack(found))["b"]["zero"].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="a checkpoint cannot hold a set"):
        pack({"a": {1}})


def test_a_run_without_a_checkpoint_writes_nothing(x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(settings("topk"), tokens=640)
    train(config, x, progress=QUIET, **PLACE)
    assert not list(tmp_path.iterdir())
