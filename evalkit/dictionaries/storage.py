"""evalkit's own dictionary folders: weights.safetensors and dictionary.json, whole or not there at all.

1. Saving writes both files under a temporary name and renames the folder into place.
2. ``dictionary.json`` holds the kind, the settings, the hook point, the model, the details, the format version and the hash
   of weights, kind and settings.
3. Loading rebuilds the dictionary, checks names, shapes and finiteness of the weights, and compares the hash: what is
   loaded is what was saved, bit for bit. Nothing in the folder is executed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.registry import DICTIONARIES
from evalkit.errors import DictionaryError
from evalkit.util.files import publish
from evalkit.util.registry import near_miss
from evalkit.util.user_files import placed

FORMAT = 1
"""Version of the folder's layout; a reader refuses a newer one."""

WEIGHTS, CARD = "weights.safetensors", "dictionary.json"

_FIELDS: dict[str, type] = {
    "format": int,
    "kind": str,
    "settings": dict,
    "hook_point": str,
    "model": str,
    "details": dict,
    "hash": str,
}


def save_dictionary(dictionary: Dictionary, folder: Path | str) -> Path:
    """Write ``dictionary`` to ``folder`` and return the folder. A dictionary already there is replaced.

    Raises:
        DictionaryError: its weights hold NaN or infinities, or ``folder`` holds something that is not a dictionary.
        DiskFull: there is no room.
    """
    folder = placed(folder)
    if folder.exists() and not (folder / CARD).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise DictionaryError(
            "this path exists and is not a dictionary folder; nothing was written",
            where=str(folder),
            fix="choose a new folder name",
        )
    tensors = dictionary.tensors()
    _rebuild(dictionary.kind, tensors, dictionary.settings(), str(folder))
    card = {
        "format": FORMAT,
        "kind": dictionary.kind,
        "settings": dictionary.settings(),
        "hook_point": dictionary.hook_point,
        "model": dictionary.model,
        "details": dictionary.details,
        "hash": dictionary.identity.hash,
    }
    try:
        text = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DictionaryError(
            f"its details cannot be written as JSON: {error}", where=str(folder), fix="keep text and finite numbers in details"
        ) from error
    with publish(folder) as temporary:
        temporary.mkdir()
        # copies, because safetensors refuses tensors that share memory
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary / WEIGHTS)
        (temporary / CARD).write_text(text, encoding="utf-8")
    return folder


def load_dictionary(folder: Path | str) -> Dictionary:
    """The dictionary saved in ``folder``, equal to the saved one in every bit.

    Raises:
        DictionaryError: the folder or a file is missing, damaged, of an unknown kind, written by a newer evalkit, misshapen,
            not finite, or its contents do not match their hash.
    """
    folder = placed(folder)
    card = _read_card(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise DictionaryError("the weights file is missing", where=str(path), fix="save or fetch the dictionary again")
    try:
        tensors = load_file(path)
    except Exception as error:  # the library has errors of its own, and passes on others
        raise DictionaryError(
            f"the weights file cannot be read: {error}", where=str(path), fix="save or fetch the dictionary again"
        ) from error
    where = {"hook_point": card["hook_point"], "model": card["model"], "details": card["details"]}
    dictionary = _rebuild(card["kind"], tensors, card["settings"], str(folder), where)
    if dictionary.identity.hash != card["hash"]:
        raise DictionaryError(
            "the weights or settings are not those that were saved: their hash differs",
            where=str(folder),
            fix="a file was changed or damaged: save or fetch the dictionary again",
        )
    return dictionary


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    if not path.is_file():
        what = "there is no such folder" if not folder.exists() else f"this is not an evalkit dictionary: it has no {CARD}"
        raise DictionaryError(what, where=str(folder), fix="give the folder that 'evalkit train' or save_dictionary wrote")
    try:
        card = json.loads(path.read_bytes())  # in any UTF, with a byte order mark or without
    except Exception as error:
        raise DictionaryError(
            f"{CARD} is not JSON: {error}", where=str(path), fix="save or fetch the dictionary again"
        ) from error
    version = card.get("format") if isinstance(card, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise DictionaryError(
            f"this dictionary has format {version}; this evalkit reads up to {FORMAT}", where=str(path), fix="upgrade evalkit"
        )
    for key, expected in _FIELDS.items():
        if not isinstance(card, dict) or not isinstance(card.get(key), expected):
            raise DictionaryError(
                f"{CARD} lacks '{key}' or has it in the wrong form", where=str(path), fix="save or fetch the dictionary again"
            )
    return card


def _rebuild(
    kind: str, tensors: dict[str, Any], settings: dict[str, Any], where: str, more: dict[str, Any] | None = None
) -> Dictionary:
    """Build a dictionary with the folder named in every complaint about its weights or settings."""
    cls = DICTIONARIES.get(kind, where)
    try:
        return cls.build(tensors, settings, **(more or {}))
    except DictionaryError as error:
        raise DictionaryError(error.what, where=f"{where}: {error.where}" if error.where else where, fix=error.fix) from error
    except KeyError as error:
        raise DictionaryError(
            f"the settings of this '{kind}' dictionary lack {error}", where=where, fix=near_miss(str(error.args[0]), settings)
        ) from error
