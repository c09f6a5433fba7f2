"""Rows of a journal as data frames whose types DuckDB cannot mistake, and its answers as plain ones.

Types come from the layout, never from the values: a column that is NULL throughout, a list column that is empty, or a
number that first appears in row 5,000 is ingested like any other. Lists travel as JSON text and are cast in SQL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from evalkit.errors import StoreUnreadable
from evalkit.store.migrations import columns

DTYPES: dict[str, Any] = {"BIGINT": "Int64", "DOUBLE": "Float64", "BOOLEAN": "boolean"}


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def frame(table: str, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """``rows`` as a frame with every column of ``table``; lists and objects as JSON text, times as UTC without a zone.

    Raises:
        StoreUnreadable: a row has a column the layout lacks, or a value of another type.
    """
    layout = columns()[table]
    unknown = sorted({column for row in rows for column in row} - set(layout))
    if unknown:
        raise StoreUnreadable(
            f"a journal has columns that table '{table}' lacks: {', '.join(unknown)}",
            fix="a newer evalkit wrote it, perhaps: update evalkit",
        )
    series: dict[str, Any] = {}
    for column, kind in layout.items():
        values = [row.get(column) for row in rows]
        try:
            if kind == "TIMESTAMP":
                times = pd.to_datetime(pd.Series(values, dtype="object"), utc=True, format="ISO8601")
                series[column] = times.dt.tz_localize(None)
            elif kind in DTYPES:
                series[column] = pd.array(values, dtype=DTYPES[kind])
            else:
                series[column] = pd.array([_text(value) for value in values], dtype="string")
        except (TypeError, ValueError) as error:
            raise StoreUnreadable(
                f"a journal has a value in column '{column}' of table '{table}' that is no {kind}: {error}",
                fix="move the run's folder aside and run again; what it held is computed again",
            ) from error
    return pd.DataFrame(series)


def insert(
    connection: duckdb.DuckDBPyConnection, table: str, rows: Sequence[Mapping[str, Any]], *, distinct: bool = False
) -> None:
    """Append ``rows`` to ``table``; with ``distinct``, only those that are not there yet, column for column."""
    if not rows:
        return
    layout = columns()[table]
    incoming = frame(table, rows)
    connection.register("incoming", incoming)
    picked = ", ".join(f'"{c}"::JSON::{k} AS "{c}"' if k.endswith("[]") else f'"{c}"::{k} AS "{c}"' for c, k in layout.items())
    query = f"SELECT {picked} FROM incoming"
    if distinct:
        same = " AND ".join(f't."{c}" IS NOT DISTINCT FROM i."{c}"' for c in layout)
        query = f"SELECT i.* FROM (SELECT DISTINCT * FROM ({query})) i ANTI JOIN {table} t ON {same}"
    connection.execute(f"INSERT INTO {table} BY NAME {query}")
    connection.unregister("incoming")


def unmasked(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` whose lists have NaN (numbers) or None for NULL: DuckDB masks them, and what reads a mask as a number warns."""

    def plain(value: Any) -> Any:
        if not isinstance(value, np.ma.MaskedArray):
            return value
        return value.filled(np.nan) if value.dtype.kind == "f" else np.array(value.tolist(), dtype=object)

    for name in frame:
        if _has_masks(frame[name]):
            frame[name] = frame[name].map(plain)
    return frame


def _has_masks(column: pd.Series) -> bool:
    return column.dtype == object and any(isinstance(value, np.ma.MaskedArray) for value in column)
