"""Other trainers' choices, as defaults: what a published run with them meant by its settings.

A recipe is a function from the table of a suite to the keys it leaves out; keys the user wrote win. Each was read from the
trainer's code at the version named, and ``benchmarks/training.py`` checks the losses of twenty steps against the real one.

- saelens (6.54): summed squared error, gradients clipped to 1, constant learning rate 3e-4, decoder rows free, selection and L1
  weighted by their norms, auxiliary loss in the units of the error, dead after 1000 steps.
- dictionary_learning (0.1): summed squared error, clipped to 1, lr 2e-4 / sqrt(F / 2^14), warm-up 1000 steps, unit decoder rows,
  dead after 10 million activations.
- sparsify (1.3): error over the variance, Adam with lr 2e-4 / sqrt(F / 2^14), warm-up 1000 steps, then linear decay, no
  auxiliary loss, dead after 10 million. (Its default optimiser was a sign-descent one until its main branch went to Adam.)
- paper (Cunningham et al. 2023): mean squared error over dimensions, raw activations, lr 1e-3, no decay, no clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Recipe = Callable[[Mapping[str, Any]], dict[str, Any]]


def _by_size(table: Mapping[str, Any]) -> float:
    """2e-4 at 16,384 features, falling with the square root of their number."""
    return float(2e-4 / (table.get("features", 2**14) / 2**14) ** 0.5)


def _saelens(table: Mapping[str, Any]) -> dict[str, Any]:
    batch = table.get("batch", 4096)
    common = {"error": "sum", "lr": 3e-4, "clip": 1.0, "batch": 4096, "warmup": 0.0, "decay": 0.0, "dead_after": 1000 * batch}
    own: dict[str, dict[str, Any]] = {
        "topk": {"decoder": "free", "auxk_form": "error", "auxk_weight": 1.0},
        "batchtopk": {"decoder": "free", "auxk_form": "error", "auxk_weight": 1.0},
        "matryoshka": {"decoder": "free", "auxk_form": "error", "auxk_weight": 1.0},
    }
    return {**common, **own.get(str(table.get("architecture", "topk")), {})}


def _dictionary_learning(table: Mapping[str, Any]) -> dict[str, Any]:
    common = {"error": "sum", "lr": _by_size(table), "clip": 1.0, "warmup": 1000.0, "decay": 0.0, "dead_after": 10_000_000}
    return common


def _sparsify(table: Mapping[str, Any]) -> dict[str, Any]:
    architecture = table.get("architecture", "topk")
    common = {"error": "fvu", "lr": _by_size(table), "warmup": 1000.0, "decay": 1.0, "dead_after": 10_000_000, "normalise": False}
    return {**common, "auxk": 0} if architecture == "topk" else common


def _paper(table: Mapping[str, Any]) -> dict[str, Any]:
    return {"error": "mean", "lr": 1e-3, "warmup": 0.0, "decay": 0.0, "normalise": False}


RECIPES: dict[str, Recipe] = {
    "saelens": _saelens,
    "dictionary_learning": _dictionary_learning,
    "sparsify": _sparsify,
    "paper": _paper,
}
"""Recipes by name."""
