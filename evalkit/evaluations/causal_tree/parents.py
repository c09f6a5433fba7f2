"""Upstream features that a downstream feature depends on: gradient attribution proposes, exact ablation confirms.

1. Contexts: windows in which the child is strong (``contexts_of``), read at its strongest position. One in which it does not
   fire again, since rounding makes it lose its place among the k largest, is left out.
2. Candidates: every feature of the earlier dictionary that is active, at a kept position up to there, in at least
   ``least_active`` contexts. The filter sees activity and never an effect: fewer tests, none of them chosen by its outcome.
3. Estimate: - gradient of the child's code at the earlier hook point times what ablating the candidate would add, summed over
   positions; one pass there and back for each context.
4. The ``tested`` candidates with the largest mean estimates are ablated one by one, and ``checked`` others: half those next by
   the size of their estimate, half drawn at random from the rest. x - c f at all positions where they are active, the error term
   as it is, the model run on to the child's hook point. A candidate's share in a context is the part of the child's code that
   goes; 0, exactly, where it is not active.
5. A candidate is a parent where its mean share is at least ``least_share`` and a one-sided t-test over contexts is significant,
   corrected by Holm (1979) for all candidates, those included that were not ablated. Exact sign flips stand beside it
   (``causal_tests``). Fewer than ``LEAST_CLUSTERS`` contexts give no p, and so no parents. Checked ones that pass are the
   gradient's
   misses: those next in size show a cut that came too early, those drawn at random what share of the rest is missed.
6. All parents at once. The strongest cause is the proposed candidate with the largest mean share in every second context,
   significant or not; the strongest parent is that among the significant ones. What is said of either is measured in the other
   contexts, so that the largest of many is not flattered. Its null, there: as much along a random direction.
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

from evalkit.evaluations.causal_tree.significance import corrected, one_sided, sign_flips
from evalkit.interventions.ablations import RESIDUAL, Context
from evalkit.interventions.hooks import scale
from evalkit.interventions.paths import PathCache
from evalkit.util.batching import block_rows
from evalkit.util.statistics import LEAST_CLUSTERS

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
    least_active: int = 1


class Strongest(NamedTuple):
    """The candidate that is strongest in every second context, measured in ``OTHERS``."""

    place: int
    """Among the K ablated."""
    share: float
    """Mean share of the child's code lost without it."""
    carried: float
    """Of that, what goes with the removed vector itself; NaN off the residual stream."""
    random: float
    """Mean share lost for as much along a random direction."""


class Parents(NamedTuple):
    """Upstream features of one target feature; K candidates were ablated, by falling share."""

    features: Int[np.ndarray, " K"]
    shares: Float[np.ndarray, "K C"]
    """Part of the child's code lost in each context."""
    estimates: Float[np.ndarray, " K"]
    """The mean share by the gradient."""
    p: Float[np.ndarray, " K"]
    """NaN, as is ``p_holm``, in fewer than ``LEAST_CLUSTERS`` contexts."""
    p_holm: Float[np.ndarray, " K"]
    significant: np.ndarray
    """(K,) bool."""
    checked: np.ndarray
    """(K,) bool: of what the gradient left out, ablated all the same."""
    drawn: np.ndarray
    """(K,) bool: the checked ones that were drawn at random; the others are the next in size."""
    active: Int[np.ndarray, " K"]
    """Contexts in which each is active."""
    candidates: int
    """Features active in at least ``least_active`` contexts: those the correction is for."""
    present: int
    """Features active in any context."""
    cause: Strongest | None
    """Of all proposed candidates; None without any, or with one context."""
    parent: Strongest | None
    """Of the significant ones among them; None without any, or with one context."""
    carried: Float[np.ndarray, "K C"]
    """Part of the child's code that goes with the removed vector itself; NaN off the residual stream."""
    rest: float
    """Sum of the positive mean estimates of all features present that were not ablated."""
    activations: Float[np.ndarray, " C"]
    """The child's codes."""
    together: float | None
    """Mean share lost without all parents; None without parents."""
    p_flips: Float[np.ndarray, " K"]
    """By sign flips over contexts, corrected as ``p_holm``: beside the rule, which looks at the latter."""
    alpha: float
    """Level of either test."""
    runs: int
    """Changed runs from the earlier to the later hook point; a gradient counts 3."""

    @property
    def tested(self) -> bool:
        """Whether there are contexts enough for the test: without it there is no saying what is a parent."""
        return len(self.activations) >= LEAST_CLUSTERS


