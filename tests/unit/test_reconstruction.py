"""Reconstruction metrics against predictors with known scores and a straightforward float64 computation."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from evalkit.activations.capture import Activations
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.controls import Identity, Mean
from evalkit.dictionaries.topk import TopK
from evalkit.errors import CorpusError, DictionaryError
from evalkit.evaluations.base import EVALUATIONS, Result
from evalkit.evaluations.reconstruction.evaluation import Reconstruction, ReconstructionConfig
from evalkit.evaluations.reconstruction.parity import PARITY_METRICS
from evalkit.util.progress import Progress

N, T, D, V = 9, 12, 6, 17
CONFIG = ReconstructionConfig(windows=6, batch=4, alive_threshold=3)
names = itertools.count()


class TinyModel:
    """Logits that depend on this and all earlier activations of the window, through a nonlinearity."""

    def __init__(self) -> None:
        self.identity, self.n_vocab, self.calls = f"tiny-{next(names)}", V, 0
        self.special = frozenset({0})
        self.unembed = torch.randn(D, V, generator=torch.Generator().manual_seed(11))

    def logits_with(self, tokens: torch.Tensor, hook_point: str, replacement: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        bounded = replacement.clamp(-5, 5)  # as a layer norm would, so that position 0 does not drown the others
        mixed = bounded + 0.3 * bounded.cumsum(1) / torch.arange(1, T + 1)[:, None]
        return torch.tanh(mixed) @ self.unembed.to(replacement.dtype)


class TinyBench:
    """Activations whose next tokens the tiny model predicts well, so that ablation hurts."""

    hook_point, judge, references, seed = "blocks.0.hook_resid_post", None, {}, 5
    progress = Progress(quiet=True)

    def __init__(self) -> None:
        self.model = TinyModel()
        self._fit, self._score = self._activations(1, "fit"), self._activations(2, "score")

    def _activations(self, seed: int, identity: str) -> Activations:
        generator = torch.Generator().manual_seed(seed)
        x = 1.5 * torch.randn(N, T, D, generator=generator) + 0.5
        keep = torch.rand(N, T, generator=generator) < 0.8
        keep[:, 0] = False
        x[:, 0] = 1e4  # a massive activation: any metric it entered would show it
        predicted = self.model.logits_with(torch.zeros(0), "", x).argmax(-1)
        tokens = torch.cat([torch.zeros(N, 1, dtype=torch.int64), predicted[:, :-1]], dim=1)
        return Activations(x, keep, tokens, torch.arange(N) // 2, identity, 100.0)

    def fit(self) -> Activations:
        return self._fit

    def score(self) -> Activations:
        return self._score


@pytest.fixture
def bench() -> TinyBench:
    return TinyBench()


def measure(bench: TinyBench, dictionary: Dictionary, config: ReconstructionConfig = CONFIG) -> Result:
    return Reconstruction().run(bench, dictionary, config)


def value(result: Result, metric: str) -> float:
    """The metric as the store computes it: sum(value * weight) / sum(weight)."""
    rows = [score for score in result.scores if score.metric == metric and score.status == "ok"]
    assert rows
    return sum(score.value * score.weight for score in rows) / sum(score.weight for score in rows)


def a_topk() -> TopK:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(D, 14, generator=generator)
    b_enc = torch.randn(14, generator=generator)
    return TopK({"W_enc": W, "b_enc": b_enc, "W_dec": 0.3 * W.T.contiguous(), "b_dec": torch.full((D,), 0.4)}, 3)


def test_it_is_registered_and_describes_what_it_returns(bench: TinyBench) -> None:
    assert EVALUATIONS.get("reconstruction") is Reconstruction
    assert {score.metric for score in measure(bench, a_topk()).scores} == set(Reconstruction.metrics) - set(PARITY_METRICS)
    parity = measure(bench, a_topk(), dataclasses.replace(CONFIG, parity=True))
    assert {score.metric for score in parity.scores} == set(Reconstruction.metrics)
    assert [name for name, metric in Reconstruction.metrics.items() if metric.main] == ["fvu"]


def test_the_perfect_predictor(bench: TinyBench) -> None:
    result = measure(bench, Identity(torch.eye(D)))
    assert value(result, "fvu") == 0 and value(result, "explained_variance") == 1
    assert value(result, "loss_recovered_zero") == value(result, "loss_recovered_mean") == 1
    assert value(result, "delta_ce") == 0 and value(result, "kl") == 0
    assert value(result, "perplexity") == value(result, "perplexity_unmodified")
    assert value(result, "l0") == D and value(result, "alive") == 1 and value(result, "dead") == 0


def test_the_mean_of_the_same_data_explains_nothing(bench: TinyBench) -> None:
    kept = bench.score().kept().double()
    result = measure(bench, Mean(kept.mean(0).float()))
    assert value(result, "explained_variance") == pytest.approx(0, abs=1e-6)
    assert value(result, "l0") == 0 and value(result, "dead") == 1
    fitted = measure(bench, Mean(bench.fit().kept().double().mean(0).float()))
    assert value(fitted, "loss_recovered_mean") == pytest.approx(0, abs=1e-6)


def test_writing_zeros_recovers_nothing(bench: TinyBench) -> None:
    result = measure(bench, Mean(torch.zeros(D)))
    assert value(result, "loss_recovered_zero") == 0
    assert value(result, "delta_ce") > 0.1 and value(result, "kl") > 0.1


def test_every_metric_equals_a_plain_float64_computation(bench: TinyBench) -> None:
    d = a_topk()
    result = measure(bench, d)
    score = bench.score()
    x, keep = score.x.double(), score.keep
    W_enc, b_enc, W_dec, b_dec = (t.double() for t in d.tensors().values())
    pre = (x - b_dec) @ W_enc + b_enc
    codes = torch.where(pre >= pre.topk(3, dim=-1).values[..., -1:], pre.clamp(min=0), 0.0)
    x_hat = codes @ W_dec + b_dec

    mean = x[keep].mean(0)
    fvu = (x - x_hat)[keep].square().sum() / (x[keep] - mean).square().sum()
    assert value(result, "fvu") == pytest.approx(float(fvu), rel=1e-5)
    assert value(result, "l0") == pytest.approx(float((codes != 0).sum(-1)[keep].double().mean()))
    assert value(result, "alive") == float(((codes != 0)[keep].sum(0) > 3).double().mean())
    assert value(result, "positions") == float(keep.sum())
    assert value(result, "alive_rate") == pytest.approx(3 / float(keep.sum()) * 1e6)

    windows = sorted({s.item for s in result.scores if s.metric == "kl"})
    assert len(windows) == 6
    totals = dict.fromkeys(("own", "hat", "zero", "mean", "kl", "count"), 0.0)
    replacements = {"own": x, "hat": x_hat, "zero": torch.zeros_like(x), "mean": bench.fit().kept().double().mean(0).expand_as(x)}
    log_q = {
        name: bench.model.logits_with(score.tokens, "", torch.where(keep[..., None], new, x)).log_softmax(-1)
        for name, new in replacements.items()
    }
    for n in windows:
        for t in range(T - 1):
            if keep[n, t]:
                totals["count"] += 1
                for name in replacements:
                    totals[name] -= float(log_q[name][n, t, score.tokens[n, t + 1]])
                own, hat = log_q["own"][n, t], log_q["hat"][n, t]
                totals["kl"] += float((own.exp() * (own - hat)).sum())
    count = totals.pop("count")
    own, hat, zero, mean_ce, kl = (totals[name] / count for name in ("own", "hat", "zero", "mean", "kl"))
    assert value(result, "delta_ce") == pytest.approx(hat - own, rel=1e-4)
    assert value(result, "perplexity") == pytest.approx(hat, rel=1e-5)
    assert value(result, "perplexity_unmodified") == pytest.approx(own, rel=1e-5)
    assert value(result, "kl") == pytest.approx(kl, rel=1e-4)
    assert value(result, "loss_recovered_zero") == pytest.approx((zero - hat) / (zero - own), rel=1e-4)
    assert value(result, "loss_recovered_mean") == pytest.approx((mean_ce - hat) / (mean_ce - own), rel=1e-4)


def test_left_out_positions_keep_their_activation_and_enter_nothing(bench: TinyBench) -> None:
    seen = []
    original = bench.model.logits_with
    bench.model.logits_with = lambda tokens, hook, x: seen.append((tokens, x.clone())) or original(tokens, hook, x)
    measure(bench, a_topk())
    score = bench.score()
    for tokens, x in seen:
        for window, given in zip(tokens, x, strict=True):
            n = int((score.tokens == window).all(1).nonzero()[0])
            assert torch.equal(given[~score.keep[n]], score.x[n][~score.keep[n]])
    changed = score.x.clone()
    changed[:, 0] = -77.0
    plain, other = measure(bench, a_topk()), TinyBench()
    other._score = score._replace(x=changed)
    assert value(measure(other, a_topk()), "fvu") == value(plain, "fvu")


def test_windows_are_items_and_documents_are_clusters(bench: TinyBench) -> None:
    rows = [score for score in measure(bench, a_topk()).scores if score.metric in ("fvu", "kl", "loss_recovered_zero")]
    assert all(score.kind == "window" and score.cluster == score.item // 2 for score in rows)
    assert all(score.weight > 0 for score in rows)
    assert len([score for score in rows if score.metric == "fvu"]) == N


def test_the_passes_without_a_dictionary_are_done_once(bench: TinyBench) -> None:
    before = bench.model.calls
    measure(bench, a_topk())
    first = bench.model.calls - before
    measure(bench, Identity(torch.eye(D)))
    second = bench.model.calls - before - first
    assert (first, second) == (4 * 2, 2)  # 6 windows in batches of 4: two forward passes each
    measure(bench, a_topk(), dataclasses.replace(CONFIG, windows=5))
    assert bench.model.calls - before - first - second == 4 * 2


def test_same_seed_same_rows_and_batches_do_not_matter(bench: TinyBench) -> None:
    assert measure(bench, a_topk()) == measure(bench, a_topk())
    wide = measure(bench, a_topk(), dataclasses.replace(CONFIG, batch=6))
    assert value(wide, "kl") == pytest.approx(value(measure(bench, a_topk()), "kl"), rel=1e-5)


def test_ablation_that_does_not_hurt_is_undefined_not_infinite(bench: TinyBench) -> None:
    bench.model.unembed.zero_()  # every prediction is uniform, whatever the activations
    rows = [score for score in measure(bench, a_topk()).scores if score.metric.startswith("loss_recovered")]
    assert rows and all(score.status == "undefined" and score.value is None for score in rows)


class Backwards(TinyModel):
    """A model that is mistaken in some windows, and less so without activations: there ablation lowers the cross-entropy."""

    def logits_with(self, tokens: torch.Tensor, hook_point: str, replacement: torch.Tensor) -> torch.Tensor:
        logits = super().logits_with(tokens, hook_point, replacement)
        if len(tokens) and tokens.ndim == 2:
            worse = (tokens.sum(1) % N == 4)[:, None, None]
            logits = torch.where(worse, -0.1 * logits, logits)
        return logits


def test_loss_recovered_is_the_ratio_of_sums_over_every_window(bench: TinyBench) -> None:
    bench.model = Backwards()
    bench._score = bench.score()._replace(document=torch.arange(N))
    config = dataclasses.replace(CONFIG, windows=N, batch=3)
    score, d = bench.score(), a_topk()
    read = score.keep.clone()
    read[:, -1] = False
    after = torch.cat([score.tokens[:, 1:], score.tokens[:, :1]], dim=1)

    def ce(x: torch.Tensor) -> torch.Tensor:
        given = torch.where(score.keep[..., None], x, score.x)
        of_token = bench.model.logits_with(score.tokens, "", given).log_softmax(-1).gather(-1, after[..., None])[..., 0]
        return -(of_token * read).sum(1).double()

    own, hat, zero = ce(score.x), ce(d.reconstruct(score.x)), ce(torch.zeros_like(score.x))
    assert (zero < own).any() and zero.sum() > own.sum()  # one window has a negative denominator, the sum has not
    result = measure(bench, d, config)
    rows = [score for score in result.scores if score.metric == "loss_recovered_zero"]
    assert len(rows) == N and all(row.status == "ok" for row in rows), "no window is left out"
    assert value(result, "loss_recovered_zero") == pytest.approx(float((zero - hat).sum() / (zero - own).sum()), rel=1e-5)


def test_sources_give_the_ratios_of_their_own_windows(bench: TinyBench) -> None:
    named = bench.score()._replace(sources=("speeches", "chats", "chats", "speeches", "chats"))
    bench._score = named
    result = measure(bench, a_topk(), dataclasses.replace(CONFIG, windows=N))
    for source in ("speeches", "chats"):
        windows = torch.tensor([named.sources[document] == source for document in named.document.tolist()])
        alone = TinyBench()
        alone._score = named._replace(**{key: getattr(named, key)[windows] for key in ("x", "keep", "tokens", "document")})
        part = Result([score for score in result.scores if score.source == source], {})
        assert {score.item for score in part.scores} == set(windows.nonzero()[:, 0].tolist())
        theirs = measure(alone, a_topk(), dataclasses.replace(CONFIG, windows=N))
        for metric in ("l0", "kl", "delta_ce", "loss_recovered_zero"):
            assert value(part, metric) == pytest.approx(value(theirs, metric), rel=1e-4)


def test_parity_rows_are_what_the_definitions_give(bench: TinyBench) -> None:
    score, d = bench.score(), a_topk()
    score.tokens[:, 0] = 0  # a BOS, special to one of the two; its activation is 1e4 in every dimension
    special = score.tokens == 0
    config = dataclasses.replace(CONFIG, windows=N, parity=True)
    bench.model.identity = "parity"
    result = measure(bench, d, config)
    x, x_hat = score.x.double(), d.reconstruct(score.x).double()

    def log_p(given: torch.Tensor) -> torch.Tensor:
        return bench.model.logits_with(score.tokens, "", given.float()).log_softmax(-1)[:, :-1].double()

    own, hat, zero = log_p(x), log_p(x_hat), log_p(torch.zeros_like(x))
    after = score.tokens[:, 1:, None]
    for name, read in (("saebench", torch.ones_like(special)), ("saelens", ~special)):
        seen = read[:, :-1]
        ce, ce_hat, ce_zero = (-part.gather(-1, after)[..., 0][seen].mean() for part in (own, hat, zero))
        kl_hat, kl_zero = ((own.exp() * (own - part)).sum(-1)[seen].mean() for part in (hat, zero))
        assert value(result, f"{name}_ce_score") == pytest.approx(float((ce_zero - ce_hat) / (ce_zero - ce)), rel=1e-4)
        assert value(result, f"{name}_kl_score") == pytest.approx(float((kl_zero - kl_hat) / kl_zero), rel=1e-4)
        assert value(result, f"{name}_l0") == pytest.approx(float((d.encode(score.x) != 0).sum(-1)[read].double().mean()))
    plain = x[~special]
    r2 = 1 - (x - x_hat)[~special].square().sum() / (plain - plain.mean(0)).square().sum()
    assert value(result, "saelens_explained_variance") == pytest.approx(float(r2), rel=1e-5)
    flat, rest = x.reshape(-1, D), (x - x_hat).reshape(-1, D)
    theirs = 1 - rest.square().sum(1).mean() / (flat.square().sum(1).mean() - flat.square().mean() ** 2)
    assert value(result, "saebench_explained_variance") == pytest.approx(float(theirs), rel=1e-4)


def test_the_formulas_disagree_on_a_constant_as_is_known(bench: TinyBench) -> None:
    everything = bench.score()
    everything.x[:] = torch.randn(N, T, D, generator=torch.Generator().manual_seed(0)) + 0.2
    everything.tokens.clamp_(min=1)
    kept = everything.x.reshape(-1, D).double()
    result = measure(bench, Mean(kept.mean(0).float()), dataclasses.replace(CONFIG, parity=True))
    assert value(result, "saelens_explained_variance") == pytest.approx(0, abs=1e-6)
    assert abs(value(result, "saebench_explained_variance")) > 0.05, "no mean is in that formula"


def test_windows_without_a_kept_position_are_no_items(bench: TinyBench) -> None:
    bench._score.keep[4] = False
    result = measure(bench, a_topk(), dataclasses.replace(CONFIG, windows=100))
    assert {score.item for score in result.scores if score.kind == "window"} == set(range(N)) - {4}
    assert all(np.isfinite(score.value) for score in result.scores if score.status == "ok")


def test_what_cannot_be_measured_is_refused(bench: TinyBench) -> None:
    with pytest.raises(DictionaryError, match="width 3"):
        measure(bench, Mean(torch.zeros(3)))
    bench._score.keep[:] = False
    with pytest.raises(CorpusError, match="no kept position"):
        measure(bench, a_topk())
    for bad in ({"windows": 0}, {"batch": 0}, {"alive_threshold": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ReconstructionConfig(**bad)
