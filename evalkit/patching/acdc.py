"""The paper's feature selection, ACDC on a flat graph, exactly, with the runs it needs made in batches.

1. Start with all features patched. For each of 50 thresholds from 1e-5 to 1, ascending: visit the features that are still
   patched in random order; leave a feature out for good where KL(without it) - KL(now) is below the threshold.
2. The sets are recorded after each threshold; the next one goes on from there. It ends early when nothing is left.
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
from evalkit.patching.engine import Patching
from evalkit.patching.rankings import RANKINGS, Cost, Groups, Ranking, mean_kl


def thresholds(count: int = 50, low: float = -5.0, high: float = 0.0) -> list[float]:
    """``count`` thresholds, evenly spaced in their logarithm from 10^low to 10^high."""
    return [float(tau) for tau in np.logspace(low, high, count)]


def visiting_order(seed: int, step: int, candidates: int) -> Int[torch.Tensor, " C"]:
    """The random order of threshold number ``step``: one of all candidates, of which those that are left are visited.

    It does not hang on which are left, so that one decision that falls the other way does not change all that follow.
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
    affected = patching.affected.sum(0).clamp(min=1).tolist()
    guesses = _Guesses(patching.sizes.numpy())
    current, level = torch.ones(C, dtype=torch.bool), float(patching.everything.kl.mean())
    most = block or 4 * patching.batch
    ahead = float(min(most, patching.batch))
    removed: list[int] = []
    effect = torch.zeros(C, dtype=torch.float64)
    taus, sets = thresholds(count, low, high), []
    for step, tau in enumerate(taus):
        queue = [feature for feature in visiting_order(seed, step, C).tolist() if current[feature]]
        while queue:
            tried: list[torch.Tensor] = []
            expected: list[bool] = []
            running, runs = current, 0
            for feature in queue:
                if tried and runs + affected[feature] > ahead:
                    break
                trial = running.clone()
                trial[feature] = False
                tried.append(trial)
                expected.append(guesses.goes(feature, tau))
                running = trial if expected[-1] else running
                runs += affected[feature]
            levels = mean_kl(patching, torch.stack(tried)).tolist()
            right = True
            for place, (feature, trial) in enumerate(zip(queue, tried, strict=False)):
                rise = levels[place] - level
                goes = rise < tau
                guesses.learn(feature, rise, goes)
                if goes:
                    current, level = trial, levels[place]
                    removed.append(feature)
                    effect[feature] = tau
                right = goes == expected[place]
                if not right:
                    break
            queue = queue[place + 1 :]
            guesses.refit()
            ahead = min(float(most), ahead * 2) if right else max(1.0, ahead / 2)
        sets.append(current.clone())
        if not current.any():
            break
    stayed = current.nonzero()[:, 0].tolist()
    effect[stayed] = torch.from_numpy(guesses.rise)[stayed]
    stayed.sort(key=lambda feature: -guesses.rise[feature])
    order = torch.tensor([*stayed, *reversed(removed)], dtype=torch.int64)
    groups = Groups(torch.tensor(taus[: len(sets)], dtype=torch.float64), torch.stack(sets))
    return Ranking(order, effect, groups, cost.passes, cost.seconds)
