"""The journal: whole units, checked columns, torn tails."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import pytest
from store_case import PREDICTIONS, RUN, score, unit, write_run

from evalkit.errors import StoreUnreadable
from evalkit.store.journal import Journal, journals


class FakeScore(NamedTuple):
    metric: str
    value: float | None
    item: int
    kind: str
    status: str


def test_a_unit_is_one_line_with_all_it_has(tmp_path):
    journal = Journal(tmp_path / "runs" / "r")
    journal.write_unit(unit("k", "autointerp", "topk"), [score("m", 0, 1.0, "feature")], {"predictions": PREDICTIONS})
    lines = journal.path.read_text().splitlines()
    assert len(lines) == 1
    record = json.loads(lines[0])
    assert record["unit"]["run_id"] == "r"
    assert record["predictions"] == PREDICTIONS
    assert record["scores"][0]["value"] == 1.0
    assert record["explanations"] == []


def test_named_tuples_and_numpy_numbers_are_taken(tmp_path):
    journal = Journal(tmp_path / "r")
    journal.write_unit(unit("k", "e", "d"), [FakeScore("m", np.float32(0.5), np.int64(3), "feature", "ok")])
    assert next(journal.records())["scores"] == [{"metric": "m", "value": 0.5, "item": 3, "kind": "feature", "status": "ok"}]


@pytest.mark.parametrize(
    "write",
    [
        lambda j: j.write_unit(unit("k", "e", "d", colour="red")),
        lambda j: j.write_unit(unit("", "e", "d")),
        lambda j: j.write_unit(unit("k", "e", "d", status="finished")),
        lambda j: j.write_unit(unit("k", "e", "d"), [score("m", 0, float("nan"), "feature")]),
        lambda j: j.write_unit(unit("k", "e", "d"), [score("m", 0, None, "feature", status="ok")]),
        lambda j: j.write_unit(unit("k", "e", "d"), [score("m", 0, 1.0, "feature", status="failed")]),
        lambda j: j.write_unit(unit("k", "e", "d"), [score("m", 0, 1.0, "feature", weigth=2.0)]),
        lambda j: j.write_unit(unit("k", "e", "d"), (), {"curves": []}),
        lambda j: j.write_rows("scores", [score("m", 0, 1.0, "feature")]),
        lambda j: j.write_rows("metrics", [{"name": "m"}]),
    ],
)
def test_what_could_not_be_ingested_is_not_written(tmp_path, write):
    journal = Journal(tmp_path / "r")
    with pytest.raises(ValueError, match="."):
        write(journal)
    assert not journal.path.exists()


def test_finished_are_the_units_whose_latest_state_is_done(tmp_path):
    journal = Journal(tmp_path / "r")
    journal.write_rows("units", [unit("late", "e", "d", status="failed"), unit("elsewhere", "e", "d")])
    journal.write_unit(unit("late", "e", "d"))
    journal.write_unit(unit("gone", "e", "d"))
    journal.write_rows("units", [unit("gone", "e", "d", status="failed")])
    assert set(journal.finished()) == {"late", "elsewhere"}
    assert journal.finished()["late"]["dictionary"] == "d"


def test_a_torn_tail_is_not_read_and_then_written_over(tmp_path):
    journal = Journal(tmp_path / "r")
    journal.write_unit(unit("one", "e", "d"))
    with journal.path.open("ab") as handle:
        handle.write(b'{"unit": {"unit_key": "torn"')
    again = Journal(tmp_path / "r")
    assert set(again.finished()) == {"one"}
    again.write_unit(unit("two", "e", "d"))
    assert set(again.finished()) == {"one", "two"}


def test_entries_go_on_from_where_they_ended(tmp_path):
    journal = Journal(tmp_path / "r")
    for key in "abc":
        journal.write_unit(unit(key, "e", "d"))
    ends = [entry.end for entry in journal.entries()]
    assert [e.record["unit"]["unit_key"] for e in journal.entries(ends[1])] == ["c"]
    assert ends[-1] == journal.size()


def test_a_spoilt_line_names_its_place(tmp_path):
    journal = Journal(tmp_path / "r")
    journal.write_unit(unit("a", "e", "d"))
    with journal.path.open("ab") as handle:
        handle.write(b"not json\n")
    with pytest.raises(StoreUnreadable, match="not JSON") as caught:
        list(journal.records())
    assert str(journal.path) in str(caught.value)


def test_journals_come_in_the_order_they_were_begun(tmp_path):
    write_run(tmp_path, "z-first", day=1)
    write_run(tmp_path, "a-second", day=2)
    assert [journal.run_id for journal in journals(tmp_path)] == ["z-first", "a-second"]
    assert journals(tmp_path / "nowhere") == []
    assert RUN not in [journal.run_id for journal in journals(tmp_path)]
