"""Sweeps in a suite: trained in one pass, each kept under its own recipe, whatever ends it; and the Pareto picture of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from suite_case import tiny_suite

import evalkit
from evalkit.cli import main
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.provenance import remarks
from evalkit.dictionaries.storage import load_dictionary, save_dictionary
from evalkit.errors import SuiteError, UsageError
from evalkit.report.views.reconstruction import family, front, has_sweep, pareto_figure
from evalkit.runs import training_rounds
from evalkit.runs.train import train_suite
from evalkit.runs.training_rounds import repeats
from evalkit.runs.workbench import Workbench
from evalkit.suite import load_suite
from evalkit.training.loop.checkpoint import FILE, Checkpoint
from evalkit.training.loop.together import Together
from evalkit.training.settings.config import train_config
from evalkit.util.progress import Progress

SWEEP = """
[[dictionary]]
name = "TopK"
train = { architecture = "topk", features = 64, k = [2, 4, 8], tokens = 2048, batch = 256 }

[[dictionary]]
name = "tied"
train = { architecture = "tied", features = 64, l1 = [0.001, 0.01], seed = [0, 1], tokens = 2048, batch = 256 }
"""


MATCHED = """
[[dictionary]]
name = "SAE"
train = { architecture = "topk", features = 64, k = 4, tokens = 2048, batch = 256 }

[[dictionary]]
name = "PCA"
baseline = "pca"
top_k = "SAE"
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sweep_suite(folder: Path, sweep: str = SWEEP, training: str = "", hooks: str = "") -> Path:
    """The tiny suite with a sweep in the place of its SAE, and reconstruction alone."""
    text = tiny_suite(folder).read_text().split('[[evaluation]]\nname = "autointerp"')[0]
    begin, end = text.index('[[dictionary]]\nname = "SAE"'), text.index('[[dictionary]]\nname = "neurons"')
    text = text[:begin] + sweep + text[end:]
    if hooks:
        text = text.replace('["blocks.0.hook_resid_post"]', hooks)
    path = folder / "sweep.toml"
    path.write_text(f"{text}\n[training]\n{training}\n")
    return path


def test_more_than_two_passes_over_the_text_are_said_and_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Workbench(load_suite(sweep_suite(tmp_path, MATCHED)), tmp_path / "out", Progress()) as bench:
        hook, config = bench.suite.hook_points[0], bench.dictionaries.spec("SAE").settings
        rows = int(bench.inputs.fit(hook).keep.sum())
        assert bench.inputs.passes(config, hook) == 2048 / rows
        assert repeats(config, 2.0) == "" and "2,048 activations, 2.1 passes" in repeats(config, 2.1)
    many = load_suite(sweep_suite(tmp_path, MATCHED.replace("tokens = 2048", f"tokens = {3 * rows}")))
    with Workbench(many, tmp_path / "out", Progress()) as bench:
        sae = bench.dictionaries.get(bench.dictionaries.spec("SAE"), hook)
    assert f"trained on {3 * rows:,} activations, 3.0 passes over the fitting text" in remarks(sae.details)[0]
    assert "warning: SAE at" in capsys.readouterr().err


def test_a_feature_is_not_called_dead_sooner_than_a_rare_one_fires() -> None:
    silences = {tokens: train_config({"k": 4, "tokens": tokens}).dead_after for tokens in (2_000, 320_000, 10_000_000, 10**9)}
    assert list(silences.values()) == [50_000, 80_000, 2_500_000, 10_000_000]
    assert train_config({"k": 4, "dead_after": 7}).dead_after == 7


