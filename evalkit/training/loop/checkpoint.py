"""Checkpoints: a run that was killed goes on from the last one, on the CPU bit for bit where ``util.arithmetic`` has no doubt.

1. A checkpoint is one safetensors file: tensors by number, and in its header the JSON that says what they belong to, what the
   run was (settings, data, hook point, model) and how far it had come. Nothing in it is executed on loading.
2. It is built under another name and renamed into place (``files.publish``): at any moment the last whole one is there. Where
   the disk is full, that one stays, and the error says so.
3. It is refused by a run with other settings or other data, which are named, and by an evalkit of another format.
   Its tensors are loaded into memory of their own, aligned as PyTorch aligns those of a run in one go.
4. It is written every ``every_s`` seconds or every ``every_steps`` steps, and at the end.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from evalkit.errors import UsageError
from evalkit.util.disk import disk_failures
from evalkit.util.files import publish, tidy

FORMAT = 2
"""Version of the layout and of the states in it; a reader refuses any other."""

FILE = "checkpoint.safetensors"


class CheckpointError(UsageError):
    """A checkpoint is damaged, or was made by another run."""


class Packed(NamedTuple):
    """A state taken apart."""

    tensors: dict[str, torch.Tensor]
    """By number."""
    frame: Any
    """The rest, as JSON has it, with places that name tensors."""


def pack(state: Any) -> Packed:
    """Take a state of nested dictionaries, lists and tuples apart into tensors and JSON."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            # a copy, because safetensors refuses tensors that share memory
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"items": [[key, walk(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [walk(item) for item in value]}
        if isinstance(value, list):
            return [walk(item) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")

    frame = walk(state)
    return Packed(tensors, frame)


def unpack(tensors: Mapping[str, torch.Tensor], frame: Any) -> Any:
    """The inverse of ``pack``."""
    if isinstance(frame, list):
        return [unpack(tensors, item) for item in frame]
    if isinstance(frame, dict):
        if "tensor" in frame:
            return tensors[frame["tensor"]]
        if "tuple" in frame:
            return tuple(unpack(tensors, item) for item in frame["tuple"])
        return {key: unpack(tensors, item) for key, item in frame["items"]}
    return frame


class Checkpoint:
    """The checkpoint of one training run.

    Args:
        folder: a folder of its own; created with the first checkpoint, removed by ``discard``.
        every_s: seconds between checkpoints; 0 writes one after every step.
        every_steps: steps between them, whatever time it takes; seconds decide when left out.
    """

    def __init__(self, folder: Path | str, *, every_s: float = 60.0, every_steps: int | None = None) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE
        self.every_s, self.every_steps = every_s, every_steps
        self._last = time.monotonic()

    def due(self, number: int) -> bool:
        """Whether one is to be written after step ``number``."""
        if self.every_steps is not None:
            return number % self.every_steps == 0
        return time.monotonic() - self._last >= self.every_s

    def save(self, about: Mapping[str, Any], state: Mapping[str, Any], **more: Any) -> None:
        """Put ``state`` in the place of the last one.

        Args:
            about: JSON-able; what the run is. ``load`` compares it.
            state: nested dictionaries, lists and tuples of tensors and plain values.
            more: JSON-able; what else ``about()`` says of it, compared with nothing.

        Raises:
            DiskFailed: it cannot be written; the last one is kept.
        """
        packed = pack(state)
        header = json.dumps({"format": FORMAT, "about": about, "more": more, "frame": packed.frame})
        kept = "the checkpoint before this one is kept, and the same command goes on from it" if self.path.exists() else ""
        with disk_failures(self.path, kept):
            for final in (False, True):
                try:
                    with publish(self.path) as temporary:
                        save_file(packed.tensors, temporary, metadata={"evalkit": header})
                    break
                except (FileNotFoundError, SafetensorError):
                    # another process that trained the same has finished and removed the folder: it is made again
                    if final or self.folder.exists():
                        raise
        self._last = time.monotonic()

    def about(self) -> dict[str, Any] | None:
        """What the run is that the checkpoint is of, and what else was said of it; None where there is none.

        Raises:
            CheckpointError: it is damaged, or of another evalkit's format.
        """
        try:
            with self._reading() as file:
                header = self._header(file)
        except FileNotFoundError:
            return None
        return {**header["about"], **header["more"]}

    def load(self, about: Mapping[str, Any], *, larger: str = "") -> Any | None:
        """The state that was saved last, on the CPU; None where there is none. What a kill left half-written is removed.

        Args:
            about: what the run is.
            larger: name of a mapping in it of which the checkpoint may hold more.

        Raises:
            CheckpointError: it is damaged, of another evalkit's format, or another run's.
        """
        tidy(self.path)
        try:
            # one opening for all: another process may put a newer one in its place
            with self._reading() as file:
                header = self._header(file)
                # what was tuples is lists in the file
                was, wanted = header["about"], json.loads(json.dumps(about))
                if larger:
                    held = was.get(larger, {}).items()
                    was = {**was, larger: {key: value for key, value in held if key in wanted[larger]}}
                if was != wanted:
                    what = f"the checkpoint is of another run: {'; '.join(_differences(was, wanted))}"
                    raise CheckpointError(what, where=str(self.path), fix=f"train with what it was made with, or {self._anew}")
                # the file's own tensors lie at any address, and there some libraries compute other bits (``util.arithmetic``)
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no dictionary
                return unpack(tensors, header["frame"])
        except FileNotFoundError:
            return None

    @property
    def _anew(self) -> str:
        return f"remove {self.folder} to begin anew"

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except FileNotFoundError:  # never there, or another process that trained the same has finished with it
            raise
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"the checkpoint cannot be read: {error}", where=str(self.path), fix=self._anew) from error

    def _header(self, file: Any) -> dict[str, Any]:
        header: dict[str, Any] = json.loads((file.metadata() or {})["evalkit"])
        found = int(header["format"])
        if found > FORMAT:
            what = f"the checkpoint has format {found}; this evalkit reads format {FORMAT}"
            raise CheckpointError(what, where=str(self.path), fix=f"update evalkit, or {self._anew}")
        if found < FORMAT:
            what = f"the checkpoint is an older evalkit's: it has format {found}, and this evalkit reads format {FORMAT}"
            raise CheckpointError(what, where=str(self.path), fix=f"finish the run with the older evalkit, or {self._anew}")
        return header

    def discard(self) -> None:
        """Remove it with its folder: what it was kept for is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _differences(was: Any, now: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, in words: ``members SAE lr was 0.001 and is 0.002``."""
    if isinstance(was, dict) and isinstance(now, dict):
        lines = []
        for key in sorted(set(was) | set(now)):
            here = f"{path} {key}".strip()
            if key not in was or key not in now:
                lines.append(f"{here} {'was not there' if key not in was else 'is not there any more'}")
            elif was[key] != now[key]:
                lines += _differences(was[key], now[key], here)
        return lines
    return [f"{path} was {was!r} and is {now!r}"]
