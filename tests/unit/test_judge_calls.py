"""The durable call store, the budget, and reading digits."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from disk_case import largest_file
from hypothesis import given
from hypothesis import strategies as st

from evalkit.errors import BudgetReached, DiskFull, StoreLocked, StoreUnreadable
from evalkit.judges import sqlite_file
from evalkit.judges.calls import LEASE, CallStore, Settled, Spent
from evalkit.judges.cost import Budget, Prices, Usage, most_tokens
from evalkit.judges.digits import Slot, as_mapping, read_digits, read_slot
from evalkit.judges.tokens import visible

SPENT = Spent("simulate", "m", 10, 2, 0.5, 1.0, 1)
COLUMNS = {
    *("call_key", "purpose", "judge", "prompt_tokens", "completion_tokens", "dollars", "seconds"),
    *("attempts", "status", "error", "at", "left_out"),
}


def finish(store: CallStore, key: str, answer: dict[str, Any]) -> None:
    assert store.claim([key]).mine == [key]
    store.settle([Settled(key, SPENT, answer)])


def keys(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [row["call_key"] for row in rows]


def test_a_finished_call_is_found_after_a_restart(tmp_path: Path) -> None:
    finish(CallStore(tmp_path), "a", {"text": "días \u2028"})
    assert CallStore(tmp_path).get("a") == {"text": "días \u2028"}
    assert CallStore(tmp_path).claim(["a"]) == ({"a": {"text": "días \u2028"}}, [], [])
    assert CallStore(tmp_path).get("b") is None


def test_a_store_that_is_only_read_makes_no_file(tmp_path: Path) -> None:
    store = CallStore(tmp_path / "calls")
    assert (store.get("a"), len(store), store.drain(), list(store.rows()), store.reserved(["a"])) == (None, 0, [], [], Usage())
    assert not (tmp_path / "calls").exists()


def test_failures_are_rows_but_not_answers(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    store.claim(["a"])
    store.settle([Settled("a", SPENT, error="no")])
    again = CallStore(tmp_path)
    assert again.claim(["a"]).mine == ["a"]
    (row,) = again.drain()
    assert (row["status"], row["error"]) == ("failed", "no")


def test_rows_have_the_columns_of_the_table_and_come_once(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    store.claim(["x"])
    for key in "abc":
        finish(store, key, {})
    rows = store.drain()
    assert keys(rows) == ["a", "b", "c"]
    assert all(set(row) == COLUMNS for row in rows)
    assert {name: rows[0][name] for name in SPENT._asdict()} == SPENT._asdict()
    assert store.drain() == []
    assert CallStore(tmp_path).drain() == []
    assert keys(store.rows()) == ["a", "b", "c"]


def test_calls_of_a_killed_run_come_with_the_next_drain(tmp_path: Path) -> None:
    finish(CallStore(tmp_path), "a", {})
    assert keys(CallStore(tmp_path).drain()) == ["a"]


def test_calls_are_told_to_their_owner_alone(tmp_path: Path) -> None:
    """A run, another one that starts meanwhile, and a second judge of the first: each counts its own calls, once."""
    one = CallStore(tmp_path, "run one judge")
    finish(one, "a", {})
    two, beside = CallStore(tmp_path), CallStore(tmp_path)
    two.own("run two judge")
    beside.own("run one reference")
    assert two.drain() == beside.drain() == []
    finish(two, "b", {})
    assert keys(two.drain()) == ["b"]
    assert two.claim(["a"]).answers == {"a": {}}, "its answer serves every run all the same"
    # the first was killed: what it left waits for its own next start
    again = CallStore(tmp_path)
    again.own("run one judge")
    assert keys(again.drain()) == ["a"]
    assert CallStore(tmp_path, "run one judge").drain() == []


def test_the_calls_of_a_commit_that_a_kill_cut_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    store = CallStore(tmp_path / "calls")
    for number in range(3):
        store.claim([f"{number}{half}" for half in "ab"])
        store.settle([Settled(f"{number}{half}", SPENT, {"n": number}) for half in "ab"])
    log = store.path.with_name("calls.sqlite-wal").read_bytes()
    found = set()
    for cut in range(0, len(log) + 1, 97):
        copy = tmp_path / str(cut)
        copy.mkdir()
        (copy / "calls.sqlite").write_bytes(store.path.read_bytes())
        (copy / "calls.sqlite-wal").write_bytes(log[:cut])
        cut_store = CallStore(copy)
        there = [cut_store.get(f"{number}{half}") for number in range(3) for half in "ab"]
        whole = len(cut_store)
        assert there == [{"n": number // 2} for number in range(whole)] + [None] * (6 - whole) and whole % 2 == 0
        found.add(whole)
        cut_store.close()
    assert found >= {0, 2, 4}


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be looked at as one", b"SQLite format 3\0" * 99])
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "calls.sqlite").write_bytes(content)
    with pytest.raises(StoreUnreadable, match="cannot be read") as caught:
        CallStore(tmp_path)
    assert "move the file aside" in caught.value.fix


def test_a_database_of_something_else_or_of_a_newer_evalkit_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "calls.sqlite")) as other:
        other.execute("CREATE TABLE songs (name)")
        with pytest.raises(StoreUnreadable, match="other things"):
            CallStore(tmp_path)
        other.execute("PRAGMA user_version = 99")
        with pytest.raises(StoreUnreadable, match="newer evalkit"):
            CallStore(tmp_path)


def test_a_full_disk_is_said_with_the_place_and_loses_nothing(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    finish(store, "a", {"n": 1})
    store.claim(["b"])
    with largest_file(200_000), pytest.raises(DiskFull) as caught:
        store.settle([Settled("b", SPENT, {"text": "x" * 400_000})])
    assert caught.value.where == str(store.path)
    assert "needed" in str(caught.value)
    assert (store.get("a"), store.get("b")) == ({"n": 1}, None)
    store.settle([Settled("b", SPENT, {"n": 2})])
    assert CallStore(tmp_path).get("b") == {"n": 2}


def test_a_locked_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "WAIT_S", 0.05)
    store = CallStore(tmp_path)
    finish(store, "a", {})
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert store.get("a") == {}, "readers do not wait"
        with pytest.raises(StoreLocked, match="locked by another program") as caught:
            store.claim(["b"])
        assert caught.value.where == str(store.path)
        other.execute("ROLLBACK")
    assert store.claim(["b"]).mine == ["b"]


def test_the_second_asker_waits_for_the_first(tmp_path: Path) -> None:
    first, second = CallStore(tmp_path), CallStore(tmp_path)
    assert first.claim(["a", "b"]).mine == ["a", "b"]
    assert second.claim(["a", "c"]) == ({}, ["c"], ["a"])
    first.settle([Settled("a", SPENT, {"n": 3})])
    assert second.claim(["a", "b"]) == ({"a": {"n": 3}}, [], ["b"])


def test_a_call_that_is_given_up_is_anybodys(tmp_path: Path) -> None:
    first, second = CallStore(tmp_path), CallStore(tmp_path)
    first.claim(["a", "b"])
    first.release(["a"])
    assert second.claim(["a", "b"]) == ({}, ["a"], ["b"])
    first.release(["a"])
    assert first.claim(["a"]).others == ["a"], "only its asker gives a call up"
    first.close()
    assert second.claim(["b"]).mine == ["b"], "a store that is closed asks nothing"


def test_a_retried_call_stays_open_for_whoever_waits_for_it(tmp_path: Path) -> None:
    first, second = CallStore(tmp_path), CallStore(tmp_path)
    first.claim(["a"])
    first.settle([Settled("a", SPENT, error="x" * 10_000, again=True)])
    assert second.claim(["a"]).others == ["a"]
    (row,) = first.rows()
    assert (row["status"], len(row["error"])) == ("retried", 500)
    first.settle([Settled("a", SPENT, {"text": "b"})])
    assert second.claim(["a"]).answers == {"a": {"text": "b"}}


def test_the_calls_of_a_process_that_is_gone_give_way(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from evalkit.judges.calls import CallStore\n"
    code += "store = CallStore(Path(sys.argv[1])); store.claim(['a']); print('claimed', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    store = CallStore(tmp_path)
    assert store.claim(["a"]).others == ["a"]
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    assert store.claim(["a"]).mine == ["a"]
    process.communicate()


def test_a_call_of_another_machine_is_waited_for_no_longer_than_its_lease(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    store.claim(["a"])
    with closing(sqlite3.connect(store.path, isolation_level=None)) as file:
        file.execute("UPDATE calls SET asker = 'elsewhere 1 1 x'")
        assert CallStore(tmp_path).claim(["a"]).others == ["a"]
        file.execute("UPDATE calls SET at = ?", ((datetime.now(UTC) - 2 * LEASE).isoformat(timespec="milliseconds"),))
        assert CallStore(tmp_path).claim(["a"]).mine == ["a"]


def test_the_first_of_two_answers_stays(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    for number in (1, 2):
        store.settle([Settled("a", SPENT, {"n": number})])
    assert store.get("a") == {"n": 1}
    assert [row["status"] for row in store.rows()] == ["ok", "ok"]


def test_memory_holds_no_answers(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    finish(store, "a", {"text": "needle" * 50})
    assert "needle" not in repr(vars(store))


def test_an_answer_that_is_no_number_is_refused(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        store.settle([Settled("a", SPENT, {"n": math.nan})])
    assert len(store) == 0


def test_the_budget_refuses_what_would_not_fit() -> None:
    budget = Budget(tokens=100)
    budget.reserve(Usage(60, 0))
    with pytest.raises(BudgetReached, match="raise budget_tokens|0 of 100"):
        budget.reserve(Usage(40, 1))
    budget.settle(Usage(60, 0), Usage(20, 10))
    budget.reserve(Usage(60, 10))
    assert budget.spent == Usage(20, 10)


def test_the_budget_in_dollars() -> None:
    budget = Budget(dollars=0.01, prices=Prices(1.0, 10.0))
    budget.reserve(Usage(5000, 400))
    budget.settle(Usage(5000, 400), Usage(5000, 400))  # 0.005 + 0.004
    with pytest.raises(BudgetReached, match="0.0090 of 0.0100"):
        budget.reserve(Usage(0, 101))
    budget.reserve(Usage(0, 99))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=30))
def test_settled_spending_never_exceeds_the_budget(calls: list[tuple[int, int]]) -> None:
    budget = Budget(tokens=200)
    for prompt, completion in calls:
        try:
            budget.reserve(Usage(prompt, completion))
        except BudgetReached:
            continue
        budget.settle(Usage(prompt, completion), Usage(prompt // 2, completion))
        assert budget.spent.total <= 200


def test_token_estimates() -> None:
    assert most_tokens("the\tunknown\n") >= 4
    assert most_tokens("日本語") >= 3


def test_expected_activation_is_the_mean_of_the_digits() -> None:
    slot = read_slot({"0": math.log(0.2), " 9": math.log(0.1), "9": math.log(0.1), "unknown": math.log(0.5)})
    assert slot.mass == pytest.approx(0.4)
    assert slot.expected == pytest.approx(10 * 0.5)  # half of the digits' probability on 9, the top of the scale
    assert slot.unseen == pytest.approx(0.1)  # what the alternatives leave over


def logs(**probabilities: float) -> dict[str, float]:
    return {token.strip("_"): math.log(p) for token, p in probabilities.items()}


def test_a_slot_without_digits_has_no_expectation_and_bounds_what_they_can_have() -> None:
    slot = read_slot(logs(unknown=0.6, x=0.3, y=0.002, z=0.001))
    assert slot == Slot(None, 0.0, pytest.approx(10 * 2 * 0.002))  # none likelier than all alternatives but one
    assert read_slot(logs(unknown=0.6, x=0.399, y=0.0005, z=0.0001)).unseen == pytest.approx(0.0004)  # what is left over is less
    assert read_slot({}) == Slot(None, 0.0, 1.0)


def test_digits_that_are_less_probable_than_those_unseen_could_be_say_nothing() -> None:
    tail = logs(_9=0.0001, unknown=0.9, x=0.05, y=0.01, z=0.01)
    assert read_slot(tail) == Slot(None, pytest.approx(0.0001), pytest.approx(1 - 0.9701))
    every = tail | logs(**{f"_{digit}": 0.0001 for digit in range(9)})
    assert read_slot(every) == Slot(pytest.approx(5.0), pytest.approx(0.001), 0.0)  # small, but all of it is there
    assert read_slot({"9": -30.0}).expected is None


@given(st.lists(st.floats(-12, 3), min_size=40, max_size=40), st.integers(1, 39), st.integers(0, 39))
def test_the_bound_holds_whatever_the_alternatives_are(logits: list[float], listed: int, prompts_own: int) -> None:
    """20 of 40 tokens are digits in both spellings; the likeliest are listed, and the token of the prompt."""
    total = math.fsum(math.exp(x) for x in logits)
    names = [f"{space}{digit}" for space in ("", " ") for digit in range(10)] + [f"w{n}" for n in range(20)]
    known = {name: x - math.log(total) for name, x in zip(names, logits, strict=True)}
    shown = sorted(known, key=lambda name: -known[name])[:listed]
    found = read_digits({name: known[name] for name in {*shown, names[prompts_own]}})
    seen = {name.strip() for name in {*shown, names[prompts_own]}}
    hidden = [math.exp(x) for name, x in known.items() if name.strip().isdigit() and name.strip() not in seen]
    assert math.fsum(hidden) <= found.unseen + 1e-9


def test_both_forms_of_alternatives_are_read() -> None:
    assert as_mapping({"3": -1}) == {"3": -1.0}
    assert as_mapping([{"token": "3", "logprob": -1}, {"token": " 4", "logprob": -2}]) == {"3": -1.0, " 4": -2.0}
    with pytest.raises(ValueError, match="alternatives are a str"):
        as_mapping("3")


@given(st.text())
def test_visible_tokens_stay_on_one_line(token: str) -> None:
    shown = visible(token)
    assert "\t" not in shown
    assert len(shown.splitlines()) <= 1
    assert not shown.endswith("\n")


def test_visible_tells_tokens_apart() -> None:
    assert visible("\n") == "\\n"
    assert visible("\\n") == "\\\\n"


def test_a_stored_answer_is_plain_json(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    finish(store, "a", {"expected": [1.5]})
    with closing(sqlite3.connect(store.path)) as file:
        ((answer, tokens),) = file.execute("SELECT answer, prompt_tokens FROM calls")
    assert json.loads(answer) == {"expected": [1.5]}
    assert tokens == 10
