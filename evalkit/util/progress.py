"""Progress that names the stage and the time left: bars on a terminal, plain lines elsewhere.

Library code takes a ``Progress`` and never prints. ``Progress(quiet=True)`` says nothing (tests, notebooks).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from evalkit.util.terminal import legible, say, shown

WIDE = 110
"""Columns of a terminal from which on the unit and the time so far are shown too."""


def clock(seconds: float) -> str:
    """``seconds`` as people say them: ``48 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Stage:
    """One named piece of work with a known or unknown total. ``advance`` moves it, ``note`` adds a few words."""

    def __init__(self, name: str, total: float | None, unit: str) -> None:
        self.name, self.total, self.unit = legible(name), total, unit
        self.done = 0.0
        self.before = 0.0
        """Of it, what was done before the stage began: it says nothing about the speed."""
        self.words = ""
        self.started = time.monotonic()

    def advance(self, amount: float = 1, words: str = "") -> None:
        """Move on by ``amount`` units; ``words`` replaces the text shown behind the count."""
        self.done += amount
        self.words = legible(words) or self.words
        self._show()

    def go_on(self, done: float) -> None:
        """Begin where an earlier start ended."""
        self.done = self.before = done

    def _show(self) -> None:
        """Overridden by the two ways of showing."""

    @property
    def remaining(self) -> float | None:
        """Seconds left at the average speed so far; None while unknown."""
        if not self.total or self.done <= self.before:
            return None
        return (time.monotonic() - self.started) * (self.total - self.done) / (self.done - self.before)


class _PlainStage(Stage):
    """A line every ``every`` seconds, and only when the count changed."""

    every = 10.0

    def __init__(self, name: str, total: float | None, unit: str) -> None:
        super().__init__(name, total, unit)
        self.last = self.started

    def _show(self) -> None:
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        of = f"/{self.total:,.0f}" if self.total else ""
        left = f", {clock(self.remaining)} left" if self.remaining is not None else ""
        words = f", {self.words}" if self.words else ""
        say(f"{self.name}: {self.done:,.0f}{of} {self.unit}{words}{left}", error=True)


class _BarStage(Stage):
    def __init__(self, name: str, total: float | None, unit: str, bars: RichProgress) -> None:
        super().__init__(name, total, unit)
        self.bars = bars
        self.task = bars.add_task(self.name, total=total, words="", unit=unit)

    def go_on(self, done: float) -> None:
        super().go_on(done)
        self.bars.reset(self.task, completed=int(done))

    def _show(self) -> None:
        self.bars.update(self.task, completed=self.done, words=self.words)


class _Cropped(TextColumn):
    """Text of one line that gives way where the terminal is narrow."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text

    def get_table_column(self) -> Column:
        return Column(no_wrap=False)


def _bars() -> RichProgress:
    console = Console(stderr=True)
    wide, whole = console.width >= WIDE, Column(no_wrap=True)
    columns: list[ProgressColumn] = [
        _Cropped("{task.description}", markup=False),
        BarColumn(20 if wide else 10, table_column=whole),
        MofNCompleteColumn(table_column=whole.copy()),
        _Cropped("{task.fields[words]}", markup=False),
    ]
    if wide:
        columns.insert(3, TextColumn("{task.fields[unit]}", markup=False))
        columns.append(TimeElapsedColumn(table_column=whole.copy()))
    columns += [TextColumn("left"), TimeRemainingColumn(table_column=whole.copy())]
    return RichProgress(*columns, console=console, transient=True)


class Progress:
    """Where stages are shown. One at a time is the usual case; nested ones are fine.

    Args:
        quiet: show nothing.
        terminal: force bars (True) or lines (False); the default asks standard error.
    """

    def __init__(self, *, quiet: bool = False, terminal: bool | None = None) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bars: RichProgress | None = None
        self._depth = 0

    def say(self, line: str) -> None:
        """One line of news, between stages or above the bars."""
        if self.quiet:
            return
        if self._bars is not None:
            self._bars.console.print(shown(line), markup=False, highlight=False)
        else:
            say(line, error=True)

    @contextmanager
    def stage(self, name: str, total: float | None = None, unit: str = "steps") -> Iterator[Stage]:
        """Show ``name`` until the block ends, then say how long it took.

        Args:
            name: what is being done, as a reader would say it ("training topk-32").
            total: number of units in all; None where it cannot be known.
            unit: what is counted ("tokens", "features", "MB").
        """
        if self.quiet:
            yield Stage(name, total, unit)
            return
        if not self.terminal:
            stage: Stage = _PlainStage(name, total, unit)
            say(f"{stage.name} ...", error=True)
            yield stage
            self._finish(stage)
            return
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        self._depth += 1
        bar = _BarStage(name, total, unit, self._bars)
        try:
            yield bar
            self._finish(bar)
        finally:
            self._bars.remove_task(bar.task)
            self._depth -= 1
            if self._depth == 0:
                self._bars.stop()
                self._bars = None

    def _finish(self, stage: Stage) -> None:
        count = f", {stage.done:,.0f} {stage.unit}" if stage.done else ""
        words = f", {stage.words}" if stage.words else ""
        self.say(f"{stage.name}: done in {clock(time.monotonic() - stage.started)}{count}{words}")
