"""What it costs that products hang on no address: MKL's modes, and copies to aligned memory, against MKL as it is.

    python benchmarks/arithmetic.py [--threads N] [--rounds N] [-o FILE]

1. A process for each value of MKL_CBWR, which MKL reads once. They take turns, round by round, so that a slow minute hits all.
2. Each multiplies matrices of the sizes of training and of a small language model, and takes TopK training steps. Beside
   MKL as it is, the same process multiplies copies that it first makes at aligned addresses.
3. Times are processor time; ratios are taken round by round against MKL as it is. Each process tells whether its products had
   equal bits at all addresses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODES = ("", "AUTO,STRICT", "AVX2,STRICT", "COMPATIBLE")
SIZES = ((16, 576, 2304), (256, 32, 64), (2048, 576, 2304))
"""B, D and F."""
STEP = {"architecture": "topk", "features": 2304, "k": 32, "batch": 1024, "tokens": 1024 * 10_000, "dead_after": 10**6}


def works() -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    import torch

    from evalkit.training.data.batches import VectorSupply
    from evalkit.training.loop.together import Member, Together
    from evalkit.training.settings.config import train_config
    from evalkit.util.arithmetic import placed

    found: dict[str, Callable[[], Any]] = {}
    for B, D, F in SIZES:
        x, W, d = torch.randn(B, D), torch.randn(F, D), torch.randn(B, F)
        found[f"x W^T, ({B}, {D}) by ({D}, {F})"] = lambda x=x, W=W: x @ W.mT
        found[f"aligned copies: x W^T, ({B}, {D}) by ({D}, {F})"] = lambda x=x, W=W: placed(x, 0) @ placed(W, 0).mT
        found[f"d^T x, ({F}, {B}) by ({B}, {D})"] = lambda x=x, d=d: d.mT @ x
        found[f"aligned copies: d^T x, ({F}, {B}) by ({B}, {D})"] = lambda x=x, d=d: placed(d, 0).mT @ placed(x, 0)
    config = train_config(STEP)
    supplies = {"h": VectorSupply(torch.randn(8192, 576), config.batch, 0, identity="noise")}
    run = Together([Member("SAE", config, "h")], supplies, model="none")
    found["TopK training step, batch 1024, 576 wide, 2304 features"] = run.step
    return found


def child(threads: int) -> None:
    """Answers each line, the name of a work, with milliseconds of processor time."""
    import torch

    from evalkit.util import arithmetic

    torch.set_num_threads(threads)
    known = works()
    told = {"names": list(known), "mode": arithmetic.mode(), "alike": arithmetic.placed_alike(), "words": arithmetic.words()}
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        work = known[line.rstrip("\n")]
        work()
        begin, repeats = time.process_time(), 0
        while repeats < 3 or time.process_time() - begin < 0.1:
            work()
            repeats += 1
        print(1e3 * (time.process_time() - begin) / repeats, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    a = parser.parse_args()
    if a.child:
        return child(a.threads)
    command = [sys.executable, __file__, "--child", "--threads", str(a.threads)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "MKL_CBWR": mode})
        for mode in MODES
    ]
    told = [json.loads(process.stdout.readline()) for process in running]  # type: ignore[union-attr]
    names = told[0]["names"]
    times: dict[tuple[str, int], list[float]] = {}
    for number in range(a.rounds):
        for name in names:
            for place in [(number + i) % len(running) for i in range(len(running))]:
                if place and name.startswith("aligned"):
                    continue
                process = running[place]
                print(name, file=process.stdin, flush=True)
                times.setdefault((name, place), []).append(float(process.stdout.readline()))  # type: ignore[union-attr]
    for process in running:
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
    text = table(told, names, times, a.rounds)
    print(text)
    if a.output:
        a.output.write_text(text)


def table(told: list[dict[str, Any]], names: list[str], times: dict[tuple[str, int], list[float]], rounds: int) -> str:
    """The result in Markdown."""
    from machine import described

    def ratio(name: str, place: int, against: str) -> str:
        ratios = [one / other for one, other in zip(times[name, place], times[against, 0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    heads = ["aligned copies", *(f"MKL_CBWR={mode}" for mode in MODES[1:])]
    lines = [
        "# What equal bits at all addresses cost on a CPU", "",
        f"{described('cpu')}; {told[0]['words']}. {rounds} rounds in turn; processor time of MKL as it is, and how many "
        "times that the others take: median and quartiles of the ratios of the rounds.", "",
        f"| work | MKL as it is, ms | {' | '.join(heads)} |", f"|---|---:|{'---|' * len(heads)}",
    ]  # fmt: skip
    for name in names:
        if name.startswith("aligned"):
            continue
        copies = f"aligned copies: {name}"
        cells = [ratio(copies, 0, name) if copies in names else "", *(ratio(name, i, name) for i in range(1, len(MODES)))]
        lines.append(f"| {name} | {statistics.median(times[name, 0]):.3f} | {' | '.join(cells)} |")
    bits = ["yes" if one["alike"] else "no" for one in told]
    lines.append(f"| equal bits at all addresses tried | {bits[0]} |  | {' | '.join(bits[1:])} |")
    lines.append(f"| mode that MKL is in | {told[0]['mode']} |  | {' | '.join(str(one['mode']) for one in told[1:])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
