"""Tables and comparisons against numbers worked out by hand; what happens when the file is held, old or absent."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import warnings

import pytest
from scipy import stats
from store_case import HOOK, METRICS, RUN, SUITE, measured_l0, score, unit, write_run

from evalkit.cli import main
from evalkit.errors import StoreAbsent, StoreUnreadable, UsageError
from evalkit.store.connection import connect
from evalkit.store.journal import Journal
from evalkit.store.migrations import migrations
from evalkit.store.reader import open_results
from evalkit.store.scores import COMPARE_COLUMNS, TABLE_COLUMNS
from evalkit.store.writer import Writer, rebuild
from evalkit.util.statistics import binomial_interval, weighted_mean_interval

P_SMALLEST = 1 / 2001


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_run(folder)
    rebuild(folder, folder / "evalkit.duckdb")
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A results folder of one's own."""
    return shutil.copytree(written, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def results(folder):
    with open_results(folder / "evalkit.duckdb") as opened:
        yield opened


@pytest.fixture
def two_are_enough(monkeypatch):
    """Intervals from two groups on: what is worked out by hand below has few."""
    monkeypatch.setattr("evalkit.store.scores.LEAST_CLUSTERS", 2)


def row(frame, **where):
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


@pytest.mark.usefixtures("two_are_enough")
def test_weighted_means_by_hand(results):
    table = results.table("reconstruction")
    assert list(table.columns) == TABLE_COLUMNS
    assert list(zip(table["dictionary"], table["metric"], strict=True)) == [
        (d, m) for d in ("topk", "pca") for m in ("fvu", "perplexity", "dead")
    ]
    topk = row(table, dictionary="topk", metric="fvu")
    assert topk["mean"] == pytest.approx((0.1 + 0.2 + 2 * 0.3 + 4 * 0.4) / 8)
    assert (topk["n"], topk["failed"], topk["undefined"], topk["clusters"]) == (4, 0, 0, 3)
    assert (topk["kind"], topk["hook_point"], topk["title"], topk["run"]) == ("topk", HOOK, "FVU", RUN)
    assert math.isnan(topk["chance"])
    assert topk["judge"] is None
    pca = row(table, dictionary="pca", metric="fvu")
    assert pca["mean"] == pytest.approx((0.3 + 0.4 + 2 * 0.5) / 4)
    assert (pca["n"], pca["failed"], pca["clusters"]) == (3, 1, 2)
    # two documents of equal weight, .35 and .5: standard error .075, and t of one degree of freedom
    half = 0.075 * stats.t.ppf(0.975, 1)
    assert (pca["low"], pca["high"]) == pytest.approx((0.425 - half, 0.425 + half))


@pytest.mark.usefixtures("two_are_enough")
def test_interval_is_that_of_the_clusters(results):
    topk = row(results.table("reconstruction"), dictionary="topk", metric="fvu")
    want = weighted_mean_interval([0.1, 0.2, 0.3, 0.4], [1, 1, 2, 4], [0, 0, 1, 2])
    assert (topk["low"], topk["high"]) == pytest.approx((want.low, want.high))


@pytest.mark.usefixtures("two_are_enough")
def test_exp_is_taken_of_mean_and_ends(results):
    table = results.table("reconstruction")
    shown = row(table, dictionary="topk", metric="perplexity")
    want = weighted_mean_interval([1.0, 2.0, 3.0, 4.0], [1, 1, 2, 4])
    assert (shown["mean"], shown["low"], shown["high"]) == pytest.approx(tuple(math.exp(x) for x in want[:3]))
    dead = row(table, dictionary="pca", metric="dead")
    assert (dead["mean"], dead["n"]) == (3.0, 1)
    assert math.isnan(dead["low"])


@pytest.mark.usefixtures("two_are_enough")
def test_shares_of_counted_cases_have_the_exact_interval(tmp_path):
    """Weights are the numbers of cases: 0 of 12, 1 of 24; a bootstrap of the two features would end at 1/24."""
    journal = Journal(tmp_path / "runs" / "counts-1")
    journal.write_rows("runs", [{"suite": "counts", "status": "done", "at": "2026-03-01T12:00:00"}])
    about = {"evaluation": "causal_tree", "evaluation_version": 1, "metric": "missed", "position": 0, "transform": "counts"}
    journal.write_rows("metrics", [{**about, "title": "missed", "better": "lower", "has_interval": True}])
    facts = {"evaluation": "causal_tree", "evaluation_version": 1, "dictionary": "topk", "hook_point": HOOK, "seed": 0}
    usual = {"metric": "missed", "kind": "feature", "status": "ok", "n": 1, "seed": 0}
    scores = [{**usual, "item": item, "value": hits / of, "weight": of} for item, hits, of in ((0, 0, 12), (1, 1, 24))]
    journal.write_unit({**facts, "unit_key": "k", "status": "done", "at": "2026-03-01T12:00:01"}, scores)
    rebuild(tmp_path, tmp_path / "evalkit.duckdb")
    with open_results(tmp_path / "evalkit.duckdb") as store:
        shown = row(store.table("causal_tree"), metric="missed")
    want = binomial_interval(1, 36)
    assert (shown["mean"], shown["low"], shown["high"]) == pytest.approx((want.mean, want.low, want.high)) and shown["n"] == 2


@pytest.mark.usefixtures("two_are_enough")
def test_null_chance_and_failures_stand_beside_the_score(results):
    table = results.table("autointerp")
    topk = row(table, dictionary="topk", metric="score")
    assert topk["mean"] == pytest.approx(0.5)
    assert topk["null_mean"] == pytest.approx(0.0)
    assert topk["null_low"] == pytest.approx(topk["low"] - 0.5)
    assert (topk["n"], topk["failed"], topk["undefined"], topk["chance"], topk["judge"]) == (4, 1, 1, 0.0, "tiny-judge")
    assert row(table, dictionary="pca", metric="score")["null_mean"] == pytest.approx(-0.35)
    lost = row(table, dictionary="ica", metric="score")
    assert (lost["n"], lost["units_failed"]) == (0, 1)
    assert math.isnan(lost["mean"])


@pytest.mark.usefixtures("two_are_enough")
def test_seeds_are_collapsed_and_one_feature_is_one_cluster(tmp_path):
    journal = Journal(tmp_path / "runs" / "r")
    for seed in (0, 1):
        rows = [score("m", i, float(i + seed), "feature", seed=seed) for i in range(3)]
        rows.append(score("f", 0, float(seed), "dictionary"))
        journal.write_unit(unit(f"k{seed}", "e", "d", seed=seed), rows)
    Writer(tmp_path / "e.duckdb").ingest(journal)
    with open_results(tmp_path / "e.duckdb") as results:
        table = results.table("e")
    got, whole = row(table, metric="m"), row(table, metric="f")
    assert (got["mean"], got["n"], got["clusters"]) == (1.5, 6, 3)
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)  # 0.5, 1.5 and 2.5, each under two seeds
    assert (got["low"], got["high"]) == pytest.approx((1.5 - half, 1.5 + half))
    assert (whole["mean"], whole["n"], whole["clusters"]) == (0.5, 2, 2)
    assert got["title"] == "m"


