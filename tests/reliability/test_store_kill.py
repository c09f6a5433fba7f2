"""Kills at random moments while a run appends to its journal and ingests it."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import duckdb

from evalkit.store.journal import Journal
from evalkit.store.writer import Writer, rebuild

WORK = """
import sys
from pathlib import Path
from evalkit.store.journal import Journal
from evalkit.store.writer import Writer

folder = Path(sys.argv[1])
journal = Journal(folder / "runs" / "r")
writer = Writer(folder / "evalkit.duckdb")
number = len(journal.finished())
print("ready", flush=True)
while True:
    row = {"unit_key": f"k{number}", "evaluation": "e", "dictionary": "d", "hook_point": "h", "seed": number, "status": "done"}
    scores = [{"metric": "m", "kind": "window", "item": i, "value": number + i / 8, "status": "ok"} for i in range(200)]
    lists = [{"feature": i, "tokens": ["a", "b"], "actual": [1.0, 2.0], "predicted": None} for i in range(20)]
    journal.write_unit(row, scores, {"predictions": lists})
    writer.ingest(journal)
    number += 1
"""


def facts(path):
    connection = duckdb.connect(str(path), read_only=True)
    try:
        return {
            "units": connection.execute("SELECT unit_key FROM units ORDER BY seed").fetchall(),
            "scores": connection.execute("SELECT unit_key, item, value FROM scores ORDER BY unit_key, item").fetchall(),
            "predictions": connection.execute("SELECT unit_key, feature, tokens FROM predictions ORDER BY ALL").fetchall(),
        }
    finally:
        connection.close()


def test_killed_again_and_again_the_file_equals_the_journal(tmp_path):
    path = tmp_path / "evalkit.duckdb"
    chance = random.Random(7)
    done = 0
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        while len(Journal(tmp_path / "runs" / "r").finished()) < done + 2 and child.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        finished = Journal(tmp_path / "runs" / "r").finished()
        assert len(finished) >= done + 2
        done = len(finished)
        Writer(path).ingest(Journal(tmp_path / "runs" / "r"))
        assert [key for (key,) in facts(path)["units"]] == [f"k{i}" for i in range(done)]

    kept = facts(path)
    assert kept["scores"] == sorted((f"k{n}", i, n + i / 8) for n in range(done) for i in range(200))
    assert len(kept["predictions"]) == 20 * done
    rebuild(tmp_path, tmp_path / "again.duckdb")
    assert facts(tmp_path / "again.duckdb") == kept
    assert Writer(path).ingest(Journal(tmp_path / "runs" / "r")) == 0


def test_a_file_killed_while_it_is_created_is_whole_or_absent(tmp_path):
    path = tmp_path / "evalkit.duckdb"
    Journal(tmp_path / "runs" / "r").write_rows("judge_calls", [{"call_key": "one"}])
    code = WORK[: WORK.index("number =")] + "print('ready', flush=True)\nwriter.ingest(journal)\n"
    for delay in (0.0, 0.02, 0.05, 0.1):
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if path.exists():
            Writer(path).check()
    Writer(path).ingest(Journal(tmp_path / "runs" / "r"))
    connection = duckdb.connect(str(path), read_only=True)
    assert connection.execute("SELECT call_key FROM judge_calls").fetchall() == [("one",)]
    connection.close()
