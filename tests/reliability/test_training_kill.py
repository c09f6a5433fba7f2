"""``kill -9`` a training anywhere, start it again: the same weights, and every row of the curve once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from suite_case import tiny_suite

import evalkit
from evalkit.dictionaries.storage import load_dictionary
from evalkit.runs.train import train_suite
from evalkit.training.loop.checkpoint import FILE

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

SCRIPT = """
import sys
import torch
from evalkit.dictionaries.storage import save_dictionary
from evalkit.util.progress import Progress
from evalkit.training.loop.checkpoint import Checkpoint
from evalkit.training.settings.config import train_config
from evalkit.training.loop.train import train

folder, every = sys.argv[1], float(sys.argv[2])
config = train_config({"architecture": "topk", "features": 48, "k": 3, "tokens": 6400, "batch": 32, "dead_after": 600})
x = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
checkpoint = Checkpoint(f"{folder}/checkpoint", every_s=every)
told = {"hook_point": "h", "model": "m", "progress": Progress(quiet=True)}
print("begun", flush=True)
trained = train(config, x, checkpoint=checkpoint, **told)
save_dictionary(trained.dictionary, f"{folder}/done")
"""

KILLED = """
import os, signal, sys
from evalkit.cli import main
from evalkit.store.journal import Journal

left, write = int(sys.argv[1]), Journal.write_rows

def counted(self, table, rows):
    global left
    write(self, table, rows)
    left -= len(rows) * (table == "training_steps")
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.write_rows = counted
main(sys.argv[2:])
"""
"""A command that is killed behind so many rows of its curve."""


def started(folder: Path, every: float) -> subprocess.Popen[bytes]:
    """A training in a process of its own, imports behind it."""
    folder.mkdir(exist_ok=True)
    words = [sys.executable, "-c", SCRIPT, str(folder), str(every)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT)
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    return process


def finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.timeout(600)
def test_killed_at_random_moments_a_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    finished(started(tmp_path / "whole", 1e9))
    expected = load_dictionary(tmp_path / "whole" / "done").identity.hash
    folder, rng = tmp_path / "killed", random.Random(0)
    for _ in range(3):
        process = started(folder, 0.0)
        before = (folder / "checkpoint" / FILE).stat().st_mtime_ns if (folder / "checkpoint" / FILE).exists() else 0
        while process.poll() is None:
            file = folder / "checkpoint" / FILE
            if file.exists() and file.stat().st_mtime_ns != before:
                break
            time.sleep(0.001)
        time.sleep(rng.random() * 0.1)  # in the middle of a step, of a file, of a rename
        kill(process)
    assert not (folder / "done").exists() or load_dictionary(folder / "done").identity.hash == expected
    finished(started(folder, 0.0))
    assert load_dictionary(folder / "done").identity.hash == expected


def ended(store: Path) -> tuple[str, list[int]]:
    """Hash of the one dictionary, and the steps of its curve."""
    (folder,) = (folder for folder in (store.parent / "dictionaries").iterdir() if not folder.name.startswith("."))
    with evalkit.open_results(store) as results:
        curve = results.training()
    return load_dictionary(folder).identity.hash, list(curve["step"])


@pytest.mark.timeout(600)
def test_the_same_command_goes_on_after_a_kill(tmp_path: Path) -> None:
    suite = tiny_suite(tmp_path / "case")
    text = suite.read_text().split("[judge]")[0].replace("tokens = 4096, batch = 256", "tokens = 12800, batch = 64")
    suite.write_text(text + "\n[training]\ncheckpoint_s = 0\nstream = true\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train_suite(suite, tmp_path / "whole" / "evalkit.duckdb").exit_code == 0
    torch.set_num_threads(threads)
    expected = ended(tmp_path / "whole" / "evalkit.duckdb")
    assert len(expected[1]) == 50

    store = tmp_path / "killed" / "evalkit.duckdb"
    words = ["train", str(suite), "--results", str(store), "--quiet"]
    first = subprocess.Popen([sys.executable, "-c", KILLED, "20", *words], cwd=ROOT, env=ENVIRONMENT)

    def rows() -> int:
        return sum(file.read_bytes().count(b'"training_steps"') for file in (store.parent / "runs").glob("*/journal.jsonl"))

    assert first.wait() == -signal.SIGKILL
    assert rows() == 20
    assert list((store.parent / "dictionaries").glob(f".*.training/{FILE}"))
    again = subprocess.Popen(
        [sys.executable, "-m", "evalkit", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT
    )
    finished(again)
    assert ended(store) == expected
    assert rows() < 60  # gone on, not begun anew
    # what a kill left half-written went with the checkpoint
    assert not list((store.parent / "dictionaries").glob(".*"))
