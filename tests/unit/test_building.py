"""Sweeps in a suite: trained in one pass, each kept under its own recipe, and the Pareto picture of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from suite_case import tiny_suite

import evalkit
from evalkit.bench import Workbench
from evalkit.cli import main
from evalkit.dictionaries.storage import load_dictionary
from evalkit.errors import UsageError
from evalkit.progress import Progress
from evalkit.report.pareto import family, front, has_sweep, pareto_figure
from evalkit.suite import load_suite

SWEEP = """
[[dictionary]]
name = "TopK"
train = { architecture = "topk", features = 64, k = [2, 4, 8], tokens = 2048, batch = 256 }

[[dictionary]]
name = "tied"
train = { architecture = "tied", features = 64, l1 = [0.001, 0.01], seed = [0, 1], tokens = 2048, batch = 256 }
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
        first = bench.spec("S k=2 batch=128")
        bench.dictionary(first, "blocks.0.hook_resid_post")
        there = [spec.name for spec in suite.dictionaries if bench.is_built(spec, "blocks.0.hook_resid_post")]
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


def scores(**by_name: tuple[float, float]) -> pd.DataFrame:
    rows = [
        {
            "dictionary": name.replace("__", " k="), "metric": metric, "mean": value, "low": value - 0.01, "high": value + 0.01,
            "hook_point": "blocks.0.hook_resid_post", "config": "", "title": metric.upper(), "better": better, "run": "r",
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
