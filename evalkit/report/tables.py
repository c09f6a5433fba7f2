"""Tables as papers print them, from the long frames of ``Results.table`` and ``Results.compare``.

1. One row a dictionary (and hook point, configuration, and source of text, where there are several), one column a metric: the
   mean with its 95% interval. The row over all sources is the last of its dictionary.
2. Beside a score stand its null and its chance level, and how many items are behind it, failed or were undefined.
3. The best value is marked where the frame says so (``best``): only among dictionaries of like L0, each different by a test.
   L0 has a column of its own wherever it was measured.
4. Where the frame says that a row has no interval (``no_interval``), a note says why. Nothing is marked beside such a row.
5. CSV and JSON give the long frame itself, in full precision, missing values as empty or null. In CSV, text that a spreadsheet
   would take for a formula has an apostrophe in front.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from evalkit.errors import UsageError
from evalkit.report.render import Cell, Column, Sheet, as_latex, as_markdown, as_text
from evalkit.store.sparsity import MEASURED_BY
from evalkit.util.registry import near_miss
from evalkit.util.terminal import shown

FORMATS: dict[str, Callable[[Sheet], str]] = {"text": as_text, "md": as_markdown, "latex": as_latex}
KEYS = ["hook_point", "config", "dictionary", "source"]
NOTHING = "-"
FORMULA = ("=", "+", "-", "@", "\t", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a cell of a spreadsheet begins with that is taken for a formula; the last four are the wide forms of the first."""


def number(value: float, digits: int) -> str:
    """``value`` with ``digits`` after the point; '-' where it is missing; no negative zero."""
    if value is None or math.isnan(value):
        return NOTHING
    text = f"{value:,.{digits}f}" if abs(value) < 1e7 else f"{value:.{max(digits, 2)}g}"
    return text[1:] if text.startswith("-") and not any(c in "123456789einf" for c in text) else text


def with_interval(mean: float, low: float, high: float, digits: int, beyond: str = "") -> str:
    """'0.41 [0.33, 0.49]', or the mean alone where there is no interval; '>' before what ``beyond`` names."""
    above = {name: ">" if name in beyond.split() else "" for name in ("mean", "low", "high")}
    shown = above["mean"] + number(mean, digits)
    if math.isnan(mean) or math.isnan(low) or math.isnan(high):
        return shown
    return f"{shown} [{above['low']}{number(low, digits)}, {above['high']}{number(high, digits)}]"


def raw(frame: pd.DataFrame, format: str) -> str:
    """``frame`` itself as 'csv' or 'json'."""
    if format == "csv":
        return frame.map(_no_formula).to_csv(index=False).rstrip("\n")
    records = []
    for row in frame.astype("object").to_dict("records"):
        missing = {key: value is None or (isinstance(value, float) and not math.isfinite(value)) for key, value in row.items()}
        records.append({key: None if missing[key] else value for key, value in row.items()})
    text = json.dumps(records, indent=1, ensure_ascii=False, default=lambda value: value.item())
    # the same text to whatever reads it as JSON, and nothing a terminal would act on
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _no_formula(value: Any) -> Any:
    """``value`` of a CSV cell; text that would be a formula, and is no number, with an apostrophe in front."""
    if not isinstance(value, str):
        return value
    value = shown(value)
    if not value.startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def few_groups(reasons: Iterable[str]) -> str:
    """A sentence about what has no interval, from the reasons in ``no_interval``; '' where nothing lacks one."""
    few = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
    return f"No interval where there are {few}; more documents, prompts or features give one." if few else ""


def render_frame(frame: pd.DataFrame, format: str, layout: Callable[[pd.DataFrame], Sheet]) -> str:
    """``frame`` itself as CSV or JSON, or ``layout`` of it as text, Markdown or LaTeX.

    Raises:
        UsageError: there is no format of that name.
    """
    if format in ("csv", "json"):
        return raw(frame, format)
    if format not in FORMATS:
        raise UsageError(f"there is no table format called '{format}'", fix=near_miss(format, [*FORMATS, "csv", "json"]))
    if frame.empty:
        return "nothing to show"
    return FORMATS[format](layout(frame))


