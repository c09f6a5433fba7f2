"""Case studies as a table, with the criteria in its notes."""

from __future__ import annotations

from typing import Any

import pandas as pd

from evalkit.evaluations.criterion import StoriesConfig
from evalkit.report.case_studies.criteria import ALPHA, OWN
from evalkit.report.render import Cell, Column, Sheet
from evalkit.report.tables import number, render_frame, with_interval

SHOWN = 20
"""Rows of the printed table; CSV and JSON have all."""


def stories_table(frame: pd.DataFrame, format: str = "text") -> str:
    """The frame of ``stories`` to read or to print.

    Raises:
        UsageError: there is no such format.
    """
    return render_frame(frame, format, stories_sheet)


def _chance(frame: pd.DataFrame, criterion: StoriesConfig) -> str:
    """How many features would have an effect by chance: a bound that takes no parts of the criterion for independent."""
    held = int((frame["effect"].astype(bool) & (frame["next_p_holm"] < ALPHA)).sum())
    if criterion.corrected:
        return (
            f"by chance: did no feature help its next token, any of the {len(frame)} would have the effect with a probability of "
            f"at most {ALPHA:g}: the loss is corrected for all of them (Holm)."
        )
    return (
        f"by chance: did no feature help its next token, at most about {number(ALPHA * len(frame), 1)} of the {len(frame)} would "
        "have the effect: that is the loss alone, whatever else the criterion asks. After Holm's correction of the loss for all "
        f"{len(frame)} features it is significant for {held} of the {int(frame['effect'].sum())} that have it."
    )


def _yes(value: Any) -> Cell:
    return Cell("-" if value is None or value != value else "yes" if value else "no")


def stories_sheet(frame: pd.DataFrame) -> Sheet:
    """The first ``SHOWN`` rows of the frame of ``stories`` as the sheet that every format of it shows."""
    shown = frame.head(SHOWN)
    criterion = frame.attrs.get("criterion", OWN)
    rows: list[Any] = list(shown.itertuples())
    trees = bool(frame["parents"].notna().any())
    columns = [
        Column("dictionary", [Cell(row.dictionary) for row in rows], number=False, group=-1),
        Column("hook point", [Cell(row.hook_point) for row in rows], number=False, group=-1),
        Column("feature", [Cell(str(row.feature)) for row in rows], group=-1),
        Column("agree", [Cell(f"{row.agree} of {row.sides}") for row in rows], group=-1),
        Column("strength", [Cell(number(row.strength, 3)) for row in rows], group=0),
        Column("main class", [Cell(repr(row.main_class)) for row in rows], number=False, group=0),
        Column("share (null)", [Cell(f"{number(row.share, 2)} ({number(row.share_null, 2)})") for row in rows], group=0),
        Column("inputs", [_yes(row.inputs) for row in rows], number=False, group=0),
        Column("lowered", [Cell(row.lowered if isinstance(row.lowered, str) else "-") for row in rows], number=False, group=1),
        Column("KL (null)", [Cell(f"{number(row.kl, 4)} ({number(row.kl_null, 4)})") for row in rows], group=1),
        Column("repeated (null)", [Cell(f"{number(row.repeated, 2)} ({number(row.repeated_null, 2)})") for row in rows], group=1),
        Column("next token", [Cell(with_interval(row.next_change, row.next_low, row.next_high, 3)) for row in rows], group=2),
        Column("same tokens", [Cell(number(row.same, 2)) for row in rows], group=2),
        Column("effect", [_yes(row.effect) for row in rows], number=False, group=2),
    ]
    if trees:
        columns += [
            Column("parents", [Cell(number(row.parents, 0)) for row in rows], group=3),
            Column(
                "strongest (null)",
                [Cell(f"{number(row.parent_share, 2)} ({number(row.parent_share_null, 2)})") for row in rows],
                group=3,
            ),
            Column("carried", [Cell(number(row.carried, 2)) for row in rows], group=3),
            Column("tree", [_yes(row.tree) for row in rows], number=False, group=3),
        ]
    whole = frame[frame["agree"] == frame["sides"]]
    by = ", ".join(f"{name} {len(part)}" for name, part in whole.groupby("dictionary", sort=False))
    of = ", ".join(f"{name} {len(part)}" for name, part in frame.groupby("dictionary", sort=False))
    chosen_so = int(frame["preferred"].eq(True).sum())
    drawn = f" {chosen_so} were drawn from the quarter that fires most on a single token." if chosen_so else ""
    notes = [
        f"{len(frame)} features studied ({of}); all sides there are agree for {len(whole)}{f' ({by})' if by else ''}. "
        f"The first rows are the best of so many.{drawn}",
        *frame.attrs.get("notes", []),
        f"inputs: one token class has at least {criterion.least_share:g} of the mean tenth of the range and "
        f"{criterion.times_null:g} times its null.",
        "effect: KL above that of every random direction (in brackets: their mean); at least "
        f"{criterion.least_repeated:g} of the change of probability in one half of the contexts is foretold by the other, and "
        "more than for every random direction; the token the text goes on with loses (its 95% interval by t over contexts below "
        f"0{', also after Holm' if criterion.corrected else ''}); and at least {criterion.least_same:g} of the contexts are read "
        "at a token of the main class (same tokens).",
        _chance(frame, criterion),
        "tree: features of the hook point before with a significant effect (parents), the strongest of them above a random "
        "direction; '-' where no tree was grown.",
        "carried: what goes with the strongest parent's own vector, read again with nothing computed from it. A share that is "
        "mostly carried is the feature itself some layers earlier, not a computation.",
        "strength: geometric mean of share, repeated and, where there is a tree, the strongest parent's share.",
    ]
    return Sheet(f"stories, run {frame['run'].iloc[0]}", columns, notes)
