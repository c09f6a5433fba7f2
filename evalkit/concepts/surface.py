"""What a count tells about a text before anything is understood: its length, capitals, digits and marks.

1. ``counts`` of a text: tokens, characters, words, capitals, digits, and one count for each class of marks (``MARKS``).
2. Letters outside ASCII (accents, umlauts) are a class of marks as well: they tell one language from another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

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
