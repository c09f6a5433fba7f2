"""The built-in tasks on the packaged subject model: it can do them, and their pairs differ where they should."""

from __future__ import annotations

import pytest
import torch

from evalkit.models.language_model import LanguageModel, ModelConfig
from evalkit.tasks.base import build_pairs, report
from evalkit.util.progress import Progress

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.load(ModelConfig(package="smollm2-135m-instruct"), Progress(quiet=True))


@pytest.mark.parametrize(("task", "settings"), [("ioi", {"counterfactual": "io"}), ("greater_than", {}), ("agreement", {})])
def test_the_model_can_do_the_task_on_pairs_that_differ_in_one_token(
    model: LanguageModel, task: str, settings: dict[str, str]
) -> None:
    pairs = build_pairs(task, model.tokenise, 12, 0, **settings)
    assert pairs.n == 12
    for row, texts in enumerate(pairs.texts):
        base, target = (model.tokenise(text) for text in texts)
        length = int(pairs.last[row]) + 1
        assert len(base) == len(target) == length
        assert pairs.base[row, :length].tolist() == base and pairs.target[row, :length].tolist() == target
        assert int((pairs.base[row] != pairs.target[row]).sum()) == 1
    found = report(model, pairs)
    assert found.accuracy.n == 12 and found.accuracy.mean >= 0.7
    assert found.logit_difference.mean > 0 and torch.isfinite(torch.tensor(found.logit_difference.values)).all()
