"""The commands: parse, call, print. Exit codes: 0 done; 1 a gate failed or an internal error; 2 bad usage or suite, nothing
started; 3 budget reached; 4 partial, some units failed; 5 results file locked or unreadable; 130 interrupted; 141 the reader of
the output has gone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evalkit.arguments import LISTS, parse
from evalkit.errors import EvalkitError, UsageError
from evalkit.outputs import checked, path_error, writing
from evalkit.progress import Progress, clock
from evalkit.registry import near_miss
from evalkit.suite_file import read_suite
from evalkit.terminal import OutputLost, flush, hush, libraries_hushed, prepare, say

if TYPE_CHECKING:
    from evalkit.store.reader import Results

HUSHED = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What keeps libraries from bars and warnings of their own; what is set already stays."""
WRITERS = ("run", "train", "rebuild")
"""Commands that may have started something when a path fails."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``evalkit`` and ``python -m evalkit``; returns the exit code.

    Raises:
        SystemExit: after help, or for words that cannot be parsed (2).
    """
    prepare()
    try:
        try:
            return _told(argv)
        finally:
            flush()
    except OutputLost as lost:  # head or less have read enough; or a full disk behind ">"
        if lost.reason:
            say(f"evalkit: the output cannot be written: {lost.reason}", error=True)
        return lost.code
    finally:
        hush()


def _told(argv: Sequence[str] | None) -> int:
    """Parse and carry out one command; its exit code."""
    arguments = parse(argv)
    debug = arguments.debug
    for name, value in () if debug else HUSHED.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    verb = f"evalkit {arguments.verb}"
    try:
        if arguments.verb in ("run", "plan", "train", "find", "suite") and arguments.suite is not None:
            read_suite(arguments.suite)  # a typo is refused before anything heavy is imported
        with libraries_hushed(debug):
            _plug_in_all(arguments)
            return int(COMMANDS[arguments.verb](arguments))
    except EvalkitError as error:
        if debug:
            traceback.print_exc()
        say(f"{verb}: {error}", error=True)
        return error.exit_code
    except KeyboardInterrupt:
        say(f"{verb}: interrupted; the same command goes on from here", error=True)
        return 130
    except OutputLost:
        raise
    except Exception as error:  # the outermost frame: say it in one line, keep the traceback for --debug
        if debug:
            raise
        if isinstance(error, OSError) and error.filename is not None:
            told = path_error(error, stored=arguments.verb in WRITERS)
            say(f"{verb}: {told}", error=True)
            return told.exit_code
        say(
            f"{verb}: internal error: {type(error).__name__}: {error}\n"
            "  to do: run it again with --debug and report the traceback; finished work is kept",
            error=True,
        )
        return 1


def plug_in(argv: Sequence[str] | None = None) -> None:
    """Import the modules that ``--plugin`` names and do no more: what a process does that helps another one train.

    Raises:
        UsageError: as for the command itself.
        SystemExit: for words that cannot be parsed.
    """
    arguments = parse(argv)
    with libraries_hushed(arguments.debug):
        _plug_in_all(arguments)


def _plug_in_all(arguments: argparse.Namespace) -> None:
    for module in getattr(arguments, "plugin", None) or ():
        _plug_in(module)


def _plug_in(name: str) -> None:
    """Import a module of the user's own, which registers evaluations, baselines or judges, from here or from what is installed.

    Raises:
        UsageError: there is no such module, or it fails.
    """
    from evalkit.evaluations.base import EVALUATIONS

    EVALUATIONS.names()  # those of evalkit first: a name that is taken is the module's fault
    sys.path.append(os.getcwd())
    try:
        importlib.import_module(name.removesuffix(".py"))
    except EvalkitError:
        raise
    except Exception as error:
        what = f"the module '{name}' cannot be imported: {type(error).__name__}: {error}"
        raise UsageError(what, where="--plugin", fix="name a module as in import NAME, in this folder or installed") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Results]:
    """The results file; where the rows came from elsewhere, a note says so beside the output, or beside the error."""
    from evalkit.store.reader import open_results

    with open_results(path) as store:
        try:
            yield store
        finally:
            if store.note:
                say(f"note: {store.note}", error=True)


