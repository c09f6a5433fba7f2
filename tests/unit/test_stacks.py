"""Stacks and bfloat16 in every architecture: members are what they are alone, may leave, and go on unstacked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ensemble import HOOK, QUIET, alone, batch, config_of, planted, same_to_rounding, trainers
from torch.utils._python_dispatch import TorchDispatchMode

from evalkit.training.checkpoint import Checkpoint
from evalkit.training.ensemble import Ensemble
from evalkit.training.loop import train_together
from evalkit.training.members import Member, Trained
from evalkit.training.session import SessionConfig
from evalkit.training.supply import VectorSupply
from evalkit.training.together import Together

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


@every
def test_a_stack_is_its_members_alone_also_when_one_leaves_and_when_they_go_on_unstacked(table: dict[str, Any]) -> None:
    x = planted()
    configs = [config_of(seed=seed, **table) for seed in range(3)]
    members = trainers(configs, x)
    ensemble = Ensemble(members, [HOOK] * 3)
    assert ensemble.stacks == [[0, 1, 2]]
    for number in range(30):
        if number == 12:
            ensemble.remove([1])
            assert ensemble.stacks == [[0, 2]]
        if number == 20:
            states = ensemble.state()
            members = [member if i == 1 else trainers([configs[i]], x)[0] for i, member in enumerate(members)]
            ensemble = Ensemble([members[0], members[2]], [HOOK] * 2, batched=False)
            ensemble.load_state({0: states[0], 1: states[2]})
            assert ensemble.stacks == []
        ensemble.step({HOOK: batch(x, number)})
    for i, steps in ((0, 30), (1, 12), (2, 30)):
        same_to_rounding(members[i], alone(configs[i], x, steps)[0])


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
    _, exact = alone(config_of(**table), x, 30)
    (trainer,) = trainers([config_of(**table, compute="bfloat16")], x)
    with Products() as seen:
        steps = [trainer.step(batch(x, number)) for number in range(30)]
    assert torch.bfloat16 in seen.types
    assert all(parameter.dtype == torch.float32 for parameter in trainer.module.parameters())
    assert float(steps[-1].loss) == pytest.approx(float(exact[-1].loss), rel=0.02)
    (plain,) = trainers([config_of(**table)], x)
    with Products() as seen:
        plain.step(batch(x, 0))
    assert seen.types <= {torch.float32}


def test_a_checkpoint_survives_a_change_of_the_setting(tmp_path: Path) -> None:
    assert SessionConfig().stack == "auto"
    x = planted()
    configs = [config_of(k=3, seed=seed) for seed in range(3)]

    def supplies() -> dict[str, VectorSupply]:
        return {HOOK: VectorSupply(x, 128, 0, identity="toy")}

    members = [Member(f"member {i}", config, HOOK) for i, config in enumerate(configs)]
    whole = train_together(members, supplies(), model="toy", progress=QUIET, batched=False)
    stopped = Together(members, supplies(), model="toy", checkpoint=Checkpoint(tmp_path / "run", every_steps=10), batched=True)
    for _ in range(25):
        stopped.step()
    later = Checkpoint(tmp_path / "run", every_steps=10)
    again = train_together(members, supplies(), model="toy", progress=QUIET, checkpoint=later, batched=False)
    for one, two in zip(whole, again, strict=True):
        assert isinstance(one, Trained) and isinstance(two, Trained)
        assert torch.allclose(one.dictionary.directions, two.dictionary.directions, atol=1e-5)
    auto = Together(members, supplies(), model="toy")
    assert auto.ensemble.stacks == []  # on a CPU one after the other, unless asked for
