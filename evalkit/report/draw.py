"""Which picture an evaluation is drawn as.

1. ``draw`` makes one: the scores with their intervals, unless the evaluation and metric named have a picture of their own.
2. A story is not about an evaluation but about one feature in all of them, a causal tree about one feature, and 'training' about
   how dictionaries learned.
3. ``draw_run`` makes those a run ends with: the scores, or what stands for them, the Pareto picture of a sweep, a causal tree.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from evalkit.errors import UsageError
from evalkit.report.concepts import concepts_figure
from evalkit.report.density import density_figure
from evalkit.report.figures import score_figure
from evalkit.report.pareto import has_sweep, pareto_figure
from evalkit.report.patching import patching_figure
from evalkit.report.stories import stories, stories_table
from evalkit.report.story_figure import story_figure
from evalkit.report.training import training_figure
from evalkit.report.trees.data import has_tree
from evalkit.report.trees.figure import tree_figure
from evalkit.store.reader import Results


def draw(
    store: Results, name: str, path: Path, metric: str | None = None, run: str | None = None, feature: str | None = None
) -> None:
    """One figure of the evaluation ``name``, of ``metric`` or its usual one, as the suffix of ``path`` says; or the story of one
    feature ('stories': of ``feature``, or the most consistent one).

    Raises:
        UsageError: there is no such evaluation, metric, feature or run.
    """
    if feature is not None and name not in ("stories", "causal_tree"):
        raise UsageError(
            f"'{name}' is not drawn feature by feature", where="--feature", fix="evalkit figure stories --feature ..."
        )
    match (name, metric):
        case ("stories", None):
            story_figure(store, path, feature=feature, run=run)
        case ("causal_tree", None):
            tree_figure(store, path, feature=feature, run=run)
        case ("training", None):
            training_figure(store.curves(run), path)
        case ("geometry", "density"):
            density_figure(store.features(name, "density", run), path)
        case ("reconstruction", "pareto"):
            pareto_figure(store.table(name, run), path)
        case ("concepts", None):
            store.table(name, run)  # says what is wrong with the name of the run
            concepts_figure(store.rows("concept_features", name, run), path)
        case ("ioi", None):
            store.table(name, run)  # says what is wrong with the name of the run
            frame = store.rows("patching_curves", name, run)
            patching_figure(frame, path, unpatched=_unpatched(store, frame))
        case _:
            score_figure(store.table(name, run), path, metric=metric)


def _unpatched(store: Results, frame: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Mean KL(base || target) of the model as it is, by hook point and configuration, in the run of these patching curves."""
    found = store.own(
        "SELECT u.hook_point, u.config, avg(s.value) AS kl FROM run_units u JOIN scores s ON s.unit_key = u.unit_key "
        "WHERE u.run_id = ? AND u.evaluation = 'ioi' AND s.metric = 'kl_unpatched' AND s.status = 'ok' GROUP BY ALL",
        [None if frame.empty else str(frame["run"].iloc[0])],
    )
    return {(str(hook_point), str(config)): float(kl) for hook_point, config, kl in found.itertuples(index=False)}


def draw_run(store: Results, name: str, run: str, folder: Path, suffix: str = ".png") -> list[Path]:
    """The figures of one evaluation that a run ends with; where they are."""
    drawn = [folder / f"{run}-{name}{suffix}"]
    own = {"causal_tree": "cause_share", "concepts": "auroc"}  # beside the picture that is not of scores
    draw(store, name, drawn[0], own.get(name), run)
    if name == "concepts" and len(store.rows("concept_features", name, run)):
        drawn.append(folder / f"{run}-by-concept{suffix}")
        draw(store, name, drawn[1], run=run)
    if name == "causal_tree" and has_tree(store, run):
        drawn.append(folder / f"{run}-tree{suffix}")
        draw(store, name, drawn[1], run=run)
    if name == "reconstruction" and has_sweep(store.table(name, run)):
        drawn.append(folder / f"{run}-pareto{suffix}")
        draw(store, name, drawn[1], "pareto", run)
    return drawn


def draw_stories(store: Results, run: str, folder: Path) -> str:
    """The table of stories of a run with inputs and ablations, and the best one drawn; '' where they share no feature."""
    try:
        found = stories(store, run)
    except UsageError:
        return ""
    path = folder / f"{run}-stories.png"
    story_figure(store, path, run=run)
    return f"{stories_table(found)}\nfigure: {path}"
