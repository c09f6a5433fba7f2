"""Other trainers' choices, as defaults: what a published run with them meant by its settings.

A recipe is a function from the table of a suite to the keys it leaves out; keys the user wrote win. Each was read from the
trainer's code at the version named. ``benchmarks/training.py`` runs the real ones beside evalkit: their losses over twenty steps
from the same weights on the same batches agree to 1e-4, and recorded ones are in the tests.

- saelens (6.54): raw activations, summed squared error, gradients clipped to 1, constant learning rate 3e-4, decoder rows free,
  selection and L1 weighted by their norms, auxiliary loss in the scale of the error and of codes that may be negative, dead
  after more than 1000 steps.
- dictionary_learning (0.1): raw activations, summed squared error, clipped to 1 after the constraint on the decoder's gradient,
  lr 2e-4 / sqrt(F / 2^14), warm-up 1000 steps from 0, unit decoder rows, auxiliary loss over the residual's variance, dead from
  10 million activations on, the batch at hand counted.
- sparsify (1.3): raw activations, error over the variance of the batch, Adam with lr 2e-4 / sqrt(F / 2^14), warm-up 1000 steps
  from 0, then linear decay to 0 at the end, no auxiliary loss, dead after more than 10 million.
- paper (Cunningham et al. 2023): mean squared error over dimensions plus alpha times the sum of codes, so that published alphas
  mean what they meant; raw activations, lr 1e-3, no decay, no clipping; tied, or untied with unit decoder rows.

A recipe is refused for architectures that it says nothing about: SAELens' gated, dictionary_learning's gated, JumpReLU and
p-annealing, and all but TopK of sparsify.

What a recipe does not take over:

- Where weights start. evalkit starts decoder rows at random unit vectors and b_dec at the geometric median of a sample. SAELens
  starts rows at length 0.1 and b_dec at 0, dictionary_learning takes the median of the first batch, sparsify its mean.
- dictionary_learning's JumpReLU and its April-update L1 trainer do not subtract b_dec before encoding; evalkit's always do.
- dictionary_learning multiplies each prefix's error of a Matryoshka autoencoder by one over their number and then takes the mean;
  the recipe does so too. It rounds group sizes down and puts the rest into the last group; here borders are rounded.
- The order of the data and the size of a batch in sequences (sparsify).
- sparsify's default optimiser in this version, sign descent with schedule-free averaging. The recipe is its ``optimizer="adam"``,
  which its main branch has made the default.
- sparsify's auxiliary loss, off by default, reaches only the decoder rows of dead features: its encoder's backward pass drops
  that gradient. Here it reaches the encoder too.
- sparsify and dictionary_learning's TopK count a feature as fired that was among the k largest with a code of 0; here it has to
  be above 0. It matters for tokens on which fewer than k features are above 0.
- dictionary_learning's BatchTopK and Matryoshka thresholds start following after step 1000; here from the first. Losses do not
  depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evalkit.errors import SuiteError

Recipe = Callable[[Mapping[str, Any]], dict[str, Any]]

WARMUP = 1000
"""Steps of dictionary_learning's and sparsify's warm-up."""

PATIENCE = 10_000_000
"""Activations after which dictionary_learning and sparsify call a feature dead."""


PREFIXES = 5
"""Groups of a Matryoshka autoencoder where the table does not name their shares."""


def _whole(table: Mapping[str, Any], key: str, usual: int) -> int:
    value = table.get(key, usual)
    if not isinstance(value, int) or value < 1:
        raise SuiteError(f"{key} = {value!r} cannot be trained", where=key, fix="choose a whole number, 1 or more")
    return value


def _by_size(table: Mapping[str, Any]) -> dict[str, float]:
    """lr 2e-4 at 16,384 features, falling with the square root of their number."""
    if table.get("lr") is not None:
        return {}
    if table.get("features") is None:
        raise SuiteError(
            f"the recipe '{table.get('recipe')}' takes its learning rate from the number of features",
            where="features",
            fix="write features = ... or lr = ...",
        )
    return {"lr": float(2e-4 / (_whole(table, "features", 2**14) / 2**14) ** 0.5)}


def _own(table: Mapping[str, Any], choices: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Choices of one architecture. A recipe that is silent about it is refused: half a recipe would bear a wrong name.

    Raises:
        SuiteError: the recipe says nothing about the architecture, or about its annealed penalty.
    """
    name = str(table.get("architecture", "topk"))
    annealed = table.get("penalty") == "anneal"
    if name not in choices or annealed:
        what = "an annealed penalty" if annealed and name in choices else f"architecture = '{name}'"
        raise SuiteError(
            f"the recipe '{table.get('recipe')}' does not say how {what} is trained",
            where="recipe",
            fix=f"leave recipe out, or use it with {', '.join(choices)}",
        )
    return choices[name]


