"""Causal trees against a planted circuit, Z before A before B, and against whole runs of one ablation at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from patching_case import Exact, double_model, small_topk

from evalkit.activations.capture import Activations
from evalkit.dictionaries.controls import Identity
from evalkit.dictionaries.topk import TopK
from evalkit.errors import SuiteError
from evalkit.evaluations.causal_tree import parents as causal_effects
from evalkit.evaluations.causal_tree.evaluation import CausalTree, CausalTreeConfig
from evalkit.evaluations.causal_tree.parents import (
    OTHERS,
    Ablations,
    Rule,
    parents_of,
)
from evalkit.evaluations.sampling import feature_codes
from evalkit.interventions.ablations import Context
from evalkit.judges.scripted import ScriptedJudge
from evalkit.util.progress import Progress

HOOKS = ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
N, T, D = 24, 10, 32
TRIGGER, Z, A, B = 5, 0, 1, 2


class TreeBench:
    """A model with a dictionary of one name at each of three hook points."""

    judge, references, seed, name, hook_points = None, {}, 5, "exact", HOOKS
    progress = Progress(quiet=True)

    def __init__(self, model, dictionaries, hook_point=HOOKS[-1], scores=None):
        self.model, self.dictionaries, self.hook_point = model, dictionaries, hook_point
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(10, 60, (N, T), generator=generator)
        tokens[torch.arange(N), torch.randint(2, T - 1, (N,), generator=generator)] = TRIGGER
        keep = torch.ones(N, T, dtype=torch.bool)
        keep[:, 0] = False
        self.scores = scores or {
            h: Activations(model.activations(tokens, h), keep, tokens, torch.arange(N), h, 1e9) for h in HOOKS
        }

    def at(self, hook_point):
        return TreeBench(self.model, self.dictionaries, hook_point, self.scores)

    def dictionary(self, name):
        assert name == self.name
        return self.dictionaries[self.hook_point]

    def score(self):
        return self.scores[self.hook_point]


def exact_dictionaries():
    return dict.fromkeys(HOOKS, Identity(torch.eye(D)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Attention does nothing. The trigger writes Z; the first MLP writes A from Z, the second B from A; nothing else does."""
    model = double_model(Path(tmp_path_factory.mktemp("planted")))
    with torch.no_grad():
        for name, weight in model._bridge.original_model.named_parameters():
            if "o_proj" in name or "_proj" in name and "mlp" in name:
                weight.zero_()
            if "embed_tokens" in name:
                weight[:, [Z, A, B]] = 0
                weight[TRIGGER, Z] = 3.0
            for layer, read, write in ((0, Z, A), (1, A, B)):
                if f"layers.{layer}." in name and "gate_proj" in name or f"layers.{layer}." in name and "up_proj" in name:
                    weight[0, read] = 2.0
                if f"layers.{layer}." in name and "down_proj" in name:
                    weight[write, 0] = 3.0
    return TreeBench(model, exact_dictionaries())


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    dictionaries = {h: small_topk(seed=place) for place, h in enumerate(HOOKS)}
    return TreeBench(double_model(Path(tmp_path_factory.mktemp("random"))), dictionaries)


def value(result, metric):
    (score,) = [s for s in result.scores if s.metric == metric]
    return score.value


