"""What each ranking makes of features whose worth is known: a pair that works only together, one that helps, one that hurts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from evalkit.patching.rankings import Ranking, rank

C = 8
PAIR, HELPS, LITTLE, HURTS = (0, 1), 2, 4, 3
"""The rest do nothing."""


class Game:
    """Stands in for ``Patching``: KL(s) = 1 - 0.6 s0 s1 - 0.2 s2 + 0.15 s3 - 0.01 s4 for shares s of each feature's patch."""

    candidates, batch, passes, seconds = torch.arange(C), 16, 0, 0.0
    sizes, affected = torch.ones(C, dtype=torch.float64), torch.ones(1, C, dtype=torch.bool)
    setup = SimpleNamespace(passes=0, seconds=0.0)

    def _kl(self, s: torch.Tensor) -> torch.Tensor:
        return 1 - 0.6 * s[:, 0] * s[:, 1] - 0.2 * s[:, 2] + 0.15 * s[:, 3] - 0.01 * s[:, 4]

    def measure(self, sets: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(kl=self._kl(sets.double())[:, None])

    def gradients(self, sets: torch.Tensor) -> torch.Tensor:
        s = sets.double().requires_grad_(True)
        return torch.autograd.grad(self._kl(s).sum(), s)[0][:, None]

    @property
    def unpatched(self) -> SimpleNamespace:
        return self.measure(torch.zeros(1, C))

    @property
    def everything(self) -> SimpleNamespace:
        return self.measure(torch.ones(1, C))


def found(name: str, **settings: object) -> Ranking:
    return rank(name, Game(), seed=3, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "settings"), [("acdc", {}), ("acdc-fast", {}), ("acdc-fast", {"exact": 2}),
                                                ("integrated-gradients", {})])  # fmt: skip
def test_what_starts_from_everything_finds_the_pair(name: str, settings: dict[str, int]) -> None:
    order = found(name, **settings).order.tolist()
    assert set(order[:2]) == set(PAIR) and order[2:4] == [HELPS, LITTLE]
    assert order[-1] == HURTS or name == "acdc"  # acdc lets it go at its first threshold, with those that do nothing
    assert order.index(HURTS) > order.index(LITTLE)


@pytest.mark.parametrize("name", ["single", "attribution", "greedy"])
def test_what_starts_from_nothing_cannot_see_it(name: str) -> None:
    ranking = found(name, shortlist=C) if name == "greedy" else found(name)
    assert ranking.order[:2].tolist() == [HELPS, LITTLE]
    assert ranking.order.tolist().index(HURTS) > 4 or name == "greedy"
    if name != "greedy":
        assert ranking.effect[list(PAIR)].tolist() == [0.0, 0.0]


def test_shares_of_integrated_gradients_sum_to_the_drop() -> None:
    effect = found("integrated-gradients").effect
    assert float(effect.sum()) == pytest.approx(0.6 + 0.2 - 0.15 + 0.01)
    assert effect[:5].tolist() == pytest.approx([0.3, 0.3, 0.2, -0.15, 0.01])


def test_acdc_lets_features_go_at_the_thresholds_that_their_worth_says() -> None:
    ranking = found("acdc")
    assert ranking.groups is not None
    sizes = ranking.groups.sets.sum(1).tolist()
    assert sizes == sorted(sizes, reverse=True)
    taus = ranking.groups.thresholds
    kept = dict(zip(taus.tolist(), ranking.groups.sets.tolist(), strict=True))
    for tau, members in kept.items():
        assert members[HELPS] == (tau <= 0.2) and members[LITTLE] == (tau <= 0.01) and not members[HURTS]
        assert (members[0] and members[1]) == (tau <= 0.6)
