"""Patching against whole runs in float64, and its invariants."""

from __future__ import annotations

import pytest
import torch
from patching_case import Exact, double_model, full_runs, identity, kl, random_pairs, small_topk

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.registry import BASELINES
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError, ModelError
from evalkit.models.language_model import LanguageModel
from evalkit.patching.curves import grid
from evalkit.patching.patching import Patching, Point
from evalkit.tasks.base import logit_difference
from evalkit.util.progress import Progress

MIDDLE, END = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return double_model(tmp_path_factory.mktemp("model"))


def activations(model, pairs, hook_point):
    """(N, T, D) of base and of target, float64."""
    found = []
    for tokens in (pairs.base, pairs.target):
        kept = []
        with model._bridge.hooks(fwd_hooks=[(hook_point, lambda x, hook, kept=kept: kept.append(x.flatten(2).clone()))]):
            model._bridge.original_model(input_ids=tokens)
        found.append(kept[0].detach())
    return found


def by_hand(model, pairs, hook_point, dictionary, shares, keep_error=True):
    """Logits and edits of patching ``shares`` (F,) of the features: the formula of the paper, one whole run a prompt."""
    logits, edits = [], []
    base, target = activations(model, pairs, hook_point)
    for row in range(pairs.n):
        first, last = int(pairs.changed[row]), int(pairs.last[row])
        x, y = base[row, first : last + 1], target[row, first : last + 1]
        codes = dictionary.encode(x) + shares * (dictionary.encode(y) - dictionary.encode(x))
        change = dictionary.restore(dictionary.decode(codes), x) - dictionary.reconstruct(x)
        new = (x + change) if keep_error else dictionary.restore(dictionary.decode(codes), x).double()
        edits.append((new - x).norm(dim=1).sum() / (last + 1))

        def replace(found, hook, first=first, new=new):
            flat = found.flatten(2).clone()
            flat[0, first:] = new
            return flat.reshape(found.shape)

        with torch.no_grad(), model._bridge.hooks(fwd_hooks=[(hook_point, replace)]):
            logits.append(model._bridge.original_model(input_ids=pairs.base[row : row + 1, : last + 1]).logits[0, -1])
    return torch.stack(logits), torch.stack(edits)


@pytest.mark.parametrize("hook", [MIDDLE, END, "blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z"])
def test_no_patch_gives_base_against_target(model, hook):
    pairs = random_pairs()
    patching = Patching(model, [Point(hook, identity())], pairs, batch=3)
    base, target = full_runs(model, pairs, False), full_runs(model, pairs, True)
    found = patching.unpatched
    assert torch.allclose(found.kl[0], kl(base, target), atol=1e-12)
    assert torch.allclose(found.kl_reverse[0], kl(target, base), atol=1e-12)
    assert torch.allclose(found.logit_difference[0], logit_difference(base, pairs.base_answer, pairs.wrong), atol=1e-10)
    assert (found.edit == 0).all() and found.recovered.abs().max() < 1e-9
    assert found.kl.min() > 0.01


@pytest.mark.parametrize(
    ("hook", "exact"),
    [(MIDDLE, "pca"), (END, "pca"), (MIDDLE, "identity"), (END, "identity"), ("blocks.1.hook_resid_pre", "identity"),
     ("blocks.1.hook_resid_mid", "identity")],
)  # fmt: skip
def test_everything_of_an_exact_decomposition_gives_the_target(model, hook, exact):
    pairs = random_pairs()
    base, target = activations(model, pairs, hook)
    if exact == "pca":
        x = torch.cat([base, target]).reshape(-1, 32).float()
        dictionary = BASELINES.get("pca").fit(
            torch.cat([x, torch.randn(200, 32)]), seed=0, hook_point=hook, model="", progress=Progress(quiet=True)
        )
    else:
        dictionary = identity()
    found = Patching(model, [Point(hook, dictionary)], pairs).everything
    assert found.kl.abs().max() < 1e-10
    assert (found.recovered - 1).abs().max() < 1e-4
    for row in range(pairs.n):
        last = int(pairs.last[row])
        size = (target[row, : last + 1] - base[row, : last + 1]).norm(dim=1).mean()
        assert found.edit[0, row] == pytest.approx(float(size), rel=1e-5)


