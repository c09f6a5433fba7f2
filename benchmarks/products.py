"""Float32 products on a CPU: PyTorch's own (MKL on x86) against oneDNN's, by size, and a language model by both.

    python benchmarks/products.py [--threads N] [-o FILE]

1. Products x W^T of the sizes of a small language model, for different numbers of tokens, and what an autoencoder adds to them;
   medians of rounds in turn.
2. A packaged language model's whole pass with layers of either kind, in turn.
3. Largest difference of the results.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import described
from torch.nn import functional as F

from evalkit.models.loading import ModelConfig, load
from evalkit.util import matmul as products
from evalkit.util.progress import Progress

SIZES = [(576, 576), (576, 1536), (1536, 576), (576, 2304), (2304, 576)]
"""K and N: attention, MLP and a dictionary of a model 576 wide."""


def in_turn(ways: list[Callable[[], torch.Tensor]], rounds: int) -> list[list[float]]:
    """Milliseconds of each way, round by round."""
    times: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 2):
        for place in [(number + i) % len(ways) for i in range(len(ways))]:
            start = time.perf_counter()
            ways[place]()
            if number > 1:
                times[place].append(1e3 * (time.perf_counter() - start))
    return times


def row(name: str, ways: list[Callable[[], torch.Tensor]], rounds: int) -> str:
    """A line of the table; the first way is PyTorch's own."""
    slow, fast = in_turn(ways, rounds)
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    one, two = (way() for way in ways)
    apart = float((one - two).norm() / one.norm())
    low, _, high = statistics.quantiles(ratios, n=4)
    return (
        f"| {name} | {statistics.median(slow):.3f} | {statistics.median(fast):.3f} | "
        f"**{statistics.median(ratios):.2f}x** ({low:.2f} to {high:.2f}) | {apart:.1e} |"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--package", default="smollm2-135m-instruct")
    parser.add_argument("-o", "--output", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    machine, chosen = described("cpu"), products.pays()
    os.environ[products.VARIABLE] = "onednn"
    products.pays.cache_clear()
    if not products.pays():
        raise SystemExit("this PyTorch has no oneDNN that works")
    lines = [
        "# Float32 products on a CPU", "",
        f"{machine}; PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. Left to itself evalkit takes "
        f"{'oneDNN' if chosen else 'the products of PyTorch'} here. {a.rounds} rounds in turn.", "",
        "| product | PyTorch's own, ms | oneDNN, ms | times faster | relative difference |", "|---|---:|---:|---|---:|",
    ]  # fmt: skip
    for tokens in (16, 128, 2048):
        for K, N in SIZES:
            x, W = torch.randn(tokens, K), torch.randn(N, K)
            ways = [lambda x=x, W=W: F.linear(x, W), lambda x=x, W=W: products.linear(x, W)]
            lines.append(row(f"({tokens}, {K}) by ({K}, {N})", ways, a.rounds))
    # what an autoencoder's encoder, (D, F), and the gradient of one are
    x, W, d = torch.randn(2048, 576), torch.randn(576, 2304), torch.randn(2048, 2304)
    lines.append(row("x @ W_enc, (2048, 576) by (576, 2304)", [lambda: x @ W, lambda: products.times(x, W)], a.rounds))
    lines.append(row("d^T @ x, (2304, 2048) by (2048, 576)", [lambda: d.mT @ x, lambda: products.times(d.mT, x)], a.rounds))
    os.environ[products.VARIABLE] = "mkl"
    products.pays.cache_clear()
    plain = load(ModelConfig(package=a.package, device="cpu"), Progress(quiet=True)).model
    os.environ[products.VARIABLE] = "onednn"
    products.pays.cache_clear()
    quick = copy.deepcopy(plain)
    products.quicken(quick)
    for shape in ((1, 128), (16, 128)):
        tokens_in = torch.randint(100, 10_000, shape, generator=torch.Generator().manual_seed(0))
        passes = [lambda m=m, t=tokens_in: m(input_ids=t, use_cache=False).logits for m in (plain, quick)]
        lines.append(row(f"{a.package}, {shape[0]} windows of {shape[1]}, logits", passes, max(5, a.rounds // 3)))
    text = "\n".join(lines) + "\n"
    print(text)
    if a.output:
        a.output.write_text(text)


if __name__ == "__main__":
    main()