def paper_table(frame: pd.DataFrame, format: str = "text") -> str:
    """The frame of ``Results.table`` as a table to read or to print.

    Args:
        frame: one evaluation's scores.
        format: 'text', 'md', 'latex', 'csv' or 'json'.

    Raises:
        UsageError: there is no such format.
    """
    return render_frame(frame, format, paper_sheet)


def comparison_table(frame: pd.DataFrame, format: str = "text") -> str:
    """The frame of ``Results.compare`` as a table: difference with interval, p corrected for the number of rows, verdict.

    Raises:
        UsageError: there is no format of that name.
    """
    return render_frame(frame, format, _comparison_sheet)


def _only(frame: pd.DataFrame, column: str) -> str:
    """The one value of ``column``, '' where there are several or none."""
    values = [value for value in dict.fromkeys(frame[column]) if isinstance(value, str) and value]
    return values[0] if len(values) == 1 else ""


def _words(row: Any, column: str) -> str:
    """Text of a column that the frame may lack."""
    value = row.get(column)
    return value if isinstance(value, str) else ""


def _value(row: Any) -> Cell:
    if row["n"] == 0 and row["units_failed"]:
        return Cell("unit failed")
    return Cell(with_interval(row["mean"], row["low"], row["high"], int(row["digits"]), _words(row, "beyond")), bool(row["best"]))


def _reference(row: Any) -> Cell:
    parts = []
    if not math.isnan(row["null_mean"]):
        counts = [f"n {row['null_n']}"] if row["null_n"] != row["n"] else []
        counts += [f"{row[f'null_{what}']} {what}" for what in ("failed", "undefined") if row[f"null_{what}"]]
        ends = (row["null_mean"], row["null_low"], row["null_high"])
        null = with_interval(*ends, int(row["digits"]), _words(row, "null_beyond"))
        parts.append(f"null {null}" + (f" ({', '.join(counts)})" if counts else ""))
    if not math.isnan(row["chance"]):
        parts.append(f"chance {row['chance']:g}")
    return Cell(", ".join(parts) or NOTHING)


def _counts(part: pd.DataFrame) -> tuple[tuple[int, int, int], ...]:
    return tuple(zip(part["n"], part["failed"], part["undefined"], strict=True))


def paper_sheet(frame: pd.DataFrame) -> Sheet:
    """The frame of ``Results.table``, which is not empty, as the sheet that every format of it shows."""
    notes = frame.attrs.get("notes", [])
    if "source" not in frame:
        frame = frame.assign(source="")
    visible = frame[~frame["metric"].isin(set(frame["null_metric"]) - {""})]
    rows = list(dict.fromkeys(visible[KEYS].itertuples(index=False, name=None)))
    parts = [_aligned(part, rows) for _, part in visible.groupby("metric", sort=False)]
    columns = _key_columns(rows)
    if not visible["metric"].eq("l0").any() and frame["l0"].notna().any():
        columns.append(Column("L0", [Cell(number(value, 1)) for value in parts[0]["l0"]], group=-1))
    for group, part in enumerate(parts):
        columns += _metric_columns(part, group)
        # metrics in a row with the same counts have them once, behind the last
        if group + 1 == len(parts) or _counts(parts[group + 1]) != _counts(part):
            columns += _count_columns(part, group)
    judge = ", ".join(name for name in dict.fromkeys(frame["judge"]) if isinstance(name, str))
    hook = _only(frame, "hook_point")
    title = [frame["evaluation"].iloc[0], f"at {hook}" if hook else "", f"judge {judge}" if judge else ""]
    title.append(f"run {frame['run'].iloc[0]}")
    return Sheet(", ".join(filter(None, title)), columns, [*notes, *_paper_notes(visible), *_unmeasured(visible)])


