"""From a list of calls to a list of outcomes: look up, claim, batch, send, store, ask once more.

1. Calls whose answers are stored are answered from the store; equal calls are made once, also where another process asks them.
2. The others are packed into requests (prompts with the same settings share one, as far as ``batch`` allows) and sent
   by a few threads.
3. Each answer is read (``answers``), stored, and only then used. An answer that cannot be read is a failed call, and so is a
   prompt that is refused.
4. Calls that failed in a way that may pass are asked again, each alone, ``rounds`` times in all, before anybody hears of them.
5. A budget that is reached or a judge that is gone lets requests in flight finish, stores them, and then raises. So does a judge
   that has refused everything. Where the budget is too small to ask again, what failed has failed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

from evalkit.errors import BudgetReached, JudgeSetupError, StoreError
from evalkit.judges.adapting import Adapter
from evalkit.judges.answers import text as answer_text
from evalkit.judges.answers.explanations import Parser, Reported, read
from evalkit.judges.calls import CallStore, Outcome, Settled, Spent
from evalkit.judges.cost import Prices, Usage, most_tokens
from evalkit.judges.digits import DIGITS
from evalkit.judges.transport import Refused, Reply, Transport, Unavailable
from evalkit.util.hashing import canonical, content_hash

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
    parse: Parser
    """From one choice of the answer to what is stored; whatever it raises is a failed call."""
    completion_tokens: int
    """Most tokens the answer can have."""
    slots: tuple[int, ...] = ()
    """Character offsets the answer is read at."""
    series: str = ""
    """Calls of one series are sent alone and in order, each when the one before it is answered; empty: no matter when."""

    @property
    def echoed(self) -> str | None:
        """What the answer repeats in front; None where it repeats nothing."""
        return self.prompt if self.settings.get("echo") and isinstance(self.prompt, str) else None

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
        rounds: times a call that failed is asked in all.
        prices: for the cost of each call.
    """

    def __init__(
        self,
        transport: Transport,
        store: CallStore,
        judge: dict[str, Any],
        *,
        concurrency: int = 1,
        batch: int = 1,
        rounds: int = 1,
        prices: Prices | None = None,
    ) -> None:
        self.transport, self.store, self.judge = transport, store, judge
        self.adapter = Adapter(transport)
        self.concurrency, self.batch, self.rounds = concurrency, batch, rounds
        self.prices, self.send_slots = prices or Prices(), transport.backend.takes_slots

    def key(self, call: Call) -> str:
        """Hash of everything that can change the call's answer."""
        asked = [call.endpoint, call.settings, call.prompt, list(call.slots)]
        asked += [{"explanation": answer_text.VERSION}] if call.purpose == "explain" else []
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
        calls = [_sendable(call) for call in calls]
        for index, call in enumerate(calls):
            places.setdefault(self.key(call), []).append(index)
        outcomes: list[Outcome | None] = [None] * len(calls)

        def settle(key: str, outcome: Outcome) -> None:
            for index in places[key]:
                outcomes[index] = outcome
                finished(index)

        open_keys = list(places)
        while open_keys:
            claimed = self.store.claim(open_keys)
            unmade = set(claimed.mine)

            def made(settled: list[Settled], unmade: set[str] = unmade) -> None:
                for one in settled:
                    unmade.discard(one.key)
                    settle(one.key, one.outcome)

            try:
                for key, answer in claimed.answers.items():
                    settle(key, Outcome(answer))
                self._rounds({key: calls[places[key][0]] for key in claimed.mine}, made)
            except BaseException:
                with suppress(StoreError):  # what stopped the run is the better reason; closing the store releases them, too
                    self.store.release(list(unmade))
                raise
            open_keys = claimed.others
            if open_keys and not claimed.mine:
                self.store.wait()
        return [outcome for outcome in outcomes if outcome is not None]

    def _rounds(self, calls: dict[str, Call], made: Callable[[list[Settled]], None]) -> None:
        """Make calls, and those that failed in a way that may pass again."""
        work = _Work(calls)
        for number in range(1, self.rounds + 1):
            work.begin(last=number == self.rounds, batch=self.batch if number == 1 else 1)
            self._make(work, made)
        if work.refused is not None and not self.transport.answered:
            raise self.setup_error(work.refused) from work.refused

    def _make(self, work: _Work, made: Callable[[list[Settled]], None]) -> None:
        """Send what is to be sent; raise the first reason to stop, after requests in flight have been stored."""
        results: SimpleQueue[list[Settled] | BaseException | None] = SimpleQueue()
        stopped = work.stopped

        def work_off() -> None:
            while work.left and not stopped.is_set():
                try:
                    requests = work.left.popleft()
                except IndexError:
                    break
                for keys in requests:
                    if stopped.is_set():
                        break
                    try:
                        results.put(self._send(keys, work))
                    except BaseException as error:
                        stopped.set()
                        results.put(error)
            results.put(None)

        if work.left:
            self.transport.backend.open()  # a model is loaded in this thread, before there are others
        running = min(self.concurrency, len(work.left))
        if any(call.series for call in work.calls.values()):
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
                elif isinstance(result, BaseException):
                    stop = stop or result
                else:
                    made(result)
        finally:
            stopped.set()
        if stop is not None:
            raise stop

    def _send(self, keys: list[str], work: _Work) -> list[Settled]:
        """Make the calls of one request; those that are settled now."""
        batch = [work.calls[key] for key in keys]
        if len(keys) > 1 and work.alone:
            return self._each(keys, work)
        try:
            worst = _add(call.worst for call in batch)
            reply = self.adapter.post(batch[0].endpoint, self.body(batch), worst, work.stopped)
        except Refused as refusal:
            if refusal.ends:
                raise self.setup_error(refusal) from refusal
            if len(keys) > 1:
                done = self._each(keys, work)
                work.alone = work.alone or not (set(keys) & work.turned_down)  # each is taken: it is lists that are not
                return done
            work.turned_down.add(keys[0])
            if refusal.kind == "request":
                work.refused = refusal
            one = refusal.kind in ("prompt", "forbidden")
            said = "the judge refuses this prompt" if one else "the judge refuses the request"
            spent = self._spent(batch[0], Reported(), attempts=refusal.attempts)
            return self._store([Settled(keys[0], spent, error=f"{said} ({refusal.text})")], work, again=False)
        except Unavailable as failure:
            spents = [self._spent(call, Reported(), failure.seconds, failure.attempts) for call in batch]
            failed = [
                Settled(key, spent, error=str(failure), reserved=call.worst)
                for key, spent, call in zip(keys, spents, batch, strict=True)
            ]
            if failure.fatal is not None:
                self._store(failed, work, again=False)
                raise failure.fatal from failure
            return self._store(failed, work, again=True)
        except BudgetReached:
            if not work.errors.keys() >= set(keys):
                raise
            failed = [Settled(key, self._spent(work.calls[key], Reported(), attempts=0), error=work.errors[key]) for key in keys]
            return self._store(failed, work, again=False)
        return self._keep(keys, batch, reply, work)

    def _each(self, keys: list[str], work: _Work) -> list[Settled]:
        return [done for key in keys for done in self._send([key], work)]

    def _store(self, calls: list[Settled], work: _Work, *, again: bool) -> list[Settled]:
        """Store what became of calls; those that failed but may pass (``again``) stay open until the last round.

        Returns the others.
        """
        calls = [
            call._replace(again=again and not work.last and call.answer is None, error=self.transport.printable(call.error))
            for call in calls
        ]
        work.errors |= {call.key: call.error for call in calls if call.again}
        self.store.settle(calls)
        work.again += [call.key for call in calls if call.again]
        return [call for call in calls if not call.again]

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

    def _keep(self, keys: list[str], batch: list[Call], reply: Reply, work: _Work) -> list[Settled]:
        found = read(reply.body, [call.echoed for call in batch], [call.parse for call in batch])
        calls = []
        for key, call, used, (answer, error) in zip(keys, batch, _share(reply.usage, batch), found, strict=True):
            spent = self._spent(call, used, reply.seconds / len(batch), reply.attempts)
            spent = spent._replace(left_out="; ".join(reply.left_out) or None)
            calls.append(Settled(key, spent, answer, error, reserved=used.within(call.worst)))
        return self._store(calls, work, again=True)

    def _spent(self, call: Call, used: Reported, seconds: float = 0.0, attempts: int = 1) -> Spent:
        model = str(call.settings.get("model", ""))
        known = used.prompt is not None and used.completion is not None
        dollars = self.prices.dollars(used.within(Usage())) if known else None
        return Spent(call.purpose, model, used.prompt, used.completion, dollars, round(seconds, 3), attempts)

    def setup_error(self, refusal: Refused) -> JudgeSetupError:
        """The error where the endpoint serves nothing."""
        config = self.transport.config
        env = config.api_key_env or "(api_key_env is empty)"
        if refusal.kind in ("key", "forbidden"):
            what, fix = "the judge refuses the key", f"check the key in the environment variable {env}, and base_url"
        elif refusal.kind == "credit":
            what = "the account of the judge is out of credit"
            fix = f"top up the account behind {env} and run again; finished calls are kept"
        elif refusal.kind == "prompt":
            what = "the judge refuses every prompt"
            fix = "give it shorter fragments or other text, or take another judge"
        else:
            what = "the judge refuses the request"
            fix = f"check model ('{config.model}'), base_url and simulation ('{config.simulation}')"
        return JudgeSetupError(f"{what} ({refusal.text})", where=self.transport.where, fix=fix)


