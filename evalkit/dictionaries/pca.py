"""PCA as a dictionary: the directions of largest variance (baseline of Cunningham et al. 2023, section 3).

1. Mean and covariance of the fitting data are accumulated in float64, a few thousand vectors at a time.
2. Its eigenvectors, by falling variance, are the components; each one's sign makes its largest entry positive.
3. codes = (x - mean) @ components^T, signed. The published form encodes x without centring it: ``centred = false``.
4. x_hat is the orthogonal projection on the components about the mean, in both forms: the constant makes up for the mean.
5. 'split' is the paper's non-negative PCA (appendix F: centred; its top-K form of appendix G: uncentred), 'top_k' keeps the
   largest codes. Neither changes how a component is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evalkit.dictionaries.fitting import moments
from evalkit.dictionaries.forms import Form, FormSettings, kept_count
from evalkit.dictionaries.linear import LinearDictionary
from evalkit.dictionaries.registry import DICTIONARIES, Fitting, Vectors, baseline
from evalkit.errors import DictionaryError
from evalkit.util.settings import Count


@DICTIONARIES.register("pca")
class PCA(LinearDictionary):
    """Principal components; codes are signed, or split by sign."""

    kind = "pca"


@dataclass(frozen=True)
class PCASettings(FormSettings):
    """Settings of ``baseline = "pca"``."""

    components: Count | None = None
    """Number of components kept, those of largest variance first; all of them when left out. The paper scores the first 150:
    150 makes every draw of features one of these."""
    centred: bool = True
    """Subtract the mean before encoding. false is the published form (Cunningham et al. 2023 encode uncentred
    activations): codes then carry an offset, while the reconstruction stays the same."""
    split: bool = False
    """Make two features of every component, ReLU(c) and ReLU(-c), first all positive sides, then all negative ones. The
    published 'non-negative PCA' is split and centred; its reconstruction is the signed one's. The published
    top-K form is split and uncentred."""

    def form(self) -> Form:
        return Form(rectified=self.split, split=self.split, top_k=kept_count(self.top_k))


@baseline("pca", PCASettings)
def fit_pca(x: Vectors, config: PCASettings, fitting: Fitting) -> PCA:
    """Fit PCA; ``details`` holds the variance of each component and the share of variance kept."""
    d = x.shape[1]
    count = d if config.components is None else config.components
    if count > d:
        raise DictionaryError(f"components = {count} exceeds the width {d}", where="components", fix=f"choose 1 to {d}")
    form = config.form()
    form.features(count)
    with fitting.progress.stage("fitting PCA", x.shape[0], "vectors") as stage:
        mean, covariance = moments(x, stage)
        variance, vectors = torch.linalg.eigh(covariance)  # rising; columns are eigenvectors
    variance, rows = variance.flip(0).clamp(min=0)[:count], vectors.flip(1).T[:count]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    rows = rows * torch.where(largest < 0, -1.0, 1.0)
    offset = rows @ mean
    outside = mean - offset @ rows  # the part of the mean that no component can write
    components = rows.float().contiguous()
    total = float(covariance.trace())
    details = {
        "baseline": "pca",
        "vectors": int(x.shape[0]),
        "components": count,
        "centred": config.centred,
        "variance": [float(v) for v in variance],
        "variance_share": float(variance.sum()) / total if total > 0 else None,
        **form.extras(),
    }
    return PCA(
        components,
        (-offset if config.centred else torch.zeros_like(offset)).float(),
        components,
        (mean if config.centred else outside).float(),
        rectified=form.rectified,
        **form.extras(),
        details=details,
        **fitting.where,
    )
