"""Files that users name: ``~`` is the home folder, and a byte order mark is no part of the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from suite_case import tiny_suite

from evalkit.concepts.loading import load_concept
from evalkit.errors import CorpusError, SuiteError, UsageError
from evalkit.evaluations.base import EVALUATIONS
from evalkit.suite import load_suite
from evalkit.tasks.jsonl import read_pairs
from evalkit.text.corpora import load_documents
from evalkit.util.hashing import content_hash
from evalkit.util.user_files import half_character, placed, read_text

MARK = b"\xef\xbb\xbf"


def test_a_name_starts_at_the_home_folder_the_suite_or_the_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert placed("~/model", Path("suites")) == tmp_path / "model"
    assert placed("model", Path("suites")) == Path("suites/model") and placed("/model", Path("suites")) == Path("/model")
    with pytest.raises(UsageError, match="no such home folder"):
        placed("~nobody-of-this-name/model")


def test_every_path_of_a_suite_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tiny_suite(tmp_path)
    text = path.read_text()
    for name in ("model", "fit", "score"):
        text = text.replace(str(tmp_path / name), f"~/{name}")
    path.write_text(text)
    suite = load_suite(path)
    assert suite.model.path == str(tmp_path / "model")
    assert suite.corpus.fit == f"folder:{tmp_path / 'fit'}" and suite.corpus.score == (f"folder:{tmp_path / 'score'}",)
    for name, key in (("steering", "files"), ("concepts", "files"), ("ioi", "path")):
        evaluation = EVALUATIONS.get(name)
        given = {"task": "jsonl", "path": "~/x"} if key == "path" else {"files": ("~/x",)}
        config = evaluation().placed(evaluation.config(**given), Path("/suites"))
        assert evaluation().reads is not None and str(tmp_path / "x") in (getattr(config, key), *getattr(config, key))


def test_a_byte_order_mark_is_passed_over_wherever_a_user_writes(tmp_path):
    path = tiny_suite(tmp_path)
    path.write_bytes(MARK + path.read_bytes())
    assert load_suite(path).suite.name == "tiny"
    concept = tmp_path / "rain.toml"
    concept.write_bytes(MARK + b'title = "rain"\nwords = ["rain"]\n')
    assert load_concept(concept).title == "rain"
    pairs = tmp_path / "pairs.jsonl"
    line = {"base": "a b", "target": "a c", "base_answer": " d", "target_answer": " e"}
    pairs.write_bytes(MARK + json.dumps(line).encode())
    assert read_pairs(pairs)[0][1].base == "a b"
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(MARK + b'{"text": "rain"}\r\n')
    assert load_documents(f"file:{texts}")[0].text == "rain"


def test_other_encodings_are_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("caf\u00e9".encode("latin1"))
    with pytest.raises(CorpusError, match=r"byte 3 \(0xe9\) is not UTF-8"):
        read_text(path, CorpusError)
    path.write_bytes("caf\u00e9".encode("utf-16"))
    with pytest.raises(SuiteError, match="the file is UTF-16") as caught:
        read_text(path, SuiteError)
    assert "iconv -f utf-16" in caught.value.fix
    with pytest.raises(UsageError, match="cannot be read"):
        read_text(tmp_path)


def test_half_of_a_character_is_named_with_its_file_and_line(tmp_path):
    assert half_character("rain \ud83d fox") == "\\ud83d" and half_character("rain \U0001f98a") is None
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "rain"}\n{"text": "rain \\ud83d fox"}\n{"text": "\\ud83e\\udd8a"}\n')
    with pytest.raises(CorpusError, match=r"line 2 holds half of a character \(\\ud83d\)") as caught:
        load_documents(f"folder:{tmp_path}")
    assert caught.value.where == str(path)
    path.write_text(path.read_text().replace("\\ud83d ", ""))
    assert [d.text for d in load_documents(f"file:{path}")] == ["rain", "rain fox", "\U0001f98a"]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"base": "a \\udc00", "target": "a c", "base_answer": " d", "target_answer": " e"}\n')
    with pytest.raises(CorpusError, match="the field 'base' holds half of a character") as caught:
        read_pairs(pairs)
    assert "line 1" in caught.value.where
    with pytest.raises(CorpusError, match="text 1 holds half"):
        load_documents(["rain", "\ud83d"])


def test_what_cannot_be_written_as_utf8_has_a_hash_all_the_same():
    assert content_hash(["\ud83d"]) != content_hash(["\ud83e"]) != content_hash(["?"])
