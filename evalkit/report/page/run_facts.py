"""What a run was: the head of its page.

1. Suite, state, times, versions and machine come from the run's latest state; units done and failed from its units.
2. The model is what the suite names and what the dictionaries say they read; each dictionary stands once for a hook point.
3. What is missing is counted by kind: units, explanations, scores and judge calls that failed, with their errors, explanations
   that were cut off, and scores that are undefined. Nothing is left out because it is small.

Everything is in a stated order, so that one results file gives one page.
"""

from __future__ import annotations

import json
import tomllib
from typing import Any, NamedTuple

import pandas as pd

from evalkit.activations.facts import SIDES, disagreements, norm_notes, short_notes
from evalkit.dictionaries.provenance import named_remarks
from evalkit.report.render import Cell, Column, Sheet
from evalkit.report.tables import NOTHING, number
from evalkit.store.reader import Results

MISSING = """
SELECT 'unit failed' AS what, evaluation, dictionary, hook_point, '' AS detail, 1 AS n, error
FROM run_units WHERE run_id = $run AND status = 'failed'
UNION ALL
SELECT 'explanation failed', u.evaluation, u.dictionary, u.hook_point, '', count(*), e.error
FROM run_units u JOIN explanations e ON e.unit_key = u.unit_key
WHERE u.run_id = $run AND u.status = 'done' AND e.status = 'failed'
GROUP BY u.evaluation, u.dictionary, u.hook_point, e.error
UNION ALL
SELECT 'explanation cut, scored', u.evaluation, u.dictionary, u.hook_point, '', count(*), e.error
FROM run_units u JOIN explanations e ON e.unit_key = u.unit_key
WHERE u.run_id = $run AND u.status = 'done' AND e.status = 'ok' AND e.error <> ''
GROUP BY u.evaluation, u.dictionary, u.hook_point, e.error
UNION ALL
SELECT 'score ' || s.status, u.evaluation, u.dictionary, u.hook_point, s.metric, count(*), NULL
FROM run_units u JOIN scores s ON s.unit_key = u.unit_key
WHERE u.run_id = $run AND u.status = 'done' AND s.status <> 'ok'
GROUP BY s.status, u.evaluation, u.dictionary, u.hook_point, s.metric
UNION ALL
SELECT 'judge call failed', NULL, NULL, NULL, purpose, count(*), error
FROM judge_calls WHERE run_id = $run AND status = 'failed' GROUP BY purpose, error
"""
TEXTS = """
SELECT DISTINCT side, hook_point, bos, context, asked, tokens, documents, too_short, kept, left_bos, left_first, left_massive,
       norm_limit, norm_median, massive_variance, high_variance
FROM texts WHERE run_id = $run ORDER BY hook_point, side, context
"""
LEFT_OUT = """
SELECT judge, purpose, left_out, count(*) AS calls
FROM judge_calls WHERE run_id = $run AND left_out IS NOT NULL GROUP BY ALL ORDER BY ALL
"""
ORDER = ["what", "evaluation", "dictionary", "hook_point", "detail", "error"]


class Fact(NamedTuple):
    """One line of a list of facts."""

    term: str
    text: str


class RunFacts(NamedTuple):
    """The head of a page."""

    run: str
    suite: str
    evaluations: list[str]
    """Also those whose every unit failed."""
    facts: list[Fact]
    done: int
    failed: int
    missing: Sheet | None
    """What failed and what is undefined; None where nothing is."""
    dictionaries: Sheet | None
    texts: Sheet | None
    """What text was read, and what of it was left out."""
    costs: Sheet | None
    suite_text: str


def run_facts(store: Results, run: str) -> RunFacts:
    """The facts of one run.

    Args:
        run: run_id, as ``Results.run_id`` gives it.
    """
    state = store.own("SELECT * FROM run_states WHERE run_id = $run", {"run": run}).iloc[0]
    units = store.own("SELECT * FROM run_units WHERE run_id = $run ORDER BY unit_order", {"run": run})
    done, failed = (int((units["status"] == status).sum()) for status in ("done", "failed"))
    known = store.dictionaries().set_index("dictionary_id")
    used = units.drop_duplicates(["dictionary", "hook_point", "dictionary_id"])
    models = dict.fromkeys(str(known["model"][i]) for i in used["dictionary_id"] if i in known.index)
    suite_text = state["suite_toml"] if isinstance(state["suite_toml"], str) else ""
    facts = [
        Fact("suite", _text(state["suite"])),
        Fact("run", run),
        Fact("state", f"{_text(state['status'])}; {done} units done, {failed} failed"),
        Fact("model", _model(suite_text, list(models))),
        Fact("when", f"{_moment(state['first_at'])} to {_moment(state['last_at'])} UTC"),
        Fact("evalkit", _text(state["evalkit_version"])),
        Fact("packages", _pairs(state["packages"])),
        Fact("machine", _pairs(state["machine"])),
    ]
    return RunFacts(
        run,
        _text(state["suite"]),
        list(dict.fromkeys(units["evaluation"])),
        [fact for fact in facts if fact.text],
        done,
        failed,
        _missing(store, run),
        _dictionaries(store, run, used, known),
        _texts(store, run),
        _costs(store, run),
        suite_text,
    )


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str) else NOTHING


def _moment(value: Any) -> str:
    return NOTHING if pd.isna(value) else pd.Timestamp(value).strftime("%Y-%m-%d %H:%M:%S")


def _pairs(text: Any) -> str:
    """A JSON object as one line, '' where there is none."""
    found = json.loads(text) if isinstance(text, str) else {}
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)


