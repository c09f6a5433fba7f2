"""Random directions as a dictionary: what any direction gives for free (baseline of Cunningham et al. 2023, section 3).

1. Rows are standard normal draws by seed, not normalised, as published; unit rows where ``normalised = true``.
2. codes = ReLU(rows @ x), bias 0, as published; signed where ``rectified = false``, two features a direction where
   ``split = true``, and the largest only where ``top_k`` is given.
3. The published form has no decoder: x_hat = gain * codes @ rows + constant, with the scalar gain and the constant that fit
   the fitting data best (least squares), for the codes as they are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evalkit.dictionaries.fitting import read_out
from evalkit.dictionaries.forms import Form, FormSettings, kept_count
from evalkit.dictionaries.linear import LinearDictionary
from evalkit.dictionaries.registry import DICTIONARIES, Fitting, Vectors, baseline
from evalkit.util.settings import Count


@DICTIONARIES.register("random")
class RandomDirections(LinearDictionary):
    """Projections on random directions, rectified as published."""

    kind = "random"


@dataclass(frozen=True)
class RandomSettings(FormSettings):
    """Settings of ``baseline = "random"``."""

    features: Count | None = None
    """Number of directions drawn; as many as dimensions when left out, as published."""
    normalised: bool = False
    """Scale every direction to unit length. false is the published form; the order of a feature's fragments is the same."""
    rectified: bool = True
    """Pass the projections through a ReLU, as published. false keeps their sign."""
    split: bool = False
    """Make two features of every direction, ReLU(c) and ReLU(-c), first all positive sides, then all negative ones. The
    reconstruction is the one of rectified = false; ``rectified`` is not asked."""

    def form(self) -> Form:
        return Form(rectified=self.rectified or self.split, split=self.split, top_k=kept_count(self.top_k))


@baseline("random", RandomSettings)
def fit_random(x: Vectors, config: RandomSettings, fitting: Fitting) -> RandomDirections:
    """Draw the directions by seed and fit their read-out."""
    d = x.shape[1]
    directions = d if config.features is None else config.features
    form = config.form()
    form.features(directions)
    rows = torch.randn(directions, d, generator=torch.Generator().manual_seed(fitting.seed))
    if config.normalised:
        rows = rows / rows.norm(dim=1, keepdim=True)
    with fitting.progress.stage("fitting random directions", x.shape[0], "vectors") as stage:
        gain, constant = read_out(x, lambda block: form.fold(form.codes(block @ rows.T)), rows, stage)
    details = {
        "baseline": "random",
        "vectors": int(x.shape[0]),
        "seed": fitting.seed,
        "normalised": config.normalised,
        "gain": gain,
        **form.extras(),
    }
    return RandomDirections(
        rows,
        torch.zeros(directions),
        gain * rows,
        constant,
        rectified=form.rectified,
        **form.extras(),
        details=details,
        **fitting.where,
    )
