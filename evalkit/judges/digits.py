"""From the probabilities of the next token to an expected activation (Bills et al. 2023, the all-at-once simulator).

1. Prompts state activations as one digit, 0 to 9: one token for every tokenizer that splits numbers into digits, where "10" would
   begin like "1".
2. At a slot keep the candidates "0" to "9", with and without surrounding spaces, and add up what belongs to one digit.
3. ``mass`` is their sum before renormalising. The expectation over the renormalised digits times 10/9 is the activation on the
   0-10 scale of the judge contract.
4. A slot where no digit is among the returned alternatives has no expectation: its simulation failed, and it is not a zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TOP = 9
"""The strongest activation a prompt can show."""
SCALE = 10 / TOP
"""From digits to the 0-10 scale of the judge contract."""
DIGITS = tuple(str(d) for d in range(TOP + 1))


class Slot(NamedTuple):
    """What one slot says."""

    expected: float
    """Expected activation on the 0-10 scale."""
    mass: float
    """Probability that fell on digits before renormalising."""


def digit_weights(top: Mapping[str, float]) -> list[float]:
    """Probability of each digit from token strings and their log probabilities."""
    weights = [0.0] * len(DIGITS)
    for token, logprob in top.items():
        word = token.strip(" \u0120\u2581")  # two vocabularies show a leading space as a mark of their own
        if word in DIGITS:
            weights[int(word)] += math.exp(logprob)
    return weights


def read_slot(top: Mapping[str, float]) -> Slot | None:
    """Expected activation from token strings and their log probabilities; None where no digit is among them."""
    weights = digit_weights(top)
    mass = sum(weights)
    if mass <= 0:
        return None
    expected = sum(digit * weight for digit, weight in enumerate(weights)) / mass
    return Slot(round(expected * SCALE, 6), round(min(mass, 1.0), 6))


def as_mapping(top: Any) -> dict[str, float]:
    """Alternatives as {token: logprob}, from either form servers use: a mapping, or a list of {token, logprob}.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(top, Mapping):
        return {str(token): float(logprob) for token, logprob in top.items()}
    if isinstance(top, Sequence) and not isinstance(top, str):
        merged: dict[str, float] = {}
        for entry in top:
            if not isinstance(entry, Mapping) or "token" not in entry or "logprob" not in entry:
                raise ValueError("an alternative without 'token' and 'logprob'")
            token, logprob = str(entry["token"]), float(entry["logprob"])
            merged[token] = max(logprob, merged.get(token, -math.inf))
        return merged
    raise ValueError(f"alternatives are a {type(top).__name__}")
