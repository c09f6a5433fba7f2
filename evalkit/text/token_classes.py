"""Which tokens count as the same: classes of tokens, for shares that do not split one word into its spellings.

1. Spaces around a token and case are dropped: ' The', 'the' and 'THE' are one class.
2. A token of digits is a number, whatever its value; one of white space alone is a space.
3. Everything else is itself: each punctuation mark and each piece of a word is its own class.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from jaxtyping import Int

NUMBER, SPACE = "number", "white space"


class Strings(Protocol):
    """A language model, as far as its tokens' texts go."""

    def token_strings(self, ids: list[int]) -> list[str]:
        """One string for each token."""
        ...


def token_class(token: str) -> str:
    """The class of one token's text."""
    bare = token.strip()
    if not bare:
        return SPACE
    return NUMBER if bare.isdigit() else bare.casefold()


class Vocabulary:
    """Classes of the tokens that occur in a text.

    Attributes:
        names: class names; their places are the classes' numbers.
    """

    def __init__(self, model: Strings, tokens: Int[np.ndarray, "*text"]) -> None:
        ids = np.unique(tokens)
        kinds = [token_class(text) for text in model.token_strings(ids.tolist())]
        self.names = list(dict.fromkeys(kinds))
        number = {name: place for place, name in enumerate(self.names)}
        self._of = np.full(int(ids.max(initial=-1)) + 1, -1, dtype=np.int64)
        self._of[ids] = [number[kind] for kind in kinds]

    def classes(self, tokens: Int[np.ndarray, " A"]) -> Int[np.ndarray, " A"]:
        """The class of each token of the text."""
        return self._of[tokens]
