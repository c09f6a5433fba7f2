"""A results folder whose run has everything a page shows, with texts that break pages that trust them.

Feature 3 of the dictionary at the later hook point tells one story from all sides, feature 5 does not, feature 21 of the earlier
hook point is a parent of 3 and has inputs only. Feature 3 is explained, steered, and tells a concept; one unit failed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evalkit.store.journal import Journal
from evalkit.store.writer import rebuild

RUN = "cases-1"
LATE, EARLY = "blocks.4.hook_resid_post", "blocks.2.hook_resid_post"
SAE = 'SAE <b>"k=1" & more</b>'
AGREES, DIFFERS, PARENT = 3, 5, 21
ANCHOR = "sae-b-k-1-more-b-blocks.4.hook_resid_post-3"
PARENT_ANCHOR = "sae-b-k-1-more-b-blocks.2.hook_resid_post-21"
EVIL = "<script>alert('x')</script>"
TOKENS = [
    "'",
    "&amp;",
    EVIL,
    "\x00\x1b[31m",
    "\ufffd",
    "\u202eabc",
    " \u05e9\u05dc\u05d5\u05dd",
    "\n\t",
    '"><img src=x onerror=alert(1)>',
    "",
]
"""What a tokenizer may hold: quotes, markup, control characters, a broken letter, text from right to left, nothing."""
EXPLANATION = "closes </details></svg><style>*{display:none}</style> & 'quotes' \u0007"
CONCEPT = "names <of>"
WORDS = ["Dave", "</mark>"]
REPLIES = {
    ("none", None, None): "I met </td></table> Dave\n\nand \x0b left",
    ("feature", "clamp", 2.0): f"Dave Dave </mark> {EVIL}",
    ("random_feature", "clamp", 2.0): "no one",
    ("feature", "steer", 2.0): f"Dave Dave </mark> {EVIL}",
    ("random_feature", "steer", 2.0): "somebody",
    ("random_direction", "steer", 2.0): "",
}
"""By arm, mode and strength; steering the feature writes what clamping it did."""


def write_case(folder: Path) -> Path:
    """The results file of the run described above."""
    journal = Journal(folder / "runs" / RUN)
    suite = f'[suite]\nname = "cases"\n[model]\nname = "tiny"\n# {EVIL}\n'
    state = {
        "suite": "cases",
        "evalkit_version": "0.1.0",
        "packages": '{"torch": "2"}',
        "machine": '{"cores": 2}',
        "suite_toml": suite,
    }
    journal.write_rows("runs", [{**state, "status": "started", "at": "2026-03-01T12:00:00"}])
    for hook in (LATE, EARLY):
        shape = {"kind": "topk", "model": "tiny", "d_in": 4, "n_features": 32, "details": "{}", "hook_point": hook}
        journal.write_rows("dictionaries", [{**shape, "dictionary_id": f"id-{hook}"}])
    journal.write_rows("metrics", _metrics())
    inputs = _scores({AGREES: (0.9, 0.1, 0.01), DIFFERS: (0.8, 0.1, 0.02)}, ["monosemantic", "monosemantic_random", "density"])
    bins = [row for feature in (AGREES, DIFFERS) for row in _bins(feature)]
    journal.write_unit(_unit("inputs"), inputs, {"input_bins": bins})
    early = _scores({PARENT: (0.5, 0.1, 0.03)}, ["monosemantic", "monosemantic_random", "density"])
    journal.write_unit(_unit("inputs", EARLY), early, {"input_bins": list(_bins(PARENT))})
    metrics = ["repeated", "repeated_random", "kl", "kl_random", "next_change", "concentration", "direct_r"]
    rows = _scores({AGREES: (0.7, 0.4, 0.2, 0.1, -0.5, 0.6, 0.6), DIFFERS: (0.7, 0.4, 0.05, 0.1, -0.5, 0.6, None)}, metrics)
    tables = {"logit_effects": [], "ablation_contexts": []}
    for feature in (AGREES, DIFFERS):
        tables["logit_effects"] += _effects(feature)
        tables["ablation_contexts"] += _contexts(feature)
    journal.write_unit(_unit("ablation"), rows, tables)
    rows = _scores({AGREES: (1.0, 0.6, 0.1, 0.2)}, ["parents", "parent_share", "parent_share_random", "parent_carried"])
    journal.write_unit(_unit("causal_tree"), rows, _tree())
    explained = {"feature": AGREES, "judge": "j", "explanation": EXPLANATION, "status": "ok", "density": 0.1, "top_tokens": "[]"}
    fragment = {
        "feature": AGREES, "judge": "j", "explained_by": "own", "part": "top", "fragment": 0, "document": 5,
        "tokens": ["to", EVIL], "actual": [1.0, 7.25], "predicted": None, "digit_mass": None, "status": "ok",
    }  # fmt: skip
    tables = {"explanations": [explained], "predictions": [fragment]}
    journal.write_unit(_unit("autointerp", judge="j"), _scores({AGREES: (0.4,), DIFFERS: (None,)}, ["top_and_random"]), tables)
    journal.write_unit(_unit("steering"), _scores({AGREES: (1.0,)}, ["shift_clamp"]), {"steering_texts": _texts()})
    auroc = [{**row, "kind": "concept"} for row in _scores({0: (0.9,)}, ["auroc"])]
    journal.write_unit(_unit("concepts"), auroc, _concepts())
    journal.write_rows("units", [{**_unit("geometry"), "status": "failed", "error": f"out of memory {EVIL}"}])
    journal.write_rows("runs", [{**state, "status": "partial", "at": "2026-03-01T12:30:00"}])
    rebuild(folder, folder / "evalkit.duckdb")
    return folder / "evalkit.duckdb"


def _unit(evaluation: str, hook: str = LATE, judge: str | None = None) -> dict[str, Any]:
    return {
        "unit_key": f"{evaluation}-{hook}", "evaluation": evaluation, "evaluation_version": 1, "dictionary": SAE,
        "dictionary_id": f"id-{hook}", "hook_point": hook, "seed": 0, "judge": judge, "config": "{}", "status": "done",
        "error": None, "seconds": 1.0, "at": "2026-03-01T12:00:01",
    }  # fmt: skip


def _metrics() -> list[dict[str, Any]]:
    named = [
        ("inputs", "monosemantic", "monosemantic_random"),
        ("ablation", "kl", "kl_random"),
        ("autointerp", "top_and_random", ""),
    ]
    usual = {
        "evaluation_version": 1, "better": "higher", "chance": None, "transform": "", "has_interval": True, "digits": 3,
        "main": True, "note": f"a note {EVIL}",
    }  # fmt: skip
    return [
        {**usual, "evaluation": evaluation, "metric": metric, "title": f"{metric} & co", "null_metric": null, "position": place}
        for place, (evaluation, metric, null) in enumerate(named)
    ]


def _scores(values: dict[int, tuple[float | None, ...]], metrics: list[str]) -> list[dict[str, Any]]:
    usual = {"kind": "feature", "weight": 1.0, "cluster": None, "n": 4, "seed": 0}
    return [
        {**usual, "metric": metric, "item": feature, "value": value, "status": "failed" if value is None else "ok"}
        for feature, row in values.items()
        for metric, value in zip(metrics, row, strict=True)
    ]


def _bins(feature: int) -> list[dict[str, Any]]:
    usual = {"feature": feature, "sign": 1, "main_class": "'", "top_class": "'", "top_share": 1.0}
    rows: list[dict[str, Any]] = []
    for of, neuron in (("feature", None), ("neuron", 7)):
        for number in range(10):
            context = {
                "window": number,
                "position": 5,
                "value": number + 0.5,
                "tokens": [" up", TOKENS[number], " <i>end"],
                "at": 1,
            }
            rows.append({
                **usual, "of": of, "neuron": neuron, "scale": "range", "bin": number, "low": float(number), "high": number + 1.0,
                "contexts": [context], "n": 1000 - 100 * number, "tokens": [["'", 0.75], [TOKENS[number], 0.25]],
                "main_share": 0.75,
            })  # fmt: skip
        top = {"window": 2, "position": 5, "value": 9.5, "tokens": TOKENS, "at": 2}
        rows.append({
            **usual, "of": of, "neuron": neuron, "scale": "top", "bin": 0, "low": 9.5, "high": 9.5, "n": 1,
            "tokens": [["'", 1.0]], "main_share": 1.0, "contexts": [top],
        })  # fmt: skip
    return rows


def _effects(feature: int) -> list[dict[str, Any]]:
    rows = []
    for edit in ("ablate", "add"):
        for by in ("mass", "direct"):
            for place, token in enumerate(TOKENS, start=1):
                side = "lowered" if place % 2 else "raised"
                change = (-0.5 if side == "lowered" else 0.25) * place
                rows.append({
                    "feature": feature, "edit": edit, "ranked_by": by, "side": side, "place": place, "token_id": place,
                    "token": token, "change": change, "low": change - 0.125, "high": change + 0.125, "mass": change / 10,
                    "direct": change / 2, "probability": 0.5, "contexts": 8,
                })  # fmt: skip
    return rows


def _contexts(feature: int) -> list[dict[str, Any]]:
    usual = {"feature": feature, "edit": "ablate", "position": 5, "code": 3.0, "edited": 1, "kl": 0.2}
    ends = {"tokens": [EVIL, "'"], "next_token": TOKENS[3], "lowered": TOKENS[8], "lowered_change": -1.0}
    return [
        {**usual, **ends, "window": window, "next_change": change} for window, change in enumerate([-0.5, -0.6, -0.4, -0.5] * 2)
    ]


def _tree() -> dict[str, list[dict[str, Any]]]:
    ends = {"target": AGREES, "depth": 1, "child_hook": LATE, "child": AGREES, "parent_hook": EARLY}
    counts = {
        "place": 1,
        "significant": True,
        "checked": False,
        "active": 4,
        "contexts": 4,
        "estimate": 0.6,
        "p": 0.001,
        "p_holm": 0.01,
    }
    shares = [(PARENT, 0.6, 0.2), (22, 0.3, 0.1), (23, 0.2, 0.1), (24, 0.1, 0.0)]
    edges = [
        {
            **ends,
            **counts,
            "parent": parent,
            "share": share,
            "low": share - 0.1,
            "high": share + 0.1,
            "carried": carried,
            "place": place,
        }
        for place, (parent, share, carried) in enumerate(shares, start=1)
    ]
    usual = {
        "maximum": 3.0, "activation": 2.0, "contexts": 4, "candidates": 9, "tested": 4, "checked": 2, "missed": 0, "parents": 1,
        "together": 0.6, "random": 0.1, "estimate_r": 0.9,
    }  # fmt: skip
    tokens = json.dumps([[EVIL, 0.5], [TOKENS[3], 0.3], [" word", 0.2]])
    nodes = [
        {**usual, "hook_point": hook, "feature": feature, "tokens": tokens}
        for hook, feature in ((LATE, AGREES), *((EARLY, share[0]) for share in shares))
    ]
    return {"causal_edges": edges, "causal_nodes": nodes}


def _concepts() -> dict[str, list[dict[str, Any]]]:
    usual = {
        "concept": CONCEPT, "place": 1, "sign": 1, "auroc_chosen": 0.9, "auroc": 0.9, "p": 0.001, "p_holm": 0.01, "recall": 0.75,
        "level_texts": [1, 1, 1], "level_precision": [1.0, 1.0, 1.0], "texts": 24,
    }  # fmt: skip
    sources = [("feature", AGREES), ("neuron", 7), ("probe", None), ("null", 9)]
    text = {"concept": CONCEPT, "feature": AGREES, "sign": 1, "held_out": True, "rating": None}
    texts = [(True, "Dave", 4.0), (False, EVIL, 6.5), (True, "unseen", 1.0)]
    return {
        "concept_features": [{**usual, "source": source, "feature": feature} for source, feature in sources],
        "concept_texts": [
            {**text, "label": label, "text": said, "value": value, "held_out": said != "unseen"} for label, said, value in texts
        ],
    }


def _texts() -> list[dict[str, Any]]:
    usual = {
        "feature": AGREES, "draw": 0, "named": True, "named_judge": None, "nll": 1.0, "cost": 0.5, "distinct_tokens": 0.75,
        "shift": 1.5, "kl": 0.1, "edit": 1.0, "raised": [], "lowered": [], "words": WORDS, "maximum": 9.5, "concept": None,
    }  # fmt: skip
    config = [(arm, mode, strength, text) for (arm, mode, strength), text in REPLIES.items()]
    return [
        {**usual, "prompt": prompt, "arm": arm, "mode": mode, "strength": strength, "text": text}
        for prompt in ("It is <up> to", "She said")
        for arm, mode, strength, text in config
    ]
