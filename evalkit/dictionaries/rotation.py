"""A random rotation as a dictionary: a complete orthonormal basis that knows nothing of the data.

1. The rows of R are an orthonormal basis of the whole space, drawn uniformly by seed: the Q of a Gaussian matrix's QR
   decomposition, each column with the sign of R's diagonal (Mezzadri 2007, arXiv math-ph/0609050).
2. codes = R x, signed. They hold all of x, as neurons do: x_hat = R^T codes is x, and FVU is 0.
3. What a score of it shows is what any complete basis has, without the privilege of the model's own dimensions. Random
   directions are neither orthogonal nor complete.
4. Codes that lose something (rectified, or cut to the top k) are written back as x_hat = gain * codes @ R + constant, with the
   scalar gain and the constant that fit the fitting data best (least squares).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float

from evalkit.dictionaries.fitting import chunks, read_out
from evalkit.dictionaries.forms import Form, FormSettings, kept_count
from evalkit.dictionaries.linear import LinearDictionary
from evalkit.dictionaries.registry import DICTIONARIES, Fitting, Vectors, baseline


@DICTIONARIES.register("rotation")
class Rotation(LinearDictionary):
    """Coordinates in a random orthonormal basis."""

    kind = "rotation"


@dataclass(frozen=True)
class RotationSettings(FormSettings):
    """Settings of ``baseline = "rotation"``."""

    rectified: bool = False
    """Pass the coordinates through a ReLU. Half of each then is lost."""
    split: bool = False
    """Make two features of every direction, ReLU(c) and ReLU(-c), first all positive sides, then all negative ones. The
    reconstruction is the signed one's; ``rectified`` is not asked."""

    def form(self) -> Form:
        return Form(rectified=self.rectified or self.split, split=self.split, top_k=kept_count(self.top_k))


def orthonormal(d: int, seed: int) -> Float[torch.Tensor, "D D"]:
    """A uniformly drawn orthonormal basis of ``d`` dimensions as rows, float64."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.contiguous()


@baseline("rotation", RotationSettings)
def fit_rotation(x: Vectors, config: RotationSettings, fitting: Fitting) -> Rotation:
    """Draw the basis by seed and, where codes lose something, fit the read-out."""
    d = x.shape[1]
    form = config.form()
    form.features(d)
    rows = orthonormal(d, fitting.seed).float()
    gain, constant = 1.0, torch.zeros(d)
    with fitting.progress.stage("fitting a rotation", x.shape[0], "vectors") as stage:
        if form.top_k is not None or (form.rectified and not form.split):
            gain, constant = read_out(x, lambda block: form.fold(form.codes(block @ rows.T)), rows, stage)
        else:
            for block in chunks(x):
                stage.advance(len(block))
    details = {"baseline": "rotation", "vectors": int(x.shape[0]), "seed": fitting.seed, "gain": gain, **form.extras()}
    return Rotation(
        rows, torch.zeros(d), gain * rows, constant, rectified=form.rectified, **form.extras(), details=details, **fitting.where
    )
