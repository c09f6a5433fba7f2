"""Eight same-shape autoencoders fed from one pass, against eight runs: what sharing batches, products and the model's pass saves.

1. All contestants of a shape start from the same weights (eight seeds) and see the same batches in the same order.
   'runs': one trainer after the other, each over all batches. 'ensemble': each batch through all trainers, one after the other.
   'stack': each batch through all at once (``training.stacks``).
2. With --model, the same with activations made by the language model: eight passes for eight runs, one for the ensemble.
3. Rounds of a few steps, contestants in turn (ABC, BCA, ...), after an untimed round. A ratio is the median over rounds of two
   contestants' times in the same round, with the smallest and the largest beside it.
4. A ratio is printed only where the last losses of all members agree with those of 'runs' to one part in a thousand.

    python benchmarks/ensemble.py --model smollm2-135m-instruct -o FILE
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import described, timed
from vectors import load

import evalkit
from evalkit.training.config import TrainConfig, train_config
from evalkit.training.ensemble import Ensemble
from evalkit.training.trainer import Trainer, begin

HOOK = "x"
AGREE = 1e-3
CONTEXT = 128


class Contestant(NamedTuple):
    """One way of training all members."""

    name: str
    step: Callable[[list[torch.Tensor]], None]
    """All members through some batches."""
    trainers: list[Trainer]


def contestants(configs: list[TrainConfig], sample: torch.Tensor, device: str) -> list[Contestant]:
    """The three ways, each with trainers of its own."""

    def members() -> list[Trainer]:
        return [Trainer(config, begin(config, sample, HOOK), device) for config in configs]

    alone, apart, stacked = members(), members(), members()
    ensemble, stack = (Ensemble(t, [HOOK] * len(t), batched=b) for t, b in ((apart, False), (stacked, True)))

    def runs(batches: list[torch.Tensor]) -> None:
        for trainer in alone:
            for x in batches:
                trainer.step(x)

    def fed(which: Ensemble) -> Callable[[list[torch.Tensor]], None]:
        def step(batches: list[torch.Tensor]) -> None:
            for x in batches:
                which.step({HOOK: x})

        return step

    return [
        Contestant("runs", runs, alone), Contestant("ensemble", fed(ensemble), apart), Contestant("stack", fed(stack), stacked),
    ]  # fmt: skip


class Passes:
    """Batches made by a language model that is cut off at a hook point, from random tokens: their time is that of any text."""

    def __init__(self, name: str, hook_point: str, rows: int) -> None:
        from evalkit.models.language_model import load_model

        self.model, self.hook_point, self.rows = load_model(name), hook_point, rows
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(100, 10_000, (-(-rows // CONTEXT), CONTEXT), generator=generator)

    def batch(self) -> torch.Tensor:
        """(B, D) activations."""
        return self.model.activations_at(self.tokens, [self.hook_point])[self.hook_point].flatten(0, 1)[: self.rows]


def ratio(slow: list[float], fast: list[float]) -> str:
    """Median over rounds of slow / fast, and its range."""
    found = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"**{statistics.median(found):.2f}x** ({min(found):.2f} to {max(found):.2f})"


def rounds(ways: list[Contestant], batches: Iterator[list[torch.Tensor]], a: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step of all members, by contestant and round; the first round is not kept."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(a.rounds + 1):
        some = next(batches)
        turn = number % len(ways)
        for way in ways[turn:] + ways[:turn]:  # none is always first
            took = timed(lambda way=way, some=some: way.step(some), len(some), a.device, a.clock).seconds
            if number:
                seconds[way.name].append(took)
    return seconds


def last_losses(way: Contestant, x: torch.Tensor) -> list[float]:
    """Each member's loss on a batch, without a step."""
    losses = []
    for trainer in way.trainers:
        with torch.no_grad():
            scaled = x.to(trainer.device) * trainer.scale
            losses.append(float(trainer.module(scaled, torch.zeros_like(trainer.dead)).loss))
    return losses


