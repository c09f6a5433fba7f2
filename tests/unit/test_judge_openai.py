"""The four ways of simulating, explanations, identities and settings, against an endpoint whose answers are known."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from judge_fakes import Answer, completions, echoed, endpoint, error, ok, prompts_of

from evalkit.errors import JudgeSetupError
from evalkit.judges.backends.openai import retry_after
from evalkit.judges.base import JUDGES, Example, ExplainTask, SimulateTask
from evalkit.judges.config import JudgeConfig
from evalkit.judges.digits import SCALE
from evalkit.judges.model_judge import ModelJudge
from evalkit.judges.prompts.explanation import explain_prompt
from evalkit.judges.prompts.simulation import simulate_prompt
from evalkit.util.progress import Progress

TASK = SimulateTask("rain", ["the", " rain", "\n", " a\tb"])
EXPLAIN = ExplainTask([Example([" the", " rain"], [0.0, 4.0])])


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")


def judge_at(url: str, folder: Path, **settings: Any) -> ModelJudge:
    config = JudgeConfig(provider="openai", model="m", base_url=url, **{"max_attempts": 1, "rounds": 1, **settings})
    return JUDGES.get("openai")(config, folder, Progress(quiet=True))


def test_slots_are_read_in_one_pass(tmp_path: Path) -> None:
    with endpoint(completions) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        (answer,) = judge.simulate([TASK])
    assert answer.expected == pytest.approx([3 * SCALE] * 4)
    assert answer.mass == pytest.approx([math.exp(-0.1)] * 4)
    (body,) = fake.bodies
    assert (body["max_tokens"], body["echo"], body["logprobs"]) == (0, True, 20)
    assert "slots" not in body  # a field other servers do not know
    assert fake.keys == ["Bearer k"]


def test_slots_of_several_fragments_share_requests(tmp_path: Path) -> None:
    tasks = [SimulateTask("rain", [f"w{number}"]) for number in range(10)]
    counted: list[int] = []
    with endpoint(completions) as fake, judge_at(fake.url, tmp_path, simulation="slots", batch=4) as judge:
        answers = judge.simulate([*tasks, tasks[0]], counted.append)
        assert sorted(len(prompts_of(body)) for body in fake.bodies) == [2, 4, 4]
        assert judge.simulate(tasks) == answers[:10]
        assert fake.requests == 3
        rows = judge.drain_calls()
    assert sum(counted) == 11
    assert len(rows) == 10
    assert {(row["prompt_tokens"], row["status"], row["purpose"]) for row in rows} == {(100, "ok", "simulate")}


def test_choices_are_matched_by_their_index(tmp_path: Path) -> None:
    def shuffled(number: int, path: str, body: dict[str, Any]) -> Answer:
        prompts = prompts_of(body)
        return ok({"choices": [{"index": i, **echoed(prompts[i], digit=str(i))} for i in reversed(range(len(prompts)))]})

    tasks = [SimulateTask("rain", [f"w{number}"]) for number in range(3)]
    with endpoint(shuffled) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        assert [a.expected for a in judge.simulate(tasks)] == [pytest.approx([i * SCALE]) for i in range(3)]


def without_digit(*places: int) -> Any:
    """An endpoint whose alternatives hold no digit at some slots."""

    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        choice = echoed(body["prompt"])
        for place in places:
            choice["logprobs"]["top_logprobs"][place - len(TASK.tokens)] = {
                "unknown": math.log(0.9),
                "x": math.log(0.002),
                "y": math.log(0.001),
            }
        return ok({"choices": [choice]})

    return script


def test_a_slot_without_digits_is_one_missing_token_with_a_bound(tmp_path: Path) -> None:
    with endpoint(without_digit(2)) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        (answer,) = judge.simulate([TASK])
        assert judge.simulate([TASK]) == [answer]
    assert fake.requests == 1  # it was answered: nothing is gained by asking again
    assert answer.status == "ok"
    assert answer.expected == [pytest.approx(3 * SCALE), pytest.approx(3 * SCALE), None, pytest.approx(3 * SCALE)]
    assert answer.mass is not None and answer.mass[2] == 0 and min(answer.mass[:2]) > 0.9
    assert answer.unseen is not None and answer.unseen[2] == pytest.approx(10 * 2 * 0.002)
    assert [math.isnan(value) for value in answer.values] == [False, False, True, False]


@pytest.mark.parametrize(("least", "status"), [(0.25, "ok"), (0.5, "failed")])
def test_too_few_tokens_with_a_value_fail_the_simulation(tmp_path: Path, least: float, status: str) -> None:
    settings = {"simulation": "slots", "least_tokens": least}
    with endpoint(without_digit(0, 2, 3)) as fake, judge_at(fake.url, tmp_path, **settings) as judge:
        (answer,) = judge.simulate([TASK])
    assert answer.status == status
    assert (answer.expected is None) == (status == "failed")
    assert status == "ok" or "only 1 of 4 tokens" in answer.error


def test_digits_at_the_wrong_place_are_no_activation(tmp_path: Path) -> None:
    """Read one token too early, where a digit is listed with hardly any probability."""

    def early(number: int, path: str, body: dict[str, Any]) -> Answer:
        choice = echoed(body["prompt"])
        choice["logprobs"]["top_logprobs"][-4:] = [{"\t": -0.01, "9": -9.2}] * 4
        return ok({"choices": [choice]})

    with endpoint(early) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        (answer,) = judge.simulate([TASK])
    assert (answer.expected, answer.status) == (None, "failed")


def test_a_slot_inside_a_token_fails(tmp_path: Path) -> None:
    def merged(number: int, path: str, body: dict[str, Any]) -> Answer:
        choice = echoed(body["prompt"])
        offsets = choice["logprobs"]["text_offset"]
        offsets[-1] -= 1
        choice["logprobs"]["tokens"][-2:] = [body["prompt"][offsets[-2] : offsets[-1]], body["prompt"][offsets[-1] :]]
        return ok({"choices": [choice]})

    with endpoint(merged) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        (answer,) = judge.simulate([TASK])
    assert answer.status == "failed"
    assert "token 3" in answer.error


@pytest.mark.parametrize("chat_form", [False, True])
def test_one_request_for_each_slot(tmp_path: Path, chat_form: bool) -> None:
    """Legacy logprobs, and the chat form that llama.cpp gives."""
    slots = simulate_prompt(TASK).slots

    def next_token(number: int, path: str, body: dict[str, Any]) -> Answer:
        assert (body["max_tokens"], "echo" in body) == (1, False)
        digit = str(slots.index(len(body["prompt"])) + 1)
        top = {"token": f" {digit}", "logprob": -0.5}
        logprobs = {"content": [{"token": "x", "logprob": -1, "top_logprobs": [top]}]}
        return ok({"choices": [{"text": "x", "logprobs": logprobs if chat_form else {"top_logprobs": [{digit: -0.5}]}}]})

    counted: list[int] = []
    with endpoint(next_token) as fake, judge_at(fake.url, tmp_path, simulation="one-at-a-time", batch=1) as judge:
        (answer,) = judge.simulate([TASK], counted.append)
    assert answer.expected == pytest.approx([SCALE * digit for digit in (1, 2, 3, 4)])
    assert fake.requests == 4
    assert counted == [1]


def wide(number: int, path: str, body: dict[str, Any]) -> Answer:
    """As llama.cpp answers: no echo, as many alternatives as asked for, the unlikely digits far down."""
    if isinstance(body["prompt"], list) or not path.endswith("/completions"):
        return error(400, "one prompt at a time")
    rest = [{"token": f"w{place}", "logprob": math.log(0.9 / 450)} for place in range(450)]
    digits = [{"token": str(digit), "logprob": math.log(0.001)} for digit in range(10)]
    top = (rest + digits + [{"token": f"v{place}", "logprob": -18.0} for place in range(9999)])[: body["logprobs"]]
    return ok({"choices": [{"text": "w0", "logprobs": {"content": [{"token": "w0", "top_logprobs": top}]}}]})


def props(slots: int) -> Any:
    return lambda path: ok({"total_slots": slots, "chat_template": ""}) if path == "/props" else error(404)


def test_digits_far_down_are_seen_where_the_endpoint_lists_as_many(tmp_path: Path) -> None:
    with endpoint(wide, props(1)) as fake, judge_at(fake.url, tmp_path) as judge:
        (answer,) = judge.simulate([TASK])
        assert judge.identity["simulation"] == "one-at-a-time-wide"
    assert answer.expected == pytest.approx([4.5 * SCALE] * 4)
    assert answer.mass == pytest.approx([0.01] * 4)
    assert answer.unseen == [0.0] * 4


@pytest.mark.parametrize("slots", [1, 2])
def test_the_prompts_of_a_fragment_follow_one_another_and_fragments_go_side_by_side(tmp_path: Path, slots: int) -> None:
    """No more fragments at once than the server keeps beginnings of; with two slots, both are on their way together."""
    tasks = [SimulateTask(f"rain {number}", TASK.tokens) for number in range(2)]
    both = threading.Barrier(2)

    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        if slots == 2:
            both.wait(60)  # answers only when the other fragment has a request here as well
        return wide(number, path, body)

    settings = {"simulation": "one-at-a-time-wide", "concurrency": 4, "batch": 8}
    with endpoint(script, props(slots)) as fake, judge_at(fake.url, tmp_path, **settings) as judge:
        assert [a.status for a in judge.simulate(tasks)] == ["ok", "ok"]
        sent = [body["prompt"] for body in fake.bodies]
        wanted = [[prompt.text[:slot] for slot in prompt.slots] for prompt in map(simulate_prompt, tasks)]
        assert [[p for p in sent if p in own] for own in wanted] == wanted
        assert slots == 2 or sent == wanted[0] + wanted[1]


def chat(text: str, logprobs: Any = None) -> Answer:
    usage = {"prompt_tokens": 9, "completion_tokens": 3}
    return ok({"choices": [{"message": {"content": text}, "logprobs": logprobs}], "usage": usage})


def levels_json(*pairs: tuple[str, Any]) -> str:
    return json.dumps({"activations": [{"token": token, "activation": level} for token, level in pairs]})


GOOD = (("the", 0), (" rain", 9), ("\\n", 1), (" a\\tb", 0))


def test_constrained_answers_give_integers(tmp_path: Path) -> None:
    with endpoint(lambda *_: chat(levels_json(*GOOD))) as fake, judge_at(fake.url, tmp_path, simulation="constrained") as judge:
        (answer,) = judge.simulate([TASK])
    assert answer.expected == pytest.approx([0, 10, SCALE, 0])
    assert answer.mass is None
    assert fake.bodies[0]["response_format"]["json_schema"]["strict"] is True


def test_constrained_answers_with_logprobs_give_expectations(tmp_path: Path) -> None:
    text = levels_json(*GOOD)
    content = []
    for character in text:  # one token a character
        top = [{"token": "8", "logprob": math.log(0.25)}, {"token": "0", "logprob": math.log(0.25)}]
        content.append({"token": character, "logprob": -1, "top_logprobs": top})
    answer = chat(text, {"content": content})
    with endpoint(lambda *_: answer) as fake, judge_at(fake.url, tmp_path, simulation="constrained") as judge:
        (simulation,) = judge.simulate([TASK])
    assert simulation.expected == pytest.approx([4 * SCALE] * 4)
    assert simulation.mass is None  # under a schema: before or after it cut the others off, nobody knows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (levels_json(*GOOD[:3]), "3 activations for 4"),
        (levels_json(*GOOD, ("x", 1)), "5 activations for 4"),
        (levels_json(*GOOD[:3], ("other", 0)), "token 3 is not repeated"),
        (levels_json(*GOOD[:3], (" a\\tb", 10)), "token 3"),
        (levels_json(*GOOD[:3], (" a\\tb", 0.5)), "token 3"),
        (levels_json(*GOOD[:3], (" a\\tb", True)), "token 3"),
        ("[1, 2, 3, 4]", "unusable"),
        ("the rain: 9", "unusable"),
        ('{"activations": [1, 2, 3, 4]}', "unusable"),
        ("", "unusable"),
    ],
)
def test_constrained_answers_that_do_not_fit_are_failures_not_zeros(tmp_path: Path, text: str, words: str) -> None:
    with endpoint(lambda *_: chat(text)) as fake, judge_at(fake.url, tmp_path, simulation="constrained") as judge:
        (answer,) = judge.simulate([TASK])
        (row,) = judge.drain_calls()
    assert (answer.expected, answer.status) == (None, "failed")
    assert words in answer.error
    assert (row["status"], row["prompt_tokens"]) == ("failed", 9)


def refuse_completions(number: int, path: str, body: dict[str, Any]) -> Answer:
    return chat("words for rain") if path.endswith("/chat/completions") else error(404, "this is a chat model")


def no_echo(number: int, path: str, body: dict[str, Any]) -> Answer:
    return ok({"choices": [{"text": "9", "logprobs": {"top_logprobs": [{"9": -0.1}], "text_offset": [0]}}]})


@pytest.mark.parametrize(
    ("script", "mode", "requests"),
    [
        (completions, "slots", 1),
        (wide, "one-at-a-time-wide", 2),
        (no_echo, "one-at-a-time", 3),
        (refuse_completions, "constrained", 4),
    ],
)
def test_the_way_is_found_once_and_is_part_of_the_identity(tmp_path: Path, script: Any, mode: str, requests: int) -> None:
    with endpoint(script) as fake, judge_at(fake.url, tmp_path) as judge:
        assert judge.identity["simulation"] == mode
        assert fake.requests == requests
        with judge_at(fake.url, tmp_path) as again:
            assert again.identity == judge.identity
        assert fake.requests == requests


def test_an_endpoint_that_serves_nothing_is_named(tmp_path: Path) -> None:
    with (
        endpoint(lambda *_: error(404, "no such model")) as fake,
        judge_at(fake.url, tmp_path) as judge,
        pytest.raises(JudgeSetupError, match="no such model"),
    ):
        judge.simulate([TASK])
    assert fake.requests == 4


def test_explanations_are_one_clean_line(tmp_path: Path) -> None:
    said = iter(['  "words  about rain"\nmore', "\n\n snow. ", "x " * 400, " \n", '"..."'])
    with (
        endpoint(lambda *_: ok({"choices": [{"text": next(said)}]})) as fake,
        judge_at(fake.url, tmp_path, simulation="slots", batch=1, concurrency=1) as judge,
    ):
        tasks = [ExplainTask([Example([str(number)], [1.0])]) for number in range(5)]
        answers = judge.explain(tasks)
    assert [a.text for a in answers[:2]] == ["words about rain", "snow."]
    assert answers[2].text is not None
    assert 290 < len(answers[2].text) <= 300
    assert [(a.text, a.status) for a in answers[3:]] == [(None, "failed")] * 2
    assert fake.bodies[0]["stop"] == ["\n"]


def test_chat_models_explain_by_chat(tmp_path: Path) -> None:
    settings = {"simulation": "constrained", "explainer_model": "big"}
    with endpoint(refuse_completions) as fake, judge_at(fake.url, tmp_path, **settings) as judge:
        assert judge.explain([EXPLAIN])[0].text == "words for rain"
    assert fake.bodies[0]["model"] == "big"
    assert fake.bodies[0]["messages"][-1]["role"] == "user"


def test_the_identity_holds_what_changes_answers_and_nothing_else(tmp_path: Path) -> None:
    def identity(**settings: Any) -> dict[str, Any]:
        return judge_at("http://127.0.0.1:9/v1", tmp_path, **{"simulation": "slots", **settings}).identity

    same = identity()
    for settings in ({"concurrency": 1}, {"timeout_s": 5.0}, {"max_attempts": 9}, {"batch": 1}, {"budget_tokens": 5}):
        assert identity(**settings) == same
    for settings in ({"simulation": "one-at-a-time"}, {"temperature": 0.5}, {"top_logprobs": 5}, {"explainer_model": "x"}):
        assert identity(**settings) != same
    assert "k" not in json.dumps(same).split('"')


def test_a_missing_key_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(JudgeSetupError, match="OPENAI_API_KEY is not set"):
        judge_at("http://127.0.0.1:9/v1", tmp_path)
    judge_at("http://127.0.0.1:9/v1", tmp_path, api_key_env="").close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"simulation": "slot"}, "slots"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_s": 0.0}, "time limits"),
        ({"budget_dollars": 1.0}, "dollars_per_million_prompt"),
        ({"budget_tokens": -1}, "budget"),
        ({"least_tokens": 0.0}, "least_tokens"),
        ({"least_tokens": 1.1}, "least_tokens"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(JudgeSetupError) as caught:
        JudgeConfig(**settings)
    assert words in str(caught.value)


def test_prompts_share_their_beginning_and_mark_every_token() -> None:
    one, two = simulate_prompt(TASK), simulate_prompt(SimulateTask("rain", ["x"]))
    assert len(one.slots) == len(TASK.tokens)
    assert all(one.text[slot - 1] == "\t" and one.text[slot:].startswith("0\n") for slot in one.slots)
    shared = one.text[: one.slots[0] - len("the\t")]
    assert shared
    assert two.text.startswith(shared)
    assert " rain" in explain_prompt(EXPLAIN)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:10 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
    ],
)
def test_retry_after_is_understood(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds
