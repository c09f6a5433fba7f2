"""Pickled objects of two writers read as data: a pickle interpreter that cannot call anything.

Two trainers of 2023 saved whole Python objects with ``torch.save``, which the usual safe loader refuses. This one reads them:

1. The file must be the zip form of ``torch.save``, its members stored uncompressed. Older stream forms are refused.
2. ``data.pkl`` is walked opcode by opcode. Only the opcodes that build plain data are known; there is no import, no attribute
   look-up and no call of anything that the file names.
3. A global must be on the list below. Classes of the two writers become a ``Record``: a name and the state that was stored,
   whatever it holds. Tensors, parameters, OrderedDict, set, device and Size are made by the functions of this module.
4. A storage is the member ``data/NUMBER`` of the zip; its size must be the declared one, and a tensor must lie inside it.
5. What a short file can make is bounded: the pickle's length, the items that its copies of containers come to, and the members
   of the zip, which together are no longer than the file.

Everything else is refused with the global, the opcode or the tensor that was asked for. The pickle format is documented in
Python's ``pickletools``, the zip layout in PyTorch's serialization notes.
"""

from __future__ import annotations

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
_SCALARS = (str, bytes, int, float, bool, type(None))
_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    }
)
_FIX = "open it with nothing else; get the weights as .safetensors, or as a plain state_dict saved by someone you trust"
_AGAIN = "fetch or copy the file again: it is damaged or was cut short"


