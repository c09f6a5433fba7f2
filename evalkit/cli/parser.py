"""Reads what was typed: one sub-command a verb, listed by group in the help.

1. A ``Command`` declares its arguments and is called with what they hold; ``build_parser`` makes one parser of all groups.
2. A mistyped command, choice or option is answered with the closest existing one, in the form of all of evalkit's errors.
3. ``argparse`` and not a framework: typer's grouped help takes longer to import than the whole of ``evalkit --help`` may.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from evalkit.cli.completion import SHELLS, install, script
from evalkit.util.registry import near_miss
from evalkit.util.terminal import say
from evalkit.util.user_files import DEFAULT_RESULTS, placed
from evalkit.version import __version__

DESCRIPTION = "Automated interpretability and evaluation of sparse autoencoders on language models."
FORMATS = ("text", "md", "latex", "csv", "json")
FORMAT_HELP = "%(choices)s; in csv, text that a spreadsheet would take for a formula has an apostrophe in front"


class Parser(argparse.ArgumentParser):
    """argparse with evalkit's form of errors."""

    reference: Callable[[], str] | None = None
    """Text that ``--help`` prints in place of the arguments."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: {message}", error=True)
        sys.exit(2)

    def format_help(self) -> str:
        return self.reference() if self.reference else super().format_help()

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Refuse words that this command does not take."""
        options = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        fix = near_miss(words[0].partition("=")[0], options) if words[0].startswith("-") else "quote what has blanks in it"
        self.error(f"'{words[0]}' is not taken here\n  to do: {fix}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # argparse's hook for choices: its own message lists them without the closest
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(None, f"there is no '{value}' here\n  to do: {near_miss(str(value), action.choices)}")

    def _print_message(self, message: str, file: object = None) -> None:
        # argparse ignores an output that cannot be written; say raises OutputLost
        if message:
            say(message.removesuffix("\n"), error=file is not sys.stdout)


class Command(NamedTuple):
    """One verb of the command line."""

    help: str
    declare: Callable[[Parser], None]
    """Adds the arguments."""
    call: Callable[[argparse.Namespace], int]
    """Carries the command out and returns the exit code."""


class _Root(Parser):
    """The parser of ``evalkit`` itself, whose help lists the commands by group."""

    groups: Mapping[str, Mapping[str, Command]]

    def format_help(self) -> str:
        text = argparse.HelpFormatter(prog=self.prog, max_help_position=12)
        text.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        text.add_text(self.description)
        for title, commands in self.groups.items():
            text.start_section(title)
            text.add_arguments([argparse.Action([], name, help=command.help) for name, command in commands.items()])
            text.end_section()
        text.start_section("options")
        text.add_arguments([action for action in self._actions if action.option_strings])
        text.end_section()
        text.add_text("evalkit COMMAND --help lists what a command takes")
        return text.format_help()


class CommandLine(NamedTuple):
    """The parser of everything, and that of each verb."""

    parser: Parser
    verbs: Mapping[str, Parser]


def parse(groups: Mapping[str, Mapping[str, Command]], argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was typed: ``verb`` and the arguments of that command.

    Raises:
        SystemExit: after help or a completion script (0), or for words that cannot be parsed (2).
        UsageError: a path begins with a home folder that does not exist; a completion script cannot be written.
    """
    parser, verbs = build_parser(groups)
    arguments, more = parser.parse_known_args(argv)
    if more:
        verbs[arguments.verb].refuse(more)
    return arguments


def build_parser(groups: Mapping[str, Mapping[str, Command]]) -> CommandLine:
    """The command line of ``groups``: title of a group to its commands by verb."""
    parser = _Root(prog="evalkit", description=DESCRIPTION)
    parser.groups = groups
    parser.add_argument("--version", action="version", version=f"evalkit {__version__}")
    for option, text in (
        ("--install-completion", "make the shell (bash, zsh, fish; default: yours) complete commands and options with TAB"),
        ("--show-completion", "print what --install-completion writes"),
    ):
        parser.add_argument(option, action=_Completion, nargs="?", choices=SHELLS, metavar="SHELL", help=text)
    common = Parser(add_help=False)
    every = common.add_argument_group("every command")
    every.add_argument("--debug", action="store_true", help="show the traceback of an error")
    every.add_argument(
        "--results", type=placed, default=DEFAULT_RESULTS, metavar="FILE", help="results file (default %(default)s)"
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND", parser_class=Parser)
    for commands in groups.values():
        for name, command in commands.items():
            command.declare(verbs.add_parser(name, parents=[common], help=command.help, description=command.help))
    return CommandLine(parser, verbs.choices)


class _Completion(argparse.Action):
    """``--show-completion`` prints the script, ``--install-completion`` writes it where the shell looks; both end the command."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, *more: object) -> NoReturn:
        say(install(parser, shell) if self.dest == "install_completion" else script(parser, shell))
        sys.exit(0)


def add_suite(parser: Parser, *, help: str = "suite file", nargs: str | None = None) -> None:
    """The suite file of a command, and the user's modules that it may name."""
    parser.add_argument("suite", type=placed, help=help, nargs=nargs)
    add_plugins(parser)


def add_plugins(parser: Parser) -> None:
    """The user's modules that a command may name."""
    parser.add_argument(
        "--plugin",
        action="append",
        metavar="MODULE",
        help="import this module of yours first: its evaluations, baselines and views can then be named (may be given again)",
    )