def _run(a: argparse.Namespace) -> int:
    from evalkit.runs.run import run

    progress = Progress(quiet=a.quiet)
    outcome = run(a.suite, a.results, only=a.only, limit=a.limit, fresh=a.fresh, progress=progress)
    say(f"run {outcome.run_id}: {outcome.done} units done now, {outcome.reused} before, {outcome.failed} failed")
    say(f"results: {outcome.store}")
    if outcome.message:
        say(f"evalkit run: {outcome.message}", error=True)
    if outcome.exit_code in (0, 4) and (outcome.done or outcome.reused):
        _summary(a.results, outcome.run_id)
    return outcome.exit_code


def _summary(results: Path, run_id: str) -> None:
    """Every table of the run, and the figures of each evaluation."""
    from evalkit.report.draw import draw_run, draw_stories
    from evalkit.report.tables import paper_table
    from evalkit.store.reader import open_results

    with open_results(results) as store:
        names = store.evaluations(run_id)
        for name in names:
            say(f"\n{paper_table(store.table(name, run_id, sources=True))}")
            with _told_if_undrawn(name):
                for path in draw_run(store, name, run_id, results.parent / "figures"):
                    say(f"figure: {path}")
        if {"inputs", "ablation"} <= set(names):
            with _told_if_undrawn("stories"):
                if told := draw_stories(store, run_id, results.parent / "figures"):
                    say(f"\n{told}")
        say(f"\nresults: {results}")


@contextlib.contextmanager
def _told_if_undrawn(name: str) -> Iterator[None]:
    """A picture that cannot be written does not spoil the end of a run whose numbers are kept."""
    try:
        yield
    except UsageError as error:
        say(f"no figure of {name}: {error}", error=True)


def _plan(a: argparse.Namespace) -> int:
    from evalkit.disk import size_text
    from evalkit.runs.run import make_plan
    from evalkit.suite import load_suite

    planned, total = make_plan(a.suite, a.results, only=a.only, progress=Progress())
    for p in planned:
        cost = f"at most {p.bill.calls:,} calls, {p.bill.usage.total:,} tokens" if p.bill.calls and not p.done else ""
        unit = p.unit
        say(f"{'done' if p.done else 'new ':4}  {unit.evaluation.name:15} {unit.dictionary.name:25} {unit.hook_point}  {cost}")
    judge = load_suite(a.suite).judge
    money = f", at most ${total.bill.dollars:.2f}" if total.bill.calls and total.bill.dollars is not None else ""
    if total.bill.dollars is None and judge is not None and judge.provider == "openai":
        money = ", price unknown (dollars_per_million_prompt and dollars_per_million_completion)"
    time = f", about {clock(total.seconds)}" if total.seconds is not None else ""
    usage, rounds = total.bill.usage, judge.rounds if judge else 1
    again = f" (every one failing and asked {rounds} times)" if total.bill.calls and rounds > 1 else ""
    say(
        f"to run: {total.units} of {len(planned)} units, at most {total.bill.calls:,} judge calls{again}, "
        f"{usage.prompt:,} prompt and {usage.completion:,} completion tokens{money}{time}"
    )
    if total.units:
        say(
            f"room on the disk: at most {size_text(total.room.temporary)} of temporary files in {tempfile.gettempdir()} "
            f"(TMPDIR), and {size_text(total.room.cache)} of activations in {a.results.parent}"
        )
    return 0


def _train(a: argparse.Namespace) -> int:
    from evalkit.report.views.training import training_figure, training_table
    from evalkit.runs.train import train_suite
    from evalkit.store.reader import open_results

    outcome = train_suite(a.suite, a.results, only=a.only, progress=Progress(quiet=a.quiet))
    if outcome.built:
        say(training_table([built.row() for built in outcome.built]))
        with open_results(a.results) as store:
            curves = store.training([built.folder.name for built in outcome.built])
        if len(curves):
            path = a.results.parent / "figures" / f"{outcome.run_id}.png"
            training_figure(curves, path)
            say(f"figure: {path}")
    say(f"results: {outcome.store}")
    if outcome.message:
        say(f"evalkit train: {outcome.message}", error=True)
    return outcome.exit_code


