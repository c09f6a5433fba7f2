"""Endpoints that rate-limit, fail, hang, lie or vanish, and runs that are killed: what is tried again, kept or refused."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_fakes import Answer, completions, echoed, endpoint, error, hang, ok, prompts_of, tiny_model
from kills import FAULTS, good

import evalkit
from evalkit.errors import BudgetReached, JudgeSetupError
from evalkit.judges.backends.local import LocalBackend
from evalkit.judges.backends.openai import Connection, OpenAIBackend
from evalkit.judges.base import JUDGES, Example, ExplainTask, SimulateTask
from evalkit.judges.calls import CallStore
from evalkit.judges.config import JudgeConfig
from evalkit.judges.model_judge import ModelJudge, budget_of
from evalkit.judges.transport import Transport
from evalkit.util.progress import Progress

CONFIG = JudgeConfig(
    provider="openai", model="m", simulation="slots", batch=1, concurrency=1, max_attempts=3, timeout_s=120.0, rounds=1
)
TASKS = [SimulateTask("rain", [f"w{number}", " x"]) for number in range(12)]


class Waits(list[float]):
    """Stands in for time.sleep: remembers instead of waiting."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def judge_at(url: str, folder: Path, sleep: Callable[[float], None] | None = None, **settings: Any) -> ModelJudge:
    config = dataclasses.replace(CONFIG, base_url=url, **settings)
    transport = Transport(
        OpenAIBackend(Connection(url, "k"), config.timeout_s),
        config,
        budget_of(config),
        sleep=Waits() if sleep is None else sleep,
    )
    return ModelJudge(config, CallStore(folder), transport, {"base_url": url})


def first(bad: Callable[[], Answer], times: int) -> Callable[[int, str, dict[str, Any]], Answer]:
    """An endpoint that fails its first ``times`` requests."""
    return lambda number, path, body: bad() if number <= times else completions(number, path, body)


def after(bad: Callable[[], Answer], good: int) -> Callable[[int, str, dict[str, Any]], Answer]:
    """An endpoint that fails after ``good`` requests."""
    return lambda number, path, body: bad() if number > good else completions(number, path, body)


def test_a_rate_limit_is_waited_for_as_long_as_the_server_asks(tmp_path: Path) -> None:
    waits = Waits()
    with (
        endpoint(first(lambda: error(429, "slow down", {"Retry-After": "17"}), 2)) as fake,
        judge_at(fake.url, tmp_path, waits) as judge,
    ):
        assert judge.simulate(TASKS[:1])[0].status == "ok"
        (row,) = judge.drain_calls()
    assert waits == [17.0, 17.0]
    assert row["attempts"] == 3
    assert fake.requests == 3


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408])
def test_server_errors_are_tried_again_with_growing_waits(tmp_path: Path, status: int) -> None:
    waits = Waits()
    with endpoint(first(lambda: error(status), 2)) as fake, judge_at(fake.url, tmp_path, waits) as judge:
        assert judge.simulate(TASKS[:1])[0].status == "ok"
    assert 1.0 <= waits[0] < 2.0 <= waits[1] <= 2.5


def test_a_hanging_request_times_out_and_is_tried_again(tmp_path: Path) -> None:
    given_up = threading.Event()
    # long enough for the second answer on a busy machine
    with endpoint(first(lambda: hang(given_up), 1)) as fake, judge_at(fake.url, tmp_path, timeout_s=3.0) as judge:
        assert judge.simulate(TASKS[:1])[0].status == "ok"
        given_up.set()
    assert fake.requests == 2


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, None, "OPENAI_API_KEY"),
        (403, None, "OPENAI_API_KEY"),
        (404, None, "base_url"),
        (400, None, "refuses the request"),
        (429, "insufficient_quota", "credit"),
    ],
)
def test_what_cannot_get_better_is_not_tried_again(tmp_path: Path, status: int, code: str | None, words: str) -> None:
    waits = Waits()
    with endpoint(lambda *_: error(status, "bad thing", code=code)) as fake, judge_at(fake.url, tmp_path, waits) as judge:
        with pytest.raises(JudgeSetupError) as caught:
            judge.simulate(TASKS)
        # a 400 that says no more may be the prompt's fault: as many as give_up_after, and nothing answered, are the set-up's
        assert fake.requests == (5 if status == 400 else 1)
    assert waits == []
    assert words in str(caught.value)
    assert "bad thing" in str(caught.value)


