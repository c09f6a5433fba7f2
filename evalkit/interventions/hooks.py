"""Where a hook point stands in a forward pass, and how an activation there is edited."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from evalkit.errors import ModelError

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary

Edit = Callable[[Float[torch.Tensor, "J M D"]], Float[torch.Tensor, "J M D"]]
"""Maps the activations at a hook point to what is added to them."""

NamedHooks = list[tuple[str, Callable[..., Any]]]
"""Hook point names with functions (activation, hook) that may return another activation."""

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_ORDER = (
    "hook_(resid_pre|in)",
    "(ln1|attn|hook_[qkv]|hook_attn_in).*",
    "hook_attn_out",
    "hook_resid_mid",
    "(ln2|mlp|hook_mlp_in).*",
    "hook_mlp_out",
    "hook_(resid_post|out)",
)
"""Hook points of a block in the order of a forward pass."""


def block_of(name: str) -> int | None:
    """The block that the hook point ``name`` is in; None where it is in none."""
    block = _BLOCK.match(name)
    return int(block[1]) if block else None


def is_output(name: str) -> bool:
    """Whether the hook point ``name`` is the output of a block."""
    block = _BLOCK.match(name)
    return block is not None and re.fullmatch(_ORDER[-1], block[2]) is not None


def reach(name: str) -> int:
    """How many blocks need not run for a change at the hook point ``name``."""
    return (block_of(name) or 0) + is_output(name)


def depth(hook_point: str) -> tuple[int, int]:
    """Block and rank within the block: the hook point that a forward pass reaches first has the smaller one.

    Raises:
        ModelError: it is not inside a block, or its rank in a block is not known.
    """
    block = _BLOCK.fullmatch(hook_point)
    ranks = [rank for rank, form in enumerate(_ORDER) if block and re.fullmatch(form, block[2])]
    if not block or not ranks:
        raise ModelError(
            f"it is not known what comes before and after '{hook_point}'",
            where="hook_points",
            fix="use blocks.L.hook_resid_post or another hook point of the residual stream, of attn or of mlp",
        )
    return int(block[1]), ranks[0]


def edit_hooks(name: str, edit: Edit) -> NamedHooks:
    """Hooks that add ``edit`` of the activation at ``name`` to it, for everything that comes after."""
    block = _BLOCK.fullmatch(name)
    if block is None or block[2] != "hook_resid_mid":
        return [(name, lambda x, hook: x + edit(x.flatten(2)).reshape(x.shape).to(x.dtype))]
    change: list[torch.Tensor] = []

    def enter(x: torch.Tensor, hook: Any) -> torch.Tensor:
        change.append(edit(x).to(x.dtype))
        return x + change[-1]

    # TransformerLens' hook_resid_mid comes after the residual branch: the branch needs the change as well.
    return [(name, enter), (f"blocks.{block[1]}.hook_out", lambda x, hook: x + change.pop())]


def scale(dictionary: Dictionary, x: torch.Tensor) -> Float[torch.Tensor, "*batch 1"]:
    """Length that one unit of feature activation has in each token of ``x`` (..., D): 1, unless tokens are normalised singly."""
    ones = torch.ones_like(x, dtype=torch.float32)
    return (dictionary.restore(ones, x) - dictionary.restore(torch.zeros_like(ones), x))[..., :1].to(x.dtype)
