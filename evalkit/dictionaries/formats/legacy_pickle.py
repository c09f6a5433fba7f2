"""Pickled objects of two writers, read as data: no code that a file names is imported or called.

Two trainers of 2023 saved whole Python objects with ``torch.save``. ``torch.load(weights_only=True)`` does not do for them:
it reads no pickle protocol above 3, and in it 20 kB of copies of copies grow to gigabytes. The steps here:

1. The file must be the zip form of ``torch.save``, its members stored uncompressed. Older stream forms are refused.
2. The opcodes of ``data.pkl`` are listed first, without following them. Those that plain data does not need are refused.
3. Python's own ``pickle.Unpickler`` follows them. Its ``find_class`` imports nothing: it answers from the list below, the way
   that Python's documentation of ``pickle`` gives for restricting globals.
4. An object of a writer's class becomes a ``Record``: a name and the state that was stored. Functions that make tensors,
   parameters, OrderedDict, set, device and Size are replaced by those of this module.
5. A storage is the member ``data/NUMBER`` of the zip. Its size must be the declared one, and a tensor must lie inside it.
6. What a short file can make is bounded: the pickle's length, its memo, the items that copies of containers come to, and the
   members of the zip, which together are no longer than the file.

The pickle format is documented in Python's ``pickletools``, the zip layout in PyTorch's serialization notes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from evalkit.errors import DictionaryError

CLASSES = frozenset(
    {
        "autoencoders.learned_dict.TiedSAE",
        "autoencoders.learned_dict.UntiedSAE",
        "autoencoders.learned_dict.ReverseSAE",
        "autoencoders.topk_encoder.TopKLearnedDict",
        "sparse_autoencoder.autoencoder.model.SparseAutoencoderState",
        "sparse_autoencoder.autoencoder.model.SparseAutoencoderConfig",
    }
)
"""The writers' classes whose instances are recorded."""

MOST_PICKLE = 1 << 20
"""Longest data.pkl in bytes; the numbers lie outside it, so that real ones are far smaller."""

MOST_COPIED = 1 << 20
"""Most items that containers made from other containers hold in all: copies of copies would grow without bound."""

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_DTYPES = frozenset(str(dtype) for dtype in _STORAGES.values())
_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "NONE", "NEWTRUE", "NEWFALSE"),
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"),
        *("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GET"),
        *("GLOBAL", "STACK_GLOBAL", "BINPERSID", "NEWOBJ", "REDUCE", "BUILD"),
    }
)
"""Opcodes of plain data and of objects; those of the extension registry, of buffers and of old-style instances are absent."""

_FIX = "open it with nothing else; get the weights as .safetensors, or as a plain state_dict saved by someone you trust"
_AGAIN = "fetch or copy the file again: it is damaged or was cut short"


@dataclass(eq=False)
class Record:
    """An object of a writer's class: what was stored of it, and nothing that runs."""

    name: str
    """Module and class, joined by a dot."""
    state: dict[str, Any] = field(default_factory=dict)
    """Attributes by name, as stored."""

    def __setstate__(self, state: Any) -> None:
        """Called by pickle with the stored attributes."""
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise _Refused(f"the pickle sets attributes of '{self.name}' by a {type(state).__name__}, not by names")
        self.state.update(state)


def load(path: Path) -> Any:
    """What the file holds: plain containers and numbers, tensors, and a ``Record`` for each object of the writers' classes.

    Raises:
        DictionaryError: it is no zip of ``torch.save``, is damaged, or asks for anything that is not on the list.
    """
    with _Archive(path) as archive:
        data = archive.member("data.pkl", MOST_PICKLE)
        try:
            _check_opcodes(data)
            return _Unpickler(data, archive).load()
        except _Refused as refused:
            _refuse(path, str(refused), refused.fix)
        except _DAMAGED as error:
            _refuse(path, f"the pickle cannot be followed: {type(error).__name__}: {str(error)[:200]}", _AGAIN)


def globals_of(path: Path) -> frozenset[str]:
    """Names of the globals that a file's pickle mentions, without following it; empty for what cannot be read."""
    names, strings = set(), ["", ""]
    try:
        with _Archive(path) as archive:
            for opcode, argument, _ in pickletools.genops(archive.member("data.pkl", MOST_PICKLE)):
                if opcode.name == "GLOBAL":
                    names.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(".".join(strings))
                elif isinstance(argument, str):
                    strings = [strings[1], argument]
    except (DictionaryError, ValueError, IndexError, OverflowError, MemoryError):
        return frozenset()
    return frozenset(names)


