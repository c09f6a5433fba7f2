"""A local model in this process, asked without a network: ``complete`` calls the ``Engine`` directly.

1. The model is loaded at the first request, so a run whose calls are all stored never loads it.
2. Requests compute one at a time. A prompt's answer depends on that prompt alone (``engine``).
3. ``close`` breaks off a computation that is under way, within one layer of the model, and frees the model's memory.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evalkit.errors import EvalkitError, JudgeSetupError, reason
from evalkit.judges.backends.base import Backend, Completion, Failed, Request
from evalkit.judges.backends.engine import BadRequest, Encoded, Engine, Generated, Position
from evalkit.judges.troubles import Trouble
from evalkit.progress import Progress


class _Closed(Exception):
    """The backend was closed while it computed."""


class LocalBackend(Backend):
    """One model on this machine.

    Args:
        name: of the model, for messages.
        folder: where its Hugging Face folder is; may have to prepare it.
        dtype: number format it is loaded in.
        progress: shows the start.
    """

    takes_slots = True

    def __init__(self, name: str, folder: Callable[[], Path], dtype: str, progress: Progress) -> None:
        self.where, self._folder, self._dtype, self._progress = name, folder, dtype, progress
        self.engine: Engine | None = None
        self._lock = threading.Lock()
        self._closed = False

    def open(self) -> None:
        """Load the model; raises JudgeSetupError where it cannot be loaded."""
        with self._lock:
            if self._closed or self.engine is not None:
                return
            folder = self._folder()
            with self._progress.stage(f"starting the judge {self.where}", unit="seconds"):
                self.engine = self._load(folder)

    def _load(self, folder: Path) -> Engine:
        try:
            engine = Engine.load(folder, self._dtype)
        except EvalkitError as error:
            raise self._unusable(error.what, error.fix) from error
        except ValueError as error:
            raise self._unusable(str(error), "take another model, or serve it and use provider = 'openai'") from error
        except (RuntimeError, MemoryError) as error:
            fix = "free memory or take a smaller model, then run again; finished calls are kept"
            raise self._unusable(reason(error), fix) from error
        for container in [module for module in engine.model.modules() if isinstance(module, torch.nn.ModuleList)]:
            for layer in container:
                layer.register_forward_pre_hook(self._check_open)
        return engine

    def _unusable(self, why: str, fix: str) -> JudgeSetupError:
        return JudgeSetupError(f"the judge cannot be loaded: {why}", where=self.where, fix=fix)

    def _check_open(self, module: Any, arguments: Any) -> None:
        if self._closed:
            raise _Closed

    def complete(self, request: Request) -> Completion:
        """Read or continue the prompts of a completion request; there is no chat.

        Raises:
            Failed: the prompt does not fit, or the model failed (too little memory).
            JudgeSetupError: the backend was closed.
        """
        with self._lock:
            if self._closed or self.engine is None:
                raise JudgeSetupError("the judge was closed", where=self.where, fix="run again; finished calls are kept")
            try:
                return Completion(_answered(self.engine, request))
            except _Closed:
                raise JudgeSetupError("the judge was closed", where=self.where, fix="run again") from None
            except BadRequest as error:
                raise Failed(Trouble(400, str(error), error.code)) from error
            except (RuntimeError, MemoryError) as error:
                raise Failed(Trouble(500, f"the model failed: {error}", "model_failed")) from error

    def close(self) -> None:
        """End a computation under way and free the model's memory."""
        self._closed = True
        with self._lock:
            loaded, self.engine = self.engine is not None, None
        if loaded:
            gc.collect()  # a model holds references to itself
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _answered(engine: Engine, request: Request) -> dict[str, Any]:
    """The answer to a request, in OpenAI's form."""
    asked, prompts = request.body, request.prompts
    top, echo = int(asked.get("logprobs", 0)), bool(asked.get("echo"))
    slots, candidates = asked.get("slots"), asked.get("candidates", [])
    encoded = [
        engine.encode(prompt, at, request.most_tokens) for prompt, at in zip(prompts, slots or [[] for _ in prompts], strict=True)
    ]
    generated: list[Generated] = []
    if echo:
        read = engine.read(encoded, top, slots is None, candidates)
        choices = [_echoed(*each) for each in zip(prompts, encoded, read, strict=True)]
    else:
        generated = engine.generate(
            encoded,
            request.most_tokens,
            temperature=request.temperature or 0.0,
            seed=int(asked.get("seed", 0)),
            stop=asked.get("stop", []),
            top=top,
            candidates=candidates,
        )
        choices = [_continued(engine, prompt, answer) for prompt, answer in zip(prompts, generated, strict=True)]
    usage = {
        "prompt_tokens": sum(len(prompt.ids) for prompt in encoded),
        "completion_tokens": sum(len(answer.ids) for answer in generated),
    }
    return {"choices": [{"index": index, **choice} for index, choice in enumerate(choices)], "usage": usage}


def _echoed(text: str, prompt: Encoded, read: dict[int, Position]) -> dict[str, Any]:
    ends = [*prompt.offsets[1:], len(text)]
    logprobs = {
        "tokens": [text[start:end] for start, end in zip(prompt.offsets, ends, strict=True)],
        "top_logprobs": [read[place].top if place in read else None for place in range(len(prompt.ids))],
        "text_offset": prompt.offsets,
    }
    return {"text": text, "finish_reason": "length", "logprobs": logprobs}


def _continued(engine: Engine, prompt: str, answer: Generated) -> dict[str, Any]:
    logprobs = None
    if answer.positions:  # asked for: at least the end token is there
        tokens = [engine.string(token) for token in answer.ids]
        logprobs = {
            "tokens": tokens,
            "top_logprobs": [position.top for position in answer.positions],
            "text_offset": [len(prompt) + sum(map(len, tokens[:place])) for place in range(len(tokens))],
        }
    return {"text": answer.text, "finish_reason": answer.finish, "logprobs": logprobs}
