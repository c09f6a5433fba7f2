"""The most that judge calls can cost, before the first is made.

1. An evaluation says what it will ask at most (``Questions``): how many tasks of a kind, and how much text each shows.
2. The longest task of each kind is made up and turned into calls by the code that asks, with the judge's settings. Each call is
   taken at its worst case (``Call.worst``), as the budget takes it: a token for every two bytes of prompt, and all completion
   tokens it may use.
3. How long a text can be follows from what is shown: no fragment of the scoring text has more bytes than the longest one of as
   many tokens (``Widths``).
4. Where it is not known yet how the endpoint can simulate, the most of all ways counts, and the calls that try it out.
5. Every call may fail and be asked again: all of it is taken ``rounds`` times. Attempts that end without an answer, such as
   time-outs, are not in it, as most endpoints do not charge them; the budget counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from evalkit.judges.asking import Call
from evalkit.judges.base import Example, ExplainTask, Questions, RateTask, SimulateTask
from evalkit.judges.calls import CallStore
from evalkit.judges.config import JudgeConfig
from evalkit.judges.cost import Prices, Usage
from evalkit.judges.model_judge import probe_key
from evalkit.judges.prompts import rubric
from evalkit.judges.prompts.explanation import explain_call
from evalkit.judges.prompts.simulation import WAYS, probes, simulate_calls
from evalkit.judges.tokens import visible

LEAST_BYTES = 8
"""Bytes a fragment has besides its tokens: separators and quotes around what is shown."""


class Bill(NamedTuple):
    """What calls may cost at most."""

    calls: int = 0
    """Second and later rounds of calls that failed among them."""
    usage: Usage = Usage()
    dollars: float | None = 0.0
    """None where a price is unknown."""

    def and_more(self, other: Bill) -> Bill:
        """Both together."""
        usage = Usage(self.usage.prompt + other.usage.prompt, self.usage.completion + other.usage.completion)
        known = self.dollars is not None and other.dollars is not None
        return Bill(self.calls + other.calls, usage, (self.dollars or 0.0) + (other.dollars or 0.0) if known else None)


class Widths:
    """How many bytes text can have that a judge is shown.

    Args:
        strings: from token ids to the strings that are shown.
        tokens: windows of the scoring text.
        vocabulary: number of token ids.
    """

    def __init__(self, strings: Callable[[Sequence[int]], list[str]], tokens: Int[np.ndarray, "N T"], vocabulary: int) -> None:
        self._strings, self._vocabulary = strings, vocabulary
        ids, places = np.unique(tokens, return_inverse=True)
        self.sizes: Int[np.ndarray, "N T"] = self._of(ids.tolist())[places.reshape(tokens.shape)]
        """(N, T) bytes of each token as it is shown."""
        self._widest: int | None = None

    def _of(self, ids: Sequence[int]) -> Int[np.ndarray, " L"]:
        """Bytes of each token."""
        return np.array([len(visible(text).encode("utf-8", "replace")) for text in self._strings(ids)], dtype=np.int64)

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return int(self.sizes.shape[1])

    def stretch(self, tokens: int) -> int:
        """Most bytes of ``tokens`` tokens in a row in one window."""
        ends = np.pad(self.sizes.cumsum(axis=1), ((0, 0), (1, 0)))
        length = min(tokens, self.context)
        return int((ends[:, length:] - ends[:, :-length]).max())

    def written(self, tokens: int) -> int:
        """Most bytes of ``tokens`` tokens of any kind."""
        if self._widest is None:
            self._widest = int(self._of(range(self._vocabulary)).max())
        return tokens * self._widest


def known_mode(config: JudgeConfig, folder: Path) -> str | None:
    """The way of simulating as far as it is settled without asking the endpoint; None where it is not.

    Args:
        folder: of the durable calls.
    """
    if config.simulation != "auto":
        return config.simulation
    if config.provider in ("local", "lexical", "scripted"):  # the local model, and fakes, read all slots of a prompt at once
        return WAYS[0]
    if config.provider != "openai":
        return None
    with closing(CallStore(folder)) as store:
        known = store.get(probe_key(config, {"base_url": config.base_url.rstrip("/")}))
    return str(known["mode"]) if known is not None else None


def bill(config: JudgeConfig, mode: str | None, asked: Sequence[Questions], widths: Widths) -> Bill:
    """What ``asked`` may cost at most.

    Args:
        mode: the way of simulating; None where it is not known yet.
    """
    if config.provider == "lexical" or not any(one.tasks for one in asked):
        return Bill()
    ways = [[call for one in asked for call in _calls(config, way, one, widths)] for way in ([mode] if mode else WAYS)]
    worst = [_sum(calls) for calls in ways]
    counts, usages = [count for count, _ in worst], [usage for _, usage in worst]
    most = Usage(max(usage.prompt for usage in usages), max(usage.completion for usage in usages))
    usage = Usage(config.rounds * most.prompt, config.rounds * most.completion)
    calls = config.rounds * max(counts)
    if mode is None:
        tried = [probe.call.worst for probe in probes(config)]
        calls += len(tried)
        usage = Usage(usage.prompt + sum(one.prompt for one in tried), usage.completion + sum(one.completion for one in tried))
    prices = Prices(config.dollars_per_million_prompt, config.dollars_per_million_completion)
    return Bill(calls, usage, prices.dollars(usage))


class _Several(NamedTuple):
    """A call, made as often as there are tasks of its kind."""

    times: int
    call: Call


def _sum(calls: Sequence[_Several]) -> tuple[int, Usage]:
    worst = [(one.times, one.call.worst) for one in calls]
    return sum(one.times for one in calls), Usage(
        sum(times * usage.prompt for times, usage in worst), sum(times * usage.completion for times, usage in worst)
    )


def _calls(config: JudgeConfig, mode: str, one: Questions, widths: Widths) -> list[_Several]:
    """The calls of one task of the longest kind, each as often as there are tasks."""
    if not one.tasks:
        return []
    tokens = one.tokens or widths.context
    size = one.text_bytes or (widths.written(tokens) if one.written else widths.stretch(tokens))
    words = "w" * (one.words or 4 * config.explanation_characters)
    if one.purpose == "explain":
        calls = [explain_call(config, mode, _explained(one, tokens, size))]
    elif one.purpose == "simulate":
        calls = simulate_calls(mode, config, SimulateTask(words, _spread(tokens, size)))
    else:
        # marks in the text itself are taken apart, which makes three characters of two
        text = _spread(tokens, size + size // 2)
        calls = [rubric.rate_call(mode, config, RateTask(words, text, [place % 2 == 0 for place in range(len(text))]))]
    return [_Several(one.tasks, call) for call in calls]


def _spread(tokens: int, size: int) -> list[str]:
    """``tokens`` strings with at least ``size`` bytes, the first with all that are left over."""
    return ["x" * max(1, size - tokens + 1), *["x"] * (tokens - 1)]


def _explained(one: Questions, tokens: int, size: int) -> ExplainTask:
    """The longest task: whatever a prompt shows of an example twice, the token with nearly all of its bytes is among it."""
    token = "x" * (size + LEAST_BYTES)
    firing = max(1, -(-tokens // 5) - 1)  # one more, and a table would not repeat those that fire
    shown = Example([token, *[""] * (tokens - 1)], [1.0] * firing + [0.0] * (tokens - firing))
    quiet = Example([*[""] * (tokens - 1), token], [0.0] * tokens)
    return ExplainTask([shown] * one.fragments, [quiet] * one.silent, [shown] * one.further)