def test_a_judge_that_is_down_from_the_start_ends_the_run(tmp_path: Path) -> None:
    waits = Waits()
    with judge_at("http://127.0.0.1:9/v1", tmp_path, waits) as judge, pytest.raises(JudgeSetupError, match="does not answer"):
        judge.simulate(TASKS)
    assert len(waits) == 2


def test_a_later_failure_is_one_failed_task(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return error(500) if "w5\t" in prompts_of(body)[0] else completions(number, path, body)

    with endpoint(script) as fake, judge_at(fake.url, tmp_path) as judge:
        answers = judge.simulate(TASKS)
        assert [a.status for a in answers] == ["ok"] * 5 + ["failed"] + ["ok"] * 6
        assert answers[5].expected is None
        assert "HTTP 500 after 3 attempts" in answers[5].error
        rows = judge.drain_calls()
    assert [row["status"] for row in rows].count("failed") == 1
    assert [row["attempts"] for row in rows if row["status"] == "failed"] == [3]


def test_a_judge_that_goes_away_ends_the_run_and_what_is_finished_is_kept(tmp_path: Path) -> None:
    with endpoint(after(lambda: error(503), 4)) as fake:
        with judge_at(fake.url, tmp_path, give_up_after=3) as judge:
            with pytest.raises(JudgeSetupError, match="went away: 3 requests failed in a row"):
                judge.simulate(TASKS)
            assert fake.requests == 4 + 3 * 3
        fake.script = completions
        with judge_at(fake.url, tmp_path) as judge:
            assert all(a.status == "ok" for a in judge.simulate(TASKS))
        assert fake.requests == 4 + 3 * 3 + len(TASKS) - 4


def test_one_success_in_between_resets_the_count(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return completions(number, path, body) if int(body["prompt"].rsplit("\nw")[-1].split("\t")[0]) % 3 == 0 else error(500)

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, give_up_after=3, max_attempts=1) as judge:
        assert [a.status for a in judge.simulate(TASKS)].count("failed") == 8


@pytest.mark.parametrize(
    "body", [b"<html>oops</html>", b"{", b"[]", b"null", b"{}", b'{"choices": 3}', b'{"choices": [{}]}', b'{"choices": [7]}']
)
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_garbage_is_a_failed_call_and_not_tried_again(tmp_path: Path, body: bytes, kind: str) -> None:
    with endpoint(completions) as fake, judge_at(fake.url, tmp_path) as judge:
        judge.simulate(TASKS[:1])
        fake.script = lambda *_: (200, {"Content-Type": kind}, body)
        (answer,) = judge.simulate(TASKS[1:2])
        assert (answer.expected, answer.status) == (None, "failed")
        assert fake.requests == 2


@pytest.mark.parametrize("name", ["top_logprobs", "text_offset", "tokens"])
def test_truncated_logprobs_are_a_failed_call(tmp_path: Path, name: str) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        choice = echoed(body["prompt"])
        choice["logprobs"][name] = choice["logprobs"][name][:-1] if name != "tokens" else None
        return ok({"choices": [choice]})

    with endpoint(script) as fake, judge_at(fake.url, tmp_path) as judge:
        (answer,) = judge.simulate(TASKS[:1])
    assert answer.status == ("ok" if name == "tokens" else "failed")  # the token strings are not needed


def test_a_truncated_list_fails_only_what_is_missing(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        return ok({"choices": [{"index": i, **echoed(p)} for i, p in enumerate(prompts_of(body)[:2])]})

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, batch=4) as judge:
        answers = judge.simulate(TASKS[:4])
    assert [a.status for a in answers] == ["ok", "ok", "failed", "failed"]
    assert "2 of 4" in answers[3].error


def test_one_prompt_that_is_too_long_fails_alone(tmp_path: Path) -> None:
    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        if any("w2\t" in prompt for prompt in prompts_of(body)):
            return error(400, "maximum context length is 9 tokens", code="context_length_exceeded")
        return completions(number, path, body)

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, batch=4) as judge:
        assert [a.status for a in judge.simulate(TASKS[:4])] == ["ok", "ok", "failed", "ok"]
    assert fake.requests == 5


def test_the_budget_stops_before_it_is_exceeded(tmp_path: Path) -> None:
    spent: list[int] = []

    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        tokens = len(body["prompt"].encode()) // 2  # close to the worst case that is reserved
        spent.append(tokens)
        return ok({"choices": [echoed(body["prompt"])], "usage": {"prompt_tokens": tokens, "completion_tokens": 0}})

    with endpoint(script) as fake, judge_at(fake.url, tmp_path, budget_tokens=2000, concurrency=3) as judge:
        with pytest.raises(BudgetReached, match="of 2,000 tokens") as caught:
            judge.simulate(TASKS)
        assert 0 < sum(spent) <= 2000
        assert caught.value.exit_code == 3
        done = fake.requests
        assert len(judge.drain_calls()) == done
        with judge_at(fake.url, tmp_path) as again:
            assert all(a.status == "ok" for a in again.simulate(TASKS))
        assert fake.requests == len(TASKS)


