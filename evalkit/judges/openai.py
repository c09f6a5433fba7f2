"""Provider 'openai': explanations, simulations and grades from any OpenAI-compatible endpoint (Bills et al. 2023).

1. ``explain`` sends the few-shot prompt and keeps one cleaned line of the answer, and whether it was cut off.
2. ``simulate`` works in one of three ways (see ``simulation``); 'auto' tries the endpoint once and remembers the way, unless it
   was decided by an error that may pass.
3. ``rate`` reads one digit, in the same way as it simulates (see ``rubric``).
4. Every call goes through the durable store, so a run that is repeated buys nothing again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit.errors import JudgeSetupError
from evalkit.hashing import content_hash
from evalkit.judges import answer_text, prompts, rubric
from evalkit.judges.address import key_from
from evalkit.judges.answer_text import one_line
from evalkit.judges.answers import ended, read, text_of
from evalkit.judges.asking import ANSWERS, Asker, Call
from evalkit.judges.backends.openai import Connection, OpenAIBackend
from evalkit.judges.base import JUDGES, Done, ExplainTask, Explanation, Judge, RateTask, Rating, SimulateTask, Simulation
from evalkit.judges.calls import CallStore, Outcome, Settled, Spent
from evalkit.judges.config import JudgeConfig
from evalkit.judges.cost import Budget, Prices, Usage
from evalkit.judges.simulation import WAYS, join_slots, probes, simulate_calls
from evalkit.judges.transport import Refused, Transport, Unavailable
from evalkit.progress import Progress


class OpenAIJudge(Judge):
    """A judge behind an OpenAI-compatible endpoint.

    Args:
        config: what to ask and how.
        store: finished calls.
        transport: the endpoint.
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
                said, refused = refusal.told, refusal
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
                said = self.transport.told(found.error)
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


def explains_by_chat(config: JudgeConfig, mode: str = "") -> bool:
    """Whether explanations are asked for on the chat endpoint, where activations are simulated in ``mode``."""
    if config.explain_with != "auto":
        return config.explain_with == "chat"
    return (config.explainer_model or config.model) != config.model or mode == "constrained"


def shows_table(config: JudgeConfig, by_chat: bool) -> bool:
    """Whether the explainer is shown tables of tokens and activations."""
    return by_chat if config.explain_from == "auto" else config.explain_from == "table"


def explain_call(config: JudgeConfig, mode: str, task: ExplainTask) -> Call:
    """The call that explains ``task``, where activations are simulated in ``mode``."""
    by_chat = explains_by_chat(config, mode)
    table, most = shows_table(config, by_chat), config.explanation_tokens
    settings: dict[str, Any] = {"model": config.explainer_model or config.model}
    if config.temperature >= 0:
        settings["temperature"] = config.temperature
    if config.temperature > 0:
        settings["seed"] = config.seed
    if by_chat:
        settings[most_tokens_name(config.base_url)] = most
        return Call("explain", "/chat/completions", settings, prompts.explain_messages(task, table), _phrase, most)
    settings.update(max_tokens=most, stop=["\n"])
    return Call("explain", "/completions", settings, prompts.explain_prompt(task, table), _phrase, most)


def most_tokens_name(base_url: str) -> str:
    """What the endpoint calls the limit on a chat answer: OpenAI's newer models refuse the old name, others know only that."""
    return "max_completion_tokens" if "api.openai.com" in base_url else "max_tokens"


def _phrase(choice: dict[str, Any]) -> dict[str, Any]:
    """Parser of an explanation. ``cut``: whether its length ended it; None where the answer does not say."""
    how, text = ended(choice), text_of(choice)
    line = one_line(text)
    at_the_end = " ".join(text.split()).rstrip("\"'`*_ ").endswith(line[-20:])  # what follows a whole line may be cut
    return {"text": line, "cut": how == "length" and at_the_end if how else None}


def shortened(line: str, characters: int) -> str:
    """``line`` cut at a word boundary. Done after the answer is stored, so that another limit needs no other call."""
    return line if len(line) <= characters else line[: characters + 1].rsplit(" ", 1)[0][:characters]


def connection(config: JudgeConfig) -> Connection:
    """The endpoint's address and key.

    Raises:
        JudgeSetupError: there is no model name, or no key in the environment.
    """
    if not config.model:
        raise JudgeSetupError("the judge has no model", where="[judge] model", fix="name a model the endpoint serves")
    return Connection(config.base_url, key_from(config.api_key_env))


def budget_of(config: JudgeConfig) -> Budget:
    """The budget a config sets."""
    prices = Prices(config.dollars_per_million_prompt, config.dollars_per_million_completion)
    return Budget(config.budget_tokens, config.budget_dollars, prices)


@JUDGES.register("openai")
def openai_judge(config: JudgeConfig, folder: Path, progress: Progress) -> OpenAIJudge:
    """The judge at ``config.base_url``; raises JudgeSetupError where no key or model is given."""
    transport = Transport(OpenAIBackend(connection(config), config.timeout_s), config, budget_of(config))
    return OpenAIJudge(config, CallStore(folder, say=progress.say), transport, {"base_url": config.base_url.rstrip("/")})
