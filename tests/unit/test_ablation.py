"""Ablation against planted features: one that writes one token, one that does nothing, one that never fires."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from patching_case import Exact, double_model, small_topk

from evalkit.activations.capture import Activations
from evalkit.dictionaries.controls import Identity
from evalkit.errors import DictionaryError, UnitFailed
from evalkit.evaluations.ablation import Ablation, AblationConfig, concentration, repeated
from evalkit.evaluations.sampling import feature_codes
from evalkit.interventions import ablations
from evalkit.interventions.ablations import RESIDUAL, AblationPlan, Context, contexts_of, edits_of, silent_contexts
from evalkit.interventions.windows import WindowCache
from evalkit.util.progress import Progress

HOOK = "blocks.0.hook_resid_post"
N, T, D = 30, 12, 32
TRIGGER, WRITTEN = 5, 7


def measure(bench, edits):
    return ablations.measure(bench.model, bench.hook_point, bench.score(), edits)


class AblationBench:
    """Random text, a model in float64."""

    judge, references, seed, hook_point = None, {}, 5, HOOK
    progress = Progress(quiet=True)

    def __init__(self, model, name):
        self.model = model
        tokens = torch.randint(0, 40, (N, T), generator=torch.Generator().manual_seed(1))
        tokens[::2, 3] = TRIGGER
        keep = torch.ones(N, T, dtype=torch.bool)
        keep[:, 0] = False
        self.activations = Activations(model.activations(tokens, HOOK), keep, tokens, torch.arange(N), name, 1e9)

    def score(self):
        return self.activations


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Sums that transformers makes in float32 hang on how many numbers a vector of the processor holds."""
    with Exact():
        yield


@pytest.fixture(scope="module")
def random(tmp_path_factory) -> Iterator[AblationBench]:
    yield AblationBench(double_model(Path(tmp_path_factory.mktemp("random"))), "random")


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Iterator[AblationBench]:
    """Blocks do nothing. Dimension 0 is written by the trigger alone and read by the logit of one token alone; dimension 1 is
    written by every token and read by none; dimension 2 is never written."""
    model = double_model(Path(tmp_path_factory.mktemp("planted")))
    inner = model._bridge.original_model
    with torch.no_grad():
        for name, weight in inner.named_parameters():
            if "o_proj" in name or "down_proj" in name or "lm_head" in name:
                weight.zero_()
            if "embed_tokens" in name:
                weight[:, [0, 2]] = 0
                weight[TRIGGER, 0] = 3.0
                weight[:, 1] = weight[:, 1].abs() + 0.1
            if "lm_head" in name:
                weight[WRITTEN, 0] = 4.0
    yield AblationBench(model, "planted")


def value(result, metric, feature):
    (score,) = [s for s in result.scores if s.metric == metric and s.item == feature]
    return score.value


def effects_of(result, feature, **which):
    rows = [row for row in result.tables["logit_effects"] if row["feature"] == feature]
    return [row for row in rows if all(row[key] == wanted for key, wanted in which.items())]


def test_the_planted_token_and_only_it_is_lowered(planted):
    result = Ablation().run(planted, Identity(torch.eye(D)), AblationConfig(feature_ids=(0,), contexts=8))
    for by in ("change", "mass", "direct"):
        rows = effects_of(result, 0, edit="ablate", ranked_by=by, side="lowered")
        assert rows[0]["token_id"] == WRITTEN and rows[0]["low"] <= rows[0]["change"] <= rows[0]["high"] < 0
        assert all(row["change"] > 0 for row in rows[1:])
    (first, *_) = effects_of(result, 0, edit="add", ranked_by="change", side="raised")
    assert first["token_id"] == WRITTEN and first["change"] > 0
    assert value(result, "direct_r", 0) == pytest.approx(1, abs=1e-9)
    assert value(result, "reverse_r", 0) == pytest.approx(1, abs=1e-6)
    assert value(result, "kl", 0) > 10 * value(result, "kl_random", 0)
    # the planted token loses what all others gain, in every context
    assert value(result, "repeated", 0) == pytest.approx(1, abs=1e-9)
    assert value(result, "kl_rank", 0) == 1
    contexts = [row for row in result.tables["ablation_contexts"] if row["edit"] == "ablate"]
    text = planted.score().tokens
    assert len(contexts) == 8 and all(text[row["window"], row["position"]] == TRIGGER for row in contexts)
    assert {row["edited"] for row in contexts} <= {1, 2}


