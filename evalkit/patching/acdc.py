"""The paper's feature selection, ACDC on a flat graph, exactly, with the runs it needs made in batches.

1. Start with all features patched. For each of 50 thresholds tau from 1e-5 to 1, ascending: visit the features that are still
   patched in random order; leave a feature out for good where KL(without it) - KL(now) is below tau.
2. The sets are recorded after each threshold; the next one starts from there. It ends early when nothing is left.
3. Decisions follow each other, so runs are made ahead on a guess: each feature of a block is guessed to go or to stay, and the
   sets that follow are measured together. Decisions are read off in order up to the first wrong guess; the rest is thrown
   away. What is decided is what one run after the other decides.
4. Guesses: a feature measured before goes if its last rise is below the threshold; a new one goes if the edit it makes is smaller
   than the cut that tells features gone from features kept best so far. Blocks grow while guesses are right.
5. The ordering is the order of removal, read backwards.

Cunningham et al. 2023 (arXiv 2309.08600), section 4, after Conmy et al. 2023 (arXiv 2304.14997). The released code reports the
edit of the last set tried; here every number belongs to the set that was accepted.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int

from evalkit.errors import SuiteError
from evalkit.patching.patching import Patching
from evalkit.patching.rankings import RANKINGS, Cost, Groups, Ranking, mean_kl


def thresholds(count: int = 50, low: float = -5.0, high: float = 0.0) -> list[float]:
    """``count`` thresholds, evenly spaced in their logarithm from 10^low to 10^high."""
    return [float(tau) for tau in np.logspace(low, high, count)]


def visiting_order(seed: int, step: int, candidates: int) -> Int[torch.Tensor, " C"]:
    """The random order of threshold number ``step``: one of all candidates, of which those that are left are visited.

    It does not depend on which are left, so that one decision that falls the other way does not change all that follow.
    """
    return torch.from_numpy(np.random.default_rng([seed, step]).permutation(candidates))


class _Guesses:
    """Whether a feature will go, before it is measured."""

    def __init__(self, sizes: np.ndarray) -> None:
        self.sizes, self.rise = sizes, np.full(len(sizes), np.nan)
        self._first: list[tuple[float, bool]] = []
        self.cut = float(np.median(sizes)) if len(sizes) else 0.0

    def goes(self, feature: int, threshold: float) -> bool:
        known = self.rise[feature]
        return bool(self.sizes[feature] < self.cut) if np.isnan(known) else bool(known < threshold)

    def learn(self, feature: int, rise: float, went: bool) -> None:
        if np.isnan(self.rise[feature]):
            self._first.append((float(self.sizes[feature]), went))
        self.rise[feature] = rise

    def refit(self) -> None:
        """Move the cut to where it makes fewest mistakes on the features seen for the first time."""
        if not self._first:
            return
        sizes, went = (np.array(part) for part in zip(*sorted(self._first), strict=True))
        # cutting in front of place p: features kept before it and features gone from it on are mistakes
        mistakes = np.concatenate([[0], np.cumsum(~went)]) + np.concatenate([[0], np.cumsum(went[::-1])])[::-1]
        place = int(mistakes.argmin())
        edges = np.concatenate([[0.0], sizes, [np.inf]])
        self.cut = float((edges[place] + edges[place + 1]) / 2) if place < len(sizes) else float("inf")


class _Elimination:
    """The features that are still patched, and their elimination at one threshold after the other.

    Attributes:
        kept: (C,) bool, what is still patched.
        kl: mean KL (nats) of ``kept``.
        removed: the threshold each feature was removed at, in the order of removal.
        guesses: with the last rise of each feature.
    """

    def __init__(self, patching: Patching, block: int) -> None:
        self._patching = patching
        self._runs = patching.affected.sum(0).clamp(min=1).tolist()  # that leaving each feature out takes
        self._most = block or 4 * patching.batch
        self._ahead = float(min(self._most, patching.batch))
        self.kept = torch.ones(len(patching.candidates), dtype=torch.bool)
        self.kl = float(patching.everything.kl.mean())
        self.removed: dict[int, float] = {}
        self.guesses = _Guesses(patching.sizes.numpy())

    def eliminate(self, tau: float, order: list[int]) -> None:
        """Visit the features that are kept in ``order`` and remove each whose removal raises the KL by less than ``tau``."""
        queue = [feature for feature in order if self.kept[feature]]
        while queue:
            trials, expected = self._guess(queue, tau)
            decided, right = self._decide(queue, trials, expected, tau)
            queue = queue[decided:]
            self.guesses.refit()
            self._ahead = min(float(self._most), self._ahead * 2) if right else max(1.0, self._ahead / 2)

    def _guess(self, queue: list[int], tau: float) -> tuple[list[torch.Tensor], list[bool]]:
        """The sets without each of the next features if every guess about those before it is right, and the guesses."""
        trials: list[torch.Tensor] = []
        expected: list[bool] = []
        kept, runs = self.kept, 0
        for feature in queue:
            if trials and runs + self._runs[feature] > self._ahead:
                break
            trial = kept.clone()
            trial[feature] = False
            trials.append(trial)
            expected.append(self.guesses.goes(feature, tau))
            kept = trial if expected[-1] else kept
            runs += self._runs[feature]
        return trials, expected

    def _decide(self, queue: list[int], trials: list[torch.Tensor], expected: list[bool], tau: float) -> tuple[int, bool]:
        """Measure ``trials`` and decide up to the first wrong guess: number of decisions, and whether every guess was right."""
        levels = mean_kl(self._patching, torch.stack(trials)).tolist()
        for decided, (feature, trial, kl, guess) in enumerate(zip(queue, trials, levels, expected, strict=False), start=1):
            rise = kl - self.kl
            goes = rise < tau
            self.guesses.learn(feature, rise, goes)
            if goes:
                self.kept, self.kl = trial, kl
                self.removed[feature] = tau
            if goes != guess:
                return decided, False
        return len(trials), True


@RANKINGS.register("acdc")
def acdc(patching: Patching, *, seed: int = 0, count: int = 50, low: float = -5.0, high: float = 0.0, block: int = 0) -> Ranking:
    """Features in the order ACDC removes them, last removed first; those it never removes come first, by their last rise.

    ``effect`` is the threshold (nats) at which a feature was removed, or the last rise of one that never was.

    Args:
        seed: order of the visits.
        count: number of thresholds.
        low: exponent of the smallest.
        high: exponent of the largest.
        block: most runs made ahead together; 0 stands for four batches, 1 for one decision at a time.

    Raises:
        SuiteError: fewer than one threshold.
    """
    if count < 1:
        raise SuiteError(f"{count} thresholds are too few", where="count", fix="use at least 1; the paper uses 50")
    cost, C = Cost(patching), len(patching.candidates)
    elimination = _Elimination(patching, block)
    taus, sets = thresholds(count, low, high), []
    for step, tau in enumerate(taus):
        elimination.eliminate(tau, visiting_order(seed, step, C).tolist())
        sets.append(elimination.kept.clone())
        if not elimination.kept.any():
            break
    rises = torch.from_numpy(elimination.guesses.rise)
    effect = torch.tensor([elimination.removed.get(feature, float(rises[feature])) for feature in range(C)], dtype=torch.float64)
    survivors = sorted(elimination.kept.nonzero()[:, 0].tolist(), key=lambda feature: -float(rises[feature]))
    order = torch.tensor([*survivors, *reversed(elimination.removed)], dtype=torch.int64)
    groups = Groups(torch.tensor(taus[: len(sets)], dtype=torch.float64), torch.stack(sets))
    return Ranking(order, effect, groups, cost.passes, cost.seconds)
