"""One value a text for every feature: its largest code over the text's kept tokens, over as many tokens in both texts of a pair.

1. A feature's value on a text is its largest code over the text's kept tokens. Where codes are signed, a feature has two tails,
   and the lower one, turned round, is a candidate of its own.
2. The largest of more tokens is larger by chance. So both texts of a pair get the maximum over as many tokens as the shorter one
   keeps. For the longer one this is the mean of the maximum over all ways to draw that many of its tokens, in closed form: the
   token of rank r among n is the largest of m drawn ones with probability C(n - r, m - 1) / C(n, m).
3. Texts that are no pairs have no partner to be matched to. Windows of the scoring text have one length; of labelled texts the
   baseline of surface counts says what their length tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln

from evalkit.util.batching import blocks

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary


class Values(NamedTuple):
    """A dictionary's values on N texts: C candidates, one or two a feature."""

    value: Float[np.ndarray, "N C"]
    feature: Int[np.ndarray, " C"]
    sign: Int[np.ndarray, " C"]
    """-1 where the candidate is a feature's lower tail, turned round."""


def in_pairs(label: Bool[np.ndarray, " N"], group: Int[np.ndarray, " N"]) -> bool:
    """Whether every group is one text that shows the concept and one that does not."""
    _, place = np.unique(group, return_inverse=True)
    return bool((np.bincount(place) == 2).all() and (np.bincount(place, weights=label) == 1).all())


def compared(
    keep: Bool[torch.Tensor, "N T"], label: Bool[np.ndarray, " N"], group: Int[np.ndarray, " N"]
) -> Int[np.ndarray, " N"] | None:
    """Over how many tokens the maximum of each text is taken: those of the shorter of its pair; None where texts are no pairs."""
    if not in_pairs(label, group):
        return None
    own = keep.sum(1).numpy()
    _, place = np.unique(group, return_inverse=True)
    least = np.full(place.max() + 1, keep.shape[1])
    np.minimum.at(least, place, own)
    return np.asarray(least[place])


def pooled(
    dictionary: Dictionary | None,
    x: Float[torch.Tensor, "N T D"],
    keep: Bool[torch.Tensor, "N T"],
    among: Int[np.ndarray, " N"] | None = None,
) -> Values:
    """Largest codes over the kept tokens of each text; of ``x`` itself where ``dictionary`` is None (the neurons).

    Args:
        among: over how many of its tokens the maximum of each text is, at most those it has; all of them where left out.
    """
    N, T, D = x.shape
    F = D if dictionary is None else dictionary.n_features
    both = dictionary is None or dictionary.signed
    tops, bottoms = [], []
    for rows in blocks(N, T * F):
        part, inside = x[rows], keep[rows]
        weight = None if among is None else _weights(inside, among[rows])
        codes = part if dictionary is None else dictionary.encode(part)  # (B, T, F)
        tops.append(_ends(codes, inside, weight))
        if both:
            bottoms.append(_ends(-codes, inside, weight))
    value, feature = torch.cat(tops), torch.arange(F)
    sign = torch.ones(F, dtype=torch.int64)
    if both:
        value, feature, sign = torch.cat([value, torch.cat(bottoms)], 1), torch.cat([feature, feature]), torch.cat([sign, -sign])
    return Values(value.double().numpy(), feature.numpy(), sign.numpy())


def codes_of(
    dictionary: Dictionary, values: Values, candidate: int, x: Float[torch.Tensor, "N T D"], keep: Bool[torch.Tensor, "N T"]
) -> Float[np.ndarray, "N T"]:
    """One candidate's codes on every token, its tail turned up; 0 where a token is not kept."""
    feature, sign = int(values.feature[candidate]), int(values.sign[candidate])
    rows = [sign * dictionary.encode(own[None])[0, :, feature] for own in x]
    own = torch.stack(rows) if rows else x.new_zeros(x.shape[:2])
    return own.masked_fill(~keep, 0.0).numpy()


def _ends(
    codes: Float[torch.Tensor, "B T F"], inside: Bool[torch.Tensor, "B T"], weight: Float[torch.Tensor, "B T"] | None
) -> Float[torch.Tensor, "B F"]:
    masked = codes.masked_fill(~inside[..., None], -torch.inf)
    if weight is None:
        top = masked.amax(1)
        return torch.where(top.isfinite(), top, 0.0)
    ordered = masked.sort(1, descending=True).values
    return (torch.where(ordered.isfinite(), ordered, 0.0) * weight[..., None].to(codes)).sum(1)


def _weights(inside: Bool[torch.Tensor, "B T"], among: Int[np.ndarray, " B"]) -> Float[torch.Tensor, "B T"]:
    """Probability that each token, from the largest code down, is the largest of ``among`` tokens drawn without replacement."""
    n = inside.sum(1).numpy()[:, None]
    m = among[:, None]
    below = n - 1 - np.arange(inside.shape[1])[None]  # kept tokens with smaller codes
    possible = (below >= m - 1) & (m > 0)
    share = np.exp(_log_choose(np.where(possible, below, m), np.maximum(m - 1, 0)) - _log_choose(np.maximum(n, m), m))
    return torch.from_numpy(np.where(possible, share, 0.0))


def _log_choose(n: Int[np.ndarray, "*shape"], k: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))
