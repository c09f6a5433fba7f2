"""What a run wrote down: the truth behind the results file.

1. A run appends to ``<results folder>/runs/<run_id>/journal.jsonl``, one JSON object a line, each on the disk before the
   run goes on.
2. A finished unit is one record, ``{"unit": {...}, "scores": [...], "explanations": [...], ...}`` with a list for each table
   of ``FACTS``, so it is there whole or not at all. Other rows are ``{"table": name, "rows": [...]}``; among them units that
   failed, and units whose facts are in the journal of another run (same key, same rows).
3. Rows are checked against the layout of the results file before they are written: what is in a journal can be ingested.
4. Readers take whole lines only and remember the byte they stopped at, so a run of days is not read from its start again.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from evalkit.errors import StoreUnreadable
from evalkit.store.migrations import columns, facts
from evalkit.util.files import JsonLines

FACTS = facts()
"""Tables whose rows belong to a unit: scores, explanations, predictions and what other evaluations need (``schema``)."""
ROWS = ("runs", "dictionaries", "metrics", "judge_calls", "training_steps", "texts", "units")
"""Tables written with ``Journal.write_rows``."""
UNIT_STATES = ("done", "failed")
STATUSES = {"ok", "undefined", "failed", "censored"}
VALUED = {"ok", "censored"}
"""Statuses of scores that have a value."""


class ScoreLike(Protocol):
    """A score as evaluations return it: a named tuple with the columns of ``scores``."""

    def _asdict(self) -> dict[str, Any]: ...


class Entry(NamedTuple):
    """One record and where the next begins."""

    record: dict[str, Any]
    end: int
    """Byte after the record's line."""


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: NumPy and torch scalars and arrays, tuples and times are turned into plain ones."""
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a journal cannot hold a {type(value).__name__}")


def _fits(value: Any, kind: str) -> bool:
    """Whether the results file can take a plain ``value`` in a column of DuckDB's type ``kind``."""
    if value is None:
        return True
    if kind.endswith("[]"):
        return isinstance(value, list) and all(_fits(item, kind[:-2]) for item in value)
    if kind in ("DOUBLE", "BIGINT", "BOOLEAN"):
        return isinstance(value, int | float) and math.isfinite(value) and (kind == "DOUBLE" or value == int(value))
    return True


def _checked(table: str, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    known = columns()[table]
    plain = [_plain(row) for row in rows]
    for row in plain:
        unknown = sorted(set(row) - set(known))
        if unknown:
            raise ValueError(f"table '{table}' has no column {', '.join(unknown)}; it has {', '.join(known)}")
        for column, value in row.items():
            if not _fits(value, known[column]):
                raise ValueError(f"column '{column}' of table '{table}' takes a finite {known[column]}, not {value!r}: {row}")
        if table == "scores" and (row.get("status") not in STATUSES or (row.get("value") is None) == (row["status"] in VALUED)):
            raise ValueError(f"a score has a value if and only if its status is 'ok' or 'censored', of {sorted(STATUSES)}: {row}")
        if table == "units" and (not row.get("unit_key") or row.get("status") not in UNIT_STATES):
            raise ValueError(f"a unit needs a unit_key and a status, 'done' or 'failed': {row}")
    return plain


class Journal:
    """The record of one run.

    Args:
        folder: ``<results folder>/runs/<run_id>``; created with the first record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "journal.jsonl"
        self._lines = JsonLines(self.path)

    @property
    def run_id(self) -> str:
        """Name of the run's folder."""
        return self.folder.name

    def write_unit(
        self,
        unit_row: Mapping[str, Any],
        scores: Iterable[Mapping[str, Any] | ScoreLike] = (),
        tables: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
    ) -> None:
        """Record one unit with all it produced, as one line.

        Args:
            unit_row: columns of ``units``; ``unit_key`` and ``status`` ('done' or 'failed') are needed, ``run_id`` is filled in.
            scores: rows of ``scores`` without ``unit_key``; named tuples are taken as they are.
            tables: rows of the other tables of ``FACTS``, by table, without ``unit_key``.

        Raises:
            ValueError: a column or table does not exist, a value is NaN, infinite or not of its column's type, or status and
                value disagree.
        """
        rows: dict[str, Iterable[Mapping[str, Any]]] = dict(tables or {})
        if unknown := sorted(set(rows) - set(FACTS[1:])):
            raise ValueError(f"a unit has no table {', '.join(unknown)}; it has {', '.join(FACTS[1:])}")
        rows["scores"] = [row if isinstance(row, Mapping) else row._asdict() for row in scores]
        record: dict[str, Any] = {"unit": _checked("units", [{"run_id": self.run_id, **unit_row}])[0]}
        for table in FACTS:
            record[table] = _checked(table, rows.get(table, ()))
        self._lines.append(record)

    def write_rows(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record rows of 'runs', 'dictionaries', 'metrics', 'judge_calls', 'training_steps', 'texts' or 'units', as one line.

        Raises:
            ValueError: the table or a column does not exist, or a number is NaN or infinite.
        """
        if table not in ROWS:
            raise ValueError(f"rows of '{table}' cannot be written alone; those of {', '.join(ROWS)} can")
        plain = _checked(table, rows)
        if "run_id" in columns()[table]:
            plain = [{"run_id": self.run_id, **row} for row in plain]
        if plain:
            self._lines.append({"table": table, "rows": plain})

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """Whole records from byte ``start`` on, which must be 0 or the end of an earlier entry.

        Raises:
            StoreUnreadable: a whole line is not JSON.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as handle:
            handle.seek(start)
            end = start
            for line in handle:
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise StoreUnreadable(
                        f"the line at byte {end} of a journal is not JSON: {error}",
                        where=str(self.path),
                        fix="move the run's folder aside and run again; what it held is computed again",
                    ) from error
                end += len(line)
                yield Entry(record, end)

    def records(self) -> Iterator[dict[str, Any]]:
        """Every whole record, oldest first; a torn last line is left out."""
        return (entry.record for entry in self.entries())

    def finished(self) -> dict[str, dict[str, Any]]:
        """Units whose latest record says 'done': key to row of ``units``. Ones taken over from another run count too."""
        return {key: row for key, row in self._latest().items() if row["status"] == "done"}

    def measured(self) -> dict[str, dict[str, Any]]:
        """Units whose facts are in this very journal: key to row of ``units``."""
        return {
            str(row["unit_key"]): row for row in (r["unit"] for r in self.records() if "unit" in r) if row["status"] == "done"
        }

    def _latest(self) -> dict[str, dict[str, Any]]:
        return {str(row["unit_key"]): row for record in self.records() for row in units_of(record)}

    def first_line(self) -> str:
        """sha256 of the first whole line, '' where there is none: a journal begun anew has another."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as handle:
            line = handle.readline()
        return hashlib.sha256(line).hexdigest() if line.endswith(b"\n") else ""

    def size(self) -> int:
        """Bytes on the disk, a torn last line included."""
        return self.path.stat().st_size if self.path.exists() else 0


def units_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``units`` that a record holds."""
    if "unit" in record:
        return [record["unit"]]
    return list(record.get("rows") or ()) if record.get("table") == "units" else []


def journals(results_folder: Path) -> list[Journal]:
    """The journals of every run under ``results_folder``, in the order the runs were begun."""

    def begun(journal: Journal) -> tuple[str, str]:
        first = next(journal.records(), {})
        rows = first.get("rows") or [first.get("unit") or {}]
        return str(rows[0].get("at") or ""), journal.run_id

    found = [Journal(file.parent) for file in (Path(results_folder) / "runs").glob("*/journal.jsonl")]
    return sorted(found, key=begun)