def normalised(kind: str) -> TopK:
    plain = small_topk()
    return TopK(plain.tensors(), k=3, wiring=Wiring(normalise=kind))


@pytest.mark.parametrize("hook", [MIDDLE, END, "blocks.1.hook_mlp_out"])
@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("make", [small_topk, lambda: normalised("layer_norm"), identity])
def test_any_set_is_what_the_formula_says(model, hook, keep_error, make):
    pairs, dictionary = random_pairs(), make()
    patching = Patching(model, [Point(hook, dictionary)], pairs, keep_error=keep_error, batch=5)
    sets = torch.rand(3, len(patching.candidates)) < 0.5
    found = patching.measure(sets)
    target = full_runs(model, pairs, True)
    for place in range(3):
        shares = torch.zeros(dictionary.n_features)
        shares[patching.candidates[sets[place]]] = 1
        logits, edits = by_hand(model, pairs, hook, dictionary, shares, keep_error)
        assert torch.allclose(found.kl[place], kl(logits, target), atol=1e-5)
        assert torch.allclose(found.edit[place], edits, atol=1e-5)
        assert torch.allclose(found.logit_difference[place], logit_difference(logits, pairs.base_answer, pairs.wrong), atol=1e-4)
    assert found.kl.std() > 1e-4


def test_recovered_is_the_share_of_the_logit_differences_change(model):
    pairs = random_pairs()
    with Exact():
        patching = Patching(model, [Point(MIDDLE, small_topk())], pairs)
        found = patching.measure(torch.rand(2, len(patching.candidates)) < 0.5)
        base, target = (logit_difference(full_runs(model, pairs, side), pairs.base_answer, pairs.wrong) for side in (False, True))
    assert torch.allclose(found.recovered, (found.logit_difference - base) / (target - base), atol=1e-9)


def test_batched_and_one_at_a_time_agree_in_float64(model):
    pairs = random_pairs(6)
    with Exact():
        together = Patching(model, [Point(MIDDLE, small_topk())], pairs, batch=64)
        alone = Patching(model, [Point(MIDDLE, small_topk())], pairs, batch=1)
        sets = torch.rand(5, len(together.candidates)) < 0.5
        many = together.measure(sets)
        for place in range(5):
            one = alone.measure(sets[place : place + 1])
            for a, b in zip(many, one, strict=True):
                assert torch.allclose(a[place], b[0], atol=1e-12, rtol=0)


def test_candidates_are_the_features_whose_codes_differ_where_a_patch_can_reach(model):
    pairs, dictionary = random_pairs(), small_topk()
    patching = Patching(model, [Point(MIDDLE, dictionary)], pairs)
    base, target = activations(model, pairs, MIDDLE)
    differs = dictionary.encode(base) != dictionary.encode(target)
    place = torch.arange(pairs.base.shape[1])
    reach = (place >= pairs.changed[:, None]) & (place <= pairs.last[:, None])
    expected = (differs & reach[..., None]).any(1)  # (N, F)
    assert patching.candidates.tolist() == expected.any(0).nonzero()[:, 0].tolist()
    assert torch.equal(patching.affected, expected[:, patching.candidates])
    assert 0 < len(patching.candidates) < dictionary.n_features
    assert not patching.affected.all()


def test_a_run_is_made_once_and_shared_by_sets_that_agree_on_a_prompt(model):
    patching = Patching(model, [Point(MIDDLE, small_topk())], random_pairs())
    C = len(patching.candidates)
    before = patching.passes
    patching.measure(torch.ones(1, C, dtype=torch.bool))
    assert patching.passes == before + 4
    patching.measure(torch.ones(3, C, dtype=torch.bool))
    assert patching.passes == before + 4
    feature = int(patching.affected.sum(0).argmin())
    touched = int(patching.affected[:, feature].sum())
    assert touched < 4
    without = torch.ones(1, C, dtype=torch.bool)
    without[0, feature] = False
    found = patching.measure(without)
    assert patching.passes == before + 4 + touched
    fresh = Patching(model, [Point(MIDDLE, small_topk())], random_pairs()).measure(without)
    assert torch.allclose(found.kl, fresh.kl, atol=1e-12)


