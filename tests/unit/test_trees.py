"""Causal trees as pictures and data: what hangs together is shown, insignificant parents are not, files hold the numbers."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import networkx
import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_stories import EDGES, GOOD, edge, scores, unit, with_trees, written

from evalkit.errors import UsageError
from evalkit.report.draw import draw, draw_run
from evalkit.report.views.causal_tree.data import NUMBERS, has_tree, tree_of
from evalkit.report.views.causal_tree.figure import draw_tree
from evalkit.report.views.causal_tree.files import write_tree
from evalkit.store.reader import open_results
from evalkit.store.writer import rebuild

SPACE = {"g": "http://graphml.graphdrawing.org/xmlns"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with open_results(with_trees(tmp_path_factory.mktemp("trees"))) as store:
        yield store


def test_the_json_is_the_tree_nested(store, tmp_path):
    draw(store, "causal_tree", tmp_path / "tree.json")
    tree = json.loads((tmp_path / "tree.json").read_text())
    assert (tree["feature"], tree["hook_point"]) == (GOOD, "blocks.4.hook_resid_post")
    (parent,) = tree["parents"]  # 12 is not significant, so 22, its parent, hangs on nothing
    assert (parent["feature"], parent["share"], parent["tokens"]) == (11, 0.6, [" t11"])
    (grandparent,) = parent["parents"]
    assert (grandparent["feature"], grandparent["p_holm"], grandparent["parents"]) == (21, 0.01, [])


def test_the_graphml_has_edges_from_cause_to_effect(store, tmp_path):
    draw(store, "causal_tree", tmp_path / "tree.graphml", feature=str(GOOD))
    root = ElementTree.parse(tmp_path / "tree.graphml").getroot()
    nodes = {node.get("id") for node in root.iterfind(".//g:node", SPACE)}
    edges = [(edge.get("source"), edge.get("target")) for edge in root.iterfind(".//g:edge", SPACE)]
    top, middle, low = (f"blocks.{layer}.hook_resid_post:{f}" for layer, f in ((4, GOOD), (2, 11), (0, 21)))
    assert nodes == {top, middle, low} and edges == [(middle, top), (low, middle)]
    (graph,) = root.iterfind("g:graph", SPACE)
    assert graph.get("id") == "tree" and graph.find("g:data[@key='dictionary']", SPACE).text == "SAE"
    assert [data.text for data in root.iterfind(".//g:edge/g:data[@key='carried']", SPACE)] == ["0.2", "0.2"]
    shares = [data.text for data in root.iterfind(".//g:edge/g:data[@key='share']", SPACE)]
    assert shares == ["0.6", "0.3"]
    tokens = [data.text for data in root.iterfind(".//g:node/g:data[@key='tokens']", SPACE)]
    assert json.loads(tokens[1]) == [" t11"]
    read = networkx.read_graphml(tmp_path / "tree.graphml")
    assert read.graph["dictionary"] == "SAE" and list(read.edges) == edges
    assert read.nodes[middle] == {"hook_point": "blocks.2.hook_resid_post", "feature": 11, "tokens": '[" t11"]'}
    (about,) = (edge for _, to, edge in read.edges(data=True) if to == top)
    assert set(about) <= set(NUMBERS) and (about["share"], about["carried"]) == (0.6, 0.2)


def test_graphml_holds_no_character_that_xml_forbids(store, tmp_path):
    tree = tree_of(
        store,
        pd.Series({"dictionary": "SAE", "hook_point": "blocks.4.hook_resid_post", "feature": GOOD}),
        str(store.table("causal_tree")["run"].iloc[0]),
    )
    node = tree.edges[0].parent
    write_tree(tree._replace(tokens={node: ["\x00a\x1b"]}, explanations={node: "b\x0bc"}), tmp_path / "tree.graphml")
    read = networkx.read_graphml(tmp_path / "tree.graphml").nodes[f"{node[0]}:{node[1]}"]
    assert json.loads(read["tokens"]) == ["\x00a\x1b"] and read["explanation"] == "b\ufffdc"


def test_the_picture_names_what_hangs_together_and_nothing_else(store):
    run = str(store.table("causal_tree")["run"].iloc[0])
    about = pd.Series({"dictionary": "SAE", "hook_point": "blocks.4.hook_resid_post", "feature": GOOD})
    tree = tree_of(store, about, run)._replace(explanations={("blocks.2.hook_resid_post", 11): "costs in $"})
    ax = Figure().add_subplot()
    draw_tree(ax, tree)
    said = {text.get_text() for text in ax.texts}
    assert {"2/11\n\u2423t11\ncosts in \\$", "0/21\n\u2423t21", "60% (20%)", "30% (20%)"} <= said
    assert not {"10% (20%)", "50% (20%)", "90% (20%)"} & said and len(ax.lines) == 2
    assert len(tree_of(store, about, run, 0).edges) == 0 and tree_of(store, about, run, None).edges == tree.edges


def test_of_two_configurations_one_tree_is_drawn(tmp_path):
    """A second, shallower configuration has the same target: its edges neither join the tree nor choose it."""
    journal = written(tmp_path)
    for key, config, edges in (("a", '{"depth": 2}', EDGES), ("b", '{"depth": 1}', [edge(1, GOOD, 99, 0.9)])):
        journal.write_unit(unit(key, "causal_tree", config), scores({GOOD: (1.0,)}, ["parents"]), {"causal_edges": edges})
    rebuild(tmp_path, tmp_path / "e.duckdb")
    with open_results(tmp_path / "e.duckdb") as store:
        draw(store, "causal_tree", tmp_path / "tree.json")
    assert [parent["feature"] for parent in json.loads((tmp_path / "tree.json").read_text())["parents"]] == [11]


def test_pictures_and_refusals(store, tmp_path):
    for suffix in ("png", "svg", "pdf"):
        draw(store, "causal_tree", tmp_path / f"tree.{suffix}")
        assert (tmp_path / f"tree.{suffix}").stat().st_size > 2000
    with pytest.raises(UsageError, match=r"cannot be written as '.dot'"):
        draw(store, "causal_tree", tmp_path / "tree.dot")
    with pytest.raises(UsageError, match="no story of a feature '99999'"):
        draw(store, "causal_tree", tmp_path / "tree.png", feature="99999")


def test_a_run_ends_with_the_scores_and_the_tree(store, tmp_path):
    run = str(store.table("causal_tree")["run"].iloc[0])
    assert has_tree(store, run)
    drawn = draw_run(store, "causal_tree", run, tmp_path)
    assert [path.name for path in drawn] == [f"{run}-causal_tree.png", f"{run}-tree.png"]
    assert all(path.exists() for path in drawn)
