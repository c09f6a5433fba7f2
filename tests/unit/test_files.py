"""Durable files: whole or absent, and a torn last line costs one record."""

import json
import multiprocessing
import os
import time

import pytest
from disk_case import largest_file

from evalkit.errors import DiskFull, StoreUnreadable
from evalkit.util import files
from evalkit.util.files import JsonLines, publish, publish_once, tidy

# children are forked: they need none of the libraries whose threads newer Pythons warn of
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


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


def build(folder, name):
    folder.mkdir()
    for number in range(3):
        (folder / f"part{number}").write_text(name)
    (folder / "manifest.json").write_text(name)


def test_what_is_named_by_its_content_is_kept_where_it_is_there(tmp_path):
    target = tmp_path / "key"
    with publish_once(target, whole="manifest.json") as first:
        build(first, "first")
    before = target.stat().st_ino
    with publish_once(target, whole="manifest.json") as second:
        build(second, "second")
    assert target.stat().st_ino == before and (target / "part0").read_text() == "first"
    with publish_once(tmp_path / "file") as temporary:
        temporary.write_text("first")
    with publish_once(tmp_path / "file") as temporary:
        temporary.write_text("second")
    assert (tmp_path / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "key"]


def test_a_folder_that_lost_its_manifest_is_no_whole_one(tmp_path):
    target = tmp_path / "key"
    target.mkdir()
    (target / "part0").write_text("what somebody left")
    with publish_once(target, whole="manifest.json") as temporary:
        build(temporary, "new")
    assert (target / "part0").read_text() == "new"


@pytest.mark.parametrize("how", ["once", "replacing", "without an exchange"])
def test_publishers_at_once_all_finish_and_a_reader_finds_no_gap(tmp_path, how, monkeypatch):
    """Three processes publish one folder again and again while this one looks."""
    target, fork = tmp_path / "key", multiprocessing.get_context("fork")
    if how == "without an exchange":
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)

    def publisher(name):
        for _ in range(60):
            with publish_once(target, "manifest.json") if how == "once" else publish(target) as temporary:
                build(temporary, name)

    publisher("before")
    begun = fork.Barrier(4)
    children = [fork.Process(target=lambda n=n: (begun.wait(60), publisher(str(n)))) for n in range(3)]
    for child in children:
        child.start()
    begun.wait(60)
    gaps = reads = 0
    while any(child.is_alive() for child in children) or not reads:
        reads += 1
        gaps += not (target / "part1").exists()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    if how != "without an exchange":
        assert gaps == 0
    # by content: the number of a folder that is gone may be given to a new one
    texts = {path.read_text() for path in target.iterdir()}
    assert len(texts) == 1 and (texts == {"before"}) == (how == "once")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def half(target, ready):
    """Publish by half, and stay there."""
    with publish(target) as temporary:
        temporary.mkdir()
        (temporary / "half").write_bytes(b"x" * 1000)
        ready.set()
        time.sleep(600)


def test_what_a_killed_process_left_is_tidied_and_what_a_living_one_builds_is_not(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready = [fork.Event(), fork.Event()]
    dead, alive = (fork.Process(target=half, args=(tmp_path / n, e)) for n, e in zip(("dead", "alive"), ready, strict=True))
    dead.start()
    alive.start()
    try:
        assert all(event.wait(60) for event in ready)
        assert len(list(tmp_path.glob(".*.tmp"))) == 2
        dead.kill()
        dead.join()
        for tidying in (lambda: tidy(tmp_path / "alive"), lambda: build_file(tmp_path / "other")):
            tidying()
            (left,) = tmp_path.glob(".*.tmp/*/half")
            assert left.parent.name == "alive"
    finally:
        for child in (dead, alive):
            child.kill()
            child.join()
    build_file(tmp_path / "alive")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alive", "other"]


def build_file(target):
    with publish(target) as temporary:
        temporary.write_text("whole")


def test_foreign_hidden_folders_are_left_alone(tmp_path):
    foreign = tmp_path / ".editor.0123abcd.tmp"
    foreign.mkdir()
    (foreign / "swap").write_text("x")
    build_file(tmp_path / "file")
    assert (foreign / "swap").exists()


def test_a_full_disk_is_named_with_its_sizes_and_nothing_half_written_stays(tmp_path):
    target = tmp_path / "folder"
    with largest_file(4000), pytest.raises(DiskFull, match="needed.* free") as caught, publish(target) as temporary:
        temporary.mkdir()
        (temporary / "small").write_bytes(b"x" * 3000)
        (temporary / "large").write_bytes(b"x" * 5000)
    assert caught.value.where == str(target) and caught.value.exit_code == 5 and "TMPDIR" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_does_not_fit_leaves_the_lines_before_it(tmp_path):
    lines = JsonLines(tmp_path / "log.jsonl")
    with largest_file(4000):
        lines.append({"a": "x" * 2000})
        with pytest.raises(DiskFull, match="needed") as caught:
            lines.append({"b": "x" * 3000})
        lines.append({"c": 1})
    assert str(lines.path) in caught.value.where
    assert [sorted(record) for record in lines.read()] == [["a"], ["c"]]


def test_several_records_are_one_append(tmp_path):
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.append_all([{"a": 1}, {"b": 2}])
    lines.append_all([])
    assert list(lines.read()) == [{"a": 1}, {"b": 2}]


def test_processes_that_append_at_once_tear_nothing(tmp_path):
    path, fork = tmp_path / "log.jsonl", multiprocessing.get_context("fork")

    def writer(name):
        for number in range(40):  # a new object each time: each looks for a torn tail
            JsonLines(path).append({"name": name, "number": number, "text": "x" * (number * 700)})

    children = [fork.Process(target=writer, args=(name,)) for name in ("a", "b", "c")]
    for child in children:
        child.start()
    for child in children:
        child.join()
    found = sorted((record["name"], record["number"]) for record in JsonLines(path).read())
    assert found == [(name, number) for name in ("a", "b", "c") for number in range(40)]


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