def test_a_feature_nothing_reads_changes_nothing(planted):
    result = Ablation().run(planted, Identity(torch.eye(D)), AblationConfig(feature_ids=(1,), contexts=4))
    # without the trigger all logits are 0, whatever the norm; with it, the norm's scale is felt by the one that is not
    silent = [row for row in result.tables["ablation_contexts"] if row["edit"] == "ablate" and row["kl"] < 1e-12]
    assert silent and {row["edit"] for row in result.tables["ablation_contexts"]} == {"ablate"}, "it is silent nowhere"
    written = Ablation().run(planted, Identity(torch.eye(D)), AblationConfig(feature_ids=(0,)))
    assert value(result, "kl", 1) < 1e-2 * value(written, "kl", 0)


def test_a_feature_that_never_fires_is_undefined(planted):
    result = Ablation().run(planted, Identity(torch.eye(D)), AblationConfig(feature_ids=(2,)))
    assert {score.status for score in result.scores} == {"undefined"}
    assert result.tables == {"logit_effects": [], "ablation_contexts": []}


def test_ablating_where_it_does_not_fire_changes_nothing_exactly(random):
    """Read before the feature first fires, and in windows where it never does, beside its own contexts in one batch."""
    sae, score = small_topk(), random.score()
    (feature,) = feature_of(sae, score)
    codes = feature_codes(sae, score, [feature])[..., 0]
    own = [e for e in edits_of(0, codes, score, sae, feature, AblationPlan(contexts=3, level=0))
           if e.kind == "ablate"]  # fmt: skip
    first = [(w, int(row.nonzero()[0])) for w, row in enumerate(codes) if row.any() and row.nonzero()[0] >= 2][:3]
    places = [Context(w, at - 1) for w, at in first]
    places += [Context(w, T - 2) for w in (codes == 0).all(1).nonzero()[:3, 0].tolist()]
    assert len(own) == 3 and len(places) == 6 and all(codes[w].any() for w, _ in first)
    silent = [own[0]._replace(kind="silent", context=place, code=0.0, amount=-codes[place.window]) for place in places]
    effects = measure(random, [*own, *silent])
    found = effects[0, "silent"]
    assert not found.change.any() and not found.mass.any() and not found.kl.any() and not found.direct.any()
    assert (effects[0, "ablate"].kl > 1e-6).all(), "where it fires, the same feature does something"


def test_clamping_to_the_present_value_changes_nothing_beyond_rounding(random):
    """All contexts are clamped to the code that one of them has; its window holds no other firing."""
    sae, score = small_topk(), random.score()
    (feature,) = feature_of(sae, score)
    codes = feature_codes(sae, score, [feature])[..., 0]
    maximum, once = float(codes[:, :-1].max()), (codes != 0).sum(1) == 1
    present = next(float(row.max()) for row in codes[once] if 0.2 * maximum < float(row[:-1].max()) < 0.8 * maximum)
    to = {"reverse": "clamp", "strength": present / maximum}
    edits = edits_of(0, codes, score, sae, feature, AblationPlan(contexts=N, level=0, seed=0, **to))
    clamped = measure(random, edits)[0, "clamp"]
    same = np.array([edit.code == present for edit in clamped.edits])
    assert same.sum() == 1 and len(same) > 5
    assert np.abs(clamped.change[same]).max() < 1e-6 and clamped.kl[same].max() < 1e-12
    assert clamped.kl[~same].min() > 1e-9 and all(edit.amount.any() for edit in clamped.edits if edit.code != present)


def feature_of(sae, score, least=5):
    counts = (feature_codes(sae, score, range(sae.n_features)) != 0).sum((0, 1))
    return [int(counts.argmax())] if int(counts.max()) >= least else []


@pytest.mark.parametrize("reverse", ["add", "clamp"])
def test_batched_is_one_at_a_time_is_whole_runs_in_float64(random, reverse):
    sae, score, model = small_topk(), random.score(), random.model
    features = (feature_codes(sae, score, range(48)) > 0).sum((0, 1)).argsort(descending=True)[:2].tolist()
    codes = feature_codes(sae, score, features)
    edits = [
        edit
        for place, f in enumerate(features)
        for edit in edits_of(
            place, codes[..., place], score, sae, f, AblationPlan(contexts=2, level=0, reverse=reverse, strength=1.5, seed=0)
        )
    ]
    together = measure(random, edits)
    assert {kind for _, kind in together} == {"ablate", "random 1", reverse}
    for (place, kind), found in together.items():
        for row, edit in enumerate(found.edits):
            (alone,) = measure(random, [edit]).values()
            assert alone.kl[0] == pytest.approx(found.kl[row], rel=1e-8, abs=1e-12), (place, kind)
            window, position = edit.context
            tokens = score.tokens[window][None]
            x = score.x[window].double() + (edit.amount[:, None] * edit.direction).double()
            with model._skipping(1, score.x[window].double()[None]):
                before = model._forward(tokens, [], "logits")[0, position].log_softmax(-1)
            with model._skipping(1, x[None]):
                after = model._forward(tokens, [], "logits")[0, position].log_softmax(-1)
            kl = float((before.exp() * (before - after)).sum())
            assert found.kl[row] == pytest.approx(kl, rel=1e-5, abs=1e-9), (place, kind)
            if kind == "random 1":
                assert len(found.change) == 0  # of the null only what is summed is kept
                mass = (after.exp() - before.exp()).abs().sum()
                assert found.moved[row] == pytest.approx(float(mass), rel=1e-5)
                continue
            np.testing.assert_allclose(found.change[row], (after - before).numpy(), rtol=1e-4, atol=1e-5)


