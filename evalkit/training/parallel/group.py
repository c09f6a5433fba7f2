"""The processes that train together, as a trainer sees them: ``Group``, and ``Alone`` where there is one process."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Group(Protocol):
    """Processes that train one autoencoder together."""

    rank: int
    """This process, 0 for the first."""
    size: int

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        ...

    def any(self, flags: torch.Tensor) -> torch.Tensor:
        """Where a flag is set in any process."""
        ...

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every process's tensor, all of one shape."""
        ...


class Alone:
    """The ``Group`` of one process."""

    rank = 0
    size = 1

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Tensors are their own means."""

    def any(self, flags: torch.Tensor) -> torch.Tensor:
        """``flags``."""
        return flags

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """``tensor``."""
        return [tensor]


ALONE = Alone()