def test_the_planted_tree_and_only_it_is_found(planted):
    config = CausalTreeConfig(feature_ids=(B,), contexts=8, tested=6, checked=20)
    result = CausalTree().run(planted, planted.dictionary("exact"), config)
    edges = result.tables["causal_edges"]
    found = [(row["depth"], row["child"], row["parent"]) for row in edges if row["significant"]]
    assert found == [(1, B, A), (2, A, Z)]
    for row in edges:
        if row["significant"]:
            assert row["share"] == pytest.approx(1, abs=0.02) and row["low"] > 0.9 and row["place"] == 1
            assert row["active"] == row["contexts"] == 8
    assert value(result, "parents") == 1 and value(result, "missed") == value(result, "missed_next") == 0
    assert value(result, "top_share") > 0.9 and value(result, "weak") == 0
    for name in ("cause_share", "parent_share"):
        assert value(result, name) == pytest.approx(1, abs=0.02)
        assert value(result, "together") == pytest.approx(value(result, name))
        assert abs(value(result, f"{name}_random")) < 0.6 * value(result, name)
    nodes = {(row["hook_point"], row["feature"]): row for row in result.tables["causal_nodes"]}
    assert set(nodes) == {(HOOKS[2], B), (HOOKS[1], A), (HOOKS[0], Z)}
    trigger = planted.model.token_strings([TRIGGER])[0]
    assert all(json.loads(row["tokens"])[0][0] == trigger for row in nodes.values())
    assert nodes[HOOKS[0], Z].get("contexts") is None and nodes[HOOKS[1], A]["parents"] == 1


def test_what_is_computed_is_not_carried_and_what_is_carried_says_so(planted):
    """A is computed from Z, and B from A; the trigger's own vector arrives at the last hook point as it was written."""
    config = CausalTreeConfig(feature_ids=(B, Z), contexts=8, tested=6, checked=20, depth=1)
    result = CausalTree().run(planted, planted.dictionary("exact"), config)
    edges = {(row["child"], row["parent"]): row for row in result.tables["causal_edges"] if not row["checked"]}
    assert edges[B, A]["share"] == pytest.approx(1, abs=0.02) and edges[B, A]["carried"] == pytest.approx(0, abs=1e-6)
    assert edges[Z, Z]["share"] == pytest.approx(1, abs=0.02) and edges[Z, Z]["carried"] == pytest.approx(1, abs=0.02)
    carried = {score.item: score.value for score in result.scores if score.metric == "parent_carried"}
    assert carried[B] == pytest.approx(0, abs=1e-6) and carried[Z] == pytest.approx(1, abs=0.02)
    assert any(row["checked"] for row in result.tables["causal_edges"])


def test_too_few_contexts_give_neither_an_interval_nor_a_p_nor_a_parent(planted):
    """Five contexts in which the planted cause takes everything: its share is there, and nothing that a test would say."""
    config = CausalTreeConfig(feature_ids=(B,), contexts=5, tested=6, checked=4, depth=1)
    result = CausalTree().run(planted, planted.dictionary("exact"), config)
    edges = result.tables["causal_edges"]
    assert edges[0]["parent"] == A and edges[0]["share"] == pytest.approx(1, abs=0.02)
    assert {row[name] for row in edges for name in ("low", "high", "p", "p_holm")} == {None}
    assert not any(row["significant"] for row in edges)
    scores = {score.metric: score for score in result.scores}
    assert scores["cause_share"].value == pytest.approx(1, abs=0.02)
    for metric in ("parents", "together", "parent_share", "missed", "missed_next"):
        assert (scores[metric].value, scores[metric].status) == (None, "undefined")
    (node,) = [row for row in result.tables["causal_nodes"] if row["hook_point"] == HOOKS[2]]
    assert (node["contexts"], node["parents"], node["missed"], node["together"]) == (5, None, None, None)


def test_a_feature_that_never_fires_has_no_tree(planted):
    silent = CausalTreeConfig(feature_ids=(B,), contexts=4)
    bench = TreeBench(planted.model, exact_dictionaries(), HOOKS[0], planted.scores)
    result = CausalTree().run(bench, Identity(torch.eye(D)), silent)
    assert {score.status for score in result.scores} == {"undefined"} and result.tables["causal_edges"] == []


