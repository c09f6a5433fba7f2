"""From whatever a user names to a dictionary, and back out: recognise, read, write.

1. The name is found on this machine or fetched from the hub (``hub``). What SAELens' directory says of it goes with it.
2. Every format is asked whether its writer wrote the place. Exactly one may say yes; naming a format skips the question. Where
   none does, weights that cannot be opened are the reason given.
3. That format reads it. What comes back is checked: weights finite and of agreeing shapes, by the dictionary itself.
4. What of the files was not used is named in the dictionary's details (``formats.fields``).
5. Whatever a library raises on the way becomes a DictionaryError at one place, ``_reading``: a strange file is a bad file.
6. Writing goes to a temporary folder first, is read back, and must be the same function before it is renamed into place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats import safe
from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.dictionaries.formats.fields import Fields, account
from evalkit.dictionaries.hub import Listing, find
from evalkit.dictionaries.provenance import note
from evalkit.errors import DictionaryError, EvalkitError
from evalkit.util.files import publish
from evalkit.util.registry import near_miss
from evalkit.util.user_files import placed

QUANTISED = ("quant_method", "quantization_config")
"""Fields of a config that say how its weights were quantised."""
OVERRIDDEN_FACTS = {"dataset_path": "dataset", "context_size": "context_size", "prepend_bos": "prepend_bos"}
"""Overrides of SAELens' directory that only say how a dictionary was made, with their common names."""


class Imported(NamedTuple):
    """A dictionary and where it came from."""

    dictionary: Dictionary
    format: str
    """Name of the format that read it."""
    path: Path
    """Where its files are on this machine."""
    source: str = ""
    """What the user named: a suite takes the same as ``import = ...``; '' where it is the path."""
    chosen: bool = False
    """Whether the user named the format; a suite has to, too."""


def recognise(place: Place) -> str:
    """Name of the one format whose writer wrote ``place``.

    Raises:
        DictionaryError: none did, or more than one may have.
    """
    found = _claims(place)
    if len(found) == 1:
        return found[0]
    if found:
        raise DictionaryError(
            f"this could be of the format {' or '.join(found)}", where=str(place), fix="say which: --format " + found[0]
        )
    children = [] if place.file is not None else sorted(c for c in place.folder.iterdir() if not c.name.startswith("."))
    for path in [child for child in children if child.is_file()] if place.file is None else [place.file]:
        if path.suffix in safe.SUFFIXES:
            place.names(path)  # weights that cannot be opened are the reason, and are said to be
    known = "\n         ".join(f"{name}: {FORMATS.get(name).title}" for name in FORMATS.names())
    fix = f"name the folder or file of one dictionary, or its format with --format. Known:\n         {known}"
    if place.file is not None:
        raise DictionaryError("no format recognises this file", where=str(place), fix=fix)
    inside = [child.name for child in children if child.is_dir() and _claims(Place(child))]
    if inside:
        raise DictionaryError(
            f"this folder holds {len(inside)} dictionaries and is none itself", where=str(place), fix=f"name one: {_few(inside)}"
        )
    holds = _few([child.name for child in children]) or "nothing"
    raise DictionaryError(f"no format recognises this; the folder holds {holds}", where=str(place), fix=fix)


def _claims(place: Place) -> list[str]:
    return [name for name in FORMATS.names() if FORMATS.get(name).recognise(place)]


