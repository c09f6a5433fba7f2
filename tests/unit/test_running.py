"""A suite end to end on a tiny model: resume, reuse, partial failures, exit codes."""

import math

import pytest
from disk_case import largest_file
from suite_case import tiny_suite

import evalkit
from evalkit.errors import BudgetReached, DictionaryError, EvalkitError, ModelError, UnitFailed, UsageError
from evalkit.judges.base import JUDGES
from evalkit.judges.scripted import ScriptedJudge
from evalkit.report.tables import paper_table
from evalkit.runs import run as running
from evalkit.runs.run import finished_units, make_plan, run
from evalkit.store.journal import Journal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("suite")


@pytest.fixture
def judges(monkeypatch):
    """Replaces the scripted provider by one the test can look at and script."""
    made = []
    script = {}

    def factory(config, folder, progress):
        made.append(ScriptedJudge(**script))
        return made[-1]

    JUDGES.names()
    monkeypatch.setitem(JUDGES._items, "scripted", factory)
    return made, script


def asked(made):
    return sum(len(judge.explained) + len(judge.simulated) for judge in made)


def test_a_suite_gives_tables_comparisons_and_a_second_run_that_does_nothing(home, tmp_path, judges):
    made, _ = judges
    suite, store = tiny_suite(home), tmp_path / "out" / "evalkit.duckdb"
    first = run(suite, store)
    assert (first.status, first.exit_code, first.done, first.reused, first.failed) == ("done", 0, 4, 0, 0)
    before = asked(made)
    with evalkit.open_results(store) as results:
        table = results.table("autointerp")
        assert set(table.dictionary) == {"SAE", "neurons"}
        main = table[table.metric == "above_null"]
        assert (main.n + main.failed + main.undefined == 4).all()
        assert (main.chance == 0).all()
        reconstruction = results.table("reconstruction").set_index(["dictionary", "metric"])["mean"]
        # k = 4 codes a token unless fewer are positive
        assert 3.5 <= reconstruction["SAE", "l0"] <= 4
        assert 0 < reconstruction["SAE", "fvu"] < 1
        assert reconstruction["SAE", "explained_variance"] == pytest.approx(1 - reconstruction["SAE", "fvu"])
        difference = results.compare("SAE", "neurons", "reconstruction").set_index("metric").loc["fvu"]
        expected = reconstruction["SAE", "fvu"] - reconstruction["neurons", "fvu"]
        assert abs(difference.difference) == pytest.approx(abs(expected))
        assert difference.paired
        assert len(results.failures()) == 0
        texts = results.sql("SELECT * FROM texts ORDER BY side").to_dict("records")
        assert [row["side"] for row in texts] == ["fit", "score"]
        for row in texts:
            windows = row["tokens"] // 32
            assert (row["asked"], row["bos"], row["left_bos"], row["left_first"]) == (3000, "<end>", windows, windows)
            assert row["kept"] == row["tokens"] - 2 * windows and row["left_massive"] == row["too_short"] == 0
    second = run(suite, store)
    assert (second.done, second.reused) == (0, 4)
    assert asked(made) == before
    assert all(p.done for p in make_plan(suite, store).units)


def test_another_results_folder_gives_the_same_numbers(home, tmp_path, judges):
    frames = []
    for name in ("one", "two"):
        run(tiny_suite(home), tmp_path / name / "evalkit.duckdb")
        with evalkit.open_results(tmp_path / name / "evalkit.duckdb") as results:
            for evaluation in ("autointerp", "reconstruction"):
                frames.append(results.table(evaluation)[["dictionary", "metric", "mean", "low", "high", "n"]])
    for a, b in zip(frames[:2], frames[2:], strict=True):
        assert a.equals(b)


def test_a_failed_unit_is_recorded_and_the_others_go_on(home, tmp_path, judges):
    suite, store = tiny_suite(home), tmp_path / "evalkit.duckdb"
    text = suite.read_text().replace("fragments = 2", "fragments = 24")
    suite = tmp_path / "many.toml"
    suite.write_text(text)
    outcome = run(suite, store)
    assert (outcome.status, outcome.exit_code, outcome.done, outcome.failed) == ("partial", 4, 2, 2)
    assert "evalkit run" in outcome.message
    with evalkit.open_results(store) as results:
        assert "active in 96 windows" in results.failures().to_string()
        assert set(results.failures().evaluation) == {"autointerp"} and results.evaluations() == ["reconstruction"]