class _Refused(Exception):
    """The pickle asks for something that is not on the list, or declares numbers that do not fit."""

    def __init__(self, what: str, fix: str = _FIX) -> None:
        super().__init__(what)
        self.fix = fix


_DAMAGED = (
    *(pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError, OverflowError, EOFError),
    *(RuntimeError, MemoryError),  # RecursionError is a RuntimeError
)
"""What Python's unpickler raises on bytes that make no sense."""


def _refuse(path: Path, what: str, fix: str = _FIX) -> NoReturn:
    raise DictionaryError(what, where=str(path), fix=fix) from None


def _check_opcodes(data: bytes) -> None:
    """Refuse what plain data does not need, before anything is followed."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise _Refused(f"the pickle uses the opcode {opcode.name}, which plain data does not need; nothing in it was run")
        # the unpickler's memo is an array as long as its largest index
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise _Refused(f"the pickle numbers an object {argument}, more than it has bytes", _AGAIN)


class _Archive:
    """The zip of ``torch.save``: its pickle and its storages."""

    def __init__(self, path: Path) -> None:
        self.path, self._cache = path, dict[str, torch.Tensor]()
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            what = f"this is not the zip form of torch.save, and older forms of pickles are not opened: {error}"
            _refuse(path, what, "save it again with torch 1.6 or later, in an environment you trust")
        self._names = frozenset(self._zip.namelist())
        found = [name for name in self._zip.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(found) != 1:
            self._zip.close()
            _refuse(path, f"a file of torch.save holds one data.pkl; this one holds {len(found)}", _AGAIN)
        if sum(member.compress_size for member in self._zip.infolist()) > path.stat().st_size:
            self._zip.close()
            _refuse(path, "its members together are longer than the file: they lie over one another", _AGAIN)
        self._root = found[0].removesuffix("data.pkl")

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def member(self, name: str, most: int) -> bytes:
        """The bytes of one member, which must be stored as it is and be no longer than ``most``."""
        try:
            info = self._zip.getinfo(self._root + name)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.file_size > most:
                _refuse(
                    self.path, f"the member '{name}' is compressed or of {info.file_size} bytes, more than it may have", _AGAIN
                )
            return self._zip.read(info)
        except (KeyError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            _refuse(self.path, f"the member '{name}' cannot be read: {error}", _AGAIN)

    def storage(self, kind: str, key: str, count: int) -> torch.Tensor:
        """The 1-D tensor of storage ``key``, which must hold ``count`` numbers."""
        dtype = _STORAGES[kind]
        if key not in self._cache:
            if not re.fullmatch(r"[0-9]{1,9}", key):
                _refuse(self.path, f"a storage is called '{key[:40]}', not by a number", _AGAIN)
            if f"{self._root}byteorder" in self._names and self.member("byteorder", 16).strip() != b"little":
                _refuse(self.path, "the numbers are stored big-endian, which is not read", "save it on another machine")
            size = count * dtype.itemsize
            data = self.member(f"data/{key}", max(size, 0))
            if len(data) != size:
                _refuse(self.path, f"storage {key} declares {count} numbers but holds {len(data)} bytes", _AGAIN)
            self._cache[key] = torch.frombuffer(bytearray(data), dtype=dtype) if size else torch.empty(0, dtype=dtype)
        stored = self._cache[key]
        if stored.dtype != dtype or len(stored) != count:
            _refuse(self.path, f"storage {key} is declared twice, and differently", _AGAIN)
        return stored


class _Global(type):
    """A global that a pickle may mention, as a class without content: pickle makes objects of classes only."""

    make: Callable[..., Any] | None = None
    """What stands in its place when pickle calls it; None for what is never called."""

    def __new__(cls, name: str, make: Callable[..., Any] | None = None) -> _Global:
        return super().__new__(cls, name, (), {"__new__": _record, "make": staticmethod(make) if make else None})

    def __init__(cls, *_: Any) -> None:
        pass

    def __call__(cls, *arguments: Any) -> Any:
        if cls.make is None:
            raise _Refused(f"the pickle calls '{cls.__name__}', which is not called to make data; nothing in it was run")
        return cls.make(*arguments)

    def __setstate__(cls, _: Any) -> None:
        raise _Refused(f"the pickle sets attributes of '{cls.__name__}', which has none to set; nothing in it was run")


def _record(cls: type, *arguments: Any) -> Record:
    """``__new__`` of every global: only the writers' classes have objects, made without arguments."""
    if cls.__name__ not in CLASSES or arguments:
        raise _Refused("the pickle makes an object of something that is none of the writer's classes")
    return Record(cls.__name__)


