"""Requests to an OpenAI-compatible endpoint: what is tried again, what ends the run, what it cost.

1. Tried again, with growing waits: rate limits (after the wait the server asks for), time-outs, lost connections, 5xx.
2. Never tried again: 400, 401, 403, 404 and their like, an exhausted quota, an answer that is not JSON.
3. A wrong key ends the run at once. So does a judge that does not answer its first request after all attempts, and one that
   failed ``give_up_after`` requests in a row. Any other failure is one failed call.
4. The worst case of each attempt is reserved in the budget before it is sent.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from evalkit.errors import JudgeSetupError
from evalkit.judges.config import JudgeConfig
from evalkit.judges.cost import Budget, Usage

if TYPE_CHECKING:
    import openai

LONGEST_WAIT_S = 300.0
"""A server that asks for more patience than this is asked again sooner."""


class Connection(NamedTuple):
    """Where the endpoint is."""

    base_url: str
    key: str


class Reply(NamedTuple):
    """One answered request."""

    body: dict[str, Any]
    usage: Usage | None
    """None where the server reports none."""
    seconds: float
    """All attempts and waits."""
    attempts: int


class Refused(Exception):
    """The endpoint understood the request and will not serve it (400, 404, ...)."""

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message
        super().__init__(f"HTTP {status}: {message}")

    @property
    def too_long(self) -> bool:
        """Whether the prompt does not fit the model's context: the fault of one prompt, not of the set-up."""
        text = self.message.lower()
        return self.status in (400, 413) and ("context" in text or "too long" in text or "maximum" in text and "token" in text)


class Unavailable(Exception):
    """A request failed after all its attempts. ``fatal`` is set where it means that the judge is gone."""

    def __init__(self, message: str, attempts: int, seconds: float) -> None:
        self.attempts, self.seconds = attempts, seconds
        self.fatal: JudgeSetupError | None = None
        super().__init__(message)


class _Unreadable(Exception):
    """A 200 whose body is not a JSON object."""


def _nothing() -> None:
    pass


