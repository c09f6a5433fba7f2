"""Commands that run a suite, and tell beforehand what that costs."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from evalkit.cli.parser import Command, Parser, add_suite
from evalkit.errors import UsageError
from evalkit.util.terminal import say

if TYPE_CHECKING:
    from evalkit.judges.bounds import Bill
    from evalkit.judges.config import JudgeConfig


def _declare_run(p: Parser) -> None:
    add_suite(p)
    p.add_argument("--only", metavar="NAME", help="one evaluation or dictionary of the suite")
    p.add_argument("--limit", type=int, metavar="N", help="run at most N units now")
    p.add_argument("--fresh", action="store_true", help="measure again beside what is there; judge calls are not bought twice")
    p.add_argument("--quiet", action="store_true", help="no progress")


def run(a: argparse.Namespace) -> int:
    from evalkit.runs.run import run as run_suite
    from evalkit.util.progress import Progress

    progress = Progress(quiet=a.quiet)
    outcome = run_suite(a.suite, a.results, only=a.only, limit=a.limit, fresh=a.fresh, progress=progress)
    say(f"run {outcome.run_id}: {outcome.done} units done now, {outcome.reused} before, {outcome.failed} failed")
    say(f"results: {outcome.store}")
    if outcome.message:
        say(f"evalkit run: {outcome.message}", error=True)
    if outcome.exit_code in (0, 4) and (outcome.done or outcome.reused):
        _summary(a.results, outcome.run_id)
    return outcome.exit_code


def _summary(results: Path, run_id: str) -> None:
    """The headline table of each evaluation of the run, and its figures."""
    from evalkit.evaluations.base import EVALUATIONS
    from evalkit.report.draw import draw_run, draw_stories
    from evalkit.report.tables import paper_table
    from evalkit.store.reader import open_results

    with open_results(results) as store:
        names = store.evaluations(run_id)
        for name in names:
            headline = EVALUATIONS.get(name).headline
            frame = store.table(name, run_id, sources=not headline)
            say(f"\n{paper_table(frame[frame['metric'].isin(headline)] if headline else frame)}")
            if headline:
                say(f"every metric, and each source of text: evalkit table {name} --results {shlex.quote(str(results))}")
            with _figure_may_fail(name):
                for path in draw_run(store, name, run_id, results.parent / "figures"):
                    say(f"figure: {path}")
        if {"inputs", "ablation"} <= set(names):
            with _figure_may_fail("stories"):
                if text := draw_stories(store, run_id, results.parent / "figures"):
                    say(f"\n{text}")
        say(f"\nresults: {results}")


@contextlib.contextmanager
def _figure_may_fail(name: str) -> Iterator[None]:
    """A picture that cannot be written does not spoil the end of a run whose numbers are kept."""
    try:
        yield
    except UsageError as error:
        say(f"no figure of {name}: {error}", error=True)


def _declare_plan(p: Parser) -> None:
    add_suite(p)
    p.add_argument("--only", metavar="NAME", help="one evaluation or dictionary of the suite")


def plan(a: argparse.Namespace) -> int:
    from evalkit.runs.run import make_plan
    from evalkit.util.disk import size_text
    from evalkit.util.progress import Progress, clock

    planned, total, suite = make_plan(a.suite, a.results, only=a.only, progress=Progress())
    for unit, done, _, bill, _ in planned:
        cost = f"at most {bill.calls:,} calls, {bill.usage.total:,} tokens" if bill.calls and not done else ""
        say(f"{'done' if done else 'new ':4}  {unit.evaluation.name:15} {unit.dictionary.name:25} {unit.hook_point}  {cost}")
    time = f", about {clock(total.seconds)}" if total.seconds is not None else ""
    say(f"to run: {total.units} of {len(planned)} units, at most {_bill_text(total.bill, suite.judge)}{time}")
    if total.units:
        say(
            f"room on the disk: at most {size_text(total.room.temporary)} of temporary files in {tempfile.gettempdir()} "
            f"(TMPDIR), and {size_text(total.room.cache)} of activations in {a.results.parent}"
        )
    return 0


def _bill_text(bill: Bill, judge: JudgeConfig | None) -> str:
    """Calls, tokens and money of ``bill``."""
    rounds = judge.rounds if judge else 1
    again = f" (every one failing and asked {rounds} times)" if bill.calls and rounds > 1 else ""
    money = ""
    if bill.dollars is None and judge is not None and judge.provider == "openai":
        money = ", price unknown (dollars_per_million_prompt and dollars_per_million_completion)"
    elif bill.dollars is not None and bill.calls:
        money = f", at most ${bill.dollars:.2f}"
    usage = bill.usage
    return f"{bill.calls:,} judge calls{again}, {usage.prompt:,} prompt and {usage.completion:,} completion tokens{money}"


COMMANDS = {
    "run": Command("run, or go on with, a suite", _declare_run, run),
    "plan": Command("units, done or new; calls, tokens, money, time", _declare_plan, plan),
}
