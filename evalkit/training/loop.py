"""The training loop: data in, frozen dictionary and history out.

1. A seeded sample gives the input scale (mean squared norm = width), the geometric median and the variance.
2. Adam with linear warm-up and linear decay to zero; the architecture's constraints run around each step.
3. A feature is dead while it has not fired for ``dead_after`` activations; architectures may use that.
4. Every loss is checked: NaN or infinity ends the run with the step and advice, and nothing is returned.
5. The scale is folded into the weights, so that the dictionary reads and writes plain activations.

On the CPU the same seed, data and number of threads give bit-identical weights.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, NamedTuple

import torch
from jaxtyping import Float

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.fitting import sample
from evalkit.dictionaries.registry import Vectors
from evalkit.errors import DictionaryError
from evalkit.progress import Progress
from evalkit.training.base import TRAINABLES, Start
from evalkit.training.config import TrainConfig, TrainingFailed
from evalkit.training.supply import batches

SAMPLE = 32_768
"""Activations behind the scale, the centre and the variance (the sample size Gao et al. take their median from)."""

ROWS = 50
"""Most rows of a history."""


class Trained(NamedTuple):
    """What a training run gives."""

    dictionary: Dictionary
    """Frozen, in the units of the activations."""
    history: list[dict[str, float]]
    """Up to ``ROWS`` rows: step, tokens, loss, fvu, l0 (each a mean since the row before), dead_share, tokens_per_second."""


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
    rise = config.warmup * steps
    fall = config.decay * steps
    up = (step + 1) / rise if rise > 0 else 1.0
    down = (steps - step) / fall if fall > 0 else 1.0
    return min(1.0, up, down)


def train(config: TrainConfig, x: Vectors, *, hook_point: str, model: str, progress: Progress, name: str = "") -> Trained:
    """Train a dictionary on activation vectors.

    Args:
        config: the run's settings.
        x: (N, D) float32 activations, in memory or memory-mapped; only rows that take part in metrics.
        hook_point: where ``x`` was read.
        model: identity of the language model ``x`` comes from.
        progress: where the stage is shown.
        name: what the stage calls the dictionary; its architecture when left out.

    Raises:
        DictionaryError: the data hold NaN or infinities, or do not vary.
        TrainingFailed: the loss became NaN or infinite.
        SuiteError: fewer features than k.
    """
    if x.ndim != 2 or x.shape[0] < 2:
        raise DictionaryError(
            f"training needs at least two activation vectors as rows, not an array of shape {tuple(x.shape)}",
            where=hook_point,
            fix="give it more fitting text",
        )
    width = x.shape[1]
    generator = torch.Generator().manual_seed(config.seed)
    drawn = sample(x, SAMPLE, config.seed)
    squared = float(drawn.double().square().sum(1).mean())
    if not squared > 0 or not float(drawn.var(0).sum()) > 1e-12 * squared:
        raise DictionaryError("the activations do not vary: there is nothing to learn", where=hook_point)
    scale = math.sqrt(width / squared) if config.normalise else 1.0
    drawn = drawn * scale
    variance = float((drawn - drawn.mean(0)).double().square().sum(1).mean())
    start = Start(config.n_features(width), geometric_median(drawn[:8192]), variance, generator)
    architecture = TRAINABLES.get(config.architecture)
    module = architecture(config, start)
    peak = architecture.default_lr if config.lr is None else config.lr
    optimiser = torch.optim.Adam(module.parameters(), lr=peak, fused=True)

    steps = math.ceil(config.tokens / config.batch)
    every = max(1, math.ceil(steps / ROWS))
    quiet_for = torch.zeros(start.features, dtype=torch.int64)  # activations since each feature last fired
    history: list[dict[str, float]] = []
    sums, count, since = [0.0, 0.0, 0.0], 0, time.perf_counter()
    supply = batches(x, config.batch, config.seed)
    title = f"training {name or config.architecture} ({start.features} features)"
    with progress.stage(title, steps * config.batch, "tokens") as stage:
        for step in range(steps):
            batch = next(supply) * scale
            for group in optimiser.param_groups:
                group["lr"] = peak * schedule(config, step, steps)
            result = module(batch, quiet_for >= config.dead_after)
            loss = float(result.loss.detach())
            if not math.isfinite(loss):
                raise TrainingFailed(
                    f"training diverged: the loss became {loss} at step {step + 1} of {steps}",
                    where=f"{config.architecture} at {hook_point}",
                    fix=f"lower lr (now {peak:g}), or raise warmup; check the activations for extreme values",
                )
            optimiser.zero_grad(set_to_none=True)
            result.loss.backward()
            module.constrain_gradients()
            optimiser.step()
            module.constrain_weights()

            quiet_for += config.batch
            quiet_for[result.fired] = 0
            fvu = float(result.residual.square().sum()) / (config.batch * variance)
            sums = [total + new for total, new in zip(sums, (loss, fvu, result.l0), strict=True)]
            count += 1
            if (step + 1) % every == 0 or step + 1 == steps:
                now = time.perf_counter()
                row = {
                    "step": step + 1,
                    "tokens": (step + 1) * config.batch,
                    **dict(zip(("loss", "fvu", "l0"), (total / count for total in sums), strict=True)),
                    "dead_share": float((quiet_for >= config.dead_after).float().mean()),
                    "tokens_per_second": count * config.batch / max(now - since, 1e-9),
                }
                history.append(row)
                sums, count, since = [0.0, 0.0, 0.0], 0, now
            stage.advance(config.batch, f"FVU {fvu:.3f}")
    if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
        raise TrainingFailed(
            f"training diverged: the last of {steps} steps left NaN or infinite weights",
            where=f"{config.architecture} at {hook_point}",
            fix=f"lower lr (now {peak:g}); check the activations for extreme values",
        )
    last = history[-1]
    details: dict[str, Any] = {
        "trained": {**dataclasses.asdict(config), "lr": peak, "features": start.features},
        "vectors": int(x.shape[0]),
        "presented": steps * config.batch,
        "scale": scale,
        "end": {key: last[key] for key in ("loss", "fvu", "l0", "dead_share")},
    }
    dictionary = module.freeze(scale, hook_point=hook_point, model=model, details=details)
    return Trained(dictionary, history)
