"""The process that forks runs, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Forks runs that need no imports of their own."""
    with Warm() as process:
        yield process