def test_a_call_that_timed_out_counts_at_its_worst_case(tmp_path: Path) -> None:
    over = threading.Event()
    with endpoint(lambda *_: hang(over)) as fake, judge_at(fake.url, tmp_path, timeout_s=1.0, budget_tokens=1500) as judge:
        with pytest.raises((BudgetReached, JudgeSetupError)):
            judge.simulate(TASKS[:1])
        over.set()
        assert judge.transport.budget.spent.total >= fake.requests * len(fake.bodies[0]["prompt"]) // 4


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_every_kind_of_fault_is_asked_again_and_leaves_no_trace_in_the_answers(tmp_path: Path, name: str) -> None:
    explain = [ExplainTask([Example(["a", " b"], [0.0, 1.0])])]
    with endpoint(lambda number, path, body: ok(good(body))) as fake:
        with judge_at(fake.url, tmp_path / "healthy") as judge:
            expected = judge.explain(explain), judge.simulate(TASKS[:2])
        sent: list[str] = []

        def script(number: int, path: str, body: dict[str, Any]) -> Answer:
            prompt = str(body["prompt"])
            sent.append(prompt)
            return ok(good(body)) if sent.count(prompt) > 1 else FAULTS[name](body)

        with judge_at(fake.url, tmp_path / "faulty", rounds=2) as judge:
            # an endpoint whose very first answer cannot be read is taken for none
            judge.explain([ExplainTask([Example(["c"], [1.0])])])
            judge.simulate([SimulateTask("first", ["c"])])
            fake.script = script
            assert (judge.explain(explain), judge.simulate(TASKS[:2])) == expected
    assert sorted(sent) == sorted(list(dict.fromkeys(sent)) * 2)