def test_a_dictionary_that_cannot_be_built_fails_alone(home, tmp_path, judges):
    suite, store = tmp_path / "diverging.toml", tmp_path / "evalkit.duckdb"
    suite.write_text(tiny_suite(home).read_text().replace("batch = 256", "batch = 256, lr = 1e38"))
    outcome = run(suite, store)
    assert (outcome.status, outcome.exit_code, outcome.done, outcome.failed) == ("partial", 4, 2, 2)
    with evalkit.open_results(store) as results:
        assert set(results.failures().dictionary) == {"SAE"}
        assert "neurons" in set(results.table("autointerp").dictionary)


def test_a_reference_judge_has_a_column_of_its_own_and_its_own_calls(home, tmp_path, judges):
    suite, store = tmp_path / "second.toml", tmp_path / "evalkit.duckdb"
    suite.write_text(tiny_suite(home).read_text() + '\n[[reference]]\nprovider = "scripted"\nmodel = "second"\n')
    assert run(suite, store, only="autointerp").status == "done"
    with evalkit.open_results(store) as results:
        table = results.table("autointerp").set_index(["dictionary", "metric"])
        assert table.title["SAE", "scripted:second"] == "scripted:second r"
        # the fake answers alike whoever it is
        assert table["mean"]["SAE", "scripted:second"] == table["mean"]["SAE", "top_and_random"]
        assert "scripted:second r" in paper_table(results.table("autointerp"))


def test_removing_one_run_leaves_the_numbers_of_the_others(home, tmp_path, judges):
    import shutil

    suite, store = tiny_suite(home), tmp_path / "evalkit.duckdb"
    first = run(suite, store)
    changed = tmp_path / "changed.toml"
    changed.write_text(suite.read_text().replace("null_fragments = 1", "null_fragments = 2"))
    second = run(changed, store)
    shutil.rmtree(tmp_path / "runs" / second.run_id)
    again = run(changed, store)
    assert again.status == "done"
    with evalkit.open_results(store) as results:
        for run_id in (first.run_id, again.run_id):
            table = results.table("reconstruction", run_id)
            # ablating a random model need not raise its cross-entropy: then the loss recovered is undefined, and counted
            assert (table.n + table.undefined > 0).all()
    # and where the run that measured is gone, what others took over from it is measured again
    shutil.rmtree(tmp_path / "runs" / first.run_id)
    store.unlink()
    healed = run(changed, store)
    assert healed.done == 2
    with evalkit.open_results(store) as results:
        table = results.table("reconstruction", healed.run_id)
        assert (table.n + table.undefined > 0).all()


def test_a_fresh_run_that_was_stopped_goes_on(home, tmp_path, judges):
    suite, store = tiny_suite(home), tmp_path / "evalkit.duckdb"
    run(suite, store)
    part = run(suite, store, fresh=True, limit=1)
    assert "--fresh" in part.message
    rest = run(suite, store, fresh=True)
    assert (rest.run_id, rest.done, rest.reused) == (part.run_id, 3, 1)


def test_budgets_and_time_outs_do_not_make_another_run(home, tmp_path):
    from evalkit.runs.run import suite_hash
    from evalkit.suite import load_suite

    path = tiny_suite(home)
    plain, other = tmp_path / "plain.toml", tmp_path / "other.toml"
    plain.write_text(path.read_text())
    other.write_text(
        path.read_text().replace('provider = "scripted"', 'provider = "scripted"\nbudget_tokens = 5\ntimeout_s = 1.0')
    )
    assert suite_hash(load_suite(plain)) == suite_hash(load_suite(other))
    other.write_text(path.read_text().replace("seed = 0", "seed = 1") + "# a comment")
    plain.write_text("# another comment\n" + path.read_text())
    assert suite_hash(load_suite(plain)) == suite_hash(load_suite(path))