def _import(a: argparse.Namespace) -> int:
    from evalkit.dictionaries.loading import export_dictionary, import_dictionary
    from evalkit.runs.inspect_import import describe, report

    imported = import_dictionary(a.path, a.format)
    say(describe(report(imported, Progress(), model=a.model, hook_point=a.hook_point, source=a.text)))
    if a.output:
        with writing(a.output, "the dictionary"):
            say(f"kept in          {export_dictionary(imported.dictionary, a.output)}")
    return 0


def _export(a: argparse.Namespace) -> int:
    from evalkit.dictionaries.loading import export_dictionary, find_dictionary, load_dictionary

    dictionary = load_dictionary(find_dictionary(a.dictionary, a.results.parent))
    with writing(a.output, "the dictionary"):
        say(export_dictionary(dictionary, a.output, a.to))
    return 0


def _find(a: argparse.Namespace) -> int:
    from evalkit.runs.find_features import find, listing, suite_of
    from evalkit.suite import load_suite

    if a.suite:
        suite = load_suite(a.suite)
    else:
        with _opened(a.results) as store:
            suite = suite_of(store.latest_suite())
    options = {"only": a.only, "most_density": a.most_density, "limit": a.limit}
    say(listing(find(suite, a.results.parent, a.text, **options, progress=Progress())))
    return 0


def _table(a: argparse.Namespace) -> int:
    from evalkit.report.case_studies.criteria import stories
    from evalkit.report.case_studies.text import stories_table
    from evalkit.report.tables import paper_table

    with _opened(a.results) as store:
        if a.name == "stories":
            say(stories_table(stories(store, a.run), a.format))
        else:
            say(paper_table(store.table(a.name, a.run, sources=True), a.format))
    return 0


def _compare(a: argparse.Namespace) -> int:
    from evalkit.report.tables import comparison_table

    with _opened(a.results) as store:
        say(comparison_table(store.compare(a.a, a.b, a.evaluation, a.run), a.format))
    return 0


def _figure(a: argparse.Namespace) -> int:
    from evalkit.report.draw import draw

    name = f"{'-'.join(filter(None, (a.name, a.metric)))}.png"
    path = checked(a.output, "the figure", name) if a.output else a.results.parent / "figures" / name
    with _opened(a.results) as store:
        draw(store, a.name, path, a.metric, a.run, a.feature)
    say(path)
    return 0


def _show(a: argparse.Namespace) -> int:
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


def _report(a: argparse.Namespace) -> int:
    from evalkit.report.page import write_page

    with _opened(a.results) as store:
        say(write_page(store, a.output, run=a.run, features=a.features))
    return 0


def _rebuild(a: argparse.Namespace) -> int:
    from evalkit.store.writer import rebuild

    say(rebuild(a.results.parent, a.results))
    return 0


def _assets(a: argparse.Namespace) -> int:
    from evalkit.assets.install import install, status, verify

    known = [asset.name for asset in status()]
    for name in a.names:
        if name not in known:
            raise UsageError(f"there is no asset called '{name}'", fix=near_miss(name, known))
    names = a.names or known
    if a.action == "install":
        install(names, Progress())
    elif a.action == "verify":
        verify(names, Progress())
    for asset in status():
        if asset.name in names:
            state = "installed" if asset.installed else "not installed"
            say(f"{asset.name:30} {asset.bytes / 1e6:9,.1f} MB  {state:14}{asset.licence}; {asset.what}")
    return 0


def _suite(a: argparse.Namespace) -> int:
    from evalkit.suite import load_suite

    if a.suite is None:
        raise UsageError("name a suite file to check, or ask for --help", fix="evalkit suite suites/quickstart.toml")
    suite = load_suite(a.suite, train_only=True)
    say(
        f"{a.suite}: fine; {len(suite.dictionaries)} dictionaries, {len(suite.hook_points)} hook points, "
        f"{len(suite.evaluations)} evaluations"
    )
    return 0


COMMANDS = {
    "run": _run,
    "plan": _plan,
    "train": _train,
    "import": _import,
    "export": _export,
    "find": _find,
    "table": _table,
    "compare": _compare,
    "figure": _figure,
    "show": _show,
    "report": _report,
    "rebuild": _rebuild,
    "assets": _assets,
    "suite": _suite,
}
