"""Calls of an older evalkit: its file is read once and taken over, and its keys are the keys of today."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import old_calls_case as case
import pytest

from evalkit.errors import StoreUnreadable
from evalkit.judges.base import Judge
from evalkit.judges.calls import CallStore
from evalkit.judges.config import JudgeConfig
from evalkit.judges.cost import Usage
from evalkit.judges.model_judge import ModelJudge, budget_of
from evalkit.judges.requests import Backend, Completion, Request
from evalkit.judges.transport import Transport

RECORD = {
    "call_key": "a", "purpose": "rate", "judge": "m", "prompt_tokens": None, "completion_tokens": None, "dollars": None,
    "seconds": 0.5, "attempts": 2, "left_out": None, "status": "ok", "error": "", "at": "2026-01-01T00:00:00.000+00:00",
    "owner": "run", "answer": {"grade": 1.0}, "reserved": [30, 2],
}  # fmt: skip


def old_file(folder: Path, lines: list[Any], torn: str = "") -> None:
    folder.mkdir(exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "calls.jsonl").write_text(text + torn)


class Silent(Backend):
    """No request may reach it."""

    def complete(self, request: Request) -> Completion:
        raise AssertionError(f"asked again: {request}")


def test_calls_of_the_older_evalkit_are_hits_and_give_the_same_answers(tmp_path: Path) -> None:
    shutil.copy(case.FOLDER / "calls.jsonl", tmp_path / "calls.jsonl")

    def make(name: str) -> Judge:
        provider = "local" if name == "local" else "openai"
        config = JudgeConfig(provider=provider, base_url=case.ABOUT["base_url"], **{"model": "m", **case.SETTINGS[name]})
        about = case.LOCAL if name == "local" else case.ABOUT
        return ModelJudge(config, CallStore(tmp_path), Transport(Silent(), config, budget_of(config)), about)

    assert case.answers(make) == json.loads((case.FOLDER / "answers.json").read_text())
    assert not (tmp_path / "calls.jsonl").exists()
    assert (tmp_path / "calls.jsonl.old").read_bytes() == (case.FOLDER / "calls.jsonl").read_bytes()


def test_what_was_not_drained_is_drained_and_what_was_is_not(tmp_path: Path) -> None:
    shutil.copy(case.FOLDER / "calls.jsonl", tmp_path / "calls.jsonl")
    records = [json.loads(line) for line in (case.FOLDER / "calls.jsonl").read_text().splitlines()]
    calls = [record for record in records if "call_key" in record]
    left = [record for record in calls if record["owner"] == "run slots"]
    assert 0 < len(left) < len(calls)
    assert CallStore(tmp_path, "run chat").drain() == []
    rows = CallStore(tmp_path, "run slots").drain()
    assert rows == [{name: value for name, value in one.items() if name not in ("answer", "owner", "reserved")} for one in left]
    assert [row["call_key"] for row in CallStore(tmp_path).rows()] == [record["call_key"] for record in calls]


def test_a_corrupt_line_is_left_out_with_a_count_and_a_torn_one_without(tmp_path: Path) -> None:
    old_file(tmp_path, ["{half", RECORD, '{"other": 1}', {**RECORD, "call_key": "b"}], torn='{"call_key": "c", "answ')
    told: list[str] = []
    store = CallStore(tmp_path, say=told.append)
    assert store.get("a") == store.get("b") == {"grade": 1.0}
    assert len(store) == 2
    (line,) = told
    assert line.startswith("2 lines of ") and "are made again" in line
    CallStore(tmp_path, say=told.append)
    assert len(told) == 1


@pytest.mark.parametrize("line", ["not json", "[]", '{"other": 1}'])
def test_a_foreign_file_is_refused_and_stays(tmp_path: Path, line: str) -> None:
    old_file(tmp_path, [line])
    with pytest.raises(StoreUnreadable, match="cannot be read"):
        CallStore(tmp_path)
    assert (tmp_path / "calls.jsonl").exists()


def test_a_file_that_is_read_again_after_a_kill_adds_nothing_twice(tmp_path: Path) -> None:
    later = {**RECORD, "at": "2026-01-02T00:00:00.000+00:00"}
    lines = [{**RECORD, "status": "retried", "answer": None}, RECORD, {"drained": 1, "owner": "run"}, later]
    del lines[0]["answer"]
    old_file(tmp_path, lines)
    store = CallStore(tmp_path, "run")
    assert [row["status"] for row in store.rows()] == ["retried", "ok", "ok"]
    assert store.reserved(["a", "a"]) == Usage(60, 4)
    (tmp_path / "calls.jsonl.old").rename(tmp_path / "calls.jsonl")  # killed before it was renamed
    again = CallStore(tmp_path, "run")
    assert len(list(again.rows())) == 3
    assert [row["at"] for row in again.drain()] == [later["at"]]
