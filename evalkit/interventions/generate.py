"""Clamp or steer one feature at every position while the model generates a text or predicts a given one.

1. Clamping sets the feature activation to an amount: x + (amount - c) f; the reconstruction error is left as it is. Steering adds
   the amount whatever the activation is: x + amount f. The first position, an attention sink, is not edited.
2. ``generate``: rows of changes continue one prompt together, token by token, keys and values kept. Draw 0 is greedy. Other draws
   sample at temperature 1, and every row of a draw uses the same random numbers: texts differ only where the change makes them.
3. ``log_probabilities``: of a given text under each change.

Clamping: Templeton et al. 2024 (Scaling Monosemanticity); steering by adding: Turner et al. 2023 (arXiv 2308.10248).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from evalkit.interventions.hooks import edit_hooks, scale
from evalkit.models.language_model import LanguageModel

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary

ROWS = 96
"""Rows that generate together."""
LOGITS = 1 << 25
"""Logits of a given text that are held at a time (128 MB)."""


class Change(NamedTuple):
    """What is done at every position but the first."""

    feature: int
    """Whose code a clamp looks at; of no matter to steering."""
    direction: Float[torch.Tensor, " D"]
    amount: float
    """Multiples of the direction: added, or, clamped, what the code becomes."""
    clamp: bool


def added(
    dictionary: Dictionary, changes: Sequence[Change], x: Float[torch.Tensor, "J M D"], first: bool
) -> Float[torch.Tensor, "J M D"]:
    """What each row's change adds to its activations.

    Args:
        x: activations of new positions.
        first: whether they begin with the first position of the text.
    """
    amount = torch.tensor([change.amount for change in changes], dtype=x.dtype, device=x.device)[:, None].repeat(1, x.shape[1])
    clamped = [row for row, change in enumerate(changes) if change.clamp]
    if clamped:
        codes = dictionary.encode(x[clamped].cpu())
        own = torch.tensor([changes[row].feature for row in clamped])[:, None, None].expand(-1, x.shape[1], 1)
        amount[clamped] -= codes.gather(-1, own)[..., 0].to(x)
    if first:
        amount[:, 0] = 0
    directions = torch.stack([change.direction for change in changes]).to(x)
    return (amount * scale(dictionary, x.cpu())[..., 0].to(x))[..., None] * directions[:, None]


@torch.no_grad()
def generate(
    model: LanguageModel,
    hook_point: str,
    dictionary: Dictionary,
    changes: Sequence[Change],
    prompt: Sequence[int],
    tokens: int,
    uniforms: Sequence[float] | None = None,
) -> Int[torch.Tensor, "J tokens"]:
    """Tokens that the model generates after ``prompt`` under each change.

    Args:
        uniforms: a number from 0 to 1 for each new token; None takes the likeliest token.
    """
    parts = [
        _generate(model, hook_point, dictionary, changes[start : start + ROWS], prompt, tokens, uniforms)
        for start in range(0, len(changes), ROWS)
    ]
    return torch.cat(parts)


def _generate(
    model: LanguageModel,
    hook_point: str,
    dictionary: Dictionary,
    changes: Sequence[Change],
    prompt: Sequence[int],
    tokens: int,
    uniforms: Sequence[float] | None,
) -> Int[torch.Tensor, "J tokens"]:
    new = torch.tensor(list(prompt)).repeat(len(changes), 1)
    written: list[torch.Tensor] = []
    past = None
    for step in range(tokens):

        def edit(x: torch.Tensor, first: bool = step == 0) -> torch.Tensor:
            return added(dictionary, changes, x, first)

        hooks = edit_hooks(hook_point, edit)
        output = model.run(new, hooks, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits = _exact(output.logits[:, -1])
        if uniforms is None:
            new = logits.argmax(-1, keepdim=True)
        else:
            reached = logits.double().softmax(-1).cumsum(-1)
            new = (reached < uniforms[step]).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        written.append(new)
    return torch.cat(written, dim=1)


@torch.no_grad()
def log_probabilities(
    model: LanguageModel,
    hook_point: str,
    dictionary: Dictionary,
    changes: Sequence[Change | None],
    text: Int[torch.Tensor, "J T"],
    begin: int,
) -> Iterator[tuple[slice, Float[torch.Tensor, "j R V"]]]:
    """Log-probabilities of the next token at positions ``begin`` - 1 to T - 2 of each row under its change, some rows at a time.

    Args:
        changes: one a row; None changes nothing.
        text: token ids.
        begin: first token that is predicted.
    """
    size = max(1, LOGITS // (text.shape[1] * model.n_vocab))
    for start in range(0, len(text), size):
        rows = slice(start, start + size)
        own = changes[rows]
        places = [row for row, change in enumerate(own) if change is not None]
        made = [change for change in own if change is not None]

        def edit(x: torch.Tensor, places: list[int] = places, made: list[Change] = made) -> torch.Tensor:
            out = torch.zeros_like(x)
            if made:
                out[places] = added(dictionary, made, x[places], True)
            return out

        hooks = edit_hooks(hook_point, edit) if made else []
        logits = model.run(text[rows], hooks, use_cache=False).logits[:, begin - 1 : -1]
        yield rows, _exact(logits).log_softmax(-1)


def _exact(logits: torch.Tensor) -> torch.Tensor:
    """Logits on the CPU as the model has them, half precision in float32."""
    return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))


def uniforms(seed: int, prompt: int, draw: int, tokens: int) -> list[float] | None:
    """The random numbers of a draw; None for draw 0."""
    return np.random.default_rng([seed, 13, prompt, draw]).random(tokens).tolist() if draw else None
