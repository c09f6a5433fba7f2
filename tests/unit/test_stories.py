"""Stories of features: the stated criterion, the ranking, and a picture of what the rows say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from evalkit.cli import main
from evalkit.errors import UsageError
from evalkit.evaluations.criterion import StoriesConfig
from evalkit.report.case_studies.criteria import _judged, _next, _share_of, chosen, stories
from evalkit.report.case_studies.text import stories_table
from evalkit.report.contexts import visible
from evalkit.report.draw import draw, draw_stories
from evalkit.report.selection import first_of
from evalkit.report.selection import of_feature as of_story
from evalkit.report.views.ablation import moved
from evalkit.store.journal import Journal
from evalkit.store.reader import open_results
from evalkit.store.writer import rebuild

HOOK = "blocks.4.hook_resid_post"
GOOD, WEAK, BROAD = 3, 5, 8
INPUTS = {GOOD: (0.9, 0.1), WEAK: (0.8, 0.1), BROAD: (0.3, 0.2)}
"""Share of the main class and its null."""
EFFECT = {GOOD: (0.7, 0.4, 0.2, 0.1), WEAK: (0.7, 0.4, 0.05, 0.1), BROAD: (0.9, 0.4, 0.2, 0.1)}
"""What repeats, its null, KL, its null: the weak feature does less than a random direction."""
RANKS = {GOOD: (1.0, 1.0), WEAK: (1.0, 0.5), BROAD: (1.0, 1.0)}
"""Share of the random directions below it: in what repeats, in KL."""
NEXT = [-0.5, -0.6, -0.4, -0.5] * 2
"""Six contexts are the least that have an interval."""


def scores(values, metrics):
    return [
        {"metric": metric, "item": feature, "value": value, "kind": "feature", "weight": 1.0, "cluster": None, "n": 4, "seed": 0,
         "status": "ok"}
        for feature, row in values.items()
        for metric, value in zip(metrics, row, strict=True)
    ]  # fmt: skip


def unit(key, evaluation, config="{}"):
    return {
        "unit_key": key, "evaluation": evaluation, "evaluation_version": 1, "dictionary": "SAE", "dictionary_id": "id",
        "hook_point": HOOK, "seed": 0, "judge": None, "config": config, "status": "done", "error": None, "seconds": 1.0,
        "at": "2026-03-01T12:00:01",
    }  # fmt: skip


def bins(feature):
    for of, neuron, share in (("feature", None, 1.0), ("neuron", 7, 0.5)):
        for number in range(10):
            yield {
                "feature": feature, "of": of, "neuron": neuron, "sign": 1, "scale": "range", "bin": number, "low": float(number),
                "high": number + 1.0, "n": 0 if number == 8 else 20 - number, "tokens": [["'", share], [" $x$", 1 - share]],
                "main_class": "'", "main_share": None if number == 8 else share, "top_class": "'", "top_share": share,
                "contexts": [],
            }  # fmt: skip
        context = {"window": 2, "position": 5, "value": 9.5, "tokens": [" up", " to", " Dave", "'", "s"], "at": 3}
        yield {
            "feature": feature, "of": of, "neuron": neuron, "sign": 1, "scale": "top", "bin": 0, "low": 9.5, "high": 9.5, "n": 1,
            "tokens": [["'", 1.0]], "main_class": "'", "main_share": 1.0, "top_class": "'", "top_share": 1.0,
            "contexts": [context],
        }  # fmt: skip


def effects(feature):
    # the second is lowered in probability and raised in its mean logarithm: it belongs to neither side of the picture
    for side, place, token, change, mass in (("lowered", 1, "s", -2.0, -0.3), ("lowered", 2, " up", 0.2, -0.1),
                                             ("raised", 1, " the", 0.4, 0.2)):  # fmt: skip
        yield {
            "feature": feature, "edit": "ablate", "ranked_by": "mass", "side": side, "place": place, "token_id": len(token),
            "token": token, "change": change, "low": change - 0.1, "high": change + 0.1, "mass": mass, "direct": change,
            "probability": 0.5, "contexts": 8,
        }  # fmt: skip


def contexts(feature):
    for window, change in enumerate(NEXT):
        yield {
            "feature": feature, "edit": "ablate", "window": window, "position": 5, "code": 3.0, "edited": 1, "kl": 0.2,
            "tokens": ["'"], "next_token": "s", "next_change": change, "lowered": "s", "lowered_change": change,
        }  # fmt: skip


def edge(depth, child, parent, share, significant=True, checked=False):
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (4, 2, 0)]
    ends = {"child_hook": hooks[depth - 1], "child": child, "parent_hook": hooks[depth], "parent": parent}
    shares = {"share": share, "low": share - 0.1, "high": share + 0.1, "estimate": share, "p": 0.001, "p_holm": 0.01}
    counts = {"place": 1, "significant": significant, "checked": checked, "carried": 0.2, "active": 8, "contexts": 8}
    return {"target": GOOD, "depth": depth, **ends, **shares, **counts}


EDGES = [edge(1, GOOD, 11, 0.6), edge(1, GOOD, 12, 0.1, significant=False), edge(2, 11, 21, 0.3), edge(2, 12, 22, 0.9)]
EDGES.append(edge(1, GOOD, 13, 0.5, checked=True))  # significant, and drawn to check the gradient: no parent


def with_trees(folder):
    journal = written(folder)
    rows = scores(
        {GOOD: (1.0, 0.6, 0.1, 0.2, 0.6), WEAK: (0.0, 0.02, 0.01, 0.0, 0.02)},
        ["parents", "parent_share", "parent_share_random", "parent_carried", "cause_share"],
    )
    nodes = [
        {"hook_point": f"blocks.{layer}.hook_resid_post", "feature": feature, "tokens": json.dumps([[f" t{feature}", 1.0]]),
         "maximum": 3.0, "activation": 2.0, "contexts": 8, "candidates": 9, "tested": 4, "checked": 2, "missed": 0, "parents": 1,
         "together": 0.6, "random": 0.1, "estimate_r": 0.9}
        for layer, feature in ((4, GOOD), (2, 11), (0, 21))
    ]  # fmt: skip
    journal.write_unit(unit("tree", "causal_tree"), rows, {"causal_edges": EDGES, "causal_nodes": nodes})
    rebuild(folder, folder / "evalkit.duckdb")
    return folder / "evalkit.duckdb"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    written(folder)
    rebuild(folder, folder / "evalkit.duckdb")
    return folder / "evalkit.duckdb"


def written(folder, evaluations=("inputs", "ablation"), ranks=True):
    """The journal of a run without trees."""
    journal = Journal(folder / "runs" / "cases-1")
    state = {
        "suite": "cases",
        "evalkit_version": "0.1.0",
        "packages": "{}",
        "machine": "{}",
        "suite_toml": "",
        "at": "2026-03-01",
    }
    journal.write_rows("runs", [{**state, "status": "started"}])
    input_metrics = ["monosemantic", "monosemantic_random"]
    rows = scores(INPUTS, input_metrics) + scores({f: (0.01,) for f in INPUTS}, ["density"])
    tables = {"input_bins": [row for f in INPUTS for row in bins(f)]}
    journal.write_unit(unit("inputs", "inputs"), rows, tables)
    if "ablation" not in evaluations:
        return journal
    rows = scores(EFFECT, ["repeated", "repeated_random", "kl", "kl_random"])
    rows += scores(RANKS, ["repeated_rank", "kl_rank"]) if ranks else []
    rows += scores({f: (-0.5, 0.6) for f in EFFECT}, ["next_change", "concentration"])
    tables = {
        "logit_effects": [row for f in EFFECT for row in effects(f)],
        "ablation_contexts": [row for f in EFFECT for row in contexts(f)],
    }
    journal.write_unit(unit("ablation", "ablation"), rows, tables)
    return journal


@pytest.fixture
def found(home):
    with open_results(home) as store:
        yield stories(store)


def test_sides_agree_by_the_stated_criterion_and_the_best_comes_first(found):
    rows = found.set_index("feature")
    assert found["feature"].iloc[0] == GOOD
    assert rows["inputs"].to_dict() == {GOOD: True, WEAK: True, BROAD: False}
    assert rows["effect"].to_dict() == {GOOD: True, WEAK: False, BROAD: True}
    assert set(rows["agree"] == 2) == {True, False} and set(rows["sides"]) == {2}
    assert [value is None for value in rows["tree"]] == [True] * 3, "no tree was grown: missing, not a no"
    assert rows["strength"][GOOD] == pytest.approx((0.9 * 0.7) ** 0.5)
    assert rows["lowered"][GOOD] == "'s'"
    # mean -0.5, standard deviation 0.0756, eight contexts, t(7) = 2.365
    assert rows["next_low"][GOOD] == pytest.approx(-0.5 - 2.365 * 0.0756 / 8**0.5, abs=1e-3)
    assert rows["next_high"][GOOD] == pytest.approx(-0.5 + 2.365 * 0.0756 / 8**0.5, abs=1e-3)


def test_a_story_has_to_beat_every_random_direction(found):
    for rank in ("kl_rank", "repeated_rank"):
        below = _judged(found.assign(**{rank: 0.9})).set_index("feature")
        assert not below["effect"].any()


def test_a_run_with_one_random_direction_is_read_as_it_was_measured(tmp_path):
    written(tmp_path, ranks=False)
    rebuild(tmp_path, tmp_path / "evalkit.duckdb")
    with open_results(tmp_path / "evalkit.duckdb") as store:
        rows = stories(store).set_index("feature")
    assert rows["effect"].to_dict() == {GOOD: True, WEAK: False, BROAD: True}


def test_an_effect_on_other_tokens_or_without_a_clear_loss_is_none(tmp_path):
    """The contexts are read at "'", the main class; the next token loses clearly."""
    with open_results(with_trees(tmp_path)) as store:
        frame = stories(store).set_index("feature")
    assert (frame["same"] == 1).all() and frame["carried"][GOOD] == 0.2 and not frame["preferred"].any()
    others = _judged(frame.reset_index().assign(same=0.4)).set_index("feature")
    unclear = _judged(frame.reset_index().assign(next_high=0.01)).set_index("feature")
    close = _judged(frame.reset_index().assign(next_p=0.02))  # of three features: none after Holm's correction
    assert close["effect"].any() and close["next_p_holm"].to_numpy() == pytest.approx(0.06)
    assert "significant for 0 of the 2 that have it" in stories_table(close).replace("\n  ", " ")
    assert frame["effect"][GOOD] and not others["effect"].any() and not unclear["effect"].any()
    assert _share_of("number", ["number", "the"]) == 0.5 and np.isnan(_share_of("the", []))
    assert "were drawn from the quarter" in stories_table(frame.reset_index().assign(preferred=True))
    assert "were drawn from the quarter" not in stories_table(frame.reset_index())


def test_of_two_configurations_the_first_speaks_and_nothing_is_mixed(tmp_path):
    """The good feature is drawn twice; the broad one, which the inputs know too, by the second configuration alone."""
    journal = written(tmp_path, ["inputs"])
    metrics = ["repeated", "repeated_random", "kl", "kl_random", "next_change", "concentration"]
    for key, config, rows, loss in (
        ("one", '{"prefer": "one token"}', {GOOD: (0.7, 0.4, 0.2, 0.1, -0.5, 0.6)}, 0.0),
        ("two", '{"contexts": 6}', {GOOD: (0.0, 0.4, 0.2, 0.1, 3.0, 0.6), BROAD: (0.5, 0.4, 0.2, 0.1, -0.5, 0.6)}, 3.5),
    ):
        tables = {
            "logit_effects": [row for f in rows for row in effects(f)],
            "ablation_contexts": [
                {
                    **row,
                    "window": row["window"] + 10 * (loss > 0),
                    "next_change": row["next_change"] + loss,
                    "tokens": ["'", token],
                }
                for f in rows
                for row, token in zip(contexts(f), [" up" if loss else "'"] * 8, strict=True)
            ],
        }
        journal.write_unit(unit(key, "ablation", config), scores(rows, metrics), tables)
    for key, config, share, edges in (
        ("a", '{"depth": 2}', 0.6, EDGES[:2]),
        ("b", '{"depth": 1}', 0.9, [edge(1, GOOD, 99, 0.9)]),
    ):
        rows = scores({GOOD: (1.0, share, 0.1)}, ["parents", "parent_share", "parent_share_random"])
        journal.write_unit(unit(key, "causal_tree", config), rows, {"causal_edges": edges})
    rebuild(tmp_path, tmp_path / "e.duckdb")
    with open_results(tmp_path / "e.duckdb") as store:
        edges = store.rows("causal_edges", "causal_tree").rename(columns={"target": "feature"})
        frame = stories(store).set_index("feature")
        assert first_of(edges)["parent"].tolist() == [11, 12] and first_of(edges.iloc[:0]).empty
    assert set(frame.index) == {GOOD, BROAD}
    assert frame["preferred"].to_dict() == {GOOD: True, BROAD: False}
    assert frame["repeated"][GOOD] == 0.7 and frame["contexts"].to_dict() == {GOOD: 8, BROAD: 8}
    assert frame["same"].to_dict() == {GOOD: 1, BROAD: 0} and frame["next_high"][GOOD] < 0 < frame["next_low"][BROAD]
    assert frame["lowered"][GOOD] == "'s'" and frame["parent_share"][GOOD] == 0.6
    assert np.isnan(frame["carried"][GOOD]), "of an earlier evalkit"


@pytest.mark.parametrize("contexts", [5, 6])
def test_fewer_than_six_contexts_give_no_interval_and_no_p(contexts):
    rows = {"dictionary": "SAE", "hook_point": "h", "feature": 1, "config": "{}", "edit": "ablate"}
    rows |= {"next_change": np.linspace(-0.5, -0.51, contexts)}
    store = SimpleNamespace(rows=lambda *names: pd.DataFrame(rows))
    (row,) = _next(store, "run").itertuples()
    assert (row.next_low < row.next_high < 0 and row.next_p < 0.01) if contexts == 6 else np.isnan(row.next_low)
    assert contexts == 6 or (np.isnan(row.next_high) and row.next_p == 1)


def test_the_table_says_how_many_were_studied(found):
    text = stories_table(found)
    assert "same tokens" in text and "carried: what goes with" in text
    assert "3 features studied (SAE 3); all sides there are agree for 1 (SAE 1)" in text
    assert "best of so many" in text and "2 of 2" in text
    whole = json.loads(stories_table(found, "json"))
    assert [row["feature"] for row in whole] == found["feature"].tolist() and whole[0]["tree"] is None


def test_a_story_is_chosen_by_name(found):
    assert chosen(found)["feature"] == GOOD
    assert chosen(found, str(BROAD))["feature"] == BROAD
    assert chosen(found, f"SAE:{HOOK}:{WEAK}")["feature"] == WEAK
    with pytest.raises(UsageError, match="no story of a feature '99'"):
        chosen(found, "99")
    twice = found.assign(feature=GOOD)
    with pytest.raises(UsageError, match="3 stories are called '3'"):
        chosen(twice, "3")


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_figure_shows_histogram_effects_and_contexts(home, tmp_path, monkeypatch, suffix):
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (kept.append(self), save(self, *args, **more))[1])
    path = tmp_path / f"story{suffix}"
    with open_results(home) as store:
        draw(store, "stories", path)
    counts, shares, effect, text = kept[0].axes
    assert [patch.get_height() for patch in counts.patches] == [20 - n if n != 8 else 0 for n in range(10)]
    black, dashed = shares.lines
    assert [y for y in black.get_ydata() if y == y] == [1.0] * 9 and [y for y in dashed.get_ydata() if y == y] == [0.5] * 9
    assert [label.get_text() for label in effect.get_yticklabels()] == ["s", "␣the", "next token"]
    assert [t.get_text() for t in text.texts][2:] == [" up to Dave", "'", "s"]
    assert path.stat().st_size > 10_000 and not plt.get_fignums()


def test_tokens_that_move_both_ways_are_on_no_side(home, found):
    with open_results(home) as store:
        rows = of_story(store.rows("logit_effects", "ablation"), chosen(found))
    assert moved(rows, "lowered")["token"].tolist() == ["s"] and moved(rows, "raised")["token"].tolist() == [" the"]


def test_a_tree_is_a_side_of_its_own_and_is_drawn_from_what_is_significant(tmp_path, monkeypatch):
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (kept.append(self), save(self, *args, **more))[1])
    with open_results(with_trees(tmp_path)) as store:
        found = stories(store).set_index("feature")
        draw(store, "stories", tmp_path / "story.svg")
        assert "strongest" in stories_table(stories(store))
    assert found["tree"].to_dict() == {GOOD: True, WEAK: False, BROAD: None}
    assert found["sides"].to_dict() == {GOOD: 3, WEAK: 3, BROAD: 2} and found["agree"][GOOD] == 3
    assert found["strength"][GOOD] == pytest.approx((0.9 * 0.7 * 0.6) ** (1 / 3))
    said = [text.get_text() for text in kept[0].axes[-1].texts]
    assert {"60% (20%)", "30% (20%)", "2/11\n␣t11", "0/21\n␣t21"} <= set(said), "and nothing under what is not significant"
    assert not {"10%", "90%"} & set(said)


def test_tokens_are_shown_as_print_can():
    assert [visible(t) for t in (" the", "\n", "", "\x00")] == ["␣the", "↵", "(empty)", "□"]


def test_commands(home, tmp_path, capsys):
    assert main(["table", "stories", "--results", str(home)]) == 0
    assert "stories, run cases-1" in capsys.readouterr().out
    path = tmp_path / "one.svg"
    assert main(["figure", "stories", "--results", str(home), "--feature", str(WEAK), "-o", str(path)]) == 0
    assert "<svg" in path.read_text()
    assert main(["figure", "inputs", "--results", str(home), "--feature", "3", "-o", str(path)]) == 2
    assert main(["figure", "stories", "--results", str(home), "-o", str(tmp_path / "one.gif")]) == 2


def test_a_feature_is_shown_in_words(home, capsys):
    assert main(["show", "feature", str(GOOD), "--results", str(home)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"feature 3 of SAE at {HOOK}, run cases-1"
    steps = [line for line in said if " - " in line]
    assert len(steps) == 10 and steps[0].split()[:4] == ["9.000", "-", "10.000", "11"], "the strongest first"
    assert " 1.00 " in steps[0] and " 0.50 " in steps[0] and "' 100%" in steps[0]
    assert sum("up to Dave»'«s" in line for line in said) == 1
    (lowered,) = [line.split() for line in said if line.startswith("  lowered")]
    assert lowered[1:] == ["s", "-2.000", "[-2.100,", "-1.900]", "-0.30000"]
    assert main(["show", "feature", "--results", str(home)]) == 2
    assert main(["show", "feature", "99", "--results", str(home)]) == 2
    assert main(["show", "runs", "3", "--results", str(home)]) == 2


def test_a_run_ends_with_its_stories(home, tmp_path):
    with open_results(home) as store:
        told = draw_stories(store, "cases-1", tmp_path)
    assert told.startswith("stories, run cases-1") and (tmp_path / "cases-1-stories.png").exists()


def test_a_run_without_inputs_is_said(home, tmp_path):
    journal = Journal(tmp_path / "runs" / "cases-2")
    journal.write_rows("runs", [{"suite": "c", "evalkit_version": "0", "status": "started", "at": "2026-03-01"}])
    journal.write_unit(unit("ablation", "ablation"), scores({1: (0.5,)}, ["concentration"]))
    rebuild(tmp_path, tmp_path / "e.duckdb")
    with open_results(tmp_path / "e.duckdb") as store, pytest.raises(UsageError, match="no inputs"):
        stories(store)
    with open_results(tmp_path / "e.duckdb") as store:
        assert draw_stories(store, "cases-2", tmp_path) == "" and not list(tmp_path.glob("*.png"))


def test_tokens_of_few_contexts_have_no_interval():
    usual = {"edit": "ablate", "side": "lowered", "ranked_by": "mass", "change": -0.5, "mass": -0.1, "low": -0.6, "high": -0.4}
    rows = pd.DataFrame([{**usual, "place": i, "token_id": i, "contexts": n} for i, n in ((1, 5), (2, 6))])
    few, enough = (row for _, row in moved(rows, "lowered").iterrows())
    assert few[["low", "high"]].isna().all() and few["change"] == -0.5
    assert (enough["low"], enough["high"]) == (-0.6, -0.4)


def test_the_criterion_is_that_of_the_suite_file(tmp_path):
    """A file that asks for more has fewer stories; the table says where the numbers were written."""
    with open_results(with_trees(tmp_path / "own")) as store:
        own = stories(store)
    assert own.set_index("feature")["inputs"][WEAK] and "has no [stories]" in " ".join(stories_table(own).split())
    folder = tmp_path / "stricter"
    with_trees(folder)
    journal = Journal(folder / "runs" / "cases-1")
    toml = '[suite]\nname = "cases"\nseed = 7\n[stories]\nleast_share = 0.85\ncorrected = true\n'
    journal.write_rows(
        "runs", [{"suite": "cases", "evalkit_version": "0", "status": "done", "at": "2026-03-02", "suite_toml": toml}]
    )
    rebuild(folder, folder / "e.duckdb")
    with open_results(folder / "e.duckdb") as store:
        found = stories(store)
    asked = found.set_index("feature")
    assert asked["inputs"][GOOD] and not asked["inputs"][WEAK]
    text = " ".join(stories_table(found).split())
    assert "from [stories] of the suite file" in text and "seed 7" in text and "at least 0.85 of the mean tenth" in text
    unclear = _judged(asked.reset_index().assign(next_p=0.02), StoriesConfig(corrected=True))
    assert not unclear["effect"].any(), "0.02 of one feature is 0.06 of three"


def test_the_expected_number_by_chance_is_a_bound_without_independence(tmp_path):
    with open_results(with_trees(tmp_path)) as store:
        text = " ".join(stories_table(stories(store)).split())
    assert "at most about 0.1 of the 3 would have the effect" in text


@pytest.mark.parametrize("settings", [{"least_share": 1.5}, {"times_null": -1.0}])
def test_an_impossible_criterion_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        StoriesConfig(**settings)
