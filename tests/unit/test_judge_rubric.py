"""The four-grade rubric: what is marked, how the digit is read in the three ways, and what is a failed call."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from judge_fakes import Answer, echoed, endpoint, ok, prompts_of

from evalkit.judges.base import JUDGES, RateTask, Rating
from evalkit.judges.config import JudgeConfig
from evalkit.judges.lexical import LexicalJudge
from evalkit.judges.model_judge import ModelJudge
from evalkit.judges.prompts.rubric import marked, read_grade
from evalkit.judges.scripted import ScriptedJudge
from evalkit.util.progress import Progress

TASK = RateTask("names of animals", ["the", " dog", " and", "\n", " rain"], [False, True, False, False, False])
TOP = {"3": math.log(0.6), " 1": math.log(0.2), "7": math.log(0.1), "x": math.log(0.1)}
EXPECTED, MASS = (3 * 0.6 + 0.2) / 0.8, 0.8
"""7 is no grade: it is left out, not read as 3."""


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")


def judge_at(url: str, folder: Path, **settings: Any) -> ModelJudge:
    config = JudgeConfig(provider="openai", model="m", base_url=url, **{"max_attempts": 1, "rounds": 1, **settings})
    return JUDGES.get("openai")(config, folder, Progress(quiet=True))


def at_slot(prompt: str, top: dict[str, float]) -> dict[str, Any]:
    choice = echoed(prompt)
    choice["logprobs"]["top_logprobs"][-1] = top
    return choice


def chat(text: str, content: list[dict[str, Any]] | None = None) -> Answer:
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
    return ok({"choices": [choice | ({"logprobs": {"content": content}} if content else {})]})


def test_stretches_that_fire_are_marked() -> None:
    assert marked(TASK.tokens, TASK.fires) == "the <<dog>> and\\n rain"
    assert marked(["a", " b", " c", " d"], [True, False, True, True]) == "<<a>> b <<c d>>"
    assert marked(["cout", " <<", " x"], [False, False, True]) == "cout < < <<x>>"  # program code has marks of its own
    assert marked(["a", "\n", "b"], [False, True, False]) == "a<<\\n>>b" and marked(["a", "", "b"], [False, True, False]) == "ab"
    assert marked([], []) == ""


def test_the_grade_is_read_behind_the_marked_text(tmp_path: Path) -> None:
    def answer(number: int, path: str, body: dict[str, Any]) -> Answer:
        return ok({"choices": [{"index": i, **at_slot(prompt, TOP)} for i, prompt in enumerate(prompts_of(body))]})

    counted: list[int] = []
    with endpoint(answer) as fake, judge_at(fake.url, tmp_path, simulation="slots", batch=4) as judge:
        answers = judge.rate([TASK, TASK._replace(concept="weather")], counted.append)
        assert judge.rate([TASK]) == answers[:1] and fake.requests == 1  # the stored call is not made again
        assert {row["purpose"] for row in judge.drain_calls()} == {"rate"} and judge.identity["rubric"] == "1"
    assert answers[0].grade == pytest.approx(EXPECTED) and answers[0].mass == pytest.approx(MASS) and sum(counted) == 2
    (body,) = fake.bodies
    assert (body["max_tokens"], body["echo"]) == (0, True)
    first, second = prompts_of(body)
    assert first.endswith("Concept: names of animals\nText: the <<dog>> and\\n rain\nGrade:\tunknown\n")
    assert "Concept: weather\nText: the <<dog>>" in second


@pytest.mark.parametrize("chat_form", [False, True])
def test_one_token_is_written_where_nothing_is_echoed(tmp_path: Path, chat_form: bool) -> None:
    listed = [{"token": token, "logprob": value} for token, value in TOP.items()]
    logprobs: dict[str, Any] = {"content": [{"token": "3", "top_logprobs": listed}]} if chat_form else {"top_logprobs": [TOP]}
    with (
        endpoint(lambda *_: ok({"choices": [{"index": 0, "text": "3", "logprobs": logprobs}]})) as fake,
        judge_at(fake.url, tmp_path, simulation="one-at-a-time") as judge,
    ):
        (answer,) = judge.rate([TASK])
    assert answer.grade == pytest.approx(EXPECTED) and answer.mass == pytest.approx(MASS)
    assert fake.bodies[0]["prompt"].endswith("\nGrade:\t") and fake.bodies[0]["max_tokens"] == 1


def test_chat_models_answer_one_digit_or_fail(tmp_path: Path) -> None:
    listed = [{"token": token, "logprob": value} for token, value in TOP.items()]
    content: list[dict[str, Any]] = [
        {"token": '{"grade":', "top_logprobs": []},
        {"token": " 3", "top_logprobs": listed},
        {"token": "}"},
    ]
    answers = [
        (chat('{"grade": 2}'), Rating(2.0)),
        (chat('{"grade": 3}', content), Rating(round(EXPECTED, 6))),  # the schema may have raised the digits: no mass
    ]
    for number, (answer, expected) in enumerate(answers):
        with (
            endpoint(lambda *_, answer=answer: answer) as fake,
            judge_at(fake.url, tmp_path / str(number), simulation="constrained") as judge,
        ):
            assert judge.rate([TASK]) == [expected]
        assert "the <<dog>> and" in fake.bodies[0]["messages"][1]["content"]
    for number, text in enumerate(['{"grade": 4}', '{"grade": true}', "three", "{}", '{"grade": 2.5}']):
        with (
            endpoint(lambda *_, text=text: chat(text)) as fake,
            judge_at(fake.url, tmp_path / f"wrong{number}", simulation="constrained") as judge,
        ):
            (answer,) = judge.rate([TASK])
        assert (answer.grade, answer.status) == (None, "failed") and answer.error


@pytest.mark.parametrize(
    "top", [{"unknown": -0.1, "x": -3.0}, {"2": math.log(0.0001), "unknown": math.log(0.9), "x": math.log(0.01)}, {"7": -0.01}]
)
def test_grades_that_are_not_seen_well_enough_fail(tmp_path: Path, top: dict[str, float]) -> None:
    answer = ok({"choices": [{"index": 0, "text": "x", "logprobs": {"top_logprobs": [top]}}]})
    with endpoint(lambda *_: answer) as fake, judge_at(fake.url, tmp_path, simulation="one-at-a-time") as judge:
        (rating,) = judge.rate([TASK])
    assert (rating.grade, rating.status) == (None, "failed") and "no grade from 0 to 3" in rating.error


def test_no_digit_is_a_failed_call_and_never_zero(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no grade from 0 to 3"):
        read_grade({"9": -0.1, "x": -1.0})
    with (
        endpoint(lambda n, p, body: ok({"choices": [{"index": 0, **at_slot(body["prompt"], {"7": -0.1})}]})) as fake,
        judge_at(fake.url, tmp_path, simulation="slots") as judge,
    ):
        (answer,) = judge.rate([TASK])
    assert (answer.grade, answer.status) == (None, "failed") and "no grade" in answer.error
    assert LexicalJudge().rate([TASK]) == [Rating(None, None, "failed", "this judge gives no grades")]


def test_the_scripted_judge_grades_by_quoted_tokens_or_as_it_is_told() -> None:
    quoting = TASK._replace(concept="the token 'dog'")
    assert [one.grade for one in ScriptedJudge().rate([quoting, TASK, quoting._replace(fires=[True] + [False] * 4)])] == [3, 0, 0]
    judge = ScriptedJudge(rate=[2.5, None])
    assert [one.status for one in judge.rate([TASK, TASK])] == ["ok", "failed"] and judge.rated == [TASK, TASK]
    assert [row["status"] for row in judge.drain_calls()] == ["ok", "failed"]