def _few(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def import_dictionary(path: Path | str, format: str | None = None) -> Imported:
    """The dictionary at ``path``, whoever wrote it.

    Args:
        path: a folder or file, ``hub:OWNER/REPO/FOLDER``, or ``saelens:RELEASE/ID``.
        format: name of the format; recognised from files and keys where left out.

    Raises:
        DictionaryError: there is nothing, it is of no known format, damaged, or of a kind evalkit does not have. Nothing in it
            is executed.
    """
    with _reading(str(path)):
        found = find(path)
        place = Place(found.path, found.listing.overrides, found.listing.scale)
    with _reading(str(place), place):
        name = recognise(place) if format is None else format
        reader = FORMATS.get(name, "--format")
        place.begin()
        dictionary = reader.read(place)
        _check_quantised(place)
        _tell(dictionary, place, found.listing)
        account(dictionary, place.read, reader.facts, reader.training)
    return Imported(dictionary, name, place.path, "" if os.path.exists(path) else str(path), format is not None)


@contextmanager
def _reading(where: str, place: Place | None = None) -> Iterator[None]:
    """Turn whatever the block raises into a DictionaryError, in letters that a terminal only shows."""
    try:
        yield
    except EvalkitError as error:
        taken = f" ({place.taken})" if place is not None and place.taken else ""
        error.what, error.where, error.fix = (_shown(text) for text in (error.what, error.where + taken, error.fix))
        raise
    except Exception as error:
        said = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
        raise DictionaryError(
            _shown(f"it cannot be read: {reason}"),
            where=_shown(where),
            fix="fetch or copy it again; if it is whole, report this with --debug",
        ) from error


def _check_quantised(place: Place) -> None:
    """Raise DictionaryError where a config says that the weights are quantised: no format here undoes that."""
    for fields in place.read:
        if how := next((fields[name] for name in QUANTISED if fields.get(name)), None):
            name = how.get("quant_method", "a method without a name") if isinstance(how, dict) else how
            raise DictionaryError(
                f"its weights are quantised by '{name}', which evalkit does not undo",
                where=str(place),
                fix="use the dictionary in float32, bfloat16 or float16",
            )


def _shown(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def _tell(dictionary: Dictionary, place: Place, listing: Listing) -> None:
    """Write into the details what was taken off the weights, and what SAELens' directory says of them."""
    details = dictionary.details
    if place.taken:
        details["taken_from"] = place.taken
    for name in place.unexplained:
        what = f"WARNING: the file holds '{name}' beside the weights, and nothing says what it does: it is not used"
        note(details, f"{what}. If the trainer took it off the activations, this dictionary reads them off its centre")
    if listing.hint:
        note(details, listing.hint)
    if not listing.release:
        return
    details["saelens"] = {"release": listing.release, **listing.about}
    dictionary.model = str(listing.overrides.get("model_name") or dictionary.model or listing.model)
    if details.get("format") != "saelens":  # there the overrides are part of the config, which tells of itself
        dictionary.hook_point = str(listing.overrides.get("hook_name") or dictionary.hook_point)
        others = Fields(listing.overrides, "override ")
        others.asked |= {"model_name", "hook_name", *OVERRIDDEN_FACTS}
        place.read.append(others)
        stated = {common: others[name] for name, common in OVERRIDDEN_FACTS.items() if name in others}
        details["made_with"] = {**stated, **details.get("made_with", {})}
    if listing.scale is None:
        return
    own = dictionary.settings().get("scale")
    if own is None:
        place.read.append(Fields({"norm_scaling_factor": listing.scale}, "directory "))
    elif not math.isclose(listing.scale, own, rel_tol=0.01):
        note(details, f"its input scale is {own:g} by its own files; SAELens' directory says {listing.scale:g}")


def load_dictionary(path: Path | str, format: str | None = None) -> Dictionary:
    """The dictionary at ``path``, whoever wrote it; see ``import_dictionary``."""
    return import_dictionary(path, format).dictionary


def export_dictionary(dictionary: Dictionary, folder: Path | str, format: str = "evalkit") -> Path:
    """Write ``dictionary`` into a new ``folder`` as ``format`` and return the folder.

    What was written is read back and has to be the same function (the same identity) before it gets its name.

    Raises:
        DictionaryError: ``folder`` is there already, the format cannot express the dictionary, or is not written by evalkit.
    """
    folder = placed(folder)
    writer = FORMATS.get(format, "--to")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DictionaryError("this path exists; nothing was written", where=str(folder), fix="choose a new folder name")
    if writer.writes and dictionary.kind not in writer.writes:
        can = [name for name in FORMATS.names() if dictionary.kind in FORMATS.get(name).writes]
        raise DictionaryError(
            f"the format '{format}' has no {dictionary.kind} dictionaries; it has {', '.join(writer.writes)}",
            where=str(folder),
            fix=f"formats that can hold it: {', '.join(can)}",
        )
    with publish(folder) as temporary:
        temporary.mkdir()
        writer.write(dictionary, temporary)
        back = writer.read(Place(temporary))
        if back.identity.hash != dictionary.identity.hash:
            raise DictionaryError(
                f"the format '{format}' cannot hold this {dictionary.kind} dictionary exactly; nothing was written",
                where=str(folder),
                fix="export it as 'evalkit', which holds every dictionary exactly",
            )
    return folder


def find_dictionary(name: str, results: Path) -> Path:
    """The folder of the dictionary ``name``: a path, or one of those kept in a results folder.

    Raises:
        DictionaryError: there is none.
    """
    if Path(name).exists() or ":" in name:
        return Path(name)
    kept = results / "dictionaries"
    folders = {folder.name: folder for folder in sorted(kept.iterdir())} if kept.is_dir() else {}
    matching = [folder for key, folder in folders.items() if key == name or key.rsplit("-", 1)[0] == name]
    if len(matching) != 1:
        what = (
            f"there are {len(matching)} dictionaries called '{name}'" if matching else f"there is no dictionary called '{name}'"
        )
        fix = "give one of: " + ", ".join(f.name for f in matching) if matching else near_miss(name, folders)
        raise DictionaryError(what, where=str(kept), fix=fix if folders else "give the path of a dictionary")
    return matching[0]
