"""Tables: every number in its place, in every format."""

from __future__ import annotations

import csv
import io
import json

import pandas as pd
import pytest
from rich.cells import cell_len
from store_case import score, unit, write_run

from evalkit.errors import UsageError
from evalkit.report.render import WIDTH, latex_escaped
from evalkit.report.tables import comparison_table, number, paper_table, with_interval
from evalkit.store.reader import open_results
from evalkit.store.scores import FEW, TABLE_COLUMNS
from evalkit.store.writer import rebuild


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The small run, as if two groups were enough for an interval: the tests are about where numbers stand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evalkit.store.scores.LEAST_CLUSTERS", 2)
        yield from opened(tmp_path_factory)


def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_run(folder)
    rebuild(folder, folder / "evalkit.duckdb")
    with open_results(folder / "evalkit.duckdb") as opened:
        yield opened


def long_frame(rows):
    """A frame of ``Results.table`` with what ``rows`` leave out filled in."""
    nan = float("nan")
    usual = {
        "dictionary": "d", "kind": "topk", "hook_point": "h", "metric": "m", "title": "M", "mean": 0.5, "low": 0.4,
        "high": 0.6, "n": 9, "failed": 0, "undefined": 0, "chance": nan, "null_mean": nan, "null_low": nan,
        "null_high": nan, "judge": None, "clusters": 9,
        "units_failed": 0, "null_metric": "", "better": "higher", "main": True, "digits": 2, "note": "", "config": "",
        "evaluation": "e", "run": "r", "no_interval": "", "null_n": 9, "null_failed": 0, "null_undefined": 0, "null_clusters": 9,
        "p": float("nan"), "flag": "",
        "l0": nan, "best": False,
    }  # fmt: skip
    return pd.DataFrame([{**usual, **row} for row in rows], columns=TABLE_COLUMNS)


def test_a_row_for_each_source_of_text_and_the_one_over_all_last(tmp_path):
    journal = write_run(tmp_path)
    for name, far in (("a", 0.5), ("b", 0.3)):
        rows = [score("fvu", i, v, "window", cluster=i, source=source)
                for i, (v, source) in enumerate([(0.1, "near"), (0.2, "near"), (far, "far"), (far, "far")])]  # fmt: skip
        rows += [score("dead", 0, 3.0, "dictionary")]
        journal.write_unit(unit(f"sources-{name}", "reconstruction", name, at="2026-03-09T12:00:00"), rows)
    rebuild(tmp_path, tmp_path / "evalkit.duckdb")
    with open_results(tmp_path / "evalkit.duckdb") as opened:
        pooled, frame = (opened.table("reconstruction", sources=sources) for sources in (False, True))
        assert "source" not in pooled and len(pooled[pooled["dictionary"] == "a"]) == 3
    fvu = frame[(frame["metric"] == "fvu") & frame["dictionary"].isin(["a", "b"])]
    assert list(zip(fvu["dictionary"], fvu["source"], strict=True)) == [
        ("a", "near"), ("a", "far"), ("a", "all"), ("b", "near"), ("b", "far"), ("b", "all")
    ]  # fmt: skip
    assert fvu["mean"].tolist() == pytest.approx([0.15, 0.5, 0.325, 0.15, 0.3, 0.225])
    lines = [line.split()[:2] for line in paper_table(frame[frame["dictionary"].isin(["a", "b"])]).splitlines()]
    expected = [[name, source] for name in ("a", "b") for source in ("near", "far", "all")]
    assert [line for line in lines if line and line[0] in ("a", "b")][:6] == expected
    dead = frame[(frame["metric"] == "dead") & (frame["dictionary"] == "a")].set_index("source")["n"]
    assert dead.to_dict() == {"near": 0, "far": 0, "all": 1}, "what is of no source stands in the last row alone"


def starred(frame):
    """``frame`` as if topk were the best of each metric."""
    return frame.assign(best=frame["dictionary"] == "topk")


def test_few_scores_have_no_interval_and_no_best():
    rows = [{"dictionary": d, "mean": m, "low": m - 0.01, "high": m + 0.01, "null_mean": 0.1, "null_low": 0.05, "null_high": 0.15,
             "null_metric": "z"} for d, m in (("a", 0.9), ("b", 0.5))]  # fmt: skip
    many = paper_table(long_frame([{**row, "clusters": 6, "best": row["dictionary"] == "a"} for row in rows]))
    assert "0.90 [0.89, 0.91]*" in many and "null 0.10 [0.05, 0.15]" in many and "fewer than" not in many
    nan = float("nan")
    without = {"low": nan, "high": nan, "null_low": nan, "null_high": nan, "no_interval": FEW}  # as ``score_table`` gives it
    few = paper_table(long_frame([{**row, **without, "clusters": 2} for row in rows]))
    table, notes = few.splitlines()[:6], " ".join(few.splitlines()[6:])
    assert not any(sign in "\n".join(table) for sign in "[*") and notes.count("fewer than 6 independent groups") == 1
    assert "0.90" in table[4] and "null 0.10" in table[4]
    mixed = paper_table(long_frame([{**rows[0], "clusters": 6}, {**rows[1], **without, "clusters": 5}]))
    assert "0.90 [0.89, 0.91] " in mixed and "0.50 [" not in mixed  # nothing is best beside what has no interval
    said = json.loads(paper_table(long_frame([{**rows[0], **without, "clusters": 2}]), "json"))[0]
    assert said["low"] is None and said["no_interval"] == "fewer than 6 independent groups"


