"""Greater-than: "The war lasted from the year 1734 to the year 17" asks for a later year of that century.

1. A sentence names a year of a century and breaks off behind the century's two digits of a second year.
2. The base prompt's year is early in its century (decade 2 to 4), the target prompt's late (decade 6 or 7); the year's last
   digit is the same, so that one token differs whether the tokenizer has digits or pairs of digits.
3. Pairs are drawn for three arms in turn (``tasks.base``), with nouns for names; years are drawn for all alike.
4. The right answer is a year of the decade after, which in the base prompt's case the target prompt rules out; the wrong one a
   year of the decade before, which both rule out.

Task: Hanna, Liu and Variengien 2023 (arXiv 2305.00586). The sentences are evalkit's own.
"""

from __future__ import annotations

import random

from evalkit.errors import CorpusError
from evalkit.tasks.base import TASKS, Deck, Pairs, PairSpec, Source, Tokenise, arms, make_pairs, next_token

SENTENCES = (
    "The {noun} lasted from the year {year} to the year {century}",
    "The {noun} began in the year {year} and ended in the year {century}",
    "Records of the {noun} run from the year {year} until the year {century}",
    "The {noun} was planned in the year {year} and completed in the year {century}",
    "He followed the {noun} from the year {year} up to the year {century}",
)

NOUNS = ("war", "siege", "project", "treaty", "expedition", "reform", "alliance", "rebellion", "trial", "journey", "drought",
         "dispute", "building", "survey")  # fmt: skip

CENTURIES = ("12", "13", "14", "15", "16", "17", "18")


@TASKS.register("greater_than")
def greater_than(tokenise: Tokenise, n: int, seed: int) -> Pairs:
    """``n`` pairs of unfinished spans of years.

    Raises:
        CorpusError: the tokenizer cuts years in a way that leaves no digit to ask for.
    """
    draw = random.Random(f"greater_than {seed}")
    stocks = arms(SENTENCES, NOUNS, draw)
    decks = [Deck(stock.words, draw) for stock in stocks]
    specs: list[PairSpec] = []
    for _ in range(200 * n):
        if len(specs) == n:
            break
        arm = len(specs) % len(stocks)
        (noun,) = decks[arm].deal(1)
        sentence, century = draw.choice(stocks[arm].sentences), draw.choice(CENTURIES)
        early, late, unit = draw.randint(2, 4), draw.randint(6, 7), draw.randint(1, 8)
        base, target = (sentence.format(noun=noun, year=f"{century}{decade}{unit}", century=century) for decade in (early, late))
        spec = PairSpec(base, target, f"{early + 1}{unit}", f"{late + 1}{unit}", f"{early - 1}{unit}",
                        Source(arm, sentence, (noun,)))  # fmt: skip
        if _usable(tokenise, spec):
            specs.append(spec)
    if len(specs) < n:
        raise CorpusError(
            "this tokenizer cuts years so that the second one cannot be asked for digit by digit",
            where="the task 'greater_than'",
            fix="use another task",
        )
    return make_pairs(tokenise, specs, "the task 'greater_than'")


def _usable(tokenise: Tokenise, spec: PairSpec) -> bool:
    """Whether both prompts are as long and each answer starts with a token of its own behind the century."""
    if len(tokenise(spec.base)) != len(tokenise(spec.target)):
        return False
    answers = [next_token(tokenise, spec.base, text) for text in (spec.base_answer, spec.wrong)]
    return None not in [*answers, next_token(tokenise, spec.target, spec.target_answer)] and answers[0] != answers[1]
