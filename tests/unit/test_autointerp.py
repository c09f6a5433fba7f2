"""Explain-and-simulate on planted features, where the right score is known."""

import numpy as np
import pytest
import torch

from evalkit.activations.capture import Activations
from evalkit.activations.fragments import fragment_lists
from evalkit.dictionaries.controls import Identity
from evalkit.errors import BudgetReached, UnitFailed
from evalkit.evaluations.autointerp.evaluation import Autointerp, AutointerpConfig
from evalkit.evaluations.autointerp.fragments import PEAKS, donors, eligible_features, sample
from evalkit.evaluations.autointerp.scores import adjusted, partial, template_share
from evalkit.judges.base import Explanation, Simulation
from evalkit.judges.lexical import LexicalJudge
from evalkit.judges.prompts.explanation import explain_prompt
from evalkit.judges.scripted import ScriptedJudge
from evalkit.util.progress import Progress

N, T, D = 120, 20, 4
CONFIG = AutointerpConfig(features=4, fragments=3, fragment=8)


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
    null, above = values(result, "shuffled"), values(result, "above_null")
    assert set(null) == set(above) == set(range(4))
    assert all(score.value < 0.2 for score in null.values())
    assert all(score.value == pytest.approx(1 - null[item].value) for item, score in above.items())


def test_a_constant_prediction_predicts_nothing_and_is_counted(planted):
    result = run(planted, ScriptedJudge(simulate=lambda task: [5.0] * len(task.tokens)))
    assert {(s.status, s.value) for s in values(result, "top_and_random").values()} == {("ok", 0.0)}
    (constant,) = values(result, "constant").values()
    assert (constant.value, constant.n) == (1.0, 4)
    (constant,) = values(run(planted, ScriptedJudge()), "constant").values()
    assert constant.value == 0.0


def test_a_constant_activation_has_no_correlation(planted):
    dense = planted._replace(x=torch.ones(N, T, D))
    result = run(dense, ScriptedJudge())
    assert {(s.status, s.value) for s in values(result, "top_and_random").values()} == {("undefined", None)}


def test_a_judge_that_knows_tokens_and_no_features_has_nothing_above_its_null(planted):
    """It predicts 10 for every token that any feature fires on, whatever the explanation says."""
    judge = ScriptedJudge(simulate=lambda task: [10.0 * (word in ("w0", "w1", "w2", "w3")) for word in task.tokens])
    result = run(planted, judge)
    assert all(score.value > 0.3 for score in values(result, "top_and_random").values())
    assert all(score.value == 0.0 for score in values(result, "above_null").values())
    assert all(score.value == pytest.approx(0.0, abs=1e-6) for score in values(result, "specific").values())


def test_the_null_can_have_fewer_fragments_and_is_paired_with_the_same(planted):
    judge = ScriptedJudge()
    result = run(planted, judge, AutointerpConfig(features=4, fragments=3, fragment=8, null_fragments=1))
    assert len(judge.simulated) == 4 * (6 + 2)
    rows = [row for row in result.tables["predictions"] if row["explained_by"] == "shuffled"]
    assert [row["part"] for row in rows] == ["top", "random"] * 4
    null = values(result, "shuffled")
    assert all(score.value == pytest.approx(1 - null[item].value) for item, score in values(result, "above_null").items())


def test_without_a_null_nothing_is_asked_for_it(planted):
    judge = ScriptedJudge()
    result = run(planted, judge, AutointerpConfig(features=4, fragments=3, fragment=8, null_features=0))
    assert len(judge.simulated) == 4 * 6
    assert values(result, "shuffled") == values(result, "above_null") == {}


def test_partial_correlation_against_residuals_of_least_squares():
    rng = np.random.default_rng(0)
    prior = rng.normal(size=200)
    actual, predicted = prior + rng.normal(size=200), 0.5 * prior + rng.normal(size=200)
    design = np.stack([prior, np.ones(200)], axis=1)
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (actual, predicted)]
    assert partial(actual, predicted, prior) == pytest.approx(np.corrcoef(*left)[0, 1])
    assert partial(actual, prior, prior) == 0.0
    assert partial(actual, predicted, np.ones(200)) == pytest.approx(np.corrcoef(actual, predicted)[0, 1])
    assert partial(prior, predicted, prior) is None