def test_a_baseline_gets_the_l0_of_the_dictionary_that_its_top_k_names(tmp_path: Path) -> None:
    with Workbench(load_suite(sweep_suite(tmp_path, MATCHED)), tmp_path / "out", Progress(quiet=True)) as bench:
        hook = bench.suite.hook_points[0]
        assert not bench.dictionaries.is_built(bench.dictionaries.spec("PCA"), hook)
        pca, sae = (bench.dictionaries.get(bench.dictionaries.spec(name), hook) for name in ("PCA", "SAE"))
        assert bench.dictionaries.is_built(bench.dictionaries.spec("PCA"), hook) and bench.dictionaries.is_built(
            bench.dictionaries.spec("SAE"), hook
        )
        assert (pca.encode(bench.inputs.fit(hook).kept()) != 0).sum(1).unique().tolist() == [4]
        assert remarks(pca.details)[0].endswith("4 codes a token, as 'SAE', which has 4.0 on the fitting text")
        here = bench.dictionaries.recipe_folder(bench.dictionaries.spec("PCA"), hook)
    other = sweep_suite(tmp_path, MATCHED.replace("k = 4", "k = 7"))
    with Workbench(load_suite(other), tmp_path / "out", Progress(quiet=True)) as bench:
        assert bench.dictionaries.recipe_folder(bench.dictionaries.spec("PCA"), hook) != here, "another SAE, another PCA"
        found = bench.dictionaries.get(bench.dictionaries.spec("PCA"), hook)
        assert found.details["top_k"] == 7
    for wrong, said in (('"SAEE"', "no dictionary called 'SAEE'"), ('"PCA"', "top_k names itself")):
        with pytest.raises(SuiteError, match=said):
            load_suite(sweep_suite(tmp_path, MATCHED.replace('top_k = "SAE"', f"top_k = {wrong}")))


def built(folder: Path) -> dict[str, Path]:
    """Folders of dictionaries by name."""
    return {f.name.rsplit("-", 1)[0]: f for f in (folder / "dictionaries").iterdir() if not f.name.startswith(".")}


def test_one_command_trains_the_sweep_together_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite, store = sweep_suite(tmp_path), tmp_path / "out" / "evalkit.duckdb"
    assert main(["run", str(suite), "--results", str(store)]) == 0
    said = capsys.readouterr()
    assert said.err.count("training 7 SAEs ...") == 1
    folders = built(tmp_path / "out")
    assert set(folders) == {"topk-k-2", "topk-k-4", "topk-k-8", "neurons"} | {
        f"tied-l1-{l1}-seed-{seed}" for l1 in ("0-001", "0-01") for seed in (0, 1)
    }
    assert [load_dictionary(folders[f"topk-k-{k}"]).details["end"]["l0"] for k in (2, 4, 8)] == pytest.approx([2, 4, 8], abs=0.6)
    assert not list((tmp_path / "out" / "dictionaries").glob(".*"))
    pictures = [line for line in said.out.splitlines() if line.endswith("-pareto.png")]
    assert len(pictures) == 1 and Path(pictures[0].removeprefix("figure: ")).read_bytes().startswith(b"\x89PNG")
    with evalkit.open_results(store) as results:
        assert set(results.training()["dictionary"].value_counts()) == {8}
        assert has_sweep(results.table("reconstruction"))
    assert main(["run", str(suite), "--results", str(store), "--quiet"]) == 0
    assert "training" not in capsys.readouterr().err


def test_only_what_is_asked_for_is_trained_and_gives_the_same_bits(tmp_path: Path) -> None:
    suite = sweep_suite(tmp_path)
    arguments = ["train", str(suite), "--quiet", "--results"]
    assert main([*arguments, str(tmp_path / "one" / "evalkit.duckdb"), "--only", "TopK k=4"]) == 0
    assert set(built(tmp_path / "one")) == {"topk-k-4"}
    assert main([*arguments, str(tmp_path / "all" / "evalkit.duckdb")]) == 0
    one, of_all = (load_dictionary(built(tmp_path / home)["topk-k-4"]) for home in ("one", "all"))
    assert one.identity.hash == of_all.identity.hash
    assert built(tmp_path / "one")["topk-k-4"].name == built(tmp_path / "all")["topk-k-4"].name
    assert of_all.details["together"] == 7