def test_text_of_autointerp(results):
    lines = paper_table(starred(results.table("autointerp"))).splitlines()
    assert lines[0] == "autointerp, at blocks.3.hook_resid_post, judge tiny-judge, run paper-0a1b2c3d"
    assert lines[2].split() == ["dictionary", "score", "reference", "p", "n", "failed", "undefined"]
    topk, pca, ica = lines[4:7]
    assert topk.split("  ")[0] == "topk"
    assert "0.50 [0.24, 0.76]*" in topk
    assert "null 0.00 [-0.26, 0.26], chance 0" in topk
    assert topk.split()[-3:] == ["4", "1", "1"]
    assert "0.15 [0.14, 0.16] " in pca
    assert "unit failed" in ica
    text = "\n".join(lines)
    assert "*: best of its column" in text
    assert "score: correlation of simulated and true activations" in text
    assert "Units failed for: ica" in text
    assert "shuffled (of score)" in text


def test_columns_are_aligned(results):
    frame = results.table("reconstruction")
    single = frame["n"] <= 1
    lines = paper_table(frame.assign(n=frame["n"].where(single, 7), clusters=frame["clusters"].where(single, 6))).splitlines()
    heading, topk, pca = lines[2], lines[4], lines[5]
    assert len(heading) == len(topk) == len(pca)
    assert heading.index("FVU") + 3 == topk.index("]") + 1 == pca.index("]") + 1
    assert heading.split() == ["dictionary", "FVU", "perplexity", "n", "failed", "dead"]
    assert "0.4250 [-0.5280, 1.3780]" in pca
    assert "independent groups: FVU 6" in "\n".join(lines)


def test_best_is_marked_where_the_frame_says_so():
    rows = [{"dictionary": d, "mean": m, "best": d == "a"} for d, m in (("a", 0.9), ("b", 0.5), ("c", 0.95))]
    lines = paper_table(long_frame(rows)).splitlines()
    assert [("*" in line) for line in lines[4:7]] == [True, False, False]
    assert any(line.startswith("*: best of its column among dictionaries within 20 % in L0") for line in lines)


def test_l0_has_a_column_and_is_missed():
    rows = [{"dictionary": "a", "l0": 32.0}, {"dictionary": "PCA", "l0": float("nan")}]
    text = paper_table(long_frame(rows))
    assert text.splitlines()[2].split()[:2] == ["dictionary", "L0"] and text.splitlines()[4].split()[:2] == ["a", "32.0"]
    assert "L0 not measured, so that nothing is marked as best: PCA" in text
    assert "not measured" not in paper_table(long_frame([{**row, "l0": 32.0} for row in rows]))
    assert "L0" not in paper_table(long_frame([{"dictionary": "a"}]))


def test_a_null_has_its_own_counts():
    row = {"null_mean": 0.1, "null_metric": "z", "n": 9}
    assert "null 0.10 (n 2, 1 failed)" in paper_table(long_frame([{**row, "null_n": 2, "null_failed": 1}]))
    assert "null 0.10 " in paper_table(long_frame([{**row, "null_n": 9}])) and "(n" not in paper_table(
        long_frame([{**row, "null_n": 9}])
    )


def test_wide_tables_are_cut_into_blocks():
    rows = [{"dictionary": d, "metric": f"m{i}", "title": f"a rather long metric name {i}", "chance": 0.0, "n": 5 + i}
            for d in ("first", "second") for i in range(9)]  # fmt: skip
    text = paper_table(long_frame(rows))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("dictionary") == text.count("first") - 1 > 1
    for i in range(9):
        heading = next(line for line in text.splitlines() if line.endswith("failed") and f"name {i}" in line)
        assert heading.index("reference", heading.index(f"name {i}")) > 0


def test_configurations_get_a_column():
    text = paper_table(long_frame([{"config": "features=5"}, {"config": "features=50", "mean": 0.7}]))
    assert [line.split()[1] for line in text.splitlines()[4:6]] == ["features=5", "features=50"]


def test_markdown(results):
    lines = paper_table(starred(results.table("autointerp")), "md").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {8}
    assert "| **0.50 [0.24, 0.76]** |" in table[2]
    assert table[1].startswith("| :--- | ---: |")
    assert r"hook\_resid\_post" in lines[0]


def test_latex(results):
    text = paper_table(starred(results.table("autointerp")), "latex")
    for part in (r"\toprule", r"\bottomrule", r"\begin{tabular}{lrrrrrr}", r"\textbf{0.50 [0.24, 0.76]}", "95\\%"):
        assert part in text
    assert r"hook\_resid\_post" in text
    assert "[$-$0.26, 0.26]" in text
    assert text.count("{") == text.count("}")
    assert latex_escaped("a_b & 50% #1 {x} -3 k-2") == r"a\_b \& 50\% \#1 \{x\} $-$3 k-2"


