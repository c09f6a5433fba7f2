"""The section [training] of a suite: how its trainers are fed, saved and watched.

What changes the weights beside the settings of each dictionary is here too: ``stream``, its text and its buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from evalkit.util.settings import AtLeast0, Count, NotNegative, Settings


@dataclass(frozen=True)
class SessionConfig(Settings):
    """How the trained dictionaries of a suite are fed, saved and watched; the same for all of them."""

    removed: ClassVar[dict[str, str]] = {"stack": "dictionaries of one shape share their batches without it"}

    stream: bool = False
    """Feed activations straight from the language model through a bounded buffer, instead of writing those of the whole
    fitting text to disk first. For texts whose activations do not fit there."""
    stream_tokens: NotNegative = 0
    """Tokens of fitting text that are streamed; as many as [corpus] fit_tokens when 0. Baselines and evaluations use
    fit_tokens, which are the first of them."""
    buffer_mb: Count = 512
    """Memory in which streamed activations are shuffled, for each hook point. Where several are trained from one pass, the most
    that may wait, besides, for one that is behind the others; what has no room there is run through the language model again."""
    shards: bool = False
    """Keep streamed activations on disk as they come, for all hook points of the suite: a later run reads them and never runs
    the language model."""
    repeat: bool = True
    """Present activations again where tokens exceed the text. false makes that an error."""
    checkpoint_s: AtLeast0 = 60.0
    """Seconds between checkpoints; what was trained since the last one is trained again after a kill. 0 writes one each step."""
    log: Literal["", "wandb", "tensorboard"] = ""
    """Also send the rows of the history there, through the library of that name, which must be installed."""

    def check_together(self) -> None:
        if not self.stream and (self.stream_tokens or self.shards):
            raise ValueError("stream_tokens and shards are for stream = true")