@dataclass(eq=False)
class Record:
    """An object of a writer's class: what was stored of it, and nothing that runs."""

    name: str
    """Module and class, joined by a dot."""
    state: dict[str, Any] = field(default_factory=dict)
    """Attributes by name, as stored."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    values: torch.Tensor


def load(path: Path) -> Any:
    """What the file holds: plain containers and numbers, tensors, and a ``Record`` for each object of the writers' classes.

    Raises:
        DictionaryError: it is no zip of ``torch.save``, is damaged, or asks for anything that is not on the list.
    """
    with _Archive(path) as archive:
        machine = _Machine(path, archive.storage)
        try:
            return machine.run(archive.member("data.pkl", MOST_PICKLE))
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError, RuntimeError, MemoryError) as error:
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


def _refuse(path: Path, what: str, fix: str = _FIX) -> NoReturn:
    raise DictionaryError(what, where=str(path), fix=fix) from None


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


class _Machine:
    """The interpreter: a stack, a memo, and no way out of them."""

    def __init__(self, path: Path, storage: Callable[[str, str, int], torch.Tensor]) -> None:
        self.path, self.storage = path, storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise EOFError("it ends without a STOP")

    def step(self, name: str, argument: Any) -> None:
        """One opcode. Unknown ones are refused, so that nothing is skipped in silence."""
        match name:
            case "PROTO" | "FRAME":
                pass
            case _ if name in _LITERALS:
                self.stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                self.stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}[name]())
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP":
                self.stack.pop()
            case "TUPLE":
                self.stack.append(tuple(self.marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(self.stack) < count:
                    raise IndexError("the stack is empty")
                self.stack[-count:] = [tuple(self.stack[-count:])]
            case "APPEND" | "APPENDS":
                items = [self.stack.pop()] if name == "APPEND" else self.marked()
                self.top(list, name).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [self.stack.pop(), self.stack.pop()][::-1] if name == "SETITEM" else self.marked()
                target = self.top(dict, name)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[self.scalar(key)] = value
            case "ADDITEMS":
                items = [self.scalar(item) for item in self.marked()]
                self.top(set, name).update(items)
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[int(argument)] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                self.stack.append(self.memo[int(argument)])
            case "GLOBAL":
                self.stack.append(self.named(str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = self.stack.pop(), self.stack.pop()
                self.stack.append(self.named(f"{module}.{attribute}"))
            case "BINPERSID":
                self.stack.append(self.persistent(self.stack.pop()))
            case "NEWOBJ":
                arguments, made = self.stack.pop(), self.stack.pop()
                if not isinstance(made, _Global) or made.name not in CLASSES or arguments != ():
                    _refuse(self.path, "the pickle makes an object of something that is none of the writer's classes")
                self.stack.append(Record(made.name))
            case "REDUCE":
                arguments, called = self.stack.pop(), self.stack.pop()
                if not isinstance(called, _Global) or not isinstance(arguments, tuple):
                    _refuse(self.path, "the pickle calls something that is no function")
                self.stack.append(self.call(called.name, arguments))
            case "BUILD":
                self.build(self.stack.pop())
            case _:
                _refuse(self.path, f"the pickle uses the opcode {name}, which plain data does not need; nothing in it was run")

    def marked(self) -> list[Any]:
        """Everything above the last mark, taken off the stack."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type, name: str) -> Any:
        """The container on top of the stack, which must be of exactly ``kind``."""
        if type(self.stack[-1]) is not kind:
            _refuse(self.path, f"the pickle uses {name} on what is no {kind.__name__}; nothing in it was run")
        return self.stack[-1]

    def scalar(self, key: Any) -> Any:
        if type(key) not in _SCALARS:
            _refuse(self.path, f"a key is a {type(key).__name__}, not a name or a number")
        return key

    def named(self, name: str) -> _Global:
        """A global on the list; anything else is refused here, before it could be used."""
        name = name.replace("__builtin__.", "builtins.", 1) if name.startswith("__builtin__.") else name
        if name not in CLASSES and name not in _FUNCTIONS and name not in _STORAGES and name not in _DTYPES:
            _refuse(
                self.path, f"the pickle asks for '{name[:120]}', which is neither weights nor plain data; nothing in it was run"
            )
        return _Global(name)

    def persistent(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Global)):
            _refuse(self.path, "the pickle refers to something outside it that is no storage", _AGAIN)
        kind, key, count = pid[1].name, pid[2], pid[4]
        if kind not in _STORAGES or type(key) is not str or type(count) is not int or count < 0:
            _refuse(self.path, f"a storage is declared with {str(count)[:40]} numbers of '{kind}'", _AGAIN)
        return _Storage(self.storage(kind, key, count))

    def copies(self, *containers: Any) -> None:
        """Count the items of what is about to be copied."""
        self.copied += sum(len(item) for item in containers if isinstance(item, dict | list | tuple | set | str | bytes))
        if self.copied > MOST_COPIED:
            _refuse(self.path, f"the pickle copies more than {MOST_COPIED} items from container to container", _AGAIN)

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name not in _FUNCTIONS:
            _refuse(self.path, f"the pickle calls '{name}', which is not called to make data; nothing in it was run")
        self.copies(*arguments)
        return _FUNCTIONS[name](self, arguments)

    def build(self, state: Any) -> None:
        """Attributes of the object on top: kept for records, dropped for ordered dictionaries, refused for the rest."""
        target = self.stack[-1]
        if type(target) is dict:
            return
        if not isinstance(target, Record) or type(state) is not dict or not all(type(name) is str for name in state):
            kind = target.name if isinstance(target, _Global) else type(target).__name__
            _refuse(self.path, f"the pickle sets attributes of '{kind}', which has none to set; nothing in it was run")
        self.copies(state)
        target.state.update(state)

    def tensor(self, arguments: tuple[Any, ...]) -> torch.Tensor:
        """A view of a storage, inside its bounds, that repeats no number."""
        storage, offset, size, stride = arguments[:4]
        whole = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8
        if not isinstance(storage, _Storage) or not whole:
            _refuse(self.path, "a tensor is not declared as a view of a storage", _AGAIN)
        numbers = (offset, *size, *stride)
        have = len(storage.values)
        if any(type(number) is not int or number < 0 for number in numbers):
            _refuse(self.path, "a tensor is declared with a negative size, step or offset", _AGAIN)
        count = 1
        for length in size:
            count *= length
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if count and (last >= have or count > have):
            declared = "x".join(str(length)[:20] for length in size)
            _refuse(self.path, f"a tensor of {declared} numbers reaches beyond its storage of {have}", _AGAIN)
        return storage.values.as_strided(size, stride, offset) if count else storage.values.new_empty(size)

    def ordered(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        pairs = arguments[0] if arguments else []
        return {self.scalar(key): value for key, value in pairs}

    def parameter(self, arguments: tuple[Any, ...]) -> torch.Tensor:
        if not isinstance(arguments[0], torch.Tensor):
            _refuse(self.path, "a parameter holds no tensor", _AGAIN)
        return arguments[0]


_FUNCTIONS: dict[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor_v2": _Machine.tensor,
    "torch._utils._rebuild_parameter": _Machine.parameter,
    "collections.OrderedDict": _Machine.ordered,
    "builtins.set": lambda machine, arguments: {machine.scalar(item) for item in (arguments[0] if arguments else ())},
    "torch.device": lambda machine, arguments: ":".join(str(machine.scalar(part)) for part in arguments),
    "torch.Size": lambda machine, arguments: tuple(machine.scalar(length) for length in arguments[0]),
}