def test_configurations_are_not_mixed(tmp_path):
    journal = Journal(tmp_path / "runs" / "r")
    for n in (5, 50):
        config = f'{{"features": {n}, "fragments": 8}}'
        journal.write_unit(unit(f"k{n}", "e", "d", config=config), [score("m", 0, float(n), "feature")])
    journal.write_unit(unit("again", "e", "d", config=config, at="2026-03-02"), [score("m", 0, 51.0, "feature")])
    Writer(tmp_path / "e.duckdb").ingest(journal)
    with open_results(tmp_path / "e.duckdb") as results:
        table = results.table("e")
    assert list(zip(table["config"], table["mean"], strict=True)) == [("features=5", 5.0), ("features=50", 51.0)]


def test_the_latest_run_answers_unless_another_is_named(folder):
    write_run(folder, "paper-later", day=5, shift=0.5)
    write_run(folder, "other-run", day=3, shift=0.25)
    rebuild(folder, folder / "evalkit.duckdb")
    with open_results(folder / "evalkit.duckdb") as results:

        def mean(run=None):
            return row(results.table("reconstruction", run), dictionary="topk", metric="fvu")["mean"]

        assert mean() == pytest.approx(0.8125)
        assert mean("paper") == pytest.approx(0.8125)
        assert mean("other-run") == pytest.approx(0.5625)
        assert mean(RUN) == pytest.approx(0.3125)
        assert list(results.runs()["run_id"]) == ["paper-later", "other-run", RUN]
        with pytest.raises(UsageError, match="'papre' is not") as caught:
            mean("papre")
    assert "did you mean 'paper'?" in str(caught.value)


