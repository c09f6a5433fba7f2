"""Turn a GGUF file into a Hugging Face folder once, so that every later load is a plain, quick ``from_pretrained``.

1. The header gives the architecture and its sizes; they become a Hugging Face config.
2. Tensors are renamed. llama.cpp stores the rows of a llama's query and key matrices of each head as (even, odd) pairs where
   Hugging Face rotates halves; the rows are put back. Qwen2 is stored as it is.
3. Tensors are dequantised some rows at a time and written straight into a safetensors file whose header was laid out
   beforehand. That takes 0.2 GB of memory whatever the model's size (the file itself is mapped, not read); the libraries and
   the tokenizer's word lists take about 1 GB more.
4. The tokenizer is rebuilt by transformers from the same file. Where the header asks for digits one by one (SmolLM), the
   splitting rule is set so.
5. The folder is named by the file's checksum and the dtype, and published in one step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from evalkit.assets.catalog import ASSETS, asset
from evalkit.assets.install import home, path
from evalkit.errors import ModelError
from evalkit.models.pretrained import read_tokenizer, seam
from evalkit.models.quiet import quiet
from evalkit.util.disk import check_room
from evalkit.util.files import publish_once
from evalkit.util.hashing import file_hash
from evalkit.util.progress import Progress

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

ROWS_AT_ONCE = 1 << 23
"""Values dequantised at a time."""

_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

ARCHITECTURES = ("llama", "qwen2")
"""GGUF architectures that can be prepared."""


class _Placed(NamedTuple):
    """One tensor of the file and where it goes."""

    name: str
    source: ReaderTensor
    shape: tuple[int, ...]
    heads: int
    """Number of heads whose rows are stored in pairs; 0 where rows are in order."""


def prepare_asset(name: str, dtype: torch.dtype, progress: Progress) -> Path:
    """The Hugging Face folder of an installed packaged model, prepared on first use below ``home()/prepared``.

    Raises:
        AssetError: no such asset, or it is not installed.
        ModelError: the asset is a corpus.
    """
    if not asset(name).payload.endswith(".gguf"):
        models = ", ".join(entry.name for entry in ASSETS.values() if entry.payload.endswith(".gguf"))
        raise ModelError(f"the asset '{name}' is no language model", where="[model] package", fix=f"use one of {models}")
    return prepare(path(name), home() / "prepared", dtype, progress, sha256=asset(name).sha256)


def prepare(gguf: Path, folder: Path, dtype: torch.dtype, progress: Progress, sha256: str | None = None) -> Path:
    """Convert ``gguf`` to ``folder/<first 8 digits of its sha256>-<dtype>`` unless that is there; return that path.

    Args:
        gguf: a GGUF file of architecture llama or qwen2.
        folder: where prepared models are kept.
        dtype: float32, bfloat16 or float16, of the weights written.
        progress: shows one stage with the time left.
        sha256: the file's checksum where the caller knows it; otherwise the file is hashed.

    Raises:
        ModelError: not a GGUF file, or one of an architecture or layout that is not supported.
        DiskFull: the prepared weights do not fit.
    """
    if dtype not in _SAFETENSORS_DTYPE:
        raise ModelError(f"weights cannot be prepared as {dtype}", fix="use float32, bfloat16 or float16")
    if not gguf.is_file():
        raise ModelError("there is no such GGUF file", where=str(gguf), fix="check the path")
    target = folder / f"{(sha256 or file_hash(gguf))[:8]}-{str(dtype).removeprefix('torch.')}"
    if (target / "config.json").is_file():
        return target
    with seam("this is not a whole GGUF file", str(gguf), "download or copy it again"):
        _write(gguf, target, dtype, progress)
    return target


def _write(gguf: Path, target: Path, dtype: torch.dtype, progress: Progress) -> None:
    """Convert ``gguf`` to the folder ``target``; what the library raises on a damaged file passes."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    config = _config(reader, gguf)
    placed = _place(reader, config, gguf)
    total = sum(int(np.prod(tensor.shape)) for tensor in placed)
    check_room(target, total * dtype.itemsize)
    with (
        publish_once(target, whole="config.json") as temporary,
        progress.stage(f"preparing {gguf.name}", total / 1e6, "million weights") as stage,
    ):
        temporary.mkdir()
        with (temporary / "model.safetensors").open("wb") as handle:
            handle.write(_safetensors_header(placed, dtype))
            for tensor in placed:
                for rows in _rows(tensor):
                    handle.write(_little_endian(torch.from_numpy(rows).to(dtype)))
                    stage.advance(rows.size / 1e6)
        _save_tokenizer(reader, gguf, temporary)
        config.dtype = dtype
        config.save_pretrained(temporary)