def _model(suite_text: str, models: list[str]) -> str:
    """What the suite calls the model, and in brackets what the dictionaries were fitted to."""
    try:
        named = tomllib.loads(suite_text).get("model", {})
    except tomllib.TOMLDecodeError:
        named = {}
    name = next((str(named[key]) for key in ("name", "package", "path") if key in named), "")
    revision = f" at revision {named['revision']}" if named.get("revision") else ""
    inner = ", ".join(model for model in models if model != name)
    return f"{name}{revision} ({inner})" if name and inner else name + revision or inner


def _missing(store: Results, run: str) -> Sheet | None:
    frame = store.own(MISSING, {"run": run})
    if frame.empty:
        return None
    frame = frame.astype({column: "object" for column in ORDER}).fillna({column: "" for column in ORDER})
    frame = frame.sort_values(ORDER, kind="stable")
    frame["of"] = [f"{detail} {n}" if detail else "" for detail, n in zip(frame["detail"], frame["n"], strict=True)]
    same = ["what", "evaluation", "dictionary", "hook_point", "error"]
    frame = frame.groupby(same, sort=False, as_index=False).agg({"of": _joined, "n": "sum"})
    columns = [Column("what", [Cell(text) for text in frame["what"]], number=False, group=-1)]
    for column, heading in (("evaluation", "evaluation"), ("dictionary", "dictionary"), ("hook_point", "hook point")):
        columns.append(Column(heading, [Cell(text or NOTHING) for text in frame[column]], number=False))
    columns.append(Column("of", [Cell(text or NOTHING) for text in frame["of"]], number=False))
    columns.append(Column("n", [Cell(str(int(n))) for n in frame["n"]]))
    columns.append(Column("error", [Cell(text or NOTHING) for text in frame["error"]], number=False))
    notes = [
        "Failed and undefined values are in no mean. Undefined: the measure has no value there, as a correlation with a constant."
    ]
    return Sheet("failed and undefined, by what it is about", columns, notes)


def _joined(part: Any) -> str:
    return ", ".join(filter(None, part))


def _dictionaries(store: Results, run: str, used: pd.DataFrame, known: pd.DataFrame) -> Sheet | None:
    if used.empty:
        return None
    about = known.reindex(used["dictionary_id"])

    def texts(column: str) -> list[Cell]:
        return [Cell(NOTHING if pd.isna(value) else str(value)) for value in about[column]]

    sizes = [Cell(NOTHING if pd.isna(value) else f"{int(value):,}") for value in about["n_features"]]
    columns = [
        Column("dictionary", [Cell(str(name)) for name in used["dictionary"]], number=False, group=-1),
        Column("hook point", [Cell(str(name)) for name in used["hook_point"]], number=False),
        Column("kind", texts("kind"), number=False),
        Column("features", sizes),
        Column("dimensions", texts("d_in")),
        Column("identity", [Cell(str(name)[:12]) for name in used["dictionary_id"]], number=False),
    ]
    remarks = named_remarks(zip(used["dictionary"], about["details"], strict=True))
    unlike = disagreements(store.own("SELECT * FROM dictionary_texts WHERE run_id = $run ORDER BY unit_order", {"run": run}))
    notes = ["identity: the beginning of a hash of the dictionary's function.", *remarks, *unlike]
    return Sheet("dictionaries", columns, notes)


def _texts(store: Results, run: str) -> Sheet | None:
    frame = store.own(TEXTS, {"run": run})
    if frame.empty:
        return None
    columns = [
        Column("text", [Cell(SIDES.get(side, side)) for side in frame["side"]], number=False, group=-1),
        Column("hook point", [Cell(str(name)) for name in frame["hook_point"]], number=False, group=-1),
        Column("begins with", [Cell(str(token) or NOTHING) for token in frame["bos"]], number=False),
    ]
    columns += [
        Column(heading, [Cell(NOTHING if pd.isna(value) else f"{int(value):,}") for value in frame[column]])
        for column, heading in (
            ("asked", "tokens asked for"), ("tokens", "tokens"), ("documents", "documents"), ("too_short", "too short"),
            ("kept", "kept"), ("left_bos", "BOS"), ("left_first", "first"), ("left_massive", "massive"),
        )
    ]  # fmt: skip
    notes = [
        "too short: documents that hold no window. kept: positions that are fitted or scored on; the others are left out as BOS, "
        "as first positions of a window, or as massive activations."
    ]
    return Sheet("text", columns, [*notes, *short_notes(frame), *norm_notes(frame)])


def _costs(store: Results, run: str) -> Sheet | None:
    frame = store.costs()
    frame = frame[frame["run_id"] == run]
    if frame.empty:
        return None
    columns = [
        Column("judge", [Cell(_text(name)) for name in frame["judge"]], number=False, group=-1),
        Column("purpose", [Cell(_text(name)) for name in frame["purpose"]], number=False, group=-1),
    ]
    for column, heading in (
        ("calls", "calls"),
        ("failed", "failed"),
        ("prompt_tokens", "prompt tokens"),
        ("completion_tokens", "written tokens"),
    ):
        columns.append(Column(heading, [Cell(NOTHING if pd.isna(value) else f"{int(value):,}") for value in frame[column]]))
    columns.append(Column("dollars", [Cell(number(float(value), 4)) for value in frame["dollars"]]))
    notes = [
        f"{row.calls} calls of {row.judge} ({row.purpose}) were made without settings that its endpoint refuses: {row.left_out}."
        for row in store.own(LEFT_OUT, {"run": run}).itertuples()
    ]
    return Sheet("judge calls", columns, notes)
