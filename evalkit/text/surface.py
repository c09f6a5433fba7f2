"""What a count tells about a text before anything is understood: its length, capitals, digits and marks.

1. ``counts`` of a text: tokens, characters, words, capitals, digits, and one count for each class of marks (``MARKS``).
2. Letters outside ASCII (accents, umlauts) are a class of marks as well: they tell one language from another.
3. ``separation`` of two sets of texts: for each count its AUROC, turned so that it is at least 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from evalkit.statistics import auroc

MARKS = {
    "stops": ".!?¿¡…",
    "commas": ",;:",
    "quotes": "\"'`’‘“”„«»",
    "brackets": "()[]{}<>",
    "dashes": "-–—_",
    "signs": "=+*/\\|&#%$@^~",
}
"""Classes of marks. A sign in none of them is counted among the characters only."""
NAMES = ("tokens", "characters", "words", "capitals", "digits", *MARKS, "accents")
"""The counts, in the order of ``counts``."""


def counts(texts: Sequence[str], tokens: Sequence[int]) -> Float[np.ndarray, "N K"]:
    """The counts of ``NAMES`` for each text.

    Args:
        texts: N texts.
        tokens: how many tokens each of them has.
    """
    rows = [
        [
            length,
            len(text),
            len(text.split()),
            sum(sign.isupper() for sign in text),
            sum(sign.isdigit() for sign in text),
            *(sum(sign in marks for sign in text) for marks in MARKS.values()),
            sum(sign.isalpha() and not sign.isascii() for sign in text),
        ]
        for text, length in zip(texts, tokens, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(len(texts), len(NAMES))


def separation(present: Float[np.ndarray, "N K"], absent: Float[np.ndarray, "M K"]) -> dict[str, float]:
    """By count: the AUROC with which it separates two sets of texts, whichever of them has more.

    Args:
        present, absent: ``counts`` of either set; neither is empty.
    """
    label = np.arange(len(present) + len(absent)) < len(present)
    found = {}
    for name, column in zip(NAMES, np.concatenate([present, absent]).T, strict=True):
        value = auroc(label, column)
        assert value is not None
        found[name] = max(value, 1 - value)
    return found
