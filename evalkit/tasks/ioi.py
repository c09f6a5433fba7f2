"""Indirect object identification: "... Mary and John ..., John gave a lamp to" asks for Mary.

1. A sentence frame puts two names into its first clause; the second clause repeats one of them, the subject S, and breaks off
   before the other, the indirect object IO. Each frame comes in two orders: ABBA (IO first, then S) and BABA (S first).
2. Frame, order, names, place and object are drawn by seed; names are single tokens under the model's tokenizer. Pairs are drawn
   for three arms in turn (``tasks.base``). The names that a pair exchanges are dealt, so that each comes as often.
3. The target prompt differs in what the counterfactual says: "io" puts a third name in the indirect object's place (the
   paper's: one token differs), "s" changes both mentions of the subject, "abc" takes three unrelated names, so that nobody is
   named twice and neither name is the answer.

Task: Wang et al. 2022 (arXiv 2211.00593); the "io" pairs: Cunningham et al. 2023 (arXiv 2309.08600), section 4 and appendix F.
The frames, names, places and objects are evalkit's own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from evalkit.errors import CorpusError, SuiteError
from evalkit.tasks.base import TASKS, Deck, Pairs, PairSpec, Source, Tokenise, arms, make_pairs, single_token

FRAMES = (
    "Late in the afternoon {x} and {y} walked over to the {place}, and {s} handed a {object} to",
    "Once {x} and {y} had reached the {place}, {s} passed a {object} to",
    "It rained all day, so {x} and {y} stayed at the {place} until {s} lent a {object} to",
    "While {x} and {y} were busy at the {place}, {s} offered a {object} to",
    "As {x} and {y} were planning a trip to the {place}, {s} wanted to give a {object} to",
    "Because {x} and {y} had quarrelled on the way to the {place}, {s} decided to bring a {object} to",
    "Yesterday {x} and {y} discovered a {object} behind the {place}, and {s} gave it to",
    "This morning {x} and {y} picked up a {object} at the {place}, and later {s} gave it to",
    "On the train to the {place} {x} and {y} shared a seat, and {s} showed a {object} to",
    "After breakfast {x} and {y} set off for the {place}, where {s} sold a {object} to",
    "Both {x} and {y} loved the {place}, and on the last evening {s} presented a {object} to",
    "Near the {place} {x} and {y} had kept a {object}, which {s} now sent back to",
    "All week {x} and {y} had cleaned the {place}, and in the end {s} promised a {object} to",
    "The {place} was crowded when {x} and {y} came in, so {s} quickly gave the {object} to",
    "At the {place} {x} and {y} laughed for hours, and then {s} threw a {object} to",
)
"""{x} and {y} are the names of the first clause in order, {s} the subject of the second."""

ORDERS = ("abba", "baba")
"""Order of the names: indirect object, subject, subject, [indirect object]; or subject, indirect object, subject, [...]."""

PLACES = ("library", "harbor", "museum", "bakery", "market", "farm", "cinema", "castle", "stadium", "temple", "lake", "hotel",
          "factory", "theater", "beach", "village")  # fmt: skip

OBJECTS = ("lamp", "blanket", "ticket", "letter", "coat", "sandwich", "notebook", "watch", "pencil", "map", "candle", "flower",
           "mirror", "guitar", "camera", "bottle")  # fmt: skip

NAMES = (
    "Adam", "Alan", "Albert", "Alex", "Alice", "Amanda", "Amy", "Andrea", "Andrew", "Angela", "Anna", "Anne", "Anthony", "Arthur",
    "Barbara", "Ben", "Brian", "Bruce", "Carl", "Carol", "Caroline", "Catherine", "Charles", "Charlotte", "Chris", "Christine",
    "Claire", "Clara", "Colin", "Daniel", "David", "Dennis", "Diana", "Donald", "Dorothy", "Douglas", "Edward", "Elizabeth",
    "Ellen", "Emily", "Emma", "Eric", "Eva", "Frances", "Frank", "Fred", "Gary", "George", "Grace", "Hannah", "Harold", "Harry",
    "Helen", "Henry", "Howard", "Hugh", "Ian", "Jack", "Jacob", "James", "Jane", "Janet", "Jason", "Jean", "Jennifer", "Jessica",
    "Jim", "Joan", "John", "Jonathan", "Joseph", "Joshua", "Julia", "Julie", "Karen", "Kate", "Keith", "Kelly", "Kevin", "Laura",
    "Leo", "Linda", "Lisa", "Louis", "Louise", "Lucy", "Maria", "Margaret", "Marie", "Martha", "Martin", "Mary", "Matthew",
    "Michael", "Michelle", "Nancy", "Neil", "Nicholas", "Nick", "Oliver", "Oscar", "Pamela", "Patricia", "Paul", "Peter",
    "Philip", "Rachel", "Ralph", "Rebecca", "Richard", "Robert", "Roger", "Ronald", "Rose", "Ruth", "Sally", "Sam", "Sandra",
    "Sarah", "Scott", "Sharon", "Simon", "Sophie", "Stephen", "Steve", "Steven", "Stuart", "Susan", "Thomas", "Tim", "Tom",
    "Tony", "Victor", "Victoria", "Virginia", "Walter", "Wendy", "William",
)  # fmt: skip
"""Common English first names; those that are several tokens under the model's tokenizer are left out when names are drawn."""

