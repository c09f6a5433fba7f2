"""What an endpoint takes of a request: a setting that it refuses is left out or said otherwise, and that is remembered.

1. A refusal that names a setting of the request changes that setting: the other name of the limit on an answer, no temperature,
   JSON without a schema, then no format at all, fewer alternatives, no logprobs.
2. A chat endpoint that has answered nothing yet and refuses without saying why is tried with the settings that servers most often
   lack taken out one after the other.
3. Changes are kept once a request with them is answered, for each path and model. No form of a request is sent twice.
   Every answer says which settings it was had without.
4. The refusal of a prompt, of the key or of the model changes nothing.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

from evalkit.judges.cost import Usage
from evalkit.judges.transport import Refused, Reply, Transport

Body = dict[str, Any]

_FORMAT = r"json|response_?format|structured|schema|grammar|guided"
_WORDS = {
    "max_completion_tokens": r"max_(completion_)?tokens",
    "max_tokens": r"max_(completion_)?tokens",
    "no temperature": r"temperature|seed|sampling",
    "json_object": _FORMAT,
    "no format": _FORMAT,
    "no logprobs": r"logprob",
    "no stop": r"\bstop\b",
}
"""Changes and the words of a refusal that call for them, in the order in which they are tried."""
_RENAMED = ("max_completion_tokens", "max_tokens")
_OUT_OF_RANGE = re.compile(r"too (large|high|many|small|low)|at (most|least)|exceed|maximum|minimum|greater than|less than")
"""A limit that is known but out of range: its other name does not help."""
_UNNAMED = ("json_object", "no logprobs", "no format", "no temperature", "max_completion_tokens", "max_tokens")
"""Changes tried where a refusal says nothing, in this order."""


def changed(change: str, body: Body) -> Body:
    """``body`` with one change; equal to it where the change has nothing to do."""
    chat = "messages" in body
    if change in ("max_completion_tokens", "max_tokens"):
        old = "max_tokens" if change == "max_completion_tokens" else "max_completion_tokens"
        return {change if name == old else name: value for name, value in body.items()} if chat and old in body else body
    if change == "json_object":
        with_schema = body.get("response_format", {}).get("type") == "json_schema"
        return body | {"response_format": {"type": "json_object"}} if with_schema else body
    if match := re.fullmatch(r"logprobs (\d+)", change):
        name = "top_logprobs" if chat else "logprobs"
        return body | {name: min(body[name], int(match[1]))} if name in body else body
    without = {
        "no temperature": ("temperature", "seed"),
        "no format": ("response_format",),
        # completions are read by their logprobs: without them there is nothing to ask for
        "no logprobs": ("logprobs", "top_logprobs") if chat else (),
        "no stop": ("stop",),
    }[change]
    return {name: value for name, value in body.items() if name not in without}


class Adapter:
    """Posts through a transport, in the words the endpoint takes. Thread-safe."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], tuple[str, ...]] = {}

    def known(self, endpoint: str, model: str) -> tuple[str, ...]:
        """The changes that requests to a path and model need, as far as they were found; ``learn`` takes them again."""
        with self._lock:
            return self._known.get((endpoint, model), ())

    def learn(self, endpoint: str, model: str, changes: tuple[str, ...]) -> None:
        """Keep changes that another process found."""
        with self._lock:
            self._known[endpoint, model] = changes

    def post(self, endpoint: str, body: Body, worst: Usage, stopped: threading.Event | None = None) -> Reply:
        """As ``Transport.post``, with as many requests as the endpoint refuses settings; together they are one refusal."""
        model = str(body.get("model", ""))
        answered_before = (endpoint, model) in self._known
        applied = self.known(endpoint, model)
        left_out = []
        for change in applied:
            left_out += [change] if changed(change, body) != body else []
            body = changed(change, body)
        refused: list[Body] = []
        while True:
            try:
                reply = self.transport.post(endpoint, body, worst, stopped)
            except Refused as refusal:
                refused.append(body)
                changes = _called_for(refusal, body, applied, unnamed=not answered_before)
                called_for = next((change for change in changes if changed(change, body) not in refused), None)
                if called_for is None or (stopped is not None and stopped.is_set()):
                    self.transport.count(refusal, endpoint)
                    raise
                left_out.append(called_for)
                applied, body = (*applied, called_for), changed(called_for, body)
            else:
                self.learn(endpoint, model, applied)
                return reply._replace(left_out=tuple(left_out))


def _called_for(refusal: Refused, body: Body, applied: tuple[str, ...], *, unnamed: bool) -> Iterator[str]:
    """Changes that may turn a refusal, best first; each is made once."""
    text = f"{refusal.message} {refusal.code}".lower()
    changes = []
    if refusal.kind in ("request", "key", "forbidden") and refusal.status != 401:
        number = _smaller(text, body)
        changes += [f"logprobs {number}"] if number else []
        named = [change for change, words in _WORDS.items() if re.search(words, text)]
        changes += [change for change in named if not (change in _RENAMED and _OUT_OF_RANGE.search(text))]
    limit = "max_" in text and _OUT_OF_RANGE.search(text)
    if unnamed and refusal.kind == "request" and not limit and "messages" in body and not changes:
        changes = list(_UNNAMED)
    for change in changes:
        if change not in applied and changed(change, body) != body:
            yield change


def _smaller(text: str, body: Body) -> int | None:
    """The number of alternatives a refusal allows; None where it is not about their number."""
    asked = body.get("top_logprobs") or body.get("logprobs")
    if "logprob" not in text or isinstance(asked, bool) or not isinstance(asked, int):
        return None
    return max((number for number in map(int, re.findall(r"\b\d{1,3}\b", text)) if 0 < number < asked), default=None)
