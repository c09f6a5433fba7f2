"""Explain-and-simulate on planted features, where the right score is known."""

import numpy as np
import pytest
import torch

from evalkit.activations.capture import Activations
from evalkit.activations.fragments import fragment_lists
from evalkit.dictionaries.controls import Identity
from evalkit.errors import BudgetReached, UnitFailed
from evalkit.evaluations.autointerp import Autointerp, AutointerpConfig, choose
from evalkit.judges.scripted import ScriptedJudge
from evalkit.progress import Progress

N, T, D = 120, 20, 4
CONFIG = AutointerpConfig(features=4, fragments=3, fragment=8, null_features=2)


class Words:
    """Stands in for the language model: token i is the word 'w<i>'."""

    def token_strings(self, ids):
        return [f"w{int(i)}" for i in ids]


class FakeBench:
    def __init__(self, activations, judge, references=None):
        self.model, self.hook_point, self.judge, self.references = Words(), "planted", judge, references or {}
        self.seed, self.progress, self._activations = 0, Progress(quiet=True), activations

    def fit(self):
        return self._activations

    def score(self):
        return self._activations


@pytest.fixture
def planted():
    """Feature f fires with strength 1 on token f and nowhere else; there are 12 tokens."""
    tokens = torch.randint(12, (N, T))
    x = torch.stack([(tokens == f).float() for f in range(D)], dim=-1)
    keep = torch.ones(N, T, dtype=torch.bool)
    keep[:, :2] = False
    return Activations(x, keep, tokens, torch.arange(N), "planted", float("inf"))


def run(planted, judge, config=CONFIG, **more):
    return Autointerp().run(FakeBench(planted, judge, **more), Identity(torch.eye(D)), config)


def values(result, metric):
    return {s.item: s for s in result.scores if s.metric == metric}


def test_a_judge_that_knows_scores_one_and_the_shuffled_null_scores_none_of_it(planted):
    result = run(planted, ScriptedJudge())
    assert len(values(result, "top_and_random")) == 4
    for metric in ("top_and_random", "top", "random"):
        for score in values(result, metric).values():
            assert score.status == "ok"
            assert score.value == pytest.approx(1.0)
    null = values(result, "shuffled")
    assert len(null) == 2
    assert all(score.value < 0.2 for score in null.values() if score.status == "ok")


def test_a_constant_judge_has_no_score(planted):
    result = run(planted, ScriptedJudge(simulate=lambda task: [5.0] * len(task.tokens)))
    assert {s.status for s in values(result, "top_and_random").values()} == {"undefined"}
    assert {s.value for s in values(result, "top_and_random").values()} == {None}


def test_a_random_judge_scores_about_zero(planted):
    rng = np.random.default_rng(0)
    result = run(planted, ScriptedJudge(simulate=lambda task: rng.random(len(task.tokens)).tolist()))
    assert abs(np.mean([s.value for s in values(result, "top_and_random").values()])) < 0.25


def test_one_failed_call_is_a_missing_value_not_a_zero(planted):
    calls = iter(range(1000))
    judge = ScriptedJudge(simulate=lambda task: None if next(calls) == 0 else [float(task.tokens[0] == t) for t in task.tokens])
    result = run(planted, judge)
    statuses = [s.status for s in values(result, "top_and_random").values()]
    assert statuses.count("failed") == 1
    failed = next(s for s in values(result, "top_and_random").values() if s.status == "failed")
    assert failed.value is None
    rows = [r for r in result.tables["predictions"] if r["status"] == "failed"]
    assert len(rows) == 1
    assert rows[0]["predicted"] is None


def test_tokens_without_a_value_are_left_out_and_counted(planted):
    """A judge that is wrong about one word, and one that says nothing about it: the second is right about all others."""

    def judge(about_w7):
        def levels(task):
            return [about_w7 if word == "w7" else 10.0 * (f"'{word}'" in task.explanation) for word in task.tokens]

        return ScriptedJudge(simulate=levels)

    right, wrong, silent = run(planted, ScriptedJudge()), run(planted, judge(7.0)), run(planted, judge(None))
    assert all(score.value == pytest.approx(1.0) for score in values(silent, "top_and_random").values())
    assert all(score.value < 0.99 for score in values(wrong, "top_and_random").values())
    whole = values(right, "top_and_random")
    for item, score in values(silent, "top_and_random").items():
        rows = [r for r in silent.tables["predictions"] if r["feature"] == item and r["explained_by"] == "own"]
        pairs = [pair for row in rows for pair in zip(row["actual"], row["predicted"], strict=True) if pair[0] is not None]
        lost = sum(predicted is None for _, predicted in pairs)
        assert 0 < lost == whole[item].n - score.n
        assert values(silent, "missing")[item].value == pytest.approx(lost / len(pairs))
    assert values(wrong, "missing") == {}


