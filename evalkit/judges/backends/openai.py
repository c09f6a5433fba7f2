"""Provider 'openai': any OpenAI-compatible endpoint over HTTP, with the library ``openai``; its own retries are off.

What the library raises becomes ``Failed`` here, or a JudgeSetupError where its client cannot be made.
"""

from __future__ import annotations

import ssl
import threading
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evalkit.errors import JudgeSetupError
from evalkit.judges.address import key_from, masked
from evalkit.judges.base import JUDGES
from evalkit.judges.config import JudgeConfig
from evalkit.judges.model_judge import ModelJudge, judge_of
from evalkit.judges.requests import Backend, Completion, Failed, Request
from evalkit.judges.troubles import Trouble, trouble_in
from evalkit.util.progress import Progress

if TYPE_CHECKING:
    import openai


class Connection(NamedTuple):
    """Where the endpoint is."""

    base_url: str
    key: str

    def __repr__(self) -> str:
        """Without the key: tracebacks print what they meet."""
        return f"Connection({self.base_url!r})"


class OpenAIBackend(Backend):
    """One endpoint; its client is made at the first request.

    Args:
        connection: address and key.
        timeout_s: seconds without an answer after which a request has failed.
    """

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self.where, self.secret, self.timeout_s = connection.base_url, connection.key, timeout_s
        self._lock = threading.Lock()
        self._client: openai.OpenAI | None = None

    def open(self) -> None:
        """Make the client; raises JudgeSetupError where proxies or certificates of the environment cannot be used."""
        with self._lock:
            if self._client is not None:
                return
            import openai  # takes a second to import; a run without new calls never needs it

            local = "://127.0.0.1" in self.where or "://localhost" in self.where
            try:
                self._client = openai.OpenAI(
                    base_url=self.where,
                    api_key=self.secret or "none",
                    max_retries=0,
                    timeout=self.timeout_s,
                    # proxies cannot reach this machine's loopback
                    http_client=openai.DefaultHttpxClient(trust_env=not local),
                )
            except Exception as error:  # proxies and certificates of the environment, in as many ways as there are libraries
                proxy = "socks" in str(error).lower() or "proxy" in str(error).lower()
                raise JudgeSetupError(
                    f"no connection can be made: {masked(str(error), self.secret)[:300]}",
                    where=self.where,
                    fix="pip install socksio for a SOCKS proxy, or unset ALL_PROXY, HTTPS_PROXY and HTTP_PROXY"
                    if proxy
                    else "check the proxies and certificates that the environment names (ALL_PROXY, SSL_CERT_FILE)",
                ) from error

    def complete(self, request: Request) -> Completion:
        """One POST; raises Failed where there is no answer."""
        import openai

        assert self._client is not None
        try:
            return Completion(self._client.post(request.endpoint, cast_to=object, body=request.body))
        except openai.APIStatusError as error:
            body = error.body if error.body is not None else error.response.text
            trouble = trouble_in(body, error.status_code) or Trouble(error.status_code, str(error))
            raise Failed(trouble, wait_s=retry_after(error.response.headers)) from error
        except openai.APITimeoutError as error:
            raise _lost(error, "no answer in time") from error
        except openai.APIConnectionError as error:
            never = _never(error)
            if never:
                raise Failed(Trouble(0, never), unsent=True) from error
            raise _lost(error, "no connection") from error
        except UnicodeEncodeError:
            raise
        except (openai.APIResponseValidationError, ValueError) as error:
            raise Failed(Trouble(0, f"the answer is not JSON: {error}"), unreadable=True) from error

    def kept_prompts(self) -> int | None:
        """``total_slots`` of llama.cpp's /props; None from other servers."""
        import openai

        self.open()
        assert self._client is not None
        address = f"{self.where.rstrip('/').removesuffix('/v1')}/props"
        try:
            found: Any = self._client.get(address, cast_to=object, options={"timeout": 30})
        except (openai.OpenAIError, ValueError):
            return None
        total = found.get("total_slots") if isinstance(found, dict) else None
        return total if isinstance(total, int) and not isinstance(total, bool) and total >= 1 else None

    def close(self) -> None:
        """Drop the connections."""
        with self._lock:
            if self._client is not None:
                self._client.close()


def _lost(error: Exception, what: str) -> Failed:
    return Failed(Trouble(0, str(error.__cause__ or "") or str(error)), what=what, again=True)


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


def _connection(config: JudgeConfig) -> Connection:
    """The endpoint's address and key.

    Raises:
        JudgeSetupError: there is no model name, or no key in the environment.
    """
    if not config.model:
        raise JudgeSetupError("the judge has no model", where="[judge] model", fix="name a model the endpoint serves")
    return Connection(config.base_url, key_from(config.api_key_env))


@JUDGES.register("openai")
def openai_judge(config: JudgeConfig, folder: Path, progress: Progress) -> ModelJudge:
    """The judge at ``config.base_url``; raises JudgeSetupError where no key or model is given."""
    backend = OpenAIBackend(_connection(config), config.timeout_s)
    return judge_of(backend, config, folder, progress, {"base_url": config.base_url.rstrip("/")})
