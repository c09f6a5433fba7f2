"""Which features a case study looks at: those named, or a seeded sample of those active enough. Never the first n.

1. One pass over the kept positions of a text counts, for every feature, the windows in which its code is above 0.
2. Features active in at least ``least_windows`` of them are eligible. They are put into one random order that depends on the seed
   alone; the first ``features`` of that order are studied.
3. ``prefer = "one token"`` keeps of the eligible ones the quarter whose firings fall most on a single token, on the fitting text:
   case studies look for features that can be named in a word, and what is measured of them on the scoring text is not what they
   were picked by. It says nothing about the dictionary as a whole.
4. So a smaller sample is part of a larger one: evaluations of one suite that ask for different numbers of features, because one
   of them is dearer, study the same features as far as they go.

Counts are remembered, as every evaluation of a suite asks for the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from evalkit.activations.capture import Activations
from evalkit.dictionaries.base import Dictionary
from evalkit.errors import UnitFailed
from evalkit.util.batching import blocks
from evalkit.util.caching import Recent

LEAST_WINDOWS = 10
"""Windows a feature must be active in, unless an evaluation says otherwise. The same for all, so that samples are nested."""
KEPT = 8
"""Dictionaries whose counts are remembered in this process."""
Preference = Literal["any", "one token"]
QUARTER = 0.25


class Activity(NamedTuple):
    """How often features are active: their code is above 0 at a kept position."""

    windows: Int[torch.Tensor, " F"]
    """Windows with at least one such position."""
    positions: Int[torch.Tensor, " F"]
    """Positions."""
    kept: int
    """Kept positions looked at."""
    purest: Float[torch.Tensor, " F"]
    """Share of those positions whose token is the feature's most frequent one; 0 where there are none."""


_counted: Recent[Activity] = Recent(KEPT)


def choose_features(
    dictionary: Dictionary,
    activations: Activations,
    *,
    ids: Sequence[int] = (),
    features: int = 20,
    least_windows: int = LEAST_WINDOWS,
    seed: int = 0,
    prefer: str = "any",
    fit: Callable[[], Activations] | None = None,
) -> list[int]:
    """The features to study, in ascending order.

    Args:
        ids: these and no others, however active they are; empty for a sample.
        features: size of the sample; fewer where fewer are eligible.
        least_windows: windows of ``activations`` in which an eligible feature is active.
        seed: decides the sample. The sample of n features is part of that of n + 1.
        prefer: 'any', or 'one token' for a sample of the quarter of the eligible ones that fire most on a single token.
        fit: gives the text that this quarter is picked on; ``activations`` where left out.

    Raises:
        UnitFailed: an id is not a feature of the dictionary, or no feature is active in enough windows.
        DictionaryError: the dictionary reads vectors of another width.
    """
    if ids:
        wrong = [feature for feature in ids if not 0 <= feature < dictionary.n_features]
        if wrong:
            raise UnitFailed(
                f"there is no feature {wrong[0]} in a dictionary of {dictionary.n_features}",
                where="[[evaluation]] feature_ids",
                fix=f"name features from 0 to {dictionary.n_features - 1}, or leave feature_ids out for a sample",
            )
        return sorted(set(ids))
    seen = activity(dictionary, activations)
    eligible = (seen.windows >= least_windows).nonzero()[:, 0].numpy()
    if not len(eligible):
        raise UnitFailed(
            f"no feature is active in {least_windows} windows of the scoring text",
            where=f"{dictionary.kind} at {dictionary.hook_point}",
            fix="give more scoring tokens ([corpus] score_tokens) or name features with feature_ids",
        )
    if prefer == "one token":
        purest = (activity(dictionary, fit()) if fit else seen).purest
        best = np.argsort(-purest.numpy()[eligible], kind="stable")
        eligible = np.sort(eligible[best[: max(1, round(QUARTER * len(best)))]])
    order = np.random.default_rng(seed).permutation(len(eligible))
    return sorted(eligible[order[:features]].tolist())


def activity(dictionary: Dictionary, activations: Activations) -> Activity:
    """How often each feature of ``dictionary`` is active in the kept positions, from memory where it was counted before.

    Raises:
        DictionaryError: the dictionary reads vectors of another width.
    """
    dictionary.check_width(activations.x.shape[-1], "this hook point")
    return _counted.get((dictionary.identity.hash, activations.identity), lambda: _count(dictionary, activations))


@torch.no_grad()
def _count(dictionary: Dictionary, activations: Activations) -> Activity:
    N, T, _ = activations.x.shape
    F = dictionary.n_features
    windows, positions = torch.zeros(F, dtype=torch.int64), torch.zeros(F, dtype=torch.int64)
    ids, names = activations.tokens.unique(return_inverse=True)  # tokens of the text, numbered
    pairs, counts = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    for part in blocks(N, T * F):
        keep = activations.keep[part]  # (B, T)
        x = activations.x[part][keep]  # (M, D)
        seen = torch.zeros(len(keep), F, dtype=torch.bool)
        token, feature = _active(dictionary, x)
        positions += feature.bincount(minlength=F)
        seen[keep.nonzero()[:, 0][token], feature] = True
        windows += seen.sum(0)
        here, times = (feature * len(ids) + names[part][keep][token]).unique(return_counts=True)
        pairs, place = torch.cat([pairs, here]).unique(return_inverse=True)
        counts = torch.zeros(len(pairs), dtype=torch.int64).index_add_(0, place, torch.cat([counts, times]))
    most = torch.zeros(F, dtype=torch.int64).scatter_reduce_(0, pairs // len(ids), counts, "amax")
    return Activity(windows, positions, int(activations.keep.sum()), most / positions.clamp(min=1))


def _active(dictionary: Dictionary, x: torch.Tensor) -> tuple[Int[torch.Tensor, " A"], Int[torch.Tensor, " A"]]:
    """Row of ``x`` (M, D) and feature of every code above 0."""
    if not dictionary.sparse:
        row, feature = (dictionary.encode(x) > 0).nonzero(as_tuple=True)
        return row, feature
    codes = dictionary.encode_sparse(x)
    row, place = (codes.values > 0).nonzero(as_tuple=True)
    return row, codes.indices[row, place]


@torch.no_grad()
def feature_codes(dictionary: Dictionary, activations: Activations, features: Sequence[int]) -> Float[torch.Tensor, "N T S"]:
    """Codes of S features at every position, 0 where a position is not kept.

    Raises:
        DictionaryError: the dictionary reads vectors of another width.
    """
    N, T, _ = activations.x.shape
    place = torch.full((dictionary.n_features,), -1)
    place[list(features)] = torch.arange(len(features))
    codes = torch.zeros(N, T, len(features))
    for part in blocks(N, T * dictionary.n_features):
        keep = activations.keep[part]
        x = activations.x[part][keep]  # (M, D)
        here = torch.zeros(len(x), len(features))
        if dictionary.sparse:
            found = dictionary.encode_sparse(x)
            row, column = ((place[found.indices] >= 0) & (found.values != 0)).nonzero(as_tuple=True)
            here[row, place[found.indices[row, column]]] = found.values[row, column]
        else:
            here = dictionary.encode(x)[:, list(features)]
        codes[part][keep] = here
    return codes
