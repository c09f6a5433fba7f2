"""What reaches a terminal: text that it shows and does not act on, in any encoding, as long as somebody reads.

1. ``legible`` and ``shown`` replace what a terminal would act on or hide: control characters, escapes, marks that turn the
   writing round, letters without width. Studied text, names of others and their error messages go through one of them.
2. ``say`` prints so, to standard output or standard error.
3. ``prepare`` makes both streams write what their encoding lacks as an escape, so that no letter ends a command.
4. ``OutputLost`` says that standard output takes no more: its reader has left (``head``, ``less``), or the disk is full.
   ``flush`` finds it out before Python ends, and ``hush`` keeps what is still in the buffer from being tried again.
5. ``libraries_hushed`` keeps warnings and log lines of libraries from the terminal; ``--debug`` lets them through.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator

BOX = "\u25a1"
"""Stands for a letter that is not sent."""
MARKS = {"\n": "\u21b5", "\t": "\u21e5"}
"""Line ends and tabs inside one line."""
UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters by their class that have no shape."""
GONE = 141
"""Exit code where the reader of the output has gone: what a shell reports of ``seq 1000000 | head -1``."""


def _sent(letter: str) -> str:
    if letter.isprintable() and letter not in UNSEEN:
        return letter
    return " " if unicodedata.category(letter) == "Zs" else BOX


def shown(text: str) -> str:
    """``text`` of one or more lines as a terminal may have it: letters, line ends and tabs; a box for everything else."""
    return "".join(c if c in MARKS else _sent(c) for c in text)


def legible(text: str) -> str:
    """``text`` on one line: line ends and tabs as marks, a box for what cannot be printed or turns the writing round."""
    return "".join(MARKS.get(c) or _sent(c) for c in text)


class OutputLost(Exception):
    """Standard output takes no more."""

    def __init__(self, error: OSError) -> None:
        self.code = GONE if isinstance(error, BrokenPipeError) else 1
        self.reason = "" if isinstance(error, BrokenPipeError) else error.strerror or str(error)
        super().__init__(self.reason)


def say(text: object = "", *, error: bool = False) -> None:
    """Print ``text`` (``shown``) and a line end; ``error`` to standard error, where nothing is said once nobody reads.

    Raises:
        OutputLost: standard output takes no more.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    try:
        print(shown(str(text)), file=stream, flush=error)
    except OSError as failure:
        if not error:
            raise OutputLost(failure) from failure


def prepare() -> None:
    """Let both streams write what their encoding lacks (ASCII, Latin-1, code pages of Windows) as ``\\\\xbb`` and the like."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Send what is in the buffer of standard output.

    Raises:
        OutputLost: it takes no more.
    """
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        sys.stdout.flush()
    except OSError as failure:
        raise OutputLost(failure) from failure


def hush() -> None:
    """Send both streams nowhere, where they can no longer be written; Python would try again at its end and complain."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def libraries_hushed(debug: bool) -> Iterator[None]:
    """No warning or log line of a library reaches the terminal inside the block, unless ``debug``. Errors are raised, not logged.

    What was set before is set again afterwards.
    """
    if debug:
        yield
        return
    threshold = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # libraries set filters of their own on import: the printing is turned off too
            warnings.showwarning = lambda *_, **__: None
            yield
    finally:
        logging.disable(threshold)
