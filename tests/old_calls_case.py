"""Questions of every kind, and the files ``fixtures/calls/`` that an evalkit with the store ``calls.jsonl`` wrote of them.

``calls.jsonl`` holds the calls as they were stored; ``answers.json`` what the judges answered then. They are never made again:
what they show is that keys and answers of calls stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalkit.judges.base import Example, ExplainTask, Judge, RateTask, SimulateTask

FOLDER = Path(__file__).parent / "fixtures" / "calls"
ABOUT = {"base_url": "http://judge.example/v1"}
LOCAL = {"weights": "0" * 64, "dtype": "float32", "digits": "all", "reading": "two pieces"}

EXPLAIN = [
    ExplainTask([Example(["In", " 1848"], [0.0, 6.5]), Example([" it", " 1921", ","], [0.5, 4.0, 0.0])]),
    ExplainTask([Example(["rain"], [2.0])], [Example(["sun", "\n"], [0.0, 0.0])], [Example([" días"], [1.0])]),
]
SIMULATE = [SimulateTask("words about rain", ["the", " rain", "\t"]), SimulateTask("años", [" 1848", " é"])]
RATE = [RateTask("weather", [" It", " rained", "."], [False, True, False])]

SETTINGS: dict[str, dict[str, Any]] = {
    "found": {},
    "slots": {"simulation": "slots", "explain_from": "table", "temperature": 0.7, "seed": 3},
    "one": {"simulation": "one-at-a-time", "model": "one", "temperature": -1.0},
    "wide": {"simulation": "one-at-a-time-wide", "model": "wide"},
    "chat": {"simulation": "constrained", "model": "chat", "explainer_model": "other"},
    "plain chat": {"simulation": "constrained", "model": "plain", "chat_logprobs": False, "explain_from": "peaks"},
    "local": {"simulation": "slots", "model": "tiny", "explanation_tokens": 12},
}
"""Judges by name; 'local' identifies its model as the local judge does."""


def answers(make: Callable[[str], Judge]) -> dict[str, Any]:
    """What every judge answers, as JSON has it."""
    found = {}
    for name in SETTINGS:
        with make(name) as judge:
            judge.own(f"run {name}")
            said = [*judge.explain(EXPLAIN), *judge.simulate(SIMULATE), *judge.rate(RATE)]
            found[name] = {"identity": judge.identity, "answers": [list(one) for one in said]}
            if name != "slots":
                judge.drain_calls()
    return found