@pytest.mark.parametrize("hook", [MIDDLE, "blocks.1.hook_mlp_out"])
def test_gradients_are_those_of_the_formula(model, hook):
    pairs, dictionary = random_pairs(), identity()
    patching = Patching(model, [Point(hook, dictionary)], pairs, batch=3)
    shares = torch.rand(2, 32)
    found = patching.gradients(shares)
    assert found.shape == (2, 4, 32)
    target = full_runs(model, pairs, True)
    step = 5e-3  # codes are float32: a smaller step would measure their rounding
    for feature in (3, 20):
        ends = []
        for sign in (1, -1):
            moved = shares[1].double().clone()
            moved[feature] += sign * step
            ends.append(kl(by_hand(model, pairs, hook, dictionary, moved)[0], target))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert torch.allclose(found[1, :, feature], slope, atol=3e-4, rtol=1e-3)


def test_several_hook_points_set_codes_to_the_targets(model):
    pairs = random_pairs()
    both = Patching(model, [Point(END, identity()), Point(MIDDLE, identity())], pairs)
    assert [point.hook_point for point in both.hooks] == [MIDDLE, END]
    assert both.points.tolist() == [0] * 32 + [1] * 32
    first, second = both.points == 0, both.points == 1
    found = both.measure(torch.stack([first, second, first | second]))
    assert found.kl.max() < 1e-10
    only = Patching(model, [Point(MIDDLE, identity())], pairs)
    some = torch.rand(32) < 0.5
    assert torch.allclose(
        both.measure(torch.cat([some, torch.zeros(32, dtype=torch.bool)])[None]).kl, only.measure(some[None]).kl, atol=1e-9
    )
    # with everything patched at the first, nothing is left to add at the second
    assert torch.allclose(found.edit[2], found.edit[0], atol=1e-5)


def test_of_several_hook_points_no_set_hangs_on_what_was_run_before(model):
    """Sparse codes: what differs at the later point on one prompt only may still be moved on the others."""
    pairs = random_pairs()
    points = [Point(MIDDLE, small_topk()), Point(END, small_topk(seed=1))]
    shared = Patching(model, points, pairs)
    differs, generator = shared._found.delta.ne(0).any(1), torch.Generator().manual_seed(1)
    for row in range(pairs.n):
        some = torch.rand(len(shared.candidates), generator=generator) < 0.5
        other = some ^ (~differs[row] & (shared.points == 1))  # features of the later point that differ on other prompts alone
        found = shared.measure(torch.stack([some, other])).kl[:, row]
        alone = [shared.fresh().measure(one[None]).kl[0, row] for one in (some, other)]
        assert torch.allclose(found, torch.stack(alone), atol=1e-9), row


def test_codes_that_are_the_targets_already_are_not_moved_again_where_tokens_are_normalised(model):
    both = Patching(model, [Point(MIDDLE, identity()), Point(END, normalised("layer_norm"))], random_pairs())
    first = both.points == 0
    found = both.measure(torch.stack([first, torch.ones_like(first)]))
    assert found.kl.max() < 1e-10
    assert torch.allclose(found.edit[0], found.edit[1], atol=1e-4)


def test_features_are_numbered_in_the_order_the_hook_points_are_given_in(model):
    both = Patching(model, [Point(END, small_topk(seed=1)), Point(MIDDLE, small_topk())], random_pairs())
    assert [point.hook_point for point in both.hooks] == [MIDDLE, END]
    own = both.ids < 48
    assert both.points[own].unique().tolist() == [1] and both.points[~own].unique().tolist() == [0]
    assert both.ids.unique().shape == both.ids.shape


def test_prompts_that_differ_from_the_first_token_on(model):
    pairs = random_pairs(3, first=0).take([0, 0])
    patching = Patching(model, [Point(MIDDLE, identity())], pairs)
    assert torch.allclose(patching.unpatched.kl[0], kl(full_runs(model, pairs, False), full_runs(model, pairs, True)), atol=1e-12)
    assert patching.everything.kl.max() < 1e-10