class Transport:
    """One endpoint. Thread-safe; connects at the first request.

    Args:
        connect: where the endpoint is; may start it. Called once.
        config: time-outs and attempts.
        budget: asked before every attempt.
        sleep: waits between attempts (seconds).
        alive: called when a connection is lost; raises JudgeSetupError where a better explanation is known.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        config: JudgeConfig,
        budget: Budget,
        sleep: Callable[[float], None] = time.sleep,
        alive: Callable[[], None] = _nothing,
    ) -> None:
        self.config, self.budget = config, budget
        self._connect, self._sleep, self._alive = connect, sleep, alive
        self._lock = threading.Lock()
        self._client: openai.OpenAI | None = None
        self._where = ""
        self._answered = False
        self._failed_in_a_row = 0
        self._closed = False
        self._kept_prompts: int | None = None

    def _open(self) -> openai.OpenAI:
        with self._lock:
            if self._client is None:
                import openai  # takes a second to import; a run without new calls never needs it

                connection = self._connect()
                self._where = connection.base_url
                local = "://127.0.0.1" in connection.base_url or "://localhost" in connection.base_url
                self._client = openai.OpenAI(
                    base_url=connection.base_url,
                    api_key=connection.key or "none",
                    max_retries=0,
                    timeout=self.config.timeout_s,
                    http_client=openai.DefaultHttpxClient(trust_env=not local),  # proxies cannot reach this machine's loopback
                )
            return self._client

    def post(self, endpoint: str, body: dict[str, Any], worst: Usage) -> Reply:
        """POST ``body`` to ``endpoint`` ("/completions"), with attempts and waits.

        Args:
            endpoint: path below the base URL.
            body: the JSON to send.
            worst: most tokens one attempt can cost.

        Raises:
            BudgetReached: the worst case does not fit the budget; nothing was sent.
            JudgeSetupError: the key is refused or the quota is exhausted.
            Refused: the endpoint will not serve this request.
            Unavailable: no readable answer after all attempts.
        """
        import openai

        client = self._open()
        started = time.monotonic()
        attempts = 0

        def attempt() -> Reply:
            nonlocal attempts
            attempts += 1
            self.budget.reserve(worst)
            used = Usage()
            try:
                found = client.post(endpoint, cast_to=object, body=body)
                used = worst
                if not isinstance(found, dict):
                    raise _Unreadable("the answer is not a JSON object")
                usage = _usage(found)
                used = usage or worst
                return Reply(found, usage, time.monotonic() - started, attempts)
            except openai.APIConnectionError:
                used = worst  # a request that was cut off may have been served and charged
                raise
            except (openai.APIResponseValidationError, ValueError) as error:
                used = worst
                raise _Unreadable(f"the answer is not JSON: {error}") from error
            finally:
                self.budget.settle(worst, used)

        retrying = Retrying(
            stop=stop_after_attempt(self.config.max_attempts),
            wait=_wait,
            retry=retry_if_exception(self._transient),
            sleep=self._sleep,
            reraise=True,
        )
        try:
            reply = retrying(attempt)
        except openai.APIStatusError as error:
            self._refuse(error)
            raise self._failure(error, attempts, started) from error
        except (openai.APIConnectionError, _Unreadable) as error:
            raise self._failure(error, attempts, started) from error
        with self._lock:
            self._answered, self._failed_in_a_row = True, 0
        return reply

    def _transient(self, error: BaseException) -> bool:
        import openai

        if self._closed:
            return False
        if isinstance(error, openai.APIConnectionError):
            self._alive()
            return True
        if isinstance(error, openai.RateLimitError):
            return error.code != "insufficient_quota"
        return isinstance(error, openai.APIStatusError) and (error.status_code >= 500 or error.status_code == 408)

    def _refuse(self, error: openai.APIStatusError) -> None:
        """Raise for a status that another attempt would not change; return for the others."""
        status, message = error.status_code, _message(error)
        env = self.config.api_key_env
        if status in (401, 403):
            raise JudgeSetupError(
                f"the judge refuses the key (HTTP {status}): {message}",
                where=self._where,
                fix=f"check the key in the environment variable {env or '(api_key_env is empty)'}, and base_url",
            ) from error
        if status == 402 or (status == 429 and error.code == "insufficient_quota"):
            raise JudgeSetupError(
                f"the account of the judge is out of credit: {message}",
                where=self._where,
                fix=f"top up the account behind {env} and run again; finished calls are kept",
            ) from error
        if 400 <= status < 500 and status not in (408, 429):
            with self._lock:
                self._answered, self._failed_in_a_row = True, 0
            raise Refused(status, message) from error

    def _failure(self, error: Exception, attempts: int, started: float) -> Unavailable:
        what = f"{_name(error)} after {attempts} attempt{'s' * (attempts > 1)}: {_message(error)}"
        failure = Unavailable(what, attempts, time.monotonic() - started)
        with self._lock:
            self._failed_in_a_row += 1
            if not self._answered:
                failure.fatal = JudgeSetupError(
                    f"the judge does not answer: {what}",
                    where=self._where,
                    fix="check that it is up and that base_url is right; raise timeout_s if it is only slow",
                )
            elif self._failed_in_a_row >= self.config.give_up_after:
                failure.fatal = JudgeSetupError(
                    f"the judge went away: {self._failed_in_a_row} requests failed in a row, the last one with {what}",
                    where=self._where,
                    fix="run again when it is back; finished calls are kept and are not made again",
                )
        return failure

    def kept_prompts(self) -> int:
        """Prompts whose beginnings the endpoint keeps at once: ``total_slots`` of llama.cpp's /props, else ``concurrency``."""
        import openai

        client = self._open()
        if self._kept_prompts is None:
            total: object = None
            try:
                found = client.get(
                    f"{self._where.rstrip('/').removesuffix('/v1')}/props", cast_to=object, options={"timeout": 30}
                )
                total = found.get("total_slots") if isinstance(found, dict) else None
            except (openai.OpenAIError, ValueError):
                pass  # not llama.cpp, or one that does not tell
            known = isinstance(total, int) and not isinstance(total, bool) and total >= 1
            self._kept_prompts = int(str(total)) if known else self.config.concurrency
        return self._kept_prompts

    def close(self) -> None:
        """Stop trying and drop the connections."""
        self._closed = True
        with self._lock:
            if self._client is not None:
                self._client.close()


def _usage(body: dict[str, Any]) -> Usage | None:
    usage = body.get("usage")
    if not isinstance(usage, dict) or not isinstance(usage.get("prompt_tokens"), int):
        return None
    return Usage(usage["prompt_tokens"], int(usage.get("completion_tokens") or 0))


def _name(error: Exception) -> str:
    import openai

    if isinstance(error, openai.APITimeoutError):
        return "no answer in time"
    if isinstance(error, openai.APIConnectionError):
        return "no connection"
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}"
    return "an unreadable answer"


def _message(error: Exception) -> str:
    body = getattr(error, "body", None)
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])[:300]
    return (str(error.__cause__ or "") or str(error))[:300]


def retry_after(headers: Any, now: datetime | None = None) -> float | None:
    """Seconds the server asks to wait, from ``retry-after-ms`` or ``retry-after`` (seconds or a date); None where it does not."""
    try:
        if headers.get("retry-after-ms"):
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after")
        if not value:
            return None
        if value.strip().replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, (parsedate_to_datetime(value) - (now or datetime.now(UTC))).total_seconds())
    except (TypeError, ValueError):
        return None


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    response = getattr(error, "response", None)
    asked = retry_after(response.headers) if response is not None else None
    if asked is not None:
        return min(asked, LONGEST_WAIT_S)
    return min(60.0, 2.0 ** (state.attempt_number - 1)) * (1 + random.random() / 4)
