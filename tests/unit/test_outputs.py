"""Places that cannot be written: one clear error each, whatever the command."""

from __future__ import annotations

import errno
import os

import pytest

from evalkit import cli
from evalkit.cli import main
from evalkit.errors import DiskFull, StoreError, UsageError
from evalkit.util.files import publish
from evalkit.util.outputs import FIXES, checked, path_error, writing


def test_the_error_names_the_path_a_user_knows_and_what_to_do(tmp_path):
    inner = tmp_path / ".page.html.0a1b2c3d.tmp" / "page.html"
    told = path_error(OSError(errno.EACCES, "Permission denied", str(inner)))
    assert isinstance(told, UsageError) and told.where == str(tmp_path / "page.html") and "permissions" in told.fix
    folder = tmp_path / ".kept.0a1b2c3d.tmp"
    assert path_error(OSError(errno.EACCES, "Permission denied", str(folder))).where == str(tmp_path / "kept")
    full = path_error(OSError(errno.ENOSPC, "No space left on device", str(inner)))
    assert isinstance(full, DiskFull) and full.where == str(tmp_path / "page.html") and "free space" in full.fix
    assert isinstance(path_error(OSError(errno.EROFS, "Read-only", "x"), stored=True), StoreError)
    for code in FIXES:
        assert path_error(OSError(code, os.strerror(code), "x")).fix == FIXES[code]
    assert path_error(OSError("odd")).fix


def test_what_cannot_be_written_leaves_nothing_and_names_the_output(tmp_path):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "figure.png"
    cannot = pytest.raises(UsageError, match="the figure cannot be written: (Not a directory|File exists)")
    with cannot as caught, writing(target, "the figure"), publish(target) as temporary:
        temporary.write_text("x")
    assert caught.value.where == str(target) and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_one_rule_for_folders_that_are_missing(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="does not exist"):
        checked(tmp_path / "no" / "a.png", "the figure", "a.png")
    with pytest.raises(UsageError, match="this is a folder") as caught:
        checked(tmp_path, "the figure", "a.png")
    assert str(tmp_path / "a.png") in caught.value.fix
    assert checked(tmp_path / "a.png", "the figure", "a.png") == tmp_path / "a.png"
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UsageError, match="Permission denied"):
        checked(tmp_path / "a.png", "the figure", "a.png")


@pytest.mark.parametrize(("verb", "code"), [("table", 2), ("assets", 2), ("run", 5), ("rebuild", 5)])
def test_every_command_turns_an_error_of_the_system(verb, code, monkeypatch, capsys, tmp_path):
    """A lock in a folder of others, a cache on a read-only disk: wherever it arises."""

    def fails(_):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".sotu.lock"))

    monkeypatch.setitem(cli.COMMANDS, verb, cli.COMMANDS[verb]._replace(call=fails))
    suite = tmp_path / "a.toml"
    suite.write_text("[suite]\n[model]\n[corpus]\n")
    words = {"table": ["x"], "assets": ["list"], "run": [str(suite)], "rebuild": []}[verb]
    assert main([verb, *words]) == code
    said = capsys.readouterr().err
    assert "Permission denied" in said and str(tmp_path / ".sotu.lock") in said and "to do: change its permissions" in said
    assert "internal" not in said


def test_figure_and_report_refuse_a_missing_folder_alike(tmp_path, capsys):
    for verb, name in (("figure", "a.svg"), ("report", "a.html")):
        words = ["reconstruction"] if verb == "figure" else []
        (tmp_path / "runs" / "r").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "r" / "journal.jsonl").touch()
        assert main([verb, *words, "-o", str(tmp_path / "no" / name), "--results", str(tmp_path / "e.duckdb")]) == 2
        assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
