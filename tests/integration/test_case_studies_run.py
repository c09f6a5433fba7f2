"""Case studies from the suite file to tables, stories and trees: five evaluations in one run on a tiny random model."""

from __future__ import annotations

import html
import json
from xml.etree import ElementTree

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from suite_case import tiny_suite

from evalkit.cli import main
from evalkit.evaluations.base import EVALUATIONS
from evalkit.report.case_studies.criteria import stories
from evalkit.report.views.causal_tree.data import tree_of
from evalkit.report.views.causal_tree.figure import draw_tree
from evalkit.store.reader import open_results

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
STUDIES = ["inputs", "ablation", "causal_tree", "steering", "concepts"]
EXTRA = """
[[evaluation]]
name = "inputs"
features = 1000
least_windows = 3

[[evaluation]]
name = "ablation"
features = 2
least_windows = 3
contexts = 4
prefer = "one token"

[[evaluation]]
name = "ablation"
features = 4
least_windows = 3
contexts = 3
reverse = "none"

[[evaluation]]
name = "causal_tree"
features = 2
least_windows = 6
contexts = 8
tested = 5
checked = 3
least_share = 0.0
alpha = 1.0
explain = true

[[evaluation]]
name = "steering"
features = 1
least_windows = 3
tokens = 4
strengths = [2.0]

[[evaluation]]
name = "concepts"
concepts = ["dates"]
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results file of a finished run; the folder holds its figures."""
    home = tmp_path_factory.mktemp("cases")
    suite, store = tiny_suite(home), home / "out" / "evalkit.duckdb"
    text = suite.read_text().replace(f'["{HOOKS[0]}"]', json.dumps(HOOKS))
    suite.write_text(text[: text.index("[[evaluation]]")] + EXTRA)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small is slower on several
    try:
        assert main(["run", str(suite), "--results", str(store), "--quiet"]) == 0
    finally:
        torch.set_num_threads(threads)
    return store


def test_every_unit_is_done(results):
    with open_results(results) as store:
        units = store.sql("SELECT evaluation, evaluation_version, hook_point, dictionary, config, status FROM run_units")
        assert store.failures().empty
    assert set(units["status"]) == {"done"} and set(units["dictionary"]) == {"SAE", "neurons"}
    counted = units.groupby("evaluation").size().to_dict()
    # two hook points and two dictionaries; ablation twice, trees at the later hook point alone
    assert counted == {"inputs": 4, "ablation": 8, "causal_tree": 2, "steering": 4, "concepts": 4}
    assert set(units["hook_point"][units["evaluation"] == "causal_tree"]) == {HOOKS[1]}
    for row in units.itertuples():
        assert row.evaluation_version == EVALUATIONS.get(row.evaluation).version


@pytest.mark.parametrize("name", STUDIES)
def test_every_table_has_its_metrics(results, name, capsys):
    with open_results(results) as store:
        frame = store.table(name)
    evaluation = EVALUATIONS.get(name)
    assert set(frame["metric"]) <= set(evaluation.metrics)
    main_metric = next(key for key, metric in evaluation.metrics.items() if metric.main)
    (of_main,) = [part for metric, part in frame.groupby("metric") if metric == main_metric]
    assert (of_main["n"] > 0).all() and of_main["mean"].notna().all() and (frame["failed"] == 0).all()
    assert main(["table", name, "--results", str(results)]) == 0
    assert evaluation.metrics[main_metric].title in capsys.readouterr().out


def test_stories_join_what_was_studied(results, capsys):
    with open_results(results) as store:
        frame = stories(store)
        inputs, effects = (store.features(*which) for which in (("inputs", "monosemantic"), ("ablation", "kl")))
        grown = store.features("causal_tree", "parents")
    key = ["dictionary", "hook_point", "feature"]
    sides = [set(part[key].itertuples(index=False, name=None)) for part in (inputs, effects, grown)]
    found = set(frame[key].itertuples(index=False, name=None))
    assert found == sides[0] & sides[1] and len(frame) == len(found) > 0
    # contexts are those of one configuration: four where a feature was preferred, three elsewhere
    assert frame["preferred"].any() and not frame["preferred"].all()
    assert set(frame["contexts"][frame["preferred"].eq(True)]) <= {3, 4}
    assert set(frame["contexts"][~frame["preferred"].eq(True)]) == {3}
    trees = frame.set_index(key)["tree"]
    assert {place for place in found if trees[place] is not None} <= sides[2]
    assert main(["table", "stories", "--results", str(results)]) == 0
    said = capsys.readouterr().out
    assert f"{len(frame)} features studied" in said and "same tokens" in said and "carried" in said


def test_a_tree_comes_out_as_data_and_as_a_picture(results, tmp_path):
    for suffix in ("json", "graphml", "svg"):
        assert main(["figure", "causal_tree", "--results", str(results), "-o", str(tmp_path / f"tree.{suffix}")]) == 0
    tree = json.loads((tmp_path / "tree.json").read_text())
    assert tree["hook_point"] == HOOKS[1] and {parent["hook_point"] for parent in tree["parents"]} == {HOOKS[0]}
    root = ElementTree.parse(tmp_path / "tree.graphml").getroot()
    space = {"g": "http://graphml.graphdrawing.org/xmlns"}
    edges = root.findall(".//g:edge", space)
    carried = [float(data.text) for data in root.iterfind(".//g:edge/g:data[@key='carried']", space)]
    assert [parent["carried"] for parent in tree["parents"]] == carried and len(edges) == len(carried) > 0
    with open_results(results) as store:
        rows = store.rows("causal_edges", "causal_tree")
    rows = rows[(rows["dictionary"] == tree["dictionary"]) & (rows["target"] == tree["feature"])]
    assert {parent["feature"] for parent in tree["parents"]} == set(rows["parent"][rows["significant"] & ~rows["checked"]])
    assert rows["checked"].any() and set(rows["proposed_as"]) == {"tested", "next", "drawn"}
    # the suite's judge names the token at the strongest firing; nothing here was explained by another evaluation
    said = [tree["explanation"], *(parent["explanation"] for parent in tree["parents"])]
    assert all(one.startswith("the token '") for one in said)
    graph = [data.text for data in root.iterfind(".//g:node/g:data[@key='explanation']", space)]
    assert sorted(graph) == sorted(said)
    ax = Figure(figsize=(12, 3)).add_subplot()
    with open_results(results) as store:
        run = str(store.table("causal_tree")["run"].iloc[0])
        draw_tree(ax, tree_of(store, pd.Series({key: tree[key] for key in ("dictionary", "hook_point", "feature")}), run))
    assert any("the token" in text.get_text() for text in ax.texts)
    page = tmp_path / "page.html"
    assert main(["report", "--results", str(results), "-o", str(page)]) == 0
    assert said[1] in html.unescape(page.read_text())
    assert "<svg" in (tmp_path / "tree.svg").read_text()


def test_the_run_leaves_its_figures(results):
    drawn = {path.name.split("-", 2)[-1] for path in (results.parent / "figures").iterdir()}
    assert {"stories.png", "tree.png", "causal_tree.png", "ablation.png"} <= drawn, drawn
