"""From a list of calls to a list of outcomes: look up, claim, batch, send, store.

1. Calls whose answers are stored are answered from the store; equal calls are made once.
2. The others are packed into requests (prompts with the same settings share one, as far as ``batch`` allows) and sent
   by a few threads.
3. Each answer is parsed, stored, and only then used. An answer that cannot be parsed is a failed call.
4. A budget that is reached or a judge that is gone lets requests in flight finish, stores them, and then raises.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple

from evalkit.errors import JudgeSetupError
from evalkit.hashing import canonical, content_hash
from evalkit.judges.calls import CallStore, Outcome, Spent
from evalkit.judges.cost import Prices, Usage, most_tokens
from evalkit.judges.digits import DIGITS
from evalkit.judges.transport import Refused, Reply, Transport, Unavailable

ANSWERS = 2
"""Version of the stored answers' form; raise it when a parser keeps something else."""


class Call(NamedTuple):
    """One question to an endpoint."""

    purpose: str
    """'explain', 'simulate' or 'rate'."""
    endpoint: str
    """'/completions' or '/chat/completions'."""
    settings: dict[str, Any]
    """The payload without prompt or messages."""
    prompt: str | list[dict[str, str]]
    """A completion prompt, or chat messages."""
    parse: Callable[[dict[str, Any]], dict[str, Any]]
    """From one choice of the answer to what is stored; raises ValueError, KeyError, TypeError or IndexError."""
    completion_tokens: int
    """Most tokens the answer can have."""
    slots: tuple[int, ...] = ()
    """Character offsets the answer is read at."""
    series: str = ""
    """Calls of one series are sent alone and in order, each when the one before it is answered; empty: no matter when."""

    @property
    def worst(self) -> Usage:
        """Most tokens it can cost."""
        text = self.prompt if isinstance(self.prompt, str) else canonical(self.prompt)
        return Usage(most_tokens(text), self.completion_tokens)


