"""Capture activations once and share them: one forward pass feeds every dictionary and evaluation.

1. Windows of tokens go through the language model up to the hook point and no further, in batches.
2. Activations are written to a memory-mapped float32 file in a folder named by everything that can change them (model,
   tokens, hook point, rule), published whole; the same request later is a look-up. Where another process published it
   meanwhile, that one is kept.
3. Massive activations (the BOS, first positions, attention sinks) are marked by one explicit rule: a position is kept when it
   is not among the first of its window and its norm lies below the gap between ordinary and massive norms
   (``massive``). The limit is measured on the fitting text and applied unchanged to the scoring text. Positions that
   are not kept are never fitted on, never scored and never replaced, for every dictionary alike.
4. Activations that are not finite are no massive ones: the number format overflowed, which is an error.

Massive activations: Sun et al. 2024 (arXiv 2402.17762). A few such positions otherwise own the SAE's loss, the first
principal components, ICA's whitening and FVU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from evalkit.activations.massive import NormFacts, norm_facts, norm_limit
from evalkit.errors import CorpusError, ModelError
from evalkit.models.finite import broken, broken_message
from evalkit.models.language_model import LanguageModel
from evalkit.text.windows import TokenWindows
from evalkit.util.disk import mapped_array
from evalkit.util.files import publish_once
from evalkit.util.hashing import content_hash, short
from evalkit.util.progress import Progress
from evalkit.util.settings import AtLeast0, NotNegative, Settings

VERSION = 2
"""Raise it whenever the same request would give other activations."""


@dataclass(frozen=True)
class ExclusionConfig(Settings):
    """Which positions are left out as massive activations, the same for every dictionary."""

    first_positions: NotNegative = 2
    """Positions at the start of every window that are never kept. The BOS, where there is one, is the first of them; it is never
    kept even where this is 0."""
    norm_multiple: AtLeast0 | None = None
    """Left out: a later position is massive when its norm lies beyond the gap between the ordinary and the massive norms of the
    fitting text, and none is where there is no gap. A number: when it exceeds this multiple of the median norm. 0 keeps all."""

    def left_out(self, opening: int) -> int:
        """Positions at the start of a window that are not kept, where its first ``opening`` hold the BOS."""
        return max(self.first_positions, opening)


class Activations(NamedTuple):
    """Activations of N windows of T tokens at one hook point."""

    x: Float[torch.Tensor, "N T D"]
    """float32, memory-mapped: slice it, do not copy it whole."""
    keep: Bool[torch.Tensor, "N T"]
    """False where the rule leaves a position out."""
    tokens: Int[torch.Tensor, "N T"]
    """Token ids."""
    document: Int[torch.Tensor, " N"]
    """Which document each window is from."""
    identity: str
    """Short hash of everything that determines the values."""
    limit: float
    """Largest norm kept, in the units of x; infinite where there is no limit."""
    opening: int = 0
    """Positions at the start of every window that hold the BOS and no text: 0 or 1. They are not kept."""
    first: int = 0
    """Positions at the start of every window that the rule leaves out, those among them."""
    sources: tuple[str, ...] = ()
    """Source of the text of each document; empty where it is not known."""
    norms: NormFacts | None = None
    """How the variance lies on either side of the limit; None where it was not looked at."""

    def kept(self) -> Float[torch.Tensor, "M D"]:
        """The kept positions as one matrix (a copy)."""
        return self.x.reshape(-1, self.x.shape[-1])[self.keep.reshape(-1)]


def capture_folder(
    model: LanguageModel, windows: TokenWindows, hook_point: str, rule: ExclusionConfig, folder: Path, limit: float | None
) -> Path:
    """Where this capture is, or would be, in the cache ``folder``: named by everything that can change its values."""
    return folder / short(content_hash([VERSION, model.identity, windows.identity, hook_point, rule, repr(limit)]))


def capture(
    model: LanguageModel,
    windows: TokenWindows,
    hook_point: str,
    rule: ExclusionConfig,
    folder: Path,
    progress: Progress,
    *,
    name: str,
    limit: float | None = None,
    batch: int = 16,
) -> Activations:
    """Activations of ``windows`` at ``hook_point``, from the cache in ``folder`` where they are there already.

    Args:
        rule: which positions are kept.
        folder: cache folder; each capture is a sub-folder named by its content key.
        name: what the text is called in the progress line ("fitting text").
        limit: norm limit measured on the fitting text; None measures it here.
        batch: windows a forward pass.

    Raises:
        CorpusError: the rule leaves no position.
        ModelError: activations are not finite.
        DiskFull: the file does not fit into ``folder``.
    """
    target, first = capture_folder(model, windows, hook_point, rule, folder, limit), rule.left_out(windows.opening)
    if not (target / "manifest.json").exists():
        N, T = windows.tokens.shape
        D = model.width(hook_point)
        with publish_once(target, whole="manifest.json") as temporary:
            temporary.mkdir(parents=True)
            x = mapped_array((N, T, D), temporary / "x.npy")
            with progress.stage(f"activations of the {name} at {hook_point}", total=N * T, unit="tokens") as stage:
                lost = 0
                for start in range(0, N, batch):
                    tokens = windows.tokens[start : start + batch]
                    read = model.activations(tokens, hook_point).float().cpu()
                    lost += broken(read)
                    x[start : start + batch] = read.numpy()
                    stage.advance(tokens.numel())
            if lost:
                what, fix = broken_message(lost, N * T, name, model.dtype)
                raise ModelError(what, where=hook_point, fix=fix)
            norms = np.linalg.norm(x, axis=-1)  # (N, T)
            if limit is None:
                limit = norm_limit(norms[:, first:].ravel(), rule.norm_multiple)
            keep = norms <= limit
            keep[:, :first] = False
            np.save(temporary / "keep.npy", keep)
            manifest = {"hook_point": hook_point, "model": model.identity, "limit": limit, "shape": [N, T, D]}
            manifest["norms"] = norm_facts(x, norms, keep, first)._asdict()
            (temporary / "manifest.json").write_text(json.dumps(manifest))
    manifest = json.loads((target / "manifest.json").read_text())
    # copy-on-write: torch wants writable memory, the file stays as it is
    x = np.load(target / "x.npy", mmap_mode="c")
    keep = torch.from_numpy(np.load(target / "keep.npy"))
    if not keep.any():
        raise CorpusError(
            f"the rule for massive activations leaves no position of the {name}",
            where="[activations]",
            fix="use longer windows ([corpus] context) or a smaller first_positions",
        )
    return Activations(
        torch.from_numpy(x), keep, windows.tokens, windows.document, target.name, manifest["limit"], windows.opening, first,
        windows.sources, NormFacts(**manifest["norms"]),
    )  # fmt: skip
