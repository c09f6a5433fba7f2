"""Reading weights of strangers: as data only, whole or not at all.

1. ``.safetensors``: a header with sizes and raw numbers; the library refuses a header that promises more than the file holds.
2. ``.npz``: NumPy arrays without pickled objects, each member's declared size checked against what it unpacks to.
3. PyTorch files: ``torch.load(weights_only=True)``, whose unpickler knows tensors and plain containers and calls nothing else.
4. What is read may be at most ``UNPACKS`` times as large as the file: no archive that unpacks to far more, and no tensor that
   repeats a few numbers to any size, is followed.

Whatever goes wrong becomes a DictionaryError that names the file: the libraries raise almost anything on files that were cut,
changed or made to deceive. A file that asks for code to be run is refused unread.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from evalkit.errors import DictionaryError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)
"""Files that are read."""
UNPACKS, SPARE = 16, 1 << 26
"""Most bytes that a file may come to in memory: so many times its own, and so many more."""
_AGAIN = "fetch or copy the file again: it is damaged or was cut short"
_NOT_WEIGHTS = {
    b"version https://git-lfs": (
        "this is a pointer of Git LFS: the weights themselves were not downloaded",
        "run 'git lfs pull' in the repository, or name it as hub:OWNER/REPO/FOLDER",
    ),
    b"<!doctype html": ("this is a web page, not the file it shows", "download the file itself"),
    b"<html": ("this is a web page, not the file it shows", "download the file itself"),
}
"""How files begin that stand where weights should be: what they are, and what to do."""


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Numbers that no float or 64-bit integer holds, and NaN and infinities, are kept as words.

    Raises:
        DictionaryError: there is none, or a name in it has two values.
    """

    def real(text: str) -> float | str:
        return value if math.isfinite(value := float(text)) else text

    def whole(text: str) -> int | str:
        return int(text) if len(text) < 19 else text

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found and found[name] != value:
                raise DictionaryError(
                    f"the config says '{name}' twice, with two values: {str(found[name])[:60]} and {str(value)[:60]}",
                    where=str(path),
                    fix="remove the wrong one",
                )
            found[name] = value
        return found

    try:
        raw = path.read_bytes()
        text = raw.decode(json.detect_encoding(raw))
        found = json.loads(text, parse_constant=str, parse_float=real, parse_int=whole, object_pairs_hook=once)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # halves of characters that cannot be written anywhere
    except DictionaryError:
        raise
    except UnicodeDecodeError as error:
        raise DictionaryError(
            f"the config is not JSON: it is no {error.encoding} text at byte {error.start}",
            where=str(path),
            fix="save it as UTF-8",
        ) from error
    except Exception as error:
        raise DictionaryError(f"the config is not JSON: {error}", where=str(path), fix=_AGAIN) from error
    if not isinstance(found, dict):
        raise DictionaryError("the config is JSON, but no object", where=str(path), fix=_AGAIN)
    return found


def names(path: Path) -> set[str]:
    """Names of what ``path`` holds, without reading the numbers.

    Raises:
        DictionaryError: as ``load``.
    """
    _check_begins(path)
    if path.suffix == ".npz":
        try:
            with zipfile.ZipFile(path) as archive:
                return {name.removesuffix(".npy") for name in archive.namelist()}
        except Exception as error:
            _unreadable(path, error)
    if path.suffix in TORCH_SUFFIXES:
        return set(load(path, mapped=True))
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except Exception as error:
        _unreadable(path, error)


def load(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Everything in ``path`` by name: tensors, and in PyTorch files plain values too.

    Args:
        path: the file.
        mapped: leave the numbers of a PyTorch file on disk until they are used: a folder may hold many large ones.

    Raises:
        DictionaryError: it is damaged, of no known kind, or holds objects that would have to be executed.
    """
    _check_begins(path)
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except Exception as error:
            _unreadable(path, error)
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix in TORCH_SUFFIXES:
        return _torch(path, mmap=mapped and zipfile.is_zipfile(path))
    raise DictionaryError(f"'{path.suffix}' files are not read", where=str(path), fix=f"known: {', '.join(SUFFIXES)}")


def _npz(path: Path) -> dict[str, Any]:
    _check_archive(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(np.ascontiguousarray(archive[name])) for name in archive.files}
    except Exception as error:
        _unreadable(path, error)


def _torch(path: Path, mmap: bool) -> dict[str, Any]:
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old file forms, which are read or refused all the same
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        with path.open("rb") as file:
            begins = file.read(2)
        if asked is None and begins not in (b"PK", *(b"\x80" + bytes([protocol]) for protocol in range(6))):
            _unreadable(path, ValueError("it is no file of torch.save"))
        reason = f": it asks for {asked[1]}" if asked else ""
        raise DictionaryError(
            f"the file is a pickle that holds more than plain weights, so it was not opened{reason}",
            where=str(path),
            fix="get the weights as .safetensors, or re-save them as a plain state_dict in an environment you trust",
        ) from error
    except Exception as error:
        _unreadable(path, error)
    if not isinstance(found, dict):
        raise DictionaryError(
            f"the file holds {type(found).__name__}, not weights by name", where=str(path), fix="save the state_dict of one SAE"
        )
    _check_tensors(path, found)
    return {str(name): value for name, value in found.items() if isinstance(name, str | int)}


def _unreadable(path: Path, error: Exception) -> NoReturn:
    what = str(error).splitlines()[0] if re.search("[a-z]{3}", str(error)) else f"{type(error).__name__} {error}".strip()
    raise DictionaryError(f"the weights cannot be read: {what}", where=str(path), fix=_AGAIN) from error


def _most(path: Path) -> int:
    return UNPACKS * path.stat().st_size + SPARE


def _check_begins(path: Path) -> None:
    """Refuse what is plainly something else, and say what."""
    try:
        with path.open("rb") as file:
            begins = file.read(32).lstrip().lower()
    except OSError as error:
        _unreadable(path, error)
    for start, (what, fix) in _NOT_WEIGHTS.items():
        if begins.startswith(start):
            raise DictionaryError(what, where=str(path), fix=fix)


def _check_archive(path: Path) -> None:
    """Refuse a zip whose members would unpack to far more than the file holds."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
    except Exception as error:
        _unreadable(path, error)
    if total > _most(path):
        _too_large(path, total)


def _check_tensors(path: Path, found: dict[Any, Any]) -> None:
    """Refuse tensors without plain numbers in memory, and views that repeat a few numbers to a great size."""
    total, seen, left = 0, set[int](), [found]
    while left:
        item = left.pop()
        if isinstance(item, torch.Tensor):
            if item.layout != torch.strided or item.device.type != "cpu" or item.is_quantized or item.is_nested:
                raise DictionaryError(
                    f"the file holds a tensor without plain numbers ({item.layout}, on {item.device})",
                    where=str(path),
                    fix="save dense tensors that are on the CPU",
                )
            total += item.numel() * item.element_size()
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            left.extend(item.values() if isinstance(item, dict) else item)
    if total > _most(path):
        _too_large(path, total)


def _too_large(path: Path, total: int) -> NoReturn:
    raise DictionaryError(
        f"the file would come to {total / 1e9:,.1f} GB in memory, far more than its own {path.stat().st_size / 1e9:,.3f} GB",
        where=str(path),
        fix="fetch it from its author again: weights do not shrink like that",
    )
