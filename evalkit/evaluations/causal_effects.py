"""Which features of one hook point a feature of a later one hangs on: gradient first, then exact ablations.

1. Contexts: windows in which the child is strong (``contexts_of``), read at its strongest position. One in which it does not
   fire again, since rounding makes it lose its place among the k largest, is left out.
2. Candidates: every feature of the earlier dictionary that is active at a kept position of a context, up to there.
3. Estimate: - gradient of the child's code at the earlier hook point times what ablating the candidate would add, summed over
   positions; one pass there and back for each context.
4. The ``tested`` candidates with the largest mean estimates, and ``checked`` others drawn at random, are ablated one by one:
   x - c f at all positions where they are active, the error term as it is, the model run on to the child's hook point. A
   candidate's share in a context is the part of the child's code that goes; 0, exactly, where it is not active.
5. A candidate is a parent where its mean share is at least ``least_share`` and a one-sided t-test over contexts is significant,
   corrected by Holm (1979) for all candidates, those included that were not ablated. Checked ones that pass are the gradient's
   misses.
6. All parents at once. The strongest is the proposed candidate with the largest mean share in every second context; what is
   said of it is measured in the others, so that the largest of many is not flattered. Its null, in the same contexts: as much
   along a random direction.
7. Carried: the residual stream takes a written vector to later layers as it is, and a child may read just that. What of the
   child's code goes when the removed vector is missing at the child's hook point and place, and everything computed from it on
   the way is there, is the carried share: near the whole share, parent and child are one feature at two layers. The child's own
   encoder reads it, so that no slope is needed, whatever the encoder is.

After Cunningham et al. 2023 (arXiv 2309.08600), section 5; estimate, test, misses and null are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats

from evalkit.evaluations.ablation_measure import RESIDUAL, Context
from evalkit.patching.engine import scale
from evalkit.patching.onward import Onward

if TYPE_CHECKING:
    from evalkit.activations.capture import Activations
    from evalkit.dictionaries.base import Dictionary
    from evalkit.models.language_model import LanguageModel

ROWS = 96
"""Changed runs whose changes are held at a time."""
STREAM = re.compile(r"blocks\.\d+\.hook_(resid_pre|resid_mid|resid_post|in|out)")
"""Hook points that hold the residual stream itself."""
OTHERS = slice(1, None, 2)
"""Contexts in which the strongest candidate is not chosen: those it is measured in."""


class Rule(NamedTuple):
    """How parents are found."""

    tested: int
    checked: int
    alpha: float
    least_share: float


class Parents(NamedTuple):
    """What one child hangs on; K candidates were ablated, by falling share."""

    features: Int[np.ndarray, " K"]
    shares: Float[np.ndarray, "K C"]
    """Part of the child's code lost in each context."""
    estimates: Float[np.ndarray, " K"]
    """The mean share by the gradient."""
    p: Float[np.ndarray, " K"]
    p_holm: Float[np.ndarray, " K"]
    significant: np.ndarray
    """(K,) bool."""
    checked: np.ndarray
    """(K,) bool: drawn at random from what the gradient left out."""
    active: Int[np.ndarray, " K"]
    """Contexts in which each is active."""
    candidates: int
    strongest: int | None
    """Place, among the K, of the candidate that ``strongest`` chooses; None without candidates."""
    carried: Float[np.ndarray, "K C"]
    """Part of the child's code that goes with the removed vector itself; NaN off the residual stream."""
    rest: float
    """Sum of the positive mean shares of all candidates that were not proposed: exact where checked, the gradient's elsewhere."""
    activations: Float[np.ndarray, " C"]
    """The child's codes."""
    together: float | None
    """Mean share lost without all parents; None without parents."""
    random: float | None
    """Mean share lost in ``OTHERS`` for as much as the strongest one along a random direction; None where there is none."""
    runs: int
    """Changed runs from the earlier to the later hook point; a gradient counts 3."""


