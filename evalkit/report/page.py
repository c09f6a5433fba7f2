"""One self-contained page of a run: tables, figures and features to browse.

1. The run's facts, what failed in it, and its dictionaries (``run_facts``).
2. Every evaluation: the sheet that ``evalkit table`` prints as an HTML table, its notes, its figures as inline SVG.
3. Single features, those whose sides agree first (``browser``), at most as many as asked; how many are left out is said.
4. jinja2 fills the templates with everything escaped; a control character that is left in a name becomes a box, so that nothing
   in a results file can break the page. A content policy in the head forbids every request: style and script are inside.
5. The page is written whole or not at all. It holds no time of its making: one results file gives one page. What the suite
   file and the errors say stands in it, names of files and addresses too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from evalkit.errors import UsageError
from evalkit.files import publish
from evalkit.outputs import checked, writing
from evalkit.report.browser import Browser, browser
from evalkit.report.inline_svg import Figure, run_figures
from evalkit.report.render import Column, Sheet, blocks
from evalkit.report.replies import NOTES
from evalkit.report.run_facts import RunFacts, run_facts
from evalkit.report.stories import stories_sheet
from evalkit.report.tables import paper_sheet
from evalkit.store.reader import Results
from evalkit.terminal import shown

NAME = "report.html"
FEATURES = 40
"""Features shown unless another number is asked for: a page of about two megabytes."""
MARK = "Bold"
WIDTH, KEY = 165, 26
"""Letters of a table's widest block, in small type on a screen, and of a key column in it."""


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
    told = found.stories
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(blocks=_blocks, mark=MARK, key=KEY)
    return environment.get_template("page.html").render(
        facts=facts,
        note=store.note,
        evaluations=evaluations,
        training=run_figures(store, "training", run),
        browser=found,
        most=features,
        stories=None if told is None else stories_sheet(told),
        links=_links(found),
        reply_notes=" ".join(NOTES),
        title=_title(facts),
    )


def _evaluation(store: Results, name: str, run: str) -> Evaluation:
    frame = store.table(name, run, sources=True)
    return Evaluation(name, None if frame.empty else paper_sheet(frame), run_figures(store, name, run))


def _blocks(columns: list[Column]) -> list[list[int]]:
    """Indices of the columns of each table: the keys, which come again in each, may fold, so they count as narrow."""
    longest = [max(len(text) for text in [column.heading, *(cell.text for cell in column.cells)]) for column in columns]
    return blocks(columns, [[" " * (min(n, KEY) if c.group < 0 else n)] for n, c in zip(longest, columns, strict=True)], WIDTH)


def _links(found: Browser) -> list[str | None]:
    """Section that each row of the table of stories leads to."""
    if found.stories is None:
        return []
    rows = found.stories[["dictionary", "hook_point", "feature"]].itertuples(index=False)
    return [found.anchors.get((str(dictionary), str(hook), int(feature))) for dictionary, hook, feature in rows]


def _title(facts: RunFacts) -> str:
    return f"{facts.suite}: run {facts.run}"


def _clean(value: Any) -> Any:
    """What a template may print: text without control characters, which HTML does not allow or browsers hide."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c == "\u00a0" else shown(c) for c in value)