@pytest.mark.usefixtures("two_are_enough")
def test_comparison_by_hand(results):
    got = results.compare("topk", "pca")
    assert list(got.columns) == COMPARE_COLUMNS
    fvu = row(got, metric="fvu")
    # the three windows both have: (.1 + .2 + .6) / 4 against (.3 + .4 + 1.0) / 4; every pair differs by .2
    assert (fvu["mean_a"], fvu["mean_b"]) == pytest.approx((0.225, 0.425))
    assert (fvu["difference"], fvu["low"], fvu["high"]) == pytest.approx((-0.2, -0.2, -0.2))
    assert (fvu["n_a"], fvu["n_b"], fvu["paired"]) == (3, 3, True)
    assert fvu["p"] == pytest.approx(2 / 2**2)  # two documents
    assert fvu["better"] == "L0 not measured"
    log = row(got, metric="perplexity")
    assert log["difference"] == pytest.approx(-2.0)
    assert "before exp" in log["note"]
    own = row(got, metric="score")
    assert (own["mean_a"], own["mean_b"], own["difference"]) == pytest.approx((0.5, 0.15, 0.35))
    assert (own["n_a"], own["n_b"], own["paired"]) == (4, 2, False)
    assert own["p"] == pytest.approx(2 / 15)
    dead = row(got, metric="dead")
    assert (dead["difference"], dead["better"]) == (0.0, "descriptive")
    assert math.isnan(dead["p"])
    assert "shuffled" not in set(got["metric"])
    assert got["p_holm"].isna().all()