def _key_columns(rows: list[tuple[Any, ...]]) -> list[Column]:
    """The dictionary, and of the other keys those that differ between rows."""
    headings = {2: "dictionary", 0: "hook point", 1: "configuration", 3: "text"}
    differ = [place for place in headings if place == 2 or len({row[place] for row in rows}) > 1]
    return [Column(headings[place], [Cell(row[place] or NOTHING) for row in rows], number=False, group=-1) for place in differ]


def _metric_columns(part: pd.DataFrame, group: int) -> list[Column]:
    """A metric's means, and where there are any its references and its p."""
    rows = [row for _, row in part.iterrows()]
    columns = [Column(part["title"].iloc[0], [_value(row) for row in rows], group=group)]
    if part[["null_mean", "chance"]].notna().any(axis=None):
        columns.append(Column("reference", [_reference(row) for row in rows], group=group))
    if part["p"].notna().any():
        columns.append(Column("p", [Cell(number(value, 4)) for value in part["p"]], group=group))
    return columns


def _count_columns(part: pd.DataFrame, group: int) -> list[Column]:
    """How many scores are behind a metric's means, failed or are undefined."""
    if not ((part["n"] > 1).any() or part["failed"].any() or part["undefined"].any()):
        return []
    counts = ["n", "failed", *(["undefined"] if part["undefined"].any() else [])]
    return [Column(count, [Cell(str(n)) for n in part[count]], group=group) for count in counts]


