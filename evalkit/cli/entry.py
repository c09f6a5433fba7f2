"""Runs one command: parse, call, and turn what stops it into one line and an exit code.

Exit codes: 0 done; 1 internal error, or standard output on a full disk; 2 wrong usage or suite, nothing started; 3 budget
reached; 4 partial, some units failed; 5 results cannot be kept or read; 130 interrupted; 141 the reader of the output has gone.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from evalkit.cli import files, look, run, train
from evalkit.cli.parser import parse
from evalkit.errors import EvalkitError, UsageError
from evalkit.util.outputs import path_error
from evalkit.util.suite_file import read_suite
from evalkit.util.terminal import OutputLost, flush, hush, libraries_hushed, prepare, say

GROUPS = {"run": run.COMMANDS, "look at results": look.COMMANDS, "train and exchange": train.COMMANDS, "files": files.COMMANDS}
"""Heading in the help to its commands."""
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
HUSHED = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment that keeps libraries from bars and warnings of their own; what is set already stays."""
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
            return _carry_out(argv)
        finally:
            flush()
    except OutputLost as lost:  # head or less have read enough; or a full disk behind ">"
        if lost.reason:
            say(f"evalkit: the output cannot be written: {lost.reason}", error=True)
        return lost.code
    finally:
        hush()


def _carry_out(argv: Sequence[str] | None) -> int:
    """Parse and carry out one command; its exit code."""
    debug, verb = False, ""
    try:
        arguments = parse(GROUPS, argv)
        debug, verb = arguments.debug, arguments.verb
        for name, value in () if debug else HUSHED.items():
            os.environ.setdefault(name, value)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if getattr(arguments, "suite", None) is not None:
            read_suite(arguments.suite)  # a typo is refused before anything heavy is imported
        with libraries_hushed(debug):
            _import_plugins(arguments)
            return COMMANDS[verb].call(arguments)
    except EvalkitError as error:
        if debug:
            traceback.print_exc()
        return _fail(verb, error)
    except KeyboardInterrupt:
        say(f"evalkit {verb}: interrupted; the same command goes on from here", error=True)
        return 130
    except OutputLost:
        raise
    except Exception as error:  # the outermost frame: one line here, the traceback with --debug
        if debug:
            raise
        if isinstance(error, OSError) and error.filename is not None:
            return _fail(verb, path_error(error, stored=verb in WRITERS))
        say(
            f"evalkit {verb}: internal error: {type(error).__name__}: {error}\n"
            "  to do: run it again with --debug and report the traceback; finished work is kept",
            error=True,
        )
        return 1


def _fail(verb: str, error: EvalkitError) -> int:
    say(f"{f'evalkit {verb}'.strip()}: {error}", error=True)
    return error.exit_code


def plug_in(argv: Sequence[str] | None = None) -> None:
    """Import the modules that ``--plugin`` names and do no more: what a process does that helps another one train.

    Raises:
        UsageError: as for the command itself.
        SystemExit: for words that cannot be parsed.
    """
    arguments = parse(GROUPS, argv)
    with libraries_hushed(arguments.debug):
        _import_plugins(arguments)


def _import_plugins(arguments: argparse.Namespace) -> None:
    """Import the user's own modules, which register evaluations, baselines or judges, from here or from what is installed.

    Raises:
        UsageError: there is no such module, or it fails.
    """
    for name in getattr(arguments, "plugin", None) or ():
        from evalkit.evaluations.base import EVALUATIONS

        EVALUATIONS.names()  # those of evalkit first: a name that is taken is the module's fault
        sys.path.append(os.getcwd())
        try:
            importlib.import_module(name.removesuffix(".py"))
        except EvalkitError:
            raise
        except Exception as error:
            raise UsageError(
                f"the module '{name}' cannot be imported: {type(error).__name__}: {error}",
                where="--plugin",
                fix="name a module as in import NAME, in this folder or installed",
            ) from error
