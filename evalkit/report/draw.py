"""The figures of an evaluation: one that is asked for, or all that a run ends with. Which there are, its view says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evalkit.errors import UsageError
from evalkit.report.case_studies.criteria import stories
from evalkit.report.case_studies.text import stories_table
from evalkit.report.views.base import RunFigure, view_of
from evalkit.report.views.stories.figure import story_figure
from evalkit.store.reader import Results


def draw(
    store: Results, name: str, path: Path, metric: str | None = None, run: str | None = None, feature: str | None = None
) -> None:
    """One figure of the evaluation ``name``, of ``metric`` or its usual one, as the suffix of ``path`` says.

    Args:
        name: an evaluation; 'stories' for a feature in several of them, 'training' for how dictionaries learned.
        feature: the feature to draw, where the figure is of one; the best one when left out.

    Raises:
        UsageError: there is no such evaluation, metric, feature or run.
    """
    view = view_of(store, name, run)
    if feature is not None and not view.by_feature:
        fix = "evalkit figure stories --feature ..."
        raise UsageError(f"'{name}' is not drawn feature by feature", where="--feature", fix=fix)
    view.draw(path, metric, feature)


def planned(store: Results, name: str, run: str, folder: Path, suffix: str) -> Iterator[tuple[RunFigure, Path]]:
    """The figures of one evaluation of a run, and where in ``folder`` each is drawn."""
    for figure in view_of(store, name, run).figures():
        yield figure, folder / f"{run}-{figure.name or name}{suffix}"


def draw_run(store: Results, name: str, run: str, folder: Path) -> list[Path]:
    """The figures of one evaluation that a run ends with; where they are."""
    drawn = []
    for figure, path in planned(store, name, run, folder, ".png"):
        if not figure.page_only:
            figure.draw(path)
            drawn.append(path)
    return drawn


def draw_stories(store: Results, run: str, folder: Path) -> str:
    """The table of a run's case studies, and the best one drawn; '' where the evaluations share no feature."""
    try:
        found = stories(store, run)
    except UsageError:
        return ""
    path = folder / f"{run}-stories.png"
    story_figure(store, path, run=run)
    return f"{stories_table(found)}\nfigure: {path}"
