"""A small results folder whose every number can be worked out by hand.

One run, two dictionaries at one hook point. ``reconstruction`` has windows (the same four for both; one of pca's failed)
in three documents; ``autointerp`` has features (of its own for each dictionary), with failures, an undefined one and a
null on the same features; a third dictionary's autointerp unit failed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evalkit.store.journal import Journal

HOOK = "blocks.3.hook_resid_post"
RUN = "paper-0a1b2c3d"
SUITE = '[suite]\nname = "paper"\n[model]\nname = "tiny"\n[corpus]\nscore = "held-out"\n'

TOPK_FVU = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}
PCA_FVU = {0: 0.3, 1: 0.4, 2: 0.5, 3: None}
WEIGHT = {0: 1.0, 1: 1.0, 2: 2.0, 3: 4.0}
DOCUMENT = {0: 0, 1: 0, 2: 1, 3: 2}
TOPK_SCORE = [0.5, 0.7, 0.3, 0.5]
PCA_SCORE = [0.149, 0.151]

METRICS: list[dict[str, Any]] = [
    {"evaluation": "reconstruction", "evaluation_version": 1, "metric": "fvu", "position": 0, "title": "FVU", "better": "lower",
     "has_interval": True, "digits": 4, "main": True, "null_metric": "", "transform": "", "note": "1 - variance explained"},
    {"evaluation": "reconstruction", "evaluation_version": 1, "metric": "perplexity", "position": 1, "title": "perplexity",
     "better": "lower", "has_interval": True, "digits": 2, "main": False, "null_metric": "", "transform": "exp", "note": ""},
    {"evaluation": "reconstruction", "evaluation_version": 1, "metric": "dead", "position": 2, "title": "dead", "better": "lower",
     "has_interval": False, "digits": 0, "main": False, "null_metric": "", "transform": "", "note": ""},
    {"evaluation": "autointerp", "evaluation_version": 2, "metric": "score", "position": 0, "title": "score", "better": "higher",
     "chance": 0.0, "has_interval": True, "digits": 2, "main": True, "null_metric": "shuffled", "transform": "",
     "note": "correlation of simulated and true activations"},
    {"evaluation": "autointerp", "evaluation_version": 2, "metric": "shuffled", "position": 1, "title": "shuffled",
     "better": "neither", "has_interval": True, "digits": 2, "main": False, "null_metric": "", "transform": "", "note": ""},
]  # fmt: skip


def score(metric: str, item: int, value: float | None, kind: str, **more: Any) -> dict[str, Any]:
    """One row of ``scores``."""
    row = {"metric": metric, "item": item, "value": value, "kind": kind, "weight": 1.0, "cluster": None, "n": 8, "seed": 0}
    return {**row, "status": "failed" if value is None else "ok", **more}


def unit(key: str, evaluation: str, dictionary: str, **more: Any) -> dict[str, Any]:
    """One row of ``units``."""
    row = {
        "unit_key": key, "evaluation": evaluation, "evaluation_version": 2 if evaluation == "autointerp" else 1,
        "dictionary": dictionary, "dictionary_id": f"id-{dictionary}", "hook_point": HOOK, "seed": 0,
        "judge": "tiny-judge" if evaluation == "autointerp" else None, "config": '{"features": 4}', "status": "done",
        "error": None, "seconds": 1.5, "at": "2026-03-01T12:00:01",
    }  # fmt: skip
    return {**row, **more}


def windows(values: dict[int, float | None]) -> list[dict[str, Any]]:
    """FVU, log perplexity (ten times as large) and one count of a dictionary."""
    rows = [score("fvu", i, v, "window", weight=WEIGHT[i], cluster=DOCUMENT[i]) for i, v in values.items()]
    rows += [score("perplexity", i, None if v is None else 10 * v, "window", weight=WEIGHT[i]) for i, v in values.items()]
    return [*rows, score("dead", 0, 3.0, "dictionary")]


def measured_l0(journal: Journal, **l0: float) -> None:
    """L0 of dictionaries, in an evaluation that has nothing else; in the run of ``journal``."""
    for name, value in l0.items():
        journal.write_unit(unit(f"l0-{name}", "sparsity", name), [score("l0", 0, value, "dictionary")])


def features(first: int, values: list[float]) -> list[dict[str, Any]]:
    """Scores of features with their nulls, a failed and an undefined one."""
    rows = [score("score", first + i, v, "feature") for i, v in enumerate(values)]
    rows += [score("shuffled", first + i, v - 0.5, "feature") for i, v in enumerate(values)]
    return [*rows, score("score", 90, None, "feature"), score("score", 91, None, "feature", status="undefined")]


PREDICTIONS = [
    {"feature": 3, "judge": "tiny-judge", "explained_by": "own", "part": "top", "fragment": 0, "document": 5,
     "tokens": [' "a', "\n", "é"], "actual": [0.0, 1.5, 2.0], "predicted": None, "digit_mass": None, "status": "failed"},
    {"feature": 3, "judge": "tiny-judge", "explained_by": "own", "part": "top", "fragment": 1, "document": 6,
     "tokens": [], "actual": [], "predicted": [], "digit_mass": None, "status": "ok"},
]  # fmt: skip


def write_run(folder: Path, run_id: str = RUN, *, day: int = 1, suite: str = SUITE, shift: float = 0.0) -> Journal:
    """The run described above, under ``folder / "runs"``; ``shift`` is added to every FVU."""
    journal = Journal(folder / "runs" / run_id)
    state = {"suite": "paper", "evalkit_version": "0.1.0", "packages": "{}", "machine": "{}", "suite_toml": suite}
    at = f"2026-03-{day:02d}T12:00"
    journal.write_rows("runs", [{**state, "status": "started", "at": f"{at}:00"}])
    journal.write_rows("metrics", METRICS)
    for name, kind in (("topk", "topk"), ("pca", "pca")):
        shape = {"kind": kind, "hook_point": HOOK, "model": "tiny", "d_in": 4, "n_features": 8, "details": "{}"}
        journal.write_rows("dictionaries", [{**shape, "dictionary_id": f"id-{name}"}])
    for name, values in (("topk", TOPK_FVU), ("pca", PCA_FVU)):
        moved = {i: None if v is None else v + shift for i, v in values.items()}
        journal.write_unit(unit(f"{run_id}-r-{name}", "reconstruction", name, at=f"{at}:01"), windows(moved))
    explanations = [
        {"feature": 3, "judge": "tiny-judge", "explanation": "colours", "status": "ok", "density": 0.1, "top_tokens": '["red"]'},
        {"feature": 4, "judge": "tiny-judge", "explanation": None, "status": "failed", "error": "time-out"},
    ]
    tables = {"explanations": explanations, "predictions": PREDICTIONS}
    journal.write_unit(unit(f"{run_id}-a-topk", "autointerp", "topk", at=f"{at}:02"), features(0, TOPK_SCORE), tables)
    journal.write_unit(unit(f"{run_id}-a-pca", "autointerp", "pca", at=f"{at}:03"), features(0, PCA_SCORE))
    lost = unit(f"{run_id}-a-ica", "autointerp", "ica", status="failed", error="the judge went away", at=f"{at}:04")
    journal.write_rows("units", [lost])
    call = {"judge": "tiny-judge", "prompt_tokens": 100, "completion_tokens": 10, "dollars": 0.25, "seconds": 2.0, "attempts": 1}
    calls = [{**call, "call_key": str(i), "purpose": "explain", "status": "ok", "error": None} for i in range(3)]
    calls.append({**call, "call_key": "3", "purpose": "simulate", "status": "failed", "error": "time-out", "at": f"{at}:05"})
    journal.write_rows("judge_calls", calls)
    journal.write_rows("runs", [{**state, "status": "partial", "at": f"{at}:59"}])
    return journal
