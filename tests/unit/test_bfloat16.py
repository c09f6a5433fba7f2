"""compute = "bfloat16": products get bfloat16 factors in every architecture, and it learns what float32 learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evalkit.training.loop.trainer import Trainer, begin
from evalkit.training.settings.config import train_config

TABLES: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "topk, free rows": {"k": 3, "decoder": "free"},
    "batchtopk": {"architecture": "batchtopk", "k": 3},
    "matryoshka": {"architecture": "matryoshka", "k": 3},
    "relu": {"architecture": "relu", "l1": 0.5},
    "relu, annealed": {"architecture": "relu", "l1": 0.5, "penalty": "anneal"},
    "gated": {"architecture": "gated", "l1": 0.5},
    "jumprelu": {"architecture": "jumprelu"},
    "tied": {"architecture": "tied", "l1": 0.01},
}
every = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planted() -> torch.Tensor:
    """Sparse combinations (4000, 24) of unit rows around a common offset."""
    generator = torch.Generator().manual_seed(5)
    truth = torch.nn.functional.normalize(torch.randn(48, 24, generator=generator), dim=1)
    on = torch.rand(4_000, 48, generator=generator) < 3 / 48
    codes = on * (0.5 + torch.rand(4_000, 48, generator=generator))
    return codes @ truth + 0.3 * torch.randn(24, generator=generator)


def trainer(x: torch.Tensor, **table: Any) -> Trainer:
    config = train_config({"features": 96, "tokens": 6_400, "batch": 128, "dead_after": 512, "order": 0, **table})
    return Trainer(config, begin(config, x, "x"))


def batch(x: torch.Tensor, number: int) -> torch.Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(number))[:128]]


class Products(TorchDispatchMode):
    """Notes the types that matrix products are given."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket._qualified_op_name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            self.types |= {a.dtype for a in args if isinstance(a, torch.Tensor) and a.ndim >= 2}
        return func(*args, **(kwargs or {}))


@every
def test_bfloat16_is_used_and_learns_the_same(table: dict[str, Any]) -> None:
    x = planted()
    exact, low = trainer(x, **table), trainer(x, **table, compute="bfloat16")
    wanted = [exact.step(batch(x, number)) for number in range(30)]
    with Products() as seen:
        steps = [low.step(batch(x, number)) for number in range(30)]
    assert torch.bfloat16 in seen.types
    assert all(parameter.dtype == torch.float32 for parameter in low.module.parameters())
    assert float(steps[-1].loss) == pytest.approx(float(wanted[-1].loss), rel=0.02)
    with Products() as seen:
        trainer(x, **table).step(batch(x, 0))
    assert seen.types <= {torch.float32}
