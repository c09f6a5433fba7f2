"""What an answer says of itself, looked at in one place before any parser sees it.

1. Which prompt it belongs to: the indices of choices are used where they are whole and tell, their order where they say nothing,
   and an answer that cannot be distinguished from another belongs to nobody. An echo has to hold its prompt.
2. How it ended: cut off by its length, held back by a filter, a tool called, an error. Cut answers are marked, the others failed.
3. Where its tokens lie: counted from the token strings where these make up the prompt, else from the offsets the server gives,
   and then the token at a place has to begin what stands there.
4. What it cost, as far as it says so: what was not said is None.
5. Missing and null fields, contents in parts, and whatever else a parser trips over are failed answers with a reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from evalkit.judges.cost import Usage
from evalkit.judges.troubles import trouble_in

_ENDS = {
    "stop": "stop", "eos": "stop", "eos_token": "stop", "end_turn": "stop", "end": "stop", "stop_sequence": "stop",
    "stop_str": "stop", "stop_token": "stop", "stopped": "stop", "word": "stop", "complete": "stop", "completed": "stop",
    "finished": "stop", "done": "stop",
    "length": "length", "max_tokens": "length", "max_length": "length", "max_output_tokens": "length", "limit": "length",
    "model_length": "length", "context_length_exceeded": "length",
    "content_filter": "filter", "content-filter": "filter", "safety": "filter", "refusal": "filter", "recitation": "filter",
    "spii": "filter", "prohibited_content": "filter",
    "blocklist": "filter", "sensitive": "filter", "guardrail_intervened": "filter",
    "tool_calls": "tool", "function_call": "tool", "tool_use": "tool", "tool_call": "tool",
    "error": "error", "abort": "error", "aborted": "error", "cancelled": "error", "network_error": "error",
    "insufficient_system_resource": "error", "malformed_function_call": "error",
}  # fmt: skip
_FAILED_ENDS = {
    "filter": "the answer was held back by a content filter",
    "tool": "the judge called a tool instead of answering",
    "error": "the judge broke the answer off",
}


class Read(NamedTuple):
    """What became of one prompt."""

    answer: dict[str, Any] | None
    """What the parser made of it; None where it failed."""
    error: str = ""
    """Why it failed."""


class Reported(NamedTuple):
    """Tokens a server says it counted; None where it does not say."""

    prompt: int | None = None
    completion: int | None = None

    def within(self, worst: Usage) -> Usage:
        """What is charged to the budget: the worst case of what was not said."""
        prompt = worst.prompt if self.prompt is None else self.prompt
        return Usage(prompt, worst.completion if self.completion is None else self.completion)


Parser = Callable[[dict[str, Any]], dict[str, Any]]


def read(body: Mapping[str, Any], prompts: Sequence[str | None], parsers: Sequence[Parser]) -> list[Read]:
    """What became of each prompt of a request, in order.

    Args:
        body: the whole answer.
        prompts: the text that is echoed in front of each answer; None where nothing is.
        parsers: from a choice to what is kept; whatever they raise is a failed answer.
    """
    found = _by_prompt(body.get("choices"), prompts)
    return [each if isinstance(each, Read) else _parsed(each, parse) for each, parse in zip(found, parsers, strict=True)]


def _parsed(choice: dict[str, Any], parse: Parser) -> Read:
    trouble = trouble_in({"error": choice.get("error")})
    if trouble is not None:
        return Read(None, f"the judge answered with an error: {trouble.message}")
    how = ended(choice)
    if how in _FAILED_ENDS:
        return Read(None, _FAILED_ENDS[how])
    try:
        return Read(parse(choice))
    except Exception as error:  # an answer is a stranger's: whatever a parser trips over is a fault of the answer
        lacking = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        cut = "cut off by its length: " if how == "length" else ""
        return Read(None, f"unusable answer: {cut}{lacking}")


def _by_prompt(choices: Any, prompts: Sequence[str | None]) -> list[dict[str, Any] | Read]:
    """The choice of each prompt, or why it has none."""
    n = len(prompts)
    given = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    places = _places([_whole(choice.get("index")) for choice in given], n)
    found: list[dict[str, Any] | Read] = []
    for place, prompt in enumerate(prompts):
        mine = [choice for choice, at in zip(given, places, strict=True) if at == place]
        if len(mine) != 1:
            several = "; which are whose cannot be told" if given and places.count(None) else ""
            found.append(Read(None, f"the judge answered {len(given)} of {n} prompts{several}"))
        elif prompt is not None and not _echoes(mine[0].get("text"), prompt):
            found.append(Read(None, "the judge echoed another prompt than the one it was asked"))
        else:
            found.append(mine[0])
    return found


def _places(indices: list[int | None], n: int) -> list[int | None]:
    """The prompt each choice belongs to, None where that cannot be decided, from what the choices say of it."""
    known = [index for index in indices if index is not None]
    if len(indices) == n:
        if not known or (len(known) == n and len(set(known)) == 1):
            return list(range(n))  # they say nothing (or the same of all): servers without indices keep the order
        if len(known) == n and sorted(known) == list(range(min(known), min(known) + n)):
            return [index - min(known) for index in known]
    if len(indices) < n and known and min(known) > 0:
        return [None] * len(indices)  # the first is missing, or they count from another number
    if len(known) == len(indices):
        return [index if 0 <= index < n and known.count(index) == 1 else None for index in known]
    return [None] * len(indices)


def _whole(value: Any) -> int | None:
    """A whole number, from the forms in which servers write one; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,15}(?:\.0*)?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        return None
    return int(value)


