"""TopK encode and decode that touch F features once, in the encoder's matrix product, and only k afterwards.

1. pre = (x - centre) @ W^T + b is the one dense product; the k largest are kept and pass the ReLU.
2. Backward of the encoder: with d (B, k) the gradient of the kept values, row f of dW is the sum of d * (x - centre) over
   the tokens that kept f. Sorting the B * k pairs by feature turns that into bags of tokens, summed by ``embedding_bag``.
3. The centre's gradient is -(sum over tokens of d) @ W: no (B, D) product is needed.
4. Decoding sums k rows of the decoder a token, again a bag.

Every sum runs in a fixed order, so that equal inputs give equal bits on one machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from evalkit.dictionaries.base import SparseCodes


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, centre: torch.Tensor, norms: torch.Tensor | None, k: int
    ) -> Any:
        centred = x - centre
        pre = torch.addmm(b, centred, W.T)
        if norms is None:
            top = pre.topk(k, dim=-1, sorted=False)
            values, indices = top.values.relu(), top.indices
        else:
            indices = (pre * norms).topk(k, dim=-1, sorted=False).indices
            values = pre.gather(-1, indices).relu()
        ctx.save_for_backward(centred, W, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

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
        return None, dW, db, -(db @ W), None, None


class Weights(NamedTuple):
    """Parameters of an autoencoder whose features are rows of both matrices."""

    W_enc: Float[torch.Tensor, "F D"]
    b_enc: Float[torch.Tensor, " F"]
    W_dec: Float[torch.Tensor, "F D"]
    b_dec: Float[torch.Tensor, " D"]
    norms: Float[torch.Tensor, " F"] | None = None
    """What pre-activations are weighted by where the largest are chosen; no gradient passes through it."""

    def rows(self, which: Int[torch.Tensor, " N"]) -> Weights:
        """The autoencoder of some features."""
        norms = None if self.norms is None else self.norms[which]
        return Weights(self.W_enc[which], self.b_enc[which], self.W_dec[which], self.b_dec, norms)


def encode(x: Float[torch.Tensor, "B D"], weights: Weights, k: int) -> SparseCodes:
    """The k largest codes of each token (values may be 0 where the ReLU cut them). ``x`` gets no gradient."""
    return SparseCodes(*_Encode.apply(x, weights.W_enc, weights.b_enc, weights.b_dec, weights.norms, k))


def decode(
    values: Float[torch.Tensor, "B K"], indices: Int[torch.Tensor, "B K"], W: Float[torch.Tensor, "F D"]
) -> Float[torch.Tensor, "B D"]:
    """Sum of ``values`` times the rows of ``W`` at ``indices``."""
    return F.embedding_bag(indices, W, per_sample_weights=values, mode="sum")
