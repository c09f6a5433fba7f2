"""A step as one CUDA graph: hundreds of launches become one, which is what small autoencoders wait for.

1. What is captured reads and writes tensors that stay where they are; its first runs, which compile kernels and fill the
   allocator, are ordinary steps on a side stream.
2. Each kind of step (``key``) is captured once; all share one pool of memory, since only one runs at a time.
3. Without a CUDA device the same function is simply called.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

EAGER = 3
"""Steps of each kind before it is captured."""


class Replay:
    """Runs ``work(key)``, from its fourth time on as a replayed graph.

    Args:
        work: must not wait for the device, and may touch only tensors whose addresses stay.
        device: where it works.
    """

    def __init__(self, work: Callable[[tuple[int, bool]], None], device: torch.device) -> None:
        self.work, self.device = work, device
        self.reset()

    def reset(self) -> None:
        """Forget what was captured: addresses have changed."""
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._runs: dict[Hashable, int] = {}
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, key: tuple[int, bool]) -> None:
        """One step of kind ``key``."""
        if self.device.type != "cuda":
            self.work(key)
            return
        if key not in self._graphs:
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device)
            runs = self._runs[key] = self._runs.get(key, 0) + 1
            if runs <= EAGER:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self._stream):
                    self.work(key)
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
                return
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            # other threads (a supply, a collective's watchdog) may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                self.work(key)
            self._graphs[key] = graph
        self._graphs[key].replay()
