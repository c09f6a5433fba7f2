"""How well the dictionaries of a run reconstruct, for the notes of tables of edits.

1. Patches and ablations leave in place what a dictionary does not reconstruct. So their tables say beside L0 which share of the
   variance that is (FVU), where the run measured it.
2. FVU is the mean of the metric ``fvu`` of the evaluation ``reconstruction``, as its own table has it.
"""

from __future__ import annotations

import pandas as pd

EDITED = ("ioi", "ablation", "causal_tree", "steering")
"""Evaluations whose tables have the note."""
MEASURED = """
    SELECT u.dictionary, u.hook_point, sum(s.value * s.weight) / nullif(sum(s.weight), 0) AS fvu
    FROM run_units u JOIN scores s ON s.unit_key = u.unit_key
    WHERE u.run_id = ? AND u.status = 'done' AND s.status = 'ok' AND u.evaluation = 'reconstruction' AND s.metric = 'fvu'
    GROUP BY ALL ORDER BY u.hook_point, min(u.unit_order)
"""
"""dictionary, hook_point and fvu of a run."""


def fit_notes(evaluation: str, measured: pd.DataFrame) -> list[str]:
    """The note, one a hook point, for the rows of ``MEASURED``; none for other evaluations or where nothing was measured."""
    if evaluation not in EDITED:
        return []
    several = measured["hook_point"].nunique() > 1
    notes = []
    for hook_point, part in measured.dropna(subset="fvu").groupby("hook_point", sort=False):
        listed = ", ".join(f"{name} {fvu:.3f}" for name, fvu in zip(part["dictionary"], part["fvu"], strict=True))
        notes.append(f"FVU on the scoring text{f' at {hook_point}' if several else ''}, which edits leave in place: {listed}.")
    return notes
