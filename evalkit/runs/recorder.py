"""What a command that builds or measures writes: its journal first, and from the journal the results file.

1. A row is in the journal before the results file has it. A locked results file stops nothing: the journal alone is written on,
   and the file is brought up to date at the end or by ``evalkit rebuild``.
2. However the command ends, the texts that it read and its state are recorded. A full disk or a damaged file does not hide the
   error that ended it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from evalkit.dictionaries.base import Dictionary
from evalkit.errors import StoreError, StoreLocked
from evalkit.runs.workbench import Workbench
from evalkit.store.journal import Journal
from evalkit.store.writer import Writer
from evalkit.suite import Suite
from evalkit.util import arithmetic
from evalkit.util.matmul import pays
from evalkit.util.progress import Progress
from evalkit.version import __version__

PACKAGES = ("evalkit", "torch", "transformers", "transformer-lens", "scikit-learn", "numpy", "duckdb", "openai", "gguf")


class Recorder:
    """Journal and results file of one run or training.

    Args:
        store: the results file; the journal lies in ``runs/run_id`` beside it.
    """

    def __init__(self, run_id: str, suite: Suite, store: Path, progress: Progress) -> None:
        self.run_id, self.suite, self.store, self.progress = run_id, suite, store, progress
        self.writer, self.journal = Writer(store), Journal(store.parent / "runs" / run_id)
        self.locked = False
        """Whether another process held the results file at the last try."""

    def status(self, status: str) -> None:
        """Record the state of the run now."""
        self.journal.write_rows("runs", [run_row(self.run_id, self.suite, status)])

    def training_step(self, row: dict[str, Any]) -> None:
        """Record a row of a training's history."""
        self.journal.write_rows("training_steps", [row | {"at": now()}])

    def dictionary(self, dictionary: Dictionary) -> None:
        """Record what a dictionary is."""
        identity = dictionary.identity
        row = {
            "dictionary_id": identity.hash, "kind": identity.kind, "hook_point": identity.hook_point, "model": identity.model,
            "d_in": dictionary.d_in, "n_features": dictionary.n_features, "details": json.dumps(dictionary.details),
        }  # fmt: skip
        self.journal.write_rows("dictionaries", [row])

    def ingest(self) -> None:
        """Bring the results file up to the journal, unless it was locked before."""
        if self.locked:
            return
        try:
            self.writer.ingest(self.journal)
        except StoreLocked as error:
            self.locked = True
            self.progress.say(f"{error.what}; going on with the journal alone")

    def end(self, status: str, bench: Workbench, *, after_error: bool = False) -> None:
        """Record how it ended.

        Args:
            after_error: leave it where it cannot be recorded: an error is on its way already.
        """
        with suppress(*[StoreError] if after_error else []):
            self.calls(bench)
            self.journal.write_rows("texts", bench.inputs.text_rows())
            self.status(status)
            self.locked = False
            self.ingest()

    def calls(self, bench: Workbench) -> None:
        """Record the judge calls that were made since the last time."""
        rows = [row | {"run_id": self.run_id} for row in bench.drain_calls()]
        if rows:
            self.journal.write_rows("judge_calls", rows)

    @property
    def how_to_unlock(self) -> str:
        """The message where the results file stayed locked to the end."""
        return (
            f"all rows are in {self.journal.path}, but {self.store} is held by another process\n"
            f"  to do: close it, then: evalkit rebuild --results {self.store}"
        )


def run_row(run_id: str, suite: Suite, status: str) -> dict[str, Any]:
    """A row of ``runs``: the state of a run now, with the machine and the packages behind its numbers."""
    return {
        "run_id": run_id, "suite": suite.suite.name, "status": status, "at": now(),
        "evalkit_version": __version__, "packages": json.dumps(_packages()),
        "machine": json.dumps(machine_facts()), "suite_toml": suite.text,
    }  # fmt: skip


def now() -> str:
    """The time as rows have it: UTC, without a zone."""
    return datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds")


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine_facts() -> dict[str, Any]:
    """The machine behind a run's numbers."""
    return {
        "platform": platform.platform(),
        "processor": arithmetic.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "products": "onednn" if pays() else "torch",
        **arithmetic.facts(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
