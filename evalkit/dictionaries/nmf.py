"""Non-negative matrix factorisation as a dictionary (Lee and Seung 1999; scikit-learn's coordinate descent).

The code released with Cunningham et al. 2023 has NMF among its baselines, but no figure or table of the paper shows it.

1. Activations have both signs and NMF knows none, so each vector is split: z = [ReLU(x), ReLU(-x)], 2D wide and without
   negative entries. (Shifting x by its minimum instead would make one large constant the first thing to be explained.)
2. z ~ codes @ H with codes, H >= 0 is fitted by alternating least squares on ``vectors`` activations drawn by seed, from the
   non-negative double SVD. It has converged when an iteration lowers the squared error by no more than ``tolerance`` of it.
3. Components that came out empty are dropped, the others scaled to unit length.
4. H = [H+, H-], and x_hat = codes @ (H+ - H-): a component may write on a dimension in either direction.
5. encode is non-negative least squares with H fixed: ``steps`` of accelerated projected gradient descent (Beck and Teboulle
   2009), whose momentum restarts for a token where it points uphill (O'Donoghue and Candes 2015). The number of steps is
   fixed and no token sees another, so codes depend on the token alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import non_negative_factorization

from evalkit.dictionaries import shapes
from evalkit.dictionaries.fitting import CHUNK, sample
from evalkit.dictionaries.forms import Form, Formed, FormSettings, kept_count
from evalkit.dictionaries.registry import DICTIONARIES, Fitting, Vectors, baseline
from evalkit.errors import DictionaryError
from evalkit.util.progress import Stage
from evalkit.util.settings import Count

COMPONENTS = 200
"""Components when the setting is left out."""

ROUND = 10
"""Iterations between two looks at the error, which costs about as much as one of them."""

LAYOUT = {"H": "C E"}


def sign_split(x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch E"]:
    """[ReLU(x), ReLU(-x)], E = 2D wide."""
    return torch.cat([x.relu(), (-x).relu()], dim=-1)


@DICTIONARIES.register("nmf")
class NMF(Formed):
    """Non-negative components of sign-split activations.

    Args:
        H: (C, 2D), no entry negative; row c is [H+, H-] of component c.
        steps: gradient steps of ``encode``.
        top_k: codes kept a token, largest first; all of them when left out.
        where: ``hook_point``, ``model`` and ``details``.

    Raises:
        DictionaryError: a misshapen H, one with negative or non-finite entries, or impossible settings.
    """

    kind = "nmf"

    def __init__(self, H: torch.Tensor, steps: int, top_k: int | None = None, **where: Any) -> None:
        super().__init__(Form(rectified=True, top_k=top_k), **where)
        shapes.check(self.kind, {"H": H}, LAYOUT)
        if H.shape[1] % 2 or bool((H < 0).any()):
            raise DictionaryError(
                "H is not the positive and the negative half of components without negative entries",
                where="H",
                fix="give it [H+, H-], each (components, width)",
            )
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise DictionaryError(f"steps = {steps!r} encodes nothing", where="steps", fix="choose 1 or more")
        self.form.features(H.shape[0])
        self.H, self.steps = H.float(), steps
        half = H.shape[1] // 2
        self._directions = self.H[:, :half] - self.H[:, half:]
        gram = self.H.double() @ self.H.double().T
        self._gram = gram.float()
        self._rate = 1.0 / max(float(torch.linalg.eigvalsh(gram)[-1]), 1e-12)

    @classmethod
    def build(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any], **where: Any) -> NMF:
        """The inverse of ``tensors`` and ``settings``."""
        shapes.check(cls.kind, tensors, LAYOUT)
        return cls(tensors["H"], settings["steps"], settings.get("top_k"), **where)

    def tensors(self) -> dict[str, torch.Tensor]:
        """H (C, 2D)."""
        return {"H": self.H}

    def settings(self) -> dict[str, Any]:
        """steps, and top_k where it is used."""
        return {"steps": self.steps, **self.form.extras()}

    def scores(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch C"]:
        """The codes c >= 0 that minimise ||[ReLU(x), ReLU(-x)] - c H||^2, to the accuracy of ``steps``."""
        target = sign_split(self._input(x)) @ self.H.T  # (..., C)
        codes = torch.zeros_like(target)
        ahead, pace = codes, torch.ones_like(target[..., :1])  # where the next step starts; Nesterov's sequence, a token
        for _ in range(self.steps):
            new = (ahead - (ahead @ self._gram - target) * self._rate).clamp_(min=0)
            uphill = ((ahead - new) * (new - codes)).sum(-1, keepdim=True) > 0
            following = (1 + (1 + 4 * pace**2).sqrt()) / 2
            momentum = ((pace - 1) / following).masked_fill(uphill, 0.0)
            pace = following.masked_fill(uphill, 1.0)
            ahead = new + momentum * (new - codes)
            codes = new
        return codes

    def decode(self, codes: Float[torch.Tensor, "*batch C"]) -> Float[torch.Tensor, "*batch D"]:
        """x_hat = codes @ (H+ - H-)."""
        return codes @ self._directions

    @property
    def directions(self) -> Float[torch.Tensor, "C D"]:
        """H+ - H-."""
        return self._directions


@dataclass(frozen=True)
class NMFSettings(FormSettings):
    """Settings of ``baseline = "nmf"``."""

    components: Count | None = None
    """Number of non-negative components, at most twice the width; 200, or the width where that is less, when left out."""
    vectors: Count = 10_000
    """Activation vectors the factorisation sees, drawn by seed. An iteration costs in proportion to vectors * components^2."""
    iterations: Count = 200
    """Most iterations of the factorisation."""
    tolerance: float = 1e-4
    """It has converged when an iteration lowers the squared error by no more than this share of it."""
    steps: Count = 100
    """Gradient steps with which activations are encoded; part of the dictionary. 200 components at a width of 256 are within
    0.02 % of the optimum after 50."""

    def form(self) -> Form:
        return Form(rectified=True, top_k=kept_count(self.top_k))


class Factors(NamedTuple):
    """How a factorisation ended."""

    H: np.ndarray
    """(C, 2D), float32, as it was left: rows of any length."""
    error: float
    """||z - W H||^2 / ||z||^2 on the drawn vectors."""
    iterations: int
    """Iterations taken."""
    converged: bool
    """Whether the last ones lowered the error by less than the tolerance."""


def _squared_error(z: np.ndarray, W: np.ndarray, H: np.ndarray) -> float:
    starts = range(0, len(z), CHUNK)
    return sum(float(np.square(z[i : i + CHUNK] - W[i : i + CHUNK] @ H, dtype=np.float64).sum()) for i in starts)


def _factorise(z: np.ndarray, components: int, config: NMFSettings, seed: int, stage: Stage) -> Factors:
    """Coordinate descent on z (N, 2D), ``ROUND`` iterations at a time; it keeps no state but W and H between them."""
    total = max(float(np.square(z, dtype=np.float64).sum()), 1e-300)
    start: dict[str, Any] = {"init": "nndsvda", "n_components": components}
    done, error, converged = 0, total, False
    while done < config.iterations and not converged:
        count = min(ROUND, config.iterations - done)
        W, H, _ = non_negative_factorization(z, **start, max_iter=count, tol=0.0, random_state=seed)
        start = {"W": W, "H": H, "init": "custom", "n_components": components}
        before, error = error, _squared_error(z, W, H)
        done += count
        converged = before - error <= config.tolerance * count * before
        stage.advance(count, f"{error / total:.3f} of the squared norm left")
    return Factors(H, error / total, done, converged)


@baseline("nmf", NMFSettings)
def fit_nmf(x: Vectors, config: NMFSettings, fitting: Fitting) -> NMF:
    """Fit NMF; ``details`` says how the factorisation ended and what share of the squared norm it leaves."""
    d = x.shape[1]
    drawn = sample(x, config.vectors, fitting.seed)
    if not drawn.any():
        raise DictionaryError("NMF needs activation vectors that are not all zero", fix="give it more fitting text")
    most = min(2 * d, len(drawn))
    components = min(COMPONENTS, d, most) if config.components is None else config.components
    if components > most:
        raise DictionaryError(
            f"components = {components} exceeds {most}, the lesser of twice the width and the number of vectors",
            where="components",
            fix=f"choose 1 to {most}",
        )
    config.form().features(components)
    with fitting.progress.stage(f"fitting NMF ({components} components)", config.iterations, "iterations at most") as stage:
        factors = _factorise(sign_split(drawn).numpy(), components, config, fitting.seed, stage)
    if not factors.converged:
        fitting.progress.say(
            f"NMF did not converge in {factors.iterations} iterations (tolerance {config.tolerance:g}); "
            "its components are used as they stand: raise iterations, or lower components"
        )
    H = torch.from_numpy(factors.H).float()
    lengths = H.norm(dim=1, keepdim=True)
    kept = (lengths[:, 0] > 1e-6 * lengths.max()).nonzero()[:, 0]
    details = {
        "baseline": "nmf",
        "vectors": len(drawn),
        "components": len(kept),
        "dropped": components - len(kept),
        "iterations": factors.iterations,
        "converged": factors.converged,
        "squared_norm_left": factors.error,
        "seed": fitting.seed,
        **({} if config.top_k is None else {"top_k": config.top_k}),
    }
    return NMF(
        (H / lengths.clamp(min=1e-30))[kept].contiguous(),
        config.steps,
        kept_count(config.top_k),
        details=details,
        **fitting.where,
    )