class Asker:
    """Makes calls through one transport and one store.

    Args:
        transport: the endpoint.
        store: finished calls.
        judge: what besides the payload decides an answer (address or weights); part of every key.
        concurrency: requests in flight.
        batch: most prompts in one request.
        prices: for the cost of each call.
        send_slots: name the slots in the request (evalkit's own server computes nothing else).
    """

    def __init__(
        self,
        transport: Transport,
        store: CallStore,
        judge: dict[str, Any],
        *,
        concurrency: int = 1,
        batch: int = 1,
        prices: Prices | None = None,
        send_slots: bool = False,
    ) -> None:
        self.transport, self.store, self.judge = transport, store, judge
        self.concurrency, self.batch = concurrency, batch
        self.prices, self.send_slots = prices or Prices(), send_slots

    def key(self, call: Call) -> str:
        """Hash of everything that can change the call's answer."""
        asked = [call.endpoint, call.settings, call.prompt, list(call.slots)]
        return content_hash({"answers": ANSWERS, "judge": self.judge, "asked": asked})

    def ask(self, calls: Sequence[Call], finished: Callable[[int], None] = lambda index: None) -> list[Outcome]:
        """One outcome for each call, in order.

        Args:
            calls: the questions.
            finished: called, from this thread, with the index of each call whose outcome is known.

        Raises:
            BudgetReached, JudgeSetupError: the run must stop; finished calls are stored.
        """
        places: dict[str, list[int]] = {}
        for index, call in enumerate(calls):
            places.setdefault(self.key(call), []).append(index)
        outcomes: list[Outcome | None] = [None] * len(calls)

        def settle(key: str, outcome: Outcome) -> None:
            for index in places[key]:
                outcomes[index] = outcome
                finished(index)

        def settle_all(keys: list[str]) -> None:
            for key in keys:
                settle(key, waiting.pop(key).result())

        mine: dict[str, Call] = {}
        claimed: dict[str, Future[Outcome]] = {}
        waiting: dict[str, Future[Outcome]] = {}
        for key, indices in places.items():
            claim = self.store.claim(key)
            waiting[key] = claim.outcome
            if claim.mine:
                mine[key], claimed[key] = calls[indices[0]], claim.outcome
            elif claim.outcome.done() and claim.outcome.exception() is None:
                settle(key, waiting.pop(key).result())
        try:
            self._make(mine, settle_all)
        except BaseException as stop:
            for key, future in claimed.items():
                if not future.done():
                    self.store.abandon(key, stop)
            raise
        settle_all(list(waiting))
        return [outcome for outcome in outcomes if outcome is not None]

    def _make(self, mine: dict[str, Call], settled: Callable[[list[str]], None]) -> None:
        """Send every call; raise the first reason to stop, after requests in flight have been stored."""
        work = deque(self._pack(mine))  # each entry is worked off by one thread, request after request
        results: SimpleQueue[tuple[list[str], BaseException | None] | None] = SimpleQueue()
        stopped = threading.Event()

        def work_off() -> None:
            while work and not stopped.is_set():
                try:
                    requests = work.popleft()
                except IndexError:
                    break
                for keys in requests:
                    if stopped.is_set():
                        break
                    try:
                        self._send(keys, mine)
                    except BaseException as error:
                        stopped.set()
                        results.put((keys, error))
                    else:
                        results.put((keys, None))
            results.put(None)

        running = min(self.concurrency, len(work))
        if any(call.series for call in mine.values()):
            running = min(running, self.transport.kept_prompts())  # more series than that would push each other's beginnings out
        for _ in range(running):
            # daemons: an interrupted run ends now, not when the last answer has come
            threading.Thread(target=work_off, name="judge", daemon=True).start()
        stop: BaseException | None = None
        try:
            while running:
                result = results.get()
                if result is None:
                    running -= 1
                elif result[1] is None:
                    settled(result[0])
                else:
                    stop = stop or result[1]
        finally:
            stopped.set()
        if stop is not None:
            raise stop

    def _pack(self, calls: dict[str, Call]) -> Iterable[list[list[str]]]:
        """Requests that follow one another, as the keys in each: one of several calls, or a series of single ones.

        Keys that travel together have the same endpoint and settings, in the order given; chat requests hold one each.
        """
        groups: dict[str, list[str]] = {}
        for key, call in calls.items():
            single = key if call.endpoint != "/completions" else call.series
            groups.setdefault(canonical([call.endpoint, call.settings, single]), []).append(key)
        for keys in groups.values():
            if calls[keys[0]].series:
                yield [[key] for key in keys]
                continue
            for start in range(0, len(keys), self.batch):
                yield [keys[start : start + self.batch]]

    def _send(self, keys: list[str], calls: dict[str, Call]) -> None:
        batch = [calls[key] for key in keys]
        try:
            reply = self.transport.post(batch[0].endpoint, self.body(batch), _add(call.worst for call in batch))
        except Refused as refusal:
            if not refusal.too_long:
                raise self._setup(refusal) from refusal
            if len(keys) > 1:
                for key in keys:
                    self._send([key], calls)
            else:
                self.store.fail(keys[0], f"the prompt is too long for the judge: {refusal.message}", self._spent(batch[0]))
            return
        except Unavailable as failure:
            for key, call in zip(keys, batch, strict=True):
                self.store.fail(key, str(failure), self._spent(call, seconds=failure.seconds, attempts=failure.attempts))
            if failure.fatal is not None:
                raise failure.fatal from failure
            return
        self._keep(keys, batch, reply)

    def body(self, batch: list[Call]) -> dict[str, Any]:
        first = batch[0]
        if first.endpoint != "/completions":
            return {**first.settings, "messages": first.prompt}
        body = {**first.settings, "prompt": first.prompt if len(batch) == 1 else [call.prompt for call in batch]}
        if self.send_slots and first.purpose in ("simulate", "rate"):
            body["candidates"] = list(DIGITS)
        if self.send_slots and first.slots:
            body["slots"] = [list(call.slots) for call in batch]
        return body

    def _keep(self, keys: list[str], batch: list[Call], reply: Reply) -> None:
        choices = reply.body.get("choices")
        by_index = {}
        if isinstance(choices, list):
            for place, choice in enumerate(choices):
                if isinstance(choice, dict):
                    by_index[choice.get("index", place)] = choice
        for place, (key, call, used) in enumerate(zip(keys, batch, _share(reply.usage, batch), strict=True)):
            spent = self._spent(call, used, reply.seconds / len(batch), reply.attempts)
            if place not in by_index:
                self.store.fail(key, f"the judge answered {len(by_index)} of {len(batch)} prompts", spent)
                continue
            try:
                answer = call.parse(by_index[place])
            except (ValueError, KeyError, TypeError, IndexError) as error:
                self.store.fail(key, f"unusable answer: {error or type(error).__name__}", spent)
            else:
                self.store.finish(key, answer, spent)

    def _spent(self, call: Call, used: Usage | None = None, seconds: float = 0.0, attempts: int = 1) -> Spent:
        used = used or Usage()
        model = str(call.settings.get("model", ""))
        return Spent(call.purpose, model, used.prompt, used.completion, self.prices.dollars(used), round(seconds, 3), attempts)

    def _setup(self, refusal: Refused) -> JudgeSetupError:
        config = self.transport.config
        hint = "; set chat_logprobs = false if it is the logprobs it refuses" if "logprob" in refusal.message.lower() else ""
        return JudgeSetupError(
            f"the judge refuses the request (HTTP {refusal.status}): {refusal.message}",
            where=config.base_url,
            fix=f"check model ('{config.model}'), base_url and simulation ('{config.simulation}'){hint}",
        )


def _add(usages: Iterable[Usage]) -> Usage:
    every = list(usages)
    return Usage(sum(u.prompt for u in every), sum(u.completion for u in every))


def _share(usage: Usage | None, batch: list[Call]) -> list[Usage]:
    """A request's usage, split over its prompts by their length; their worst case where the server reports none."""
    worst = [call.worst for call in batch]
    if usage is None:
        return worst
    weights = [w.prompt for w in worst]
    shares, given = [], Usage()
    for place, weight in enumerate(weights):
        last = place == len(weights) - 1
        prompt = usage.prompt - given.prompt if last else usage.prompt * weight // max(1, sum(weights))
        completion = usage.completion - given.completion if last else usage.completion // len(batch)
        given = Usage(given.prompt + prompt, given.completion + completion)
        shares.append(Usage(prompt, completion))
    return shares
