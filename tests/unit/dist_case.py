"""One of several processes that train the same toy dictionaries; test_distributed.py starts it.

    python dist_case.py OUT STOP SECONDS

Without RANK in the environment it trains alone. The first process writes weights and histories to OUT. At batch STOP > 0 the
second process ends hard, at batch -STOP > 0 it hangs; SECONDS is how long the others wait for it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from evalkit.errors import EvalkitError
from evalkit.progress import Progress
from evalkit.training import distributed
from evalkit.training.config import train_config
from evalkit.training.loop import Trained
from evalkit.training.supply import VectorSupply
from evalkit.training.together import Member, Together, train_together

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


def train(out: Path) -> int:
    """One after the other, then as stacks."""
    group = distributed.current()
    saved = []
    for batched in (False, True):
        supplies = {HOOK: VectorSupply(data(), 128, 0, identity="toy")}
        said: dict[str, Any] = {"model": "toy", "progress": Progress(quiet=True), "batched": batched}
        if group is None:
            results = train_together(members(), supplies, **said)
        else:
            results = distributed.lead(group, members(), supplies, {HOOK: 24}, **said)
        assert all(isinstance(result, Trained) for result in results)
        saved += [{"tensors": r.dictionary.tensors(), "history": r.history} for r in results if isinstance(r, Trained)]
    torch.save(saved, out)
    return 0


def stop_at(number: int) -> None:
    """End, or hang, at one batch."""
    step = Together.step

    def stopping(self: Together, *arguments: Any) -> Any:
        if self.number == abs(number):
            if number > 0:
                os._exit(9)
            time.sleep(600)
        return step(self, *arguments)

    Together.step = stopping  # type: ignore[method-assign]


if __name__ == "__main__":
    out, stop, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    if stop and os.environ.get("RANK") == "1":
        stop_at(stop)
    try:
        together = "RANK" in os.environ
        sys.exit(distributed.command(lambda: train(out), seconds) if together else train(out))
    except EvalkitError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