def test_equal_calls_of_two_threads_are_made_once(tmp_path: Path) -> None:
    def slow(number: int, path: str, body: dict[str, Any]) -> Answer:
        time.sleep(0.05)
        return completions(number, path, body)

    with endpoint(slow) as fake, judge_at(fake.url, tmp_path, concurrency=2) as judge:
        answers: list[Any] = [None, None]
        threads = [
            threading.Thread(target=lambda place=place: answers.__setitem__(place, judge.simulate(TASKS[:4]))) for place in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers[0] == answers[1]
    assert fake.requests == 4


RUN = """
import signal
import sys
# a shell that starts a job in the background makes it ignore SIGINT
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
sys.path[:0] = [sys.argv[3], sys.argv[4]]
from test_judge_faults import TASKS, judge_at
with judge_at(sys.argv[1], Path(sys.argv[2])) as judge:
    judge.simulate(TASKS)
"""


def test_equal_calls_of_three_processes_are_made_once_even_if_one_is_killed(tmp_path: Path) -> None:
    """The first to ask is killed while its calls are in flight; the others wait for each other and make what it left."""
    reached, killed = threading.Event(), threading.Event()

    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        if number == 3:
            reached.set()
            killed.wait()
        return completions(number, path, body)

    source, tests = str(Path(evalkit.__file__).parent.parent), str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with endpoint(script) as fake:
        command = [sys.executable, "-c", RUN, fake.url, str(tmp_path), source, tests]
        first = subprocess.Popen(command, env=environment)
        reached.wait()
        others = [subprocess.Popen(command, env=environment) for _ in range(2)]
        first.kill()
        first.wait()
        killed.set()
        assert [process.wait() for process in others] == [0, 0]
        assert fake.requests == len(TASKS) + 1, "the one that was in flight is asked again"
    store = CallStore(tmp_path)
    assert len(store) == len(list(store.rows())) == len(TASKS)


def test_a_killed_run_does_not_send_finished_calls_again(tmp_path: Path) -> None:
    reached, killed = threading.Event(), threading.Event()

    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        if number == 6:
            reached.set()
            killed.wait()  # the kill comes while this one is in flight
        return completions(number, path, body)

    source, tests = str(Path(evalkit.__file__).parent.parent), str(Path(__file__).parent.parent)
    with endpoint(script) as fake:
        command = [sys.executable, "-c", RUN, fake.url, str(tmp_path), source, tests]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        process = subprocess.Popen(command, env=environment)
        reached.wait()
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed.set()
        assert len(CallStore(tmp_path)) == 5
        fake.script = completions
        with judge_at(fake.url, tmp_path) as judge:
            assert all(a.status == "ok" for a in judge.simulate(TASKS))
            assert len(judge.drain_calls()) == len(TASKS)  # the killed run's calls are told too
        assert fake.requests == 6 + len(TASKS) - 5


def test_an_interrupted_run_does_not_wait_for_answers(tmp_path: Path) -> None:
    reached = threading.Event()

    def script(number: int, path: str, body: dict[str, Any]) -> Answer:
        if number == 3:
            reached.set()
            released.wait()
        return completions(number, path, body)

    released = threading.Event()
    source, tests = str(Path(evalkit.__file__).parent.parent), str(Path(__file__).parent.parent)
    with endpoint(script) as fake:
        command = [sys.executable, "-c", RUN, fake.url, str(tmp_path), source, tests]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        reached.wait()
        try:
            process.send_signal(signal.SIGINT)
            process.wait()  # the third answer never comes while this waits
        finally:
            process.kill()
            process.wait()
            released.set()
    assert process.returncode != 0
    assert len(CallStore(tmp_path)) == 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def local(folder: Path, model: Path, **settings: Any) -> ModelJudge:
    config = JudgeConfig(provider="local", model=str(model), dtype="float32", explanation_tokens=4, **settings)
    return JUDGES.get("local")(config, folder, Progress(quiet=True))


def engine_of(judge: ModelJudge) -> Any:
    assert isinstance(judge.transport.backend, LocalBackend)
    return judge.transport.backend.engine


def test_the_local_judge_is_loaded_only_when_it_is_needed_and_freed_by_close(tmp_path: Path, tiny: Path) -> None:
    with local(tmp_path, tiny) as judge:
        identity = judge.identity
        assert engine_of(judge) is None
        answers = judge.simulate(TASKS[:3])
        judge.explain([ExplainTask([Example(["a"], [1.0])])])
        assert engine_of(judge) is not None
    assert engine_of(judge) is None
    assert all(a.status == "ok" and min(a.expected) >= 0 and max(a.expected) <= 10 for a in answers if a.expected)
    with local(tmp_path, tiny, concurrency=1, timeout_s=9.0) as again:
        assert again.identity == identity
        assert again.simulate(TASKS[:3]) == answers
        assert engine_of(again) is None


def test_slots_and_one_at_a_time_agree_on_the_local_model(tmp_path: Path, tiny: Path) -> None:
    with local(tmp_path / "a", tiny) as slots:
        together = slots.simulate(TASKS[:2])
    with local(tmp_path / "b", tiny, simulation="one-at-a-time") as single:
        for a, b in zip(together, single.simulate(TASKS[:2]), strict=True):
            assert a.expected == pytest.approx(b.expected, abs=1e-3)


LOCAL_RUN = """
import sys
from pathlib import Path
from test_judge_faults import TASKS, engine_of, local
with local(Path(sys.argv[1]), Path(sys.argv[2]), batch=1) as judge:
    judge.transport.backend.open()
    engine, read, done = engine_of(judge), engine_of(judge).read, []
    def counted(*arguments, **named):
        if len(done) == 3:
            print("three", flush=True)
            sys.stdin.read()
        done.append(read(*arguments, **named))
        return done[-1]
    engine.read = counted
    judge.simulate(TASKS)
"""


def test_a_killed_run_of_the_local_judge_loses_no_call_and_leaves_no_process(tmp_path: Path, tiny: Path) -> None:
    source, here = str(Path(evalkit.__file__).parent.parent), str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, here, str(Path(here).parent)])}
    command = [sys.executable, "-c", LOCAL_RUN, str(tmp_path), str(tiny)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"three\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert len(CallStore(tmp_path)) == 3
    with local(tmp_path, tiny, batch=1) as judge:
        assert all(a.status == "ok" for a in judge.simulate(TASKS))
        assert len(judge.drain_calls()) == len(TASKS)


def test_a_model_that_cannot_be_loaded_is_named_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama"}')
    (broken / "model.safetensors").write_bytes(b"nothing")
    with local(tmp_path / "calls", broken) as judge, pytest.raises(JudgeSetupError, match="cannot be loaded") as caught:
        judge.simulate(TASKS[:1])
    assert caught.value.where == "broken" and caught.value.fix


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(JudgeSetupError, match="no Hugging Face folder"):
        local(tmp_path / "calls", tmp_path)
    assert not (tmp_path / "calls").exists()
