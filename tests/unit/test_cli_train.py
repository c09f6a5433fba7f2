"""``evalkit train``: builds what a suite trains, shows where it ended, and leaves it for a later ``evalkit run``."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from suite_case import tiny_suite

import evalkit
from evalkit.cli import main
from evalkit.dictionaries.storage import load_dictionary
from evalkit.errors import UsageError
from evalkit.report.views.training import _Curve, _styles, training_figure, training_table

SECOND = '[[dictionary]]\nname = "wide"\ntrain = { architecture = "tied", features = 96, tokens = 4096, batch = 256 }\n'


def train_suite(folder: Path, training: str = "", dictionaries: str = SECOND, hooks: str = "", name: str = "train") -> Path:
    """The tiny suite without judge and evaluations, with a second dictionary."""
    text = tiny_suite(folder).read_text().split("[judge]")[0] + dictionaries + f"\n[training]\n{training}\n"
    if hooks:
        text = text.replace('["blocks.0.hook_resid_post"]', hooks)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything of one finished ``evalkit train``."""
    home = tmp_path_factory.mktemp("train")
    assert main(["train", str(train_suite(home)), "--results", str(home / "out" / "evalkit.duckdb"), "--quiet"]) == 0
    return home


def test_it_trains_the_trained_and_nothing_else(home: Path) -> None:
    folders = sorted((home / "out" / "dictionaries").iterdir())
    assert [folder.name.rsplit("-", 1)[0] for folder in folders] == ["sae", "wide"]
    sae = load_dictionary(folders[0])
    assert (sae.kind, sae.n_features) == ("topk", 64)
    assert sae.details["name"] == "SAE" and sae.details["end"]["l0"] == pytest.approx(4, abs=0.5)