class Active(NamedTuple):
    """Codes of one context, of the A features alone that are active in it."""

    features: Int[torch.Tensor, " A"]
    """Ascending."""
    values: Float[torch.Tensor, "T A"]


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
        self.paths = PathCache(model, source, sink, score.tokens[windows], last, score.x[windows])
        before = self._read(self.paths.y).double()
        self.rows = (before > 0).nonzero()[:, 0]  # (C,) of the contexts
        self.before, windows, last = before[self.rows], windows[self.rows], last[self.rows]
        self.last, self.y = last, _wide(self.paths.y)[self.rows]  # (C,), (C, E)
        T = self.paths.tokens.shape[1]
        self.keep = score.keep[windows, :T] & (torch.arange(T) <= last[:, None])  # (C, T)
        self.x = _wide(self.paths.x)[self.rows]
        self.unit = scale(parents, self.x)  # (C, T, 1)
        self.codes = [_active(parents, x, keep) for x, keep in zip(self.x, self.keep, strict=True)]

    @property
    def active(self) -> Bool[torch.Tensor, "C F"]:
        """Which features are active in which context."""
        out = torch.zeros(len(self.x), self.parents.n_features, dtype=torch.bool)
        for row, codes in zip(out, self.codes, strict=True):
            row[codes.features] = True
        return out

    def directions(self, features: Sequence[int] | Int[torch.Tensor, " K"]) -> Float[torch.Tensor, "K D"]:
        """What one unit of each of ``features`` writes, before its token's scale."""
        return self.parents.edit_directions[features if isinstance(features, torch.Tensor) else list(features)].to(self.x.dtype)

    def codes_of(self, context: int, features: Sequence[int]) -> Float[torch.Tensor, "T K"]:
        """Codes of ``features`` in a context, 0 where one is not active."""
        own, wanted = self.codes[context], torch.tensor(list(features), dtype=torch.long)
        if not len(own.features):
            return own.values.new_zeros(len(own.values), len(wanted))
        place = torch.searchsorted(own.features, wanted).clamp(max=len(own.features) - 1)
        return own.values[:, place] * (own.features[place] == wanted)

    def _read(self, y: Float[torch.Tensor, "J E"]) -> Float[torch.Tensor, " J"]:
        """The child's codes."""
        return self.children.encode_feature(_wide(y), self.child)

    def estimates(self) -> Float[np.ndarray, "C F"]:
        """What of the child's code each feature's ablation would take, by the gradient."""
        slope = _wide(self.paths.gradient(self._read))[self.rows] * self.unit  # (C, T, D)
        out = torch.zeros(len(self.x), self.parents.n_features, dtype=torch.float64)
        for row, codes, own in zip(out, self.codes, slope, strict=True):
            row[codes.features] = (codes.values * (own @ self.directions(codes.features).T)).sum(0).double()
        return out.numpy()

    def ablation(self, context: int, features: Sequence[int]) -> Float[torch.Tensor, "T D"]:
        """What is added in a context without ``features``."""
        written = self.codes_of(context, features) @ self.directions(features)
        return -written * self.unit[context]

    def along(self, context: int, feature: int, noise: Float[np.ndarray, " D"]) -> Float[torch.Tensor, "T D"]:
        """As much as ablating ``feature`` adds in a context, along ``noise`` instead."""
        (own,) = self.directions([feature])
        direction = torch.from_numpy(noise).to(own)
        return -self.codes_of(context, [feature]) * self.unit[context] * direction * (own.norm() / direction.norm())

    def lost(self, rows: Sequence[int], changes: Sequence[Float[torch.Tensor, "T D"]]) -> Float[np.ndarray, " J"]:
        """Share of the child's code lost in contexts ``rows`` with ``changes``."""
        found = []
        for start in range(0, len(rows), ROWS):
            part = torch.tensor(rows[start : start + ROWS])
            y = self.paths.run(self.rows[part], torch.stack(list(changes[start : start + ROWS])))
            found.append(1 - self._read(y).double() / self.before[part])
        return torch.cat(found).numpy() if found else np.zeros(0)

    def shares(self, features: Sequence[int]) -> Float[np.ndarray, "K C"]:
        """Share lost without each of ``features`` alone, in each context; 0 where it is not active."""
        out = np.zeros((len(features), len(self.x)))
        if not out.size:
            return out
        fires = torch.stack([self.codes_of(c, features) != 0 for c in range(len(self.x))])  # (C, T, K)
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
        out = np.zeros((len(features), len(self.x)))
        if not (RESIDUAL.fullmatch(self.paths.source) and STREAM.fullmatch(self.paths.sink)):
            return np.full_like(out, np.nan)
        for c, last in enumerate(self.last.tolist()):
            active = (self.codes_of(c, features) != 0).any(0).nonzero()[:, 0]
            own = [features[k] for k in active.tolist()]
            amounts = self.codes_of(c, own)[last] * self.unit[c, last]  # (K',)
            y = self.y[c] - amounts[:, None] * self.directions(own)
            out[active.numpy(), c] = (1 - self._read(y).double() / self.before[c]).numpy()
        return out