def test_contexts_are_strong_and_have_a_next_token():
    codes = torch.zeros(20, 6)
    codes[:, 2] = torch.linspace(0, 1, 20)
    codes[3, 5] = 9.0  # the last position: nothing follows it
    order = np.random.default_rng(0).permutation(20)
    found, maximum = contexts_of(codes, 4, 0.5, order)
    assert maximum == 1 and len(found) == 4
    assert all(codes[c.window, c.position] >= 0.5 and c.position == 2 for c in found)
    few, _ = contexts_of(codes, 15, 0.9, order)
    assert {c.window for c in few} == set(range(5, 20)), "the strongest, where too few reach the level"
    assert contexts_of(torch.zeros(4, 5), 3, 0.5, np.arange(4)) == ([], 0.0)


def test_contexts_are_the_first_of_an_order_and_a_uniform_draw_where_it_is_random():
    codes = torch.zeros(20, 6)
    codes[:, 2] = torch.linspace(0, 1, 20)
    found, _ = contexts_of(codes, 3, 0.5, np.array([0, 12, 3, 19, 10, *[w for w in range(20) if w not in (0, 12, 3, 19, 10)]]))
    assert [c.window for c in found] == [19, 12, 10], "those of the pool that come first, the strongest in front"
    random, counts, draws = np.random.default_rng(0), np.zeros(20), 4000
    for _ in range(draws):
        counts[[c.window for c in contexts_of(codes, 3, 0.5, random.permutation(20))[0]]] += 1
    pool = np.arange(10, 20)
    assert not counts[:10].any() and np.abs(counts[pool] / draws - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / draws)


def test_features_that_are_strong_everywhere_have_contexts_of_their_own():
    """4 of 40 windows by chance: two features share 0.4 of them on average, not all four."""
    score = Activations(torch.ones(40, 6, 30), torch.ones(40, 6, dtype=torch.bool), torch.zeros(40, 6, dtype=torch.int64),
                        torch.arange(40), "x", 1e9)  # fmt: skip
    codes = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.6  # strong everywhere
    windows = []
    for feature in range(30):
        plan = AblationPlan(4, 0.5, seed=3)
        edits = edits_of(0, codes, score, Identity(torch.eye(30)), feature, plan)
        windows.append({edit.context.window for edit in edits})
    shared = [len(one & two) for number, one in enumerate(windows) for two in windows[:number]]
    assert all(len(one) == 4 for one in windows) and np.mean(shared) == pytest.approx(0.4, abs=0.1)


def test_silent_contexts_are_kept_and_silent(planted):
    codes = feature_codes(Identity(torch.eye(D)), planted.score(), [0])[..., 0]
    order = np.random.default_rng(0).permutation(N)
    found = silent_contexts(codes, planted.score(), 10, order, np.random.default_rng(0))
    assert [c.window for c in found] == order[:10].tolist()
    assert all(codes[c] == 0 and planted.score().keep[c] and c.position < T - 1 for c in found)


def test_concentration_of_known_changes():
    mass = np.zeros(100)
    mass[:2] = (-0.3, 0.3)
    assert concentration(mass, np.array([0.6, 0.6])) == pytest.approx(1)
    assert concentration(np.full(100, 0.01), np.array([1.0])) == pytest.approx(0.1)
    assert concentration(mass, np.array([6.0, 6.0])) == pytest.approx(0.1), "contexts that cancel"
    assert np.isnan(concentration(np.zeros(5), np.zeros(2)))