def test_what_cannot_be_patched_is_refused(model):
    pairs = random_pairs()
    with pytest.raises(DictionaryError, match="width 16"):
        Patching(model, [Point(MIDDLE, small_topk(width=16))], pairs)
    with pytest.raises(ModelError, match="no hook point"):
        Patching(model, [Point("blocks.9.hook_resid_post", identity())], pairs)
    with pytest.raises(DictionaryError, match="different widths"):
        Patching(model, [Point(MIDDLE, identity()), Point("blocks.1.mlp.hook_post", identity(64))], pairs)
    with pytest.raises(DictionaryError, match="twice"):
        Patching(model, [Point(MIDDLE, identity()), Point(END, identity()), Point(MIDDLE, small_topk())], pairs)
    with pytest.raises(ValueError, match="sets have shape"):
        Patching(model, [Point(MIDDLE, identity())], pairs).measure(torch.zeros(1, 3, dtype=torch.bool))


def test_grid():
    assert grid(10) == [0, 1, 2, 3, 4, 6, 8, 10]
    assert grid(2) == [0, 1, 2]
    assert grid(0) == [0]


WITHIN = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", END]


def set_from(start, name, becomes):
    """Hooks that put ``becomes`` of what stands at ``name`` there, from position ``start`` on, for both branches."""
    change = []

    def enter(x, hook):
        change.append((becomes(x) - x[0]) * (torch.arange(x.shape[1]) >= start)[:, None])
        return x + change[-1]

    middle = [("blocks.1.hook_out", lambda x, hook: x + change[-1])] if name.endswith("resid_mid") else []
    return [(name, enter), *middle]


@pytest.mark.parametrize(("first", "second"), [(WITHIN[a], WITHIN[b]) for a in range(5) for b in range(a + 1, 5)])
def test_points_of_one_block_are_patched_in_the_order_of_the_forward_pass(model, first, second):
    pairs, dictionary = random_pairs(2), identity()
    patching = Patching(model, [Point(second, dictionary), Point(first, dictionary)], pairs)
    assert [point.hook_point for point in patching.hooks] == [first, second]
    generator = torch.Generator().manual_seed(3)
    some = torch.rand(64, generator=generator) < 0.5
    found = patching.measure(some[None])
    aim = activations(model, pairs, second)[1]
    goal = activations(model, pairs, first)[1]
    target = full_runs(model, pairs, True)
    for row in range(pairs.n):
        start, last = int(pairs.changed[row]), int(pairs.last[row])

        def wanted(point, new):
            mask = torch.zeros(32, dtype=torch.bool)
            mask[patching.candidates[(patching.points == point) & some]] = True
            return lambda x: torch.where(mask, new[row, : last + 1], x[0])  # noqa: B023 (called within this turn)

        hooks = []
        for name, becomes in ((first, wanted(0, goal)), (second, wanted(1, aim))):
            hooks += set_from(start, name, becomes)
        with torch.no_grad(), model._bridge.hooks(fwd_hooks=hooks):
            logits = model._bridge.original_model(input_ids=pairs.base[row : row + 1, : last + 1]).logits[0, -1]
        assert float(found.kl[0, row]) == pytest.approx(float(kl(logits[None], target[row : row + 1])), abs=1e-6)
    assert (found.kl[0] - patching.unpatched.kl[0]).abs().max() > 1e-4


def test_a_fresh_copy_shares_the_set_up_and_remembers_nothing(model):
    patching = Patching(model, [Point(MIDDLE, small_topk())], random_pairs())
    assert patching.setup.passes == 8 and patching.setup.seconds > 0
    sets = torch.rand(3, len(patching.candidates)) < 0.5
    first = patching.measure(sets)
    again = patching.fresh()
    assert again.passes == 8 and torch.equal(again.candidates, patching.candidates)
    assert torch.equal(again.measure(sets).kl, first.kl)
    assert again.passes == patching.passes > 8


@pytest.mark.parametrize("keep_error", [True, False])
def test_the_reference_is_the_base_run_whatever_the_error_term(model, keep_error):
    pairs = random_pairs()
    patching = Patching(model, [Point(MIDDLE, small_topk())], pairs, keep_error=keep_error)
    base, target = full_runs(model, pairs, False), full_runs(model, pairs, True)
    assert torch.allclose(patching.reference.kl[0], kl(base, target), atol=1e-12)
    assert torch.allclose(patching.reference.kl_reverse[0], kl(target, base), atol=1e-12)
    same = torch.allclose(patching.unpatched.kl, patching.reference.kl, atol=1e-9)
    assert same == keep_error