def test_csv_and_json_are_the_long_frame(results):
    frame = results.table("autointerp")
    records = json.loads(paper_table(frame, "json"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows = list(csv.DictReader(io.StringIO(paper_table(frame, "csv"))))
    assert len(records) == len(rows) == len(frame)
    assert list(records[0]) == list(rows[0]) == list(frame.columns)
    assert records[0]["high"] == frame["high"].iloc[0] == float(rows[0]["high"])
    assert records[0]["n"] == 4
    assert records[4]["mean"] is None
    assert rows[4]["mean"] == ""
    assert records[0]["main"] is True


HOSTILE = "\u202eabc\x1b[31m\nx"


def rows_named(*names):
    return long_frame([{"dictionary": name, "note": name, "title": name} for name in names])


@pytest.mark.parametrize("form", ["text", "md", "latex", "json"])
def test_names_that_a_terminal_would_act_on_are_shown(form):
    text = paper_table(rows_named(HOSTILE, "b"), form)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    if form == "json":
        assert json.loads(text)[0]["dictionary"] == HOSTILE
    else:
        (line,) = (line for line in text.splitlines() if "abc" in line and "0.5" in line)
        assert ("U+202E" if form == "latex" else "\u25a1abc") in line


def test_columns_stay_aligned_beside_wide_letters():
    lines = paper_table(rows_named("日本語", "b")).splitlines()
    assert lines[4].rstrip().endswith("9       0") and cell_len(lines[4]) == cell_len(lines[5])


def test_latex_rows_that_begin_with_a_bracket_or_a_star_are_no_arguments_of_the_command_before():
    r"""``\\\\``, ``\\midrule`` and ``\\toprule`` take a bracket that follows for a length, and ``\\\\`` a star for itself."""
    frame = rows_named("[h] one", "*two", "[3] three", "plain")
    lines = paper_table(frame, "latex").splitlines()
    rows = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert [row.split(" ")[0] for row in rows] == ["{}[h]", "{}*two", "{}[3]", "plain"]
    heading = long_frame([{}]).rename(columns={})
    assert not any(line.lstrip().startswith(("[", "*")) for line in [*lines, *paper_table(heading, "latex").splitlines()])


def test_markdown_makes_no_link_and_no_entity_of_a_name():
    text = paper_table(rows_named("[a](http://b)", "![i][j]", "[k]: http://l", "&lt; ~~s~~ $m$"), "md")
    for shown in (r"[a\](http://b)", r"![i\][j]", r"[k\]: http", r"\&lt; \~\~s\~\~ \$m\$"):
        assert shown in text
    assert "](" not in text.replace(r"\](", "")


@pytest.mark.parametrize("name", ["=1+1", "+A1", "-A1", "@SUM(A1)", "\t=1", "\uff1d1+1", "=cmd|' /C calc'!A0"])
def test_csv_text_is_no_formula_and_numbers_stay_numbers(name):
    frame = long_frame([{"dictionary": name, "mean": -0.5, "low": -1e-9}, {"dictionary": "-3", "mean": -1.5}])
    first, second = csv.DictReader(io.StringIO(paper_table(frame, "csv")))
    assert first["dictionary"] == f"'{name}" and second["dictionary"] == "-3"
    assert (float(first["mean"]), float(first["low"]), float(second["mean"])) == (-0.5, -1e-9, -1.5)
    assert json.loads(paper_table(frame, "json"))[0]["dictionary"] == name


def test_comparison(results):
    frame = results.compare("topk", "pca")
    lines = comparison_table(frame).splitlines()
    assert lines[0] == "topk - pca, at blocks.3.hook_resid_post"
    fvu = next(line for line in lines if line.startswith("FVU"))
    assert "-0.2000 [-0.2000, -0.2000]" in fvu and "No interval" not in "\n".join(lines)
    assert fvu.split()[-4:] == ["paired", "L0", "not", "measured"]
    score = next(line for line in lines if line.startswith("score"))
    assert "4, 2  independent" in score
    assert "corrected for 0 comparisons" in "\n".join(lines)
    assert "perplexity: compared on the scale of the mean" in "\n".join(lines)
    assert json.loads(comparison_table(frame, "json"))[0]["paired"] is True
    named = frame.assign(better=["a", "b", "differs", "a"])
    assert [line.split()[-1] for line in comparison_table(named).splitlines()[4:8]] == ["topk", "pca", "differs", "topk"]


def test_numbers():
    assert number(float("nan"), 2) == "-"
    assert number(-0.0001, 2) == "0.00"
    assert number(-0.006, 2) == "-0.01"
    assert number(12345.6, 1) == "12,345.6"
    assert number(float("inf"), 2) == "inf"
    assert with_interval(1.0, float("nan"), float("nan"), 1) == "1.0"


def test_bad_requests(results):
    with pytest.raises(UsageError, match="no table format called 'latexx'") as caught:
        paper_table(results.table("autointerp"), "latexx")
    assert "did you mean 'latex'?" in str(caught.value)
    assert paper_table(long_frame([])) == "nothing to show"