def test_the_control_variate_moves_the_mean_to_that_of_all_features():
    """r = 2 x + 0.1 exactly: the regression estimator of its mean over all is 2 X + 0.1, without any spread."""
    listed = {f: 0.01 * f for f in range(40)}
    own = {f: 2 * listed[f] + 0.1 for f in range(15)}
    found = [score.value for score in adjusted(own, listed, 0)]
    assert found == pytest.approx([2 * 0.195 + 0.1] * 15)
    assert adjusted({f: own[f] for f in range(11)}, listed, 0) == []


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
    found = eligible_features(lists, 3, planted.document.tolist()).features
    assert len(found) == D
    for c in found:
        windows = [f.window for f in (*c.explain, *c.top, *c.random)]
        assert len(windows) == 9
        assert len(set(windows)) == 9


def some_lists(activations, entries=24):
    return fragment_lists(
        Identity(torch.eye(D)), activations, length=8, top=entries, random=entries, seed=0, progress=Progress(quiet=True)
    )


def test_explained_and_scored_fragments_share_no_document(planted):
    """Ten windows a document: without the rule nearly every feature is scored in a document it is explained from."""
    lists = some_lists(planted)
    document = (torch.arange(N) // 10).tolist()

    def documents(fragments):
        return {document[fragment.window] for fragment in fragments}

    found = eligible_features(lists, 3, document).features
    assert found
    for c in found:
        assert not documents(c.explain) & documents((*c.top, *c.random))
        assert len({f.window for f in (*c.explain, *c.top, *c.random)}) == 9
    loose = eligible_features(lists, 3, document, same_document=True).features
    assert any(documents(c.explain) & documents((*c.top, *c.random)) for c in loose)
    of_one = eligible_features(lists, 3, [0] * N)
    assert (of_one.features, of_one.of_one_document) == ([], D)


def test_a_text_of_one_document_says_what_to_do(planted):
    one = planted._replace(document=torch.zeros(N, dtype=torch.int64))
    with pytest.raises(UnitFailed, match="of different documents") as caught:
        run(one, ScriptedJudge())
    assert "same_document" in caught.value.fix
    config = AutointerpConfig(features=4, fragments=3, fragment=8, same_document=True)
    assert len(values(run(one, ScriptedJudge(), config), "top_and_random")) == 4


def test_features_are_drawn_not_the_first_ones(planted):
    found = eligible_features(some_lists(planted), 3, planted.document.tolist()).features
    draws = {tuple(c.feature for c in sample(found, 2, seed)) for seed in range(20)}
    assert len(draws) > 3


def test_donors_are_others_of_like_density():
    """Of 8 features four fire on every second token and four hardly ever: nobody's null comes from the other four."""
    tokens = torch.randint(12, (N, T))
    rare = torch.stack([(tokens == f).float() * (f + 1) for f in range(4)], dim=-1)
    dense = torch.stack([(tokens % 2 == f % 2).float() * (f + 1) for f in range(4)], dim=-1)
    x = torch.cat([rare[..., :2], dense[..., :2], rare[..., 2:], dense[..., 2:]], dim=-1)  # their numbers mix
    both = Activations(x, torch.ones(N, T, dtype=torch.bool), tokens, torch.arange(N), "planted", float("inf"))
    lists = fragment_lists(Identity(torch.eye(8)), both, length=8, top=24, random=24, seed=0, progress=Progress(quiet=True))
    chosen = eligible_features(lists, 3, list(range(N))).features
    found = donors(chosen, lists)
    assert sorted(found) == list(range(8))
    is_rare = [c.feature in (0, 1, 4, 5) for c in chosen]
    for target, donor in enumerate(found):
        assert donor != target
        assert is_rare[donor] == is_rare[target]
    assert donors(chosen[:1], lists) == []


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
        run(planted, ScriptedJudge(), AutointerpConfig(features=1, fragments=100, fragment=8))


def test_a_spent_budget_is_not_swallowed(planted):
    with pytest.raises(BudgetReached):
        run(planted, ScriptedJudge(explain=lambda task: BudgetReached("the budget is spent")))


def test_the_estimate_is_an_upper_bound_on_calls(planted):
    judge = ScriptedJudge()
    run(planted, judge)
    assert len(judge.explained) + len(judge.simulated) <= Autointerp().cost(CONFIG).calls


def test_settings_are_checked():
    with pytest.raises(ValueError, match="null_fragments"):
        AutointerpConfig(fragments=2, null_fragments=3)


def test_a_reference_without_a_model_is_asked_about_every_feature(planted):
    config = AutointerpConfig(features=2, fragments=3, fragment=8)
    judge = ScriptedJudge()
    result = run(planted, judge, config, references={"lexical": LexicalJudge()})
    assert len(values(result, "top_and_random")) == 2
    assert set(values(result, "lexical")) == set(values(result, "lexical_shuffled")) == set(range(D))
    assert all(score.value == pytest.approx(1.0) for score in values(result, "lexical").values())
    assert all(score.value == pytest.approx(0.0) for score in values(result, "over_lexical").values())
    listed = {row["feature"] for row in result.tables["predictions"] if row["judge"] == "word list"}
    assert listed == set(values(result, "top_and_random"))


def test_the_explainer_sees_texts_without_the_feature(planted):
    judge = ScriptedJudge()
    run(planted, judge)
    assert any(task.silent for task in judge.explained)
    for task, feature in zip(judge.explained, range(D), strict=True):
        for example in task.silent:
            assert f"w{feature}" not in example.tokens


def test_the_median_probability_of_digits_is_a_score(planted):
    class Half(ScriptedJudge):
        """Puts 0.25 on the digits of every token but the first."""

        def simulate(self, tasks, done=lambda n: None):
            found = super().simulate(tasks, done)
            return [Simulation(each.expected, [0.9] + [0.25] * (len(each.expected) - 1)) for each in found]

    (mass,) = values(run(planted, Half()), "digit_mass").values()
    assert mass.value == 0.25
    (unknown,) = values(run(planted, ScriptedJudge()), "digit_mass").values()
    assert unknown.status == "undefined"


def test_the_explainer_sees_more_peaks_than_are_scored_and_from_other_documents(planted):
    judge, lexical = ScriptedJudge(), ScriptedJudge(name="lexical")
    lexical.asks_no_model = True  # type: ignore[misc]
    grouped = planted._replace(document=torch.arange(N) // 2)
    run(grouped, judge, references={"lexical": lexical})
    for task, feature in zip(judge.explained, range(D), strict=True):
        assert (len(task.examples), len(task.further)) == (3, PEAKS - 3)
        shown = explain_prompt(task).rsplit("Active tokens: ", 1)[1].splitlines()[0]
        assert shown == ", ".join([f"w{feature}"] * PEAKS)
    assert all(task.further == [] for task in lexical.explained)
    for c in eligible_features(some_lists(grouped), 3, grouped.document.tolist()).features:
        scored = {int(grouped.document[fragment.window]) for fragment in (*c.top, *c.random)}
        assert not scored & {int(grouped.document[fragment.window]) for fragment in (*c.explain, *c.further)}
        windows = [fragment.window for fragment in (*c.explain, *c.further, *c.top, *c.random)]
        assert len(set(windows)) == len(windows) == PEAKS + 6


def test_features_of_one_document_are_left_out_and_counted(planted):
    """Feature 0 is active in the windows of one long document alone, the others most strongly in windows of other ones."""
    planted.x[N // 2 :, :, 0] = 0.0
    planted.x[N // 2 :] *= 2.0
    one = planted._replace(document=torch.cat([torch.zeros(N // 2, dtype=torch.int64), torch.arange(1, N // 2 + 1)]))
    result = run(one, ScriptedJudge())
    (left,) = values(result, "one_document").values()
    assert (left.value, left.n) == (0.25, 4)
    assert set(values(result, "top_and_random")) == {1, 2, 3}
    (none,) = values(run(planted, ScriptedJudge()), "one_document").values()
    assert none.value == 0.0


def test_explanations_in_the_form_of_an_example_are_counted():
    words = ['the word "tax"', "The word for it", "Commas between numbers", "laws about trade", None]
    found = template_share([Explanation(text, status="ok" if text else "failed") for text in words])
    assert (found.value, found.n) == (0.75, 4)


def test_a_word_list_is_asked_about_no_more_than_a_sample_that_holds_the_judged_features(planted, monkeypatch):
    monkeypatch.setattr("evalkit.evaluations.autointerp.evaluation.MOST_LISTED", 3)
    result = run(
        planted, ScriptedJudge(), AutointerpConfig(features=2, fragments=3, fragment=8), references={"lexical": LexicalJudge()}
    )
    assert len(values(result, "lexical")) == 3
    assert set(values(result, "top_and_random")) == set(values(result, "over_lexical")) < set(values(result, "lexical"))
