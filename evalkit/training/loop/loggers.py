"""Where the rows of a training run's history go besides the results file: Weights & Biases or TensorBoard.

1. Each is reached through its own library, which is imported only when a suite asks for it.
2. An observer is given each row as it is made, under the step it belongs to, and is closed at the end.
3. A library that is not installed is said before anything starts, with the command that installs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.errors import UsageError

LIBRARIES = {"wandb": ("wandb", "pip install wandb"), "tensorboard": ("torch.utils.tensorboard", "pip install tensorboard")}
"""Module and the command that installs it."""


class Logged(NamedTuple):
    """An observer and how it ends."""

    observe: Callable[[Mapping[str, int | float]], None]
    close: Callable[[], None]


def library(log: str) -> Any:
    """The module behind ``log = "..."``.

    Raises:
        UsageError: it is not installed.
    """
    module, install = LIBRARIES[log]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"the library for log = '{log}' is not installed: {error}"
        raise UsageError(what, where="[training] log", fix=install) from error


def _measures(row: Mapping[str, int | float]) -> dict[str, int | float]:
    return {f"training/{key}": value for key, value in row.items() if key != "step"}


def open_log(log: str, folder: Path, name: str, key: str, config: Mapping[str, Any]) -> Logged:
    """Begin to log one training run.

    Args:
        log: 'wandb' or 'tensorboard'.
        folder: below it, in ``logs``, both libraries write their files.
        name: of the dictionary, for people.
        key: of its recipe: a run that goes on is found again by it.
        config: the run's settings.

    Raises:
        UsageError: the library is not installed.
    """
    module = library(log)
    place = folder / "logs" / log
    place.mkdir(parents=True, exist_ok=True)
    if log == "wandb":
        run = module.init(project="evalkit", name=name, id=key, resume="allow", dir=str(place), config=dict(config))
        return Logged(lambda row: run.log(_measures(row), step=int(row["step"])), run.finish)
    writer = module.SummaryWriter(log_dir=str(place / key))

    def observe(row: Mapping[str, int | float]) -> None:
        for measure, value in _measures(row).items():
            writer.add_scalar(measure, value, int(row["step"]))

    return Logged(observe, writer.close)