def test_again_is_a_look_up_with_table_and_figure(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = home / "out" / "evalkit.duckdb"
    code, out, err = typed(capsys, "train", home / "train.toml", "--results", store)
    assert code == 0
    assert "training" not in err
    for words in ("SAE", "wide", "FVU", "tokens/s", str(home / "out" / "dictionaries")):
        assert words in out
    (figure,) = (home / "out" / "figures").glob("*.png")
    assert str(figure) in out and figure.read_bytes().startswith(b"\x89PNG")


def test_rows_are_in_the_store_and_survive_a_rebuild(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = home / "out" / "evalkit.duckdb"
    with evalkit.open_results(store) as results:
        before = results.training()
        names = results.dictionaries()["names"]
    assert set(names) == {"SAE", "wide"}
    assert before.groupby("dictionary")["tokens"].agg(["count", "max"]).to_dict("index") == {
        "SAE": {"count": 16, "max": 4096},
        "wide": {"count": 16, "max": 4096},
    }
    assert before[["loss", "fvu", "l0", "dead_share", "tokens_per_second"]].notna().all(axis=None)
    folders = {folder.name for folder in (home / "out" / "dictionaries").iterdir()}
    assert set(before["recipe"]) == folders
    assert typed(capsys, "rebuild", "--results", store)[0] == 0
    with evalkit.open_results(store) as results:
        pd.testing.assert_frame_equal(results.training(), before)
        assert list(results.runs()["status"]) == ["done"]
        (sae,) = [name for name in folders if name.startswith("sae")]
        assert set(results.training([sae])["dictionary"]) == {"SAE"}
        (fit,) = results.texts().to_dict("records")
        assert (fit["side"], fit["asked"], fit["context"], fit["documents"]) == ("fit", 3000, 32, 12)
        assert fit["kept"] == fit["tokens"] - 2 * fit["tokens"] // 32
    code, out, _ = typed(capsys, "show", "texts", "--results", store, "--format", "csv")
    assert code == 0 and out.startswith("run_id,side,hook_point") and len(out.splitlines()) == 2


def test_a_later_run_finds_what_was_trained(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite, store = tiny_suite(home), home / "out" / "evalkit.duckdb"
    weights = next((home / "out" / "dictionaries").glob("sae-*/weights.safetensors"))
    made = weights.stat().st_mtime_ns
    code, _, err = typed(capsys, "run", suite, "--results", store, "--only", "reconstruction")
    assert code == 0
    assert "training SAE" not in err and "fitting neurons" in err
    assert weights.stat().st_mtime_ns == made


def test_a_run_keeps_the_curves_of_what_it_trains(tmp_path: Path) -> None:
    store = tmp_path / "out" / "evalkit.duckdb"
    assert main(["run", str(tiny_suite(tmp_path)), "--results", str(store), "--only", "reconstruction", "--quiet"]) == 0
    with evalkit.open_results(store) as results:
        assert list(results.training()["step"]) == list(range(1, 17))


def test_only_one_and_its_near_miss(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "out" / "evalkit.duckdb"
    code, _, err = typed(capsys, "train", home / "train.toml", "--results", store, "--only", "wied")
    assert code == 2 and "did you mean 'wide'?" in err and not store.parent.exists()
    code, out, _ = typed(capsys, "train", home / "train.toml", "--results", store, "--only", "wide", "--quiet")
    assert code == 0 and "SAE" not in out


def test_streamed_with_shards_at_two_hook_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hooks = '["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]'
    training = "stream = true\nshards = true\nstream_tokens = 4000\nbuffer_mb = 1"
    store = tmp_path / "out" / "evalkit.duckdb"
    suite = train_suite(tmp_path, training, "", hooks)
    code, out, err = typed(capsys, "train", suite, "--results", store)
    assert code == 0, err
    assert "streamed fitting text: 4,000 tokens (4,000 asked for) in 125 windows of 32 from 12 documents" in err
    with evalkit.open_results(store) as results:
        read = results.texts()
    assert read["side"].tolist() == ["stream"] * 2 and read["hook_point"].nunique() == 2
    assert read["tokens"].tolist() == read["asked"].tolist() == [4000] * 2 and read["kept"].isna().all()
    assert out.count("blocks.") >= 2 and "presented about" in err
    assert not (tmp_path / "out" / "cache" / "activations").exists()
    assert len(list((tmp_path / "out" / "cache" / "shards").glob("*/*.npy"))) == 2
    first, second = (load_dictionary(f) for f in sorted((tmp_path / "out" / "dictionaries").iterdir()))
    assert first.details["streamed"] and {first.hook_point, second.hook_point} == {hooks[2:26], hooks[30:53]}
    # without shards the same rows come in the same order
    plain = train_suite(tmp_path, training.replace("shards = true", "shards = false"), "", hooks)
    assert main(["train", str(plain), "--results", str(tmp_path / "plain" / "evalkit.duckdb"), "--quiet"]) == 0
    names = [folder.name for folder in sorted((tmp_path / "out" / "dictionaries").iterdir())]
    for name, dictionary in zip(names, (first, second), strict=True):
        assert load_dictionary(tmp_path / "plain" / "dictionaries" / name).identity.hash == dictionary.identity.hash


@pytest.mark.parametrize(
    ("training", "dictionaries", "words"),
    [
        ("", '[[dictionary]]\nname = "x"\ntrain = { architecture = "topkk" }', "did you mean 'topk'?"),
        ("straem = true", "", "did you mean 'stream'?"),
        ("shards = true", "", "stream = true"),
        ("repeat = false", "", "are to be presented"),
        ('log = "wandb"', "", "pip install wandb"),
    ],
)
def test_mistakes_are_one_clear_message(
    training: str, dictionaries: str, words: str, home: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    suite = train_suite(home, training, dictionaries, name="wrong")
    code, _, err = typed(capsys, "train", suite, "--results", tmp_path / "out" / "evalkit.duckdb", "--quiet")
    assert code == 2 and words in err and "Traceback" not in err


def test_a_run_of_a_suite_that_only_trains_names_the_other_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = typed(capsys, "run", home / "train.toml", "--results", home / "none" / "evalkit.duckdb")
    assert code == 2 and "evalkit train" in err
    assert typed(capsys, "suite", home / "train.toml")[0] == 0


def test_a_suite_that_trains_nothing_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (home / "train.toml").read_text()
    begin, end = text.index("[[dictionary]]"), text.index('[[dictionary]]\nname = "neurons"')
    suite = home / "nothing.toml"
    suite.write_text(text[:begin] + text[end : text.index('[[dictionary]]\nname = "wide"')])
    code, _, err = typed(capsys, "train", suite, "--results", home / "none" / "evalkit.duckdb")
    assert code == 2 and "trains no dictionary" in err


def test_one_that_diverges_is_said_and_the_others_go_on(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = '[[dictionary]]\nname = "wild"\ntrain = { architecture = "topk", features = 64, k = 4, tokens = 4096, lr = 1e30 }\n'
    suite = train_suite(home, "checkpoint_s = 0", wild + SECOND, name="wild")
    code, out, err = typed(capsys, "train", suite, "--results", tmp_path / "out" / "evalkit.duckdb")
    assert code == 4
    assert "diverged" in err and "'wild'" in err and "evalkit train" in err
    assert "SAE" in out and "wide" in out and "wild" not in out
    # quietly too the end says why
    code, _, quiet = typed(capsys, "train", suite, "--results", tmp_path / "quiet" / "evalkit.duckdb", "--quiet")
    assert code == 4 and "diverged" in quiet and "1 of 3 dictionaries were not trained" in quiet and "'wild'" in quiet


def test_the_table_and_the_figure_by_themselves(tmp_path: Path) -> None:
    row = {"dictionary": "SAE", "hook_point": "h", "folder": Path("f"), "features": 64, "fvu": 0.12345, "l0": 31.96}
    text = training_table([row | {"dead_share": 0.031, "tokens_per_second": None}])
    line = next(line for line in text.splitlines() if line.startswith("SAE"))
    assert line.split() == ["SAE", "64", "0.1235", "32.0", "3.1%", "-", "f"]
    with pytest.raises(UsageError, match="no training to draw"):
        training_figure(pd.DataFrame(), tmp_path / "x.png")
    with pytest.raises(UsageError, match="cannot be written"):
        training_figure(pd.DataFrame(), tmp_path / "x.docx")


def test_the_curves_of_a_run_by_name(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, path = home / "out" / "evalkit.duckdb", tmp_path / "curves.svg"
    code, out, _ = typed(capsys, "figure", "training", "--results", store, "-o", path)
    assert code == 0 and out.strip() == str(path) and "<svg" in path.read_text()
    with evalkit.open_results(store) as results:
        curves = results.curves("tiny")
        assert list(curves["dictionary"].unique()) == ["SAE", "wide"]
        assert list(curves[curves["dictionary"] == "SAE"]["step"]) == list(range(1, 17))
        pd.testing.assert_frame_equal(curves, results.curves())
    code, _, err = typed(capsys, "figure", "training", "--results", store, "-o", path, "--run", "tinny")
    assert code == 2 and "did you mean 'tiny'?" in err


def test_colours_are_dictionaries_and_dashes_hook_points_while_there_are_enough() -> None:
    def keys(names: int, hooks: int) -> tuple[set[tuple[str, str]], list[str]]:
        curves = [_Curve(f"SAE {n}", f"blocks.{h}.mlp", pd.DataFrame()) for h in range(hooks) for n in range(names)]
        styles, key = _styles(curves)
        assert len(styles) == len(curves)
        return {(one["color"], str(one["linestyle"])) for one in styles}, [str(entry.get_label()) for entry in key]

    styles, labels = keys(3, 2)
    assert len(styles) == 6 and labels == ["SAE 0", "SAE 1", "SAE 2", "blocks.0.mlp", "blocks.1.mlp"]
    assert keys(3, 1)[1] == ["SAE 0", "SAE 1", "SAE 2"]
    styles, labels = keys(9, 2)
    assert len(styles) == 18 and labels[0] == "SAE 0, blocks.0.mlp" and len(labels) == 18


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
