"""The criterion by which features tell a consistent story: it stands in the suite file, before there is anything to see.

A suite's name is followed by a hash of its file, so that a run shows which criterion it was made under. What it is judged on are
the suite's seed and scoring text: another seed divides the documents, trains and draws features anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from evalkit.util.settings import AtLeast0, Settings, Share


@dataclass(frozen=True)
class StoriesConfig(Settings):
    """Settings of [stories]: when the sides of a feature agree (``evalkit table stories``). Without the section, these values."""

    least_share: Share = 0.5
    """inputs: share that one token class has at least of the mean tenth of the feature's range."""
    times_null: AtLeast0 = 2.0
    """inputs: how many times the share on tokens drawn at random."""
    least_repeated: Share = 0.2
    """effect: share of the change in one half of the contexts that the other half foretells, at least."""
    least_same: Share = 0.5
    """effect: share of the contexts that are read at a token of the inputs' main class, at least."""
    corrected: bool = False
    """effect: the loss of the next token counts only where it is significant after Holm's correction for all features studied."""
