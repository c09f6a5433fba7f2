"""What the report shows of an evaluation: figures, a card of each feature, and text for a terminal.

1. A view is registered under the name of its evaluation, by a module of this package or by a plugin.
2. An evaluation without a view of its own gets ``View`` itself: the figure of its scores.
3. Everything outside this package and the case studies works through the registry and names no evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import pandas as pd
from markupsafe import Markup

from evalkit.errors import UsageError
from evalkit.report.feature_scores import FeatureScores
from evalkit.report.figures import score_figure
from evalkit.report.selection import Name
from evalkit.store.reader import Results
from evalkit.util.registry import Registry, near_miss

LAST = 100
"""Position of a view that states none."""


class RunFigure(NamedTuple):
    """One figure of a run."""

    draw: Callable[[Path], None]
    """Writes it as the suffix of the path says. Raises UsageError where there is nothing to draw."""
    name: str = ""
    """End of its file's name; '' for the figure that is named after the evaluation."""
    title: str = ""
    """What the page writes behind the evaluation's name."""
    page_only: bool = False
    """Shown on the page, but not drawn at the end of a run."""


class Block(NamedTuple):
    """A part of a feature's card."""

    html: Markup
    place: Literal["beside", "contexts", "below"] = "below"
    """Side by side on top, under the heading of the top-activating contexts, or one below the other after these."""


class Card(NamedTuple):
    """What one evaluation adds to the card of a feature."""

    facts: Iterable[tuple[str, str]] = ()
    """Term and text of the lines on top."""
    hint: Markup = Markup()
    """Stands in the line that is shown while the card is closed."""
    words: Iterable[str] = ()
    """What the filter of the page finds the feature by."""
    blocks: Iterable[Block] = ()


class Feature(NamedTuple):
    """What a card is made from."""

    name: Name
    rows: dict[str, pd.DataFrame]
    """Its rows of the view's tables, of the first configuration; a table without any is left out."""
    scores: FeatureScores
    case_study: pd.Series | None
    """Its row of the case studies; None where it has none."""
    anchors: dict[Name, str]
    """Cards of the page."""

    @property
    def title(self) -> str:
        """'feature 3 of DICTIONARY at HOOK POINT'."""
        dictionary, hook_point, number = self.name
        return f"feature {number} of {dictionary} at {hook_point}"


class View:
    """How one evaluation is shown, in one run.

    Args:
        results: a results file.
        evaluation: name of the evaluation.
        run: run_id or suite; the latest run that has the evaluation where None.
    """

    tables: ClassVar[tuple[str, ...]] = ()
    """Tables with rows about single features."""
    opens_card: ClassVar[bool] = True
    """A feature with rows in the first of the tables has a card."""
    lists_scores: ClassVar[bool] = False
    """The scores of single features stand in their cards."""
    by_feature: ClassVar[bool] = False
    """``draw`` takes a feature."""
    position: ClassVar[int] = LAST
    """Cards are put together in this order."""
    shows: ClassVar[tuple[str, ...]] = ()
    """Names that ``evalkit show`` takes for this evaluation."""

    def __init__(self, results: Results, evaluation: str, run: str | None = None) -> None:
        self.results, self.evaluation, self.run = results, evaluation, run

    def rows(self, table: str) -> pd.DataFrame:
        """Rows of one of its tables, as ``Results.rows`` gives them."""
        return self.results.rows(table, self.evaluation, self.run)

    def draw(self, path: Path, metric: str | None = None, feature: str | None = None) -> None:
        """One figure into ``path``: of ``metric``, or the evaluation's usual one; of ``feature`` where ``by_feature``.

        Raises:
            UsageError: there is no such run, metric, feature or suffix, or nothing to draw.
        """
        score_figure(self.results.table(self.evaluation, self.run), path, metric=metric)

    def figures(self) -> Iterator[RunFigure]:
        """The figures that a run ends with, the evaluation's usual one first."""
        yield RunFigure(self.draw)

    def feature_rows(self) -> dict[str, pd.DataFrame]:
        """Rows of ``tables``, with the columns dictionary, hook_point, config and feature."""
        return {table: self.rows(table) for table in self.tables}

    def explanations(self) -> dict[Name, str]:
        """Explanations of features in words."""
        return {}

    def feature_card(self, feature: Feature) -> Card | None:
        """What it adds to the card of ``feature``, which may have no rows; None where that is nothing."""
        return None

    def text(self, about: pd.Series) -> str:
        """What a terminal shows of the feature that ``about`` names; '' where that is nothing."""
        return ""

    def show(self, what: str, name: str | None) -> str:
        """What ``evalkit show WHAT [NAME]`` prints, for one of ``shows``."""
        raise NotImplementedError(what)


VIEWS: Registry[type[View]] = Registry("view", "evalkit.report.views", UsageError)
"""View classes by the name of their evaluation."""


def view_of(results: Results, name: str, run: str | None = None) -> View:
    """The view of one evaluation."""
    kind = VIEWS.get(name) if name in VIEWS.names() else View
    return kind(results, name, run)


def views_of(results: Results, run: str) -> list[View]:
    """Views of every evaluation that a run has, in the order of their cards."""
    views = [view_of(results, name, run) for name in results.evaluations(run)]
    return sorted(views, key=lambda view: view.position)


def explanations(results: Results, run: str) -> dict[Name, str]:
    """Explanations of a run's features; where several evaluations have one, that of the first by name."""
    found: dict[Name, str] = {}
    for view in sorted(views_of(results, run), key=lambda view: view.evaluation):
        found = view.explanations() | found
    return found


def showing(what: str) -> str:
    """The evaluation whose view takes ``evalkit show WHAT``.

    Raises:
        UsageError: none does.
    """
    shows = {shown: name for name in VIEWS.names() for shown in VIEWS.get(name).shows}
    if what not in shows:
        raise UsageError(f"'{what}' cannot be shown", where="evalkit show", fix=near_miss(what, shows))
    return shows[what]
