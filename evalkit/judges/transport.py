"""Requests to a backend: what is tried again, what ends the run, what it cost.

1. Tried again, with growing waits: rate limits (after the wait the server asks for), time-outs, lost connections, 5xx, and the
   same said inside a 200. Never tried again: refusals, and an answer that is not JSON.
2. A wrong key, no credit and an unknown model end the run at once, and so does a 403 without a reason before any answer. So
   does a judge that does not answer its first request after all attempts, and one that failed ``give_up_after`` requests in a
   row. So does one that refused as many before it answered any, or in a row for reasons that are not the prompt's. Any other
   refusal or failure is one failed call.
3. The worst case of each attempt is reserved in the budget before it is sent.
4. Keys and passwords are taken out of every message.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from evalkit.errors import EvalkitError, JudgeSetupError
from evalkit.judges.address import masked
from evalkit.judges.answers.explanations import Reported, usage_of
from evalkit.judges.config import JudgeConfig
from evalkit.judges.cost import Budget, Usage
from evalkit.judges.requests import Backend, Failed, Request
from evalkit.judges.troubles import Trouble, trouble_in

LONGEST = 300
"""Characters of a message that are kept."""
LONGEST_WAIT_S = 300.0
"""A server that asks for more patience than this is asked again sooner."""


class Reply(NamedTuple):
    """One answered request."""

    body: dict[str, Any]
    usage: Reported
    """As far as the server reports it."""
    seconds: float
    """All attempts and waits."""
    attempts: int
    left_out: tuple[str, ...] = ()
    """Settings that the endpoint refused and this request did without."""


class Refused(Exception):
    """The endpoint understood the request and will not serve it (400, 404, ...)."""

    def __init__(self, trouble: Trouble, *, attempts: int = 1) -> None:
        self.status, self.message, self.code = trouble
        self.kind = trouble.kind
        self.attempts = attempts
        self.ends = False
        """It shows that the set-up is wrong: another prompt would be refused as well (``Transport.count``)."""
        super().__init__(self.text)

    @property
    def text(self) -> str:
        """Status and message."""
        return f"HTTP {self.status}: {self.message}" if self.status else self.message


class Unavailable(Exception):
    """A request failed after all its attempts. ``fatal`` is set where it means that the judge is gone.

    Args:
        message: what happened last.
        attempts: how often it was tried.
        seconds: all attempts and waits.
        lasting: it may be how this address always answers: HTTP 500, or no JSON.
    """

    def __init__(self, message: str, attempts: int, seconds: float, lasting: bool = False) -> None:
        self.attempts, self.seconds, self.lasting = attempts, seconds, lasting
        self.fatal: JudgeSetupError | None = None
        super().__init__(message)


class Transport:
    """Requests to one backend. Thread-safe.

    Args:
        backend: what answers.
        config: attempts, and when to give up.
        budget: asked before every attempt.
        sleep: waits between attempts (seconds).
    """

    def __init__(
        self, backend: Backend, config: JudgeConfig, budget: Budget, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.backend, self.config, self.budget, self._sleep = backend, config, budget, sleep
        self._lock = threading.Lock()
        self._reached = False
        self._answered: set[str] = set()
        """Endpoints that gave an answer with choices."""
        self._failed_in_a_row = self._refused_in_a_row = 0
        self._closed = False
        self._kept_prompts: int | None = None

    @property
    def answered(self) -> bool:
        """Whether any request was answered."""
        return bool(self._answered)

    def printable(self, message: str) -> str:
        """A server's or a library's message as it can be shown and stored: without keys and passwords, and not too long."""
        return masked(message, self.backend.secret)[:LONGEST]

    def post(self, endpoint: str, body: dict[str, Any], worst: Usage, stopped: threading.Event | None = None) -> Reply:
        """POST ``body`` to ``endpoint`` ("/completions"), with attempts and waits.

        Args:
            endpoint: path below the base URL.
            body: the JSON to send.
            worst: most tokens one attempt can cost.
            stopped: no other attempt is made once it is set.

        Raises:
            BudgetReached: the worst case does not fit the budget; nothing was sent.
            JudgeSetupError: no request can be sent at all.
            Refused: the endpoint will not serve this request; ``count`` says what follows from it.
            Unavailable: no readable answer after all attempts.
        """
        self.backend.open()
        started = time.monotonic()
        attempts = 0
        last: Failed | None = None

        def attempt() -> Reply:
            nonlocal attempts, last
            if last is not None and stopped is not None and stopped.is_set():
                raise last
            attempts += 1
            self.budget.reserve(worst)
            used = worst  # a request that was cut off may have been served and charged
            try:
                found = self._once(Request(endpoint, body))
                usage = usage_of(found)
                used = usage.within(worst)
                return Reply(found, usage, time.monotonic() - started, attempts)
            except EvalkitError:
                used = Usage()
                raise
            except Failed as failed:
                failed.trouble = self._clean(failed.trouble)
                last = failed
                if failed.trouble.status or failed.unsent:
                    used = Usage()
                raise
            finally:
                self.budget.settle(worst, used)

        def wait(seconds: float) -> None:
            if stopped is not None and self._sleep is time.sleep:
                stopped.wait(seconds)
            else:
                self._sleep(seconds)

        retrying = Retrying(
            stop=stop_after_attempt(self.config.max_attempts),
            wait=_wait,
            retry=retry_if_exception(lambda error: not (stopped and stopped.is_set()) and self._again(error)),
            sleep=wait,
            reraise=True,
        )
        try:
            reply = retrying(attempt)
        except Failed as failed:
            if failed.unsent:
                raise JudgeSetupError(
                    f"no request can be sent: {failed.trouble.message}",
                    where=self.where,
                    fix="check base_url (http or https, host, port), its certificate, and the proxies that the environment names",
                ) from failed
            if failed.again or failed.unreadable or failed.trouble.kind == "passing":
                raise self._failure(failed, attempts, started) from failed
            raise Refused(failed.trouble, attempts=attempts) from failed
        if reply.body.get("choices"):
            with self._lock:
                self._reached = True
                self._answered.add(endpoint)
                self._failed_in_a_row = self._refused_in_a_row = 0
        else:
            self._empty(reply)
        return reply

    def _once(self, request: Request) -> dict[str, Any]:
        """One attempt; raises Failed, whatever the backend raises, and where its body is an error or no answer."""
        try:
            found = self.backend.complete(request).body
        except (Failed, EvalkitError):
            raise
        except Exception as error:
            raise Failed(Trouble(0, f"{type(error).__name__}: {error}"), unsent=True) from error
        trouble = trouble_in(found)
        if trouble is not None:
            raise Failed(trouble)
        if not isinstance(found, dict):
            raise Failed(Trouble(0, "the answer is not a JSON object"), unreadable=True)
        return found

    def _clean(self, trouble: Trouble) -> Trouble:
        return trouble._replace(message=self.printable(trouble.message), code=self.printable(trouble.code))

    def _again(self, error: BaseException) -> bool:
        """Whether another attempt may help."""
        if self._closed or not isinstance(error, Failed) or error.unreadable:
            return False
        return error.again or error.trouble.kind == "passing"

    def count(self, refusal: Refused, endpoint: str) -> None:
        """Count a refusal that no other form of the request avoids; sets ``refusal.ends``."""
        with self._lock:
            self._reached = True
            if refusal.kind != "prompt" or not self._answered:
                self._refused_in_a_row += 1
            lasting = refusal.kind in ("key", "credit", "absent") or (
                refusal.kind == "forbidden" and endpoint not in self._answered
            )
            refusal.ends = lasting or self._refused_in_a_row >= self.config.give_up_after

    def _empty(self, reply: Reply) -> None:
        """Count an answer without choices; raises Unavailable where there are too many in a row."""
        with self._lock:
            self._reached = True
            self._failed_in_a_row += 1
            gone = self._failed_in_a_row >= self.config.give_up_after
        if gone:
            failure = Unavailable("an answer without choices", reply.attempts, reply.seconds)
            failure.fatal = self._gone(str(failure))
            raise failure

    def _gone(self, what: str) -> JudgeSetupError:
        return JudgeSetupError(
            f"the judge went away: {self._failed_in_a_row} requests failed in a row, the last one with {what}",
            where=self.where,
            fix="run again when it is back; finished calls are kept and are not made again",
        )

    def _failure(self, failed: Failed, attempts: int, started: float) -> Unavailable:
        name = "an unreadable answer" if failed.unreadable else failed.what
        what = f"{name} after {attempts} attempt{'s' * (attempts > 1)}: {failed.trouble.message}"
        lasting = failed.unreadable or failed.trouble.status == 500
        failure = Unavailable(what, attempts, time.monotonic() - started, lasting)
        with self._lock:
            self._failed_in_a_row += 1
            if not self._reached:
                failure.fatal = JudgeSetupError(
                    f"the judge does not answer: {what}",
                    where=self.where,
                    fix="check that it is up and that base_url is right; raise timeout_s if it is only slow",
                )
            elif self._failed_in_a_row >= self.config.give_up_after:
                failure.fatal = self._gone(what)
        return failure

    @property
    def where(self) -> str:
        """What messages name as the place of the backend."""
        return self.backend.where

    def kept_prompts(self) -> int:
        """Prompts whose beginnings the backend keeps at once; ``concurrency`` where it does not say."""
        if self._kept_prompts is None:
            self._kept_prompts = self.backend.kept_prompts() or self.config.concurrency
        return self._kept_prompts

    def close(self) -> None:
        """Stop trying and free the backend."""
        self._closed = True
        self.backend.close()


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait_s if isinstance(error, Failed) else None
    own = min(60.0, 2.0 ** (state.attempt_number - 1)) * (1 + random.random() / 4)
    if asked is not None and asked >= 1:
        return min(asked, LONGEST_WAIT_S)
    return own  # also where the server says "at once": that would be a storm of attempts
