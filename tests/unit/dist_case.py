"""One of several processes that train the same toy dictionaries; test_distributed.py starts it.

    python dist_case.py OUT WHAT AT SECONDS

Without RANK in the environment it trains alone. The first process writes weights and histories to OUT. WHAT: 'few' trains some
members; 'all' trains one of every architecture and setting that could depend on how a batch
is shared out. As 'few', at batch AT, 'kill' ends the second process hard, 'hang' makes it hang, 'pause' makes the first process
busy until the second has heard more signs of life than come in the longest wait. SECONDS is that wait.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from evalkit.errors import EvalkitError
from evalkit.training.data.batches import VectorSupply
from evalkit.training.loop import distributed
from evalkit.training.loop.members import Member, Trained
from evalkit.training.loop.together import Together
from evalkit.training.loop.train import train_together
from evalkit.training.settings.config import train_config
from evalkit.util.progress import Progress

HOOK = "blocks.0.hook_resid_post"


def data() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    truth = torch.nn.functional.normalize(torch.randn(48, 24, generator=generator), dim=1)
    on = torch.rand(4_000, 48, generator=generator) < 3 / 48
    return (on * (0.5 + torch.rand(4_000, 48, generator=generator))) @ truth


def members() -> list[Member]:
    shared = {"features": 96, "batch": 128, "tokens": 30 * 128, "dead_after": 512, "order": 0}
    tables: list[dict[str, Any]] = [
        {"k": 3, "auxk_form": "error"},
        {"k": 3, "auxk_form": "error", "seed": 1, "clip": 0.05},
        {"architecture": "tied", "l1": 0.01},
    ]
    return [Member(f"member {i}", train_config({**shared, **table}), HOOK) for i, table in enumerate(tables)]


TABLES: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "topk, variance of the batch": {"k": 3, "variance": "batch", "auxk_form": "error"},
    "topk, variance of the residual, silent": {"k": 3, "error": "sum", "auxk_form": "variance", "auxk_silent": True},
    "topk, free rows, bfloat16": {"k": 3, "decoder": "free", "compute": "bfloat16"},
    "batchtopk": {"architecture": "batchtopk", "k": 3},
    "batchtopk, free rows": {"architecture": "batchtopk", "k": 2.5, "decoder": "free", "auxk_form": "error", "auxk_relu": False},
    "batchtopk, silent": {"architecture": "batchtopk", "k": 3, "auxk_form": "variance", "auxk_silent": True},
    "matryoshka": {"architecture": "matryoshka", "k": 2, "fractions": [0.25, 0.75], "clip": 0.5},
    "relu": {"architecture": "relu", "l1": 1.0},
    "relu, unit rows": {"architecture": "relu", "l1": 1.0, "decoder": "unit", "error": "mean"},
    "relu, annealed": {"architecture": "relu", "l1": 1.0, "penalty": "anneal"},
    "gated": {"architecture": "gated", "l1": 1.0},
    "jumprelu": {"architecture": "jumprelu", "sparsity": 0.02, "bandwidth": 0.5, "pre_act": 1e-2},
    "jumprelu, target": {"architecture": "jumprelu", "penalty": "target", "target_l0": 4.0, "sparsity": 1.0, "bandwidth": 0.5},
    "jumprelu, tanh": {"architecture": "jumprelu", "penalty": "tanh", "sparsity": 0.02, "bandwidth": 0.5, "slope_to": "all"},
    "tied": {"architecture": "tied", "l1": 0.01},
}
"""One of every architecture, in settings that could depend on how a batch is shared out."""


def every() -> list[Member]:
    shared = {"features": 96, "batch": 128, "tokens": 25 * 128, "dead_after": 512, "warmup": 0.2, "order": 0}
    return [Member(name, train_config({**shared, **table}), HOOK) for name, table in TABLES.items()]


def train(out: Path, what: str) -> int:
    group = distributed.current()
    wanted = every() if what == "all" else members()
    supplies = {HOOK: VectorSupply(data(), 128, 0, identity="toy")}
    progress = Progress(quiet=True)
    if group is None:
        results = train_together(wanted, supplies, model="toy", progress=progress)
    else:
        results = distributed.lead(group, wanted, supplies, {HOOK: 24}, model="toy", progress=progress)
    assert all(isinstance(result, Trained) for result in results), results
    saved = [{"tensors": r.dictionary.tensors(), "history": r.history} for r in results if isinstance(r, Trained)]
    torch.save(saved, out)
    return 0


def stop_at(what: str, number: int, heard: Path) -> None:
    """End, hang or be busy at one batch."""
    step = Together.step

    def stopping(self: Together, *arguments: Any) -> Any:
        if self.number == number:
            if what == "kill":
                os._exit(9)
            while what == "hang" or not heard.exists() or heard.stat().st_size <= distributed.SIGNS:
                time.sleep(0.01)
        return step(self, *arguments)

    Together.step = stopping  # type: ignore[method-assign]


def note_signs(heard: Path) -> None:
    """Write a byte for every sign of life that is heard."""
    say = distributed.ProcessGroup.say

    def noted(self: distributed.ProcessGroup, number: int) -> int:
        found = say(self, number)
        if found == distributed.ALIVE:
            with heard.open("ab") as file:
                file.write(b".")
        return found

    distributed.ProcessGroup.say = noted  # type: ignore[method-assign]


def meet(out: Path, rank: int) -> None:
    """Import what is imported late, and wait for the others to have done so: a busy machine takes its time over it."""
    small = [Member("small", train_config({"features": 8, "k": 2, "batch": 128, "tokens": 128}), HOOK)]
    supplies = {HOOK: VectorSupply(data(), 128, 0, identity="toy")}
    train_together(small, supplies, model="toy", progress=Progress(quiet=True))
    Path(f"{out}.{rank}").touch()
    while not all(Path(f"{out}.{other}").exists() for other in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)


def threads() -> int:
    """gloo's worker threads in this process, two a connection; Linux."""
    return sum("gloo_runloop" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


if __name__ == "__main__":
    out, what, at, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    torch.set_num_threads(1)
    rank, heard = os.environ.get("RANK"), Path(f"{out}.heard")
    if rank is not None:
        meet(out, int(rank))
    stopped = {"kill": "1", "hang": "1", "pause": "0"}
    if what == "pause":
        distributed.SIGN_S = 0.05
    if what in stopped and rank == stopped[what]:
        stop_at(what, at, heard)
    elif what == "pause":
        note_signs(heard)
    try:
        together = rank is not None
        code = distributed.command(lambda: train(out, what), seconds) if together else train(out, what)
        # torch itself keeps the first connection; any other one's threads would outlive the interpreter (an abort, now and then)
        assert threads() <= 2, f"{threads()} threads of closed connections are left"
        sys.exit(code)
    except EvalkitError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
