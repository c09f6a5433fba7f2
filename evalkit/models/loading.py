"""Find, load and name a language model: hub name, Hugging Face folder, GGUF file or packaged asset.

1. A packaged model or a GGUF file is prepared once (``gguf``) and then loaded as a folder. Folders are loaded with
   ``local_files_only``, so that no network is touched; hub names go through the hub's own cache.
2. What transformers reads, and what can go wrong there, is in ``pretrained``; a model that sees the future is refused.
3. The identity is made of contents (checksum of the GGUF, hashes of the folder's files, hub commit), the dtype, and the
   seed where the weights are random; never of a path. Same identity, same activations.
4. ``random_weights`` keeps the architecture and tokenizer and draws every weight anew: the control of Heap et al. 2025
   (arXiv:2501.17727), "Sparse autoencoders can interpret randomly initialized transformers".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from evalkit.assets.catalog import asset
from evalkit.errors import ModelError, SuiteError
from evalkit.models.gguf import prepare, prepare_asset
from evalkit.models.pretrained import check_causal, pretrained, seam
from evalkit.models.quiet import quiet
from evalkit.util.hashing import content_hash, file_hash, short
from evalkit.util.matmul import quicken
from evalkit.util.progress import Progress
from evalkit.util.settings import Settings
from evalkit.util.user_files import placed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONTENT = (".safetensors", ".bin", ".json", ".model", ".txt")


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Which language model to study. Exactly one of ``name``, ``path`` and ``package`` is given."""

    name: str = ""
    """Hugging Face hub name, such as "EleutherAI/pythia-70m-deduped"."""
    path: str = ""
    """A Hugging Face folder, or a GGUF file of a llama or qwen2 model."""
    package: str = ""
    """A packaged model by its asset name, such as "smollm2-135m-instruct"; see ``evalkit assets list``."""
    revision: str = ""
    """Branch, tag or commit of a hub name; empty for the default branch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """float32, bfloat16 or float16. On a processor without native support the short ones are many times slower."""
    device: str = "auto"
    """auto (the first CUDA device, else the processor), cpu, cuda, cuda:N or mps."""
    random_weights: bool = False
    """Draw all weights anew: the control that shows what the architecture and the text alone explain."""
    seed: int = 0
    """Seed of the random weights."""

    @property
    def called(self) -> str:
        """The one of ``name``, ``package`` and ``path`` that is given."""
        return self.name or self.package or self.path

    def check_together(self) -> None:
        given = [key for key in ("name", "path", "package") if getattr(self, key)]
        if len(given) != 1:
            raise SuiteError(
                f"the model needs exactly one of name, path and package; {' and '.join(given) or 'none'} given",
                where="[model]",
                fix='for example package = "smollm2-135m-instruct"',
            )
        if self.revision and not self.name:
            raise SuiteError("a revision only means something for a hub name", where="[model] revision", fix="leave it out")


class Loaded(NamedTuple):
    """A model ready to be wrapped."""

    model: Any
    """transformers model in evaluation mode, on its device, without gradients."""
    tokenizer: Any
    identity: str
    label: str
    """Short name for tables."""


def load(config: ModelConfig, progress: Progress) -> Loaded:
    """Load the weights and the tokenizer that ``config`` names.

    Raises:
        ModelError: there is no such model, it cannot be reached or is not whole, or sees the future; the cause is chained.
        AssetError: a packaged model is not installed.
    """
    where, content, label = _locate(config, progress)
    local = not config.name
    with progress.stage(f"loading {label}"), quiet():
        model, tokenizer = pretrained(
            where,
            DTYPES[config.dtype],
            local=local,
            revision=config.revision,
            random_seed=config.seed if config.random_weights else None,
        )
    if not local:
        content = f"hub:{config.name}@{getattr(model.config, '_commit_hash', None) or config.revision}"
    random = f":random-{config.seed}" if config.random_weights else ""
    device = _device(config.device)
    with seam("the model cannot be put on the device", where, 'use a smaller dtype or device = "cpu"'):
        model = model.to(device)
    with quiet():
        check_causal(model, where)
    if model.device.type == "cpu":
        quicken(model)
    return Loaded(model, tokenizer, f"{content}:{config.dtype}{random}", label + (" (random weights)" if random else ""))


def _locate(config: ModelConfig, progress: Progress) -> tuple[str, str, str]:
    """What to give ``from_pretrained``, the identity of the contents where it is known already, and the label."""
    dtype = DTYPES[config.dtype]
    if config.package:
        folder = prepare_asset(config.package, dtype, progress)
        return str(folder), f"gguf:{short(asset(config.package).sha256)}", config.package
    if config.name:
        return config.name, "", config.name.rsplit("/", 1)[-1]
    path = placed(config.path)
    if path.suffix == ".gguf" and path.is_file():
        from evalkit.assets.install import home

        digest = file_hash(path)
        return str(prepare(path, home() / "prepared", dtype, progress, sha256=digest)), f"gguf:{short(digest)}", path.stem
    if not (path / "config.json").is_file():
        raise ModelError(
            "this is not a Hugging Face model folder: it holds no config.json" if path.is_dir() else "there is no such model",
            where=str(path),
            fix="give a folder made by save_pretrained, or a .gguf file",
        )
    files = sorted(file for file in path.iterdir() if file.suffix in _CONTENT and file.name != "generation_config.json")
    with progress.stage(f"hashing {path.name}", len(files), "files") as stage:
        hashes = {}
        for file in files:
            hashes[file.name] = file_hash(file)
            stage.advance()
    return str(path), f"folder:{short(content_hash(hashes))}", path.name


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device '{name}' cannot be used here", where="[model] device", fix="use auto or cpu") from error
    return device