def test_contexts_below_the_level_are_counted(planted):
    """Few windows come near the maximum: asked for that level, the others are weak."""
    child = 7
    peaks = feature_codes(Identity(torch.eye(D)), planted.scores[HOOKS[2]], [child])[:, :-1, 0].max(1).values
    counted = []
    for level in (0.1, 0.9, 1.0):
        config = CausalTreeConfig(feature_ids=(child,), contexts=8, tested=2, checked=0, depth=1, level=level)
        result = CausalTree().run(planted, planted.dictionary("exact"), config)
        (row,) = [row for row in result.tables["causal_nodes"] if row["hook_point"] == HOOKS[2]]
        strong, drawn = int((peaks >= level * peaks.max()).sum()), min(8, int((peaks > 0).sum()))
        assert row["contexts"] == drawn and row["weak"] == max(0, drawn - strong)
        assert value(result, "weak") == row["weak"] / drawn
        counted.append(row["weak"])
    assert counted[0] == 0 < counted[1] <= counted[2] < drawn


def test_nodes_are_explained_and_a_failed_call_is_a_failed_score(planted):
    config = CausalTreeConfig(feature_ids=(B,), contexts=8, tested=6, checked=20, explain=True, fragments=2, fragment=4)
    bench = TreeBench(planted.model, exact_dictionaries(), HOOKS[2], planted.scores)
    bench.judge = ScriptedJudge(explain=["the end", None, "a trigger"])
    result = CausalTree().run(bench, Identity(torch.eye(D)), config)
    said = {(row["hook_point"], row["feature"]): row["explanation"] for row in result.tables["causal_nodes"]}
    assert said == {(HOOKS[2], B): "the end", (HOOKS[1], A): None, (HOOKS[0], Z): "a trigger"}
    assert [score.status for score in result.scores if score.metric == "explained"] == ["ok", "failed", "ok"]
    errors = {(row["hook_point"], row["feature"]): row["explanation_error"] for row in result.tables["causal_nodes"]}
    assert errors == {(HOOKS[2], B): None, (HOOKS[1], A): "scripted failure", (HOOKS[0], Z): None}
    trigger = planted.model.token_strings([TRIGGER])[0]
    for task in bench.judge.explained:
        assert len(task.examples) == 2
        for tokens, activations in task.examples:
            assert len(tokens) == len(activations) == 4 and tokens[int(np.argmax(activations))] == trigger
    assert CausalTree().asks(config) and not CausalTree().asks(CausalTreeConfig())
    assert CausalTree().cost(config).calls >= 3 and CausalTree().cost(CausalTreeConfig()).calls == 0


def ablations_of(bench, contexts, child=4):
    dictionaries = bench.dictionaries
    score = bench.scores[HOOKS[1]]
    return Ablations(bench.model, HOOKS[1], HOOKS[2], dictionaries[HOOKS[1]], dictionaries[HOOKS[2]], child, score, contexts)


@pytest.fixture
def case(random):
    codes = random.dictionaries[HOOKS[2]].encode(random.scores[HOOKS[2]].x)  # (N, T, F)
    child = int((codes[:, 3:] > 0).sum((0, 1)).argmax())
    places = [(w, t) for w, t in (codes[..., child] > 0).nonzero().tolist() if t >= 3][:6]
    return ablations_of(random, [Context(*place) for place in places], child), places, child


def test_shares_are_those_of_whole_runs_one_at_a_time(random, case):
    ablations, places, child = case
    with Exact():
        features = ablations.active.any(0).nonzero()[:, 0].tolist()[:12]
        shares = ablations.shares(features)
        parents, children = (random.dictionaries[h] for h in HOOKS[1:])
        score, checked = random.scores[HOOKS[1]], 0
        for k, feature in enumerate(features):
            for c, (window, position) in enumerate(places):
                tokens = score.tokens[window][None, : position + 1]
                kept = score.keep[window, : position + 1]
                found = {}

                def without(value, hook, feature=feature, kept=kept):
                    codes = parents.encode(value.float())[..., feature] * kept
                    return value - codes[..., None] * parents.directions[feature]

                def leave(value, hook, found=found):
                    found["y"] = value[:, -1].clone()

                random.model.run(tokens, [(HOOKS[1], without), (HOOKS[2], leave)], use_cache=False)
                after = float(children.encode(found["y"].float())[0, child])
                assert shares[k, c] == pytest.approx(1 - after / float(ablations.before[c]), abs=2e-5)
                checked += shares[k, c] != 0
        assert checked > 10


