"""What is called best or better, and among what: L0, families of p-values, counts of nulls."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
from store_case import HOOK, METRICS, measured_l0, score, unit

from evalkit.evaluations.autointerp.evaluation import Autointerp
from evalkit.report.tables import paper_table
from evalkit.store.journal import Journal
from evalkit.store.reader import open_results
from evalkit.store.scores import _description, _shown
from evalkit.store.seeds import families, family_name
from evalkit.store.sparsity import unlike
from evalkit.store.writer import Writer
from evalkit.util.statistics import holm, weighted_mean_interval

FVU = {**METRICS[0], "evaluation": "e", "metric": "m", "better": "higher"}
SIDE = {**FVU, "metric": "side", "title": "side", "main": False, "position": 1}


def results_of(folder, values, l0=None, metrics=(FVU, SIDE), **more):
    """Results of dictionaries on the same windows: ``values`` are theirs, for the main metric and the one beside it."""
    journal = Journal(folder / "runs" / "r")
    journal.write_rows("metrics", list(metrics))
    for name, own in values.items():
        rows = [score(metric, i, value, "window") for metric in ("m", "side") for i, value in enumerate(own)]
        journal.write_unit(unit(f"k-{name}", "e", name), rows, **more)
    measured_l0(journal, **(l0 or {}))
    Writer(folder / "e.duckdb").ingest(journal)
    return open_results(folder / "e.duckdb")


def steps(by, n=12):
    return [by + i / 10 for i in range(n)]


def best(frame, metric="m"):
    return list(frame[(frame["metric"] == metric) & frame["best"]]["dictionary"])


@pytest.mark.parametrize(
    ("a", "b", "why"), [(32, 32, ""), (32, 38.4, ""), (38.5, 32, "other L0"), (0, 1, "other L0"), (0, 0, "")]
)
def test_like_l0(a, b, why):
    assert unlike(a, b) == why
    assert unlike(float("nan"), b) == "L0 not measured"


def test_a_complete_basis_has_no_star_over_sparse_dictionaries(tmp_path):
    values = {"SAE": steps(0.2), "ICA": steps(0.1), "PCA": steps(0.9)}
    with results_of(tmp_path, values, {"SAE": 32, "ICA": 30, "PCA": 576}) as results:
        table, compared = results.table("e"), results.compare("SAE", ["ICA", "PCA"], "e")
    assert best(table) == ["SAE"]  # PCA is higher, but dense
    assert list(table[table["metric"] == "m"]["l0"]) == [32, 30, 576]
    main = compared[compared["main"]].set_index("b")
    assert list(main["better"]) == ["a", "other L0"]
    assert main.loc["ICA", "p_holm"] == main.loc["ICA", "p"] and math.isnan(main.loc["PCA", "p_holm"])
    assert (main.loc["PCA", "l0_a"], main.loc["PCA", "l0_b"]) == (32, 576) and main.loc["PCA", "p"] < 0.05


def test_without_l0_nothing_is_best_or_better(tmp_path):
    with results_of(tmp_path, {"a": steps(1.0), "b": steps(0.0)}, {"a": 32}) as results:
        assert best(results.table("e")) == []
        compared = results.compare("a", "b")
    assert set(compared[compared["main"]]["better"]) == {"L0 not measured"}


def test_l0_is_the_sum_of_all_densities(tmp_path):
    journal = Journal(tmp_path / "runs" / "r")
    journal.write_rows("metrics", [FVU])
    for name, count in (("whole", 8), ("part", 7)):
        shape = {"kind": "topk", "hook_point": HOOK, "model": "tiny", "d_in": 4, "n_features": 8, "details": "{}"}
        journal.write_rows("dictionaries", [{**shape, "dictionary_id": f"id-{name}"}])
        journal.write_unit(unit(f"g-{name}", "geometry", name), [score("density", i, 0.25, "feature") for i in range(count)])
        journal.write_unit(unit(f"k-{name}", "e", name), [score("m", i, 0.5, "window") for i in range(6)])
    Writer(tmp_path / "e.duckdb").ingest(journal)
    with open_results(tmp_path / "e.duckdb") as results:
        l0 = results.table("e").set_index("dictionary")["l0"]
    assert l0["whole"] == 2.0 and math.isnan(l0["part"])


def test_best_differs_from_every_like_dictionary(tmp_path):
    apart, near = steps(1.0), [value + 0.01 * (-1) ** i for i, value in enumerate(steps(1.0))]
    for folder, other, want in ((tmp_path / "near", near, []), (tmp_path / "far", steps(0.5), ["a"])):
        with results_of(folder, {"a": apart, "b": other, "c": steps(0.0)}, {"a": 32, "b": 32, "c": 32}) as results:
            assert best(results.table("e")) == want
    lower = [{**FVU, "better": "lower"}, SIDE]
    with results_of(tmp_path / "lower", {"a": apart, "b": steps(0.0)}, {"a": 32, "b": 32}, lower) as results:
        assert best(results.table("e")) == ["b"]
    with results_of(tmp_path / "few", {"a": steps(1.0, 5), "b": steps(0.0, 5)}, {"a": 32, "b": 32}) as results:
        assert best(results.table("e")) == []


def test_overlapping_intervals_may_differ_when_paired(tmp_path):
    """What two dictionaries share cancels: 0.05 apart on every window, each with a spread of 0.36."""
    with results_of(tmp_path, {"a": steps(0.05), "b": steps(0.0)}, {"a": 32, "b": 32}) as results:
        table = results.table("e")
    own = table[table["metric"] == "m"].set_index("dictionary")
    assert own.loc["b", "high"] > own.loc["a", "low"] and best(table) == ["a"]


def test_the_family_is_the_main_metrics_of_all_that_is_asked_for(tmp_path):
    shift = {"a": 0.0, "b": 0.4, "c": 0.3, "d": 0.2}
    values = {name: [by * math.sin(i + by) + i for i in range(8)] for name, by in shift.items()}
    with results_of(tmp_path, values, dict.fromkeys(shift, 32)) as results:
        together, alone = results.compare("a", ["b", "c", "d"], "e"), results.compare("a", "b", "e")
    main = together[together["main"]]
    assert len(together) == 6 and list(main["p_holm"]) == pytest.approx(list(holm(main["p"])))
    assert together[~together["main"]]["p_holm"].isna().all() and set(together[~together["main"]]["better"]) == {"descriptive"}
    assert alone["p_holm"].iloc[0] == alone["p"].iloc[0] < main["p_holm"].iloc[0] or main["p_holm"].iloc[0] == 1.0


def test_the_detectable_difference_stands_beside_the_one_found(tmp_path):
    with results_of(tmp_path, {"a": [0.0, 1.0] * 8, "b": [0.0] * 16}, {"a": 32, "b": 32}) as results:
        got = results.compare("a", "b").iloc[0]
    error = 0.5 * math.sqrt(16 / 15) / 4
    assert got["detectable"] == pytest.approx((2.13145 + 0.86624) * error, rel=1e-4)  # t of 15 degrees of freedom


def test_a_null_has_its_counts_and_its_rule(tmp_path):
    journal = Journal(tmp_path / "runs" / "r")
    journal.write_rows("metrics", [{**FVU, "null_metric": "null"}])
    rows = [score("m", i, 0.5 + i / 10, "feature") for i in range(8)] + [score("null", i, i / 10, "feature") for i in range(2)]
    rows += [score("null", 2, None, "feature"), score("null", 3, None, "feature", status="undefined")]
    journal.write_unit(unit("k", "e", "a"), rows)
    Writer(tmp_path / "e.duckdb").ingest(journal)
    with open_results(tmp_path / "e.duckdb") as results:
        got = results.table("e").iloc[0]
    assert (got["n"], got["null_n"], got["null_failed"], got["null_undefined"], got["null_clusters"]) == (8, 2, 1, 1, 2)
    assert got["null_mean"] == pytest.approx(0.05) and pd.isna(got["null_low"]) and got["no_interval"].startswith("null:")


def test_seeds_of_one_recipe_are_a_family():
    recipe = {"architecture": "topk", "k": 32, "seed": 0, "order": 0}
    details = {name: json.dumps({"trained": {**recipe, **more}}) for name, more in
               {"a": {}, "b": {"seed": 1}, "c": {"seed": 1, "k": 64}}.items()}  # fmt: skip
    found = families({**details, "pca": "{}", "old": None})
    assert found["a"] == found["b"] != found["c"] and set(found) == {"a", "b", "c"}
    assert family_name(["SAE k=16 seed=0", "SAE k=16 seed=1"]) == "SAE k=16 (2 seeds)"
    assert family_name(["x", "y"]) == "x + y (2 seeds)"


def test_seeds_have_a_row_for_all_of_them(tmp_path):
    """Means 0.55, 0.65 and 0.75 of the same windows: sd 0.1. The rows of the seeds stay, and they do not compete."""
    journal = Journal(tmp_path / "runs" / "r")
    journal.write_rows("metrics", [{**FVU, "title": "FVU"}, {**SIDE, "transform": "exp"}])
    for seed, name in enumerate(["SAE seed=0", "SAE seed=1", "SAE seed=2", "PCA"]):
        details = json.dumps({} if name == "PCA" else {"trained": {"k": 4, "seed": seed}})
        shape = {"kind": "topk", "hook_point": HOOK, "model": "tiny", "d_in": 4, "n_features": 8, "details": details}
        journal.write_rows("dictionaries", [{**shape, "dictionary_id": f"id-{name}"}])
        values = steps(0.0 if name != "PCA" else -2.0)
        rows = [score(metric, i, value + seed / 10, "window") for metric in ("m", "side") for i, value in enumerate(values)]
        journal.write_unit(unit(f"k-{name}", "e", name), rows)
    measured_l0(journal, **{"SAE seed=0": 4, "SAE seed=1": 4, "SAE seed=2": 4, "PCA": 4})
    Writer(tmp_path / "e.duckdb").ingest(journal)
    with open_results(tmp_path / "e.duckdb") as results:
        table = results.table("e")
    main = table[table["metric"] == "m"].set_index("dictionary")
    assert list(main.index) == ["SAE seed=0", "SAE seed=1", "SAE seed=2", "SAE (3 seeds)", "PCA"]
    row = main.loc["SAE (3 seeds)"]
    assert (row["mean"], row["seed_sd"], row["seeds"], row["n"], row["clusters"]) == pytest.approx((0.65, 0.1, 3, 36, 12))
    assert row["low"] < main.loc["SAE seed=1", "low"] and row["high"] > main.loc["SAE seed=1", "high"]
    assert main["seed_sd"].notna().sum() == 1 and list(main["seeds"]) == [1, 1, 1, 3, 1]
    assert best(table) == ["SAE seed=0", "SAE seed=1", "SAE seed=2"]
    side = table[(table["metric"] == "side") & (table["dictionary"] == "SAE (3 seeds)")].iloc[0]
    assert (side["mean"], side["seed_sd"]) == pytest.approx((math.exp(0.65), 0.1 * math.exp(0.65)))
    assert "noise floor of a single one. SAE (3 seeds): FVU 0.1000, side" in paper_table(table)


def test_no_interval_leaves_what_the_metric_can_be():
    """Five shares of 1 and one of 0.4: Student's interval of their mean would end above 1."""
    interval = weighted_mean_interval([1.0, 1.0, 1.0, 1.0, 1.0, 0.4])
    bare = _description(pd.DataFrame({"metric": []}), "share")
    assert _shown(interval, bare) == interval
    assert interval.high > 1 or interval.low < 0
    shown = _shown(interval, {**bare, "lowest": 0.0, "highest": 1.0})
    assert (shown.mean, shown.n) == (interval.mean, 6)
    assert shown.low == max(interval.low, 0.0) and shown.high == min(interval.high, 1.0)


def test_a_judge_that_loses_to_a_word_list_is_named_under_the_table(tmp_path):
    """The flag of ``over_lexical``: SAE 0.3 below the word list, ICA 0.3 above."""
    about = Autointerp.metrics["over_lexical"]
    described = {**FVU, "flag_below": about.flag_below, "flag": about.flag}
    results = results_of(tmp_path, {"SAE": [-0.3] * 8, "ICA": [0.3] * 8}, metrics=(described,))
    (said,) = [line for line in paper_table(results.table("e"), "md").splitlines() if about.flag in line]
    assert "SAE" in said and "ICA" not in said
