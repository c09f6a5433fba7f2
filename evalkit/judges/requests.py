"""The contract of a backend: one request in, one completion out. It retries nothing, counts nothing and stores nothing.

1. A request has the form of OpenAI's API, which most servers share. A backend for another API reads what it needs of it from
   the properties of ``Request``.
2. A completion has OpenAI's form as well; ``Completion.of`` builds one from plain texts.
3. What went wrong is raised as ``Failed``. ``Transport`` decides from it: try again, fail this call, or end the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from evalkit.judges.troubles import Trouble


class Request(NamedTuple):
    """One request to a language model."""

    endpoint: str
    """'/completions' (prompts are continued) or '/chat/completions' (messages are answered)."""
    body: dict[str, Any]
    """The JSON of that request in OpenAI's API. Backends that take slots find ``slots`` and ``candidates`` in it too."""

    @property
    def model(self) -> str:
        """The model's name, '' where none is given."""
        return str(self.body.get("model", ""))

    @property
    def prompts(self) -> list[str]:
        """The prompts of a completion request; none of a chat request."""
        prompt = self.body.get("prompt", [])
        return [prompt] if isinstance(prompt, str) else list(prompt)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages of a chat request, each with ``role`` and ``content``; none of a completion request."""
        return list(self.body.get("messages", []))

    @property
    def most_tokens(self) -> int:
        """Most tokens of each answer."""
        return int(self.body.get("max_completion_tokens", self.body.get("max_tokens", 0)))

    @property
    def temperature(self) -> float | None:
        """Sampling temperature; None where the model's default is wanted."""
        return self.body.get("temperature")

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow; None where the answer is free text."""
        found = self.body.get("response_format", {}).get("json_schema", {}).get("schema")
        return found if isinstance(found, dict) else None


class Completion(NamedTuple):
    """The answer to one request."""

    body: Any
    """In OpenAI's form: ``choices``, one for each prompt, and ``usage``. It may also hold an error, which is recognised."""

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        *,
        ended: str = "stop",
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
    ) -> Completion:
        """A completion from plain texts.

        Args:
            texts: one for each prompt, or the one answer to the messages.
            ended: why the texts end: 'stop', 'length' (cut off), 'content_filter'.
            prompt_tokens: of the whole request; None where nobody counted.
            completion_tokens: of the same.
        """
        # a text is the answer to a prompt and the message of a chat at once
        choices = [
            {"index": index, "text": text, "message": {"content": text}, "finish_reason": ended}
            for index, text in enumerate(texts)
        ]
        return cls({"choices": choices, "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}})


class Failed(Exception):
    """A request without an answer.

    Args:
        trouble: status, message and code; its kind decides what follows (``troubles``).
        what: how a message names it; "HTTP 500" where left out.
        again: the same request may be answered later, whatever the kind.
        unsent: no request can ever be sent, so that nothing was charged.
        unreadable: there was an answer that is none.
        wait_s: seconds that the server asks to wait; None where it does not.
    """

    def __init__(
        self,
        trouble: Trouble,
        *,
        what: str = "",
        again: bool = False,
        unsent: bool = False,
        unreadable: bool = False,
        wait_s: float | None = None,
    ) -> None:
        self.trouble, self.again, self.unsent, self.unreadable, self.wait_s = trouble, again, unsent, unreadable, wait_s
        self.what = what or (f"HTTP {trouble.status}" if trouble.status else "an error")
        super().__init__(trouble.message)


class Backend(Protocol):
    """One language model. Inherit from it for the defaults; ``complete`` may be called from several threads at once."""

    where: str = ""
    """What error messages name as the place: an address or a model."""
    secret: str = ""
    """A key that no message and no file may show."""
    takes_slots: bool = False
    """Whether it reads distributions at ``slots`` and at all ``candidates`` of a request."""

    def open(self) -> None:
        """Connect, or load the model. Called before every request; does nothing where that is done already.

        Raises:
            JudgeSetupError: the model cannot be used at all.
        """

    def complete(self, request: Request) -> Completion:
        """Answer one request, once.

        Raises:
            Failed: there is no answer.
            JudgeSetupError: there will never be one.
        """
        ...

    def kept_prompts(self) -> int | None:
        """Prompts whose beginnings it keeps at once, None where that is not known. May ask the endpoint."""
        return None

    def close(self) -> None:
        """Free connections and memory."""