class Double(TopK):
    """A TopK autoencoder in float64."""

    def __init__(self, tensors, k):
        super().__init__(tensors, k)
        self._tensors = {name: tensor.double() for name, tensor in self._tensors.items()}
        self.W_enc, self.W_dec, self.b_dec = (self._tensors[name] for name in ("W_enc", "W_dec", "b_dec"))
        self._directions = self.W_dec

    def _input(self, x):
        return x.double()


def test_batched_ablations_are_those_one_at_a_time_in_float64(random):
    """No step casts to float32: batches of many contexts and features give what one whole run of each gives, to 1e-9."""
    model, dictionaries = random.model, {}
    for place, hook in enumerate(HOOKS):
        dictionaries[hook] = Double(small_topk(seed=place).tensors(), k=3)
    with Exact():
        tokens = random.scores[HOOKS[0]].tokens
        kept = {}  # what is captured for a suite is in float32
        for h in HOOKS:
            model.run(tokens, [(h, lambda value, hook, h=h: kept.update({h: value.clone()}))], use_cache=False)
        scores = {h: random.scores[h]._replace(x=kept[h]) for h in HOOKS}
        bench = TreeBench(model, dictionaries, HOOKS[2], scores)
        codes = dictionaries[HOOKS[2]].encode(scores[HOOKS[2]].x)
        child = int((codes[:, 3:] > 0).sum((0, 1)).argmax())
        places = [(w, t) for w, t in (codes[..., child] > 0).nonzero().tolist() if t >= 3][:5]
        ablations = ablations_of(bench, [Context(*place) for place in places], child)
        assert ablations.x.dtype == ablations.codes[0].values.dtype == torch.float64
        features = ablations.active.any(0).nonzero()[:, 0].tolist()[:12]
        shares, parents, compared = ablations.shares(features), dictionaries[HOOKS[1]], 0
        for k, feature in enumerate(features):
            for c, (window, position) in enumerate(places):
                kept, found = scores[HOOKS[1]].keep[window, : position + 1], {}

                def without(value, hook, feature=feature, kept=kept):
                    return value - (parents.encode(value)[..., feature] * kept)[..., None] * parents.directions[feature]

                def leave(value, hook, found=found):
                    found["y"] = value[:, -1].clone()

                random.model.run(tokens[window][None, : position + 1], [(HOOKS[1], without), (HOOKS[2], leave)], use_cache=False)
                after = float(dictionaries[HOOKS[2]].encode(found["y"])[0, child])
                assert shares[k, c] == pytest.approx(1 - after / float(ablations.before[c]), abs=1e-9)
                compared += shares[k, c] != 0
    assert compared > 10


def test_codes_of_active_features_alone_are_held(random, case):
    """Whatever the width: the same codes as of the whole dictionary, dense or sparse, looked up for any feature."""
    ablations, places, _ = case
    score = random.scores[HOOKS[1]]
    for dictionary in (random.dictionaries[HOOKS[1]], Identity(torch.eye(D))):
        for c, (window, position) in enumerate(places):
            keep = score.keep[window] & (torch.arange(T) <= position)
            held = causal_effects._active(dictionary, score.x[window], keep)
            whole = dictionary.encode(score.x[window]) * keep[:, None]
            assert held.features.tolist() == (whole != 0).any(0).nonzero()[:, 0].tolist()
            assert torch.allclose(held.values.float(), whole[:, held.features], atol=1e-5) and held.values.shape[0] == T
            if dictionary.sparse:
                assert len(held.features) < dictionary.n_features
                every = ablations.codes_of(c, range(dictionary.n_features))
                assert torch.allclose(every, whole[: len(every)].to(every), atol=1e-5)
    silent = causal_effects._active(dictionary, score.x[0], torch.zeros(T, dtype=torch.bool))
    assert len(silent.features) == 0 and silent.values.shape == (T, 0)