def _wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` on the CPU in float32, or in float64 where the model computes in it."""
    return x.cpu() if x.dtype == torch.float64 else x.cpu().float()


def _active(dictionary: Dictionary, x: Float[torch.Tensor, "T D"], keep: Bool[torch.Tensor, " T"]) -> Active:
    """Codes of a context at kept positions. Never more than a block of all features at once, however wide the dictionary."""
    kept = keep.nonzero()[:, 0]
    if not len(kept):
        return Active(kept, x.new_zeros(len(x), 0))
    where, which, what = [], [], []  # positions, features and codes of all that is not 0
    for part in kept.split(len(kept) if dictionary.sparse else block_rows(dictionary.n_features)):
        if dictionary.sparse:
            values, indices = dictionary.encode_sparse(x[part])
            row, column = values.nonzero(as_tuple=True)
            which.append(indices[row, column])
        else:
            values = dictionary.encode(x[part])
            row, column = values.nonzero(as_tuple=True)
            which.append(column)
        where.append(part[row])
        what.append(values[row, column])
    features, place = torch.cat(which).unique(return_inverse=True)  # sorted
    values = x.new_zeros(len(x), len(features))
    values[torch.cat(where), place] = torch.cat(what).to(x.dtype)
    return Active(features, values)


def strongest(shares: Float[np.ndarray, "K C"], among: Bool[np.ndarray, " K"]) -> int | None:
    """Of the candidates ``among``, the one with the largest mean share in every second context, from the first; None where there
    is none."""
    return int(np.where(among, shares[:, ::2].mean(1), -np.inf).argmax()) if among.any() and shares.shape[1] else None


def parents_of(ablations: Ablations, rule: Rule, random: np.random.Generator) -> Parents:
    """Choose candidates by the gradient, ablate them, and test."""
    C = len(ablations.x)
    count = ablations.active.numpy().sum(0)  # (F,) contexts
    present, candidates = np.flatnonzero(count), np.flatnonzero(count >= max(1, rule.least_active))
    estimates = (ablations.estimates() / ablations.before.numpy()[:, None]).mean(0)
    order = candidates[np.argsort(-estimates[candidates], kind="stable")]
    proposed, left = order[: rule.tested], order[rule.tested :]
    # next in size, whatever the sign: what lies just below the cut, and what the slope has the wrong way round
    left = left[np.argsort(-np.abs(estimates[left]), kind="stable")]
    following, others = left[: rule.checked // 2], left[rule.checked // 2 :]
    extra = random.permutation(others)[: rule.checked - len(following)]
    features = np.concatenate([proposed, following, extra])
    shares = ablations.shares(features.tolist())
    by_share = np.argsort(-shares.mean(1), kind="stable")
    features, shares = features[by_share], shares[by_share]
    checked, drawn = by_share >= len(proposed), by_share >= len(proposed) + len(following)
    p = one_sided(shares)
    p_holm = corrected(p, len(candidates))
    if C < LEAST_CLUSTERS:  # no p, as there is no interval; nothing is below alpha then
        p, p_holm = np.full_like(p, np.nan), np.full_like(p_holm, np.nan)
    significant = (p_holm < rule.alpha) & (shares.mean(1) >= rule.least_share)
    rest = float(np.clip(estimates[np.setdiff1d(present, features)], 0, None).sum())
    found = features[significant & ~checked].tolist()
    together = float(ablations.lost(range(C), [ablations.ablation(c, found) for c in range(C)]).mean()) if found else None
    carried = ablations.carried(features.tolist())
    noise = random.normal(size=ablations.x.shape[2])  # one direction, so that both nulls are about the same
    cause, parent = (
        _measured(ablations, strongest(shares, among), features, shares, carried, noise)
        for among in (~checked, significant & ~checked)
    )
    return Parents(
        features, shares, estimates[features], p, p_holm, significant, checked, drawn, count[features], len(candidates),
        len(present), cause, parent, carried, rest, ablations.before.numpy(), together,
        corrected(sign_flips(shares), len(candidates)), rule.alpha, ablations.paths.runs,
    )  # fmt: skip


def _measured(
    ablations: Ablations,
    place: int | None,
    features: Int[np.ndarray, " K"],
    shares: Float[np.ndarray, "K C"],
    carried: Float[np.ndarray, "K C"],
    noise: Float[np.ndarray, " D"],
) -> Strongest | None:
    """The candidate at ``place`` in the contexts in which it was not chosen; None where there is none or no such context."""
    others = range(len(ablations.x))[OTHERS]
    if place is None or not others:
        return None
    null = ablations.lost(others, [ablations.along(c, int(features[place]), noise) for c in others])
    return Strongest(place, float(shares[place, OTHERS].mean()), float(carried[place, OTHERS].mean()), float(null.mean()))