def test_what_one_half_of_the_contexts_foretells():
    changes = np.zeros((4, 100))  # contexts, tokens
    changes[:, :2] = (-0.3, 0.3)
    moved = np.abs(changes).sum(1)

    def of(changes):
        return repeated(np.stack([changes[::2].mean(0), changes[1::2].mean(0)]), np.abs(changes).sum(1))

    assert of(changes) == pytest.approx(1)
    turned = changes * np.array([1, -1, 1, -1])[:, None]
    assert of(turned) == pytest.approx(-1), "the other half does the opposite"
    apart = changes.copy()
    apart[1::2] = np.roll(apart[1::2], 50, axis=1)
    assert of(apart) == 0
    mixed = changes.copy()
    mixed[:, 50] = (0.2, -0.2, 0.2, -0.2)
    assert of(mixed) == pytest.approx((0.6 - 0.2) / 0.8)
    spread = np.zeros((40, 100))  # one class of 50 words loses to the other, in each context another of them
    spread[np.arange(40), np.arange(40)], spread[np.arange(40), 50 + np.arange(40)] = -0.3, 0.3
    spread[:, :50] -= 1e-4
    spread[:, 50:] += 1e-4
    assert of(spread) == pytest.approx(1)
    assert np.isnan(repeated(np.zeros((2, 5)), np.zeros(4))) and np.isnan(repeated(np.zeros((2, 5)), moved[:1]))


def test_halves_are_every_second_context(random):
    sae, score = small_topk(), random.score()
    (feature,) = feature_of(sae, score)
    codes = feature_codes(sae, score, [feature])[..., 0]
    edits = edits_of(0, codes, score, sae, feature, AblationPlan(contexts=5, level=0, reverse="none", strength=1, seed=0))
    found = measure(random, edits)[0, "ablate"]
    assert len(found.edits) == 5
    np.testing.assert_allclose((3 * found.halves[0] + 2 * found.halves[1]) / 5, found.mass, atol=1e-12)
    alone = [measure(random, [edit])[0, "ablate"].mass for edit in found.edits]
    np.testing.assert_allclose(found.halves[1], (alone[1] + alone[3]) / 2, atol=1e-10)


def test_windows_are_run_no_further_than_they_are_read(random, monkeypatch):
    """And not one by one: what is found does not hang on how they are grouped."""
    sae, score = small_topk(), random.score()
    (feature,) = feature_of(sae, score)
    codes = feature_codes(sae, score, [feature])[..., 0]
    edits = edits_of(0, codes, score, sae, feature, AblationPlan(contexts=6, level=0, reverse="add", strength=1, seed=0))
    made: list[WindowCache] = []

    def note(*args, **kwargs):
        made.append(WindowCache(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(ablations, "WindowCache", note)
    together = measure(random, edits)
    (windows,) = made
    longest = {
        e.context.window: max(o.context.position + 1 for o in edits if o.context.window == e.context.window) for e in edits
    }
    assert sorted(windows.length.tolist()) == sorted(longest.values()) and min(longest.values()) < T
    assert windows.own_positions < len(longest) * T
    monkeypatch.setattr(ablations, "GROUP", 2 * T)
    monkeypatch.setattr(ablations, "ROWS", 3)
    apart = measure(random, edits)
    assert len(made) > 3
    for key, found in together.items():
        np.testing.assert_allclose(found.kl, apart[key].kl, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(found.halves, apart[key].halves, atol=1e-7 if key[1] == "random 1" else 1e-10)


def test_what_cannot_be_studied_is_refused(random):
    with pytest.raises(UnitFailed, match="no feature 99"):
        Ablation().run(random, Identity(torch.eye(D)), AblationConfig(feature_ids=(99,)))
    with pytest.raises(DictionaryError, match="width"):
        Ablation().run(random, Identity(torch.eye(3)), AblationConfig())
    with pytest.raises(ValueError, match="reverse"):
        AblationConfig(reverse="steer")


@pytest.mark.parametrize(
    ("hook_point", "reads"),
    [("blocks.3.hook_resid_post", True), ("blocks.11.hook_mlp_out", True), ("blocks.0.hook_in", True),
     ("blocks.3.mlp.hook_in", False), ("blocks.3.attn.hook_in", False), ("blocks.3.mlp.hook_post", False)],
)  # fmt: skip
def test_the_direct_effect_is_that_of_what_is_written_into_the_residual_stream(hook_point, reads):
    assert (RESIDUAL.fullmatch(hook_point) is not None) == reads


@pytest.mark.parametrize(("hook_point", "reads"), [("blocks.1.hook_mlp_out", True), ("blocks.1.mlp.hook_in", False)])
def test_the_direct_effect_of_the_last_mlps_output_is_the_whole_one(random, monkeypatch, hook_point, reads):
    """Nothing comes behind it but the norm and the unembedding; what goes into the MLP has no such path."""
    own = random.activations
    monkeypatch.setattr(random, "hook_point", hook_point, raising=False)
    monkeypatch.setattr(
        random, "activations", own._replace(x=random.model.activations(own.tokens, hook_point), identity=hook_point)
    )
    result = Ablation().run(random, Identity(torch.eye(D)), AblationConfig(feature_ids=(0,), contexts=4, reverse="none"))
    (score,) = [score for score in result.scores if score.metric == "direct_r"]
    assert (score.value == pytest.approx(1, abs=1e-6)) if reads else score.status == "undefined"
