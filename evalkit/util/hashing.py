"""Content hashes: the one way evalkit decides that two things are the same.

1. Values become canonical JSON (sorted keys, no spaces, floats by ``repr``), so that dict order cannot matter.
2. Tensors are hashed as dtype, shape and raw little-endian bytes.
3. Digests are sha256; ``short`` keeps 16 hex digits (64 bits), plenty for the few thousand things of one results folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def canonical(value: Any) -> str:
    """``value`` as canonical JSON. Dataclasses and paths are accepted; NaN is not."""

    def convert(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"cannot hash a {type(item).__name__}")

    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=convert)


def _bytes(text: str) -> bytes:
    """``text`` as UTF-8. Halves of characters, as file names and what strangers write may hold them, have bytes of their own."""
    return text.encode("utf-8", "surrogatepass")


def content_hash(value: Any) -> str:
    """sha256 (hex) of ``value``'s canonical JSON."""
    return hashlib.sha256(_bytes(canonical(value))).hexdigest()


def short(digest: str) -> str:
    """The first 16 hex digits of a digest."""
    return digest[:16]


def tensors_hash(tensors: Mapping[str, torch.Tensor], extra: Any = None) -> str:
    """sha256 (hex) over named tensors (contents, dtype, shape) and an optional JSON-able ``extra``."""
    digest = hashlib.sha256(_bytes(canonical(extra)))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_hash(path: Path, chunk: int = 1 << 22) -> str:
    """sha256 (hex) of a file's bytes, read in chunks of ``chunk`` bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(chunk):
            digest.update(block)
    return digest.hexdigest()