def _echoes(text: Any, prompt: str) -> bool:
    """Whether ``text`` can be an echo of ``prompt``, as far as there is one; blanks and marks of the vocabulary do not count."""
    if not isinstance(text, str) or not text:
        return True
    bare = re.compile(r"[\s\ufffd]+")
    return bare.sub("", prompt.encode("utf-8", "replace").decode()) in bare.sub("", text) or "\ufffd" in text


def ended(choice: Mapping[str, Any]) -> str:
    """How an answer ended: 'length', 'filter', 'tool', 'error', 'stop', or '' where it does not say."""
    every = [choice.get(name) for name in ("finish_reason", "native_finish_reason", "stop_reason", "stop_type")]
    known = [_ENDS.get(said.strip().lower().rsplit(".", 1)[-1], "") for said in every if isinstance(said, str)]
    # a gateway may call "stop" what the model behind it calls otherwise; a stop_reason may be the text it stopped at
    return next((how for how in known if how not in ("stop", "")), "stop" if "stop" in known else "")


def text_of(choice: Mapping[str, Any]) -> str:
    """The text of a completion or of a chat message, parts of a content put together.

    Raises:
        ValueError: there is none: a refusal, reasoning only, or nothing.
    """
    message = choice.get("message")
    message = message if isinstance(message, Mapping) else {}
    content = message.get("content") if message.get("content") is not None else choice.get("text")
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {"text": part} for part in content]
        texts = [part.get("text") for part in parts if part.get("type", "text") in ("text", "output_text")]
        content = "".join(text for text in texts if isinstance(text, str)) if texts else None
    if isinstance(content, str) and content.strip():
        return content
    if message.get("refusal"):
        raise ValueError(f"the judge refuses to answer: {str(message['refusal'])[:80]}")
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError(_FAILED_ENDS["tool"])
    if any(message.get(name) for name in ("reasoning_content", "reasoning", "thinking", "reasoning_details")):
        raise ValueError("the judge reasoned and gave no answer; allow more tokens or switch its reasoning off")
    if isinstance(content, str):
        return content
    raise ValueError("the answer holds no text")


