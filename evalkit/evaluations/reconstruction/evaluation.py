"""How faithfully a dictionary rebuilds activations, and what the language model loses when it reads the rebuilt ones.

1. On every kept position of the scoring text: L0, fraction of variance unexplained, and which features fire.
2. On a seeded draw of scoring windows the activation at the hook point is replaced, and the rest of the model run, four ways:
   by itself, by zero, by the mean of the fitting text, and by x_hat. Positions the capture rule left out (massive
   activations) keep their own activation in every one of them.
3. Next-token cross-entropy is read at kept positions that have a next token; so is KL(unmodified || substituted).
4. Loss recovered = (CE(ablated) - CE(x_hat)) / (CE(ablated) - CE(unmodified)), against zero and against mean ablation: a ratio
   of sums over all windows (``ratios``), also those where ablation does not raise the cross-entropy.
5. Every window has the source of its text, so that tables give a row for each source and one for all.
6. ``parity = true`` adds the numbers as other harnesses define them (``parity``).
7. The passes that do not depend on the dictionary are done once and kept for the next dictionary.

Papers: FVU and perplexity, Cunningham et al. 2023 (arXiv 2309.08600, section 6.2 and appendix); loss recovered, Rajamanoharan
et al. 2024 (arXiv 2404.16014). Zero ablation of a residual stream destroys everything, so its score sits near 1 for any
dictionary: the raw change of cross-entropy and the KL stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from evalkit.errors import CorpusError
from evalkit.evaluations.base import EVALUATIONS, Bench, Evaluation, Metric, Result, Score, Sizes
from evalkit.evaluations.reconstruction.parity import PARITY_METRICS, parity_scores
from evalkit.evaluations.reconstruction.ratios import ratio_items
from evalkit.evaluations.reconstruction.substitution import KEPT_REFERENCES, Passes, drawn_windows, references
from evalkit.util.batching import blocks
from evalkit.util.settings import Count, NotNegative, Settings

if TYPE_CHECKING:
    from evalkit.activations.capture import Activations
    from evalkit.dictionaries.base import Dictionary


EXCLUDED = "Positions left out as massive activations enter no metric and are never replaced, the same for all dictionaries."


@dataclass(frozen=True)
class ReconstructionConfig(Settings):
    """Settings of the evaluation 'reconstruction'."""

    windows: Count = 32
    """Scoring windows, drawn by seed, in which activations are replaced and the model run on. L0, FVU and alive features
    always use the whole scoring text."""
    batch: Count = 4
    """Windows a forward pass; memory holds batch * context * vocabulary logits. Can change numbers by rounding errors."""
    alive_threshold: NotNegative = 10
    """A feature is alive when it fires more often than this in the kept scoring text. The paper's threshold is as many firings in
    about 2.1 million activations. The rate that this makes here, and the number of positions, stand beside the share."""
    parity: bool = False
    """Further columns as SAEBench 0.6 and SAELens 6 define them: every position replaced, the BOS and massive ones too."""


class Reference(NamedTuple):
    """What the passes without a dictionary gave, for the drawn windows; W windows, P read positions in all."""

    windows: Int[torch.Tensor, " W"]
    """Which scoring windows were drawn."""
    reads: Float[torch.Tensor, " W"]
    """Read positions of each window: kept, and with a next token."""
    ce: Float[torch.Tensor, " W"]
    """Summed cross-entropy of the unmodified model, nats, float64; so are the next two."""
    ce_zero: Float[torch.Tensor, " W"]
    """... with the kept activations replaced by zero."""
    ce_mean: Float[torch.Tensor, " W"]
    """... with the kept activations replaced by the mean of the kept fitting text."""
    log_p: Float[np.ndarray, "P V"]
    """Unmodified log-probabilities at the read positions, memory-mapped."""


@EVALUATIONS.register("reconstruction")
class Reconstruction(Evaluation):
    """L0, FVU, loss recovered, change of cross-entropy, KL, perplexity, alive features."""

    name = "reconstruction"
    version = 2
    config = ReconstructionConfig
    headline = ("l0", "fvu", "loss_recovered_mean", "delta_ce", "alive")
    metrics: ClassVar[dict[str, Metric]] = {
        "l0": Metric("L0", "neither", lowest=0.0, digits=1, note="Mean number of non-zero codes a kept token."),
        "fvu": Metric(
            "FVU",
            "lower",
            lowest=0.0,
            chance=1.0,
            main=True,
            note=f"Squared error over squared distance from the mean of the kept scoring text. {EXCLUDED}",
        ),
        "explained_variance": Metric("explained variance", "higher", highest=1.0, chance=0.0, note="1 - FVU."),
        "loss_recovered_zero": Metric(
            "loss recovered (zero)",
            "higher",
            chance=0.0,
            note="(CE zero-ablated - CE substituted) / (CE zero-ablated - CE unmodified); near 1 for any dictionary of a "
            "residual stream, because zero ablation destroys it. A ratio of sums over all windows; undefined where ablation may "
            f"not raise CE at all. {EXCLUDED}",
        ),
        "loss_recovered_mean": Metric(
            "loss recovered (mean)", "higher", chance=0.0, note="The same against replacing by the mean of the kept fitting text."
        ),
        "delta_ce": Metric("change of CE", "lower", note=f"Nats a token; substituted minus unmodified. {EXCLUDED}"),
        "kl": Metric("KL", "lower", lowest=0.0, note="KL(unmodified || substituted) of the next token, nats a token."),
        "perplexity": Metric(
            "perplexity", "lower", transform="exp", digits=1, note="exp of the mean CE with activations substituted."
        ),
        "perplexity_unmodified": Metric(
            "perplexity, unmodified", "neither", transform="exp", digits=1, note="The model as it is, on the same positions."
        ),
        "alive": Metric(
            "alive above rate",
            "higher",
            lowest=0.0,
            highest=1.0,
            interval=False,
            note="Share of features that fire more than alive_threshold times (10 unless set) in the kept scoring text, which is "
            "the rate beside it. On more text a lower rate can be seen: shares at different rates do not compare.",
        ),
        "alive_rate": Metric(
            "rate, firings per million", "neither", interval=False, digits=1, note="alive_threshold over positions, times 10^6."
        ),
        "dead": Metric("dead at rate", "lower", interval=False, note="1 - alive."),
        "positions": Metric(
            "positions", "neither", interval=False, digits=0, note="Kept scoring positions behind alive and dead."
        ),
        **PARITY_METRICS,
    }

    def temporary(self, config: ReconstructionConfig, sizes: Sizes) -> int:
        """Log-probabilities at every position of the drawn windows, of the passes that are remembered (two a hook point)."""
        windows = min(config.windows, sizes.windows)
        passes = min(KEPT_REFERENCES, 2 * sizes.hook_points) + 1  # the next is made before the oldest goes
        return passes * 4 * windows * (sizes.context - 1) * sizes.vocabulary

    def run(self, bench: Bench, dictionary: Dictionary, config: ReconstructionConfig) -> Result:
        """Measure ``dictionary`` on the scoring text.

        Raises:
            DictionaryError: its width is not that of the hook point.
            CorpusError: the scoring text has no kept position.
        """
        score = bench.score()
        dictionary.check_width(score.x.shape[-1], bench.hook_point)
        if not score.keep.any():
            raise CorpusError("the scoring text has no kept position", fix="add text or widen the rule for massive activations")
        with torch.inference_mode():
            scores = [*_faithfulness(score, dictionary, config), *_substitution(bench, score, dictionary, config)]
            if config.parity:
                more = parity_scores(bench, score, dictionary, config.windows, config.batch, bench.model.special)
                scores += more
            return Result(scores, {})


def _faithfulness(score: Activations, dictionary: Dictionary, config: ReconstructionConfig) -> Iterator[Score]:
    """L0, FVU and alive features on every kept scoring position."""
    N, T, D = score.x.shape
    mean = _mean(score)
    error, spread, active, count = (torch.zeros(N, dtype=torch.float64) for _ in range(4))
    fired = torch.zeros(dictionary.n_features, dtype=torch.int64)
    for part in blocks(N, T * dictionary.n_features):
        keep = score.keep[part]
        x = score.x[part][keep]  # (M, D)
        window = part.start + keep.nonzero()[:, 0]  # (M,)
        if dictionary.sparse:
            codes = dictionary.encode_sparse(x)
            on = codes.values != 0  # (M, K)
            fired += codes.indices[on].bincount(minlength=dictionary.n_features)
            x_hat = dictionary.restore(dictionary.decode_sparse(codes), x)
        else:
            dense = dictionary.encode(x)
            on = dense != 0  # (M, F)
            fired += on.sum(0)
            x_hat = dictionary.restore(dictionary.decode(dense), x)
        active.index_add_(0, window, on.sum(1).double())
        count.index_add_(0, window, torch.ones(len(x), dtype=torch.float64))
        error.index_add_(0, window, (x - x_hat).double().square().sum(1))
        spread.index_add_(0, window, (x.double() - mean).square().sum(1))
    for n in count.nonzero()[:, 0].tolist():
        about = _about(score, n, int(count[n]))
        yield Score("l0", float(active[n] / count[n]), weight=float(count[n]), **about)
        yield _ratio("fvu", float(error[n]), float(spread[n]), about)
        yield _ratio("explained_variance", float(spread[n] - error[n]), float(spread[n]), about)
    alive = float((fired > config.alive_threshold).double().mean())
    positions = int(count.sum())
    yield Score("alive", alive, n=positions)
    yield Score("alive_rate", config.alive_threshold / positions * 1e6, n=positions)
    yield Score("dead", 1 - alive, n=positions)
    yield Score("positions", float(positions), n=positions)


def _ratio(metric: str, numerator: float, denominator: float, about: dict[str, Any]) -> Score:
    """A ratio with its denominator as the weight; undefined where the denominator is not positive."""
    value = numerator / denominator if denominator > 0 else None
    return Score.of(metric, value, weight=max(0.0, denominator), **about)


def _mean(activations: Activations) -> Float[torch.Tensor, " D"]:
    """Mean of the kept positions, float64."""
    total = torch.zeros(activations.x.shape[-1], dtype=torch.float64)
    for start in range(0, len(activations.x), 64):
        total += activations.x[start : start + 64][activations.keep[start : start + 64]].double().sum(0)
    return total / activations.keep.sum()


def _substitution(bench: Bench, score: Activations, dictionary: Dictionary, config: ReconstructionConfig) -> Iterator[Score]:
    """Cross-entropy and KL with x_hat in place of the kept activations of the drawn windows."""
    drawn = drawn_windows(score, config.windows, bench.seed)
    passes = Passes(bench, score, drawn, config.batch, score.keep[drawn], score.keep[drawn])
    reference = _shared_passes(bench, score, passes, config)
    with bench.progress.stage(f"running on from {dictionary.kind}", len(drawn), "windows") as stage:
        found = passes.run(dictionary.reconstruct, stage, against=reference.log_p)
    rows = reference.reads.nonzero()[:, 0].tolist()
    abouts = [_about(score, int(drawn[row]), int(reference.reads[row])) for row in rows]
    substituted, divergence = passes.sums(found.ce), passes.sums(found.kl)
    own, ce = (sums[rows].numpy() for sums in (reference.ce, substituted))
    for name, sums in (("zero", reference.ce_zero), ("mean", reference.ce_mean)):
        ablated = sums[rows].numpy()
        items = ratio_items(ablated - ce, ablated - own, [about["cluster"] for about in abouts])
        for about, item in zip(abouts, items, strict=True):
            # the mean of influence values over one source's windows is not the ratio of that source
            source = about["source"] if item.own else ""
            status = "undefined" if item.value is None else "ok"
            yield Score(f"loss_recovered_{name}", item.value, weight=item.weight, status=status, **{**about, "source": source})
    for row, about in zip(rows, abouts, strict=True):
        count, ours, unmodified = (float(sums[row]) for sums in (reference.reads, substituted, reference.ce))
        values = {"delta_ce": ours - unmodified, "kl": float(divergence[row]), "perplexity": ours}
        for metric, total in {**values, "perplexity_unmodified": unmodified}.items():
            yield Score(metric, total / count, weight=count, **about)


def _about(score: Activations, n: int, count: int) -> dict[str, Any]:
    """What the scores of window ``n`` are about; ``count`` positions are behind them."""
    document = int(score.document[n])
    source = score.sources[document] if score.sources else ""
    return {"item": n, "kind": "window", "cluster": document, "n": count, "source": source}


def _shared_passes(bench: Bench, score: Activations, passes: Passes, config: ReconstructionConfig) -> Reference:
    """The passes no dictionary takes part in, from memory where they were done before."""
    fit = bench.fit()
    mean = _mean(fit).float()

    def make() -> Reference:
        log_p = passes.distributions()
        with bench.progress.stage("running the model on, unmodified and ablated", 3 * len(passes.windows), "windows") as stage:
            own = passes.run(lambda x: x, stage, into=log_p)
            zero = passes.run(torch.zeros_like, stage)
            by_mean = passes.run(lambda x: mean.expand_as(x), stage)
        ce, ce_zero, ce_mean = (passes.sums(part.ce) for part in (own, zero, by_mean))
        return Reference(passes.windows, passes.read.sum(1).double(), ce, ce_zero, ce_mean, log_p)

    key = (bench.model.identity, bench.hook_point, fit.identity, score.identity, config.windows, config.batch, bench.seed)
    return references.get(key, make)
