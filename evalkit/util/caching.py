"""Results that are used again soon, kept in memory while their number is small."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Results by key: those of the ``most`` keys that were asked for last."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._results: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T], keep: Callable[[T], bool] = lambda _: True) -> T:
        """The result for ``key``, made now where it is not there.

        Args:
            key: everything that the result depends on.
            make: makes it; what it raises is passed on.
            keep: whether a new result may be used again.
        """
        if key not in self._results:
            result = make()
            if not keep(result):
                return result
            self._results[key] = result
            while len(self._results) > self.most:
                self._results.popitem(last=False)
        self._results.move_to_end(key)
        return self._results[key]