def _header(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """Value of ``key`` in the header."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _config(reader: GGUFReader, gguf: Path) -> Any:
    """The Hugging Face config that the header describes."""
    from transformers import LlamaConfig, Qwen2Config

    kind = _header(reader, "general.architecture", "unknown")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"GGUF files of architecture '{kind}' cannot be prepared; supported: {', '.join(ARCHITECTURES)}",
            where=str(gguf),
            fix="give a Hugging Face folder or hub name of the same model instead: those work for every architecture",
        )

    def size(key: str, default: Any = None) -> Any:
        value = _header(reader, f"{kind}.{key}", default)
        if value is None:
            raise ModelError(f"the GGUF header lacks {kind}.{key}", where=str(gguf), fix="convert the model again")
        return value

    heads, width = size("attention.head_count"), size("embedding_length")
    if _header(reader, f"{kind}.rope.scaling.type", "none") != "none":
        raise ModelError(
            "GGUF files with scaled rotary positions cannot be prepared",
            where=str(gguf),
            fix="give a Hugging Face folder or hub name of the same model instead",
        )
    names = {tensor.name: tensor for tensor in reader.tensors}
    settings: dict[str, Any] = {
        "vocab_size": int(names["token_embd.weight"].data.shape[0]),
        "hidden_size": width,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": float(str(np.float32(size("attention.layer_norm_rms_epsilon")))),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(size("rope.freq_base", 10000.0))},
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": _header(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _header(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _header(reader, "tokenizer.ggml.padding_token_id"),
    }
    if kind == "llama":
        biased = "blk.0.attn_q.bias" in names
        return LlamaConfig(**settings, head_dim=size("attention.key_length", width // heads), attention_bias=biased)
    return Qwen2Config(**settings)


def _place(reader: GGUFReader, config: Any, gguf: Path) -> list[_Placed]:
    """Every tensor of the file with its Hugging Face name, in the order of the file."""
    paired = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if config.model_type == "llama" else {}
    placed = []
    for tensor in reader.tensors:
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
        stem, _, suffix = tensor.name.rpartition(".")
        if block and block[2] in _BLOCK:
            name, heads = f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}", paired.get(block[2], 0)
        elif stem in _OUTSIDE and suffix == "weight":
            name, heads = f"{_OUTSIDE[stem]}.weight", 0
        else:
            raise ModelError(
                f"the tensor '{tensor.name}' has no place in a plain {config.model_type} model",
                where=str(gguf),
                fix="give a Hugging Face folder or hub name of the same model instead",
            )
        placed.append(_Placed(name, tensor, tuple(int(n) for n in reversed(tensor.shape)), heads))
    return placed


def _rows(tensor: _Placed) -> Iterator[np.ndarray]:
    """The tensor's values as float32, some rows at a time, in Hugging Face's order of rows."""
    from gguf import dequantize

    data = tensor.source.data
    if tensor.heads:
        order = np.arange(data.shape[0]).reshape(tensor.heads, -1, 2).swapaxes(1, 2).reshape(-1)
        data = data[order]
    step = max(1, ROWS_AT_ONCE // tensor.shape[-1]) if len(tensor.shape) > 1 else len(data)
    for start in range(0, len(data), step):
        yield np.array(dequantize(data[start : start + step], tensor.source.tensor_type), dtype=np.float32)


def _little_endian(rows: torch.Tensor) -> bytes:
    return rows.contiguous().view(torch.uint8).numpy().tobytes()


def _safetensors_header(placed: list[_Placed], dtype: torch.dtype) -> bytes:
    """The 8-byte length and the JSON that open a safetensors file holding ``placed`` one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in placed:
        start, end = end, end + int(np.prod(tensor.shape)) * dtype.itemsize
        header[tensor.name] = {"dtype": _SAFETENSORS_DTYPE[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _save_tokenizer(reader: GGUFReader, gguf: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers

    fix = "give a Hugging Face folder or hub name of the same model instead"
    with quiet():
        tokenizer = read_tokenizer(str(gguf.parent), fix=fix, gguf_file=gguf.name, local_files_only=True)
        if _header(reader, "tokenizer.ggml.pre") == "smollm":
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        tokenizer.save_pretrained(folder)
