"""A tiny random model in float64 and pairs of random tokens, for the patching tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from judge_fakes import tiny_model
from torch.overrides import TorchFunctionMode

from evalkit.dictionaries.controls import Identity
from evalkit.dictionaries.topk import TopK
from evalkit.models.language_model import LanguageModel
from evalkit.models.loading import ModelConfig
from evalkit.tasks.base import Pairs
from evalkit.util.progress import Progress


def double_model(folder: Path) -> LanguageModel:
    """The tiny model (2 blocks, width 32), its weights in float64."""
    model = LanguageModel.load(ModelConfig(path=str(tiny_model(folder))), Progress(quiet=True))
    model._bridge.original_model.double()
    model.dtype = torch.float64
    return model


class Exact(TorchFunctionMode):
    """Inside it, what transformers computes in float32 whatever it is given (norms, softmax) is computed in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            if func is torch.Tensor.to and len(args) == 2 and args[1] is torch.float32:
                return first
            if func in (torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax):
                kwargs.pop("dtype", None)
        return func(*args, **kwargs)


def random_pairs(n: int = 4, longest: int = 8, vocabulary: int = 300, first: int = 1) -> Pairs:
    """Pairs of several lengths; pair r differs at position first + r % 3."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randint(1, vocabulary, (n, longest), generator=generator)
    changed = first + torch.arange(n) % 3
    last = longest - 1 - torch.arange(n) % 2 * 2
    target = base.clone()
    target[torch.arange(n), changed] = (target[torch.arange(n), changed] + 11) % vocabulary
    behind = torch.arange(longest) > last[:, None]
    answers = torch.randint(1, vocabulary, (3, n), generator=generator)
    return Pairs(base.masked_fill(behind, 0), target.masked_fill(behind, 0), last, changed, *answers, [("base", "target")] * n)


def small_topk(width: int = 32, features: int = 48, k: int = 3, seed: int = 0) -> TopK:
    """A random TopK autoencoder."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(features, width, generator=generator), dim=1)
    tensors = {"W_enc": rows.T.clone(), "b_enc": torch.zeros(features), "W_dec": rows, "b_dec": torch.zeros(width)}
    return TopK(tensors, k=k)


def identity(width: int = 32) -> Identity:
    """The exact decomposition into dimensions."""
    return Identity(torch.eye(width))


def full_runs(model: LanguageModel, pairs: Pairs, target: bool) -> torch.Tensor:
    """Logits (N, V) at the last real positions, by ordinary whole runs of one prompt at a time."""
    tokens = pairs.target if target else pairs.base
    logits = []
    with torch.no_grad():
        for row in range(pairs.n):
            last = int(pairs.last[row])
            logits.append(model._bridge.original_model(input_ids=tokens[row : row + 1, : last + 1]).logits[0, -1])
    return torch.stack(logits).double()


def kl(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """KL(z || y) of each row of logits."""
    a, b = z.log_softmax(-1), y.log_softmax(-1)
    return (a.exp() * (a - b)).sum(-1)
