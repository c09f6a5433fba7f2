"""Blocks of rows that fit in memory, for work on more rows than can be held at once."""

from __future__ import annotations

MOST = 1 << 24
"""Numbers of a block: 64 MB in float32."""


def block_rows(width: int) -> int:
    """Rows of ``width`` numbers in a block; at least one."""
    return max(1, MOST // width)


def blocks(rows: int, width: int) -> list[slice]:
    """Slices that cover ``rows`` rows of ``width`` numbers, a block each."""
    step = block_rows(width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
