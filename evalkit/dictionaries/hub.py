"""Where a dictionary's files are: a path on this machine, or a name on the Hugging Face hub.

1. What exists as a path is that path.
2. ``hub:OWNER/REPO/FOLDER`` (or without the prefix) is a folder, or a file, of a hub repository: only its files are fetched, with
   the configuration files beside and one level above it. ``@REVISION`` may follow the repository.
3. ``saelens:RELEASE/ID`` is a name of SAELens' directory of published dictionaries. The directory is an asset
   (``evalkit assets install saelens-directory``), read as data; it says which repository and folder is meant.

Files fetched once stay in the hub's own cache and are found there without a network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from evalkit.assets.hub_errors import hub_errors
from evalkit.errors import DictionaryError
from evalkit.registry import near_miss

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


def locate(name: Path | str) -> Path:
    """Where the files of ``name`` are, fetched first where they are on the hub.

    Raises:
        DictionaryError: there is no such path, repository, folder or release, or the hub cannot be reached.
    """
    text = str(name)
    if text.startswith(SAELENS):
        return fetch(from_release(text.removeprefix(SAELENS)), text)
    if text.startswith(HUB):
        return fetch(address(text.removeprefix(HUB)), text)
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~NAME of nobody on this machine
        path = Path(name)
    if os.path.exists(path) or isinstance(name, Path) or not _NAME.fullmatch(text) or os.path.exists(path.parent):
        return path  # whoever opens it says what is wrong with it
    return fetch(address(text), text)


def address(text: str) -> Address:
    """``OWNER/REPO[@REVISION][/FOLDER]`` in parts."""
    if not _NAME.fullmatch(text):
        raise DictionaryError(
            f"'{text}' is not a name on the hub", where=HUB + text, fix="write hub:OWNER/REPO or hub:OWNER/REPO/FOLDER"
        )
    owner, repository, *inside = text.split("/")
    repository, _, revision = repository.partition("@")
    return Address(f"{owner}/{repository}", "/".join(inside).strip("/"), revision or None)


def from_release(text: str) -> Address:
    """The address of SAELens' ``RELEASE/ID``.

    Raises:
        AssetError: the directory is not installed.
        DictionaryError: it has no such release or id.
    """
    import yaml

    from evalkit.assets.install import path

    directory: dict[str, Any] = yaml.load(path(DIRECTORY).read_text("utf8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    release, _, wanted = text.partition("/")
    if release not in directory:
        raise DictionaryError(f"SAELens knows no release '{release}'", where=SAELENS + text, fix=near_miss(release, directory))
    entry = directory[release]
    paths = {str(sae["id"]): str(sae["path"]) for sae in entry["saes"]}
    if wanted not in paths:
        raise DictionaryError(
            f"the release '{release}' has no dictionary '{wanted}'", where=SAELENS + text, fix=_few(near_miss(wanted, paths))
        )
    return Address(str(entry["repo_id"]), "" if paths[wanted] == "." else paths[wanted].strip("/"))


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

    unusable: tuple[type[Exception], ...] = (*hub_errors(), ValueError)
    try:
        files = HfApi().list_repo_files(place.repository, revision=place.revision)
    except hub_errors() as error:
        try:  # no network: what was fetched before will do
            root = Path(snapshot_download(place.repository, revision=place.revision, local_files_only=True))
        except unusable:
            root = Path()
        if root != Path() and (root / place.inside).exists():
            return root / place.inside
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DictionaryError(
            f"the hub repository '{place.repository}' cannot be read: {reason}",
            where=name,
            fix="check the name and the network; a gated repository needs HF_TOKEN; a local folder works without either",
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
    except hub_errors() as error:
        raise DictionaryError(
            f"the download broke off: {error}", where=name, fix="run it again: it goes on where it was"
        ) from error
    return root / place.inside
