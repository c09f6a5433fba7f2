"""Where kinds of dictionary and baselines are filed, so that a new one is one new module.

1. ``DICTIONARIES`` maps a kind ('topk', 'pca') to its class: it is how ``storage`` rebuilds what it reads.
2. ``BASELINES`` maps a baseline's suite name to a ``Baseline``: its documented settings and the function that fits it.
3. Every baseline is fitted by one call, ``BASELINES.get(name).fit(x, seed=..., ...)``, whatever it does inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from evalkit.dictionaries.base import Dictionary
from evalkit.errors import DictionaryError
from evalkit.util.progress import Progress
from evalkit.util.registry import Registry, near_miss

DICTIONARIES: Registry[type[Dictionary]] = Registry("kind of dictionary", "evalkit.dictionaries", DictionaryError)
"""Dictionary classes by kind."""

Vectors = Float[torch.Tensor, "N D"] | Float[np.ndarray, "N D"]
"""Activation vectors in memory or in a memory-mapped file, one a row."""


class Fitting(NamedTuple):
    """What a baseline's fit receives besides its data and settings."""

    seed: int
    """Seed of every draw."""
    where: dict[str, Any]
    """``hook_point`` and ``model``, for the dictionary's constructor."""
    progress: Progress
    """Where stages are shown."""


class Baseline(NamedTuple):
    """One baseline as the suite sees it."""

    name: str
    """Its name in a suite: ``baseline = "pca"``."""
    settings: type
    """Frozen dataclass of its settings, each documented under itself."""
    run: Callable[[Vectors, Any, Fitting], Dictionary]
    """The fit, given checked data and checked settings."""

    def configure(self, settings: dict[str, Any]) -> Any:
        """The settings dataclass filled from plain keys.

        Raises:
            DictionaryError: an unknown key (with the near miss) or a value the dataclass refuses.
        """
        known = [field.name for field in dataclasses.fields(self.settings)]
        for key in settings:
            if key not in known:
                fix = near_miss(key, known) if known else "this baseline has no settings: remove the key"
                raise DictionaryError(f"baseline '{self.name}' has no setting '{key}'", where=key, fix=fix)
        return self.settings(**settings)

    def fit(self, x: Vectors, *, seed: int, hook_point: str, model: str, progress: Progress, **settings: Any) -> Dictionary:
        """Fit the baseline to activation vectors.

        Args:
            x: (N, D) float32 activations, in memory or memory-mapped; only rows that take part in metrics.
            seed: seed of every draw; same data, settings and seed, same dictionary.
            hook_point: where ``x`` was read.
            model: identity of the language model ``x`` comes from.
            progress: where stages are shown.
            settings: fields of ``self.settings``.

        Raises:
            DictionaryError: unknown or impossible settings, or data that cannot be fitted.
        """
        config = self.configure(settings)
        if isinstance(named := getattr(config, "top_k", None), str):
            raise DictionaryError(
                f"top_k names a dictionary, '{named}', whose L0 is known to a suite alone", where="top_k", fix="give a number"
            )
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
            raise DictionaryError(
                f"baseline '{self.name}' needs at least two activation vectors as rows, not an array of shape {tuple(x.shape)}",
                where=hook_point,
                fix="give it more fitting text, flattened to (vectors, width)",
            )
        return self.run(x, config, Fitting(seed, {"hook_point": hook_point, "model": model}, progress))


BASELINES: Registry[Baseline] = Registry("baseline", "evalkit.dictionaries", DictionaryError)
"""Baselines by the name used in ``baseline = "..."``."""


def baseline(
    name: str, settings: type
) -> Callable[[Callable[[Vectors, Any, Fitting], Dictionary]], Callable[[Vectors, Any, Fitting], Dictionary]]:
    """Decorator: file a fitting function as the baseline ``name`` with ``settings``."""

    def file(
        run: Callable[[Vectors, Any, Fitting], Dictionary],
    ) -> Callable[[Vectors, Any, Fitting], Dictionary]:
        BASELINES.register(name)(Baseline(name, settings, run))
        return run

    return file
