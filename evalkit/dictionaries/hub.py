"""Where a dictionary's files are: a path on this machine, or a name on the Hugging Face hub.

1. What exists as a path is that path.
2. ``hub:OWNER/REPO/FOLDER`` (or without the prefix) is a folder, or a file, of a hub repository: only its files are fetched, with
   the configuration files beside and one level above it. ``@REVISION`` may follow the repository.
3. ``saelens:RELEASE/ID`` is a name of SAELens' directory of published dictionaries. The directory is an asset
   (``evalkit assets install saelens-directory``), read as data; it says which repository and folder is meant, and a ``Listing``
   what it adds to the files: fields put over their config, an input scale, what the authors measured.
4. Where the directory is installed and adds something to what was named by its hub address, that is said.

Files fetched once stay in the hub's own cache and are found there without a network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

from evalkit.errors import AssetError, DictionaryError
from evalkit.util.registry import near_miss

HUB, SAELENS = "hub:", "saelens:"
DIRECTORY = "saelens-directory"
"""Name of the asset that lists what SAELens knows."""
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(/[^\\]*)?")


class Address(NamedTuple):
    """A folder or file of a hub repository."""

    repository: str
    inside: str
    """Path in the repository; '' for its root."""
    revision: str | None = None


class Listing(NamedTuple):
    """What SAELens' directory says of a published dictionary beside its address; empty where it was not asked."""

    release: str = ""
    """RELEASE/ID."""
    model: str = ""
    """Name of the language model."""
    overrides: Mapping[str, Any] = MappingProxyType({})
    """Fields that SAELens puts over the config of the files."""
    scale: float | None = None
    """norm_scaling_factor: what SAELens multiplies activations by where the config says expected_average_only_in."""
    about: Mapping[str, Any] = MappingProxyType({})
    """What it says besides: l0 and variance_explained as measured by the authors, the loader that SAELens takes."""
    hint: str = ""
    """In words, what it would add to files that were named by their hub address."""


class Located(NamedTuple):
    """Where the files of a dictionary are, and what is known of it beside them."""

    path: Path
    listing: Listing = Listing()


class Listed(NamedTuple):
    """One dictionary of SAELens' directory."""

    address: Address
    listing: Listing


def find(name: Path | str) -> Located:
    """Where the files of ``name`` are, fetched first where they are on the hub, and what SAELens' directory says of them.

    Raises:
        DictionaryError: there is no such path, repository, folder or release, or the hub cannot be reached.
    """
    text = str(name)
    if text.startswith(SAELENS):
        listed = from_release(text.removeprefix(SAELENS))
        return Located(fetch(listed.address, text), listed.listing)
    if text.startswith(HUB):
        return _fetched(address(text.removeprefix(HUB)), text)
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~NAME of nobody on this machine
        path = Path(name)
    if os.path.exists(path) or isinstance(name, Path) or not _NAME.fullmatch(text) or os.path.exists(path.parent):
        return Located(path)  # whoever opens it says what is wrong with it
    return _fetched(address(text), text)


def _fetched(place: Address, text: str) -> Located:
    path = fetch(place, text)
    return Located(path, Listing(hint=_hint(place)))


def _hint(place: Address) -> str:
    """What SAELens' directory, if it is installed, adds to what lies at ``place``; '' where it adds nothing."""
    try:
        text = _directory_text()
    except AssetError:
        return ""
    if place.repository.lower() not in text.lower():  # before seconds are spent on reading it all
        return ""
    for release, entry in _directory(text).items():
        if str(entry.get("repo_id")).lower() != place.repository.lower():
            continue
        for sae in entry.get("saes") or []:
            if _inside(sae) == place.inside and (adds := _adds(entry, sae)):
                shown = ", ".join(f"{name} = {value}" for name, value in adds.items())
                return f"SAELens' directory puts {shown} over these files: import {SAELENS}{release}/{sae['id']} to have it used"
    return ""


def _adds(entry: Mapping[str, Any], sae: Mapping[str, Any]) -> dict[str, Any]:
    """What the directory puts over the files, without what only says how they were made."""
    overrides = {name: value for name, value in (entry.get("config_overrides") or {}).items() if name != "dataset_path"}
    return overrides | ({} if sae.get("norm_scaling_factor") is None else {"norm_scaling_factor": sae["norm_scaling_factor"]})


def _inside(sae: Mapping[str, Any]) -> str:
    path = str(sae["path"])
    return "" if path == "." else path.strip("/")


def _directory_text() -> str:
    """SAELens' directory as it is written. Raises AssetError where it is not installed."""
    from evalkit.assets.install import path

    return path(DIRECTORY).read_text("utf-8-sig")


