"""Names to implementations, filled by importing every module of a package.

Adding an evaluation, an architecture, a baseline or a judge is one new module that calls ``register``:

1. The first look-up imports every module of the owning package and of the packages in it, in name order.
2. Each module registers what it defines. The same name twice is an error, so nothing is shadowed in silence.
3. A look-up of an unknown name raises with the near miss and the list of what exists.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from evalkit.errors import EvalkitError

T = TypeVar("T")


def near_miss(name: str, known: Iterable[str]) -> str:
    """The sentence that helps after a typo, upper and lower case alike: ``did you mean 'pca'? known: ica, pca``."""
    names = sorted(known)
    folded: dict[str, str] = {}
    for known_name in names:
        folded.setdefault(known_name.casefold(), known_name)
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    hint = f"did you mean '{folded[close[0]]}'? " if close else ""
    return f"{hint}known: {', '.join(names)}"


class Registry(Generic[T]):
    """Named implementations that explain themselves when asked for one they lack.

    Args:
        noun: what the things are called in messages ("evaluation", "baseline").
        package: dotted name of the package whose modules register here.
        error: exception class raised for an unknown name.
    """

    def __init__(self, noun: str, package: str, error: type[EvalkitError]) -> None:
        self.noun, self.package, self.error = noun, package, error
        self._items: dict[str, T] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: file the decorated class or function under ``name``."""

        def file(item: T) -> T:
            if name in self._items:
                raise ValueError(f"two {self.noun}s are called '{name}': {self._items[name]!r} and {item!r}")
            self._items[name] = item
            return item

        return file

    def _discover(self) -> None:
        if self._complete:
            return
        package = importlib.import_module(self.package)
        for module in sorted(m.name for m in pkgutil.walk_packages(package.__path__, f"{self.package}.")):
            importlib.import_module(module)
        self._complete = True

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        self._discover()
        return sorted(self._items)

    def get(self, name: str, where: str = "") -> T:
        """The implementation called ``name``.

        Raises:
            EvalkitError: of the registry's class, naming the near miss, where there is none.
        """
        self._discover()
        if name not in self._items:
            raise self.error(f"there is no {self.noun} called '{name}'", where=where, fix=near_miss(name, self._items))
        return self._items[name]
