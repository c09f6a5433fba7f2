"""What reaches a terminal: shown, not sent; in any encoding; quietly where nobody reads."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings

import pytest

from evalkit.util import terminal
from evalkit.util.progress import Progress
from evalkit.util.terminal import OutputLost, legible, libraries_hushed, say, shown

HOSTILE = [
    "\x1b[31mred\x1b[0m", "\x07", "\x00", "\x7f", "\x9b2J", "\r", "\x0b", "\x0c", "\x08", "\u202eabc", "\u2066x\u2069", "\u200b",
    "\u200d", "\ufeff", "\u2028", "\u2029", "\u061c", "\ud800", "\U000e0041", "\u3164", "\xad",
]  # fmt: skip
"""Escapes, controls, marks that turn the writing round, letters that are not seen."""


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_would_act_on_or_hide_is_a_box(text):
    for shows in (shown, legible):
        told = shows(f"a{text}z")
        assert told.isprintable() and len(told) == len(text) + 2 and terminal.BOX in told
        assert (told[0], told[-1]) == ("a", "z")


def test_letters_of_all_writing_stay():
    assert shown("naïve 日本語 שלום 🙂\tx\nline") == "naïve 日本語 שלום 🙂\tx\nline"
    assert shown("a\xa0b\u3000c") == "a b c"
    assert legible("a\nb\tc") == "a\u21b5b\u21e5c"


def test_say_and_progress_send_nothing_else(capsys):
    for text in HOSTILE:
        say(text)
        say(text, error=True)
        bars = Progress(terminal=False)
        bars.say(text)
        with bars.stage(f"reading {text}", total=2) as stage:
            stage.advance(1, words=text)
    said = capsys.readouterr()
    assert all(letter.isprintable() or letter == "\n" for letter in said.out + said.err)


def test_names_in_brackets_are_names_to_the_bars(capsys):
    bars = Progress(terminal=True)
    with bars.stage("fitting [/bold] [h] x", total=2) as stage:
        shown_bars = bars._bars
        stage.advance(1, "[red]words[/]")
        with shown_bars.console.capture() as captured:
            shown_bars.console.print(shown_bars.get_renderable())
    assert "[/bold] [h] x" in captured.get()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437"])
def test_no_letter_ends_a_command_whatever_the_encoding(monkeypatch, encoding):
    sent = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(sent, encoding=encoding))
    terminal.prepare()
    say("»日本語« ↵")
    terminal.flush()
    assert b"\\u65e5" in sent.getvalue()


class _Full(io.StringIO):
    def write(self, _):
        raise OSError(28, "No space left on device")


def test_a_full_disk_behind_the_output_is_said_and_a_silent_error_stream_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", _Full())
    with pytest.raises(OutputLost) as caught:
        say("x")
    assert (caught.value.code, caught.value.reason) == (1, "No space left on device")
    monkeypatch.setattr(sys, "stderr", _Full())
    say("x", error=True)
    monkeypatch.setattr(sys, "stderr", None)
    say("x", error=True)


def test_libraries_are_hushed_and_heard_again(capsys):
    log = logging.getLogger("some.library")
    for debug in (False, True, False):
        with libraries_hushed(debug), warnings.catch_warnings():
            if debug:
                warnings.simplefilter("ignore")
            else:
                warnings.warn("of a library", UserWarning, stacklevel=1)
                warnings.simplefilter("always")  # as some do on import
                warnings.warn("of a library", UserWarning, stacklevel=1)
            log.critical("said %s", debug)
    said = capsys.readouterr().err
    assert "of a library" not in said and "said False" not in said
    assert logging.root.manager.disable == 0


def typed(*words, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "evalkit", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("words", [("--version",), ("run", "--help"), ("assets", "list")])
def test_a_reader_that_has_gone_is_no_error(words, buffered):
    child = typed(*words, env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"})
    child.stdout.close()
    said = child.stderr.read()
    child.stderr.close()
    assert (child.wait(), said) == (141, "")


def test_help_in_an_encoding_that_lacks_its_letters():
    child = typed("--help", env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)})
    out, said = child.communicate()
    assert (child.returncode, said) == (0, "") and "COMMAND" in out


HEAVY = ("torch", "transformers", "transformer_lens", "duckdb", "matplotlib", "pandas", "numpy", "sklearn", "openai", "datasets")


@pytest.mark.parametrize("verb", ["run", "plan", "train", "suite"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "there is no such suite file"),
        ("[suite\n", "not valid TOML"),
        ("\ufeff[suite]\n[modle]\n", "did you mean 'model'?"),
        ("[suite]\nname = 'x'\n[model]\n", "the section [corpus] is missing"),
    ],
)
def test_a_wrong_suite_file_is_refused_before_anything_heavy_is_loaded(tmp_path, verb, text, told):
    path = tmp_path / "a.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    code = (
        "import sys; from evalkit.cli import main; code = main(sys.argv[1:]); "
        f"print(code, sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code, verb, str(path)], capture_output=True, text=True)
    assert done.stdout == "2 []\n" and told in done.stderr and str(path) in done.stderr