class _Ordered(dict[Any, Any]):
    """An OrderedDict. The attributes of one, version numbers in a module's ``state_dict``, are dropped."""

    def __setstate__(self, _: Any) -> None:
        """Called by pickle with the attributes."""


class _Tensor(torch.Tensor):
    """A tensor, or a storage as a tensor of one axis, that its pickle cannot change."""

    def __setstate__(self, _: Any) -> None:
        raise _Refused("the pickle sets attributes of a tensor, which has none to set; nothing in it was run")

    def __setitem__(self, *_: Any) -> None:
        raise _Refused("the pickle sets numbers of a tensor; nothing in it was run")


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    """A view of a storage, inside its bounds, that repeats no number."""
    if not (type(storage) is _Tensor and type(size) is type(stride) is tuple and len(size) == len(stride) <= 8):
        raise _Refused("a tensor is not declared as a view of a storage", _AGAIN)
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise _Refused("a tensor is declared with a negative size, step or offset", _AGAIN)
    count, have = math.prod(size), storage.numel()
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count and (last >= have or count > have):
        declared = "x".join(str(length)[:20] for length in size)
        raise _Refused(f"a tensor of {declared} numbers reaches beyond its storage of {have}", _AGAIN)
    return (storage.as_strided(size, stride, offset) if count else storage.new_empty(size)).as_subclass(_Tensor)


def _parameter(tensor: Any, *_: Any) -> _Tensor:
    if type(tensor) is not _Tensor:
        raise _Refused("a parameter holds no tensor", _AGAIN)
    return tensor


class _Unpickler(pickle.Unpickler):
    """Python's unpickler with the globals of this module, and no others."""

    def __init__(self, data: bytes, archive: _Archive) -> None:
        super().__init__(io.BytesIO(data))
        self._archive, self._copied = archive, 0
        functions = {
            "torch._utils._rebuild_tensor_v2": _view,
            "torch._utils._rebuild_parameter": _parameter,
            "collections.OrderedDict": self._copying(_Ordered),
            "builtins.set": self._copying(set),
            "torch.device": self._copying(lambda *parts: ":".join(map(str, parts))),
            "torch.Size": self._copying(tuple),
        }
        self._globals = {name: _Global(name, functions.get(name)) for name in (*CLASSES, *_STORAGES, *_DTYPES, *functions)}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global; what is not on the list is refused here, before it could be used."""
        asked = f"{'builtins' if module == '__builtin__' else module}.{name}"  # Python 2's name, which protocol 2 writes
        if asked not in self._globals:
            raise _Refused(f"the pickle asks for '{asked[:120]}', which is neither weights nor plain data; nothing in it was run")
        return self._globals[asked]

    def persistent_load(self, pid: Any) -> _Tensor:
        """The storage that a tensor refers to."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Global)):
            raise _Refused("the pickle refers to something outside it that is no storage", _AGAIN)
        kind, key, count = pid[1].__name__, pid[2], pid[4]
        if kind not in _STORAGES or type(key) is not str or type(count) is not int or count < 0:
            raise _Refused(f"a storage is declared with {str(count)[:40]} numbers of '{kind}'", _AGAIN)
        return self._archive.storage(kind, key, count).as_subclass(_Tensor)

    def _copying(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """``make``, with the items of its arguments counted: copies of copies would grow without bound."""

        def copy(*arguments: Any) -> Any:
            self._copied += sum(len(item) for item in arguments if isinstance(item, dict | list | tuple | set | str | bytes))
            if self._copied > MOST_COPIED:
                raise _Refused(f"the pickle copies more than {MOST_COPIED} items from container to container", _AGAIN)
            return make(*arguments)

        return copy