def one_shape(shape: tuple[int, int, int, int], a: argparse.Namespace) -> list[str]:
    """Lines of the table for one shape."""
    B, D, F, k = shape
    vectors = load(a.activations, 40 * B, D, F, 0)
    tokens = B * (a.rounds + 2) * a.steps
    table: dict[str, Any] = {
        "features": F,
        "batch": B,
        "tokens": tokens,
        "dead_after": 10_000_000,
        "architecture": a.architecture,
    }
    if a.architecture in ("topk", "batchtopk", "matryoshka"):
        table["k"] = k
    configs = [train_config({**table, "seed": seed}) for seed in range(a.members)]
    ways = contestants(configs, vectors.train[:8192], a.device)

    def batches() -> Iterator[list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(len(vectors.train), generator=generator)[: B * a.steps]
            yield [x.to(a.device) for x in vectors.train[order].split(B)]

    seconds = rounds(ways, batches(), a)
    check = vectors.held_out[:B]
    reference = last_losses(ways[0], check)
    lines = []
    for way in ways:
        median = statistics.median(seconds[way.name])
        worst = max(abs(x - y) / y for x, y in zip(last_losses(way, check), reference, strict=True))
        shown = ratio(seconds["runs"], seconds[way.name]) if worst < AGREE else f"losses differ by {worst:.1e}"
        speed = f"{a.members * B / median:,.0f}"
        lines.append(f"| {B}, {D}, {F}, {k} | {way.name} | cached | {median * 1e3:,.0f} | {speed} | {shown} |")
    if a.model and a.width in (0, D):
        lines += with_model(shape, ways, a)
    return lines


def with_model(shape: tuple[int, int, int, int], ways: list[Contestant], a: argparse.Namespace) -> list[str]:
    """The same with the language model's passes in the time."""
    passes = Passes(a.model, a.hook_point, shape[0])
    if passes.batch().shape != shape[:2]:
        return [f"| {shape} | | | | | {a.hook_point} of {a.model} is not {shape[1]} wide |"]

    def each(way: Contestant) -> Callable[[list[torch.Tensor]], None]:
        def step(_: list[torch.Tensor]) -> None:
            for trainer in way.trainers:
                trainer.step(passes.batch())

        return step

    def shared(way: Contestant) -> Callable[[list[torch.Tensor]], None]:
        return lambda _: way.step([passes.batch()])

    fed = [way._replace(step=each(way) if way.name == "runs" else shared(way)) for way in ways]

    def nothing() -> Iterator[list[torch.Tensor]]:
        while True:
            yield [torch.empty(0)]

    seconds = rounds(fed, nothing(), a)
    lines = []
    for way in fed:
        median = statistics.median(seconds[way.name])
        count = f"{len(way.trainers)} passes" if way.name == "runs" else "1 pass"
        speed = f"{a.members * shape[0] / median:,.0f}"
        shown = ratio(seconds["runs"], seconds[way.name])
        lines.append(f"| {', '.join(map(str, shape))} | {way.name} | {count} | {median * 1e3:,.0f} | {speed} | {shown} |")
    return lines


def main() -> int:
    """Print the table, and write it where -o says."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--shape", action="append", metavar="B,D,F,K", help="may be given several times")
    p.add_argument("--architecture", default="topk", help="of all members; K counts only where it has a k (default %(default)s)")
    p.add_argument("--members", type=int, default=8)
    p.add_argument("--steps", type=int, default=4, help="a round")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--device", default="cpu")
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, where others use the machine")
    p.add_argument("--activations", type=Path, help="(N, D) .npy; planted vectors when left out")
    p.add_argument("--model", help="also with this language model's passes")
    p.add_argument("--width", type=int, default=0, help="only the shapes of this width with the model")
    p.add_argument("--hook-point", default="blocks.8.hook_resid_post")
    p.add_argument("-o", "--output", type=Path)
    a = p.parse_args()
    shapes = [tuple(int(part) for part in text.split(",")) for text in a.shape or ["2048,576,2304,32", "256,64,512,8"]]
    clock = "processor time" if a.clock == "cpu" else "wall clock"
    lines = [
        f"# {a.members} same-shape autoencoders ({a.architecture}): one ensemble against {a.members} runs", "",
        f"{datetime.date.today()}, evalkit {evalkit.__version__}, torch {torch.__version__}; {described(a.device)}.",
        f"{a.rounds} rounds of {a.steps} steps in turn, {clock}; median ratio (smallest to largest). Float32 throughout.", "",
        "| B, D, F, k | how | activations | ms for a step of all | tokens/s, summed | against runs |",
        "|---|---|---|---:|---:|---:|",
    ]  # fmt: skip
    for shape in shapes:
        lines += one_shape(shape, a)  # type: ignore[arg-type]
    if a.model:
        lines += ["", f"'passes': {a.model} up to {a.hook_point} in the time, one batch a pass, a step a round."]
    text = "\n".join(lines) + "\n"
    print(text)
    if a.output:
        a.output.parent.mkdir(parents=True, exist_ok=True)
        a.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
