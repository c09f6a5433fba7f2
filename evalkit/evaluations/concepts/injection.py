"""Does the feature of a concept know more than tokens: its top tokens are put into texts about other things.

1. The threshold is the value of the largest code that divides the first half best: highest mean of the two classes' right shares
   (Youden 1950), halfway between neighbouring values.
2. Top tokens are those at which the largest codes stand in the first half's texts that show the concept and reach the threshold:
   the ``TOP`` different ones with the largest codes.
3. Unrelated texts are the texts of the other packaged concepts that do not show theirs, as far as the feature stays below the
   threshold there. As many as asked are drawn.
4. Each gets one top token, in turn, in front of a word that is drawn. ``injected`` is the share that reach the threshold now.
5. ``recall`` is the share of the second half's texts with the concept that reach it. A feature with ``injected`` near ``recall``
   detects tokens wherever they stand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from evalkit.concepts.loading import FOLDER, LEAST_TEXTS, Concept, load_concept, packaged
from evalkit.evaluations.concepts.pooling import Values, codes_of
from evalkit.evaluations.concepts.texts import Texts, read_rows, texts_of

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary
    from evalkit.evaluations.base import Bench

TOP = 5
"""Most different tokens that are injected."""


class Injection(NamedTuple):
    """How one candidate answers to its top tokens in unrelated texts."""

    threshold: float
    tokens: list[str]
    """Top tokens, the largest code first; none where no text with the concept reaches the threshold."""
    recall: float
    """Share of the second half's texts with the concept that reach the threshold."""
    texts: int
    """Unrelated texts that got a token; 0 where there were too few or no token."""
    injected: float | None
    """Share of them that reach the threshold with it."""


def inject(
    bench: Bench,
    dictionary: Dictionary,
    concept: Concept,
    texts: Texts,
    values: Values,
    candidate: int,
    held: Bool[np.ndarray, " N"],
    most: int,
    seed: int,
) -> Injection:
    """The check for one candidate.

    Args:
        most: unrelated texts that get a token, at most.
    """
    codes = codes_of(dictionary, values, candidate, texts.x, texts.keep)
    top = largest(codes, texts.keep)
    level = threshold(top[~held], texts.label[~held])
    best: dict[int, float] = {}
    for row in np.flatnonzero(~held & texts.label & (top >= level)):
        at = int(np.where(texts.keep[row].numpy(), codes[row], -np.inf).argmax())
        token = texts.ids[row][at]
        best[token] = max(best.get(token, -np.inf), float(top[row]))
    tokens = sorted(best, key=lambda token: (-best[token], token))[:TOP]
    recall = float((top[held & texts.label] >= level).mean())
    found = Injection(level, bench.model.token_strings(tokens), recall, 0, None)
    rng = np.random.default_rng([seed, 13])
    quiet = [
        row
        for x, keep, rows in _unrelated(bench, concept, texts, most)
        for row, value in zip(rows, largest(codes_of(dictionary, values, candidate, x, keep), keep), strict=True)
        if value < level
    ]
    if not tokens or len(quiet) < LEAST_TEXTS:
        return found
    drawn = [quiet[n] for n in rng.permutation(len(quiet))[:most]]
    changed = [_with(bench, row, tokens[n % len(tokens)], rng) for n, row in enumerate(drawn)]
    x, keep = read_rows(bench, changed)
    after = largest(codes_of(dictionary, values, candidate, x, keep), keep)
    return found._replace(texts=len(drawn), injected=float((after >= level).mean()))


def threshold(value: Float[np.ndarray, " N"], label: Bool[np.ndarray, " N"]) -> float:
    """The value, halfway between two neighbours, at or above which the labels are separated best; above all where none is."""
    known = np.unique(value)
    if len(known) < 2:
        return float(np.nextafter(known[-1], np.inf))
    cuts = (known[1:] + known[:-1]) / 2
    right = [float((value[label] >= cut).mean() + (value[~label] < cut).mean()) for cut in cuts]
    return float(cuts[int(np.argmax(right))])


def largest(codes: Float[np.ndarray, "N T"], keep: Bool[torch.Tensor, "N T"]) -> Float[np.ndarray, " N"]:
    """Largest code over the kept tokens of each text; -inf where a text has none."""
    return np.asarray(np.where(keep.numpy(), codes, -np.inf).max(1))


def _unrelated(
    bench: Bench, concept: Concept, texts: Texts, most: int
) -> list[tuple[Float[torch.Tensor, "M T D"], Bool[torch.Tensor, "M T"], list[list[int]]]]:
    """Activations, kept positions and token ids of the other packaged concepts' texts without their concept."""
    own = set(texts.text)
    found = []
    for name in packaged():
        if name != concept.name:
            other = texts_of(bench, load_concept(FOLDER / f"{name}.toml"), most)
            rows = [n for n, text in enumerate(other.text) if not other.label[n] and text not in own]
            found.append((other.x[rows], other.keep[rows], [other.ids[n] for n in rows]))
    return found


def _with(bench: Bench, row: list[int], token: int, rng: np.random.Generator) -> list[int]:
    """``row`` with ``token`` in front of one of its words, not the first, behind the BOS where the model has one."""
    strings = bench.model.token_strings(row)
    begins = [at for at, text in enumerate(strings) if at > 0 and text[:1].isspace()] or [len(row)]
    at = int(rng.choice(begins))
    opening = [] if bench.model.bos is None else [bench.model.bos]
    return [*opening, *row[:at], token, *row[at:]][: bench.model.context]