def _saelens(table: Mapping[str, Any]) -> dict[str, Any]:
    batch = _whole(table, "batch", 4096)
    common = {
        "error": "sum", "lr": 3e-4, "beta1": 0.9, "beta2": 0.999, "clip": 1.0, "batch": batch, "warmup": 0.0, "decay": 0.0,
        "dead_after": 1001 * batch, "normalise": False,
    }  # fmt: skip
    chosen = {"decoder": "free", "auxk_form": "error", "auxk_relu": False, "auxk_weight": 1.0}
    own: dict[str, dict[str, Any]] = {
        "relu": {"decoder": "free", "l1": 1.0, "l1_warmup": 0.0},
        "topk": chosen,
        "batchtopk": {**chosen, "threshold_rate": 0.01},
        "matryoshka": {**chosen, "threshold_rate": 0.01, "prefix_weight": 1.0},
        "jumprelu": {
            "decoder": "free", "penalty": "step", "sparsity": 1.0, "sparsity_warmup": 0.0, "threshold": 0.01, "bandwidth": 0.05,
            "pre_act": 0.0,
        },
    }  # fmt: skip
    return {**common, **_own(table, own)}


def _dictionary_learning(table: Mapping[str, Any]) -> dict[str, Any]:
    common = {
        "error": "sum", "beta1": 0.9, "beta2": 0.999, "warmup": float(WARMUP), "idle_start": True, "decay": 0.0,
        "normalise": False, "dead_after": PATIENCE - min(_whole(table, "batch", 512), PATIENCE - 1),
    }  # fmt: skip
    chosen = {"decoder": "unit", "auxk_form": "variance", "auxk_weight": 1 / 32, "auxk_silent": True}
    prefixes = table.get("fractions")
    count = len(prefixes) if isinstance(prefixes, list | tuple) and prefixes else PREFIXES
    own: dict[str, dict[str, Any]] = {
        "relu": {"lr": 1e-3, "decoder": "unit", "l1": 0.1, "l1_warmup": 2000.0},
        "topk": chosen,
        "batchtopk": {**chosen, "threshold_rate": 0.001},
        "matryoshka": {**chosen, "threshold_rate": 0.001, "prefix_weight": 1 / count**2},
    }
    special = _own(table, own)
    sized = {} if table.get("architecture") == "relu" else {"clip": 1.0, **_by_size(table)}
    return {**common, **sized, **special}


def _sparsify(table: Mapping[str, Any]) -> dict[str, Any]:
    steps = -(-_whole(table, "tokens", 300_000) // _whole(table, "batch", 512))
    rise = table.get("warmup", WARMUP)
    fall = steps - (rise * steps if rise < 1 else rise) if isinstance(rise, int | float) else 0
    common = {
        "error": "fvu", "beta1": 0.9, "beta2": 0.999, "warmup": float(WARMUP), "idle_start": True,
        "decay": float(fall) if fall >= 1 else 0.0, "normalise": False, "dead_after": PATIENCE + 1,
    }  # fmt: skip
    own = {"topk": {"decoder": "unit", "variance": "batch", "auxk": 0, "auxk_form": "error"}}
    special = _own(table, own)
    return {**common, **_by_size(table), **special}


def _paper(table: Mapping[str, Any]) -> dict[str, Any]:
    common = {"error": "mean", "lr": 1e-3, "warmup": 0.0, "decay": 0.0, "normalise": False}
    own: dict[str, dict[str, Any]] = {"tied": {}, "relu": {"decoder": "unit", "l1": 8.577e-4, "l1_warmup": 0.0}}
    return {**common, **_own(table, own)}


RECIPES: dict[str, Recipe] = {
    "saelens": _saelens,
    "dictionary_learning": _dictionary_learning,
    "sparsify": _sparsify,
    "paper": _paper,
}
"""Recipes by name."""