class Ablations:
    """One child in its contexts, ready to lose features of an earlier hook point.

    Args:
        model: the language model.
        source: the earlier hook point.
        sink: the child's.
        parents: dictionary at ``source``.
        children: dictionary at ``sink``.
        child: its feature.
        score: activations at ``source``, and which positions take part.
        contexts: places where the child is active. C of them count: where it is active when read again.
    """

    def __init__(
        self,
        model: LanguageModel,
        source: str,
        sink: str,
        parents: Dictionary,
        children: Dictionary,
        child: int,
        score: Activations,
        contexts: Sequence[Context],
    ) -> None:
        windows = torch.tensor([context.window for context in contexts])
        last = torch.tensor([context.position for context in contexts])
        self.parents, self.children, self.child = parents, children, child
        self.onward = Onward(model, source, sink, score.tokens[windows], last, score.x[windows])
        before = children.encode_feature(self.onward.y.float().cpu(), child).double()
        self.rows = (before > 0).nonzero()[:, 0]  # (C,) of the contexts
        self.before, windows, last = before[self.rows], windows[self.rows], last[self.rows]
        self.last, self.y = last, self.onward.y.float().cpu()[self.rows]  # (C,), (C, E)
        T = self.onward.tokens.shape[1]
        self.keep = score.keep[windows, :T] & (torch.arange(T) <= last[:, None])  # (C, T)
        self.x = self.onward.x.float().cpu()[self.rows]
        self.unit = scale(parents, self.x)  # (C, T, 1)
        self.codes = torch.zeros(len(self.x), T, parents.n_features)
        for codes, x, keep in zip(self.codes, self.x, self.keep, strict=True):
            codes[:] = parents.encode(x) * keep[:, None]

    @property
    def active(self) -> Float[torch.Tensor, "C F"]:
        """Which features are active in which context."""
        return (self.codes != 0).any(1)

    def estimates(self) -> Float[np.ndarray, "C F"]:
        """What of the child's code each feature's ablation would take, by the gradient."""

        def read(y: torch.Tensor) -> torch.Tensor:
            return self.children.encode_feature(y.float().cpu(), self.child)

        slope = self.onward.gradient(read)[self.rows].float() * self.unit  # (C, T, D)
        found = [(codes * (own @ self.parents.directions.T)).sum(0) for codes, own in zip(self.codes, slope, strict=True)]
        return torch.stack(found).double().numpy()

    def ablation(self, context: int, features: Sequence[int]) -> Float[torch.Tensor, "T D"]:
        """What is added in a context without ``features``."""
        written = self.codes[context][:, list(features)] @ self.parents.directions[list(features)]
        return -written * self.unit[context]

    def lost(self, rows: Sequence[int], changes: Sequence[Float[torch.Tensor, "T D"]]) -> Float[np.ndarray, " J"]:
        """Share of the child's code lost in contexts ``rows`` with ``changes``."""
        found = []
        for start in range(0, len(rows), ROWS):
            part = torch.tensor(rows[start : start + ROWS])
            y = self.onward.run(self.rows[part], torch.stack(list(changes[start : start + ROWS])))
            after = self.children.encode_feature(y.float().cpu(), self.child).double()
            found.append(1 - after / self.before[part])
        return torch.cat(found).numpy() if found else np.zeros(0)

    def shares(self, features: Sequence[int]) -> Float[np.ndarray, "K C"]:
        """Share lost without each of ``features`` alone, in each context; 0 where it is not active."""
        fires = self.codes[..., list(features)] != 0  # (C, T, K)
        out = np.zeros((len(features), len(self.x)))
        # runs of similar length together: from the first firing to the token that is read
        span = self.last[:, None] - fires.int().argmax(1)  # (C, K)
        pairs = sorted(fires.any(1).T.nonzero().tolist(), key=lambda pair: -int(span[pair[1], pair[0]]))
        for start in range(0, len(pairs), ROWS):
            part = pairs[start : start + ROWS]
            changes = [self.ablation(c, [features[k]]) for k, c in part]
            out[tuple(zip(*part, strict=True))] = self.lost([c for _, c in part], changes)
        return out

    def carried(self, features: Sequence[int]) -> Float[np.ndarray, "K C"]:
        """Share lost to the removed vector alone, were it missing at the child's hook point.

        NaN where the parents do not write to the residual stream, or the child does not read it.
        """
        out, active = np.zeros((len(features), len(self.x))), self.active
        if not (RESIDUAL.fullmatch(self.onward.source) and STREAM.fullmatch(self.onward.sink)):
            return np.full_like(out, np.nan)
        for k, feature in enumerate(features):
            rows = active[:, feature].nonzero()[:, 0]
            amounts = self.codes[rows, self.last[rows], feature, None] * self.unit[rows, self.last[rows]]  # (C', 1)
            y = self.y[rows] - amounts * self.parents.directions[feature]
            after = self.children.encode_feature(y, self.child).double()
            out[k, rows.numpy()] = (1 - after / self.before[rows]).numpy()
        return out


