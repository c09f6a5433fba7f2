"""What ends a run and what does not: refusals of a firewall, forms that are tried, errors under status 200, and stops."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from judge_fakes import Answer, completions, endpoint, error, ok
from store_case import RUN, write_run
from test_judge_endpoints import EXPLAIN, TASKS, about, chat_only, judge_at

from evalkit.errors import JudgeSetupError
from evalkit.judges.adapting import Adapter
from evalkit.judges.backends.openai import Connection, OpenAIBackend
from evalkit.judges.calls import CallStore
from evalkit.judges.config import JudgeConfig
from evalkit.judges.cost import Budget, Prices, Usage
from evalkit.judges.transport import Refused, Transport, Unavailable
from evalkit.report.page.run_facts import run_facts
from evalkit.store.reader import open_results
from evalkit.store.writer import rebuild

PAGE = (403, {"Content-Type": "text/html"}, b"<html><body><h1>Request blocked</h1></body></html>")


def test_a_firewall_that_dislikes_one_prompt_ends_no_run(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return PAGE if about(body, "w3") else completions(number, path, body)

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        answers = judge.simulate(TASKS)
    assert [a.status for a in answers] == ["failed" if task.tokens == ["w3"] else "ok" for task in TASKS]
    assert "refuses this prompt" in next(a.error for a in answers if a.status == "failed")


@pytest.mark.parametrize("answered", [0, 1])
def test_a_firewall_that_dislikes_every_prompt_ends_it(tmp_path: Path, answered: int) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return completions(number, path, body) if number <= answered else PAGE

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="slots", give_up_after=3) as judge:
        with pytest.raises(JudgeSetupError, match="refuses the key"):
            judge.simulate(TASKS)
        assert fake.requests == (4 if answered else 1)


def test_a_403_about_the_key_ends_the_run_whenever_it_comes(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return completions(number, path, body) if number == 1 else error(403, "this key is disabled")

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        with pytest.raises(JudgeSetupError, match="refuses the key"):
            judge.simulate(TASKS)
        assert fake.requests == 2


def test_other_forms_of_one_request_are_one_refusal(tmp_path: Path) -> None:
    """Two prompts are refused without a reason before any is answered: each is tried in several forms."""

    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        bad = about(body, "w0") or about(body, "w1")
        return error(400, "bad request") if bad else chat_only(number, path, body)

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="constrained", give_up_after=3) as judge:
        assert [a.status for a in judge.explain(EXPLAIN)] == ["failed", "failed", "ok", "ok", "ok", "ok"]
        assert fake.requests > len(EXPLAIN) + 2


@contextmanager
def adapter_at(url: str, sleep: Callable[[float], None] = lambda seconds: None) -> Iterator[Adapter]:
    config = JudgeConfig(provider="openai", model="m", base_url=url, max_attempts=9)
    with closing(
        Transport(OpenAIBackend(Connection(url, "k"), config.timeout_s), config, Budget(0, 0, Prices()), sleep=sleep)
    ) as transport:
        yield Adapter(transport)


@pytest.mark.parametrize(
    "message", ["use {other} in place of {name}", "max_tokens is too large: 9 tokens. This model supports at most 8"]
)
def test_renaming_to_and_fro_ends(message: str) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        names = ("max_tokens", "max_completion_tokens")
        name, other = names if "max_tokens" in body else names[::-1]
        return error(400, message.format(name=name, other=other))

    with endpoint(script) as fake, adapter_at(fake.url) as adapter, pytest.raises(Refused):
        adapter.post("/chat/completions", {"model": "m", "messages": [], "max_tokens": 9}, Usage(1, 1))
    assert fake.requests == (2 if "{" in message else 1)  # no form of it is sent twice


@pytest.mark.parametrize(
    "body",
    [
        {"message": "no such thing"},
        {"msg": "no such thing", "code": 4001},
        {"base_resp": {"status_code": 1004, "status_msg": "no such thing"}},
        {"status": "error"},
        {"errors": [{"message": "no such thing"}]},
        {"success": False},
        {"result": "another protocol"},
        {"choices": []},
    ],
)
def test_an_endpoint_that_gives_no_choices_ends_the_run(tmp_path: Path, body: dict[str, Any]) -> None:
    with endpoint(lambda *_: ok(body)) as fake, judge_at(fake.url, tmp_path, simulation="slots", give_up_after=4) as judge:
        with pytest.raises(JudgeSetupError):
            judge.simulate(TASKS)
        assert fake.requests == 4


def test_a_run_that_must_stop_tries_nothing_again() -> None:
    stopped = threading.Event()

    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        stopped.set()
        return error(503, "loading")

    with endpoint(script) as fake, adapter_at(fake.url) as adapter, pytest.raises(Unavailable, match="loading"):
        adapter.post("/completions", {"model": "m", "prompt": "x"}, Usage(1, 1), stopped)
    assert fake.requests == 1


def test_a_wait_between_attempts_ends_when_the_run_must_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop comes while the second attempt is waited for; the wait asked for is far longer than a test may take."""
    stopped = threading.Event()
    real = stopped.wait

    def wait(timeout: float | None = None) -> bool:
        stopped.set()
        return real(timeout)

    monkeypatch.setattr(stopped, "wait", wait)
    slow = error(503, "loading", {"retry-after": "200"})
    with (
        endpoint(lambda *_: slow) as fake,
        adapter_at(fake.url, time.sleep) as adapter,
        pytest.raises(Unavailable, match="loading"),
    ):
        adapter.post("/completions", {"model": "m", "prompt": "x"}, Usage(1, 1), stopped)
    assert fake.requests == 1