class _Work:
    """The calls that one ``ask`` makes, and how far it is."""

    def __init__(self, calls: dict[str, Call]) -> None:
        self.calls = calls
        self.again = list(calls)
        """Calls of the next round."""
        self.errors: dict[str, str] = {}
        """Why those failed in the round before."""
        self.left: deque[list[list[str]]] = deque()
        """Keys by request; the requests of one entry follow one another."""
        self.last = False
        self.alone = False
        """The endpoint takes one prompt a request."""
        self.turned_down: set[str] = set()
        self.stopped = threading.Event()
        """Set where the run must stop: nothing is tried again."""
        self.refused: Refused | None = None
        """The last refusal that may be the set-up's fault."""

    def begin(self, *, last: bool, batch: int) -> None:
        """Begin a round with all calls that are to be asked.

        They travel together by endpoint and settings, in the order given; chat requests hold one each. The calls of a series
        are sent alone, one after the other.
        """
        self.last, keys, self.again = last, self.again, []
        self.stopped = threading.Event()
        groups: dict[str, list[str]] = {}
        for key in keys:
            call = self.calls[key]
            single = key if call.endpoint != "/completions" else call.series
            groups.setdefault(canonical([call.endpoint, call.settings, single]), []).append(key)
        for members in groups.values():
            if self.calls[members[0]].series:
                self.left.append([[key] for key in members])
                continue
            self.left += [[members[start : start + batch]] for start in range(0, len(members), batch)]


def _sendable(call: Call) -> Call:
    """``call`` with what no request can carry (half a character, from a text that was cut) as question marks."""

    def whole(text: str) -> str:
        return text.encode("utf-8", "replace").decode()

    if isinstance(call.prompt, str):
        return call._replace(prompt=whole(call.prompt))
    return call._replace(prompt=[{name: whole(text) for name, text in message.items()} for message in call.prompt])


def _add(usages: Iterable[Usage]) -> Usage:
    every = list(usages)
    return Usage(sum(u.prompt for u in every), sum(u.completion for u in every))


def _share(usage: Reported, batch: list[Call]) -> list[Reported]:
    """A request's usage, split over its prompts by their length; what was not said stays unknown."""
    weights = [call.worst.prompt for call in batch]
    prompts = _split(usage.prompt, weights)
    return [Reported(*each) for each in zip(prompts, _split(usage.completion, [1] * len(batch)), strict=True)]


def _split(total: int | None, weights: list[int]) -> list[int] | list[None]:
    """Whole parts of ``total`` in proportion to ``weights``; the last one takes what is left."""
    if total is None:
        return [None] * len(weights)
    parts = [total * weight // max(1, sum(weights)) for weight in weights[:-1]]
    return [*parts, total - sum(parts)]
