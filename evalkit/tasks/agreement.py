"""Subject-verb agreement across a distractor: "The keys near the cabinet" asks for "are".

1. A subject noun, singular or plural, is followed by a prepositional phrase with another noun; the verb agrees with the first.
2. The target prompt has the subject in the other number; every noun used is one token in both numbers, so one token differs.
3. Pairs are drawn for three arms in turn (``tasks.base``): openings are their sentences, subjects their names.
4. The right answer is the verb's form for the subject, the wrong one the other form.

Task: Linzen, Dupoux and Goldberg 2016 (arXiv 1611.01368); as a patching task in Marks et al. 2024 (arXiv 2403.19647). The words
and sentences are evalkit's own.
"""

from __future__ import annotations

import random
from typing import Literal

from evalkit.errors import CorpusError, SuiteError
from evalkit.tasks.base import TASKS, Deck, Pairs, PairSpec, Source, Tokenise, arms, make_pairs, single_token

SUBJECTS = ("author", "doctor", "teacher", "farmer", "actor", "lawyer", "student", "driver", "writer", "painter", "manager",
            "soldier", "singer", "dancer", "pilot", "key", "book", "car", "letter", "picture", "door", "bird", "dog", "tree",
            "house", "boat", "table", "phone")  # fmt: skip

OTHERS = ("cabinet", "window", "garden", "bridge", "river", "tower", "forest", "station", "church", "mountain", "field", "shop",
          "cabinets", "windows", "gardens", "bridges", "rivers", "towers", "forests", "stations", "churches",
          "mountains")  # fmt: skip

PREPOSITIONS = ("near", "behind", "beside", "by", "opposite", "beyond")

OPENINGS = ("The", "We noticed that the", "Everyone agreed that the", "In the evening the", "I think the")

VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
"""Singular and plural."""

DISTRACTORS = ("any", "same", "other")


@TASKS.register("agreement")
def agreement(tokenise: Tokenise, n: int, seed: int, *, distractor: Literal["any", "same", "other"] = "any") -> Pairs:
    """``n`` pairs of sentences that break off before the verb.

    Args:
        distractor: number of the second noun: "any", or the "same" as, or "other" than the base prompt's subject.

    Raises:
        SuiteError: an unknown ``distractor``.
        CorpusError: fewer than two nouns are a single token in both numbers.
    """
    if distractor not in DISTRACTORS:
        raise SuiteError(f"there is no distractor '{distractor}'", where="distractor", fix=f"use {', '.join(DISTRACTORS)}")
    plurals = set(single_token(tokenise, [f"{word}s" for word in SUBJECTS]))
    subjects = [word for word in single_token(tokenise, SUBJECTS) if f"{word}s" in plurals]
    if len(subjects) < 2:
        raise CorpusError(
            "fewer than two nouns are a single token in both numbers under this tokenizer",
            where="the task 'agreement'",
            fix="use another task or a model with a larger vocabulary",
        )
    draw = random.Random(f"agreement {seed}")
    stocks = arms(OPENINGS, subjects, draw)
    decks = [Deck(stock.words, draw) for stock in stocks]
    specs = []
    for number in range(n):
        arm = number % len(stocks)
        (subject,) = decks[arm].deal(1)
        plural = draw.random() < 0.5
        allowed = [word for word in OTHERS if distractor == "any" or (word.endswith("s") == plural) == (distractor == "same")]
        opening, preposition, other = draw.choice(stocks[arm].sentences), draw.choice(PREPOSITIONS), draw.choice(allowed)
        forms = draw.choice(VERBS)
        base, target = (f"{opening} {subject}{'s' * many} {preposition} the {other}" for many in (plural, not plural))
        right, wrong = forms[plural], forms[not plural]
        source = Source(arm, opening, (subject,))
        specs.append(PairSpec(base, target, f" {right}", f" {wrong}", f" {wrong}", source))
    return make_pairs(tokenise, specs, "the task 'agreement'")
