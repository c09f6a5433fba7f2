"""ICA as a dictionary: the strongest linear baseline of Cunningham et al. 2023 (section 3, appendix A).

1. ``vectors`` activations are drawn by seed, standardised a dimension at a time, and unmixed by FastICA (Hyvarinen 1999;
   scikit-learn, logcosh, float64), after whitening to ``components`` dimensions.
2. 'published': the sign of a component is as FastICA leaves it, which is arbitrary, and codes are signed.
3. 'oriented': each component is flipped so that its stronger tail on the drawn vectors is the positive one, by the sign of
   its third central moment, and codes pass a ReLU. Ranking fragments by the largest code then looks at the tail that means
   something (the 2026 reproduction of the paper found this to matter a lot). Orientation never sees scoring text.
4. ``split``: two features a component, ReLU(c) and ReLU(-c), whatever its sign; with 'oriented' the stronger tail is the
   first of the two. ``top_k`` keeps the largest codes. Both together are the paper's top-K form (appendix G), except that
   its code leaves out the standardisation there.
5. x_hat is linear in the codes. The published and the split form have an exact inverse on the whitened space; the rectified
   one gets the scalar gain and the constant that fit the fitting data best (least squares), for the codes as they are used.

All forms share one FastICA run: the last few runs of this process are kept by the hash of their input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler

from evalkit.dictionaries.fitting import read_out, sample
from evalkit.dictionaries.forms import Form, FormSettings, kept_count
from evalkit.dictionaries.linear import LinearDictionary
from evalkit.dictionaries.registry import DICTIONARIES, Fitting, Vectors, baseline
from evalkit.errors import DictionaryError
from evalkit.util.caching import Recent
from evalkit.util.hashing import tensors_hash
from evalkit.util.progress import Stage
from evalkit.util.settings import Count

RANK_TOLERANCE = 1e-10
"""Variances below this share of the largest one count as zero: whitening would divide by rounding errors."""

COMPONENTS = 200
"""Components when the setting is left out."""

KEPT_RUNS = 4
"""FastICA runs remembered in this process, so that all forms of one hook point cost one run."""


@DICTIONARIES.register("ica")
class ICA(LinearDictionary):
    """Independent components: signed as published, rectified when oriented, or split by sign."""

    kind = "ica"


@dataclass(frozen=True)
class ICASettings(FormSettings):
    """Settings of ``baseline = "ica"``."""

    components: Count | None = None
    """Number of independent components; 200, or the width where that is less, when left out. The paper takes as many as
    dimensions; 200 keeps a run near half a minute on two cores at a width of 576. Lowered to the rank of the data."""
    vectors: Count = 20_000
    """Activation vectors FastICA sees, drawn by seed. The paper takes about 2 million."""
    orient: Literal["oriented", "published"] = "oriented"
    """'oriented': each component's stronger tail (third moment on the fitting data) is made positive and codes pass a ReLU.
    'published': signs as FastICA leaves them, signed codes (the form of the paper's figures)."""
    split: bool = False
    """Make two features of every component, ReLU(c) and ReLU(-c), first all positive sides, then all negative ones. The
    reconstruction is the signed one's; ``orient`` then only says which side is the positive one."""
    iterations: Count = 200
    """Most iterations of FastICA."""
    tolerance: float = 1e-4
    """FastICA has converged when no component turns by more than this (1 - |cosine|)."""

    def form(self) -> Form:
        return Form(rectified=self.split or self.orient == "oriented", split=self.split, top_k=kept_count(self.top_k))


class Unmixing(NamedTuple):
    """One FastICA run in the coordinates of the activations; everything float64."""

    encoder: torch.Tensor
    """(C, D): codes = x @ encoder^T + bias, of unit variance on the drawn vectors."""
    bias: torch.Tensor
    """(C,)."""
    writes: torch.Tensor
    """(C, D): x_hat = codes @ writes + constant."""
    constant: torch.Tensor
    """(D,): mean of the drawn vectors."""
    third_moment: torch.Tensor
    """(C,): mean of the cubed codes over the drawn vectors."""
    iterations: int
    """Iterations FastICA took."""
    converged: bool
    """Whether it met its tolerance."""


_runs: Recent[Unmixing] = Recent(KEPT_RUNS)


def _logcosh(stage: Stage) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """FastICA's contrast of the same name, moving ``stage`` on at each call: FastICA asks once an iteration."""

    def contrast(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stage.advance(1)
        slope = np.tanh(y)  # (C, N)
        return slope, np.array([(1 - row**2).mean() for row in slope])

    return contrast


def _unmix(drawn: torch.Tensor, components: int, config: ICASettings, seed: int, stage: Stage) -> Unmixing:
    """Run FastICA on the drawn vectors (N, D), or take the run from memory; ``stage`` is counted in iterations."""
    recipe = {"components": components, "iterations": config.iterations, "tolerance": config.tolerance, "seed": seed}
    return _runs.get(tensors_hash({"x": drawn}, recipe), lambda: _run(drawn, components, config, seed, stage))


def _run(drawn: torch.Tensor, components: int, config: ICASettings, seed: int, stage: Stage) -> Unmixing:
    scaler = StandardScaler()
    scaled = scaler.fit_transform(drawn.double().numpy())
    spectrum = np.linalg.eigvalsh(scaled.T @ scaled)
    rank = min(int((spectrum > RANK_TOLERANCE * spectrum[-1]).sum()), len(scaled) - 1)
    if rank < 1:
        raise DictionaryError("ICA needs activation vectors that vary", fix="give it more fitting text")
    ica = FastICA(
        n_components=min(components, rank),
        whiten="unit-variance",
        fun=_logcosh(stage),
        max_iter=config.iterations,
        tol=config.tolerance,
        random_state=seed,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        codes = ica.fit_transform(scaled)  # (N, C)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    encoder = ica.components_ / scaler.scale_
    run = Unmixing(
        torch.from_numpy(encoder),
        torch.from_numpy(-(encoder @ scaler.mean_) - ica.components_ @ ica.mean_),
        torch.from_numpy(ica.mixing_.T * scaler.scale_),
        torch.from_numpy(scaler.mean_ + scaler.scale_ * ica.mean_),
        torch.from_numpy((codes**3).mean(0)),
        int(ica.n_iter_),
        converged,
    )
    if not all(torch.isfinite(tensor).all() for tensor in run[:5]):
        raise DictionaryError("FastICA gave NaN or infinities", fix="lower components, or give it more vectors")
    return run


@baseline("ica", ICASettings)
def fit_ica(x: Vectors, config: ICASettings, fitting: Fitting) -> ICA:
    """Fit ICA; ``details`` says how FastICA ended and how components were oriented."""
    d = x.shape[1]
    components = min(COMPONENTS, d) if config.components is None else config.components
    if components > d:
        raise DictionaryError(f"components = {components} exceeds the width {d}", where="components", fix=f"choose 1 to {d}")
    form = config.form()
    form.features(components)
    drawn = sample(x, config.vectors, fitting.seed)
    oriented = config.orient == "oriented"
    with fitting.progress.stage(f"fitting ICA ({components} components)", config.iterations, "iterations at most") as stage:
        run = _unmix(drawn, components, config, fitting.seed, stage)
    flips = torch.where(run.third_moment < 0, -1.0, 1.0).double()[:, None] if oriented else torch.ones(1, 1).double()
    encoder, bias = (run.encoder * flips).float(), (run.bias * flips[:, 0]).float()
    writes, gain, constant = (run.writes * flips).float(), 1.0, run.constant.float()
    if form.rectified and not form.split:
        with fitting.progress.stage("fitting the read-out of ICA", x.shape[0], "vectors") as stage:
            gain, constant = read_out(x, lambda block: form.codes(block @ encoder.T + bias), writes, stage)
    if not run.converged:
        fitting.progress.say(
            f"ICA did not converge in {run.iterations} iterations (tolerance {config.tolerance:g}); "
            "its components are used as they stand: raise iterations or vectors, or lower components"
        )
    details = {
        "baseline": "ica",
        "vectors": len(drawn),
        "components": int(encoder.shape[0]),
        "orient": config.orient,
        "orientation_rule": "sign of the third central moment on the fitting vectors" if oriented else "as FastICA left it",
        "flipped": int((flips < 0).sum()),
        "iterations": run.iterations,
        "converged": run.converged,
        "tolerance": config.tolerance,
        "seed": fitting.seed,
        "gain": gain,
        **form.extras(),
    }
    return ICA(
        encoder,
        bias,
        gain * writes,
        constant,
        rectified=form.rectified,
        **form.extras(),
        details=details,
        **fitting.where,
    )
