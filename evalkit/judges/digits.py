"""From the probabilities of the next token to an expected activation (Bills et al. 2023, the all-at-once simulator).

1. Prompts state activations as one digit, 0 to 9: one token for every tokenizer that splits numbers into digits, where "10" would
   begin like "1".
2. At a slot keep the candidates "0" to "9", with and without surrounding spaces, and add up what belongs to one digit.
3. ``mass`` is their sum before renormalising. The expectation over the renormalised digits times 10/9 is the activation on the
   0-10 scale of the judge contract.
4. Endpoints list a few alternatives, so digits may be missing from them. ``unseen`` bounds the probability those have: what the
   listed alternatives leave over, and for each digit no more than the least likely alternative, once for either spelling.
5. Where the digits seen are less probable than those unseen could be, the slot has no expectation: its token is missing, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TOP = 9
"""The strongest activation a prompt can show."""
SCALE = 10 / TOP
"""From digits to the 0-10 scale of the judge contract."""
WIDE = 500
"""Alternatives that are asked for where an endpoint gives so many: digits that are not likely are among them too."""
SPELLINGS = 2
"""Tokens a digit can have in one vocabulary: with a space before it and without."""
ROUNDING = 0.01
"""By how much probabilities may exceed 1: servers compute in half precision."""
DIGITS = tuple(str(d) for d in range(TOP + 1))


class Slot(NamedTuple):
    """What one slot says."""

    expected: float | None
    """Expected activation on the 0-10 scale, over the digits seen; None where they are too improbable to say it."""
    mass: float
    """Probability of the digits seen before renormalising."""
    unseen: float
    """Bound: the digits that are not listed have at most this probability, all together."""


class Reading(NamedTuple):
    """A distribution over digits, as far as the alternatives show it."""

    weights: list[float]
    """Probability of each digit, 0 where it is not listed."""
    mass: float
    """Their sum, at most 1."""
    unseen: float
    """At most this probability is on digits that are not listed."""

    @property
    def expected(self) -> float | None:
        """Expected digit over the digits seen; None where those not listed could be the more probable ones."""
        # the rounding of 1 - sum must not decide where both are equal
        if self.mass <= 0 or self.mass + 1e-9 < self.unseen:
            return None
        return math.fsum(digit * weight for digit, weight in enumerate(self.weights)) / math.fsum(self.weights)


def digit_weights(top: Mapping[str, float]) -> list[float]:
    """Probability of each digit from token strings and their log probabilities."""
    weights = [0.0] * len(DIGITS)
    for token, logprob in top.items():
        digit = _digit(token)
        if digit is not None:
            weights[digit] += math.exp(logprob)
    return weights


def _digit(token: str) -> int | None:
    word = token.strip(" \u0120\u2581")  # two vocabularies show a leading space as a mark of their own
    return int(word) if word in DIGITS else None


def read_digits(top: Mapping[str, float], count: int = len(DIGITS)) -> Reading:
    """The digits below ``count`` among token strings with their log probabilities.

    A digit counts as listed in either spelling, with a space before it or without.
    """
    weights = digit_weights(top)[:count]
    left = max(0.0, 1.0 - math.fsum(math.exp(logprob) for logprob in top.values()))
    # What is not listed is no likelier than the k-th likeliest token. Two kinds are listed however unlikely they are: digits that
    # were asked for by name, and the prompt's own token at that place. So the least is taken over the others but one.
    others = sorted(math.exp(logprob) for token, logprob in top.items() if _digit(token) is None)
    least = others[1] if len(others) > 1 else 1.0
    hidden = sum(weight == 0 for weight in weights)
    return Reading(weights, min(math.fsum(weights), 1.0), min(left, hidden * SPELLINGS * least))


def read_slot(top: Mapping[str, float]) -> Slot:
    """Expected activation from token strings and their log probabilities."""
    found = read_digits(top)
    expected = None if found.expected is None else round(found.expected * SCALE, 6)
    return Slot(expected, rounded(found.mass), rounded(found.unseen))


def rounded(probability: float) -> float:
    """Six digits that count: a bound is never rounded to 0."""
    return float(f"{probability:.6g}")


def as_mapping(top: Any) -> dict[str, float]:
    """Alternatives as {token: logprob}, from either form servers use: a mapping, or a list of {token, logprob}.

    Raises:
        ValueError: it is neither, or what it holds are no log probabilities.
    """
    if isinstance(top, Mapping):
        pairs = list(top.items())
    elif isinstance(top, Sequence) and not isinstance(top, str):
        if not all(isinstance(entry, Mapping) and "token" in entry and "logprob" in entry for entry in top):
            raise ValueError("an alternative without 'token' and 'logprob'")
        pairs = [(entry["token"], entry["logprob"]) for entry in top]
    else:
        raise ValueError(f"alternatives are a {type(top).__name__}")
    merged: dict[str, float] = {}
    for token, logprob in pairs:
        merged[str(token)] = max(float(logprob), merged.get(str(token), -math.inf))
    # written so that NaN is refused too
    if not all(logprob <= ROUNDING for logprob in merged.values()) or math.fsum(map(math.exp, merged.values())) > 1 + ROUNDING:
        raise ValueError("its alternatives are no log probabilities: they are above 0, or their probabilities sum to more than 1")
    return merged
