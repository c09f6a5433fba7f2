"""Commands that show results: tables, comparisons, figures, lists, features, the page of a run."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from evalkit.cli.parser import FORMAT_HELP, FORMATS, Command, Parser, add_plugins, add_suite
from evalkit.errors import UsageError
from evalkit.util.outputs import checked
from evalkit.util.terminal import say
from evalkit.util.user_files import placed

if TYPE_CHECKING:
    from evalkit.store.reader import Results

LISTS = ("runs", "dictionaries", "failures", "costs", "texts")
SHOWN = (*LISTS, "feature", "steering")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Results]:
    """The results file; a note that its rows came from elsewhere goes to standard error."""
    from evalkit.store.reader import open_results

    with open_results(path) as store:
        try:
            yield store
        finally:
            if store.note:
                say(f"note: {store.note}", error=True)


def _declare_find(p: Parser) -> None:
    add_suite(p, nargs="?", help="suite of the dictionaries (default: that of the latest run)")
    p.add_argument("--text", required=True, help='text that ends in the token, as in "It is now up to Dave\'"')
    p.add_argument("--only", metavar="NAME", help="one dictionary of the suite")
    p.add_argument("--most-density", type=float, default=1.0, metavar="SHARE", help="leave out features active on more tokens")
    p.add_argument("--limit", type=int, default=20, metavar="N", help="at most N features a dictionary (default %(default)s)")


def find(a: argparse.Namespace) -> int:
    from evalkit.runs.find_features import find as find_features
    from evalkit.runs.find_features import listing, suite_of
    from evalkit.suite import load_suite
    from evalkit.util.progress import Progress

    if a.suite:
        suite = load_suite(a.suite)
    else:
        with _opened(a.results) as store:
            suite = suite_of(store.latest_suite())
    options = {"only": a.only, "most_density": a.most_density, "limit": a.limit}
    say(listing(find_features(suite, a.results.parent, a.text, **options, progress=Progress())))
    return 0


def _declare_table(p: Parser) -> None:
    p.add_argument(
        "name", help="evaluation: reconstruction, autointerp, inputs, ablation, ...; or stories: features of all sides"
    )
    p.add_argument("--run", help="run id or suite name (default: the latest run that has it)")
    p.add_argument("--format", choices=FORMATS, default="text", help=FORMAT_HELP)


def table(a: argparse.Namespace) -> int:
    from evalkit.report.case_studies.criteria import stories
    from evalkit.report.case_studies.text import stories_table
    from evalkit.report.tables import paper_table

    with _opened(a.results) as store:
        if a.name == "stories":
            say(stories_table(stories(store, a.run), a.format))
        else:
            say(paper_table(store.table(a.name, a.run, sources=True), a.format))
    return 0


def _declare_compare(p: Parser) -> None:
    p.add_argument("a", help="name of a dictionary, or RUN:DICTIONARY")
    p.add_argument("b", nargs="+", help="one or more to compare it with; p is corrected over all of them together")
    p.add_argument("--evaluation", help="one evaluation only")
    p.add_argument("--run", help="run id or suite name of the dictionaries named without one (default: the latest run)")
    p.add_argument("--format", choices=FORMATS, default="text", help=FORMAT_HELP)


def compare(a: argparse.Namespace) -> int:
    from evalkit.report.tables import comparison_table

    with _opened(a.results) as store:
        say(comparison_table(store.compare(a.a, a.b, a.evaluation, a.run), a.format))
    return 0


def _declare_figure(p: Parser) -> None:
    p.add_argument(
        "name", help="evaluation: reconstruction, inputs, ...; stories, causal_tree: one feature's; training: the curves"
    )
    p.add_argument("-o", "--output", type=placed, help="file (default: figures/NAME.png beside the results file)")
    p.add_argument("--run", help="run id or suite name")
    p.add_argument("--metric", help="another metric than the evaluation's main one; pareto for reconstruction: all against L0")
    p.add_argument(
        "--feature",
        metavar="NAME",
        help="stories, causal_tree: NUMBER, HOOK:NUMBER or DICTIONARY:HOOK:NUMBER (default: the best)",
    )
    add_plugins(p)


def figure(a: argparse.Namespace) -> int:
    from evalkit.report.draw import draw

    name = f"{'-'.join(filter(None, (a.name, a.metric)))}.png"
    path = checked(a.output, "the figure", name) if a.output else a.results.parent / "figures" / name
    with _opened(a.results) as store:
        draw(store, a.name, path, a.metric, a.run, a.feature)
    say(path)
    return 0


def _declare_show(p: Parser) -> None:
    p.add_argument("what", choices=SHOWN)
    p.add_argument(
        "name",
        nargs="?",
        help="feature: NUMBER, HOOK:NUMBER or DICTIONARY:HOOK:NUMBER of the evaluation inputs; steering: a concept, feature or "
        "dictionary, all replies (default: some of all)",
    )
    p.add_argument("--format", choices=("text", "csv", "json"), default="text", help="of lists: %(choices)s")
    p.add_argument("--feature", metavar="NAME", help="the same as the name behind 'feature'")
    p.add_argument("--run", help="feature, steering: run id or suite name (default: the latest run with inputs, with steering)")
    add_plugins(p)


def show(a: argparse.Namespace) -> int:
    name = a.name if a.name is not None else a.feature
    if (a.what == "feature") != (name is not None) and a.what != "steering":
        what = "name the feature to show" if a.what == "feature" else f"'{a.what}' takes no name"
        raise UsageError(what, fix="evalkit show feature NUMBER, as evalkit table stories or evalkit find list them")
    with _opened(a.results) as store:
        if a.what not in LISTS:
            from evalkit.report.views.base import showing, view_of

            say(view_of(store, showing(a.what), a.run).show(a.what, name))
            return 0
        frame = getattr(store, a.what)()
    if a.format != "text":
        from evalkit.report.tables import raw

        say(raw(frame, a.format))
        return 0
    say(frame.to_string(index=False) if len(frame) else f"no {a.what}")
    return 0


def _declare_report(p: Parser) -> None:
    p.add_argument("-o", "--output", type=placed, metavar="FILE", help="file (default: report.html beside the results file)")
    p.add_argument("--run", help="run id or suite name (default: the latest run)")
    p.add_argument("--features", type=int, default=40, metavar="N", help="at most N features of the case studies (%(default)s)")
    add_plugins(p)


def report(a: argparse.Namespace) -> int:
    from evalkit.report.page.write import write_page

    with _opened(a.results) as store:
        say(write_page(store, a.output, run=a.run, features=a.features))
    return 0


COMMANDS = {
    "table": Command("a paper-style table of one evaluation", _declare_table, table),
    "compare": Command("dictionaries, with intervals of the difference", _declare_compare, compare),
    "figure": Command("a picture, as PNG, SVG or PDF; a causal tree also as JSON or GraphML", _declare_figure, figure),
    "show": Command("what is in the results file", _declare_show, show),
    "report": Command("one self-contained HTML page of a run: tables, figures, features", _declare_report, report),
    "find": Command("features that fire on the last token of a text, the rarest first", _declare_find, find),
}