def test_members_with_other_batches_or_lengths_are_trained_by_themselves(tmp_path: Path) -> None:
    sweep = '[[dictionary]]\nname = "S"\ntrain = { features = 64, k = [2, 4], batch = [128, 256], tokens = 1024 }\n'
    suite = load_suite(sweep_suite(tmp_path, sweep))
    with Workbench(suite, tmp_path / "out", Progress(quiet=True)) as bench:
        first = bench.dictionaries.spec("S k=2 batch=128")
        bench.dictionaries.get(first, "blocks.0.hook_resid_post")
        there = [spec.name for spec in suite.dictionaries if bench.dictionaries.is_built(spec, "blocks.0.hook_resid_post")]
    assert there == ["S k=2 batch=128", "S k=4 batch=128"]


def test_streamed_hook_points_share_one_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hooks = '["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]'
    sweep = '[[dictionary]]\nname = "S"\ntrain = { features = 64, k = [2, 4], batch = 256, tokens = 1024 }\n'
    suite = sweep_suite(tmp_path, sweep, "stream = true\nbuffer_mb = 1", hooks)
    assert main(["train", str(suite), "--results", str(tmp_path / "out" / "evalkit.duckdb")]) == 0
    assert capsys.readouterr().err.count("training 4 SAEs ...") == 1
    hook_points = [load_dictionary(f).hook_point for f in (tmp_path / "out" / "dictionaries").iterdir()]
    assert sorted(hook_points) == ["blocks.0.hook_resid_post"] * 2 + ["blocks.1.hook_resid_pre"] * 2


def test_one_that_diverges_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = '[[dictionary]]\nname = "S"\ntrain = { features = 64, k = 4, lr = [1e-3, 1e30], batch = 256, tokens = 2048 }\n'
    suite = sweep_suite(tmp_path, sweep)
    assert main(["train", str(suite), "--results", str(tmp_path / "out" / "evalkit.duckdb")]) == 4
    said = capsys.readouterr()
    assert "diverged" in said.err and "S lr=1e+30" in said.err
    assert set(built(tmp_path / "out")) == {"s-lr-0-001"}


class Killed(BaseException):
    """Ends a run as a kill does: nothing that follows is done."""


def hashes(folder: Path) -> dict[str, str]:
    """Identity of each dictionary by name."""
    return {name: load_dictionary(path).identity.hash for name, path in built(folder).items()}


