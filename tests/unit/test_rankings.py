"""Rankings: acdc is the naive loop, a planted feature comes first, and costs are what was run."""

from __future__ import annotations

import pytest
import torch
from patching_case import double_model, full_runs, identity, kl, random_pairs, small_topk

from evalkit.dictionaries.pca import PCA
from evalkit.errors import SuiteError
from evalkit.models.language_model import LanguageModel
from evalkit.patching.acdc import thresholds, visiting_order
from evalkit.patching.elimination import near_shares
from evalkit.patching.patching import Patching, Point
from evalkit.patching.rankings import RANKINGS, rank

MIDDLE, END = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
ALL = ["acdc", "acdc-fast", "attribution", "greedy", "integrated-gradients", "largest-edit", "random", "single"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return double_model(tmp_path_factory.mktemp("model"))


class Loop:
    """The straightforward way: one whole run of each prompt for each set, nothing shared."""

    def __init__(self, model, hook_point, dictionary, pairs, candidates) -> None:
        self.model, self.hook_point, self.pairs, self.candidates = model, hook_point, pairs, candidates
        self.dictionary, self.target = dictionary, full_runs(model, pairs, True)
        self.x, codes = [], []
        for tokens in (pairs.base, pairs.target):
            kept = []
            with model._bridge.hooks(fwd_hooks=[(hook_point, lambda x, hook, kept=kept: kept.append(x.detach().clone()))]):
                model._bridge.original_model(input_ids=tokens)
            self.x.append(kept[0])
            codes.append(dictionary.encode(kept[0]).double())
        place = torch.arange(pairs.base.shape[1])
        reach = (place >= pairs.changed[:, None]) & (place <= pairs.last[:, None])
        self.delta = (codes[1] - codes[0]) * reach[..., None]

    def kl(self, chosen: torch.Tensor) -> float:
        rows = self.candidates[chosen]
        new = self.x[0] + self.delta[..., rows] @ self.dictionary.directions[rows].double()
        with torch.no_grad(), self.model._bridge.hooks(fwd_hooks=[(self.hook_point, lambda x, hook: new)]):
            logits = self.model._bridge.original_model(input_ids=self.pairs.base).logits
        return float(kl(logits[torch.arange(self.pairs.n), self.pairs.last], self.target).mean())

    def acdc(self, seed: int, taus: list[float]) -> tuple[list[torch.Tensor], list[int]]:
        C = len(self.candidates)
        current, removed, sets = torch.ones(C, dtype=torch.bool), [], []
        level = self.kl(current)
        for step, tau in enumerate(taus):
            for feature in visiting_order(seed, step, C).tolist():
                if not current[feature]:
                    continue
                current[feature] = False
                without = self.kl(current)
                if without - level < tau:
                    level = without
                    removed.append(feature)
                else:
                    current[feature] = True
            sets.append(current.clone())
            if not current.any():
                break
        return sets, removed


@pytest.mark.parametrize("dictionary", [small_topk(features=24, k=2), identity()], ids=["topk", "identity"])
@pytest.mark.parametrize("seed", [0, 1])
def test_acdc_accepts_what_one_run_at_a_time_accepts(model, dictionary, seed):
    pairs = random_pairs(2)
    patching = Patching(model, [Point(MIDDLE, dictionary)], pairs, batch=8)
    found = rank("acdc", patching, seed=seed, count=5, low=-3)
    sets, removed = Loop(model, MIDDLE, dictionary, pairs, patching.candidates).acdc(seed, thresholds(5, -3))
    assert found.groups is not None
    assert torch.equal(found.groups.sets, torch.stack(sets))
    assert found.order.tolist()[len(patching.candidates) - len(removed) :] == removed[::-1]
    assert found.groups.thresholds.tolist() == thresholds(5, -3)[: len(sets)]


def test_acdc_is_the_same_for_every_block_and_batch(model):
    found = [
        rank("acdc", Patching(model, [Point(MIDDLE, small_topk())], random_pairs(2), batch=batch), seed=3, count=5, block=block)
        for batch, block in ((1, 1), (4, 0), (64, 1000))
    ]
    for other in found[1:]:
        assert torch.equal(found[0].groups.sets, other.groups.sets)
        assert torch.equal(found[0].order, other.order)
    assert found[0].passes <= min(other.passes for other in found[1:])


def test_the_number_of_patches_falls_with_the_threshold_and_the_sets_are_nested(model):
    patching = Patching(model, [Point(MIDDLE, small_topk())], random_pairs(2))
    groups = rank("acdc", patching, seed=0, count=8).groups
    sizes = groups.sets.sum(1)
    assert (sizes.diff() <= 0).all() and sizes[0] > sizes[-1]
    assert (groups.sets[1:] <= groups.sets[:-1]).all()
    assert (groups.thresholds.diff() > 0).all()


def test_the_published_thresholds_and_seeded_orders():
    taus = thresholds()
    assert len(taus) == 50 and taus[0] == pytest.approx(1e-5) and taus[-1] == pytest.approx(1)
    assert taus[1] / taus[0] == pytest.approx(taus[-1] / taus[-2])
    assert sorted(visiting_order(0, 0, 9).tolist()) == list(range(9))
    assert visiting_order(0, 0, 50).tolist() == visiting_order(0, 0, 50).tolist()
    assert len({tuple(visiting_order(s, t, 50).tolist()) for s in (0, 1) for t in (0, 1)}) == 4


def planted(model: LanguageModel, place: int) -> Patching:
    """A pair that differs at its last token only, and a rotation whose axis ``place`` is that difference."""
    pairs = random_pairs(1)
    pairs = pairs._replace(changed=pairs.last.clone(), target=pairs.base.clone())
    pairs.target[0, -1] = (pairs.base[0, -1] + 5) % 300
    loop = Loop(model, END, identity(), pairs, torch.arange(32))
    step = (loop.x[1] - loop.x[0])[0, -1].float()
    axes = torch.linalg.qr(torch.cat([step[:, None], torch.randn(32, 31)], dim=1)).Q.T
    axes[[0, place]] = axes[[place, 0]]
    dictionary = PCA(axes, torch.zeros(32), axes.clone(), torch.zeros(32), rectified=False)
    return Patching(model, [Point(END, dictionary)], pairs)


@pytest.mark.parametrize("name", [name for name in ALL if name != "random"])
def test_every_ranking_but_random_finds_the_planted_feature(model, name):
    patching = planted(model, 17)
    found = rank(name, patching)
    assert patching.candidates[found.order[0]] == 17
    assert sorted(found.order.tolist()) == list(range(len(patching.candidates)))
    assert found.effect.shape == found.order.shape


def test_random_finds_it_by_chance_only(model):
    patching = planted(model, 17)
    C = len(patching.candidates)
    firsts = [int(patching.candidates[rank("random", patching, seed=seed).order[0]]) for seed in range(40)]
    assert firsts.count(17) < 10
    found = rank("random", patching, seed=2)
    assert sorted(found.order.tolist()) == list(range(C)) and found.passes == patching.setup.passes == 2 * patching.n
    assert found.effect[found.order].diff().max() < 0


def test_names_and_settings():
    assert RANKINGS.names() == ALL


def test_wrong_settings_are_refused(model):
    patching = Patching(model, [Point(MIDDLE, identity())], random_pairs(1))
    with pytest.raises(SuiteError, match="no setting 'point'") as caught:
        rank("integrated-gradients", patching, point=3)
    assert "points" in caught.value.fix
    with pytest.raises(SuiteError, match="no ranking called 'acdc_fast'"):
        rank("acdc_fast", patching)
    for name, settings in (("integrated-gradients", {"points": 0}), ("acdc-fast", {"keep": 1.0}), ("acdc", {"count": 0})):
        with pytest.raises(SuiteError):
            rank(name, patching, **settings)


def test_single_and_greedy_against_measuring_by_hand(model):
    patching = Patching(model, [Point(MIDDLE, small_topk(features=16))], random_pairs())
    C = len(patching.candidates)
    alone = rank("single", patching)
    unpatched = float(patching.unpatched.kl.mean())
    for place in range(C):
        one = torch.zeros(1, C, dtype=torch.bool)
        one[0, place] = True
        assert float(alone.effect[place]) == pytest.approx(unpatched - float(patching.measure(one).kl.mean()), abs=1e-9)
    assert (alone.effect[alone.order].diff() <= 0).all()
    order, chosen = [], torch.zeros(1, C, dtype=torch.bool)
    for _ in range(5):
        levels = {}
        for place in range(C):
            if not chosen[0, place]:
                trial = chosen.clone()
                trial[0, place] = True
                levels[place] = float(patching.measure(trial).kl.mean())
        best = min(levels, key=levels.get)
        order.append(best)
        chosen[0, best] = True
    assert rank("greedy", patching, steps=5, shortlist=C).order[:5].tolist() == order
    assert sorted(rank("greedy", patching, steps=3, shortlist=2).order.tolist()) == list(range(C))


def test_integrated_gradients_sum_to_the_drop(model):
    patching = Patching(model, [Point(MIDDLE, identity())], random_pairs())
    drop = float(patching.unpatched.kl.mean() - patching.everything.kl.mean())
    assert float(rank("integrated-gradients", patching, points=40).effect.sum()) == pytest.approx(drop, rel=0.01)


def test_attribution_is_the_slope_at_the_unpatched_run(model):
    patching = Patching(model, [Point(MIDDLE, identity())], random_pairs())
    found = rank("attribution", patching)
    assert torch.allclose(found.effect, -patching.gradients(torch.zeros(1, 32))[0].mean(0))
    assert found.passes == (3 + 2) * patching.n


def test_acdc_fast_estimates_what_leaving_a_feature_out_of_the_present_set_does(model):
    assert near_shares(torch.tensor([True, False]), 2).tolist() == [[1.0, 0.0], [0.75, 0.0]]
    patching = Patching(model, [Point(MIDDLE, identity())], random_pairs())
    found = rank("acdc-fast", patching, points=1, keep=0.99, exact=31)
    # one round of one feature: the one that the gradient at the whole set finds cheapest to leave out
    rise = -patching.gradients(torch.ones(1, 32))[0].mean(0)
    assert found.order[-1] == rise.argmin() and found.effect[found.order[-1]] == pytest.approx(float(rise.min()))


def test_acdc_fast_ends_with_measured_steps_and_is_cheap(model):
    pairs = random_pairs(2)
    patching = Patching(model, [Point(MIDDLE, identity())], pairs)
    fast = rank("acdc-fast", patching, exact=1)
    slow = rank("acdc", Patching(model, [Point(MIDDLE, identity())], pairs), count=20)
    assert fast.passes * 3 < slow.passes
    whole = rank("acdc-fast", patching, exact=32)
    # the measured part is backward elimination: the last one left is the best of the last two
    two = torch.zeros(2, 32, dtype=torch.bool)
    two[0, whole.order[0]] = two[1, whole.order[1]] = True
    assert patching.measure(two).kl.mean(1).argmin() == 0
