"""evalkit: automated interpretability and evaluation of sparse autoencoders on language models."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from evalkit.version import __version__ as __version__

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary as Dictionary
    from evalkit.dictionaries.loading import export_dictionary as export_dictionary
    from evalkit.dictionaries.loading import load_dictionary as load_dictionary
    from evalkit.dictionaries.storage import save_dictionary as save_dictionary
    from evalkit.errors import EvalkitError as EvalkitError
    from evalkit.models.language_model import load_model as load_model
    from evalkit.runs.run import Outcome as Outcome
    from evalkit.runs.run import run as run
    from evalkit.store.reader import Results as Results
    from evalkit.store.reader import open_results as open_results
    from evalkit.util.progress import Progress as Progress

# before the first product of this process and its children, and only where the user set nothing: evalkit.util.arithmetic says why
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

_HOME = {
    "Dictionary": "evalkit.dictionaries.base",
    "EvalkitError": "evalkit.errors",
    "Outcome": "evalkit.runs.run",
    "Progress": "evalkit.util.progress",
    "Results": "evalkit.store.reader",
    "export_dictionary": "evalkit.dictionaries.loading",
    "load_dictionary": "evalkit.dictionaries.loading",
    "load_model": "evalkit.models.language_model",
    "open_results": "evalkit.store.reader",
    "run": "evalkit.runs.run",
    "save_dictionary": "evalkit.dictionaries.storage",
}
"""Where each public name lives. Imported on first use, so that reading results does not load the language model stack."""

__all__ = [
    "Dictionary",
    "EvalkitError",
    "Outcome",
    "Progress",
    "Results",
    "export_dictionary",
    "load_dictionary",
    "load_model",
    "open_results",
    "run",
    "save_dictionary",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'evalkit' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
