"""Random directions as a dictionary: what any direction gives for free (baseline of Cunningham et al. 2023, section 3).

1. Rows are standard normal draws by seed, not normalised, as published; unit rows where ``normalised = true``.
2. codes = ReLU(rows @ x), bias 0.
3. The published form has no decoder: x_hat = gain * codes @ rows + constant, with the scalar gain and the constant that fit
   the fitting data best (least squares).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evalkit.dictionaries.fitting import read_out
from evalkit.dictionaries.linear import LinearDictionary
from evalkit.dictionaries.registry import DICTIONARIES, Fitting, Vectors, baseline
from evalkit.errors import DictionaryError


@DICTIONARIES.register("random")
class RandomDirections(LinearDictionary):
    """Rectified projections on random directions."""

    kind = "random"


@dataclass(frozen=True)
class RandomSettings:
    """Settings of ``baseline = "random"``."""

    features: int | None = None
    """Number of directions; as many as dimensions when left out, as published."""
    normalised: bool = False
    """Scale every direction to unit length. false is the published form; the order of a feature's fragments is the same."""

    def __post_init__(self) -> None:
        if self.features is not None and self.features < 1:
            raise DictionaryError(f"features = {self.features} draws nothing", where="features", fix="choose 1 or more")


@baseline("random", RandomSettings)
def fit_random(x: Vectors, config: RandomSettings, fitting: Fitting) -> RandomDirections:
    """Draw the directions by seed and fit their read-out."""
    d = x.shape[1]
    features = d if config.features is None else config.features
    rows = torch.randn(features, d, generator=torch.Generator().manual_seed(fitting.seed))
    if config.normalised:
        rows = rows / rows.norm(dim=1, keepdim=True)
    with fitting.progress.stage("fitting random directions", x.shape[0], "vectors") as stage:
        gain, constant = read_out(x, lambda block: (block @ rows.T).relu_(), rows)
        stage.advance(x.shape[0])
    details = {
        "baseline": "random",
        "vectors": int(x.shape[0]),
        "seed": fitting.seed,
        "normalised": config.normalised,
        "gain": gain,
    }
    return RandomDirections(rows, torch.zeros(features), gain * rows, constant, rectified=True, details=details, **fitting.where)
