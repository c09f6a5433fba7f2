"""Twenty kills at random events of a suite, with a healthy judge and with one that spoils 30 % of its replies."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import FAULTS, SHARE, series
from warm import Warm


@pytest.mark.timeout(900)
@pytest.mark.parametrize("share", [0.0, SHARE])
def test_killed_at_twenty_events_every_table_is_the_same_and_nothing_is_asked_twice(
    share: float, warm: Warm, tmp_path: Path
) -> None:
    found = series(warm, tmp_path, kills=20, share=share)
    print(found)
    assert found.kills == 20
    assert found.unequal == [] and found.left == []
    assert found.asked_again == 0
    assert len(found.faults) >= (len(FAULTS) // 2 if share else 0)
