"""One self-contained page of a run: tables, figures and features to browse.

1. The run's facts, what failed in it, and its dictionaries (``run_facts``).
2. Every evaluation: the sheet that ``evalkit table`` prints as an HTML table, its notes, its figures as inline SVG.
3. Cards of single features (``browser``), at most as many as asked; the page gives the number left out.
4. Everything is escaped (``html``). A content policy in the head forbids every request: style and script are inside.
5. The page is written whole or not at all. It holds no time of its making: one results file gives one page. What the suite
   file and the errors say stands in it, names of files and addresses too.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from evalkit.errors import UsageError
from evalkit.report.case_studies.text import stories_sheet
from evalkit.report.html import environment
from evalkit.report.page.feature_list import Browser, browser
from evalkit.report.page.run_facts import RunFacts, run_facts
from evalkit.report.page.svg import Figure, run_figures
from evalkit.report.render import Sheet
from evalkit.report.selection import name_of
from evalkit.report.tables import paper_sheet
from evalkit.store.reader import Results
from evalkit.util.files import publish
from evalkit.util.outputs import checked, writing

NAME = "report.html"
FEATURES = 40
"""Features shown unless another number is asked for: a page of about two megabytes."""


class Evaluation(NamedTuple):
    """One evaluation of the page."""

    name: str
    sheet: Sheet | None
    figures: list[Figure]


def write_page(store: Results, path: Path | str | None = None, *, run: str | None = None, features: int = FEATURES) -> Path:
    """Write the page of one run.

    Args:
        store: a results file (``evalkit.open_results``).
        path: the HTML file, in a folder that is there; the default is ``report.html`` beside the results file.
        run: run_id, or a suite name for its latest run; the default is the latest run.
        features: at most so many features of the case studies.

    Returns:
        Where the page is.

    Raises:
        UsageError: there is no run, no such run, a negative number of features, or nowhere to write.
    """
    if features < 0:
        raise UsageError(f"a page cannot show {features} features", where="--features", fix="0 or more")
    target = checked(store.path.parent / NAME if path is None else Path(path), "the page", NAME)
    html = page(store, store.run_id(run), features)
    with writing(target, "the page"), publish(target) as temporary:
        temporary.write_text(html, encoding="utf-8", newline="\n")
    return target


def page(store: Results, run: str, features: int = FEATURES) -> str:
    """The page of one run as HTML.

    Args:
        run: run_id.
        features: at most so many features of the case studies.
    """
    facts = run_facts(store, run)
    evaluations = [_evaluation(store, name, run) for name in facts.evaluations]
    found = browser(store, run, features)
    return (
        environment()
        .get_template("page.html")
        .render(
            facts=facts,
            note=store.note,
            evaluations=evaluations,
            training=run_figures(store, "training", run),
            browser=found,
            most=features,
            stories=None if found.stories is None else stories_sheet(found.stories),
            links=_links(found),
            title=_title(facts),
        )
    )


def _evaluation(store: Results, name: str, run: str) -> Evaluation:
    frame = store.table(name, run, sources=True)
    return Evaluation(name, None if frame.empty else paper_sheet(frame), run_figures(store, name, run))


def _links(found: Browser) -> list[str | None]:
    """Section that each row of the table of stories leads to."""
    if found.stories is None:
        return []
    return [found.anchors.get(name_of(row)) for _, row in found.stories.iterrows()]


def _title(facts: RunFacts) -> str:
    return f"{facts.suite}: run {facts.run}"
