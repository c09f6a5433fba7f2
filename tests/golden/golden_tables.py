"""Rows of a results file in a form that does not depend on the machine, written to files and compared with them.

1. A unit's key is a hash of paths and versions. It is replaced by the unit's name: evaluation, dictionary, hook point, and a
   number where a suite has the evaluation twice.
2. ``LEFT_OUT`` lists the columns that are not compared, and why. All others are.
3. A row is found by its table's columns in ``KEYS``. Rows with equal keys are numbered in the order they were written.
4. Tables in ``GATHERED`` have many rows with equal keys. A group of up to ``LISTED`` rows is one line, whose cells are lists. In
   a longer one, such as bootstrap draws, a column's mean and mean square stand for its numbers.
5. Text, whole numbers and truth values are compared exactly; other numbers to ``RELATIVE`` and ``ABSOLUTE``. JSON text is
   compared value by value.
6. A file holds one JSON array a line: the columns first, then the rows.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

EXPECTED = Path(__file__).parent / "expected"

RELATIVE, ABSOLUTE = 1e-3, 2e-5
"""A number agrees where it differs by no more than one of these. The models compute in float32, in an order of sums that depends
on the processor and its libraries."""

DIGITS = 5
"""Significant digits in the files."""

TIME = "a time"
KEY = "a hash of paths, versions or numbers of unlike last bits"
LEFT_OUT = {
    "*.at": TIME,
    "*.seconds": TIME,
    "*.tokens_per_second": TIME,
    "*.run_id": KEY,
    "*.dictionary_id": KEY,
    "*.model_identity": KEY,
    "judge_calls.call_key": KEY,
    "training_steps.recipe": KEY,
    "runs.evalkit_version": "the version",
    "runs.packages": "versions",
    "runs.machine": "the machine",
    "dictionaries.model": KEY,
    "runs.suite_toml": "the suite is in golden_case.py",
}
"""Columns that are not compared, as table.column, and why."""

NO_TABLES = {
    "ingested": "bytes of journals that hold times",
    "schema_version": "numbers of the layout's changes, held by the layout's own tests",
}
"""Tables that are not compared, and why."""

TIMES = ("seconds", "tokens_per_second")
"""Metrics and keys of JSON text that begin so are times, and left out."""

KEYS = {
    "ablation_contexts": ("unit_key", "feature", "edit", "window", "position"),
    "causal_edges": ("unit_key", "target", "depth", "child_hook", "child", "parent_hook", "parent"),
    "causal_nodes": ("unit_key", "hook_point", "feature"),
    "concept_features": ("unit_key", "concept", "source", "place"),
    "concept_texts": ("unit_key", "concept", "feature", "sign", "held_out", "label", "text"),
    "dictionaries": ("kind", "hook_point", "n_features"),
    "explanations": ("unit_key", "feature", "judge"),
    "feature_ranks": ("unit_key", "ranking", "seed", "place"),
    "input_bins": ("unit_key", "feature", "of", "neuron", "sign", "scale", "bin"),
    "judge_calls": ("judge", "purpose", "status", "error", "left_out"),
    "logit_effects": ("unit_key", "feature", "edit", "ranked_by", "side", "place"),
    "metrics": ("evaluation", "metric"),
    "patching_curves": ("unit_key", "ranking", "seed", "size"),
    "patching_rankings": ("unit_key", "ranking", "seed"),
    "predictions": ("unit_key", "feature", "judge", "explained_by", "part", "fragment"),
    "runs": ("suite", "status"),
    "scores": ("unit_key", "metric", "kind", "status", "seed", "source"),
    "steering_texts": ("unit_key", "feature", "arm", "mode", "strength", "prompt", "draw"),
    "texts": ("side", "hook_point"),
    "training_steps": ("dictionary", "step"),
    "units": ("unit_key",),
}
"""Columns that say which row it is. A table that is not here has no key, and its rows are compared in their order."""

GATHERED = ("scores", "patching_curves", "judge_calls")
"""Tables whose rows with equal keys make one line."""

LISTED = 64
"""Most rows of a group whose values are listed."""

Row = list[Any]


class Table(NamedTuple):
    """Columns, the first ``keys`` of which say which row it is, and rows."""

    columns: list[str]
    keys: int
    rows: list[Row]


def left_out(table: str, column: str) -> bool:
    """Whether a column is not compared."""
    return f"*.{column}" in LEFT_OUT or f"{table}.{column}" in LEFT_OUT


def read_tables(store: Path) -> dict[str, Table]:
    """Every compared table of a results file, by name. The path of the suite's folder reads ``FOLDER``."""
    connection = duckdb.connect(str(store), read_only=True)
    try:
        found = connection.execute("SELECT table_name FROM duckdb_tables() ORDER BY 1").fetchall()
        units = _unit_names(connection)
        names = [str(name) for (name,) in found if name not in NO_TABLES]
        return {name: _read(connection, name, units, str(store.parents[1])) for name in names}
    finally:
        connection.close()


