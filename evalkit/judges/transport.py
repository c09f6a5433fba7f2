"""Requests to an OpenAI-compatible endpoint: what is tried again, what ends the run, what it cost.

1. Tried again, with growing waits: rate limits (after the wait the server asks for), time-outs, lost connections, 5xx, and the
   same said inside a 200. Never tried again: refusals, and an answer that is not JSON.
2. A wrong key, no credit and an unknown model end the run at once, and so does a 403 without a reason before any answer. So
   does a judge that does not answer its first request after all attempts, and one that failed ``give_up_after`` requests in a
   row. So does one that refused as many before it answered any, or in a row for reasons that are not the prompt's. Any other
   refusal or failure is one failed call.
3. The worst case of each attempt is reserved in the budget before it is sent.
4. Whatever the client library raises becomes one of these cases here; keys and passwords are taken out of every message.
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from evalkit.errors import EvalkitError, JudgeSetupError
from evalkit.judges.address import masked
from evalkit.judges.answers import Reported, usage_of
from evalkit.judges.config import JudgeConfig
from evalkit.judges.cost import Budget, Usage
from evalkit.judges.troubles import Trouble, trouble_in

if TYPE_CHECKING:
    import openai

LONGEST = 300
"""Characters of a message that are kept."""
_UNREADABLE = "an unreadable answer"
LONGEST_WAIT_S = 300.0
"""A server that asks for more patience than this is asked again sooner."""


class Connection(NamedTuple):
    """Where the endpoint is."""

    base_url: str
    key: str

    def __repr__(self) -> str:
        """Without the key: tracebacks print what they meet."""
        return f"Connection({self.base_url!r})"


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
        super().__init__(self.told)

    @property
    def told(self) -> str:
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


class _Failed(Exception):
    """One attempt that gave no answer.

    Args:
        trouble: what was said instead.
        headers: of the response, where there is one.
        what: how a message names it.
        again: another attempt may help.
        unsent: no server was reached with it, nor will be.
    """

    def __init__(self, trouble: Trouble, headers: Any = None, what: str = "", again: bool = False, unsent: bool = False) -> None:
        self.trouble, self.headers, self.again, self.unsent = trouble, headers, again, unsent
        self.what = what or (f"HTTP {trouble.status}" if trouble.status else "an error")
        super().__init__(trouble.message)


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
        self._where, self._key = config.base_url, ""
        self._reached = False
        self._answered: set[str] = set()
        """Endpoints that gave an answer with choices."""
        self._failed_in_a_row = self._refused_in_a_row = 0
        self._closed = False
        self._kept_prompts: int | None = None

    def _open(self) -> openai.OpenAI:
        with self._lock:
            if self._client is None:
                import openai  # takes a second to import; a run without new calls never needs it

                connection = self._connect()
                self._where, self._key = connection.base_url, connection.key
                local = "://127.0.0.1" in connection.base_url or "://localhost" in connection.base_url
                try:
                    self._client = openai.OpenAI(
                        base_url=connection.base_url,
                        api_key=connection.key or "none",
                        max_retries=0,
                        timeout=self.config.timeout_s,
                        # proxies cannot reach this machine's loopback
                        http_client=openai.DefaultHttpxClient(trust_env=not local),
                    )
                except Exception as error:  # proxies and certificates of the environment, in as many ways as there are libraries
                    proxy = "socks" in str(error).lower() or "proxy" in str(error).lower()
                    raise JudgeSetupError(
                        f"no connection can be made: {self.told(str(error))}",
                        where=self._where,
                        fix="pip install socksio for a SOCKS proxy, or unset ALL_PROXY, HTTPS_PROXY and HTTP_PROXY"
                        if proxy
                        else "check the proxies and certificates that the environment names (ALL_PROXY, SSL_CERT_FILE)",
                    ) from error
            return self._client

    @property
    def answered(self) -> bool:
        """Whether any request was answered."""
        return bool(self._answered)

    def told(self, message: str) -> str:
        """A server's or a library's message as it can be shown and stored: without keys and passwords, and not too long."""
        return masked(message, self._key)[:LONGEST]

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
        client = self._open()
        started = time.monotonic()
        attempts = 0
        last: _Failed | None = None

        def attempt() -> Reply:
            nonlocal attempts, last
            if last is not None and stopped is not None and stopped.is_set():
                raise last
            attempts += 1
            self.budget.reserve(worst)
            used = worst  # a request that was cut off may have been served and charged
            try:
                found = self._once(client, endpoint, body)
                usage = usage_of(found)
                used = usage.within(worst)
                return Reply(found, usage, time.monotonic() - started, attempts)
            except _Failed as failed:
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
        except _Failed as failed:
            if failed.unsent:
                raise JudgeSetupError(
                    f"no request can be sent: {failed.trouble.message}",
                    where=self._where,
                    fix="check base_url (http or https, host, port), its certificate, and the proxies that the environment names",
                ) from failed
            if failed.again or failed.trouble.kind == "passing":
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

    def _once(self, client: openai.OpenAI, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        """One attempt; raises _Failed, whatever the library raises."""
        import openai

        try:
            found = client.post(endpoint, cast_to=object, body=body)
        except openai.APIStatusError as error:
            told = error.body if error.body is not None else error.response.text
            said = trouble_in(told, error.status_code) or Trouble(error.status_code, str(error))
            raise _Failed(self._clean(said), error.response.headers) from error
        except openai.APITimeoutError as error:
            raise self._lost(error, "no answer in time") from error
        except openai.APIConnectionError as error:
            never = _never(error)
            if never:
                raise _Failed(Trouble(0, self.told(never)), unsent=True) from error
            raise self._lost(error, "no connection") from error
        except EvalkitError:
            raise
        except Exception as error:
            if isinstance(error, openai.APIResponseValidationError | ValueError) and not isinstance(error, UnicodeEncodeError):
                raise self._unreadable(f"the answer is not JSON: {error}") from error
            raise _Failed(Trouble(0, self.told(f"{type(error).__name__}: {error}")), unsent=True) from error
        trouble = trouble_in(found)
        if trouble is not None:
            raise _Failed(self._clean(trouble))
        if not isinstance(found, dict):
            raise self._unreadable("the answer is not a JSON object")
        return found

    def _clean(self, trouble: Trouble) -> Trouble:
        return trouble._replace(message=self.told(trouble.message), code=self.told(trouble.code))

    def _lost(self, error: Exception, what: str) -> _Failed:
        return _Failed(Trouble(0, self.told(str(error.__cause__ or "") or str(error))), what=what, again=True)

    def _unreadable(self, message: str) -> _Failed:
        return _Failed(Trouble(0, self.told(message)), what=_UNREADABLE, again=True)

    def _again(self, error: BaseException) -> bool:
        """Whether another attempt may help."""
        if self._closed or not isinstance(error, _Failed) or error.what == _UNREADABLE:
            return False
        if error.again:
            self._alive()
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
            where=self._where,
            fix="run again when it is back; finished calls are kept and are not made again",
        )

    def _failure(self, failed: _Failed, attempts: int, started: float) -> Unavailable:
        what = f"{failed.what} after {attempts} attempt{'s' * (attempts > 1)}: {failed.trouble.message}"
        lasting = failed.what == _UNREADABLE or failed.trouble.status == 500
        failure = Unavailable(what, attempts, time.monotonic() - started, lasting)
        with self._lock:
            self._failed_in_a_row += 1
            if not self._reached:
                failure.fatal = JudgeSetupError(
                    f"the judge does not answer: {what}",
                    where=self._where,
                    fix="check that it is up and that base_url is right; raise timeout_s if it is only slow",
                )
            elif self._failed_in_a_row >= self.config.give_up_after:
                failure.fatal = self._gone(what)
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


def _never(error: BaseException) -> str:
    """Why no request can ever be sent over this connection; '' where another attempt may help."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        wrong = isinstance(seen, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in text or "WRONG_VERSION" in text
        if wrong or type(seen).__name__ in ("UnsupportedProtocol", "LocalProtocolError", "InvalidURL", "TooManyRedirects"):
            return text or type(seen).__name__
        seen = seen.__cause__ or seen.__context__
    return ""


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
    asked = retry_after(error.headers) if isinstance(error, _Failed) and error.headers is not None else None
    own = min(60.0, 2.0 ** (state.attempt_number - 1)) * (1 + random.random() / 4)
    if asked is not None and asked >= 1:
        return min(asked, LONGEST_WAIT_S)
    return own  # also where the server says "at once": that would be a storm of attempts