def of_documents(folder, count):
    """Results of two dictionaries on two windows of each of so many documents, with a null of one feature less."""
    journal = Journal(folder / "runs" / "r")
    journal.write_rows("metrics", [{**METRICS[3], "evaluation": "e", "evaluation_version": 1}])
    for name, shift in (("a", 0.5), ("b", 0.0)):
        scores = [score("score", i, shift + i / 10, "window", cluster=i // 2) for i in range(2 * count)]
        scores += [score("shuffled", i, 0.1 * i, "feature") for i in range(count - 1)]
        journal.write_unit(unit(f"k-{name}", "e", name), scores)
    measured_l0(journal, a=8, b=8)
    Writer(folder / "e.duckdb").ingest(journal)
    return open_results(folder / "e.duckdb")


def test_no_interval_and_no_p_from_fewer_than_six_groups(tmp_path):
    """Ten windows of five documents are five groups, however many windows they are."""
    ends, few = ["low", "high"], "fewer than 6 independent groups"
    with of_documents(tmp_path / "five", 5) as results:
        table, difference = row(results.table("e"), dictionary="a", metric="score"), results.compare("a", "b").iloc[0]
    assert (table["n"], table["clusters"], table["no_interval"]) == (10, 5, few) and table["mean"] == pytest.approx(0.95)
    assert table[[*ends, "null_low", "null_high"]].isna().all() and table["null_mean"] == pytest.approx(0.15)
    assert (difference["n_a"], difference["clusters"], difference["no_interval"]) == (10, 5, few)
    assert difference[[*ends, "p", "p_holm"]].isna().all() and difference["difference"] == pytest.approx(0.5)
    assert difference["better"] == "no difference shown"
    with of_documents(tmp_path / "six", 6) as results:
        table, difference = row(results.table("e"), dictionary="a", metric="score"), results.compare("a", "b").iloc[0]
    want = weighted_mean_interval([0.5 + i / 10 for i in range(12)], clusters=[i // 2 for i in range(12)])
    assert tuple(table[ends]) == pytest.approx((want.low, want.high)) and table["null_mean"] == pytest.approx(0.2)
    assert table[["null_low", "null_high"]].isna().all() and table["no_interval"] == f"null: {few}"
    assert (difference["clusters"], difference["no_interval"], difference["better"]) == (6, "", "a")
    assert tuple(difference[ends]) == pytest.approx((0.5, 0.5)) and difference["p"] == pytest.approx(2 / 2**6)


def test_independent_sides_count_the_one_of_fewer_groups(tmp_path):
    journal = Journal(tmp_path / "runs" / "r")
    for name, count in (("a", 5), ("b", 40)):
        journal.write_unit(unit(f"k-{name}", "e", name), [score("m", i, i / 7, "feature") for i in range(count)])
    Writer(tmp_path / "e.duckdb").ingest(journal)
    with open_results(tmp_path / "e.duckdb") as results:
        got = results.compare("a", "b").iloc[0]
    assert (
        (bool(got["paired"]), got["clusters"], got["n_b"]) == (False, 5, 40) and math.isnan(got["low"]) and math.isnan(got["p"])
    )


@pytest.mark.parametrize(("way", "verdict"), [("higher", "a"), ("lower", "b"), ("neither", "differs")])
def test_direction_of_better(tmp_path, way, verdict):
    journal = Journal(tmp_path / "runs" / "r")
    journal.write_rows("metrics", [{**METRICS[0], "evaluation": "e", "metric": "m", "better": way}])
    for name, more in (("a", 1.0), ("b", 0.0)):
        journal.write_unit(unit(f"k-{name}", "e", name), [score("m", i, i + more, "window") for i in range(30)])
    measured_l0(journal, a=8, b=8)
    Writer(tmp_path / "e.duckdb").ingest(journal)
    with open_results(tmp_path / "e.duckdb") as results:
        got = results.compare("a", "b").iloc[0]
        other = results.compare("b", "a").iloc[0]
    assert (got["p"], got["difference"], got["better"]) == (pytest.approx(P_SMALLEST), 1.0, verdict)
    assert (other["difference"], other["better"]) == (-1.0, {"a": "b", "b": "a"}.get(verdict, verdict))


@pytest.mark.usefixtures("two_are_enough")
def test_a_real_tie_is_no_difference(tmp_path):
    journal = Journal(tmp_path / "runs" / "r")
    for name, values in (("a", [1.0, 2.0, 3.0, 4.0]), ("b", [2.0, 1.0, 4.0, 3.0])):
        journal.write_unit(unit(f"k-{name}", "e", name), [score("m", i, v, "window") for i, v in enumerate(values)])
    measured_l0(journal, a=8, b=8)
    Writer(tmp_path / "e.duckdb").ingest(journal)
    with open_results(tmp_path / "e.duckdb") as results:
        got = results.compare("a", "b").iloc[0]
    assert (got["difference"], got["better"], got["paired"]) == (0.0, "no difference shown", True)
    assert got["low"] < 0 < got["high"]
    assert got["p"] > 0.5


@pytest.mark.usefixtures("two_are_enough")
def test_runs_pair_windows_of_one_text_and_features_of_one_dictionary(folder):
    write_run(folder, "same-text", day=2, shift=0.1)
    write_run(folder, "other-text", day=3, suite=SUITE.replace("held-out", "fresh"))
    rebuild(folder, folder / "evalkit.duckdb")
    with open_results(folder / "evalkit.duckdb") as results:
        same = results.compare(f"{RUN}:topk", "same-text:topk")
        other = results.compare(f"{RUN}:topk", "topk")
        runs = results.compare(RUN, "same-text", "reconstruction")
    assert bool(row(same, metric="fvu")["paired"])
    assert row(same, metric="fvu")["difference"] == pytest.approx(-0.1)
    assert bool(row(same, metric="score")["paired"])
    assert row(same, metric="score")["p"] == 1.0
    assert not row(other, metric="fvu")["paired"]
    assert bool(row(other, metric="score")["paired"])
    assert list(dict.fromkeys(runs["a"])) == [f"{RUN}:topk", f"{RUN}:pca"]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda r: r.table("autointrep"), "did you mean 'autointerp'?"),
        (lambda r: r.compare("topk", "pcaa"), "did you mean 'pca'?"),
        (lambda r: r.compare("topk", "papre-x:pca"), "known: paper"),
        (lambda r: r.compare("topk", "paper:pcb"), "did you mean 'pca'?"),
        (lambda r: r.compare("topk", "pca", "reconstrucion"), "did you mean 'reconstruction'?"),
        (lambda r: r.compare("topk", "topk"), "same dictionary"),
        (lambda r: r.compare("topk", "ica"), "in common"),
        (lambda r: r.evaluations("papr"), "did you mean 'paper'?"),
        (lambda r: r.sql("SELECT * FROM unitz"), "units"),
        (lambda r: r.sql("DELETE FROM units"), "read-only"),
    ],
)
def test_wrong_questions_get_helpful_answers(results, ask, words):
    with pytest.raises(UsageError) as caught:
        ask(results)
    assert words in str(caught.value)


def test_lists(results):
    assert results.evaluations() == results.evaluations("paper") == ["reconstruction", "autointerp"]
    runs = results.runs().iloc[0]
    assert (runs["status"], runs["units_done"], runs["units_failed"]) == ("partial", 4, 1)
    assert set(results.dictionaries()["names"]) == {"topk", "pca"}
    costs = results.costs()
    assert list(zip(costs["purpose"], costs["calls"], costs["failed"], strict=True)) == [("explain", 3, 0), ("simulate", 1, 1)]
    assert (costs["prompt_tokens"].sum(), costs["dollars"].sum()) == (400, 1.0)
    failures = results.failures()
    found = {(what, name): n for what, name, n in zip(failures["what"], failures["dictionary"], failures["failed"], strict=True)}
    assert found[("unit", "ica")] == 1
    assert found[("explanation", "topk")] == 1
    assert found[("score: fvu", "pca")] == 1
    assert found[("score: score", "topk")] == 1
    assert "judge call: simulate" in set(failures["what"])
    assert "the judge went away" in set(failures["error"])


def test_sql_views_agree_with_python(results):
    macro = results.sql("SELECT * FROM compare('topk', 'pca')")
    fvu = row(macro, metric="fvu")
    assert (fvu["mean_a"], fvu["mean_b"], fvu["n_a"], fvu["n_b"], fvu["n_pairs"]) == pytest.approx((0.3125, 0.425, 4, 3, 3))
    assert fvu["paired_difference"] == pytest.approx(-0.2)
    covered = results.sql("SELECT ok, failed, undefined FROM coverage WHERE dictionary = ? AND metric = ?", ["topk", "score"])
    assert covered.iloc[0].tolist() == [4, 1, 1]
    assert len(results.sql("SELECT * FROM latest_units WHERE status = 'done'")) == 4


def test_a_held_file_is_read_from_its_journals(folder):
    path = folder / "evalkit.duckdb"
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"held\n"
        with open_results(path, wait=0.1) as results:
            assert f"process {child.pid}" in results.note
            assert "read from the 1 journals" in results.note
            assert row(results.table("reconstruction"), dictionary="topk", metric="fvu")["mean"] == pytest.approx(0.3125)
    finally:
        child.communicate()


def test_an_open_reader_does_not_hold_up_a_writer(folder, results):
    assert results.note == ""
    results.table("reconstruction")
    journal = Journal(folder / "runs" / RUN)
    journal.write_rows("judge_calls", [{"call_key": "more", "purpose": "explain"}])
    assert Writer(folder / "evalkit.duckdb", wait=0.1).ingest(journal) == 1
    assert results.costs()["calls"].sum() == 5


def test_a_file_of_older_layout_is_read_from_its_journals(folder):
    path = folder / "old.duckdb"
    connection = connect(path)
    connection.execute("CREATE TABLE schema_version (version BIGINT); INSERT INTO schema_version VALUES (1)")
    connection.execute(migrations()[0].sql)
    connection.close()
    with open_results(path) as results:
        assert "older" in results.note
        assert len(results.table("autointerp")) == 6


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(StoreUnreadable, match="no results file") as caught:
        open_results(tmp_path / "evalkit.duckdb")
    assert "evalkit run SUITE" in str(caught.value)
    assert caught.value.exit_code == 5
    (tmp_path / "evalkit.duckdb").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreUnreadable, match="cannot be opened") as caught:
        open_results(tmp_path / "evalkit.duckdb")
    assert "evalkit rebuild" in str(caught.value)


