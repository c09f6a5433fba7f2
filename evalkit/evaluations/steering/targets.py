"""Features that are steered or clamped, and the words that show whether the model names them.

1. The best feature of each concept is found as the evaluation 'concepts' finds it, on the same half of the texts; its words are
   the concept's. Other features' words are the tokens they fire on most. The maximum of a feature is its largest code over the
   scoring text and over all texts of its concept.
2. The words' log-probability is that of the tokens that are one of them, with or without a space or a capital. A word cut in
   pieces counts for nothing: its first piece ("a" of "avec") says little. First pieces count where no word is a token.
3. A text names a feature where one of its words is in it. Only words of three letters or more count: nearly every text holds
   some digit, mark or "in". Nor do tokens count that are mostly pieces of longer words where the feature fires on them. A
   feature without words that count has no such number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int

from evalkit.concepts.loading import Concept
from evalkit.errors import UnitFailed
from evalkit.evaluations.base import Bench
from evalkit.evaluations.concepts.pooling import compared, pooled
from evalkit.evaluations.concepts.search import divided, halves, search
from evalkit.evaluations.concepts.texts import Texts, texts_of
from evalkit.evaluations.sampling import choose_features, feature_codes
from evalkit.text.words import word_pattern

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary

STRONGEST = 50
"""Firings among which a feature's words are looked for."""
WORDS = 3
LETTERS = 3
"""Letters of a word that counts as naming a feature."""
TEXTS = 60
"""Most texts of either kind of a concept without pairs; as 'concepts' has it by default."""


class Target(NamedTuple):
    """A feature that is steered or clamped."""

    feature: int
    sign: int
    maximum: float
    """Largest code, of the tail that is meant, over the scoring text and the texts of its concept; 0 where it fires nowhere."""
    words: tuple[str, ...]
    naming: tuple[str, ...]
    """Those of the words that name it where they are in a text."""
    about: str
    """What the judge is asked about."""
    concept: str
    """Whose best feature it is; '' where it was named or drawn."""
    item: int
    """Place of the concept among those asked for, or the feature: what scores are counted by."""


class _Named(NamedTuple):
    """A target before it is looked at in the scoring text; fields as there."""

    feature: int
    sign: int
    words: tuple[str, ...]
    about: str
    concept: str
    item: int
    maximum: float
    """Largest code over the concept's texts; 0 without a concept."""


def targets_of(
    bench: Bench,
    dictionary: Dictionary,
    concepts: Sequence[Concept],
    ids: Sequence[int],
    features: int,
    least_windows: int,
) -> tuple[list[Target], list[Texts]]:
    """The best feature of each concept, and the texts of every concept it was looked for in; without concepts, features by number
    or drawn (``choose_features``).

    Raises:
        UnitFailed: no concept has words and enough texts; or as ``choose_features``.
    """
    score = bench.score()
    named: list[_Named] = []
    read = [texts_of(bench, concept, TEXTS) for concept in concepts]
    for place, (concept, texts) in enumerate(zip(concepts, read, strict=True)):
        held = halves(texts.label, texts.group, bench.seed)
        if texts.enough and divided(texts.label, held) and concept.words:
            values = pooled(dictionary, texts.x, texts.keep, compared(texts.keep, texts.label, texts.group))
            (best,) = search(values, texts.label, held, texts.group, 1)
            feature, sign = int(values.feature[best.candidate]), int(values.sign[best.candidate])
            # the scoring text may hold none of it (French, code), or a chance firing far below what the concept brings about
            largest = float(pooled(dictionary, texts.x, texts.keep).value[:, best.candidate].max())
            named.append(_Named(feature, sign, concept.words, concept.asked, concept.name, place, largest))
    if concepts and not named:
        failed = sum(texts.failed for texts in read)
        what = "none of the concepts has both words and enough texts"
        what += f"; {failed} calls to label texts failed" if failed else ""
        raise UnitFailed(what, where="[[evaluation]] steering", fix="give their files words, and pairs or more scoring text")
    if not concepts:
        drawn = choose_features(dictionary, score, ids=ids, features=features, least_windows=least_windows, seed=bench.seed)
        named = [_Named(feature, 1, (), "", "", feature, 0.0) for feature in drawn]
    codes = feature_codes(dictionary, score, [one.feature for one in named])  # (N, T, S)
    targets = []
    for place, one in enumerate(named):
        own = codes[..., place] * one.sign
        said, whole = (one.words, one.words) if one.words else fired_words(bench, own, score.tokens)
        about = one.about or f"the words {', '.join(said)}"
        maximum = max(float(own.max()), one.maximum, 0.0)
        targets.append(Target(one.feature, one.sign, maximum, said, long_enough(whole), about, one.concept, one.item))
    return targets, read


def fired_words(
    bench: Bench, codes: Float[torch.Tensor, "N T"], tokens: Int[torch.Tensor, "N T"]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tokens that a feature fires on most, spaces cut off, and those of them that mostly are whole words there."""
    values, places = codes.flatten().topk(min(STRONGEST, codes.numel()))
    counts: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for place in places[values > 0].tolist():
        window, position = divmod(place, tokens.shape[1])
        before, own, after = (
            bench.model.token_strings(tokens[window, at : at + 1].tolist())[0] if 0 <= at < tokens.shape[1] else ""
            for at in (position - 1, position, position + 1)
        )
        if word := own.strip():
            counts[word] += 1
            begins, ends = own[0].isspace() or not before[-1:].isalpha(), own[-1].isspace() or not after[:1].isalpha()
            whole[word] += begins and ends
    words = tuple(word for word, _ in counts.most_common(WORDS))
    return words, tuple(word for word in words if 2 * whole[word] > counts[word])


def long_enough(words: Sequence[str]) -> tuple[str, ...]:
    """Those of the words that have at least ``LETTERS`` letters."""
    return tuple(word for word in words if sum(map(str.isalpha, word)) >= LETTERS)


def word_ids(bench: Bench, words: Sequence[str]) -> list[int]:
    """Tokens that are one of the words, with or without a space or a capital; first tokens where none is a whole word.

    A word is looked at behind another one and behind a line end: alone, tokenizers that begin texts with a space would show but
    one of the two forms, or a bare space in front.
    """
    forms = [form for word in words for form in (word, word.capitalize())]
    found = [ids for form in forms for ids in (_behind(bench, "and", f" {form}"), _behind(bench, "\n", form)) if ids]
    return sorted({ids[0] for ids in [ids for ids in found if len(ids) == 1] or found})


def _behind(bench: Bench, before: str, text: str) -> list[int]:
    """Tokens of ``text`` behind ``before``; none where the tokenizer joins the two. A bare space in front counts for nothing."""
    left, whole = bench.model.tokenise(before), bench.model.tokenise(before + text)
    ids = whole[len(left) :] if whole[: len(left)] == left else []
    while ids and not bench.model.token_strings(ids[:1])[0].strip():
        ids = ids[1:]
    return ids


def names(text: str, words: Sequence[str]) -> bool | None:
    """Whether one of the words is in the text, as concepts' words are (``word_pattern``); None without words."""
    return word_pattern(words).search(text) is not None if words else None
