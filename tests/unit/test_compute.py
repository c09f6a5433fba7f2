"""Sparse or dense: the break-even is interpolated between what was tried, and counts only where it was put to use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from evalkit.training.kernels import dispatch as compute
from evalkit.training.kernels import graph

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def break_even() -> Any:
    """The benchmark's module; the benchmarks are scripts and no package."""
    spec = importlib.util.spec_from_file_location("break_even", ROOT / "benchmarks" / "break_even.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("dense_time", "share"), [(24.0, 24 / 256), (1.0, 0.0), (1e9, 1.0)])
def test_the_break_even_of_known_times(dense_time: float, share: float, break_even: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse takes k, dense always ``dense_time``: equal at k = dense_time, where 16 is 1/3 faster and 32 is 1/3 slower."""
    taken = []

    def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
        taken.append(work())
        k = 8 * 2 ** ((len(taken) - 1) // 2)
        return float(k) if len(taken) % 2 else dense_time

    monkeypatch.setattr(break_even, "seconds", seconds)
    measured = break_even.measure(CPU, tokens=3, width=5, features=256, dtype=torch.float32, repeats=1)
    assert measured == pytest.approx(share, abs=1e-9)
    for sparse, dense in zip(taken[::2], taken[1::2], strict=True):  # what is timed is the same work
        assert torch.allclose(sparse.bias, dense.bias, atol=1e-4) and torch.allclose(sparse.encoder, dense.encoder, atol=1e-4)


def test_a_real_measurement_ends(break_even: Any) -> None:
    assert 0.0 <= break_even.measure(CPU, tokens=4, width=8, features=16, dtype=torch.float32, repeats=3) <= 1.0


def test_the_share_is_the_default_until_one_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "MEASURED", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "card")
    assert compute.sparse_pays(1000, 1000, CPU)
    assert compute.sparse_pays(5, 1000, CUDA) and not compute.sparse_pays(6, 1000, CUDA)
    monkeypatch.setitem(compute.MEASURED, "card", 0.02)
    assert compute.sparse_pays(20, 1000, CUDA) and not compute.sparse_pays(21, 1000, CUDA)


class Fake:
    """Stands in for a graph, a stream and their contexts; notes what happens."""

    def __init__(self, *_: Any) -> None:
        self.replays = 0

    def wait_stream(self, other: Any) -> None:
        pass

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.replays += 1


def test_each_kind_of_step_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[Any] = []

    @contextmanager
    def capture(made: Fake, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        pools.append(pool)
        yield

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        yield

    for name, fake in {"CUDAGraph": Fake, "Stream": Fake, "stream": on, "graph": capture, "current_stream": Fake}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    runs: list[tuple[int, bool]] = []
    replay = graph.Replay(runs.append, CUDA)
    for _ in range(10):
        replay((4, False))
    replay((4, True))
    assert runs == [(4, False)] * (graph.EAGER + 1) + [(4, True)]  # the last of the first kind only records
    made = replay._graphs[4, False]
    assert isinstance(made, Fake) and made.replays == 10 - graph.EAGER and pools == [None]
    for _ in range(5):
        replay((4, True))
    assert pools == [None, "pool"]
    replay.reset()
    replay((4, False))
    assert len(runs) == graph.EAGER + 1 + graph.EAGER + 1 + 1 and not replay._graphs


def test_without_a_gpu_the_step_is_called() -> None:
    runs: list[tuple[int, bool]] = []
    replay = graph.Replay(runs.append, CPU)
    for _ in range(9):
        replay((1, False))
    assert len(runs) == 9
