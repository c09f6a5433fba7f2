"""Reading weights of strangers: as data only, whole or not at all.

1. ``.safetensors``: a header with sizes and raw numbers; the library refuses a header that promises more than the file holds.
2. ``.npz``: NumPy arrays without pickled objects, each member's declared size checked against what it unpacks to.
3. PyTorch files: ``torch.load(weights_only=True)``, whose unpickler knows tensors and plain containers and calls nothing else.

Whatever goes wrong becomes a DictionaryError that names the file. A file that asks for code to be run is refused unread.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from evalkit.errors import DictionaryError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_AGAIN = "fetch or copy the file again: it is damaged or was cut short"


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises DictionaryError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)  # NaN is no JSON: kept as a word
    except (OSError, ValueError) as error:
        raise DictionaryError(f"the config is not JSON: {error}", where=str(path), fix=_AGAIN) from error
    if not isinstance(found, dict):
        raise DictionaryError("the config is JSON, but no object", where=str(path), fix=_AGAIN)
    return found


def names(path: Path) -> set[str]:
    """Names of the tensors of a safetensors file, from its header."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise DictionaryError(f"the weights cannot be read: {error}", where=str(path), fix=_AGAIN) from error


def load(path: Path) -> dict[str, Any]:
    """Everything in ``path`` by name: tensors, and in PyTorch files plain values too.

    Raises:
        DictionaryError: it is damaged, of no known kind, or holds objects that would have to be executed.
    """
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise DictionaryError(f"the weights cannot be read: {error}", where=str(path), fix=_AGAIN) from error
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix in TORCH_SUFFIXES:
        return _torch(path)
    raise DictionaryError(
        f"'{path.suffix}' files are not read", where=str(path), fix="known: .safetensors, .npz, " + ", ".join(TORCH_SUFFIXES)
    )


def _npz(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(np.ascontiguousarray(archive[name])) for name in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, MemoryError) as error:
        raise DictionaryError(f"the arrays cannot be read: {error}", where=str(path), fix=_AGAIN) from error


def _torch(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old file forms, which are read or refused all the same
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f": it asks for {asked[1]}" if asked else ""
        raise DictionaryError(
            f"the file is a pickle that holds more than plain weights, so it was not opened{reason}",
            where=str(path),
            fix="get the weights as .safetensors, or re-save them as a plain state_dict in an environment you trust",
        ) from error
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, MemoryError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DictionaryError(f"the weights cannot be read: {what}", where=str(path), fix=_AGAIN) from error
    if not isinstance(found, dict):
        raise DictionaryError(
            f"the file holds {type(found).__name__}, not weights by name", where=str(path), fix="save the state_dict of one SAE"
        )
    return {str(name): value for name, value in found.items()}
