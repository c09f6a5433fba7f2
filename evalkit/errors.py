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
     `- StoreError                        5      the results file cannot be used
         |- StoreLocked                          another process holds it
         `- StoreUnreadable                      it is damaged, foreign, or newer than this evalkit
             `- StoreAbsent                      it is not there

Each message answers three questions: what happened, where, and what to do about it.
"""

from __future__ import annotations


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
    """The results file cannot be used."""

    exit_code = 5


class StoreLocked(StoreError):
    """Another process holds the results file."""


class StoreUnreadable(StoreError):
    """The results file is damaged, not ours, or written by a newer evalkit."""


class StoreAbsent(StoreUnreadable):
    """There is no results file."""