def _aligned(part: pd.DataFrame, rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    """Rows of one metric in the order of ``rows``, which all have it: ``score_table`` leaves none out."""
    return part.set_index(pd.MultiIndex.from_frame(part[KEYS])).loc[rows].set_index(pd.Index(range(len(rows))))


def _paper_notes(frame: pd.DataFrame) -> list[str]:
    notes = [few_groups(frame["no_interval"])]
    if frame["low"].notna().any():
        notes.append("[low, high]: 95% interval. n: scores behind the mean; failed ones are in no mean.")
    if any(_words(row, key) for key in ("beyond", "null_beyond") for _, row in frame.iterrows()):
        notes.append(">: not reached within what was measured, up to the number given.")
    if frame["null_mean"].notna().any():
        named = frame[frame["null_metric"] != ""].drop_duplicates("metric")
        listed = ", ".join(f"{row.null_metric} (of {row.title})" for row in named.itertuples())
        notes.append(f"null: the same measure where nothing can be known: {listed}.")
    if frame["p"].notna().any():
        tested = ", ".join(dict.fromkeys(frame[frame["p"].notna()]["title"]))
        notes.append(f"p: of a mean at the chance level, by sign flips, not corrected for the number of rows: {tested}.")
    if (frame["clusters"] < frame["n"]).any():
        part = frame[frame["clusters"] < frame["n"]].drop_duplicates("metric")
        counted = ", ".join(f"{row.title} {row.clusters}" for row in part.itertuples())
        notes.append(f"Scores that are not independent are resampled together; independent groups: {counted}.")
    if frame["seed_sd"].notna().any():
        notes.append(_between_seeds(frame))
    if frame["units_failed"].any():
        failed = frame[frame["units_failed"] > 0]["dictionary"]
        notes.append(f"Units failed for: {', '.join(dict.fromkeys(failed))} (evalkit show failures).")
    for flag, part in frame[frame["flag"] != ""].groupby("flag", sort=False):
        notes.append(f"{', '.join(dict.fromkeys(part['dictionary']))}: {flag}.")
    described = frame[frame["note"] != ""].drop_duplicates("metric")
    return [*filter(None, notes), *(f"{row.title}: {row.note}" for row in described.itertuples())]


def _between_seeds(frame: pd.DataFrame) -> str:
    """The spread of the metrics with a better direction over seeds of one recipe."""
    part = frame[frame["seed_sd"].notna() & (frame["better"] != "neither")]
    part = part.drop_duplicates(["dictionary", "hook_point", "metric"])
    listed = []
    for (name, hook), rows in part.groupby(["dictionary", "hook_point"], sort=False):
        where = f" at {hook}" if part["hook_point"].nunique() > 1 else ""
        facts = zip(rows["title"], rows["seed_sd"], rows["digits"], strict=True)
        spreads = ", ".join(f"{title} {number(float(sd), int(digits))}" for title, sd, digits in facts)
        listed.append(f"{name}{where}: {spreads}")
    return f"Standard deviation between seeds, the noise floor of a single one. {'; '.join(listed)}."


def _unmeasured(frame: pd.DataFrame) -> list[str]:
    """Which dictionaries have no L0, so that nothing is marked beside them, where something could be."""
    could = frame[(frame["better"] != "neither") & frame["low"].notna()]
    missing = list(dict.fromkeys(could[could["l0"].isna()]["dictionary"]))
    if could["dictionary"].nunique() < 2 or not missing:
        return []
    return [f"L0 not measured, so that nothing is marked as best: {', '.join(missing)} ({' and '.join(MEASURED_BY)} measure it)."]


def _comparison_sheet(frame: pd.DataFrame) -> Sheet:
    a, b = _only(frame, "a"), _only(frame, "b")
    texts = {"evaluation": "evaluation", "hook_point": "hook point", "config": "configuration"}
    columns = [Column("metric", [Cell(title) for title in frame["title"]], number=False, group=-1)]
    for column, heading in texts.items():
        if frame[column].nunique() > 1:
            columns.append(Column(heading, [Cell(text or NOTHING) for text in frame[column]], number=False, group=-1))
    if not (a and b):
        sides = [Cell(f"{one} - {two}") for one, two in zip(frame["a"], frame["b"], strict=True)]
        columns.append(Column("a - b", sides, number=False, group=-1))
    for heading, side in ((f"L0 {a}" if a else "L0 a", "l0_a"), (f"L0 {b}" if b else "L0 b", "l0_b")):
        if frame[side].notna().any():
            columns.append(Column(heading, [Cell(number(value, 1)) for value in frame[side]], group=-1))
    rows: list[Any] = list(frame.itertuples())
    winner, counted = {"a": a or "a", "b": b or "b"}, int(frame["p_holm"].notna().sum())
    columns += [
        Column(a or "a", [Cell(number(row.mean_a, row.digits)) for row in rows]),
        Column(b or "b", [Cell(number(row.mean_b, row.digits)) for row in rows]),
        Column("difference", [Cell(with_interval(row.difference, row.low, row.high, row.digits)) for row in rows]),
        Column("p", [Cell(number(row.p, 4)) for row in rows]),
        Column("p (Holm)", [Cell(number(row.p_holm, 4)) for row in rows]),
        Column("detectable", [Cell(number(row.detectable, row.digits)) for row in rows]),
        Column("n", [Cell(str(row.n_a) if row.paired else f"{row.n_a}, {row.n_b}") for row in rows]),
        Column("items", [Cell("paired" if row.paired else "independent") for row in rows], number=False),
        Column("better", [Cell(winner.get(row.better, row.better)) for row in rows], number=False),
    ]
    notes = [
        "difference: first minus second, with its 95% interval; p: two-sided, by permutation.",
        f"p (Holm): corrected for {counted} comparison{'' if counted == 1 else 's'}, the main metrics of dictionaries within "
        "20 % in L0; a side is named better where it is below 0.05. Other rows have no verdict.",
        "detectable: the smallest true difference that this run would have shown with probability 0.8, at p < 0.05 uncorrected.",
    ]
    notes += [few] if (few := few_groups(frame["no_interval"])) else []
    notes += [f"{title}: {note}" for title, note in dict.fromkeys(zip(frame["title"], frame["note"], strict=True)) if note]
    shared = [_only(frame, "evaluation"), f"at {_only(frame, 'hook_point')}" if _only(frame, "hook_point") else ""]
    title = ", ".join([f"{a} - {b}" if a and b else "differences", *(text for text in shared if text)])
    return Sheet(title, columns, notes)