COUNTERFACTUALS = ("io", "s", "abc")


@TASKS.register("ioi")
def ioi(
    tokenise: Tokenise,
    n: int,
    seed: int,
    *,
    counterfactual: Literal["io", "s", "abc"] = "io",
    orders: Sequence[str] = ORDERS,
) -> Pairs:
    """``n`` pairs of IOI prompts.

    ``wrong`` is S. ``target_answer`` is the new IO for "io", IO for "s", and the name in IO's place for "abc".

    Args:
        counterfactual: what the target prompt changes: "io", "s" or "abc".
        orders: orders of the names to draw from: "abba", "baba".

    Raises:
        SuiteError: an unknown counterfactual or order.
        CorpusError: fewer than ten names are single tokens.
    """
    if counterfactual not in COUNTERFACTUALS:
        raise SuiteError(
            f"there is no counterfactual '{counterfactual}'", where="counterfactual", fix=f"use {', '.join(COUNTERFACTUALS)}"
        )
    if not orders or any(order not in ORDERS for order in orders):
        raise SuiteError(f"the orders are {', '.join(ORDERS)}, not {list(orders)!r}", where="orders", fix="use one or both")
    names = single_token(tokenise, NAMES)
    if len(names) < 10:
        raise CorpusError(
            f"{len(names)} of {len(NAMES)} first names are single tokens under this tokenizer, 10 are needed",
            where="the task 'ioi'",
            fix="use another task or a model with a larger vocabulary",
        )
    draw = random.Random(f"ioi {seed}")
    specs = []
    stocks = arms(FRAMES, names, draw)
    decks = [Deck(stock.words, draw) for stock in stocks]
    for number in range(n):
        arm = number % len(stocks)
        frame, order = draw.choice(stocks[arm].sentences), draw.choice(list(orders))
        place, thing = draw.choice(PLACES), draw.choice(OBJECTS)
        if counterfactual == "abc":
            io, s, other, second, third = decks[arm].deal(5)
        else:
            one, other = decks[arm].deal(2)  # the names that differ between base and target
            two, second, third = draw.sample([name for name in stocks[arm].words if name not in (one, other)], 3)
            io, s = (one, two) if counterfactual == "io" else (two, one)

        # names of the target prompt: indirect object, subject of the first clause, subject of the second
        new = {"io": (other, s, s), "s": (io, other, other), "abc": (other, second, third)}[counterfactual]
        base, target = (
            frame.format(x=left if order == "abba" else right, y=right if order == "abba" else left, s=acting, place=place,
                         object=thing)
            for left, right, acting in ((io, s, s), new)
        )  # fmt: skip
        source = Source(arm, frame, tuple(sorted({io, s, *new})))
        specs.append(PairSpec(base, target, f" {io}", f" {new[0]}", f" {s}", source))
    return make_pairs(tokenise, specs, "the task 'ioi'")
