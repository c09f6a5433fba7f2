"""Results kept for the keys asked for last, and blocks that cover all rows once."""

from __future__ import annotations

import pytest

from evalkit.util import batching
from evalkit.util.caching import Recent


def test_the_keys_asked_for_last_are_kept():
    made: list[str] = []
    recent: Recent[str] = Recent(2)

    def get(key: str) -> str:
        return recent.get(key, lambda: made.append(key) or key.upper())

    assert [get(key) for key in "ababcab"] == list("ABABCAB")
    assert made == list("abcab")  # c took the place of a, a that of b


def test_what_is_not_to_be_kept_is_made_again():
    recent: Recent[int] = Recent(2)
    assert [recent.get("a", lambda n=n: n, keep=lambda n: n > 1) for n in (0, 1, 2, 3)] == [0, 1, 2, 2]
    with pytest.raises(ZeroDivisionError):
        recent.get("b", lambda: 1 // 0)
    assert recent.get("b", lambda: 5) == 5


@pytest.mark.parametrize(("rows", "width", "count"), [(7, 3, 3), (7, 100, 7), (0, 3, 0), (2, 5, 1), (10, 1, 1)])
def test_blocks_cover_every_row_once(monkeypatch, rows, width, count):
    monkeypatch.setattr(batching, "MOST", 10)
    parts = batching.blocks(rows, width)
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows)) and len(parts) == count
    assert all((part.stop - part.start) * width <= 10 or part.stop - part.start == 1 for part in parts)
