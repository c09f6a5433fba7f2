"""What a training run is told: one frozen dataclass, each field documented under itself."""

from __future__ import annotations

from dataclasses import dataclass

from evalkit.errors import SuiteError, UnitFailed
from evalkit.training.base import TRAINABLES


class TrainingFailed(UnitFailed):
    """Training diverged; nothing was written."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of ``train = {...}``.

    Raises:
        SuiteError: an unknown architecture or an impossible number.
    """

    architecture: str = "topk"
    """'topk' (Gao et al. 2024: exactly k active features) or 'tied' (Cunningham et al. 2023: ReLU, L1 penalty, tied weights)."""
    features: int | None = None
    """Number of features; expansion times the width when left out."""
    expansion: float = 4.0
    """Features per dimension where ``features`` is left out. The paper finds residual ones alive up to 4."""
    k: int = 32
    """Active features a token (topk only). 32 is the middle of Gao et al.'s range."""
    l1: float = 8.577e-4
    """Weight of the sparsity penalty (tied only): mean squared error over dimensions + l1 * sum of codes, a token. That
    is the scale of the paper's code, whose headline value this is; times the width for the paper's equation 4. It applies to
    inputs as the trainer sees them: after the scale where ``normalise`` is true."""
    centre: bool = False
    """Subtract the geometric median before encoding (tied only). The paper does not; topk always learns a centre."""
    normalise: bool = True
    """Scale inputs so that their mean squared norm is the width, and fold the scale into the finished dictionary. Makes lr and
    l1 mean the same at every layer. The paper's runs use raw activations: false."""
    lr: float | None = None
    """Peak learning rate of Adam (betas 0.9, 0.999). When left out: 2e-3 for topk (in runs of 300k presentations at width 576
    a higher one explains a little more but leaves more features rarely used, 1e-3 explains less), 1e-3 for tied (the paper)."""
    batch: int = 512
    """Activations a step. The paper uses 256 to 2048; in short runs more steps are worth more than larger ones."""
    tokens: int = 300_000
    """Activations presented in all, repeats counted; the last step is filled to a whole batch. The paper presents millions."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    decay: float = 0.2
    """Share of the steps, at the end, in which the learning rate falls to 0."""
    dead_after: int = 50_000
    """A feature is dead while it has not fired for this many presented activations. Gao et al. use 10 million, in runs of
    billions."""
    auxk: int | None = None
    """Dead features that try to explain the residual at each step (topk only; Gao et al., appendix A.2); half the width when left
    out, as they advise. 0 turns it off."""
    auxk_weight: float = 1 / 32
    """Weight of that auxiliary loss (Gao et al.)."""
    seed: int = 0
    """Seed of the weights and of the order of the data: same seed and data, same weights on one machine."""

    def __post_init__(self) -> None:
        TRAINABLES.get(self.architecture, where="architecture")
        for key in ("features", "k", "batch", "tokens", "dead_after"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise SuiteError(f"{key} = {value} cannot be trained", where=key, fix="choose 1 or more")
        for key in ("expansion", "lr"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise SuiteError(f"{key} = {getattr(self, key)} cannot be trained", where=key, fix="choose a number above 0")
        for key in ("l1", "auxk_weight"):
            if not getattr(self, key) >= 0:
                raise SuiteError(f"{key} = {getattr(self, key)} is not a penalty", where=key, fix="choose 0 or more")
        if self.auxk is not None and self.auxk < 0:
            raise SuiteError(f"auxk = {self.auxk} is not a number of features", where="auxk", fix="choose 0 (off) or more")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise SuiteError(
                f"warmup = {self.warmup} and decay = {self.decay} do not fit into one run",
                where="warmup, decay",
                fix="choose shares of the steps, 0 to 1, that sum to 1 at most",
            )

    def n_features(self, width: int) -> int:
        """Number of features at a given width.

        Raises:
            SuiteError: fewer features than k.
        """
        count = self.features if self.features is not None else round(self.expansion * width)
        if count < 1 or (self.architecture == "topk" and count < self.k):
            raise SuiteError(
                f"{count} features cannot have k = {self.k} active ones",
                where="features",
                fix="lower k or raise features or expansion",
            )
        return count
