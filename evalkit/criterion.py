"""The criterion by which features tell a consistent story: it stands in the suite file, before there is anything to see.

A suite's name is followed by a hash of its file, so that a run shows which criterion it was made under. What it is judged on are
the suite's seed and scoring text: another seed divides the documents, trains and draws features anew.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoriesConfig:
    """Settings of [stories]: when the sides of a feature agree (``evalkit table stories``). Without the section, these values."""

    least_share: float = 0.5
    """inputs: share that one token class has at least of the mean tenth of the feature's range."""
    times_null: float = 2.0
    """inputs: how many times the share on tokens drawn at random."""
    least_repeated: float = 0.2
    """effect: share of the change in one half of the contexts that the other half foretells, at least."""
    least_same: float = 0.5
    """effect: share of the contexts that are read at a token of the inputs' main class, at least."""
    corrected: bool = False
    """effect: the loss of the next token counts only where it is significant after Holm's correction for all features studied."""

    def __post_init__(self) -> None:
        for key in ("least_share", "least_repeated", "least_same"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} = {getattr(self, key):g} is not a share: choose 0 to 1")
        if self.times_null < 0:
            raise ValueError(f"times_null = {self.times_null:g} is negative: choose 0 or more")