def _directory(text: str) -> dict[str, Any]:
    """The releases in ``text`` by name."""
    import yaml

    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def address(text: str) -> Address:
    """``OWNER/REPO[@REVISION][/FOLDER]`` in parts."""
    if not _NAME.fullmatch(text):
        raise DictionaryError(
            f"'{text}' is not a name on the hub", where=HUB + text, fix="write hub:OWNER/REPO or hub:OWNER/REPO/FOLDER"
        )
    owner, repository, *inside = text.split("/")
    repository, _, revision = repository.partition("@")
    return Address(f"{owner}/{repository}", "/".join(inside).strip("/"), revision or None)


def from_release(text: str) -> Listed:
    """What the directory says of SAELens' ``RELEASE/ID``.

    Raises:
        AssetError: the directory is not installed.
        DictionaryError: it has no such release or id.
    """
    directory = _directory(_directory_text())
    release, _, wanted = text.partition("/")
    if release not in directory:
        raise DictionaryError(f"SAELens knows no release '{release}'", where=SAELENS + text, fix=near_miss(release, directory))
    entry = directory[release]
    saes = {str(sae["id"]): sae for sae in entry["saes"]}
    if wanted not in saes:
        raise DictionaryError(
            f"the release '{release}' has no dictionary '{wanted}'", where=SAELENS + text, fix=_few(near_miss(wanted, saes))
        )
    sae = saes[wanted]
    overrides = entry.get("config_overrides") or {}
    revision = overrides.get("revision")
    factor = sae.get("norm_scaling_factor")
    about = {name: sae[name] for name in ("l0", "variance_explained") if sae.get(name) is not None}
    if entry.get("conversion_func"):
        about["loader"] = str(entry["conversion_func"])
    return Listed(
        Address(str(entry["repo_id"]), _inside(sae), str(revision) if revision else None),
        Listing(
            release=text,
            model=str(entry.get("model") or ""),
            overrides={name: value for name, value in overrides.items() if name != "revision"},
            scale=float(factor) if isinstance(factor, int | float) else None,
            about=about,
        ),
    )


def _few(text: str, most: int = 600) -> str:
    return text if len(text) <= most else text[:most].rsplit(",", 1)[0] + ", ..."


def chosen(files: Iterable[str], inside: str) -> list[str]:
    """Those of a repository's ``files`` that belong to the folder or file ``inside``."""
    every = sorted(files)
    folder = inside if inside not in every else str(PurePosixPath(inside).parent)
    folder = "" if folder == "." else folder
    above = str(PurePosixPath(folder).parent) if folder else ""
    above = "" if above == "." else above

    def wanted(file: str) -> bool:
        parent = str(PurePosixPath(file).parent)
        parent = "" if parent == "." else parent
        config = file.endswith((".json", ".yaml", ".yml"))
        if inside in every:
            return file == inside or config and parent in (folder, above)
        return parent == folder or bool(folder) and file.startswith(f"{folder}/") or config and parent == above

    return [file for file in every if wanted(file)]


def fetch(place: Address, name: str) -> Path:
    """Bring the files of ``place`` here; where they are.

    Raises:
        DictionaryError: it cannot be had; ``name`` is what the user wrote.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its log of attempts, which the message replaces
    try:
        files = HfApi().list_repo_files(place.repository, revision=place.revision)
    except Exception as error:
        try:  # no network: what was fetched before will do
            root = Path(snapshot_download(place.repository, revision=place.revision, local_files_only=True))
        except Exception:
            root = Path()
        if root != Path() and (root / place.inside).exists():
            return root / place.inside
        raise DictionaryError(
            f"the hub repository '{place.repository}' cannot be read: {_reason(error)}",
            where=name,
            fix="check the name, the network and the proxy (HTTPS_PROXY, ALL_PROXY); a gated repository needs HF_TOKEN; "
            "a local folder works without any",
        ) from error
    wanted = chosen(files, place.inside)
    weights = [file for file in wanted if not file.endswith((".json", ".yaml", ".yml", ".md", ".gitattributes"))]
    if not weights:
        folders = sorted({str(PurePosixPath(file).parent) for file in files if "/" in file})
        what = f"'{place.inside}' is not in" if place.inside else "there are no weights at the root of"
        raise DictionaryError(
            f"{what} the repository '{place.repository}'",
            where=name,
            fix=_few(near_miss(place.inside or place.repository, folders)),
        )
    try:
        root = Path(snapshot_download(place.repository, revision=place.revision, allow_patterns=wanted))
    except Exception as error:
        raise DictionaryError(
            f"the download broke off: {_reason(error)}", where=name, fix="run it again: it goes on where it was"
        ) from error
    return root / place.inside


def _reason(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__
