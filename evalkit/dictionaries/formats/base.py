"""The contract every file format keeps, on one screen.

1. A ``Place`` is what the user named: a folder, or one file in it. It answers questions about files, keys and shapes without
   loading weights and without executing anything.
2. ``recognise(place)`` says whether the format's writer wrote it: by the set of files first, then by keys. Exactly one format
   may recognise a place.
3. A config and a file's tensors are handed out as ``Fields``, which note what was used; ``facts`` and ``training`` say what the
   other fields are. Weights that lie inside a wrapper are taken out of it (``wrapped``).
4. ``read(place)`` makes the dictionary. Parity is a matter of the function: what ``encode`` and ``reconstruct`` compute must be
   what the writer's own library computes, whatever its tensors are called.
5. ``write(dictionary, folder)`` makes files that the library reads, for formats that have it; reading them back is exact.

Adding a format is one module in this package and its test.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats import safe
from evalkit.dictionaries.formats.fields import Fields
from evalkit.dictionaries.formats.wrapped import Unwrapped, unwrap
from evalkit.errors import DictionaryError
from evalkit.util.registry import Registry, near_miss


class Tensor(NamedTuple):
    """What a file says about one of its tensors."""

    shape: tuple[int, ...]
    dtype: str


class Place:
    """A folder or a file, read as data. Nothing in it is executed.

    Args:
        path: the folder, or one file of it.
        overrides: fields that a directory of published dictionaries puts over the writer's config.
        scale: input scale that such a directory gives for it.

    Raises:
        DictionaryError: there is nothing at ``path``.
    """

    def __init__(self, path: Path | str, overrides: Mapping[str, Any] | None = None, scale: float | None = None) -> None:
        self.path = Path(path)
        # os.path: a name that the system does not allow is one that is not there
        if not os.path.exists(self.path):
            siblings = [p.name for p in self.path.parent.iterdir()] if os.path.isdir(self.path.parent) else []
            fix = near_miss(self.path.name, siblings) if siblings else "give a folder or a file, or a hub name OWNER/REPO"
            raise DictionaryError("there is no such file or folder", where=str(path), fix=fix)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.file = None if self.path.is_dir() else self.path
        """The file the user named; None where it is a folder."""
        self.overrides, self.scale = dict(overrides or {}), scale
        self.read: list[Fields] = []
        """Configs and tensors that were handed out: what was used of them, and what was not."""
        self._configs: dict[str, Fields] = {}
        self._weights: dict[Path, Unwrapped] = {}
        self._tensors: dict[Path, Fields] = {}
        self._inside: dict[Path, Fields] = {}
        self._beside: dict[Path, Fields] = {}
        self._keys: dict[Path, set[str]] = {}

    def __str__(self) -> str:
        return str(self.path)

    def find(self, *names: str) -> Path | None:
        """The named file if its name is one of ``names``; in a folder, the first of ``names`` (glob patterns) that is there."""
        if self.file is not None:
            return self.file if any(self.file.match(name) for name in names) else None
        for name in names:
            found = sorted(path for path in self.folder.glob(name) if path.is_file())
            if found:
                return found[0]
        return None

    def beside(self, *names: str) -> Path | None:
        """The first of ``names`` that lies in the folder, whatever file was named."""
        return next((self.folder / name for name in names if (self.folder / name).is_file()), None)

    def config(self, *names: str) -> Fields:
        """The JSON object in the first of ``names`` that lies in the folder; empty where none does.

        Raises:
            DictionaryError: it is not a JSON object.
        """
        path = self.beside(*names)
        if path is None:
            return Fields({})
        if path.name not in self._configs:
            self._configs[path.name] = Fields(safe.json_object(path))
        return self._hand_out(self._configs[path.name])

    @property
    def above(self) -> Place:
        """The folder that this one lies in; what is read of it counts as read here."""
        parent = Place(self.folder.parent, self.overrides, self.scale)
        parent.read = self.read
        return parent

    def track(self, fields: Mapping[str, Any]) -> Fields:
        """``fields``, a config or a part of one, as ``Fields`` whose unused names are reported."""
        return self._hand_out(Fields(fields))

    def _hand_out(self, fields: Fields) -> Fields:
        if not any(fields is known for known in self.read):
            self.read.append(fields)
        return fields

    def begin(self) -> None:
        """Forget what was used so far: recognising looks into files that the reader then has no use for."""
        for fields in self.read:
            fields.asked.clear()
            fields.parts.clear()
        self.read.clear()

    def unwrapped(self, path: Path) -> Unwrapped:
        """What a .safetensors, .npz or PyTorch file holds; loaded once, and never by executing a pickle.

        Raises:
            DictionaryError: it is damaged, or holds objects that are no plain data, or several sets of weights.
        """
        if path not in self._weights:
            self._weights[path] = unwrap(safe.load(path), path)
        return self._weights[path]

    def weights(self, path: Path) -> Fields:
        """The weights in ``path`` by name, with what lies beside them in the file; raises as ``unwrapped``."""
        if path not in self._tensors:
            found = self.unwrapped(path)
            self._tensors[path] = Fields(found.tensors, "tensor ")
            self._inside[path], self._beside[path] = Fields(found.config), Fields(found.beside)
        for fields in (self._tensors[path], self._beside[path], self._inside[path]):
            self._hand_out(fields)
        tensors = self._tensors[path]
        return Fields(tensors, tensors.prefix, tensors.asked)

    def inside(self, path: Path) -> Fields:
        """The config that lies in the file ``path`` beside its weights; empty where none does. Raises as ``unwrapped``."""
        self.weights(path)
        return self._inside[path]

    @property
    def unexplained(self) -> list[str]:
        """Names of tensors that lie beside the weights of a loaded file: their format has no place for them."""
        return [
            name
            for found in self._weights.values()
            for name, value in found.beside.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim and bool(value.any())
        ]

    @property
    def taken(self) -> str:
        """In words, what was taken off the weights that were loaded; '' where nothing was."""
        return ", ".join(dict.fromkeys(found.taken for found in self._weights.values() if found.taken))

    def names(self, path: Path) -> set[str]:
        """Names of the tensors that ``path`` holds, without reading the numbers; raises as ``unwrapped``."""
        if path.suffix in safe.TORCH_SUFFIXES:
            return set(unwrap(safe.load(path, mapped=True), path).tensors)
        return set(unwrap(dict.fromkeys(safe.names(path)), path).tensors)

    def keys(self, path: Path | None) -> set[str]:
        """As ``names``, but empty for None and for what cannot be read safely."""
        if path is None:
            return set()
        if path not in self._keys:
            try:
                self._keys[path] = self.names(path)
            except DictionaryError:
                self._keys[path] = set()
        return self._keys[path]


class Format(ABC):
    """Base of the formats. Stateless."""

    name: ClassVar[str]
    """As in ``--format``."""
    title: ClassVar[str]
    """Which project writes it, and the file names."""
    writes: ClassVar[tuple[str, ...]] = ()
    """Kinds of dictionary that ``write`` can express; empty for formats that are only read."""
    facts: ClassVar[Mapping[str, str]] = {}
    """Fields of its files that say how a dictionary was made, with their names in ``details["made_with"]``."""
    training: ClassVar[tuple[str, ...]] = ()
    """Patterns of fields that matter in training alone, beside those that every trainer has (``fields.TRAINING``)."""

    @abstractmethod
    def recognise(self, place: Place) -> bool:
        """Whether this format's writer wrote ``place``. Cheap; raises nothing."""

    @abstractmethod
    def read(self, place: Place) -> Dictionary:
        """The dictionary. Its ``details`` hold what the writer says of it (model, hook, training), under the writer's names, and
        in ``notes`` what a reader of its numbers has to know.

        Raises:
            DictionaryError: the files are damaged, contradict each other, or are of a kind evalkit does not have.
        """

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """Write ``dictionary`` into the existing, empty ``folder``.

        Raises:
            DictionaryError: the format cannot express it.
        """
        raise DictionaryError(
            f"evalkit reads the format '{self.name}' but does not write it",
            where="--to",
            fix=f"known: {', '.join(n for n in FORMATS.names() if FORMATS.get(n).writes)}",
        )

    def refuse(self, place: Place | Path | str, what: str, fix: str) -> NoReturn:
        """Raise the error of a file that cannot be taken over."""
        raise DictionaryError(what, where=str(place), fix=fix)


