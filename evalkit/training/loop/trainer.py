"""One autoencoder in training: what a step does, and everything that has to be kept to go on later.

1. ``begin`` takes the input scale (mean squared norm = width), the geometric median and the variance from a sample of the data.
2. ``Trainer.step``: forward, backward, constraint on gradients, clipping, Adam at the scheduled rate, constraint on weights,
   dead-feature count. With several processes, each takes its part of the batch and gradients are averaged (``Group``).
3. ``state`` and ``load_state`` hold weights, buffers, moments and counters: a run that was saved and loaded goes on bit for bit
   on the CPU, with the same threads and where ``evalkit.util.arithmetic`` doubts nothing.
4. ``freeze`` folds the scale into the weights: the dictionary reads and writes plain activations.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float

from evalkit.dictionaries.base import Dictionary
from evalkit.errors import DictionaryError
from evalkit.training.architectures.base import TRAINABLES, Start
from evalkit.training.parallel.group import ALONE, Group
from evalkit.training.settings.config import TrainConfig

SAMPLE = 32_768
"""Activations behind the scale, the centre and the variance (the sample size Gao et al. take their median from)."""


class Beginning(NamedTuple):
    """What a run takes from its data before the first step."""

    scale: float
    """Inputs are multiplied by it."""
    start: Start


class Step(NamedTuple):
    """What one step reports; tensors on the trainer's device, so that nothing waits for them."""

    loss: Float[torch.Tensor, ""]
    fvu: Float[torch.Tensor, ""]
    l0: Float[torch.Tensor, ""]


class Stepper(Protocol):
    """What takes the steps of a trainer in its place, on the trainer's own state."""

    def step(self, x: Float[torch.Tensor, "B D"]) -> Step:
        """``Trainer.step``."""
        ...


def geometric_median(x: Float[torch.Tensor, "N D"], rounds: int = 50) -> Float[torch.Tensor, " D"]:
    """The point with the least summed distance to the rows of ``x`` (Weiszfeld's iteration from the mean)."""
    point = x.mean(0)
    for _ in range(rounds):
        weights = 1 / (x - point).norm(dim=1).clamp(min=1e-8)
        moved = (weights @ x) / weights.sum()
        if (moved - point).norm() <= 1e-6 * moved.norm().clamp(min=1e-8):
            return moved
        point = moved
    return point


def schedule(config: TrainConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate at step 0 <= ``step`` < ``steps``."""
    rise = config.warmup * steps if config.warmup < 1 else config.warmup
    fall = config.decay * steps if config.decay < 1 else config.decay
    up = (step + (0 if config.idle_start else 1)) / rise if rise > 0 else 1.0
    down = (steps - step) / fall if fall > 0 else 1.0
    return min(1.0, up, down)


def begin(config: TrainConfig, drawn: Float[torch.Tensor, "N D"], where: str) -> Beginning:
    """Scale and starting point from a sample of the data, drawn by the config's seed.

    Raises:
        DictionaryError: the data do not vary.
        SuiteError: too few features for the architecture's settings.
    """
    width = drawn.shape[1]
    squared = float(drawn.double().square().sum(1).mean())
    if not squared > 0 or not float(drawn.var(0).sum()) > 1e-12 * squared:
        raise DictionaryError("the activations do not vary: there is nothing to learn", where=where)
    scale = math.sqrt(width / squared) if config.normalise else 1.0
    drawn = drawn * scale
    variance = float((drawn - drawn.mean(0)).double().square().sum(1).mean())
    generator = torch.Generator().manual_seed(config.seed)
    return Beginning(scale, Start(config.n_features(width), geometric_median(drawn[:8192]), variance, config.steps, generator))


class Trainer:
    """An autoencoder and its optimiser.

    Args:
        config: the run's settings.
        beginning: from ``begin``.
        device: where it is trained.
        group: the processes that train together.

    Attributes:
        stepper: takes the steps in place of ``step``, where one is given (``topk_step``).
    """

    def __init__(
        self, config: TrainConfig, beginning: Beginning, device: str | torch.device = "cpu", group: Group = ALONE
    ) -> None:
        self.config, self.scale, self.start, self.group = config, beginning.scale, beginning.start, group
        self.device = torch.device(device)
        self.module = TRAINABLES.get(config.architecture)(config.own, beginning.start, config.error, config.compute)
        self.module.to(self.device)
        self.module.processes = group
        for part in self.module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.ndim == 0 and not buffer.is_floating_point():
                    setattr(part, name, buffer.cpu())  # counters: to read one must not wait for the device
        self.optimiser = torch.optim.Adam(self.module.parameters(), lr=config.peak_lr, betas=config.betas, fused=True)
        self.quiet_for = torch.zeros(self.start.features, dtype=torch.int64, device=self.device)
        """Activations since each feature last fired."""
        self.steps_done = 0
        self.stepper: Stepper | None = None

    @property
    def dead(self) -> torch.Tensor:
        """(F,) features that have not fired for ``dead_after`` activations."""
        return self.quiet_for >= self.config.dead_after

    def step(self, x: Float[torch.Tensor, "B D"]) -> Step:
        """One step on a batch in the units of the data: this process's share of it, where there are several."""
        if self.stepper is not None:
            return self.stepper.step(x)
        x = x.to(self.device, torch.float32) * self.scale
        for settings in self.optimiser.param_groups:
            settings["lr"] = self.config.peak_lr * schedule(self.config, self.steps_done, self.start.steps)
        result = self.module(x, self.dead)
        self.optimiser.zero_grad(set_to_none=True)
        result.loss.backward()
        fvu = result.residual.square().sum() / (len(x) * self.start.variance)
        report = [result.loss.detach(), fvu, result.l0.detach()]
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        self.group.average([*gradients, *report, *self.module.buffers_to_average()])
        fired = self.group.any(result.fired)
        self.module.constrain_gradients()
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip)
        self.optimiser.step()
        self.module.constrain_weights()
        self.module.step_number += 1
        self.quiet_for += len(x) * self.group.size
        self.quiet_for[fired] = 0
        self.steps_done += 1
        return Step(*report)

    def state(self) -> dict[str, Any]:
        """Everything a later ``load_state`` needs to go on."""
        return {
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "quiet_for": self.quiet_for,
            "steps_done": self.steps_done,
            "scale": self.scale,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, which a trainer of the same config gave."""
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.quiet_for.copy_(state["quiet_for"])
        self.steps_done, self.scale = int(state["steps_done"]), float(state["scale"])

    @property
    def finite(self) -> bool:
        """Whether every weight is a number."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.module.parameters())

    def freeze(self, *, hook_point: str, model: str, details: dict[str, Any]) -> Dictionary:
        """The finished dictionary, on the CPU."""
        recipe = {**dataclasses.asdict(self.config), "lr": self.config.peak_lr, "features": self.start.features}
        more = {"trained": recipe, "presented": self.steps_done * self.config.batch, "scale": self.scale, **details}
        return self.module.cpu().freeze(self.scale, hook_point=hook_point, model=model, details=more)
