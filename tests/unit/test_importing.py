"""What is said of an imported dictionary, and that its self-check can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from suite_case import tiny_suite

from evalkit.dictionaries.controls import Identity, Mean
from evalkit.dictionaries.loading import Imported
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError, ModelError
from evalkit.models.language_model import load_model
from evalkit.runs.inspect_import import check, describe, model_at_hand, random_check, report
from evalkit.util.progress import Progress

QUIET = Progress(quiet=True)


def topk(width: int = 6, k: int = 2, **where: str) -> TopK:
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (width, 12), "b_enc": (12,), "W_dec": (12, width), "b_dec": (width,)}
    return TopK({name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}, k, **where)


def test_known_predictors_have_known_numbers() -> None:
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    assert check(Identity(torch.eye(6)), x, "x").explained_variance == pytest.approx(1.0)
    mean = check(Mean(x.mean(0)), x, "x")
    assert (mean.explained_variance, mean.l0, mean.alive) == (pytest.approx(0.0, abs=1e-6), 0.0, 0.0)
    assert random_check(topk()).l0 == pytest.approx(2.0, abs=0.2)


def test_a_dictionary_whose_paths_disagree_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = topk()
    monkeypatch.setattr(dictionary, "decode", lambda codes: codes @ dictionary.W_dec)
    monkeypatch.setattr(dictionary, "decode_sparse", lambda codes: torch.ones(*codes.values.shape[:-1], 6))
    with pytest.raises(DictionaryError, match="sparse and dense"):
        random_check(dictionary)
    monkeypatch.setattr(dictionary, "reconstruct", lambda x: x * float("nan"))
    with pytest.raises(DictionaryError, match="NaN"):
        random_check(dictionary)


def test_a_check_in_parts_gives_the_numbers_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dictionary = torch.randn(100, 6, generator=torch.Generator().manual_seed(2)), topk()
    whole = check(dictionary, x, "x")
    monkeypatch.setattr("evalkit.util.batching.MOST", 7 * 12)
    assert check(dictionary, x, "x") == pytest.approx(whole)
    codes, x_hat = dictionary.encode(x), dictionary.reconstruct(x)
    assert whole.l0 == pytest.approx(float((codes > 0).sum(1).double().mean()))
    assert whole.alive == pytest.approx(float((codes > 0).any(0).double().mean()))
    assert whole.explained_variance == pytest.approx(1 - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()))


def test_without_the_model_only_random_vectors_are_tried() -> None:
    found = report(Imported(topk(model="lab/some-model"), "saelens", Path("x")), QUIET)
    assert len(found.checks) == 1
    assert "'lab/some-model' is not on this machine" in describe(found)
    assert "the file names no model" in describe(report(Imported(topk(), "saelens", Path("x")), QUIET))


def test_real_activations_are_tried_where_the_model_is_at_hand(tmp_path: Path) -> None:
    tiny_suite(tmp_path)
    model = str(tmp_path / "model")
    assert model_at_hand(model) == model
    assert model_at_hand("") is None
    width = load_model(model).width("blocks.0.hook_resid_post")
    source = f"folder:{tmp_path / 'fit'}"
    imported = Imported(topk(width, hook_point="blocks.0.hook_resid_post", model=model), "saelens", tmp_path)
    found = report(imported, QUIET, source=source)
    assert [c.what for c in found.checks][1] == "real activations at blocks.0.hook_resid_post"
    assert 0 < found.checks[1].l0 <= 2
    # random weights are far worse than the mean, and a reader is told what that may mean
    assert found.checks[1].explained_variance < 0 and "warning" in describe(found)
    said = describe(found).splitlines()
    assert sum("passed" in line for line in said) == 1 and "random vectors" in next(line for line in said if "passed" in line)
    assert any("DOES NOT FIT" in line and "real activations" in line for line in said)
    assert not any("explained variance" in line and "random vectors" in line for line in said)
    poisoned = topk(width, hook_point="blocks.0.hook_resid_post", model=model)
    poisoned.W_dec[:] = 1e38
    with pytest.raises(DictionaryError, match="NaN or infinite"):
        report(Imported(poisoned, "saelens", tmp_path), QUIET, source=source)
    text = describe(found)
    assert "topk (k = 2)" in text and "explained variance" in text
    with pytest.raises(DictionaryError, match="reads vectors of width 5"):
        report(Imported(topk(5), "saelens", tmp_path), QUIET, model=model, hook_point="blocks.0.hook_resid_post", source=source)
    with pytest.raises(ModelError):
        report(imported, QUIET, model=model, hook_point="blocks.9.hook_resid_post", source=source)
    skipped = report(
        Imported(topk(5, hook_point="blocks.0.hook_resid_post", model=model), "saelens", tmp_path), QUIET, source=source
    )
    assert "width 5" in skipped.skipped


def test_what_the_file_says_of_itself_and_the_next_step_are_printed() -> None:
    details = {
        "made_with": {"context_size": 128, "prepend_bos": True},
        "ignored": {"mystery": "x"},
        "notes": ["its language model was loaded with revision = step3000"],
    }
    dictionary = topk(hook_point="blocks.3.hook_resid_pre")
    dictionary.details.update(details)
    said = describe(report(Imported(dictionary, "saelens", Path("/files/mine"), "hub:lab/saes/layer_3", True), QUIET))
    assert "context_size = 128, prepend_bos = True" in said
    assert "not used: mystery = x" in said and "revision = step3000" in said
    assert '[[dictionary]] with name = "layer_3", import = "hub:lab/saes/layer_3", format = "saelens"' in said
    assert 'hook_points = ["blocks.3.hook_resid_pre"]' in said
    local = describe(report(Imported(topk(), "saelens", Path("/files/my sae")), QUIET))
    assert 'import = "/files/my sae"' in local and "format =" not in local