def test_a_store_that_breaks_while_calls_are_made_leaves_none_of_them_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with endpoint(completions) as fake, judge_at(fake.url, tmp_path, simulation="slots") as judge:
        real, settled = judge.store.settle, []

        def settle(calls: Any) -> None:
            if len(settled) == 3:
                raise OSError("the disk is gone")
            settled.append(real(calls))

        monkeypatch.setattr(judge.store, "settle", settle)
        with pytest.raises(OSError, match="disk"):
            judge.simulate(TASKS)
        monkeypatch.setattr(judge.store, "settle", real)
        other = CallStore(tmp_path)
        assert len(list(other.rows())) == 3
        assert other._read("SELECT count(*) FROM calls WHERE status = 'asking'") == [(0,)]
        assert {a.status for a in judge.simulate(TASKS)} == {"ok"}


def test_a_key_in_the_code_of_an_error_is_masked(tmp_path: Path) -> None:
    said = {"error": {"message": "no", "code": "bad:sk-secret-key"}}
    with (
        endpoint(lambda *_: (400, {}, json.dumps(said).encode())) as fake,
        judge_at(fake.url, tmp_path) as judge,
        pytest.raises(Refused) as caught,
    ):
        judge.transport.post("/completions", {"model": "m", "prompt": "x"}, Usage(1, 1))
    assert caught.value.code == "bad:***"


def test_every_answer_says_which_refused_settings_it_was_had_without(tmp_path: Path) -> None:
    """The endpoint refuses the temperature from the third request on, in the middle of a run."""

    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        refused = number > 2 and "temperature" in body
        return error(400, "temperature is fixed") if refused else chat_only(number, path, body)

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, simulation="constrained") as judge:
        assert {a.status for a in judge.explain(EXPLAIN)} == {"ok"}
        assert [row["left_out"] for row in judge.drain_calls()] == [None] * 2 + ["no temperature"] * 4


def test_the_facts_of_a_run_say_which_settings_its_calls_were_made_without(tmp_path: Path) -> None:
    journal = write_run(tmp_path)
    call = {"judge": "tiny-judge", "purpose": "explain", "status": "ok", "left_out": "no temperature"}
    journal.write_rows("judge_calls", [{**call, "call_key": str(n)} for n in (7, 8)])
    rebuild(tmp_path, tmp_path / "evalkit.duckdb")
    with open_results(tmp_path / "evalkit.duckdb") as results:
        costs = run_facts(results, RUN).costs
    assert costs is not None
    (note,) = costs.notes
    assert note.startswith("2 calls of tiny-judge (explain)") and "no temperature" in note
