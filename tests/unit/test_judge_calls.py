"""The durable call store, the budget, and reading digits."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.errors import BudgetReached, StoreUnreadable
from evalkit.judges.calls import CallStore, Spent
from evalkit.judges.cost import Budget, Prices, Usage, most_tokens
from evalkit.judges.digits import Slot, as_mapping, read_digits, read_slot
from evalkit.judges.tokens import visible

SPENT = Spent("simulate", "m", 10, 2, 0.5, 1.0, 1)
COLUMNS = {
    *("call_key", "purpose", "judge", "prompt_tokens", "completion_tokens", "dollars", "seconds"),
    *("attempts", "status", "error", "at", "left_out"),
}


def test_a_finished_call_is_found_after_a_restart(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    assert store.claim("a").mine
    store.finish("a", {"text": "días \u2028"}, SPENT)
    assert CallStore(tmp_path).get("a") == {"text": "días \u2028"}
    assert not CallStore(tmp_path).claim("a").mine
    assert CallStore(tmp_path).get("b") is None


def test_failures_are_rows_but_not_answers(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    store.claim("a")
    store.fail("a", "no", SPENT)
    again = CallStore(tmp_path)
    assert again.claim("a").mine
    (row,) = again.drain()
    assert (row["status"], row["error"]) == ("failed", "no")


def test_rows_have_the_columns_of_the_table_and_come_once(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    for key in "abc":
        store.claim(key)
        store.finish(key, {}, SPENT)
    rows = store.drain()
    assert [row["call_key"] for row in rows] == ["a", "b", "c"]
    assert all(set(row) == COLUMNS for row in rows)
    assert store.drain() == []
    assert CallStore(tmp_path).drain() == []
    assert [row["call_key"] for row in store.rows()] == ["a", "b", "c"]


def test_calls_of_a_killed_run_come_with_the_next_drain(tmp_path: Path) -> None:
    killed = CallStore(tmp_path)
    killed.claim("a")
    killed.finish("a", {}, SPENT)
    assert [row["call_key"] for row in CallStore(tmp_path).drain()] == ["a"]


def test_calls_are_told_to_their_owner_alone(tmp_path: Path) -> None:
    """A run, another one that starts meanwhile, and a second judge of the first: each counts its own calls, once."""
    one = CallStore(tmp_path, "run one judge")
    one.claim("a")
    one.finish("a", {}, SPENT)
    two, beside = CallStore(tmp_path), CallStore(tmp_path)
    two.own("run two judge")
    beside.own("run one reference")
    assert two.drain() == beside.drain() == []
    two.claim("b")
    two.finish("b", {}, SPENT)
    assert [row["call_key"] for row in two.drain()] == ["b"]
    assert not two.claim("a").mine, "its answer serves every run all the same"
    # the first was killed: what it left waits for its own next start
    again = CallStore(tmp_path)
    again.own("run one judge")
    assert [row["call_key"] for row in again.drain()] == ["a"]
    assert CallStore(tmp_path, "run one judge").drain() == []


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    store.claim("a")
    store.finish("a", {"n": 1}, SPENT)
    with store.path.open("ab") as handle:
        handle.write(b'{"call_key": "b", "answ')
    again = CallStore(tmp_path)
    assert again.get("a") == {"n": 1}
    assert again.claim("b").mine
    again.finish("b", {"n": 2}, SPENT)
    assert again.get("b") == {"n": 2}
    assert CallStore(tmp_path).get("b") == {"n": 2}


def test_lines_of_another_process_do_not_shift_answers(tmp_path: Path) -> None:
    one, two = CallStore(tmp_path), CallStore(tmp_path)
    for number in range(6):
        store = (one, two)[number % 2]
        store.claim(str(number))
        store.finish(str(number), {"n": number}, SPENT)
    one.claim("x")
    one.finish("x", {"n": -1}, SPENT)
    assert [one.get(str(number)) for number in range(6)] == [{"n": number} for number in range(6)]


@pytest.mark.parametrize("line", ["not json", "[]", '{"other": 1}'])
def test_a_foreign_file_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "calls.jsonl").write_text(line + "\n")
    with pytest.raises(StoreUnreadable, match="cannot be read"):
        CallStore(tmp_path)


def test_the_second_asker_waits_for_the_first(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    assert store.claim("a").mine
    second = store.claim("a")
    assert not second.mine
    got: list[object] = []
    waiter = threading.Thread(target=lambda: got.append(second.outcome.result(5).answer))
    waiter.start()
    store.finish("a", {"n": 3}, SPENT)
    waiter.join()
    assert got == [{"n": 3}]


def test_who_waits_for_an_abandoned_call_hears_why(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    store.claim("a")
    second = store.claim("a")
    store.abandon("a", BudgetReached("enough"))
    with pytest.raises(BudgetReached):
        second.outcome.result(1)
    assert store.claim("a").mine


def test_memory_holds_no_answers(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    store.claim("a")
    store.finish("a", {"text": "needle" * 50}, SPENT)
    assert "needle" not in repr(vars(store))


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


def test_stored_lines_are_plain_json(tmp_path: Path) -> None:
    store = CallStore(tmp_path)
    store.claim("a")
    store.finish("a", {"expected": [1.5]}, SPENT)
    record = json.loads(store.path.read_text())
    assert record["answer"] == {"expected": [1.5]}
    assert record["prompt_tokens"] == 10