FORMATS: Registry[Format] = Registry("format", "evalkit.dictionaries.formats", DictionaryError)
"""Formats by name; instances, as they hold nothing."""


def matrix(tensors: Mapping[str, Any], name: str, shape: tuple[int, ...], place: Place | Path | str) -> torch.Tensor:
    """The float32 tensor ``name``, which must have ``shape`` as the writer declares it (-1 for any size).

    Raises:
        DictionaryError: it is missing, is no floating-point tensor, or has another shape.
    """
    if name not in tensors:
        raise DictionaryError(f"the file lacks the tensor '{name}'", where=str(place), fix=near_miss(name, tensors))
    tensor = tensors[name]
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        kind = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise DictionaryError(f"'{name}' holds {kind}, not floating-point numbers", where=str(place), fix="fetch the file again")
    if tensor.ndim != len(shape) or any(want not in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise DictionaryError(
            f"'{name}' has shape {tuple(tensor.shape)}, not ({wanted}) as the format lays it out",
            where=str(place),
            fix="check which trainer wrote the file (--format), or fetch it again",
        )
    return tensor.detach().as_subclass(torch.Tensor).to("cpu", torch.float32).contiguous()


def number(config: Mapping[str, Any], name: str, place: Place | Path | str, least: int = 1) -> int:
    """The whole number ``name`` of a config.

    Raises:
        DictionaryError: it is missing or is no whole number of ``least`` or more.
    """
    value = config.get(name)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DictionaryError(
            f"the config says {name} = {value!r}, not a whole number of {least} or more",
            where=str(place),
            fix="correct the config",
        )
    return value
