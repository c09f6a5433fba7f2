"""Activations kept on disk chunk by chunk, so that a second run reads them and never runs the language model.

1. A folder is named by everything that can change its rows (model, tokens, hook point, rule, length of a chunk).
2. ``manifest.json`` comes first and holds the norm limit and the width; each chunk is one .npy file of kept rows.
3. Every file is renamed into place when it is whole (``files.publish_once``): a killed run leaves the chunks it finished, and the
   next one makes the others.
4. Chunks are memory-mapped when they are read. One that is not what was written (cut short, another shape, a file of something
   else) is refused by name; other files in the folder are left alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from evalkit.errors import AssetError
from evalkit.util.disk import disk_failures
from evalkit.util.files import publish_once


class Manifest(NamedTuple):
    """What all chunks of a folder share."""

    limit: float
    """Largest norm kept; infinite where there is no limit."""
    width: int
    """D."""


class ShardFolder:
    """Chunks of one hook point.

    Args:
        folder: named by what determines the rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manifest(self) -> Manifest | None:
        """None where nothing has been written yet.

        Raises:
            AssetError: the file is damaged.
        """
        path = self.folder / "manifest.json"
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            made = Manifest(float(found["limit"]), int(found["width"]))
            if math.isnan(made.limit) or made.limit < 0 or made.width < 1:
                raise ValueError(f"limit {made.limit}, width {made.width}")
        except (OSError, ValueError, TypeError, LookupError, OverflowError) as error:
            raise AssetError(
                f"the description of a folder of activations cannot be read: {error or type(error).__name__}",
                where=str(path),
                fix="remove that file: it is made again, and the chunks beside it are kept",
            ) from error
        return made

    def begin(self, manifest: Manifest) -> None:
        """Write what the chunks share.

        Raises:
            DiskFailed: it cannot be written.
        """
        path = self.folder / "manifest.json"
        with disk_failures(path), publish_once(path) as temporary:
            temporary.write_text(json.dumps({"limit": manifest.limit, "width": manifest.width}))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.npy"

    def has(self, number: int) -> bool:
        """Whether chunk ``number`` is there."""
        return self._path(number).exists()

    def write(self, number: int, rows: Float[torch.Tensor, "N D"]) -> None:
        """Keep the rows of chunk ``number``, float32.

        Raises:
            DiskFailed: they cannot be written; the chunks before are kept.
        """
        kept = "the chunks before this one are kept, and the same command goes on"
        with (
            disk_failures(self._path(number), kept),
            publish_once(self._path(number)) as temporary,
            temporary.open("wb") as handle,
        ):
            np.save(handle, rows.detach().to("cpu", torch.float32).numpy())

    def read(self, number: int) -> Float[torch.Tensor, "N D"]:
        """The rows of chunk ``number``, memory-mapped.

        Raises:
            AssetError: the file is damaged, or does not hold rows of the folder's width.
        """
        path, manifest = self._path(number), self.manifest()
        try:
            # copy-on-write: torch wants writable memory, the file stays as it is
            rows = np.lib.format.open_memmap(path, mode="c")
        except (ValueError, OSError, EOFError) as error:
            raise _damaged(path, str(error)) from error
        if rows.dtype != np.float32 or rows.ndim != 2 or (manifest is not None and rows.shape[1] != manifest.width):
            width = "D" if manifest is None else manifest.width
            raise _damaged(path, f"it holds {rows.dtype} of shape {rows.shape}, not float32 of shape (N, {width})")
        return torch.from_numpy(rows)


def _damaged(path: Path, why: str) -> AssetError:
    fix = "remove that file: it is made again"
    return AssetError(f"a chunk of activations cannot be read: {why}", where=str(path), fix=fix)