def _unit_names(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    query = "SELECT unit_key, evaluation, dictionary, hook_point, config FROM units ORDER BY rowid"
    configs: dict[str, list[str]] = defaultdict(list)
    names = {}
    for key, evaluation, dictionary, hook_point, config in connection.execute(query).fetchall():
        if config not in configs[evaluation]:
            configs[evaluation].append(config)
        names[key] = f"{evaluation} {configs[evaluation].index(config) + 1} {dictionary} {hook_point.rpartition('.')[0]}"
    return names


def _read(connection: duckdb.DuckDBPyConnection, table: str, units: Mapping[str, str], folder: str) -> Table:
    cursor = connection.execute(f'SELECT * FROM "{table}" ORDER BY rowid')
    columns = [str(column[0]) for column in cursor.description or ()]
    rows = [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]
    rows = [row for row in rows if table != "scores" or not row["metric"].startswith(TIMES)]
    rows = [{k: v.replace(folder, "FOLDER") if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    for row in rows:
        if "unit_key" in row:
            row["unit_key"] = units[row["unit_key"]]
    keys = [column for column in KEYS.get(table, ()) if column in columns]
    rest = [column for column in columns if column not in keys and not left_out(table, column)]
    return _gathered(rows, keys, rest) if table in GATHERED else _numbered(rows, keys, rest)


def _numbered(rows: Sequence[Mapping[str, Any]], keys: list[str], rest: list[str]) -> Table:
    counts: dict[str, int] = defaultdict(int)
    found = []
    for row in rows:
        key = [_plain(row[column]) for column in keys]
        counts[json.dumps(key)] += 1
        found.append([*key, counts[json.dumps(key)], *(_plain(row[column]) for column in rest)])
    return Table([*keys, "number", *rest], len(keys) + 1, _sorted(found, len(keys) + 1))


def _gathered(rows: Sequence[Mapping[str, Any]], keys: list[str], rest: list[str]) -> Table:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[json.dumps([_plain(row[column]) for column in keys])].append({column: row[column] for column in rest})
    found = []
    for key, group in groups.items():
        group.sort(key=_exact_part)
        found.append([*json.loads(key), len(group), *(_cell([row[column] for row in group]) for column in rest)])
    return Table([*keys, "rows", *rest], len(keys), _sorted(found, len(keys)))


def _exact_part(row: Mapping[str, Any]) -> str:
    """What rows of a group are sorted by: all but the numbers that are compared to a tolerance."""
    return json.dumps(
        [f"{value:09}" if isinstance(value, int) else value for value in row.values() if not isinstance(value, float)]
    )


def _cell(values: list[Any]) -> Any:
    """A column of a group: a single value where all are equal and exact, a list, or sums."""
    if not any(isinstance(value, float) for value in values) and all(value == values[0] for value in values):
        return _plain(values[0])
    if len(values) <= LISTED:
        return _plain(values)
    numbers = [value for value in values if value is not None]
    mean, square = (math.fsum(number**power for number in numbers) / len(numbers) for power in (1, 2))
    return {"values": len(numbers), "mean": _plain(mean), "mean square": _plain(square)}


def _sorted(rows: list[Row], keys: int) -> list[Row]:
    return sorted(
        rows, key=lambda row: [(0, value, "") if isinstance(value, (int, float)) else (1, 0, str(value)) for value in row[:keys]]
    )


def _plain(value: Any) -> Any:
    """``value`` as JSON holds it: numbers of ``DIGITS`` digits, JSON text as what it stands for."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return _plain(json.loads(value))
        except ValueError:
            return value
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in sorted(value.items()) if not key.startswith(TIMES)}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def agrees(expected: Any, got: Any) -> bool:
    """Whether a value is the expected one."""
    if isinstance(expected, bool) or isinstance(got, bool):
        return expected is got
    if isinstance(expected, (int, float)) and isinstance(got, (int, float)):
        if isinstance(expected, int) and isinstance(got, int):
            return expected == got
        return math.isclose(expected, got, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    if isinstance(expected, list) and isinstance(got, list):
        return len(expected) == len(got) and all(map(agrees, expected, got))
    if isinstance(expected, dict) and isinstance(got, dict):
        return expected.keys() == got.keys() and all(agrees(expected[key], got[key]) for key in expected)
    return type(expected) is type(got) and expected == got


def differences(name: str, expected: Table, got: Table) -> Iterator[str]:
    """One line for each row that is missing, not expected, or differs."""
    if expected[:2] != got[:2]:
        yield f"{name}: columns\n  expected {expected.columns}\n  got      {got.columns}"
        return
    keys, columns = expected.keys, expected.columns
    before, after = (_by_key(table) for table in (expected, got))
    for key, row in before.items():
        place = ", ".join(f"{column}={value!r}" for column, value in zip(columns, row[:keys], strict=False))
        if key not in after:
            yield f"{name}: {place}: the row is missing"
            continue
        unlike = [number for number in range(keys, len(columns)) if not agrees(row[number], after[key][number])]
        if unlike:
            told = "".join(f"\n  {columns[number]}: expected {row[number]!r}, got {after[key][number]!r}" for number in unlike)
            yield f"{name}: {place}{told}"
    for key, row in after.items():
        if key not in before:
            yield f"{name}: a row that was not expected: {dict(zip(columns, row, strict=True))}"


def _by_key(table: Table) -> dict[str, Row]:
    return {json.dumps(row[: table.keys]): row for row in table.rows}


def load(name: str) -> Table:
    """The expected table.

    Raises:
        FileNotFoundError: it was never recorded.
    """
    lines = [json.loads(line) for line in (EXPECTED / f"{name}.jsonl").read_text().splitlines()]
    (keys, columns), rows = lines[0], lines[1:]
    return Table(columns, keys, rows)


def save(name: str, table: Table) -> int:
    """Write the expected table; rows that agree with the file's stay as they are. Returns how many do not."""
    path, kept = EXPECTED / f"{name}.jsonl", dict[str, Row]()
    if path.exists() and (old := load(name))[:2] == table[:2]:
        kept = _by_key(old)
    rows = []
    for key, row in _by_key(table).items():
        rows.append(kept[key] if key in kept and agrees(kept[key], row) else row)
    changed = sum(row is not kept.get(json.dumps(row[: table.keys])) for row in rows)
    lines = [json.dumps(line, ensure_ascii=False) for line in [[table.keys, table.columns], *rows]]
    path.write_text("\n".join(lines) + "\n")
    return changed


def recorded() -> list[str]:
    """Names of the expected tables."""
    return sorted(path.stem for path in EXPECTED.glob("*.jsonl"))