def test_what_is_not_active_has_exactly_no_share_and_the_gradient_is_the_slope(random, case):
    ablations, places, _ = case
    active = ablations.active
    silent = (~active.any(0)).nonzero()[:, 0].tolist()[:3]
    assert (ablations.shares(silent) == 0).all()
    assert not ablations.lost(range(len(places)), [torch.zeros(ablations.x.shape[1:])] * len(places)).any()
    # a small part of an ablation takes what the gradient says
    estimates, small = ablations.estimates() / ablations.before.numpy()[:, None], 1e-3
    with Exact():
        for c in range(len(places)):
            for feature in active[c].nonzero()[:, 0].tolist()[:3]:
                lost = ablations.lost([c], [small * ablations.ablation(c, [feature])])[0] / small
                assert lost == pytest.approx(float(estimates[c, feature]), abs=5e-3, rel=5e-2)


def test_carried_is_the_childs_code_without_the_removed_vector(random, case):
    ablations, places, child = case
    parents, children = (random.dictionaries[h] for h in HOOKS[1:])
    features = ablations.active.any(0).nonzero()[:, 0].tolist()[:12]
    carried = ablations.carried(features)
    for c, (window, position) in enumerate(places):
        x, y = (random.scores[h].x[window, position] for h in HOOKS[1:])
        code, before = parents.encode(x), float(children.encode(y)[child])
        for k, feature in enumerate(features):
            after = float(children.encode(y - code[feature] * parents.directions[feature])[child])
            assert carried[k, c] == pytest.approx(1 - after / before, abs=1e-4)
    assert (np.abs(carried) > 0.01).any() and (carried == 0).any()


@pytest.mark.parametrize(("source", "sink"), [(HOOKS[1], "blocks.1.hook_mlp_out"), ("blocks.0.mlp.hook_in", HOOKS[2])])
def test_nothing_is_known_of_what_is_carried_off_the_residual_stream(random, source, sink):
    x = random.model.activations(random.scores[HOOKS[0]].tokens, source)
    score = random.scores[HOOKS[0]]._replace(x=x)
    exact = Identity(torch.eye(D))
    y = random.model.activations(score.tokens[:1], sink)[0]
    child = int(y[4].argmax())
    ablations = Ablations(random.model, source, sink, exact, exact, child, score, [Context(0, 4)])
    assert len(ablations.x) == 1 and np.isnan(ablations.carried([1, 2])).all()


def test_the_null_is_about_the_strongest_where_it_is_measured(case, monkeypatch):
    ablations, places, _ = case
    ran = []
    lost = ablations.lost
    monkeypatch.setattr(ablations, "lost", lambda rows, changes: (ran.append((list(rows), changes)), lost(rows, changes))[1])
    found = parents_of(ablations, Rule(1000, 0, 1.1, -9.0), np.random.default_rng(0))
    rows, changes = ran[-1]
    assert rows == list(range(len(places)))[OTHERS] and found.parent.random == pytest.approx(float(lost(rows, changes).mean()))
    parent = int(found.features[found.parent.place])
    assert found.cause == found.parent, "all of them are significant"
    for c, change in zip(rows, changes, strict=True):
        assert change.norm(dim=1) == pytest.approx(ablations.ablation(c, [parent]).norm(dim=1), abs=1e-5)


def test_contexts_in_which_the_child_does_not_fire_are_left_out(random, case):
    ablations, places, child = case
    codes = random.dictionaries[HOOKS[2]].encode(random.scores[HOOKS[2]].x)[..., child]
    silent = next((w, t) for w, t in (codes == 0).nonzero().tolist() if t >= 3)
    more = ablations_of(random, [Context(*place) for place in [places[0], silent, *places[1:]]], child)
    assert more.rows.tolist() == [0, *range(2, len(places) + 1)]
    features = ablations.active.any(0).nonzero()[:, 0].tolist()[:8]
    assert more.shares(features) == pytest.approx(ablations.shares(features), abs=1e-5)
    whole = torch.from_numpy(ablations.estimates())
    assert torch.allclose(torch.from_numpy(more.estimates()), whole, atol=1e-5)
    none = ablations_of(random, [Context(*silent)], child)
    assert len(none.rows) == len(none.codes) == len(none.before) == 0


