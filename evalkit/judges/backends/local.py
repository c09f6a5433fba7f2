"""Provider 'local': a model in this process, without a key and without the network.

1. The model is a packaged one (converted once to a plain folder) or any Hugging Face folder of a causal LM. It is loaded at the
   first request, so a run whose calls are all stored never loads it. Identity holds the checksum of the weights and the dtype.
2. Requests compute one at a time. A prompt's answer depends on that prompt alone (``engine``).
3. ``close`` breaks off a computation that is under way, within one layer of the model, and frees the model's memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evalkit.errors import EvalkitError, JudgeSetupError, reason
from evalkit.judges.backends.engine import BadRequest, Encoded, Engine, Generated, Position, native_dtype
from evalkit.judges.base import JUDGES
from evalkit.judges.config import JudgeConfig
from evalkit.judges.model_judge import ModelJudge, judge_of
from evalkit.judges.requests import Backend, Completion, Failed, Request
from evalkit.judges.troubles import Trouble
from evalkit.util.files import publish
from evalkit.util.hashing import content_hash, file_hash
from evalkit.util.progress import Progress
from evalkit.util.user_files import placed

DEFAULT_MODEL = "qwen2.5-coder-1.5b-instruct"
_WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")


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


class Weights(NamedTuple):
    """A local model before it is loaded."""

    name: str
    checksum: str
    folder: Callable[[], Path]
    """Where its Hugging Face folder is; may have to prepare it."""


def _from_folder(folder: Path, keep: Path) -> Weights:
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not (folder / "config.json").is_file() or not any(path.suffix in (".safetensors", ".bin") for path in files):
        raise JudgeSetupError(
            "this is no Hugging Face folder of a causal LM: config.json or the weights are missing",
            where=str(folder),
            fix=f"give a folder with config.json, a tokenizer and *.safetensors, or the packaged model '{DEFAULT_MODEL}'",
        )
    stamp = content_hash([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files] + [str(folder)])
    note = keep / "weights.json"  # hashing gigabytes takes a while, so it is done once for each state of the folder
    known: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = json.loads(note.read_text())
    if stamp not in known:
        known[stamp] = content_hash([[path.name, file_hash(path)] for path in files])
        with publish(note) as temporary:
            temporary.write_text(json.dumps(known))
    return Weights(folder.name, known[stamp], lambda: folder)


def _from_asset(name: str, dtype: str, progress: Progress) -> Weights:
    from evalkit.assets.catalog import asset
    from evalkit.assets.install import path

    path(name)  # an absent asset is said before anything starts

    def prepared() -> Path:
        from evalkit.models.gguf import prepare_asset

        return prepare_asset(name, getattr(torch, dtype), progress)

    return Weights(name, asset(name).sha256, prepared)


@JUDGES.register("local")
def local_judge(config: JudgeConfig, folder: Path, progress: Progress) -> ModelJudge:
    """A judge on this machine.

    Raises:
        AssetError: the packaged model is not installed.
        JudgeSetupError: the folder holds no model, or a setting that only other endpoints have was given.
    """
    if config.simulation == "constrained" or config.explain_with == "chat" or config.explainer_model:
        raise JudgeSetupError(
            "the local judge has one model and no chat",
            where="[judge]",
            fix="leave simulation, explain_with and explainer_model out, or use provider = 'openai'",
        )
    dtype = native_dtype() if config.dtype == "auto" else config.dtype
    given = config.model or DEFAULT_MODEL
    path = placed(given)
    is_folder = path.is_dir() or os.sep in given
    weights = _from_folder(path.resolve(), folder) if is_folder else _from_asset(given, dtype, progress)
    settled = dataclasses.replace(
        config,
        model=weights.name,
        simulation="slots" if config.simulation == "auto" else config.simulation,
        concurrency=1,
        dtype=dtype,
    )
    # "digits": the model is asked for every digit at every slot: a small judge leaves most of the probability off them, and
    # an expectation over those that happen to be among the likeliest tokens would be biased or missing.
    # "reading": how the engine cuts a prompt into computations, which shows in the last digits of bfloat16
    backend = LocalBackend(weights.name, weights.folder, dtype, progress)
    about = {"weights": weights.checksum, "dtype": dtype, "digits": "all", "reading": "two pieces"}
    return judge_of(backend, settled, folder, progress, about)
