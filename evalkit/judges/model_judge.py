"""A judge that asks a language model: prompts x backend (Bills et al. 2023).

1. ``explain`` sends the few-shot prompt and keeps one cleaned line of the answer, and whether it was cut off.
2. ``simulate`` works in one of several ways (``prompts.simulation``); 'auto' tries the backend once and remembers the way,
   unless it was decided by an error that may pass.
3. ``rate`` reads one digit, in the same way as it simulates (``prompts.rubric``).
4. Every call goes through the durable store, so a run that is repeated buys nothing again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit.errors import JudgeSetupError
from evalkit.judges import prompts
from evalkit.judges.answers import text as answer_text
from evalkit.judges.answers.explanations import read
from evalkit.judges.asking import ANSWERS, Asker, Call
from evalkit.judges.base import Done, ExplainTask, Explanation, Judge, RateTask, Rating, SimulateTask, Simulation
from evalkit.judges.calls import CallStore, Outcome, Settled, Spent
from evalkit.judges.config import JudgeConfig, in_key
from evalkit.judges.cost import Budget, Prices, Usage
from evalkit.judges.prompts import rubric
from evalkit.judges.prompts.explanation import explain_call, explains_by_chat, shortened, shows_table
from evalkit.judges.prompts.simulation import WAYS, join_slots, probes, simulate_calls
from evalkit.judges.requests import Backend
from evalkit.judges.transport import Refused, Transport, Unavailable
from evalkit.util.hashing import content_hash
from evalkit.util.progress import Progress


class ModelJudge(Judge):
    """A judge whose answers come from a language model.

    Args:
        config: what to ask and how.
        store: finished calls.
        transport: requests to the backend.
        about: what identifies the model besides its name (address, or weights and dtype); part of identity and call keys.
    """

    def __init__(self, config: JudgeConfig, store: CallStore, transport: Transport, about: dict[str, Any]) -> None:
        self.config, self.store, self.transport, self.about = config, store, transport, about
        prices = Prices(config.dollars_per_million_prompt, config.dollars_per_million_completion)
        self._asker = Asker(
            transport,
            store,
            about,
            concurrency=config.concurrency,
            batch=config.batch,
            rounds=config.rounds,
            prices=prices,
        )
        self._mode: str | None = None if config.simulation == "auto" else config.simulation
        self._left_out: tuple[str, ...] = ()
        self._mode_lock = threading.Lock()

    @property
    def mode(self) -> str:
        """The way activations are simulated. 'auto' is settled by asking the endpoint, once for each store.

        Raises:
            JudgeSetupError: the endpoint had to be asked and cannot be used.
        """
        with self._mode_lock:
            if self._mode is None:
                self._mode = self._find_mode()
            return self._mode

    def _find_mode(self) -> str:
        config = self.config
        key = probe_key(config, self.about)
        known = self.store.get(key)
        if known is not None:
            self._left_out = tuple(known["left_out"])
            self._asker.adapter.learn(str(known["endpoint"]), config.model, self._left_out)
            return str(known["mode"])
        settled, said, refused = True, "", None
        for probe in probes(config):
            call = probe.call
            try:
                reply = self._asker.adapter.post(call.endpoint, self._asker.body([call]), call.worst)
            except Refused as refusal:
                if refusal.kind in ("key", "credit") and refusal.status != 403:  # a key may be good for one path alone
                    raise self._asker.setup_error(refusal) from refusal
                said, refused = refusal.text, refusal
                continue
            except Unavailable as failure:
                if not failure.lasting:  # it would decide by what passes
                    raise failure.fatal or JudgeSetupError(
                        f"the judge failed while it was tried out: {failure}", where=self.transport.where, fix="run again"
                    ) from failure
                settled, said = False, str(failure)
                continue
            (found,) = read(reply.body, [call.echoed], [call.parse])
            if found.answer is None:
                said = self.transport.printable(found.error)
                continue
            self._left_out = self._asker.adapter.known(call.endpoint, config.model)
            if settled:
                used = reply.usage
                spent = Spent("simulate", config.model, used.prompt, used.completion, None, reply.seconds, reply.attempts)
                answer = {"mode": probe.mode, "endpoint": call.endpoint, "left_out": list(self._left_out)}
                self.store.settle([Settled(key, spent, answer, reserved=used.within(call.worst))])
            return probe.mode
        if refused is not None and refused.kind in ("key", "forbidden"):
            raise self._asker.setup_error(refused)
        raise JudgeSetupError(
            f"the endpoint serves neither completions with logprobs nor chat: {said}",
            where=self.transport.where,
            fix=f"check model ('{config.model}') and base_url",
        )

    @property
    def _explainer(self) -> str:
        return self.config.explainer_model or self.config.model

    @property
    def _explains_by_chat(self) -> bool:
        return explains_by_chat(self.config, self.mode) if self.config.explain_with == "auto" else explains_by_chat(self.config)

    @property
    def _shows_table(self) -> bool:
        return shows_table(self.config, self._explains_by_chat)

    @property
    def identity(self) -> dict[str, Any]:
        """Model, address or weights, ways, prompt version. Asks the endpoint once where the simulation is 'auto'."""
        config = self.config
        identity = {
            "provider": config.provider,
            "model": config.model,
            **self.about,
            "explainer_model": self._explainer,
            "simulation": self.mode,
            "explain_with": "chat" if self._explains_by_chat else "completions",
            "explain_from": "table" if self._shows_table else "peaks",
            "prompts": prompts.VERSION,
            "rubric": rubric.VERSION,
            "answers": ANSWERS,
            "explanation_rules": answer_text.VERSION,
            "top_logprobs": config.top_logprobs,
            "least_tokens": config.least_tokens,
            "temperature": config.temperature,
            "explanation_tokens": config.explanation_tokens,
            "explanation_characters": config.explanation_characters,
        }
        if config.temperature > 0:
            identity["seed"] = config.seed
        if self.mode == "constrained":
            identity["chat_logprobs"] = config.chat_logprobs
        if self._left_out:
            identity["left_out"] = list(self._left_out)
        return identity

    def explain(self, tasks: Sequence[ExplainTask], done: Done = lambda n: None) -> list[Explanation]:
        """One explanation for each task, in order; see the contract."""
        mode = self.mode if self.config.explain_with == "auto" else ""
        calls = [explain_call(self.config, mode, task) for task in tasks]
        outcomes = self._asker.ask(calls, lambda index: done(1))
        return [self._explanation(outcome) for outcome in outcomes]

    def _explanation(self, outcome: Outcome) -> Explanation:
        if outcome.answer is None:
            return Explanation(None, "failed", outcome.error)
        cut = outcome.answer["cut"]
        error = f"cut off at {self.config.explanation_tokens} tokens (explanation_tokens)" if cut else ""
        return Explanation(shortened(str(outcome.answer["text"]), self.config.explanation_characters), "ok", error, cut)

    def simulate(self, tasks: Sequence[SimulateTask], done: Done = lambda n: None) -> list[Simulation]:
        """One simulation for each task, in order; see the contract."""
        calls: list[Call] = []
        owners: list[int] = []
        for place, task in enumerate(tasks):
            for call in simulate_calls(self.mode, self.config, task):
                calls.append(call)
                owners.append(place)
        left = Counter(owners)
        if len(left) < len(tasks):
            done(len(tasks) - len(left))  # fragments without tokens

        def finished(index: int) -> None:
            left[owners[index]] -= 1
            if left[owners[index]] == 0:
                done(1)

        outcomes = self._asker.ask(calls, finished)
        parts: list[list[Any]] = [[] for _ in tasks]
        for place, outcome in zip(owners, outcomes, strict=True):
            parts[place].append(outcome)
        least = self.config.least_tokens
        return [join_slots(outcomes, len(task.tokens), least) for outcomes, task in zip(parts, tasks, strict=True)]

    def rate(self, tasks: Sequence[RateTask], done: Done = lambda n: None) -> list[Rating]:
        """One grade for each task, in order; see the contract."""
        calls = [rubric.rate_call(self.mode, self.config, task) for task in tasks]
        return [rubric.rating(outcome) for outcome in self._asker.ask(calls, lambda index: done(1))]

    @property
    def models(self) -> frozenset[str]:
        """The model, and the one that explains."""
        return frozenset({self.config.model, self._explainer})

    def own(self, owner: str) -> None:
        """Make calls for ``owner`` from now on."""
        self.store.own(owner)

    def drain_calls(self) -> list[dict[str, Any]]:
        """Rows for the table ``judge_calls``: calls made since the last drain, for this judge's owner."""
        return self.store.drain()

    def charge(self, prompt_tokens: int, completion_tokens: int, unknown: Sequence[str] = ()) -> None:
        """Count what earlier starts of the run spent; see the contract."""
        most = self.store.reserved(unknown)
        self.transport.budget.settle(Usage(), Usage(prompt_tokens + most.prompt, completion_tokens + most.completion))

    def close(self) -> None:
        """Drop the connections or free the model, and close the store."""
        self.transport.close()
        self.store.close()


def probe_key(config: JudgeConfig, about: dict[str, Any]) -> str:
    """Key of the stored answer that says how an endpoint can simulate."""
    return content_hash({"probe": 2, "judge": about, "model": config.model, "ways": list(WAYS)})


def budget_of(config: JudgeConfig) -> Budget:
    """The budget a config sets."""
    prices = Prices(config.dollars_per_million_prompt, config.dollars_per_million_completion)
    return Budget(config.budget_tokens, config.budget_dollars, prices)


def judge_of(
    backend: Backend,
    config: JudgeConfig,
    folder: Path,
    progress: Progress,
    about: dict[str, Any],
) -> ModelJudge:
    """The judge that asks ``backend``: what a judge provider returns.

    Args:
        backend: what answers.
        config: the settings. Fields that a subclass of ``JudgeConfig`` adds are part of identity and keys, unless they are
            marked with ``not_in_key``.
        folder: of the durable calls.
        progress: where what could not be read there is printed.
        about: what identifies the model besides its name (its address, say).
    """
    own = {name: value for name, value in in_key(config).items() if name not in JudgeConfig.__dataclass_fields__}
    return ModelJudge(config, CallStore(folder, say=progress.say), Transport(backend, config, budget_of(config)), about | own)
