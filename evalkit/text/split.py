"""Keep the text a dictionary is fitted on apart from the text it is scored on, by document.

1. A source named on one side only goes to that side whole.
2. Documents of a source named on both sides are divided by a hash of their text and the seed: one goes to the scoring side if
   its hash, as a number in [0, 1), is below ``share``. So adding documents does not move the others, and copies stay together.
3. Should that leave a side of a divided source empty, as it can with a handful of documents, the one nearest the border moves.
4. A text that would still stand on both sides (the same in two sources) is dropped from the fitting side, and the result is
   checked once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from evalkit.errors import CorpusError
from evalkit.text.corpora import Document, Source, load_documents, source_name


class Split(NamedTuple):
    """Two sets of documents that have no text in common."""

    fit: list[Document]
    """Documents to fit on."""
    score_by_source: list[list[Document]]
    """Documents to score on, a list for each scoring source in the order given."""
    sources: tuple[str, ...] = ()
    """Short names of the scoring sources."""

    @property
    def score(self) -> list[Document]:
        """All documents to score on."""
        return [document for source in self.score_by_source for document in source]


def split_documents(fit_source: Source, score_sources: Sequence[Source], share: float = 0.2, seed: int = 0) -> Split:
    """Documents to fit on and documents to score on.

    Args:
        fit_source: source of the fitting text (``corpora.load_documents``).
        score_sources: sources of the scoring text; may name ``fit_source`` again.
        share: expected share of scoring documents in a source that is named on both sides, above 0 and below 1.
        seed: another seed divides such a source differently.

    Raises:
        CorpusError: a source has no text, or one side would be empty.
    """
    if not 0 < share < 1:
        raise CorpusError(
            f"the share of scoring documents is {share}", where="[corpus] share", fix="choose a number between 0 and 1"
        )
    fit = load_documents(fit_source)
    score_by_source: list[list[Document]] = []
    seen: dict[str, Source] = {}
    for source in score_sources:
        name = source_name(source)
        if name in seen:
            continue
        seen[name] = source
        if name == source_name(fit_source):
            fit, held_out = _divide(fit, share, seed)
            score_by_source.append(held_out)
        else:
            score_by_source.append(load_documents(source))
    score = [document for source in score_by_source for document in source]
    scored = {document.text for document in score}
    fit = [document for document in fit if document.text not in scored]
    if not fit or not score:
        raise CorpusError(
            f"no document is left to {'score' if fit else 'fit'} on",
            where=f"fit {source_name(fit_source)[:80]}, score {', '.join(s[:80] for s in sorted(seen)) or 'nothing'}",
            fix="give a source of two or more different documents, or another source to score on",
        )
    check_disjoint(fit, score)
    return Split(fit, score_by_source, tuple(_short(source, i) for i, source in enumerate(seen.values(), start=1)))


def _short(source: Source, place: int) -> str:
    """The name of a source for a table."""
    name = source_name(source)
    if name.startswith("["):
        return f"list {place}"
    return name.removeprefix("package:")


def check_disjoint(fit: Sequence[Document], score: Sequence[Document]) -> None:
    """Raise CorpusError where a text stands on both sides."""
    fitted = {document.text: document.name for document in fit}
    for document in score:
        if document.text in fitted:
            raise CorpusError(
                f"the same text is used to fit ('{fitted[document.text]}') and to score ('{document.name}')",
                where="[corpus]",
                fix="remove the copy from one of the sources",
            )


class _Divided(NamedTuple):
    fit: list[Document]
    held_out: list[Document]


def _divide(documents: list[Document], share: float, seed: int) -> _Divided:
    places = {document.text: _place(document.text, seed) for document in documents}
    held_out = {text for text, place in places.items() if place < share}
    if len(places) > 1 and not held_out:
        held_out = {min(places, key=lambda text: places[text])}
    elif len(places) > 1 and len(held_out) == len(places):
        held_out.discard(max(places, key=lambda text: places[text]))
    fit = [document for document in documents if document.text not in held_out]
    return _Divided(fit, [document for document in documents if document.text in held_out])


def _place(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed only."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
