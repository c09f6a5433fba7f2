"""Runs in child processes without paying for the imports each time, killed at a chosen event.

1. ``Warm`` starts this file once as a process that imports evalkit and does nothing else. It forks a child for each run.
2. A child counts events: files opened for writing, folders made, renames, links, removals and writes of evalkit's below its
   results folder. At event number ``die_at`` it kills itself with SIGKILL; a write is done by half first.
3. Children that are to ``meet`` wait at their first renames until the other has come as far.

Moments are counted in events, not in seconds: they are the same moments on a slow machine.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARED = ("evalkit", "pandas", "torch", "transformer_lens", "transformers")
"""Packages whose modules are imported once for all children."""
STORE = "evalkit.duckdb"
"""Name of the results file."""
COUNTED = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.remove": 0, "os.rmdir": 0}
"""Audit events that are counted, and which argument is the path that tells where."""


class Warm:
    """The process that forks runs. A context manager."""

    def __enter__(self) -> Warm:
        # one thread: what is forked must not have used more, and sums are added in one order
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "EVALKIT_TEST_KEY": "k", "PYTHONPATH": str(ROOT)}
        words = [sys.executable, __file__]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(60)

    def _ask(self, **question: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, suite: Path, folder: Path, *, die_at: int = 0, meet: str = "") -> int:
        """Begin ``evalkit.runs.run.run`` into a results folder; the child's process id.

        Args:
            suite: path of a suite file.
            folder: results folder, whose events are counted.
            die_at: number of the event to be killed at; 0 is never.
            meet: name of this child among two that meet.
        """
        return int(self._ask(suite=str(suite), folder=str(folder), die_at=die_at, meet=meet))

    def wait(self, child: int) -> int:
        """How the child ended, as ``Popen.returncode`` has it."""
        return int(self._ask(wait=child))

    def run(self, suite: Path, folder: Path, *, die_at: int = 0) -> int:
        """``start`` and ``wait``."""
        return self.wait(self.start(suite, folder, die_at=die_at))


def events(folder: Path) -> int:
    """Events that the last child which ended by itself counted in ``folder``."""
    return int((folder.parent / f"{folder.name}.events").read_text())


def said(folder: Path) -> str:
    """What the children of ``folder`` printed."""
    return (folder.parent / f"{folder.name}.log").read_text()


sqlite3_connect = sqlite3.connect


class _Counter:
    def __init__(self, folder: str, die_at: int, meet: str) -> None:
        self.folder, self.die_at, self.meet = os.path.realpath(folder), die_at, meet
        self.number = self.renames = 0
        self.write = os.write
        self.descriptors: set[int] = set()

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writing = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else "r" not in str(mode)
            if not writing:
                return
        elif event in COUNTED:
            path = arguments[COUNTED[event]]
        else:
            return
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike) or not os.path.abspath(path).startswith(self.folder + os.sep):
            return
        if event == "os.rename" and self.meet:
            self._meet()
        self.count()

    def count(self) -> bool:
        """Note one event; True where it is the last one."""
        self.number += 1
        return self.number == self.die_at and self._die()

    def _die(self) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    def half(self, descriptor: int, data: Any) -> int:
        """In the place of ``os.write``: an event of its own, that may end in the middle."""
        if os.path.realpath(f"/proc/self/fd/{descriptor}").startswith(self.folder + os.sep):
            self.number += 1
            if self.number == self.die_at:
                self.write(descriptor, bytes(data)[: len(data) // 2])
                self._die()
        return self.write(descriptor, data)

    def connect(self, path: Any, *arguments: Any, **named: Any) -> sqlite3.Connection:
        """In the place of ``sqlite3.connect``: statements are events, as SQLite's own writes cannot be seen from here."""
        connection = sqlite3_connect(path, *arguments, **named)
        connection.set_trace_callback(lambda statement: self.count())
        return connection

    def _meet(self) -> None:
        """Wait until the other is at its rename of this number, too, or is past all of them."""
        self.renames += 1
        folder = Path(f"{self.folder}.meeting")
        folder.mkdir(exist_ok=True)
        (folder / f"{self.meet}-{self.renames}").touch()
        mine, patience = (f"{self.meet}-", 200 if self.renames < 4 else 0)  # later ones may have no counterpart
        while patience and not [f for f in folder.glob(f"*-{self.renames}") if not f.name.startswith(mine)]:
            time.sleep(0.01)
            patience -= 1


def _child(question: dict[str, Any]) -> int:
    """The forked child: count, run, note the count."""
    folder = Path(question["folder"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
    counter = _Counter(str(folder), question["die_at"], question["meet"])
    sys.addaudithook(counter.audit)
    os.write = counter.half
    sqlite3.connect = counter.connect
    from evalkit.errors import EvalkitError
    from evalkit.runs.run import run
    from evalkit.util.progress import Progress

    try:
        outcome = run(question["suite"], folder / STORE, progress=Progress(quiet=True))
        status, words = outcome.exit_code, outcome.message
    except EvalkitError as error:
        status, words = error.exit_code, str(error)
    print(f"{status}: {words}", flush=True)
    (folder.parent / f"{folder.name}.events").write_text(str(counter.number))
    (folder.parent / f"{folder.name}.modules").write_text("\n".join(sys.modules))
    return status


def _preload(names: Path) -> None:
    """Import what a child had to, so that the next need not."""
    for name in names.read_text().splitlines() if names.exists() else ():
        if name not in sys.modules and name.partition(".")[0] in (
            "transformers",
            "transformer_lens",
            "evalkit",
            "torch",
            "pandas",
        ):
            with contextlib.suppress(Exception):  # not every name in sys.modules can be imported
                importlib.import_module(name)
    names.unlink(missing_ok=True)


def _serve() -> None:
    """Import, then fork a child for each line of standard input."""
    real = time.sleep
    time.sleep = lambda seconds: real(min(seconds, 0.01))  # waits between attempts; before anybody keeps the function
    import duckdb  # noqa: F401
    import openai  # noqa: F401
    import transformers  # noqa: F401

    import evalkit.runs.run  # noqa: F401
    from evalkit.evaluations.base import EVALUATIONS
    from evalkit.judges.base import JUDGES

    EVALUATIONS.names()
    JUDGES.names()
    folders: dict[int, str] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            _preload(Path(f"{folders[question['wait']]}.modules"))
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            status = 99
            try:
                status = _child(question)
            finally:
                os._exit(status)
        folders[child] = question["folder"]
        print(child, flush=True)


if __name__ == "__main__":
    _serve()