def test_a_failed_explanation_fails_its_feature_and_asks_no_simulation(planted):
    answers = iter([None, "the token 'w1'", "the token 'w2'", "the token 'w3'"])
    judge = ScriptedJudge(explain=lambda task: next(answers))
    result = run(planted, judge)
    assert [s.status for s in values(result, "top_and_random").values()] == ["failed", "ok", "ok", "ok"]
    assert all(task.explanation for task in judge.simulated)
    assert [row["status"] for row in result.tables["explanations"]] == ["failed", "ok", "ok", "ok"]


def test_cut_explanations_are_scored_and_counted(planted):
    class Ending(ScriptedJudge):
        """Says how its explanations ended."""

        def explain(self, tasks, done=lambda n: None):
            ends = iter([True, False, None, False])
            return [said._replace(cut=next(ends)) for said in super().explain(tasks, done)]

    (cut,) = values(run(planted, Ending()), "cut").values()
    assert (cut.value, cut.n, cut.status) == (pytest.approx(1 / 3), 3, "ok")
    (unknown,) = values(run(planted, ScriptedJudge()), "cut").values()
    assert (unknown.value, unknown.n, unknown.status) == (None, 0, "undefined")


def test_explained_and_scored_fragments_share_no_window(planted):
    lists = fragment_lists(Identity(torch.eye(D)), planted, length=8, top=12, random=12, seed=0, progress=Progress(quiet=True))
    chosen, eligible = choose(lists, CONFIG, seed=0)
    assert eligible == D
    for c in chosen:
        windows = [f.window for f in (*c.explain, *c.top, *c.random)]
        assert len(windows) == 9
        assert len(set(windows)) == 9


def test_features_are_drawn_not_the_first_ones(planted):
    lists = fragment_lists(Identity(torch.eye(D)), planted, length=8, top=12, random=12, seed=0, progress=Progress(quiet=True))
    config = AutointerpConfig(features=2, fragments=3, fragment=8, null_features=0)
    draws = {tuple(c.feature for c in choose(lists, config, seed)[0]) for seed in range(20)}
    assert len(draws) > 3


def test_positions_left_out_by_the_rule_never_enter_a_score(planted):
    planted.x[:, 5, :] = 100.0  # a massive activation at one position of every window
    planted.keep[:, 5] = False
    result = run(planted, ScriptedJudge())
    for score in values(result, "top_and_random").values():
        assert score.value == pytest.approx(1.0)
    assert all(100.0 not in row["actual"] for row in result.tables["predictions"])


def test_signed_codes_stay_signed(planted):
    signed = planted._replace(x=planted.x - 2 * (planted.tokens == 11).float()[..., None])
    result = run(signed, ScriptedJudge())
    lowest = min(v for row in result.tables["predictions"] for v in row["actual"] if v is not None)
    assert lowest == -2.0


def test_a_reference_judge_stands_beside_the_first(planted):
    result = run(planted, ScriptedJudge(simulate=lambda t: None), references={"lexical": ScriptedJudge(name="lexical")})
    assert all(s.status == "failed" for s in values(result, "top_and_random").values())
    assert all(s.value == pytest.approx(1.0) for s in values(result, "lexical").values())
    assert {row["judge"] for row in result.tables["explanations"]} == {"scripted", "lexical"}


def test_no_eligible_feature_is_said(planted):
    with pytest.raises(UnitFailed, match="no feature is active in 400 windows"):
        run(planted, ScriptedJudge(), AutointerpConfig(features=1, fragments=100, fragment=8, null_features=0))


def test_a_spent_budget_is_not_swallowed(planted):
    with pytest.raises(BudgetReached):
        run(planted, ScriptedJudge(explain=lambda task: BudgetReached("the budget is spent")))


def test_the_estimate_is_an_upper_bound_on_calls(planted):
    judge = ScriptedJudge()
    run(planted, judge)
    assert len(judge.explained) + len(judge.simulated) <= Autointerp().cost(CONFIG).calls


def test_settings_are_checked():
    with pytest.raises(ValueError, match="null_features"):
        AutointerpConfig(features=2, null_features=3)
