"""One contract for every trainer of the benchmark, and evalkit behind it.

1. A ``Job`` says what is trained: architecture, sizes, length of the run.
2. All contestants of a job start from the same ``Weights``, copied into their own layout, and get the same batches.
3. ``step`` is one training step as the library does it. ``held_out`` measures what the autoencoder does with unseen vectors, in
   the way it trains: the k largest of a token, or of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch

from evalkit.training.loop.topk_step import FusedStep
from evalkit.training.loop.trainer import Trainer, begin
from evalkit.training.settings.config import train_config

FRACTIONS = (0.125, 0.125, 0.25, 0.5)
"""Groups of the Matryoshka autoencoders; whole numbers at every width used."""


class Job(NamedTuple):
    """One training run."""

    architecture: str
    batch: int
    width: int
    features: int
    k: int
    steps: int
    """Of the whole run, for schedules."""
    rise: int
    """Steps of warm-up, where the recipe has one: shorter than the thousand that libraries have, so that short runs learn."""
    device: str
    window: int = 0
    """Silent steps after which a feature is dead; 0 leaves it as the recipe has it."""
    lr: float = 0.0
    """Learning rate; 0 leaves the library's own, which the recipe has too."""


class Weights(NamedTuple):
    """Where everybody starts; rows are features."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor


class HeldOut(NamedTuple):
    """What an autoencoder does with a batch of unseen vectors."""

    error: float
    """Summed squared error."""
    active: int
    """Active codes, in all."""
    fired: torch.Tensor
    """(F,) which features were active at all."""


def sparsity_rise(job: Job) -> int:
    """dictionary_learning's steps of rising L1: 2000, or what fits the run, which it insists on."""
    return min(2000, job.steps - 1)


def first_weights(job: Job, x: torch.Tensor, length: float, seed: int) -> Weights:
    """Random decoder rows of one length, the encoder as the decoder's transpose, b_dec at the mean of ``x``.

    With a window, the last eighth of the features starts too low to be chosen, so that something is dead.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(job.features, job.width, generator=generator) - 0.5
    rows *= length / rows.norm(dim=1, keepdim=True)
    b_enc = torch.zeros(job.features)
    if job.window:
        b_enc[-(job.features // 8) :] = -2.5 * length
    return Weights(*(part.to(job.device) for part in (rows.clone(), b_enc, rows, x.mean(0).cpu())))


class Contestant(ABC):
    """A trainer of one autoencoder."""

    name: str
    """With version and settings, as printed."""
    recipe: str
    """evalkit's name of what it does."""
    length: float = 1.0
    """Of the decoder rows it starts with, as the library ships."""
    comparable: str = ""
    """Why its losses are not evalkit's in that recipe; empty where they should be."""

    @abstractmethod
    def step(self, x: torch.Tensor) -> torch.Tensor | float:
        """One training step on a batch (B, D); the loss before it."""

    @abstractmethod
    def held_out(self, x: torch.Tensor) -> HeldOut:
        """What the autoencoder does with unseen vectors."""


class Evalkit(Contestant):
    """evalkit in the recipe of another trainer."""

    def __init__(self, job: Job, weights: Weights, recipe: str, compute: str, sample: torch.Tensor) -> None:
        self.recipe, self.name = recipe, f"evalkit, recipe {recipe}, {compute}"
        table: dict[str, Any] = {
            "architecture": job.architecture, "features": job.features, "batch": job.batch, "tokens": job.batch * job.steps,
            "recipe": recipe, "compute": compute,
        }  # fmt: skip
        if job.architecture in ("topk", "batchtopk", "matryoshka"):
            table["k"] = job.k
        if job.architecture == "matryoshka":
            table["fractions"] = list(FRACTIONS)
        if recipe != "saelens":
            table["warmup"] = float(job.rise)
        if recipe == "dictionary_learning" and job.architecture == "relu":
            table["l1_warmup"] = float(sparsity_rise(job))
        if job.lr:
            table["lr"] = job.lr
        if job.window:
            # SAELens calls a feature dead after more than the window, dictionary_learning counts the batch at hand
            table["dead_after"] = job.batch * (job.window + (-1 if recipe == "dictionary_learning" else 1))
        config = train_config(table)
        self.trainer = Trainer(config, begin(config, sample.cpu(), "benchmark"), job.device)
        FusedStep.give(self.trainer)
        with torch.no_grad():
            for name, value in weights._asdict().items():
                getattr(self.trainer.module, name).copy_(value)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return self.trainer.step(x).loss

    @torch.no_grad()
    def held_out(self, x: torch.Tensor) -> HeldOut:
        module = self.trainer.module.eval()
        seen = module(x, torch.zeros(self.trainer.start.features, dtype=torch.bool, device=x.device))
        module.train()
        return HeldOut(float(seen.residual.double().square().sum()), round(float(seen.l0) * len(x)), seen.fired)
