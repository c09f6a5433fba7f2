"""Durable files: whole or absent, and a torn last line costs one record."""

import json
import os

import pytest

from evalkit.errors import StoreUnreadable
from evalkit.files import JsonLines, publish, tidy


def test_publish_leaves_nothing_after_an_error(tmp_path):
    target = tmp_path / "folder" / "file.txt"
    with pytest.raises(RuntimeError, match="stop"), publish(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert list(target.parent.iterdir()) == []


def test_publish_replaces_file_and_folder(tmp_path):
    for content in ("one", "two"):
        with publish(tmp_path / "file") as temporary:
            temporary.write_text(content)
        with publish(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert (tmp_path / "file").read_text() == "two"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["two"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_torn_last_line_is_dropped_and_repaired(tmp_path):
    path = tmp_path / "log.jsonl"
    JsonLines(path).append({"a": 1})
    with path.open("ab") as handle:
        handle.write(b'{"a": 2, "tor')
    assert list(JsonLines(path).read()) == [{"a": 1}]
    JsonLines(path).append({"a": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"a": 3}]


def test_damage_inside_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\nnot json\n{"a": 2}\n')
    with pytest.raises(StoreUnreadable, match="line 2"):
        list(JsonLines(path).read())


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        JsonLines(tmp_path / "log.jsonl").append({"value": float("nan")})


def test_what_kills_left_half_written_of_one_target_is_removed(tmp_path):
    target = tmp_path / "a [1]"
    for name in (".a [1].0123abcd.tmp", ".a 1.0123abcd.tmp", ".a [1].0123abcd.old", ".a [1].notes.tmp", "a [1]"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".a [1].89abcdef.tmp").mkdir()
    (tmp_path / ".a [1].89abcdef.tmp" / "part").write_text("x")
    tidy(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".a 1.0123abcd.tmp", ".a [1].0123abcd.old", ".a [1].notes.tmp", "a [1]"
    ]  # fmt: skip


def test_records_appended_together_are_forced_to_the_disk_once(tmp_path, monkeypatch):
    forced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (forced.append(number), real(number))[1])
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.append_all({"n": n} for n in range(5))
    assert len(forced) == 1
    assert list(lines.read()) == [{"n": n} for n in range(5)]
    with pytest.raises(ValueError, match="JSON"):
        lines.append_all([{"n": 5}, {"n": float("nan")}])
    assert len(list(lines.read())) == 5  # all of them or none