def test_failed_calls_are_counted_missing_values(home, tmp_path, judges):
    _, script = judges
    calls = iter(range(10_000))
    script["simulate"] = lambda task: None if next(calls) % 7 == 0 else [float(len(t)) for t in task.tokens]
    outcome = run(tiny_suite(home), tmp_path / "evalkit.duckdb", only="autointerp")
    assert (outcome.status, outcome.exit_code) == ("partial", 4)
    assert "miss scores" in outcome.message
    with evalkit.open_results(tmp_path / "evalkit.duckdb") as results:
        table = results.table("autointerp")
        main = table[table.metric == "above_null"]
        assert main.failed.sum() > 0
        assert (main.n + main.failed + main.undefined == 4).all()
        raw = results.sql("SELECT value FROM scores WHERE status = 'failed'")
        assert raw.value.isna().all()
    # the judge is well again: the same command measures what misses scores, and the table shows the later try
    script["simulate"] = lambda task: [float(len(t)) for t in task.tokens]
    again = run(tiny_suite(home), tmp_path / "evalkit.duckdb", only="autointerp")
    assert (again.status, again.exit_code) == ("done", 0)
    with evalkit.open_results(tmp_path / "evalkit.duckdb") as results:
        table = results.table("autointerp")
        assert table[table.metric == "top_and_random"].failed.sum() == 0
    assert run(tiny_suite(home), tmp_path / "evalkit.duckdb", only="autointerp").done == 0


def test_a_spent_budget_ends_the_run_with_3_and_keeps_the_rest(home, tmp_path, judges):
    _, script = judges
    script["explain"] = lambda task: BudgetReached("the budget of 10 tokens is spent")
    outcome = run(tiny_suite(home), tmp_path / "evalkit.duckdb")
    assert (outcome.status, outcome.exit_code, outcome.done) == ("budget", 3, 2)
    assert "go on with" in outcome.message
    script.clear()
    again = run(tiny_suite(home), tmp_path / "evalkit.duckdb")
    assert (again.status, again.done, again.reused) == ("done", 2, 2)


def test_an_interrupt_ends_the_run_with_130(home, tmp_path, judges):
    _, script = judges

    def interrupt(task):
        raise KeyboardInterrupt

    script["explain"] = interrupt
    outcome = run(tiny_suite(home), tmp_path / "evalkit.duckdb")
    assert (outcome.exit_code, outcome.done) == (130, 2)
    with evalkit.open_results(tmp_path / "evalkit.duckdb") as results:
        assert results.runs().iloc[-1].status == "interrupted"


def test_limit_only_and_fresh(home, tmp_path, judges):
    suite, store = tiny_suite(home), tmp_path / "evalkit.duckdb"
    assert run(suite, store, limit=1).done == 1
    assert run(suite, store, only="reconstruction").done == 1
    fresh = run(suite, store, only="neurons", fresh=True)
    assert fresh.run_id.endswith("-2")
    assert fresh.done == 2
    assert len(finished_units(tmp_path)) == 4
    with pytest.raises(UsageError) as caught:
        run(suite, store, only="recnstruction")
    assert "did you mean 'reconstruction'?" in caught.value.fix


def test_a_changed_setting_is_another_run_that_takes_over_what_did_not_change(home, tmp_path, judges):
    suite, store = tiny_suite(home), tmp_path / "evalkit.duckdb"
    first = run(suite, store)
    changed = tmp_path / "changed.toml"
    changed.write_text(suite.read_text().replace("null_fragments = 1", "null_fragments = 2"))
    second = run(changed, store)
    assert second.run_id != first.run_id
    assert (second.done, second.reused) == (2, 2)
    with evalkit.open_results(store) as results:
        assert set(results.table("reconstruction", second.run_id).dictionary) == {"SAE", "neurons"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("blocks.0.hook_resid_post", "blocks.0.hook_resid_pots", "blocks.0.hook_resid_post"),
        ("blocks.0.hook_resid_post", "blocks.9.hook_resid_post", "blocks"),
        ("/model", "/no-model", "no-model"),
        ("folder:", "folder:/nowhere", "nowhere"),
        ("fragment = 10", "fragment = 40", "does not fit into a window of 32"),
        ("context = 32", "context = 3000", "longer than the 2048 the model can read"),
        ("norm_multiple = 0", "norm_multiple = inf", "not a number"),
    ],
)
def test_wrong_input_starts_nothing(home, tmp_path, judges, old, new, words):
    suite = tmp_path / "wrong.toml"
    suite.write_text(tiny_suite(home).read_text().replace(old, new))
    with pytest.raises(EvalkitError) as caught:
        run(suite, tmp_path / "out" / "evalkit.duckdb")
    assert caught.value.exit_code == 2
    assert words in str(caught.value)
    assert not list(tmp_path.glob("out/runs/*"))


def test_no_key_starts_nothing(home, tmp_path, monkeypatch):
    monkeypatch.delenv("EVALKIT_TEST_KEY", raising=False)
    judge = 'provider = "openai"\nmodel = "m"\napi_key_env = "EVALKIT_TEST_KEY"'
    suite = tmp_path / "nokey.toml"
    suite.write_text(tiny_suite(home, judge=judge).read_text())
    with pytest.raises(EvalkitError, match="EVALKIT_TEST_KEY") as caught:
        run(suite, tmp_path / "out" / "evalkit.duckdb")
    assert caught.value.exit_code == 2
    assert not list(tmp_path.glob("out/runs/*"))