def usage_of(body: Mapping[str, Any]) -> Reported:
    """Tokens the answer says it cost."""
    usage = body.get("usage")
    if not isinstance(usage, Mapping):
        return Reported()
    counts = [_whole(usage.get(name)) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    prompt, completion, total = (count if count is not None and count >= 0 else None for count in counts)
    if total is not None and completion is None and prompt is not None and total >= prompt:
        completion = total - prompt
    if total is not None and prompt is None and completion is not None and total >= completion:
        prompt = total - completion
    return Reported(prompt, completion)


def alternatives_at(choice: Mapping[str, Any], prompt: str, slots: Sequence[int]) -> list[Any]:
    """What could have stood at each slot of an echoed prompt, as the server gives it; None where it gives nothing.

    Args:
        choice: with legacy logprobs: lists of tokens, top_logprobs and text_offset.
        prompt: the text that was sent.
        slots: character offsets in ``prompt``.

    Raises:
        ValueError: there are no logprobs, or their lists differ in length.
    """
    logprobs = choice.get("logprobs")
    tops = logprobs.get("top_logprobs") if isinstance(logprobs, Mapping) else None
    if not isinstance(logprobs, Mapping) or not isinstance(tops, list):
        raise ValueError("the answer holds no logprobs")
    tokens, offsets = logprobs.get("tokens"), logprobs.get("text_offset")
    lists = [each for each in (tops, tokens, offsets) if each is not None]
    if not all(isinstance(each, list) and len(each) == len(tops) for each in lists):
        raise ValueError("the lists of its logprobs differ in length")
    if not tokens or not all(isinstance(token, str) for token in tokens) or all(token[:9] == "token_id:" for token in tokens):
        tokens = None
    starts = _counted(tokens, prompt) if tokens else None
    if starts is None:
        starts = [_whole(offset) for offset in offsets or ()]
    places: dict[int, int] = {}
    for place, start in enumerate(starts):
        if start is not None and (tokens is None or _begins(tokens[place], prompt[start:])):
            places[start] = place
    return [tops[places[slot]] if slot in places else None for slot in slots]


def alternatives_of(text: str, places: Sequence[int], logprobs: Any) -> list[Any]:
    """What could have stood at single characters of a chat answer; those that are not a token of their own are left out.

    Args:
        text: the answer.
        places: of the characters in it.
        logprobs: as chat endpoints give them, one entry for each token, perhaps with those of reasoning in front.
    """
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    entries = [entry for entry in content if isinstance(entry, Mapping)] if isinstance(content, list) else []
    tokens = [str(entry.get("token", "")) for entry in entries]
    position = -"".join(tokens).rfind(text)
    if position > 0:
        return []  # the tokens do not make up the answer
    starts: dict[int, Any] = {}
    for token, entry in zip(tokens, entries, strict=True):
        if len(token.strip()) == 1:
            starts[position + token.index(token.strip())] = (token.strip(), entry.get("top_logprobs"))
        position += len(token)
    found = [starts.get(place, ("", None)) for place in places]
    return [top for place, (token, top) in zip(places, found, strict=True) if top and token == text[place]]


def _counted(tokens: Sequence[str], prompt: str) -> list[int | None] | None:
    """Where each token begins in ``prompt``, by counting; None where the tokens do not make it up."""
    for spelled in (tokens, [_shown(token) for token in tokens]):
        start = "".join(spelled).find(prompt)  # what stands before it is the server's own: a mark of the beginning
        if start >= 0:
            starts, position = [], -start
            for token in spelled:
                starts.append(position if token and position >= 0 else None)
                position += len(token)
            return starts
    return None


def _shown(token: str) -> str:
    """A vocabulary's entry as the text it stands for: two vocabularies have marks of their own for blanks."""
    return token.translate({0x120: " ", 0x2581: " ", 0x10A: "\n", 0x109: "\t"})


def _begins(token: str, text: str) -> bool:
    """Whether ``text`` can begin with ``token``."""
    token = _shown(token)
    return bool(token) and (text.startswith(token) or (bool(text) and token.startswith(text)))
