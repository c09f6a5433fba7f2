"""Provider 'local': a judge on this machine, without a key and without the network.

1. The model is a packaged one (converted once to a plain folder) or any Hugging Face folder of a causal LM.
2. It is loaded into this process at the first call whose answer is not stored. ``close`` frees its memory.
3. Identity holds the checksum of the weights and the number format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from evalkit.errors import JudgeSetupError
from evalkit.files import publish
from evalkit.hashing import content_hash, file_hash
from evalkit.judges.backends.engine import native_dtype
from evalkit.judges.backends.local import LocalBackend
from evalkit.judges.base import JUDGES
from evalkit.judges.calls import CallStore
from evalkit.judges.config import JudgeConfig
from evalkit.judges.openai import OpenAIJudge, budget_of
from evalkit.judges.transport import Transport
from evalkit.progress import Progress
from evalkit.user_files import placed

DEFAULT_MODEL = "qwen2.5-coder-1.5b-instruct"
_WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")


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
def local_judge(config: JudgeConfig, folder: Path, progress: Progress) -> OpenAIJudge:
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
    return OpenAIJudge(settled, CallStore(folder, say=progress.say), Transport(backend, settled, budget_of(settled)), about)
