"""What judge calls cost, and the budget that stops before it is exceeded.

1. Before a request is sent, its worst case is reserved: a token for every two bytes of prompt (text in English has four, tables
   of single tokens about three) and all completion tokens it may use. A reservation that does not fit raises and nothing is sent.
2. After the answer, the reservation is replaced by the usage the endpoint reported.
3. A request that may have been charged without an answer (a time-out, a lost connection) keeps its worst case.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

from evalkit.errors import BudgetReached


class Usage(NamedTuple):
    """Tokens of one or more calls."""

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt + self.completion


class Prices(NamedTuple):
    """Dollars for a million tokens; None where unknown."""

    prompt: float | None = None
    completion: float | None = None

    def dollars(self, usage: Usage) -> float | None:
        """What ``usage`` costs; None where a price is unknown."""
        if self.prompt is None or self.completion is None:
            return None
        return (usage.prompt * self.prompt + usage.completion * self.completion) / 1e6


def most_tokens(text: str) -> int:
    """Tokens ``text`` takes at the very most, for reserving: a token for every 2 bytes of UTF-8."""
    return math.ceil(len(text.encode("utf-8", "replace")) / 2) + 1


class Budget:
    """Tokens and dollars that may still be spent. Thread-safe.

    Args:
        tokens: most tokens in all; 0 means no limit.
        dollars: most dollars in all; 0 means no limit.
        prices: used for dollars.
    """

    def __init__(self, tokens: int = 0, dollars: float = 0.0, prices: Prices | None = None) -> None:
        self.tokens, self.dollars, self.prices = tokens, dollars, prices or Prices()
        self._lock = threading.Lock()
        self._spent = Usage()
        self._reserved = Usage()

    @property
    def spent(self) -> Usage:
        """Tokens spent so far; reservations excluded."""
        return self._spent

    def reserve(self, worst: Usage) -> None:
        """Set ``worst`` aside for one request.

        Raises:
            BudgetReached: it does not fit; nothing is set aside.
        """
        with self._lock:
            after = Usage(
                self._spent.prompt + self._reserved.prompt + worst.prompt,
                self._spent.completion + self._reserved.completion + worst.completion,
            )
            money = self.prices.dollars(after)
            if self.tokens and after.total > self.tokens:
                self._stop(f"{self._spent.total:,} of {self.tokens:,} tokens are spent", worst, "budget_tokens")
            if self.dollars and money is not None and money > self.dollars:
                paid = self.prices.dollars(self._spent) or 0.0
                self._stop(f"{paid:.4f} of {self.dollars:.4f} dollars are spent", worst, "budget_dollars")
            self._reserved = Usage(self._reserved.prompt + worst.prompt, self._reserved.completion + worst.completion)

    @staticmethod
    def _stop(spent: str, worst: Usage, setting: str) -> None:
        raise BudgetReached(
            f"the judge budget is reached: {spent}, and the next request could take {worst.total:,} tokens",
            where=f"[judge] {setting}",
            fix=f"raise {setting} and run again; finished calls are kept and are not bought twice",
        )

    def settle(self, worst: Usage, used: Usage) -> None:
        """Replace the reservation ``worst`` by what was ``used``."""
        with self._lock:
            self._reserved = Usage(self._reserved.prompt - worst.prompt, self._reserved.completion - worst.completion)
            self._spent = Usage(self._spent.prompt + used.prompt, self._spent.completion + used.completion)
