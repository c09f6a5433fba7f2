"""``acdc-fast``: the same kind of curve as ``acdc``, from a few dozen gradients instead of thousands of runs.

1. Start with all features patched, as ``acdc`` does, and leave features out in rounds until few are left.
2. A round asks by how much the KL would rise without each feature of the present set, which ``acdc`` measures: minus the
   gradient, mean over ``points`` places on the line from half of the set patched to all of it. Near the set, because that is
   where features are left out; not at the set alone, because a gradient sees only the next small step. Taken anew for every
   set, because what a feature is worth depends on which others are patched with it.
3. Those of smallest rise go: a round shrinks the set by the factor ``keep``. Features that make things worse go first.
4. The last ``exact`` features are left out one by one, each time the one without which the measured KL is lowest.

``acdc`` decides feature by feature at one threshold after the other, which costs features times thresholds runs of every prompt;
this costs log(features) / log(1 / keep) * points gradients, whatever the thresholds are.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float

from evalkit.errors import SuiteError
from evalkit.patching.patching import Patching
from evalkit.patching.rankings import RANKINGS, Cost, Ranking, kl_with_each


def near_shares(current: Bool[torch.Tensor, " C"], points: int) -> Float[torch.Tensor, "P C"]:
    """``points`` places in equal steps from ``current`` down towards half of it."""
    return (1 - torch.arange(points) / (2 * points))[:, None] * current.float()


@RANKINGS.register("acdc-fast")
def acdc_fast(patching: Patching, *, seed: int = 0, points: int = 2, keep: float = 0.7, exact: int = 12) -> Ranking:
    """Features in the order elimination removes them, last removed first.

    ``effect`` is the feature's estimated rise of the KL (nats) when it was removed, for the last ones the measured rise.

    Args:
        points: gradients of a round.
        keep: share of the features that a round keeps.
        exact: how many features are eliminated by measuring.

    Raises:
        SuiteError: a setting outside its range.
    """
    if points < 1 or exact < 1 or not 0 < keep < 1:
        raise SuiteError(
            f"points = {points}, keep = {keep}, exact = {exact} is out of range",
            where="acdc-fast",
            fix="use points and exact of at least 1, and keep between 0 and 1",
        )
    cost, C = Cost(patching), len(patching.candidates)
    current = torch.ones(C, dtype=torch.bool)
    effect = torch.zeros(C, dtype=torch.float64)
    removed: list[int] = []
    left = C
    while left > exact:
        rise = -patching.gradients(near_shares(current, points)).mean((0, 1))
        gone = left - max(exact, int(left * keep))
        worst = torch.argsort(torch.where(current, rise, torch.inf), stable=True)[:gone].tolist()
        effect[worst] = rise[worst]
        current[worst] = False
        removed += worst
        left -= gone
    level = float(patching.measure(current[None]).kl.mean())
    while left:
        rest = current.nonzero()[:, 0].tolist()
        kl = kl_with_each(patching, current, rest)
        worst_place = int(kl.argmin())
        feature = rest[worst_place]
        effect[feature], level = float(kl[worst_place]) - level, float(kl[worst_place])
        current[feature] = False
        removed.append(feature)
        left -= 1
    return Ranking(torch.tensor(removed[::-1], dtype=torch.int64), effect, None, cost.passes, cost.seconds)
