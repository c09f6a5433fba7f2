"""The commands: parse, call, print. Exit codes: 0 done; 1 a gate failed or an internal error; 2 bad usage or suite, nothing
started; 3 budget reached; 4 partial, some units failed; 5 results file locked or unreadable; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from evalkit.arguments import build_parser
from evalkit.errors import EvalkitError, UsageError
from evalkit.progress import Progress, clock
from evalkit.registry import near_miss


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``evalkit`` and ``python -m evalkit``; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    # quiet libraries that report to a hub or print bars of their own
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return int(COMMANDS[arguments.verb](arguments))
    except EvalkitError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"evalkit {arguments.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"evalkit {arguments.verb}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader (head, less) has gone: no more output is wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the outermost frame: say it in one line, keep the traceback for --debug
        if arguments.debug:
            raise
        print(
            f"evalkit {arguments.verb}: internal error: {type(error).__name__}: {error}\n"
            "  to do: run it again with --debug and report the traceback; finished work is kept",
            file=sys.stderr,
        )
        return 1


def _note(note: str) -> None:
    """What a reader should know of where the rows came from, beside the output."""
    if note:
        print(f"note: {note}", file=sys.stderr)


def _run(a: argparse.Namespace) -> int:
    from evalkit.running import run

    progress = Progress(quiet=a.quiet)
    outcome = run(a.suite, a.results, only=a.only, limit=a.limit, fresh=a.fresh, progress=progress)
    print(f"run {outcome.run_id}: {outcome.done} units done now, {outcome.reused} before, {outcome.failed} failed")
    print(f"results: {outcome.store}")
    if outcome.message:
        print(f"evalkit run: {outcome.message}", file=sys.stderr)
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
            print(f"\n{paper_table(store.table(name, run_id))}")
            for path in draw_run(store, name, run_id, results.parent / "figures"):
                print(f"figure: {path}")
        if {"inputs", "ablation"} <= set(names) and (told := draw_stories(store, run_id, results.parent / "figures")):
            print(f"\n{told}")
        print(f"\nresults: {results}")


def _plan(a: argparse.Namespace) -> int:
    from evalkit.planning import estimate
    from evalkit.running import make_plan
    from evalkit.suite import load_suite

    planned = make_plan(a.suite, a.results, only=a.only, progress=Progress())
    judge = load_suite(a.suite).judge
    for p in planned:
        cost = f"at most {p.cost.calls:,} calls, {p.cost.tokens:,} tokens" if p.cost.calls and not p.done else ""
        unit = p.unit
        print(f"{'done' if p.done else 'new ':4}  {unit.evaluation.name:15} {unit.dictionary.name:25} {unit.hook_point}  {cost}")
    total = estimate(planned, judge.dollars_per_million_prompt if judge else None)
    money = f", at most ${total.dollars:.2f}" if total.dollars is not None else ""
    time = f", about {clock(total.seconds)}" if total.seconds is not None else ""
    print(
        f"to run: {total.units} of {len(planned)} units, at most {total.calls:,} judge calls, "
        f"{total.tokens:,} tokens{money}{time}"
    )
    return 0


def _train(a: argparse.Namespace) -> int:
    from evalkit.report.training import training_figure, training_table
    from evalkit.store.reader import open_results
    from evalkit.training_runs import train_suite

    outcome = train_suite(a.suite, a.results, only=a.only, progress=Progress(quiet=a.quiet))
    if outcome.built:
        print(training_table([built.row() for built in outcome.built]))
        with open_results(a.results) as store:
            curves = store.training([built.folder.name for built in outcome.built])
        if len(curves):
            path = a.results.parent / "figures" / f"{outcome.run_id}.png"
            training_figure(curves, path)
            print(f"figure: {path}")
    print(f"results: {outcome.store}")
    if outcome.message:
        print(f"evalkit train: {outcome.message}", file=sys.stderr)
    return outcome.exit_code


def _import(a: argparse.Namespace) -> int:
    from evalkit.dictionaries.loading import export_dictionary, import_dictionary
    from evalkit.importing import describe, report

    imported = import_dictionary(a.path, a.format)
    print(describe(report(imported, Progress(), model=a.model, hook_point=a.hook_point, source=a.text)))
    if a.output:
        print(f"kept in          {export_dictionary(imported.dictionary, a.output)}")
    return 0


def _export(a: argparse.Namespace) -> int:
    from evalkit.dictionaries.loading import export_dictionary, find_dictionary, load_dictionary

    print(export_dictionary(load_dictionary(find_dictionary(a.dictionary, a.results.parent)), a.output, a.to))
    return 0


def _find(a: argparse.Namespace) -> int:
    from evalkit.finding import find, listing, suite_of
    from evalkit.store.reader import open_results
    from evalkit.suite import load_suite

    if a.suite:
        suite = load_suite(a.suite)
    else:
        with open_results(a.results) as store:
            suite = suite_of(store.latest_suite())
    options = {"only": a.only, "most_density": a.most_density, "limit": a.limit}
    print(listing(find(suite, a.results.parent, a.text, **options, progress=Progress())))
    return 0


def _table(a: argparse.Namespace) -> int:
    from evalkit.report.stories import stories, stories_table
    from evalkit.report.tables import paper_table
    from evalkit.store.reader import open_results

    with open_results(a.results) as store:
        if a.name == "stories":
            print(stories_table(stories(store, a.run), a.format))
        else:
            print(paper_table(store.table(a.name, a.run), a.format))
        _note(store.note)
    return 0


def _compare(a: argparse.Namespace) -> int:
    from evalkit.report.tables import comparison_table
    from evalkit.store.reader import open_results

    with open_results(a.results) as store:
        print(comparison_table(store.compare(a.a, a.b, a.evaluation), a.format))
        _note(store.note)
    return 0


def _figure(a: argparse.Namespace) -> int:
    from evalkit.report.draw import draw
    from evalkit.store.reader import open_results

    path = a.output or a.results.parent / "figures" / f"{'-'.join(filter(None, (a.name, a.metric)))}.png"
    with open_results(a.results) as store:
        draw(store, a.name, path, a.metric, a.run, a.feature)
    print(path)
    return 0


def _show(a: argparse.Namespace) -> int:
    from evalkit.store.reader import open_results

    if (a.what == "feature") != (a.name is not None) and a.what != "steering":
        what = "name the feature to show" if a.what == "feature" else f"'{a.what}' takes no name"
        raise UsageError(what, fix="evalkit show feature NUMBER, as evalkit table stories or evalkit find list them")
    with open_results(a.results) as store:
        if a.what == "feature":
            from evalkit.report.feature_view import feature_text

            print(feature_text(store, a.name, a.run))
            return 0
        if a.what == "steering":
            from evalkit.report.replies import replies_text

            print(replies_text(store, a.name, a.run))
            return 0
        frame = getattr(store, a.what)()
    print(frame.to_string(index=False) if len(frame) else f"no {a.what}")
    return 0


def _report(a: argparse.Namespace) -> int:
    from evalkit.report.page import write_page
    from evalkit.store.reader import open_results

    with open_results(a.results) as store:
        print(write_page(store, a.output, run=a.run, features=a.features))
        _note(store.note)
    return 0


def _rebuild(a: argparse.Namespace) -> int:
    from evalkit.store.writer import rebuild

    print(rebuild(a.results.parent, a.results))
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
            print(f"{asset.name:30} {asset.bytes / 1e6:9,.1f} MB  {state:14}{asset.licence}; {asset.what}")
    return 0


def _suite(a: argparse.Namespace) -> int:
    from evalkit.suite import load_suite

    if a.suite is None:
        raise UsageError("name a suite file to check, or ask for --help", fix="evalkit suite suites/quickstart.toml")
    suite = load_suite(a.suite, train_only=True)
    print(
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