def test_an_empty_file_has_nothing_to_show(tmp_path):
    rebuild(tmp_path, tmp_path / "evalkit.duckdb")
    with open_results(tmp_path / "evalkit.duckdb") as results:
        assert results.evaluations() == []
        assert results.runs().empty
        for ask in (lambda: results.table("autointerp"), lambda: results.compare("a", "b")):
            with pytest.raises(UsageError, match="yet"):
                ask()


def test_two_versions_of_an_evaluation_in_one_file_give_each_metric_one_row(folder):
    newer = [{**metric, "evaluation_version": 9} for metric in METRICS]
    journal = Journal(folder / "runs" / "later-1")
    journal.write_rows("runs", [{"suite": "later", "evalkit_version": "0", "status": "started", "at": "2026-04-01"}])
    journal.write_rows("metrics", newer)
    journal.write_unit(unit("later-r", "reconstruction", "topk", evaluation_version=9), [score("fvu", 0, 0.5, "window")])
    rebuild(folder, folder / "evalkit.duckdb")
    with open_results(folder / "evalkit.duckdb") as opened:
        assert opened.table("reconstruction", "later-1")["metric"].tolist() == ["fvu"]
        assert not opened.table("reconstruction", RUN).duplicated(["dictionary", "metric"]).any()


def test_a_deleted_file_is_read_from_its_journals(folder):
    path = folder / "evalkit.duckdb"
    path.unlink()
    with open_results(path) as results:
        assert "there is no results file; read from the 1 journals" in results.note
        assert row(results.table("reconstruction"), dictionary="topk", metric="fvu")["mean"] == pytest.approx(0.3125)
    shutil.rmtree(folder / "runs")
    (folder / "evalkti.duckdb").touch()
    with pytest.raises(StoreAbsent) as caught:
        open_results(path)
    assert caught.value.exit_code == 5 and "evalkti.duckdb" in caught.value.fix and "evalkit run" in caught.value.fix