def one_sided(shares: Float[np.ndarray, "K C"]) -> Float[np.ndarray, " K"]:
    """p of each mean being above 0, by a t-test over contexts; 1 where there are fewer than two or all are 0."""
    K, C = shares.shape
    if C < 2 or K == 0:
        return np.ones(K)
    mean, error = shares.mean(1), shares.std(1, ddof=1) / np.sqrt(C)
    t = np.divide(mean, error, out=np.where(mean > 0, np.inf, 0.0), where=error > 0)
    return np.where(mean > 0, stats.t.sf(t, C - 1), 1.0)


def corrected(p: Float[np.ndarray, " K"], tests: int) -> Float[np.ndarray, " K"]:
    """Holm's p-values of K of ``tests`` tests, the others taken as not significant."""
    order = np.argsort(p, kind="stable")
    out = np.empty(len(p))
    out[order] = np.minimum(1, np.maximum.accumulate(p[order] * (tests - np.arange(len(p)))))
    return out


def strongest(shares: Float[np.ndarray, "K C"], proposed: Bool[np.ndarray, " K"]) -> int | None:
    """The proposed candidate with the largest mean share in every second context, from the first; None where there is none."""
    return int(np.where(proposed, shares[:, ::2].mean(1), -np.inf).argmax()) if proposed.any() and shares.shape[1] else None


def parents_of(ablations: Ablations, rule: Rule, random: np.random.Generator) -> Parents:
    """Choose candidates by the gradient, ablate them, and test."""
    active = ablations.active.numpy()
    candidates = np.flatnonzero(active.any(0))
    estimates = (ablations.estimates() / ablations.before.numpy()[:, None]).mean(0)
    order = candidates[np.argsort(-estimates[candidates], kind="stable")]
    left = order[rule.tested :]
    extra = random.permutation(left)[: rule.checked]
    features = np.concatenate([order[: rule.tested], extra])
    shares = ablations.shares(features.tolist())
    by_share = np.argsort(-shares.mean(1), kind="stable")
    features, shares = features[by_share], shares[by_share]
    checked = (by_share >= len(features) - len(extra)) if len(extra) else np.zeros(len(features), dtype=bool)
    p = one_sided(shares)
    p_holm = corrected(p, len(candidates))
    significant = (p_holm < rule.alpha) & (shares.mean(1) >= rule.least_share)
    C = len(ablations.x)
    untested = np.setdiff1d(left, extra)
    rest = float(np.clip(estimates[untested], 0, None).sum() + np.clip(shares[checked].mean(1), 0, None).sum())
    found = features[significant & ~checked].tolist()
    together = float(ablations.lost(range(C), [ablations.ablation(c, found) for c in range(C)]).mean()) if found else None
    first, null, others = strongest(shares, ~checked), None, range(C)[OTHERS]
    if first is not None and others:
        noise = _noise(ablations, int(features[first]), random)
        null = float(ablations.lost(others, noise[OTHERS]).mean())
    return Parents(
        features, shares, estimates[features], p, p_holm, significant, checked, active[:, features].sum(0), len(candidates),
        first, ablations.carried(features.tolist()), rest, ablations.before.numpy(), together, null, ablations.onward.runs,
    )  # fmt: skip


def _noise(ablations: Ablations, feature: int, random: np.random.Generator) -> list[torch.Tensor]:
    """As much as ablating ``feature`` adds, along one random direction."""
    direction = ablations.parents.directions[feature]
    noise = torch.from_numpy(random.normal(size=len(direction))).to(direction)
    noise *= direction.norm() / noise.norm()
    amounts = -ablations.codes[:, :, feature, None] * ablations.unit  # (C, T, 1)
    return list(amounts * noise)
