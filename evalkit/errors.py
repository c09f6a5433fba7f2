"""Everything evalkit raises on purpose, one class per question a caller asks.

    EvalkitError                      exit code
     |- UsageError                        2      nothing was started: fix the input and run again
     |   |- SuiteError                           the suite file is wrong (key, value, section)
     |   |- AssetError                           a packaged model or corpus is absent or corrupt
     |   |- ModelError                           the language model or the hook point cannot be used
     |   |- CorpusError                          there is no usable text
     |   |- DictionaryError                      a dictionary file is wrong or does not fit the model
     |   `- JudgeSetupError                      the judge cannot be used as configured (no key, wrong name)
     |- BudgetReached                     3      the judge budget is spent; finished work is kept
     |- UnitFailed                        4      one unit of work failed; the others are kept
     `- StoreError                        5      the results cannot be kept or read
         |- StoreLocked                          another process holds the results file
         |- StoreUnreadable                      it is damaged, foreign, or newer than this evalkit
         |   `- StoreAbsent                      it is not there
         `- DiskFull                             the disk under results, caches or temporary files is full

Each message answers three questions: what happened, where, and what to do about it.
"""

from __future__ import annotations

import traceback
from collections import deque
from pathlib import Path

SHOWN_FRAMES = 6
"""Innermost calls that the record of a foreign exception names."""

SHOWN_WORDS = 300
"""Characters of its message that are kept."""


class EvalkitError(Exception):
    """Base of all errors evalkit raises on purpose.

    Args:
        what: one sentence saying what is wrong.
        where: file, key, hook point or address the sentence is about; empty where ``what`` names it.
        fix: what the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  to do: {self.fix}")
        return "\n".join(lines)


class UsageError(EvalkitError):
    """The input is wrong; nothing was started."""

    exit_code = 2


class SuiteError(UsageError):
    """The suite file is wrong."""


class AssetError(UsageError):
    """A packaged model or corpus is absent, or its checksum disagrees."""


class ModelError(UsageError):
    """The language model or the hook point cannot be used."""


class CorpusError(UsageError):
    """There is no usable text."""


class DictionaryError(UsageError):
    """A dictionary is malformed or does not fit the model it is used with."""


class JudgeSetupError(UsageError):
    """The judge cannot be used as configured."""


class BudgetReached(EvalkitError):
    """The next judge call could exceed the budget; everything finished is kept."""

    exit_code = 3


class UnitFailed(EvalkitError):
    """One unit of work failed; the others are kept."""

    exit_code = 4


class StoreError(EvalkitError):
    """The results cannot be kept or read."""

    exit_code = 5


class StoreLocked(StoreError):
    """Another process holds the results file."""


class StoreUnreadable(StoreError):
    """The results file is damaged, not ours, or written by a newer evalkit."""


class StoreAbsent(StoreUnreadable):
    """There is no results file."""


def reason(error: BaseException) -> str:
    """What a library's exception says, in one line: its first sentence, with the one after it where it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


class DiskFull(StoreError):
    """A disk is full, or a quota is used up; everything finished is kept."""


class DiskFailed(UnitFailed):
    """Something could not be written: the disk is full, or its folder is not ours. What was there before is kept."""


def fails_one_unit(error: Exception) -> bool:
    """Whether ``error``, met while one unit is worked on, is that unit's failure and the others can go on.

    A spent budget, a wrong suite file, a judge that cannot be used, a lost process and a place for results that is full or
    unusable would end every unit alike.
    """
    if isinstance(error, EvalkitError):
        return isinstance(error, UnitFailed | UsageError) and not isinstance(error, JudgeSetupError | SuiteError)
    return True


def as_unit_failed(error: Exception) -> UnitFailed:
    """``error`` as the failure of one unit; of a foreign exception the type, the message and the innermost calls are kept.

    It holds no reference to ``error``, whose frames may hold gigabytes.
    """
    if isinstance(error, UnitFailed):
        return error
    if isinstance(error, EvalkitError):
        return UnitFailed(error.what, where=error.where, fix=error.fix)
    frames = deque(traceback.walk_tb(error.__traceback__), maxlen=SHOWN_FRAMES)
    calls = [f"{Path(frame.f_code.co_filename).name}:{line} {frame.f_code.co_name}" for frame, line in frames]
    # notes of the exception stand behind that line, a syntax error's place, indented, before it
    said = next(line for line in traceback.format_exception_only(error) if not line.startswith(" "))
    lines = said.encode("utf-8", "replace").decode().strip().splitlines() or [type(error).__name__]
    fix = "see the calls above; the same command tries this again"
    return UnitFailed(lines[0][:SHOWN_WORDS], where=" > ".join(calls), fix=fix)
