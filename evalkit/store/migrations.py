"""The layout of the results file, as numbered SQL files.

1. ``schema/NNNN_*.sql`` are applied in order, each once; the table ``schema_version`` keeps the numbers.
2. All that a file lacks is applied in one transaction, then checkpointed, so that no half-applied change and no
   change waiting in the write-ahead log can survive a kill.
3. A file with a number this evalkit does not know is newer, and refused.
4. ``columns`` reads the layout back, so that nothing repeats it in Python.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import duckdb

from evalkit.errors import StoreUnreadable
from evalkit.store.connection import read

FOLDER = Path(__file__).parent / "schema"


class Migration(NamedTuple):
    """One numbered change of layout."""

    number: int
    sql: str


@functools.cache
def migrations() -> tuple[Migration, ...]:
    """All changes in order."""
    return tuple(Migration(int(file.name[:4]), file.read_text()) for file in sorted(FOLDER.glob("[0-9]*_*.sql")))


def version(connection: duckdb.DuckDBPyConnection, path: Path) -> int:
    """Layout number of an open file; 0 where it is empty.

    Raises:
        StoreUnreadable: the file holds something else, or was written by a newer evalkit.
    """
    tables = {str(row[0]) for row in read(connection, path, "SELECT table_name FROM duckdb_tables()")}
    if not tables:
        return 0
    if "schema_version" not in tables:
        what = "this DuckDB file was not written by evalkit"
        raise StoreUnreadable(what, where=str(path), fix="name another file with --results")
    number = int(str(read(connection, path, "SELECT coalesce(max(version), 0) FROM schema_version")[0][0]))
    known = migrations()[-1].number
    if number > known:
        raise StoreUnreadable(
            f"the results file has layout {number}, and this evalkit knows up to {known}",
            where=str(path),
            fix="update evalkit, or name another file with --results",
        )
    return number


def migrate(connection: duckdb.DuckDBPyConnection, current: int) -> int:
    """Apply what an open file of layout ``current`` lacks; returns the layout it has then."""
    lacking = [migration for migration in migrations() if migration.number > current]
    if not lacking:
        return current
    connection.execute("BEGIN")
    connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT)")
    for migration in lacking:
        connection.execute(migration.sql)
        connection.execute("INSERT INTO schema_version VALUES (?)", [migration.number])
    connection.execute("COMMIT")
    connection.execute("CHECKPOINT")
    return lacking[-1].number


@functools.cache
def columns() -> dict[str, dict[str, str]]:
    """Columns of every table and their DuckDB types, in order."""
    connection = duckdb.connect(":memory:")
    try:
        migrate(connection, 0)
        layout: dict[str, dict[str, str]] = {}
        rows = connection.execute(
            "SELECT c.table_name, c.column_name, c.data_type FROM duckdb_columns() c JOIN duckdb_tables() t USING (table_oid) "
            "ORDER BY c.table_name, c.column_index"
        ).fetchall()
        for table, column, kind in rows:
            layout.setdefault(str(table), {})[str(column)] = str(kind)
        return layout
    finally:
        connection.close()


@functools.cache
def facts() -> tuple[str, ...]:
    """Tables whose rows belong to a unit, scores first: those that have a ``unit_key``."""
    return ("scores", *sorted(t for t, layout in columns().items() if "unit_key" in layout and t not in ("scores", "units")))
