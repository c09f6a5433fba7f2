"""The trainer's kernels on a GPU: each against its PyTorch twin and against the floor that memory and arithmetic set.

    python benchmarks/kernels.py [--quick] [--json FILE]

1. Two ceilings are measured first: a large copy (bytes read and written a second) and a large bfloat16 product.
2. Each kernel is checked against its twin on random inputs, then both are timed: CUDA events, median of many, after a warm-up.
   The floor is the larger of bytes it must move over the first ceiling and operations over the second; inputs that fit the cache
   can beat it.
3. Whole steps: the trainer's own, the fused one launched kernel by kernel, and as a CUDA graph.
4. The share of active features up to which sparse weight gradients beat dense ones (``break_even``).

Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import break_even
import torch
from machine import ceilings, milliseconds

from evalkit.training.kernels import dispatch as compute
from evalkit.training.kernels import ops, oracles
from evalkit.training.kernels.oracles import Adam, Moments
from evalkit.training.loop.topk_step import FusedStep
from evalkit.training.loop.trainer import Trainer, begin
from evalkit.training.settings.config import train_config

SIZES = [(8192, 512, 4096, 32), (8192, 512, 16_384, 32), (4096, 2304, 16_384, 64), (4096, 2304, 65_536, 64)]
"""B, D, F, k."""


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


class Case(NamedTuple):
    """One operation at one size."""

    name: str
    work: Callable[[Any], torch.Tensor]
    """Runs it as the module given to it has it: ``ops`` (kernels) or ``oracles``."""
    size: float
    """Bytes it must move."""
    operations: float


def cases(B: int, D: int, F: int, k: int) -> list[Case]:
    """The operations of a step with bfloat16 factors."""
    kind = torch.bfloat16
    W = torch.nn.functional.normalize(torch.randn(F, D, device="cuda"), dim=1).to(kind)
    x, b = torch.randn(B, D, device="cuda"), torch.zeros(D, device="cuda")
    rows, bias = x.to(kind), torch.zeros(F, device="cuda")
    scores = rows @ W.T
    values, indices = ops.select(scores, bias, k)
    flat, live = values.flatten(), values.flatten() > 0
    tokens = torch.arange(B, dtype=torch.int32, device="cuda").repeat_interleave(k)
    pairs = ops.by_feature(indices.flatten(), live, F)
    used = pairs.counts > 0
    dec, enc = (Moments(*(torch.rand(F, D, device="cuda") for _ in range(4))) for _ in range(2))
    vector = Moments(*(torch.rand(F, device="cuda") for _ in range(4)))
    shadows = [torch.empty(F, D, device="cuda", dtype=kind) for _ in range(2)]
    adam = Adam(torch.tensor([0.0, 1.0, 1.0], device="cuda"), 0.9, 0.999, 1e-8)

    def summed(made: Any) -> torch.Tensor:
        return torch.where(used[:, None], made.segment_sums(pairs, flat, tokens, rows, flat, tokens, rows).encoder, 0.0)

    def updated(made: Any) -> torch.Tensor:
        made.adam_features(dec, enc, vector, pairs.counts, adam, True, *shadows)
        return shadows[0]  # at rate 0: unit rows, whatever steps the other took before

    gather = 2.0 * B * k * D
    return [
        Case("select", lambda made: made.select(scores, bias, k).values, 2.0 * B * F, 0.0),
        Case(
            "decode, error, dots",
            lambda made: made.decode_error(values, indices, W, x, b, kind).residual,
            gather + 6.0 * B * D,
            4.0 * B * k * D,
        ),
        Case("sort by feature", lambda made: made.by_feature(indices.flatten(), live, F).counts, 4.0 * 8 * B * k, 0.0),
        Case("weight gradients", summed, 2 * gather + 8.0 * F * D, 4.0 * B * k * D),
        Case("adam, constraint, copy", updated, 30.0 * 2 * F * D, 0.0),
    ]


def whole_steps(B: int, D: int, F: int, k: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a step by each way."""
    config = train_config({"features": F, "k": k, "batch": B, "tokens": B * 10_000, "compute": "bfloat16", "dead_after": 10**9})
    x = torch.randn(B, D, device="cuda")
    beginning = begin(config, torch.randn(8192, D), "random")
    result = {}
    plain = Trainer(config, beginning, "cuda")
    result["autograd"] = milliseconds(lambda: plain.step(x), repeats)
    fast = FusedStep(Trainer(config, beginning, "cuda"))
    eager = FusedStep(Trainer(config, beginning, "cuda"))
    eager.step(x)  # takes over the trainer's state
    eager.whole = eager._whole  # type: ignore[assignment]  # launched kernel by kernel
    result["fused"] = milliseconds(lambda: eager.step(x), repeats)
    result["graph"] = milliseconds(lambda: fast.step(x), repeats)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two smaller sizes, fewer repeats")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: not run")
        return
    repeats = 20 if options.quick else 100
    bandwidth, rate = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, bfloat16 product {rate / 1e12:.0f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    for B, D, F, k in SIZES[: 2 if options.quick else None]:
        print(f"\nB {B}  D {D}  F {F}  k {k}\n{'':22}{'kernel':>9}{'twin':>9}{'ratio':>8}{'floor':>9}{'distance':>11}")
        for case in cases(B, D, F, k):
            apart = distance(case.work(ops), case.work(oracles))
            mine = milliseconds(partial(case.work, ops), repeats)
            twin = milliseconds(partial(case.work, oracles), max(5, repeats // 10))
            floor = 1e3 * max(case.size / bandwidth, case.operations / rate)
            print(f"{case.name:22}{mine:9.3f}{twin:9.3f}{twin / mine:8.1f}{floor:9.3f}{apart:11.1e}")
            times = {"ms": mine, "twin": twin, "floor": floor, "apart": apart}
            rows.append({"B": B, "D": D, "F": F, "k": k, "name": case.name, **times})
        steps = whole_steps(B, D, F, k, repeats)
        print("step: " + ", ".join(f"{name} {ms:.3f} ms ({B / ms / 1e3:.2f} Mtok/s)" for name, ms in steps.items()))
        rows.append({"B": B, "D": D, "F": F, "k": k, "name": "step", **steps})
        torch.cuda.empty_cache()
    device = torch.device("cuda")
    share = break_even.measure(device)
    print(f"\nsparse weight gradients pay up to k / F = {share:.4f} (taken until measured: {compute.SPARSE})")
    print(f'for compute.MEASURED: "{torch.cuda.get_device_name()}": {share:.4f},')
    if options.json:
        measured = {"device": torch.cuda.get_device_name(), "sparse": share}
        options.json.write_text(json.dumps({**measured, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
