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
from suite_case import tiny_suite

import evalkit
from evalkit.dictionaries.storage import load_dictionary

ROOT = Path(__file__).parents[2]
STEPS = 400


def start(suite: Path, store: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "evalkit", "train", str(suite), "--results", str(store), "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def rows(store: Path) -> int:
    return sum(file.read_bytes().count(b'"training_steps"') for file in (store.parent / "runs").glob("*/journal.jsonl"))


def ended(store: Path) -> tuple[str, list[int]]:
    (folder,) = (folder for folder in (store.parent / "dictionaries").iterdir() if not folder.name.startswith("."))
    with evalkit.open_results(store) as results:
        curve = results.training()
    return load_dictionary(folder).identity.hash, list(curve["step"])


@pytest.mark.timeout(240)
def test_killed_anywhere_and_started_again_gives_the_same_weights(tmp_path: Path) -> None:
    suite = tiny_suite(tmp_path / "case")
    text = suite.read_text().split("[judge]")[0].replace("tokens = 4096, batch = 256", f"tokens = {STEPS * 64}, batch = 64")
    suite.write_text(text + "\n[training]\ncheckpoint_s = 0\n")
    whole = tmp_path / "whole" / "evalkit.duckdb"
    done = start(suite, whole)
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors.decode()
    expected = ended(whole)
    assert len(expected[1]) == 50

    killed = tmp_path / "killed" / "evalkit.duckdb"
    rng = random.Random(0)
    for _ in range(3):
        run = start(suite, killed)
        deadline = time.monotonic() + 60
        wanted = rows(killed) + rng.randint(2, 14)
        while rows(killed) < wanted and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        run.send_signal(signal.SIGKILL)
        run.communicate()
    assert list((killed.parent / "dictionaries").glob(".*.training/checkpoint.safetensors"))
    last = start(suite, killed)
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors.decode()
    assert ended(killed) == expected
    # what a kill left half-written went with the checkpoint
    assert not list((killed.parent / "dictionaries").glob(".*"))