@pytest.mark.parametrize("ask", ["report", "sql", "table"])
def test_a_file_damaged_inside_is_said_to_be_so(folder, ask, capsys):
    """The first blocks of the file are whole, so that it opens; what is asked for lies behind them."""
    path = folder / "evalkit.duckdb"
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size // 2)
        handle.seek(3 * 4096)
        handle.write(b"\xff" * (path.stat().st_size - 3 * 4096))
    words = {"report": ["report", "-o", folder / "page.html"], "table": ["table", "reconstruction"]}
    if ask == "sql":
        with pytest.raises(StoreUnreadable) as caught, open_results(path) as results:
            results.sql("SELECT count(*) FROM scores")
        assert "evalkit rebuild" in caught.value.fix
        return
    assert main([str(word) for word in [*words[ask], "--results", path]]) == 5
    assert "evalkit rebuild" in capsys.readouterr().err


def test_lists_with_missing_values_are_plain(folder):
    with open_results(folder / "evalkit.duckdb") as results, warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = results.sql("SELECT [1.5, NULL]::DOUBLE[] AS d, [1, NULL]::BIGINT[] AS i, ['a', NULL] AS t, [2.0] AS whole")
        numbers, counts, texts, whole = (list(frame[column].iloc[0]) for column in frame)
        assert numbers[0] == 1.5 and math.isnan(float(numbers[1]))
    assert (counts, texts, whole) == ([1, None], ["a", None], [2.0])