def test_the_store_can_be_rebuilt_from_the_journals(home, tmp_path, judges):
    from evalkit.store.writer import rebuild

    store = tmp_path / "evalkit.duckdb"
    run(tiny_suite(home), store)
    with evalkit.open_results(store) as results:
        before = results.table("autointerp")
    store.write_bytes(b"not a database")
    with pytest.raises(EvalkitError) as caught:
        run(tiny_suite(home), store)
    assert caught.value.exit_code == 5
    rebuild(tmp_path, store)
    with evalkit.open_results(store) as results:
        after = results.table("autointerp")
    assert before.equals(after)


def test_rows_hold_what_a_score_was_made_of(home, tmp_path, judges):
    import numpy as np

    run(tiny_suite(home), tmp_path / "evalkit.duckdb", only="neurons")
    with evalkit.open_results(tmp_path / "evalkit.duckdb") as results:
        rows = results.sql(
            "SELECT feature, actual, predicted FROM predictions WHERE explained_by = 'own' AND judge = 'scripted' "
            "ORDER BY feature, fragment"
        )
        scores = results.sql("SELECT item, value, status FROM scores WHERE metric = 'top_and_random'").set_index("item")
    recomputed = 0
    for feature, part in rows.groupby("feature"):
        pairs = [
            (a, p)
            for actual, predicted in zip(part.actual, part.predicted, strict=True)
            for a, p in zip(actual, predicted, strict=True)
            if a is not None and not math.isnan(a)
        ]
        if scores.loc[feature, "status"] == "ok":
            recomputed += 1
            assert np.corrcoef(np.array(pairs, dtype=float).T)[0, 1] == pytest.approx(scores.loc[feature, "value"])
    assert recomputed


def test_load_model_takes_a_folder_and_names_what_is_missing(home, tmp_path):
    tiny_suite(home)
    assert evalkit.load_model(str(home / "model")).d_model == 32
    with pytest.raises(ModelError):
        evalkit.load_model(str(tmp_path / "nothing"))


def test_the_journal_is_one_record_a_unit(home, tmp_path, judges):
    outcome = run(tiny_suite(home), tmp_path / "evalkit.duckdb")
    journal = Journal(tmp_path / "runs" / outcome.run_id)
    assert len([r for r in journal.records() if "unit" in r]) == 4


def deep(task):
    return deep(task)


class Holding(RuntimeError):
    """As an accelerator that is out of memory says it, over several lines."""


def test_several_reasons_for_failed_units_are_each_named_once_the_most_frequent_first():
    failures = [UnitFailed("rare"), *[UnitFailed("often", where="a")] * 3, *(UnitFailed(f"reason {n}") for n in range(6))]
    said = running.reasons(failures, 20).splitlines()
    assert said[:2] == ["10 of 20 units failed:", "  3: often"] and said[-1] == "  and 3 other reasons: evalkit show failures"


def noted():
    error = ValueError("with a note")
    error.add_note("")
    return error


CRASHES = {
    "ValueError: half of ?": lambda task: ValueError("half of \ud83d"),
    "ValueError: with a note": lambda task: noted(),
    "ZeroDivisionError: division by zero": lambda task: 1 / 0,
    "KeyError: 'no such word'": lambda task: {}["no such word"],
    "MemoryError": lambda task: MemoryError(),
    "RecursionError": deep,
    "Holding: out of memory": lambda task: Holding("out of memory\nTried to allocate 3.00 GiB"),
    "DictionaryError": lambda task: DictionaryError("the codes do not fit", where="here", fix="other codes"),
}


