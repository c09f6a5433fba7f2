"""The evaluation 'prediction' on a model whose right answer is planted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from patching_case import double_model

from evalkit.activations.capture import Activations
from evalkit.dictionaries.controls import Identity, Mean
from evalkit.errors import DictionaryError, UnitFailed
from evalkit.evaluations.base import EVALUATIONS
from evalkit.evaluations.prediction import Prediction, PredictionConfig, feature_of
from evalkit.util.progress import Progress

HOOK = "blocks.0.hook_resid_post"
N, T, D = 30, 12, 32
TRIGGER, WRITTEN, UNTOUCHED = 5, 7, 9


class PlantedBench:
    """Blocks do nothing. Dimension 0 is written by the trigger alone and read by the logit of one token alone; dimension 1 is
    written by every token and read by none."""

    judge, references, seed, hook_point = None, {}, 5, HOOK
    progress = Progress(quiet=True)

    def __init__(self, model) -> None:
        self.model = model
        inner = model._bridge.original_model
        with torch.no_grad():
            for name, weight in inner.named_parameters():
                if "o_proj" in name or "down_proj" in name or "lm_head" in name:
                    weight.zero_()
                if "embed_tokens" in name:
                    weight[:, 0] = 0
                    weight[TRIGGER, 0] = 3.0
                    weight[:, 1] = weight[:, 1].abs() + 0.1
                if "lm_head" in name:
                    weight[WRITTEN, 0] = 4.0
        self.sides = {side: self._text(seed) for side, seed in (("fit", 1), ("score", 2))}

    def _text(self, seed: int) -> Activations:
        tokens = torch.randint(10, 40, (N, T), generator=torch.Generator().manual_seed(seed))
        tokens[::2, 3] = TRIGGER
        keep = torch.ones(N, T, dtype=torch.bool)
        keep[:, 0] = False
        return Activations(self.model.activations(tokens, HOOK), keep, tokens, torch.arange(N) // 2, str(seed), 1e9)

    def fit(self) -> Activations:
        return self.sides["fit"]

    def score(self) -> Activations:
        return self.sides["score"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[PlantedBench]:
    yield PlantedBench(double_model(Path(tmp_path_factory.mktemp("planted"))))


def word(bench: PlantedBench, token: int) -> str:
    """A text that is this one token."""
    (text,) = bench.model.token_strings([token])
    assert bench.model.tokenise(text) == [token]
    return text


def run(bench: PlantedBench, follows: int, dictionary=None, **more):
    config = PredictionConfig(trigger=(word(bench, TRIGGER),), follows=word(bench, follows), **more)
    scores = Prediction().run(bench, dictionary or Identity(torch.eye(D)), config).scores
    return {metric: [s for s in scores if s.metric == metric] for metric in Prediction.metrics}


def test_what_the_trigger_writes_is_found_and_without_it_the_token_is_less_likely(bench):
    assert EVALUATIONS.get("prediction") is Prediction
    found = run(bench, WRITTEN)
    assert found["feature"][0].value == 0 and found["correlation"][0].value == pytest.approx(1.0)
    assert len(found["change"]) == 15 and all(score.value < -0.5 for score in found["change"])
    for own, null, apart in zip(found["change"], found["change_random"], found["beyond_random"], strict=True):
        assert abs(null.value) < 0.5 * abs(own.value) and apart.value == pytest.approx(own.value - null.value)
    assert np.mean([score.value for score in found["change_other"]]) > np.mean([score.value for score in found["change"]]) + 0.3
    assert {score.value for score in found["lowered"]} == {score.value for score in found["fires"]} == {1.0}
    assert {(s.kind, s.cluster) for s in found["change"]} == {("window", w // 2) for w in range(0, N, 2)}
    wrong = run(bench, UNTOUCHED)
    assert all(score.value > 0 for score in wrong["change"]), "what the trigger does not write gains what the other loses"


def test_contexts_are_those_of_the_trigger_and_no_more_than_asked(bench):
    assert len(run(bench, WRITTEN, contexts=4)["change"]) == 4
    windows = [score.item for score in run(bench, WRITTEN)["change"]]
    assert sorted(windows) == list(range(0, N, 2))


def test_the_correlation_is_pearsons_over_kept_positions(bench):
    fit = bench.fit()
    found = feature_of(Identity(torch.eye(D)), fit, torch.tensor([TRIGGER, 11]))
    marked = torch.isin(fit.tokens, torch.tensor([TRIGGER, 11]))[fit.keep].double().numpy()
    codes = fit.x[fit.keep].double().numpy()
    expected = [np.corrcoef(codes[:, d], marked)[0, 1] for d in range(D)]
    assert found.feature == int(np.nanargmax(expected)) and found.correlation == pytest.approx(np.nanmax(expected), rel=1e-5)


def test_what_cannot_be_predicted_is_one_message(bench):
    two = word(bench, TRIGGER) + word(bench, WRITTEN) + word(bench, 12)
    with pytest.raises(UnitFailed, match="tokens of this model"):
        Prediction().run(bench, Identity(torch.eye(D)), PredictionConfig(trigger=(two,), follows=word(bench, WRITTEN)))
    absent = PredictionConfig(trigger=(word(bench, 8),), follows=word(bench, WRITTEN))
    with pytest.raises(UnitFailed, match="0 of 330 kept positions"):
        Prediction().run(bench, Identity(torch.eye(D)), absent)
    with pytest.raises(UnitFailed, match="no feature is more active"):
        run(bench, WRITTEN, Mean(torch.zeros(D)))
    with pytest.raises(DictionaryError, match="width 16"):
        run(bench, WRITTEN, Identity(torch.eye(16)))
    for settings in ({"trigger": ()}, {"follows": ""}, {"contexts": 0}, {"nulls": 0}):
        with pytest.raises(ValueError):
            PredictionConfig(**settings)
