"""Ctrl-C between two steps instead of within one, so that a training can be saved before it ends.

1. The first SIGINT is noted; whoever trains looks after each step, saves, and ends.
2. The second one comes at once, as without this module.
3. Where the main thread does not run the training, or somebody else handles SIGINT, nothing is changed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back; what is yielded says whether one waits.

    Raises:
        KeyboardInterrupt: where the block ended and one still waits.
    """
    waiting = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal waiting
        if waiting:
            raise KeyboardInterrupt
        waiting = True

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: waiting
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if waiting:
        raise KeyboardInterrupt