@pytest.mark.parametrize("words", CRASHES)
def test_any_exception_in_one_unit_is_its_failure_and_the_others_go_on(home, tmp_path, judges, words):
    _, script = judges
    store, asked_of = tmp_path / "evalkit.duckdb", []

    def explain(task):
        asked_of.append(task)
        if len(asked_of) > 1:
            return "the token 'a'"
        error = CRASHES[words](task)
        raise error

    script["explain"] = explain
    outcome = run(tiny_suite(home), store)
    assert (outcome.status, outcome.exit_code, outcome.done, outcome.failed) == ("partial", 4, 3, 1)
    assert "1 of 4 units failed" in outcome.message, "the reason stands in the last words, --quiet or not"
    assert (words if words != "DictionaryError" else "the codes do not fit") in outcome.message.splitlines()[0]
    with evalkit.open_results(store) as results:
        (failure,) = results.failures().itertuples()
        assert (failure.what, failure.evaluation, failure.dictionary) == ("unit", "autointerp", "SAE")
        assert (words if words != "DictionaryError" else "the codes do not fit") in failure.error.splitlines()[0]
        if words != "DictionaryError":
            assert "test_running.py" in failure.error and len(failure.error) < 1500
        assert "neurons" in set(results.table("autointerp").dictionary)
        assert results.runs().iloc[-1].status == "partial"
    again = run(tiny_suite(home), store)
    assert (again.status, again.done, again.reused) == ("done", 1, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high"])
def test_a_score_that_is_no_number_fails_its_unit_and_never_reaches_the_journal(home, tmp_path, judges, value, monkeypatch):
    from evalkit.evaluations.base import EVALUATIONS

    kind = EVALUATIONS.get("reconstruction")
    real, store = kind.run, tmp_path / "evalkit.duckdb"

    def spoilt(self, bench, dictionary, config):
        result = real(self, bench, dictionary, config)
        if dictionary.kind != "topk":
            return result
        return result._replace(scores=[score._replace(value=value) for score in result.scores])

    with monkeypatch.context() as patched:
        patched.setattr(kind, "run", spoilt)
        outcome = run(tiny_suite(home), store, only="reconstruction")
    assert (outcome.exit_code, outcome.done, outcome.failed) == (4, 1, 1)
    with evalkit.open_results(store) as results:
        (error,) = results.failures().error
    assert "column 'value' of table 'scores' takes a finite DOUBLE" in error
    assert run(tiny_suite(home), store, only="reconstruction").done == 1


def test_a_baseline_that_cannot_be_fitted_fails_its_own_units(home, tmp_path, judges, monkeypatch):
    from evalkit.dictionaries.registry import BASELINES

    def fit(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setitem(BASELINES._items, "neurons", BASELINES.get("neurons")._replace(run=fit))
        outcome = run(tiny_suite(home), tmp_path / "evalkit.duckdb")
    assert (outcome.exit_code, outcome.done, outcome.failed) == (4, 2, 2)
    with evalkit.open_results(tmp_path / "evalkit.duckdb") as results:
        assert set(results.failures().dictionary) == {"neurons"}
    assert run(tiny_suite(home), tmp_path / "evalkit.duckdb").done == 2


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_what_ends_the_process_is_no_failed_unit(home, tmp_path, judges, end):
    _, script = judges

    def explain(task):
        raise end

    script["explain"] = explain
    if end is SystemExit:
        with pytest.raises(SystemExit):
            run(tiny_suite(home), tmp_path / "evalkit.duckdb")
    else:
        assert run(tiny_suite(home), tmp_path / "evalkit.duckdb").exit_code == 130
    journals = list(tmp_path.glob("runs/*/journal.jsonl"))
    assert '"status":"failed"' not in journals[0].read_text()


def test_a_full_disk_ends_the_run_with_5_and_keeps_what_is_finished(home, tmp_path, judges):
    _, script = judges

    def explain(task):
        raise OSError(28, "No space left on device", "/somewhere/notes.txt")

    script["explain"] = explain
    outcome = run(tiny_suite(home), tmp_path / "evalkit.duckdb")
    assert (outcome.status, outcome.exit_code, outcome.done, outcome.failed) == ("partial", 5, 2, 0)
    assert "/somewhere/notes.txt" in outcome.message and "free" in outcome.message and "evalkit run" in outcome.message
    script.clear()
    assert run(tiny_suite(home), tmp_path / "evalkit.duckdb").done == 2


def test_activations_that_do_not_fit_end_the_run_with_path_and_sizes(home, tmp_path, judges):
    suite, store = tiny_suite(home), tmp_path / "evalkit.duckdb"
    with largest_file(200_000):
        outcome = run(suite, store)
    assert (outcome.status, outcome.exit_code, outcome.done) == ("partial", 5, 0)
    assert "381 kB needed" in outcome.message and "x.npy" in outcome.message and "evalkit run" in outcome.message
    assert not list(tmp_path.glob("cache/activations/*")) + list(tmp_path.glob("cache/activations/.*"))
    assert run(suite, store).exit_code == 0
