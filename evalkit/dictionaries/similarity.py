"""How alike directions are: within one dictionary, and between two.

1. Cosines are those of rows scaled to unit length; a row of zeros has no direction and no cosine. Where codes are signed, a
   direction and its opposite are one feature, and the absolute cosine is taken.
2. Capacity of row f: C_f = (w_f . w_f)^2 / sum_j (w_f . w_j)^2, the share of a dimension that it has to itself (Scherlis et al.
   2022, arXiv 2210.01892). The sum is w_f^T (W^T W) w_f, so that no (F, F) array is ever built.
3. The nearest partner of each row is found in blocks. Its mean over rows is the mean maximum cosine similarity (Sharkey et al.
   2022; Cunningham et al. 2023, arXiv 2309.08600, section 5).
4. One to one: the pairs with the largest total cosine (Hungarian method), each row in one pair at most. Where there are more
   columns than ``limit``, only a shortlist takes part: the nearest of every row, then the second nearest, and so on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from evalkit.util.batching import block_rows

NEIGHBOURS = 8
"""Most partners a row brings to the shortlist."""


class Nearest(NamedTuple):
    """For each of A rows its best partners, best first."""

    cosines: Float[torch.Tensor, "A C"]
    partners: Int[torch.Tensor, "A C"]


class Matching(NamedTuple):
    """A one-to-one matching of A rows."""

    cosines: Float[torch.Tensor, " A"]
    """Cosine of each row and its partner; NaN where it has none."""
    partners: Int[torch.Tensor, " A"]
    """The partner; -1 where there is none."""


def unit_rows(w: Float[torch.Tensor, "F D"]) -> Float[torch.Tensor, "F D"]:
    """Rows scaled to unit length; rows of zeros stay as they are."""
    norms = w.norm(dim=1, keepdim=True)
    return w / torch.where(norms > 0, norms, 1.0)


def has_direction(w: Float[torch.Tensor, "F D"]) -> Bool[torch.Tensor, " F"]:
    """Which rows are not all zero."""
    return (w != 0).any(1)


def row_cosines(a: Float[torch.Tensor, "F D"], b: Float[torch.Tensor, "F D"]) -> Float[torch.Tensor, " F"]:
    """Cosine of each row of ``a`` with the same row of ``b``; NaN where either is zero."""
    cosines = (unit_rows(a) * unit_rows(b)).sum(1)
    return torch.where(has_direction(a) & has_direction(b), cosines, float("nan"))


def capacity(w: Float[torch.Tensor, "F D"]) -> Float[torch.Tensor, " F"]:
    """Capacity of each row in float64, from near 0 to 1; NaN for rows of zeros. It depends on the rows' lengths."""
    rows = block_rows(w.shape[1])
    moments = torch.zeros(w.shape[1], w.shape[1], dtype=torch.float64)  # W^T W
    for block in w.split(rows):
        wide = block.double()
        moments += wide.T @ wide
    parts = []
    for block in w.split(rows):
        wide = block.double()
        own = wide.square().sum(1)
        parts.append(own.square() / ((wide @ moments) * wide).sum(1))  # 0 / 0 for a row of zeros
    return torch.cat(parts)


def random_units(count: int, width: int, seed: int) -> Float[torch.Tensor, "F D"]:
    """``count`` directions drawn uniformly from the unit sphere."""
    return unit_rows(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def nearest(a: Float[torch.Tensor, "A D"], b: Float[torch.Tensor, "B D"], *, absolute: bool = False, count: int = 1) -> Nearest:
    """The ``count`` rows of ``b`` (all, if there are fewer) with the largest cosine to each row of ``a``.

    Args:
        a: rows without zero rows.
        b: at least one row, without zero rows.
        absolute: compare by absolute cosine.
    """
    left, right = unit_rows(a), unit_rows(b)
    best = []
    for block in left.split(block_rows(len(b))):
        cosines = block @ right.T
        best.append((cosines.abs_() if absolute else cosines).topk(min(count, len(b)), dim=1))
    return Nearest(torch.cat([found.values for found in best]), torch.cat([found.indices for found in best]))


def shortlist(near: Nearest, limit: int) -> Int[torch.Tensor, " S"]:
    """At most ``limit`` partners: the nearest of every row first, then the second nearest, the closest of them first."""
    chosen: dict[int, None] = {}
    for rank in range(near.partners.shape[1]):
        for row in near.cosines[:, rank].argsort(descending=True).tolist():
            if len(chosen) == limit:
                return torch.tensor(list(chosen))
            chosen[int(near.partners[row, rank])] = None
    return torch.tensor(list(chosen))


def match_one_to_one(
    a: Float[torch.Tensor, "A D"], b: Float[torch.Tensor, "B D"], *, absolute: bool = False, limit: int = 4096
) -> Matching:
    """Pair rows of ``a`` with rows of ``b`` so that the pairs' cosines have the largest sum.

    Args:
        a: rows without zero rows; the caller bounds their number, as (A, limit) cosines are held at once.
        b: rows without zero rows; those that take part are a shortlist where they are more than ``limit``.
        absolute: compare by absolute cosine.
        limit: most rows of ``b`` that take part.
    """
    taking_part = torch.arange(len(b))
    if len(b) > limit:
        taking_part = shortlist(nearest(a, b, absolute=absolute, count=NEIGHBOURS), limit)
    cosines = unit_rows(a) @ unit_rows(b[taking_part]).T
    if absolute:
        cosines = cosines.abs()
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(cosines.numpy(), maximize=True))
    matched = torch.full((len(a),), float("nan"))
    partners = torch.full((len(a),), -1)
    matched[rows] = cosines[rows, columns].float()
    partners[rows] = taking_part[columns]
    return Matching(matched, partners)
