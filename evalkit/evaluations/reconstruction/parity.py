"""Reconstruction as SAEBench 0.6 and SAELens 6 define it, for numbers that stand beside theirs.

1. Every position of a window is replaced, the BOS and massive positions among them, by x_hat or by zero.
2. SAEBench reads all positions with a next token. SAELens leaves out those that hold a special token (BOS, EOS, padding).
3. CE score = (CE zero - CE substituted) / (CE zero - CE unmodified); KL score = (KL zero - KL substituted) / KL zero; both are
   ratios of means over the positions read.
4. SAELens' explained variance is 1 - E|x - x_hat|^2 / E|x - E x|^2, as ours, over its positions.
5. SAEBench's is 1 - E|x - x_hat|^2 / (E|x|^2 - m^2), where m is the mean of all squared entries. No mean of x is in it, so that
   a constant prediction does not score 0.

SAEBench: Karvonen et al. 2025 (arXiv 2503.09532), evaluation 'core'. What they print depends on their text, context and
windows too; here both read the suite's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from evalkit.evaluations.base import Bench, Metric, Score
from evalkit.evaluations.reconstruction.ratios import ratio_items
from evalkit.evaluations.reconstruction.substitution import Passes, Read, drawn_windows, references
from evalkit.util.batching import blocks

if TYPE_CHECKING:
    from evalkit.activations.capture import Activations
    from evalkit.dictionaries.base import Dictionary

ALL = "every position replaced, massive ones and the BOS too"
_AS = {"saebench": f"As SAEBench 0.6: {ALL}, all positions read.", "saelens": f"As SAELens 6: {ALL}, special tokens not read."}
_NAME = {"saebench": "SAEBench", "saelens": "SAELens"}
PARITY_METRICS = {
    f"{key}_{name}": Metric(f"{title} ({_NAME[key]})", better, note=f"{_AS[key]} {note}", interval=interval)
    for key in _NAME
    for name, title, better, note, interval in (
        ("ce_score", "CE score", "higher", "(CE zero - CE substituted) / (CE zero - CE unmodified).", True),
        ("kl_score", "KL score", "higher", "(KL zero - KL substituted) / KL zero.", True),
        (
            "explained_variance", "explained variance", "higher",
            "1 - FVU of its positions." if key == "saelens"
            else "Its formula: 1 - E|x - x_hat|^2 / (E|x|^2 - m^2), m the mean of all squared entries; a constant is not at 0.",
            key == "saelens",
        ),
        ("l0", "L0", "neither", "Mean number of non-zero codes a position.", True),
    )
}  # fmt: skip
"""Metrics of ``parity = true``."""


class _Reference(NamedTuple):
    """The passes without a dictionary."""

    own: Read
    zero: Read
    log_p: np.ndarray
    """(P, V) unmodified log-probabilities."""


def parity_scores(
    bench: Bench, score: Activations, dictionary: Dictionary, windows: int, batch: int, special: frozenset[int]
) -> Iterator[Score]:
    """The rows of ``PARITY_METRICS``.

    Args:
        windows: how many scoring windows the model is run on with.
        batch: windows a forward pass.
        special: ids of the tokens that SAELens does not read.
    """
    ordinary = ~torch.isin(score.tokens, torch.tensor(sorted(special), dtype=score.tokens.dtype))  # (N, T)
    yield from _variance(score, dictionary, ordinary)
    yield from _recovered(bench, score, dictionary, windows, batch, ordinary)


def _recovered(
    bench: Bench, score: Activations, dictionary: Dictionary, count: int, batch: int, ordinary: Bool[torch.Tensor, "N T"]
) -> Iterator[Score]:
    drawn = drawn_windows(score, count, bench.seed)
    whole = torch.ones_like(score.keep[drawn])
    passes = Passes(bench, score, drawn, batch, whole, whole)

    def make() -> _Reference:
        log_p = passes.distributions()
        with bench.progress.stage("running the model on, every position ablated", 2 * len(drawn), "windows") as stage:
            own = passes.run(lambda x: x, stage, into=log_p)
            return _Reference(own, passes.run(torch.zeros_like, stage, against=log_p), log_p)

    key = ("parity", bench.model.identity, bench.hook_point, score.identity, count, batch, bench.seed)
    reference = references.get(key, make)
    with bench.progress.stage(f"running on from {dictionary.kind}, every position", len(drawn), "windows") as stage:
        ours = passes.run(dictionary.reconstruct, stage, against=reference.log_p)
    read = {"saebench": torch.ones_like(passes.row, dtype=torch.bool), "saelens": ordinary[drawn][passes.row, passes.place]}
    for name, among in read.items():
        n = passes.sums(torch.ones(len(passes.row)), among)
        rows = n.nonzero()[:, 0].tolist()
        ce, ce_own, ce_zero = (passes.sums(part.ce, among)[rows].numpy() for part in (ours, reference.own, reference.zero))
        kl, kl_zero = (passes.sums(part.kl, among)[rows].numpy() for part in (ours, reference.zero))
        documents = [int(score.document[int(drawn[row])]) for row in rows]
        for metric, numerators, denominators in (
            ("ce_score", ce_zero - ce, ce_zero - ce_own),
            ("kl_score", kl_zero - kl, kl_zero),
        ):
            items = ratio_items(numerators, denominators, documents)
            for row, document, item in zip(rows, documents, items, strict=True):
                yield Score.of(f"{name}_{metric}", item.value, int(drawn[row]), "window", item.weight, document, n=int(n[row]))


def _variance(score: Activations, dictionary: Dictionary, ordinary: Bool[torch.Tensor, "N T"]) -> Iterator[Score]:
    """Explained variance and L0 over the whole scoring text."""
    N, T, D = score.x.shape
    error, active = (torch.zeros(N, T, dtype=torch.float64) for _ in range(2))
    for part in blocks(N, T * dictionary.n_features):
        x = score.x[part].reshape(-1, D)
        x_hat, on = _reconstructed(dictionary, x)
        error[part] = (x - x_hat).double().square().sum(1).view(-1, T)
        active[part] = on.double().view(-1, T)
    power = torch.cat([block.double().square().sum(-1) for block in score.x.split(64)])  # (N, T)
    # E|x|^2 over positions, and the mean of the squared entries: the same sum, over D times as many numbers
    mean_square = float(power.mean())
    denominator = mean_square - (mean_square / D) ** 2
    value = 1 - float(error.mean()) / denominator if denominator else None
    yield Score.of("saebench_explained_variance", value, n=N * T)
    total = sum(block[keep].double().sum(0) for block, keep in zip(score.x.split(64), ordinary.split(64), strict=True))
    mean = total / ordinary.sum()
    spread = torch.cat([(block.double() - mean).square().sum(-1) for block in score.x.split(64)])  # (N, T)
    for name, among in (("saebench", torch.ones_like(ordinary)), ("saelens", ordinary)):
        for n in among.any(1).nonzero()[:, 0].tolist():
            on, document = among[n], int(score.document[n])
            count = int(on.sum())
            about = {"item": n, "kind": "window", "cluster": document, "n": count}
            yield Score(f"{name}_l0", float(active[n][on].mean()), weight=float(count), **about)
            if name == "saelens":
                a, b = float(error[n][on].sum()), float(spread[n][on].sum())
                yield Score.of("saelens_explained_variance", 1 - a / b if b else None, weight=b, **about)


class _Reconstructed(NamedTuple):
    x_hat: Float[torch.Tensor, "M D"]
    active: Float[torch.Tensor, " M"]
    """Number of non-zero codes."""


def _reconstructed(dictionary: Dictionary, x: Float[torch.Tensor, "M D"]) -> _Reconstructed:
    if dictionary.sparse:
        codes = dictionary.encode_sparse(x)
        return _Reconstructed(dictionary.restore(dictionary.decode_sparse(codes), x), (codes.values != 0).sum(1))
    dense = dictionary.encode(x)
    return _Reconstructed(dictionary.restore(dictionary.decode(dense), x), (dense != 0).sum(1))
