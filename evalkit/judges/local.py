"""Provider 'local': a judge on this machine, without a key and without the network.

1. The model is a packaged one (converted once to a plain folder) or any Hugging Face folder of a causal LM.
2. At the first call whose answer is not stored, a server is started in a child process and asked through the same code as any
   other endpoint, with slots. A run whose calls are all stored never loads the model.
3. Identity holds the checksum of the weights and the number format; the port, the key and the speed are nobody's business.
4. The child holds the other end of a pipe to this process and ends with it, however it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from evalkit.errors import JudgeSetupError
from evalkit.files import publish
from evalkit.hashing import content_hash, file_hash
from evalkit.judges.base import JUDGES
from evalkit.judges.calls import CallStore
from evalkit.judges.config import JudgeConfig
from evalkit.judges.engine import native_dtype
from evalkit.judges.openai import OpenAIJudge, budget_of
from evalkit.judges.server import KEY_VARIABLE
from evalkit.judges.transport import Connection, Transport
from evalkit.progress import Progress
from evalkit.user_files import placed

DEFAULT_MODEL = "qwen2.5-coder-1.5b-instruct"
_IN_FLIGHT = 2
"""One request computes while the next waits at the server."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")


class Weights(NamedTuple):
    """A local model before it is loaded."""

    name: str
    checksum: str
    folder: Callable[[], Path]
    """Where its Hugging Face folder is; may have to prepare it."""


class LocalServer:
    """The judge's server in a child process; started by ``connect``.

    Args:
        weights: the model.
        dtype: number format it is loaded in.
        startup_s: seconds it may take to load.
        progress: shows the start.
    """

    def __init__(self, weights: Weights, dtype: str, startup_s: float, progress: Progress) -> None:
        self.weights, self.dtype, self.startup_s, self.progress = weights, dtype, startup_s, progress
        self.process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def connect(self) -> Connection:
        """Start the server and wait until its model is loaded.

        Raises:
            JudgeSetupError: it ended, or took longer than ``startup_s``; holds the end of what it wrote.
        """
        folder = self.weights.folder()
        key = secrets.token_urlsafe(24)
        source = str(Path(__file__).parents[2])
        path = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH", "")) if part)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (outlives this call: ``close`` closes it)
        with self.progress.stage(f"starting the judge {self.weights.name}", unit="seconds"):
            self.process = subprocess.Popen(
                [sys.executable, "-m", "evalkit.judges.server", "--model", str(folder), "--name", self.weights.name]
                + ["--dtype", self.dtype],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, KEY_VARIABLE: key, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for this process, which then ends its server in order
            )
            atexit.register(self.close)
            return Connection(self._address(self.process), key)

    def _address(self, process: subprocess.Popen[bytes]) -> str:
        lines: queue.Queue[bytes] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=lambda out: lines.put(out.readline()), args=(process.stdout,), daemon=True).start()
        try:
            line = lines.get(timeout=self.startup_s)
        except queue.Empty:
            self.close()
            raise JudgeSetupError(
                f"the judge did not start within {self.startup_s:.0f} s",
                where=self.weights.name,
                fix="raise startup_s; a model that is larger than the free memory never gets ready",
            ) from None
        try:
            return str(json.loads(line)["address"])
        except (ValueError, KeyError, TypeError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            raise self._ended("the judge ended before it was ready") from None

    def alive(self) -> None:
        """Raise JudgeSetupError if the server ended by itself."""
        if self.process is not None and self.process.poll() is not None:
            raise self._ended("the judge's server ended while it was working")

    def _ended(self, what: str) -> JudgeSetupError:
        code = self.process.poll() if self.process else None
        tail = ""
        if self._errors is not None and not self._errors.closed:
            self._errors.seek(0)
            lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            tail = "\n    " + "\n    ".join(lines[-8:]) if lines else ""
        memory = " (killed: most likely there was too little memory)" if code == -9 else ""
        return JudgeSetupError(
            f"{what}: exit status {code}{memory}{tail}",
            where=self.weights.name,
            fix="free memory or take a smaller model, then run again; finished calls are kept",
        )

    def close(self) -> None:
        """End the server; does nothing where none runs."""
        process, self.process = self.process, None
        if process is None:
            return
        atexit.unregister(self.close)
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if self._errors is not None:
            self._errors.close()


class LocalJudge(OpenAIJudge):
    """An OpenAIJudge that owns its server."""

    def __init__(self, config: JudgeConfig, store: CallStore, server: LocalServer, about: dict[str, Any]) -> None:
        transport = Transport(server.connect, config, budget_of(config), alive=server.alive)
        super().__init__(config, store, transport, about, own_server=True)
        self.server = server

    def close(self) -> None:
        """Drop the connection and end the server."""
        super().close()
        self.server.close()


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
def local_judge(config: JudgeConfig, folder: Path, progress: Progress) -> LocalJudge:
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
        concurrency=min(_IN_FLIGHT, config.concurrency),
        dtype=dtype,
    )
    # "digits": the server is asked for every digit at every slot: a small judge leaves most of the probability off them, and
    # an expectation over those that happen to be among the likeliest tokens would be biased or missing.
    # "reading": how the engine cuts a prompt into computations, which shows in the last digits of bfloat16
    server = LocalServer(weights, dtype, config.startup_s, progress)
    about = {"weights": weights.checksum, "dtype": dtype, "digits": "all", "reading": "two pieces"}
    return LocalJudge(settled, CallStore(folder), server, about)