def leftovers(folder: Path) -> list[Path]:
    """Checkpoints that lie beside the dictionaries."""
    return list((folder / "dictionaries").glob(".*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the sweep gives in one go."""
    home = tmp_path_factory.mktemp("whole")
    assert main(["train", str(sweep_suite(home)), "--quiet", "--results", str(home / "out" / "evalkit.duckdb")]) == 0
    return hashes(home / "out")


@pytest.mark.parametrize("published", [1, 6])
def test_a_kill_between_publications_leaves_what_the_next_start_finds(
    published: int, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, store = sweep_suite(tmp_path), tmp_path / "out" / "evalkit.duckdb"
    left = [published]

    def publish(*arguments: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        save_dictionary(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training_rounds, "save_dictionary", publish)
    with pytest.raises(Killed):
        train_suite(suite, store)
    assert len(built(tmp_path / "out")) == published and len(leftovers(tmp_path / "out")) == 1
    # what such a kill leaves half-written
    (checkpoint,) = leftovers(tmp_path / "out")
    (checkpoint / f".{FILE}.0123abcd.tmp").write_bytes(b"half of it")
    names = Checkpoint(checkpoint).about()
    assert names is not None
    missing = next(name for name in names["members"] if not (checkpoint.parent / name).exists())
    (checkpoint.parent / f".{missing}.89abcdef.tmp").mkdir()
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert main(["train", str(suite), "--results", str(store)]) == 0
    said = capsys.readouterr().err
    starts = [line for line in said.splitlines() if line.startswith("training ") and line.endswith(" ...")]
    assert "going on at step 8 of 8" in said and len(starts) == 1
    assert hashes(tmp_path / "out") == whole and not leftovers(tmp_path / "out")


def test_a_part_is_asked_for_and_the_rest_later_goes_on(whole: dict[str, str], tmp_path: Path, monkeypatch, capsys) -> None:
    """A checkpoint of all is not given up for a part of them."""
    suite, store = sweep_suite(tmp_path, training="checkpoint_s = 0"), tmp_path / "out" / "evalkit.duckdb"
    steps: list[int] = []

    def step(self: Together, *arguments: object) -> object:
        steps.append(self.number)
        if len(steps) == 5:
            raise Killed
        return stepped(self, *arguments)

    stepped = Together.step
    monkeypatch.setattr(Together, "step", step)
    with pytest.raises(Killed):
        train_suite(suite, store)
    assert len(leftovers(tmp_path / "out")) == 1
    assert main(["train", str(suite), "--results", str(store), "--only", "TopK k=4", "--quiet"]) == 0
    assert set(built(tmp_path / "out")) == {"topk-k-4"}
    capsys.readouterr()
    assert main(["train", str(suite), "--results", str(store)]) == 0
    assert "training 6 SAEs: going on at step 4 of 8" in capsys.readouterr().err
    assert hashes(tmp_path / "out") == whole and not leftovers(tmp_path / "out")


def test_a_kill_before_the_checkpoint_is_removed_leaves_it_to_the_next_start(tmp_path: Path, monkeypatch) -> None:
    suite, store = sweep_suite(tmp_path), tmp_path / "out" / "evalkit.duckdb"

    def discard(self: Checkpoint) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Checkpoint, "discard", discard)
        train_suite(suite, store)
    assert len(built(tmp_path / "out")) == 7 and len(leftovers(tmp_path / "out")) == 1
    assert train_suite(suite, store).exit_code == 0
    assert not leftovers(tmp_path / "out")


def test_a_disk_that_is_full_at_publication_keeps_the_weights_for_the_next_start(
    whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, store = sweep_suite(tmp_path), tmp_path / "out" / "evalkit.duckdb"

    def publish(dictionary: Dictionary, target: Path) -> None:
        if "k-4" in target.name:
            raise OSError(28, "No space left on device")
        save_dictionary(dictionary, target)

    with monkeypatch.context() as patched:
        patched.setattr(training_rounds, "save_dictionary", publish)
        assert main(["train", str(suite), "--results", str(store)]) == 4
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 and "the last checkpoint is kept, and the same command goes on" in said
    assert len(built(tmp_path / "out")) == 6 and len(leftovers(tmp_path / "out")) == 1
    assert main(["train", str(suite), "--results", str(store), "--quiet"]) == 0
    assert hashes(tmp_path / "out") == whole and not leftovers(tmp_path / "out")


def test_a_disk_that_is_full_for_the_checkpoint_ends_the_round_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, store = sweep_suite(tmp_path, training="checkpoint_s = 0"), tmp_path / "out" / "evalkit.duckdb"

    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("evalkit.training.loop.checkpoint.save_file", full)
        assert main(["train", str(suite), "--results", str(store)]) == 4
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 and "free space there" in said and "7 of 7 dictionaries" in said
    assert not built(tmp_path / "out") and "Traceback" not in said


def test_dictionaries_are_published_where_only_the_last_checkpoint_has_no_room(
    whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("evalkit.training.loop.checkpoint.save_file", full)
        assert train_suite(sweep_suite(tmp_path), tmp_path / "out" / "evalkit.duckdb").exit_code == 0
    assert hashes(tmp_path / "out") == whole and not leftovers(tmp_path / "out")


def test_text_that_gives_out_keeps_a_checkpoint_and_says_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = '[[dictionary]]\nname = "S"\ntrain = { features = 64, k = [2, 4], batch = 256, tokens = 2560 }\n'
    suite = sweep_suite(tmp_path, sweep, "stream = true\nrepeat = false\nbuffer_mb = 1")
    # so many positions are massive that the text has fewer activations than it promised
    suite.write_text(suite.read_text().replace("norm_multiple = 0", "norm_multiple = 1.0"))
    assert main(["train", str(suite), "--results", str(tmp_path / "out" / "evalkit.duckdb")]) == 4
    said = capsys.readouterr().err
    assert "the text gave out after" in said and "repeat = true" in said and "Traceback" not in said
    (left,) = leftovers(tmp_path / "out")
    assert (left / FILE).exists() and not built(tmp_path / "out")


def test_ctrl_c_ends_the_command_with_130_and_the_same_command_goes_on(
    whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, store = sweep_suite(tmp_path), tmp_path / "out" / "evalkit.duckdb"
    stepped = Together.step

    def step(self: Together, *arguments: object) -> object:
        if self.number == 2:
            signal.raise_signal(signal.SIGINT)
        return stepped(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Together, "step", step)
        assert main(["train", str(suite), "--results", str(store)]) == 130
    said = capsys.readouterr().err
    assert "training 7 SAEs: interrupted after step 3 of 8" in said
    assert f"go on with: evalkit train {suite} --results {store}" in said and "Traceback" not in said
    assert main(["train", str(suite), "--results", str(store)]) == 0
    assert "going on at step 3 of 8" in capsys.readouterr().err
    assert hashes(tmp_path / "out") == whole and not leftovers(tmp_path / "out")
    with evalkit.open_results(store) as results:
        assert set(results.training()["dictionary"].value_counts()) == {8}


def scores(**by_name: tuple[float, float]) -> pd.DataFrame:
    rows = [
        {
            "dictionary": name.replace("__", " k="), "metric": metric, "mean": value, "low": value - 0.01, "high": value + 0.01,
            "hook_point": "blocks.0.hook_resid_post", "config": "", "title": metric.upper(), "better": better, "run": "r",
            "no_interval": "",
        }
        for name, (l0, fvu) in by_name.items()
        for metric, value, better in (("l0", l0, "neither"), ("fvu", fvu, "lower"))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_front_keeps_what_nothing_sparser_beats() -> None:
    points = pd.DataFrame({"l0": [8, 2, 4, 4, 16], "mean": [0.4, 0.6, 0.5, 0.3, 0.2]}, index=list("abcde"))
    assert list(front(points, "lower").index) == ["b", "d", "e"]
    assert list(front(points.assign(mean=-points["mean"]), "higher").index) == ["b", "d", "e"]


def test_sweeps_are_told_from_single_dictionaries() -> None:
    assert family("TopK k=16 seed=0") == "TopK" and family("PCA") == "PCA"
    assert has_sweep(scores(A__2=(2, 0.5), A__4=(4, 0.4)))
    assert not has_sweep(scores(A__2=(2, 0.5), B__4=(4, 0.4), C=(3, 0.1), D=(3, 0.2)))
    assert not has_sweep(pd.DataFrame())


def test_the_figure_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    frame = scores(A__2=(2, 0.5), A__4=(4, 0.4), B=(30, 0.1), C=(4000, 0.0))
    for suffix in (".png", ".svg", ".pdf"):
        pareto_figure(frame, tmp_path / f"p{suffix}")
    text = (tmp_path / "p.svg").read_text()
    assert "<svg" in text
    with pytest.raises(UsageError, match="nothing to draw"):
        pareto_figure(pd.DataFrame(), tmp_path / "q.png")
    with pytest.raises(UsageError, match="nothing to draw"):
        pareto_figure(frame[frame["metric"] == "fvu"], tmp_path / "q.png")
    with pytest.raises(UsageError, match="cannot be written"):
        pareto_figure(frame, tmp_path / "q.docx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.pdf", "p.png", "p.svg"]


def test_one_that_raises_whatever_it_is_leaves_the_others(
    whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, store = sweep_suite(tmp_path), tmp_path / "out" / "evalkit.duckdb"
    real = training_rounds._train

    def train(bench, members, *more):  # type: ignore[no-untyped-def]
        if any("k=4" in member.name for member in members):
            raise ZeroDivisionError("division by zero")
        return real(bench, members, *more)

    with monkeypatch.context() as patched:
        patched.setattr(training_rounds, "_train", train)
        assert main(["train", str(suite), "--results", str(store)]) == 4
    said = capsys.readouterr().err
    assert (
        "each is trained by itself" in said and "failed: ZeroDivisionError: division by zero" in said and "Traceback" not in said
    )
    assert set(whole) - set(built(tmp_path / "out")) == {"topk-k-4"}
    assert main(["train", str(suite), "--results", str(store), "--quiet"]) == 0
    assert hashes(tmp_path / "out") == whole and not leftovers(tmp_path / "out")
