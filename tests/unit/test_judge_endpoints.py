"""Endpoints as they are: refusals of one prompt and of all, errors that pass, settings that are not taken, addresses and keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_fakes import Answer, completions, echoed, endpoint, error, ok, prompts_of

from evalkit.errors import BudgetReached, JudgeSetupError
from evalkit.judges.address import masked
from evalkit.judges.backends.openai import Connection, OpenAIBackend
from evalkit.judges.base import JUDGES, Example, ExplainTask, SimulateTask
from evalkit.judges.calls import CallStore
from evalkit.judges.config import JudgeConfig
from evalkit.judges.model_judge import ModelJudge, budget_of
from evalkit.judges.prompts.simulation import WAYS
from evalkit.judges.transport import Transport
from evalkit.util.progress import Progress

TASKS = [SimulateTask("rain", [f"w{number}"]) for number in range(6)]
EXPLAIN = [ExplainTask([Example([f"w{number}"], [1.0])]) for number in range(6)]
Script = Callable[[int, str, dict[str, Any]], Answer]


def judge_at(url: str, folder: Path, **settings: Any) -> ModelJudge:
    """A judge that never waits."""
    defaults = {"max_attempts": 2, "concurrency": 1, "batch": 1, "api_key_env": ""}
    config = JudgeConfig(provider="openai", model="m", base_url=url, **{**defaults, **settings})
    transport = Transport(
        OpenAIBackend(Connection(url, "sk-secret-key"), config.timeout_s), config, budget_of(config), sleep=lambda seconds: None
    )
    return ModelJudge(config, CallStore(folder), transport, {"base_url": url})


def levels(body: dict[str, Any]) -> str:
    tokens = body["messages"][-1]["content"].split("one a line:\n")[-1].split("\n")
    return json.dumps({"activations": [{"token": token, "activation": 9} for token in tokens]})


def chat_only(number: int, path: str, body: dict[str, Any]) -> Answer:
    """A chat endpoint that follows schemas and explains everything alike."""
    if not path.endswith("/chat/completions"):
        return error(404, "no such endpoint")
    simulates = "repeating the token" in body["messages"][0]["content"]
    content = levels(body) if simulates else "words about rain"
    return ok({"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": content}}]})


def about(body: dict[str, Any], word: str) -> bool:
    """Whether a request is about the task with this token."""
    asked = body.get("prompt") or body["messages"][-1]["content"]
    return any(f"\n{word}\t" in text or f"<<{word}>>" in text for text in ([asked] if isinstance(asked, str) else asked))


# one prompt or the set-up


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (400, "this prompt was stopped by the content filter", "content_filter"),
        (403, "the input was flagged by moderation", None),
        (400, "the request exceeds the available context size", None),
        (413, "too large", None),
        (422, "this cannot be answered", None),
    ],
)
@pytest.mark.parametrize("bad", ["w0", "w3"])
def test_the_refusal_of_one_prompt_is_one_failed_call_even_if_it_is_the_first(
    tmp_path: Path, status: int, message: str, code: str | None, bad: str
) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return error(status, message, code=code) if about(body, bad) else completions(number, path, body)

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        answers = judge.simulate(TASKS)
        assert [a.status for a in answers] == ["failed" if task.tokens == [bad] else "ok" for task in TASKS]
        assert message in next(a.error for a in answers if a.status == "failed")
        assert fake.requests == 6  # a refusal is not asked again


def test_a_judge_that_refuses_everything_ends_the_run_however_few_the_calls(tmp_path: Path) -> None:
    with endpoint(lambda *_: error(422, "this is not how it is done")) as fake:
        with (
            judge_at(fake.url, tmp_path / "a", simulation="slots") as judge,
            pytest.raises(JudgeSetupError, match="this is not how it is done"),
        ):
            judge.simulate(TASKS[:2])
        assert fake.requests == 2
        with judge_at(fake.url, tmp_path / "b", simulation="slots", give_up_after=3) as judge, pytest.raises(JudgeSetupError):
            judge.simulate(TASKS)
        assert fake.requests == 2 + 3


def test_prompts_that_are_all_too_long_are_failed_calls(tmp_path: Path) -> None:
    with endpoint(lambda *_: error(400, "prompt is too long")) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        assert {a.status for a in judge.simulate(TASKS[:3])} == {"failed"}


@pytest.mark.parametrize(
    "bad",
    [
        lambda: ok({"error": {"message": "too many requests", "code": 429}}),
        lambda: ok({"error": {"message": "the model is overloaded"}}),
        lambda: ok({"choices": [{"index": 0, "error": {"message": "upstream died", "code": 502}, "finish_reason": "error"}]}),
        lambda: error(503, "loading"),
    ],
)
def test_an_error_that_passes_is_tried_again_wherever_it_stands(tmp_path: Path, bad: Callable[[], Answer]) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return bad() if number == 1 else completions(number, path, body)

    with endpoint(script) as fake, judge_at(fake.url, tmp_path) as judge:
        assert judge.mode == "slots"
        assert fake.requests == 2


# the way is looked for


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_path_that_is_not_served_leads_to_the_next_and_is_remembered(tmp_path: Path, status: int) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return chat_only(number, path, body) if path.endswith("/chat/completions") else error(status, "not served")

    with endpoint(script) as fake:
        for requests in (len(WAYS), len(WAYS)):
            with judge_at(fake.url, tmp_path) as judge:
                assert judge.mode == "constrained" and fake.requests == requests


@pytest.mark.parametrize(
    "bad", [lambda: error(500, "inside"), lambda: (200, {"Content-Type": "text/html"}, b"<html>hello</html>")]
)
def test_what_may_pass_leads_to_the_next_way_but_settles_nothing(tmp_path: Path, bad: Callable[[], Answer]) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return chat_only(number, path, body) if path.endswith("/chat/completions") else bad()

    with endpoint(script) as fake:
        with judge_at(fake.url, tmp_path) as judge:
            assert judge.mode == "constrained" and judge.simulate(TASKS[:1])[0].status == "ok"
        fake.script = completions
        with judge_at(fake.url, tmp_path) as judge:
            assert judge.mode == "slots"


def test_a_rate_limit_while_the_way_is_looked_for_decides_nothing(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return chat_only(number, path, body) if path.endswith("/chat/completions") else error(429, "slow down")

    with endpoint(script) as fake, judge_at(fake.url, tmp_path) as judge, pytest.raises(JudgeSetupError, match="slow down"):
        judge.identity  # noqa: B018
    assert len(CallStore(tmp_path)) == 0


def test_a_wrong_key_is_said_while_the_way_is_looked_for(tmp_path: Path) -> None:
    with endpoint(lambda *_: error(401, "wrong key")) as fake, judge_at(fake.url, tmp_path) as judge:
        with pytest.raises(JudgeSetupError, match="refuses the key"):
            judge.identity  # noqa: B018
        assert fake.requests == 1


@pytest.mark.parametrize(
    ("refuses", "message", "left_out"),
    [
        (lambda body: "max_tokens" in body, "max_tokens is unknown here: send max_completion_tokens", ["max_completion_tokens"]),
        (lambda body: "temperature" in body, "only the default temperature is served", ["no temperature"]),
        (lambda body: body.get("logprobs"), "logprobs are not given", ["no logprobs"]),
        (lambda body: body.get("top_logprobs", 0) > 5, "top_logprobs may be 5 at most", ["logprobs 5"]),
        (
            lambda body: body.get("response_format", {}).get("type") == "json_schema",
            "response_format json_schema is not supported",
            ["json_object"],
        ),
        (lambda body: "response_format" in body, "no structured output", ["json_object", "no format"]),
    ],
)
@pytest.mark.parametrize("status", [400, 403, 422])
def test_a_setting_that_is_refused_is_left_out_and_that_is_part_of_the_identity(
    tmp_path: Path, refuses: Callable[[dict[str, Any]], bool], message: str, left_out: list[str], status: int
) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        good = not path.endswith("/chat/completions") or not refuses(body)
        return chat_only(number, path, body) if good else error(status, message)

    with endpoint(script) as fake:
        with judge_at(fake.url, tmp_path) as judge:
            assert judge.identity["left_out"] == left_out
            before = fake.requests
            assert {a.status for a in judge.simulate(TASKS)} == {"ok"} and {a.status for a in judge.explain(EXPLAIN)} == {"ok"}
            assert fake.requests == before + len(TASKS) + len(EXPLAIN)  # what was found once is not tried again
        with judge_at(fake.url, tmp_path) as again:
            assert again.identity["left_out"] == left_out and fake.requests == before + len(TASKS) + len(EXPLAIN)


def test_a_refusal_without_a_reason_is_met_by_asking_for_less(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return error(400, "bad request") if "response_format" in body else chat_only(number, path, body)

    with endpoint(script) as fake, judge_at(fake.url, tmp_path) as judge:
        assert judge.identity["left_out"] == ["json_object", "no logprobs", "no format"]
        assert judge.simulate(TASKS[:1])[0].status == "ok"


def test_a_judge_whose_way_is_given_adapts_all_the_same(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return error(400, "temperature is fixed") if "temperature" in body else chat_only(number, path, body)

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="constrained") as judge:
        assert {a.status for a in judge.explain(EXPLAIN)} == {"ok"}
        assert fake.requests == 1 + len(EXPLAIN)


def test_a_server_that_takes_no_lists_is_asked_one_by_one(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        lists = isinstance(body["prompt"], list)
        return error(422, "prompt: a string is wanted") if lists else completions(number, path, body)

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="slots", batch=3) as judge:
        assert {a.status for a in judge.simulate(TASKS)} == {"ok"}
        assert fake.requests == 1 + len(TASKS)


# once more


def failing(number_of_times: int, bad: Callable[[dict[str, Any]], Answer], word: str = "w2") -> Script:
    seen: list[int] = []

    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        if about(body, word) and len(seen) < number_of_times:
            seen.append(number)
            return bad(body)
        return completions(number, path, body)

    return script


BAD: list[Callable[[dict[str, Any]], Answer]] = [
    lambda body: ok({"choices": []}),
    lambda body: ok({"choices": [{"index": 0, "text": "x", "logprobs": None}]}),
    lambda body: (200, {}, b"{"),
    lambda body: error(500, "inside"),
    lambda body: ok({"choices": [{"index": 0, "finish_reason": "content_filter", **echoed(prompts_of(body)[0])}]}),
]


@pytest.mark.parametrize("bad", BAD)
def test_a_call_that_failed_is_asked_once_more_before_anything_is_scored(tmp_path: Path, bad: Any) -> None:
    counted: list[int] = []
    script = failing(1, bad)
    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="slots", max_attempts=1) as judge:
        assert {a.status for a in judge.simulate(TASKS, counted.append)} == {"ok"}
        rows = judge.drain_calls()
    assert fake.requests == len(TASKS) + 1 and sum(counted) == len(TASKS)
    twice = [row["status"] for row in rows if [other["call_key"] for other in rows].count(row["call_key"]) == 2]
    assert twice == ["retried", "ok"]


@pytest.mark.parametrize("bad", BAD)
def test_a_call_that_fails_twice_has_failed_and_a_setting_says_how_often(tmp_path: Path, bad: Any) -> None:
    for rounds in (1, 2, 3):
        with (
            endpoint(failing(99, bad)) as fake,
            judge_at(fake.url, tmp_path / str(rounds), simulation="slots", max_attempts=1, rounds=rounds) as judge,
        ):
            assert [a.status for a in judge.simulate(TASKS)].count("failed") == 1
            rows = judge.drain_calls()
            assert fake.requests == len(TASKS) - 1 + rounds
            assert [row["status"] for row in rows].count("retried") == rounds - 1
            assert [row["status"] for row in rows].count("failed") == 1


def test_what_a_list_leaves_out_is_asked_alone(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return ok({"choices": [{"index": 0, **echoed(prompts_of(body)[0])}]})  # the first of every list

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="slots", batch=6) as judge:
        assert {a.status for a in judge.simulate(TASKS)} == {"ok"}
        assert fake.requests == 1 + 5


def test_where_the_budget_is_too_small_to_ask_again_what_failed_has_failed(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        usage = {"prompt_tokens": 500, "completion_tokens": 0}
        choices = [] if about(body, "w2") else [{"index": 0, **echoed(body["prompt"])}]
        return ok({"choices": choices, "usage": usage})

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="slots", budget_tokens=6 * 500) as judge:
        assert [a.status for a in judge.simulate(TASKS)].count("failed") == 1
        assert fake.requests == len(TASKS)


def test_tokens_that_nobody_counted_are_null_and_count_against_the_budget_of_the_next_start(tmp_path: Path) -> None:
    def silent(number: int, path: str, body: dict[str, Any]) -> Answer:
        return ok({"choices": [{"index": 0, **echoed(body["prompt"])}]})

    with endpoint(silent) as fake:
        with judge_at(fake.url, tmp_path, simulation="slots") as judge:
            judge.simulate(TASKS)
            rows = judge.drain_calls()
            spent = judge.transport.budget.spent
        assert {(row["prompt_tokens"], row["completion_tokens"], row["dollars"]) for row in rows} == {(None, None, None)}
        assert all(set(row).isdisjoint(("answer", "reserved")) for row in rows)
        with judge_at(fake.url, tmp_path, simulation="slots", budget_tokens=spent.total + 10) as judge:
            judge.charge(0, 0, [row["call_key"] for row in rows])
            assert judge.transport.budget.spent == spent
            with pytest.raises(BudgetReached):
                judge.simulate([SimulateTask("rain", ["more"])])


def test_the_calls_of_one_answer_are_stored_with_one_commit(tmp_path: Path) -> None:
    statements: list[str] = []
    with endpoint(completions) as fake, judge_at(fake.url, tmp_path, simulation="slots", batch=6) as judge:
        judge.store.claim([])
        file = judge.store._connection()
        assert file is not None
        file.set_trace_callback(statements.append)
        judge.simulate(TASKS)
    assert fake.requests == 1 and len(CallStore(tmp_path)) == 6
    assert statements.count("COMMIT") == 2, "one claims the calls, one stores the answers"


# endings, addresses and keys


def explained(folder: Path, text: str, finish: str | None, **settings: Any) -> Any:
    choice = {"index": 0, "finish_reason": finish, "message": {"content": text}}
    with endpoint(lambda *_: ok({"choices": [choice]})) as fake, judge_at(fake.url, folder, simulation="constrained") as judge:
        return judge.explain(EXPLAIN[:1])[0]


def test_a_cut_explanation_is_marked(tmp_path: Path) -> None:
    cut = explained(tmp_path / "a", "words about rain and", "length")
    assert (cut.text, cut.status, cut.cut) == ("words about rain and", "ok", True) and "explanation_tokens" in cut.error
    assert explained(tmp_path / "b", "words about rain", "stop")[1:] == ("ok", "", False)
    assert explained(tmp_path / "c", "words about rain", None).cut is None
    whole = explained(tmp_path / "d", "words about rain\n\nThis feature fires on", "length")
    assert (whole.text, whole.cut) == ("words about rain", False)
    lost = explained(tmp_path / "e", "<think>\nThe user wants", "length")
    assert lost.status == "failed" and "reasoning" in lost.error and "cut off by its length" in lost.error


SECRET = "PASSW0RDX"


@pytest.mark.parametrize(
    "address",
    [
        f"http://bob:{SECRET}@host/v1", f"https://{SECRET}@host/v1", f"bob:{SECRET}@host/v1", f"https://host/v1?api_key={SECRET}",
        f"https://host/v1?access-token={SECRET}", f"http://bob:{SECRET}@host:port/v1",
    ],
)  # fmt: skip
def test_an_address_with_a_secret_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(JudgeSetupError) as caught:
        JudgeConfig(provider="openai", base_url=address)
    assert SECRET not in str(caught.value) and "api_key_env" in str(caught.value)


@pytest.mark.parametrize(
    "address", ["localhost:8080/v1", "ftp://host/v1", "", "http://", "http://host:port/v1", "http://ho st/v1"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(JudgeSetupError, match="no address"):
        JudgeConfig(provider="openai", base_url=address)


def test_addresses_that_are_fine_pass() -> None:
    for address in ("http://localhost:8080/v1", "https://host/openai/deployments/m?api-version=2024-02-01", "http://[::1]:80/v1"):
        assert JudgeConfig(base_url=address).base_url == address


def test_a_key_in_place_of_the_name_of_a_variable_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(JudgeSetupError) as caught:
        JudgeConfig(api_key_env=f"sk-{SECRET}")
    assert SECRET not in str(caught.value)
    config = JudgeConfig(provider="openai", model="m", api_key_env=f"a{SECRET.lower()}")
    with pytest.raises(JudgeSetupError) as caught:
        JUDGES.get("openai")(config, tmp_path, Progress(quiet=True))
    assert SECRET.lower() not in str(caught.value)


@pytest.mark.parametrize("key", [f"{SECRET}\nX", f"{SECRET}\u00e9", f"{SECRET} x"])
def test_a_key_that_no_header_can_carry_is_said_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(JudgeSetupError, match="SOME_KEY") as caught:
        JUDGES.get("openai")(JudgeConfig(provider="openai", model="m", api_key_env="SOME_KEY"), tmp_path, Progress(quiet=True))
    assert SECRET not in str(caught.value)


def test_the_line_end_of_a_key_is_trimmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-one\r\n")
    config = {"provider": "openai", "model": "m", "api_key_env": "SOME_KEY", "simulation": "slots"}
    with (
        endpoint(completions) as fake,
        JUDGES.get("openai")(JudgeConfig(**config, base_url=fake.url), tmp_path, Progress(quiet=True)) as judge,
    ):
        judge.simulate(TASKS[:1])
    assert fake.keys == ["Bearer sk-one"]


@pytest.mark.parametrize("status", [200, 400, 401, 422, 500])
def test_a_server_that_repeats_the_key_gets_it_into_no_message_and_no_file(tmp_path: Path, status: int) -> None:
    seen = "is wrong: Bearer sk-secret-key, see http://bob:sk-other-key@host?token=sk-third-key"
    message = f"{seen} {'x' * (312 - len(seen))} sk-secret-key"  # the last one where messages are cut
    said = {"error": {"message": message, "code": 500}}

    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return completions(number, path, body) if number == 1 else (status, {}, json.dumps(said).encode())

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        judge.simulate(TASKS[:1])
        try:
            text = repr(judge.simulate(TASKS[1:2]))
        except JudgeSetupError as stop:
            text = str(stop)
        text += repr(judge.drain_calls()) + repr([path.read_bytes() for path in tmp_path.iterdir()])
    assert "is wrong" in text
    assert not any(secret in text for secret in ("sk-", "sk-secret-key", "sk-other-key", "sk-third-key"))


def test_what_is_no_secret_is_not_masked() -> None:
    assert masked("see https://host/v1?version=2 and write to a@b.c", "k") == "see https://host/v1?version=2 and write to a@b.c"


@pytest.mark.parametrize("proxy", ["nonsense://host:1", "socks9://host:1", "http://ho st:1"])
def test_a_proxy_that_cannot_be_used_is_an_error_of_the_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with judge_at("http://judge.invalid/v1", tmp_path) as judge, pytest.raises(JudgeSetupError, match="connection|request"):
        judge.identity  # noqa: B018


def test_a_socks_proxy_works_as_far_as_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with judge_at("http://judge.invalid/v1", tmp_path) as judge, pytest.raises(JudgeSetupError, match="does not answer"):
        judge.identity  # noqa: B018


def test_whatever_the_client_raises_when_it_is_made_is_an_error_of_the_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*arguments: Any, **named: Any) -> None:
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed. " + "sk-secret-key")

    monkeypatch.setattr("openai.DefaultHttpxClient", lacking)
    with judge_at("http://judge.invalid/v1", tmp_path) as judge, pytest.raises(JudgeSetupError) as caught:
        judge.identity  # noqa: B018
    assert "pip install socksio" in str(caught.value) and "sk-secret-key" not in str(caught.value)


def test_half_a_character_in_a_prompt_is_sent_as_a_question_mark(tmp_path: Path) -> None:
    with endpoint(completions) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        assert judge.simulate([SimulateTask("rain \ud83d", ["\ud83d"])])[0].status == "ok"
    assert "rain ?" in prompts_of(fake.bodies[0])[0]