def test_parents_that_are_not_followed_are_named(random, case, monkeypatch):
    _, _, child = case
    monkeypatch.setattr(causal_effects, "corrected", lambda p, tests: np.zeros(len(p)))  # so that there are several
    config = CausalTreeConfig(feature_ids=(child,), least_share=0.0, branching=1, depth=1, contexts=8)
    result = CausalTree().run(random, random.dictionary("exact"), config)
    parents = [row["parent"] for row in result.tables["causal_edges"] if row["significant"]][:5]
    named = {row["feature"]: row for row in result.tables["causal_nodes"] if row["hook_point"] == HOOKS[1]}
    assert len(parents) > 1 and set(named) == set(parents)
    assert all(json.loads(row["tokens"]) and "contexts" not in row for row in named.values())


def test_what_the_gradient_leaves_out_is_told(case):
    ablations, _, _ = case
    whole = parents_of(ablations, Rule(1000, 10, 1.0, -1.0), np.random.default_rng(0))
    assert not whole.checked.any() and len(whole.features) == whole.candidates
    part = parents_of(ablations, Rule(2, 5, 1.0, -1.0), np.random.default_rng(0))
    assert (~part.checked).sum() == 2 and part.checked.sum() == 5 and len(set(part.features.tolist())) == 7
    assert part.drawn.sum() == 3 and not (part.drawn & ~part.checked).any()
    size = dict(zip(whole.features.tolist(), np.abs(whole.estimates).tolist(), strict=True))
    left = sorted(set(size) - set(part.features[~part.checked].tolist()), key=lambda feature: -size[feature])
    assert set(part.features[part.checked & ~part.drawn].tolist()) == set(left[:2])
    exact = dict(zip(whole.features.tolist(), whole.shares.mean(1).tolist(), strict=True))
    for feature, share in zip(part.features.tolist(), part.shares.mean(1).tolist(), strict=True):
        assert share == pytest.approx(exact[feature], abs=1e-5)
    assert (np.diff(part.shares.mean(1)) <= 0).all()


def test_candidates_are_active_in_enough_contexts(case):
    """Fewer tests, chosen by activity alone; what is active more seldom still counts in the sum of all loss."""
    ablations, _, _ = case
    count = ablations.active.sum(0).numpy()
    every, some = (parents_of(ablations, Rule(1000, 0, 0.05, 0.0, least), np.random.default_rng(0)) for least in (1, 3))
    assert set(every.features.tolist()) == set(np.flatnonzero(count).tolist()) and every.candidates == every.present
    assert set(some.features.tolist()) == set(np.flatnonzero(count >= 3).tolist())
    assert some.candidates == len(some.features) < some.present == every.present
    assert (some.active >= 3).all() and some.rest > every.rest == 0
    none = parents_of(ablations, Rule(1000, 4, 0.05, 0.0, 7), np.random.default_rng(0))
    assert len(none.features) == none.candidates == 0 and none.cause is none.parent is none.together is None and none.rest > 0


def test_levels_and_settings(planted):
    config = CausalTreeConfig(depth=1)
    assert CausalTree().reaches(config, HOOKS[2], HOOKS) == [HOOKS[1]]
    assert CausalTree().reaches(CausalTreeConfig(), HOOKS[2], HOOKS) == [HOOKS[1], HOOKS[0]]
    assert CausalTree().reaches(config, HOOKS[0], HOOKS) == []
    with pytest.raises(SuiteError, match="not known what comes before"):
        CausalTree().reaches(config, "hook_embed", ["hook_embed", HOOKS[0]])
    for wrong in ({"branching": 0}, {"level": 1.5}, {"contexts": 2}, {"least_active": 17}):
        with pytest.raises(ValueError):
            CausalTreeConfig(**wrong)
