"""The lexical reference and the scripted fake."""

from __future__ import annotations

from pathlib import Path

import pytest

from evalkit.errors import BudgetReached
from evalkit.judges.base import JUDGES, Example, ExplainTask, SimulateTask
from evalkit.judges.config import JudgeConfig
from evalkit.judges.lexical import LONGEST, LexicalJudge
from evalkit.judges.scripted import ScriptedJudge
from evalkit.util.progress import Progress

QUIET = Progress(quiet=True)


def test_the_word_list_holds_mean_activations() -> None:
    task = ExplainTask([Example([" the", " cat", " The", ","], [4.0, 0.0, 2.0, -1.0]), Example([" of", " the"], [1.0, 0.0])])
    (answer,) = LexicalJudge().explain([task])
    assert answer.text == "tokens: the 5.0, of 2.5"  # (4 + 2 + 0) / 3 and 1, in tenths of the largest, 4
    (simulation,) = LexicalJudge().simulate([SimulateTask(answer.text, ["THE", " of", " cat", "x"])])
    assert simulation.expected == [5.0, 2.5, 0.0, 0.0]
    assert simulation.mass is None


@pytest.mark.parametrize("token", [",", ", ", "\n", " ", "a b", "9.1", "\\n", "\t", "\u2028", "the 9.1, of"])
def test_odd_tokens_survive_the_list(token: str) -> None:
    judge = LexicalJudge()
    (said,) = judge.explain([ExplainTask([Example([token, "zzz", "other"], [2.0, 1.0, 0.0])])])
    assert said.text is not None
    assert len(said.text.splitlines()) == 1
    assert judge.simulate([SimulateTask(said.text, [token, "zzz", "other"])])[0].expected == [10.0, 5.0, 0.0]


def test_a_silent_feature_has_an_empty_list() -> None:
    judge = LexicalJudge()
    (said,) = judge.explain([ExplainTask([Example(["none", "a"], [0.0, -1.0])])])
    assert said.text == "tokens: none"
    assert judge.simulate([SimulateTask(said.text, ["none", "a"])])[0].expected == [0.0, 0.0]


def test_the_list_is_limited_to_the_strongest() -> None:
    tokens = [f"w{number}" for number in range(LONGEST + 10)]
    (said,) = LexicalJudge().explain([ExplainTask([Example(tokens, [float(number + 1) for number in range(len(tokens))])])])
    assert said.text is not None
    assert said.text.count(", ") == LONGEST - 1
    assert "w0 " not in said.text


def test_foreign_explanations_fail() -> None:
    (answer,) = LexicalJudge().simulate([SimulateTask("words about rain", ["rain"])])
    assert (answer.expected, answer.status) == (None, "failed")


@pytest.mark.parametrize("provider", ["lexical", "scripted"])
def test_they_are_registered_and_write_nothing(provider: str, tmp_path: Path) -> None:
    counted: list[int] = []
    with JUDGES.get(provider)(JudgeConfig(provider=provider), tmp_path / "calls", QUIET) as judge:
        explanations = judge.explain([ExplainTask([Example([" rain", " x"], [3.0, 0.0])])] * 2, counted.append)
        answers = judge.simulate([SimulateTask(explanations[0].text, [" rain", " y"])] * 3, counted.append)
    assert [a.expected for a in answers] == [[10.0, 0.0]] * 3
    assert sum(counted) == 5
    assert not (tmp_path / "calls").exists()
    assert judge.identity["provider"] == provider


def test_a_script_can_fail_and_raise() -> None:
    def levels(task: SimulateTask) -> list[float] | Exception:
        return BudgetReached("enough") if "stop" in task.tokens else [1.0]

    judge = ScriptedJudge(explain=["one", None], simulate=levels)
    answers = judge.explain([ExplainTask([])] * 2)
    assert [(a.text, a.status) for a in answers] == [("one", "ok"), (None, "failed")]
    assert judge.simulate([SimulateTask("e", ["go"])])[0].expected == [1.0]
    with pytest.raises(BudgetReached):
        judge.simulate([SimulateTask("e", ["stop"])])
    assert [row["status"] for row in judge.drain_calls()] == ["ok", "failed", "ok"]
    assert judge.drain_calls() == []
    assert [task.tokens for task in judge.simulated] == [["go"]]
