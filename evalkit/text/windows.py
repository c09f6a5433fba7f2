"""Cut documents into windows of equal length, many documents first.

1. Documents come in a seeded random order. Each is cut into pieces of text in front of a space between two letters, so that
   tokens can be made piece by piece and only as many as are needed. Where the tokenizer joins what is on either side of a cut,
   that is no cut: the tokens are those of the whole document.
2. A document is read from a seeded random piece to its end and then from its beginning up to that piece: openings, which
   resemble each other (salutations, titles), get no more than their share of a small sample.
3. Windows do not overlap, hold exactly ``context`` tokens, and cross neither the end of a document nor the seam of step 2.
   Where texts begin with a BOS, each window does, and it is one of the ``context`` tokens.
4. They are taken in turns, one from each document, until ``max_tokens`` is reached. More tokens only add windows at the end.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int

from evalkit.errors import CorpusError
from evalkit.text.corpora import Document
from evalkit.util.hashing import tensors_hash

PIECE = 2000
"""Characters after which the next place to cut is looked for."""
BESIDE = 100
"""Characters on either side of a cut on which it is tried whether the tokenizer joins them."""
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")


class TokenWindows(NamedTuple):
    """Windows of tokens and the documents they come from."""

    tokens: Int[torch.Tensor, "N T"]
    """Token ids, int64."""
    document: Int[torch.Tensor, " N"]
    """Index into ``names`` of the document of each window."""
    names: list[str]
    """Names of the documents that gave windows."""
    identity: str
    """sha256 over tokens and documents."""
    skipped: int
    """Documents that were tried and hold no whole window."""
    asked: int = 0
    """Tokens that were asked for."""
    bos: int | None = None
    """The token every window begins with; None where windows hold nothing but text."""
    sources: tuple[str, ...] = ()
    """Source of each document; empty where it is not known."""

    @property
    def opening(self) -> int:
        """Positions at the start of every window that hold the BOS and no text: 0 or 1."""
        return int(self.bos is not None)


def cut_windows(
    documents: Sequence[Document],
    tokenise: Callable[[str], list[int]],
    context: int,
    max_tokens: int,
    seed: int,
    windows_per_document: int | None = None,
    bos: int | None = None,
) -> TokenWindows:
    """At most ``max_tokens`` tokens of ``documents`` in windows of ``context`` tokens.

    Args:
        documents: what to cut.
        tokenise: token ids of a text, without special tokens.
        context: tokens per window T.
        max_tokens: upper bound of N * T.
        seed: order of the documents and where each is entered.
        windows_per_document: upper bound for one document; None for no bound.
        bos: token that every window begins with; None for none.

    Raises:
        CorpusError: not a single window can be had.
    """
    if context < 1 or max_tokens < context:
        raise CorpusError(
            f"{max_tokens} tokens do not make one window of {context}",
            where="[corpus] tokens, context",
            fix="ask for more tokens or a shorter context",
        )
    generator = random.Random(seed)
    order = list(range(len(documents)))
    generator.shuffle(order)
    open_documents = [(index, _windows(documents[index].text, tokenise, context, generator.random(), bos)) for index in order]
    rows: list[list[int]] = []
    owners: list[int] = []
    skipped, turn, wanted = 0, 0, max_tokens // context
    while open_documents and len(rows) < wanted and (windows_per_document is None or turn < windows_per_document):
        remaining = []
        for index, windows in open_documents:
            if len(rows) == wanted:
                break
            window = next(windows, None)
            if window is not None:
                rows.append(window)
                owners.append(index)
                remaining.append((index, windows))
            elif turn == 0:
                skipped += 1
        open_documents, turn = remaining, turn + 1
    if not rows:
        raise CorpusError(
            f"none of the {len(documents)} documents holds {context} tokens",
            where="[corpus] context",
            fix="shorten the context or choose a corpus of longer documents",
        )
    used = sorted(set(owners))
    names = [documents[index].name for index in used]
    tokens = torch.tensor(rows, dtype=torch.int64)
    document = torch.tensor([used.index(owner) for owner in owners], dtype=torch.int64)
    return TokenWindows(tokens, document, names, _identity(tokens, document, names, bos), skipped, max_tokens, bos)


def join_windows(parts: Sequence[TokenWindows]) -> TokenWindows:
    """The windows of several sources one after the other; documents are numbered anew."""
    if len(parts) == 1:
        return parts[0]
    first = [0]
    for part in parts:
        first.append(first[-1] + len(part.names))
    tokens = torch.cat([part.tokens for part in parts])
    document = torch.cat([part.document + start for part, start in zip(parts, first[:-1], strict=True)])
    names = [name for part in parts for name in part.names]
    bos = parts[0].bos
    skipped, asked = sum(part.skipped for part in parts), sum(part.asked for part in parts)
    sources = tuple(source for part in parts for source in part.sources)
    return TokenWindows(tokens, document, names, _identity(tokens, document, names, bos), skipped, asked, bos, sources)


def _identity(tokens: torch.Tensor, document: torch.Tensor, names: list[str], bos: int | None) -> str:
    """A token that is spelled in the text is no BOS: the same tokens have another identity with and without one."""
    return tensors_hash({"tokens": tokens, "document": document}, names if bos is None else [names, "bos", bos])


def _windows(text: str, tokenise: Callable[[str], list[int]], context: int, entry: float, bos: int | None) -> Iterator[list[int]]:
    """Windows of one document, tokens made as they are asked for; ``entry`` in [0, 1) says at which piece to begin."""
    pieces = _pieces(text)
    first = int(entry * len(pieces))
    # Text is hardly ever above 8 characters a token: behind the entry there is room for a window, or it is the beginning.
    while first and sum(map(len, pieces[first:])) < 8 * context:
        first -= 1
    while first and not _apart(pieces[first - 1], pieces[first], tokenise):
        first -= 1
    if sum(map(len, pieces[:first])) < 8 * context:
        first = 0
    opening = [] if bos is None else [bos]
    size = context - len(opening)
    for part in (pieces[first:], pieces[:first]):
        pending: list[int] = []
        for piece in _joined(part, tokenise):
            pending += tokenise(piece)
            start = 0
            while True:
                while opening and pending[start : start + 1] == opening:
                    start += 1  # a text that spells the BOS at this place does not get a second one
                if len(pending) - start < size:
                    break
                yield opening + pending[start : start + size]
                start += size
            pending = pending[start:]


def _joined(pieces: Sequence[str], tokenise: Callable[[str], list[int]]) -> Iterator[str]:
    """``pieces``, those in one that the tokenizer joins."""
    waiting = ""
    for number, piece in enumerate(pieces):
        waiting += piece
        if number + 1 == len(pieces) or _apart(waiting, pieces[number + 1], tokenise):
            yield waiting
            waiting = ""


def _apart(left: str, right: str, tokenise: Callable[[str], list[int]]) -> bool:
    """Whether tokens of the one text followed by the other are those of either."""
    cut = _CUT.search(left, max(0, len(left) - BESIDE))
    left, right = left[cut.start() if cut else 0 :], right[:BESIDE]
    return tokenise(left + right) == tokenise(left) + tokenise(right)


def _pieces(text: str) -> list[str]:
    """``text`` cut in front of spaces between letters, ``PIECE`` characters or a little more each."""
    pieces, start = [], 0
    while match := _CUT.search(text, start + PIECE):
        pieces.append(text[start : match.start()])
        start = match.start()
    return [*pieces, text[start:]] if text[start:] else pieces
