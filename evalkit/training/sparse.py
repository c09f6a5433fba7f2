"""TopK encode and decode that touch F features once, in the encoder's matrix product, and only k afterwards.

1. pre = (x - centre) @ W^T + b is the one dense product; the k largest are kept and pass the ReLU.
2. Backward of the encoder: with d (B, k) the gradient of the kept values, row f of dW is the sum of d * (x - centre) over
   the tokens that kept f. Sorting the B * k pairs by feature turns that into bags of tokens, summed by ``embedding_bag``.
3. The centre's gradient is -(sum over tokens of d) @ W: no (B, D) product is needed.
4. Decoding sums k rows of the decoder a token, again a bag.

Every sum runs in a fixed order, so that equal inputs give equal bits on one machine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from evalkit.dictionaries.base import SparseCodes


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, centre: torch.Tensor, k: int) -> Any:
        centred = x - centre
        top = torch.addmm(b, centred, W.T).topk(k, dim=-1, sorted=False)
        values = top.values.relu()
        ctx.save_for_backward(centred, W, values, top.indices)
        ctx.mark_non_differentiable(top.indices)
        return values, top.indices

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        centred, W, values, indices = ctx.saved_tensors
        features, k = W.shape[0], values.shape[1]
        d = (gradients[0] * (values > 0)).flatten()  # (B k,)
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=features)
        dW = F.embedding_bag(order // k, centred, counts.cumsum(0) - counts, per_sample_weights=d[order], mode="sum")  # (F, D)
        db = torch.bincount(flat, weights=d, minlength=features).to(d.dtype)
        return None, dW, db, -(db @ W), None


def encode(
    x: Float[torch.Tensor, "B D"],
    W: Float[torch.Tensor, "F D"],
    b: Float[torch.Tensor, " F"],
    centre: Float[torch.Tensor, " D"],
    k: int,
) -> SparseCodes:
    """The k largest codes of each token (values may be 0 where the ReLU cut them). ``x`` gets no gradient."""
    return SparseCodes(*_Encode.apply(x, W, b, centre, k))


def decode(
    values: Float[torch.Tensor, "B K"], indices: Int[torch.Tensor, "B K"], W: Float[torch.Tensor, "F D"]
) -> Float[torch.Tensor, "B D"]:
    """Sum of ``values`` times the rows of ``W`` at ``indices``."""
    return F.embedding_bag(indices, W, per_sample_weights=values, mode="sum")
