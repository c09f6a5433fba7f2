"""Per-feature fragments for explain-and-simulate scoring, in memory bounded by features x fragments kept.

1. Every window is cut into fragments of ``length`` tokens. The tokens left over stand at the window's start, where the
   first positions are excluded anyway, so each fragment has been read by the model in context. None holds the BOS.
2. One pass over the windows encodes them batch by batch. A feature's activation of a fragment is its maximum over the
   kept tokens (Cunningham et al. 2023, appendix A).
3. Each window offers a feature one fragment: its strongest for the top list, a drawn one for the random list. So no two
   fragments of one list share a window.
4. The top list holds the windows with the highest positive activation. The random list holds windows with an active drawn
   fragment (code not 0) in a random order. Order and fragments are drawn for each feature: with one draw for all, features
   that are active everywhere would be scored on the same few fragments.
5. Draws are hashes of seed, window and feature, so they do not depend on the batches the text is read in. Both lists are merged
   batch by batch: memory holds (features x list length), never (features x tokens).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from evalkit.activations.capture import Activations
from evalkit.dictionaries.base import Dictionary
from evalkit.errors import CorpusError
from evalkit.util.progress import Progress

NONE = -1
"""Fills the lists of features that have fewer fragments than asked for."""


class Fragment(NamedTuple):
    """A stretch of one window."""

    window: int
    start: int
    length: int

    @property
    def id(self) -> int:
        """One number for window and start, stable for a given capture."""
        return self.window * 65536 + self.start


class FragmentLists(NamedTuple):
    """For every feature the fragments that may be explained and scored."""

    top: Int[torch.Tensor, "F K"]
    """Windows in order of decreasing activation; NONE where there are fewer active ones."""
    top_start: Int[torch.Tensor, "F K"]
    """Start of the strongest fragment in each of them."""
    random: Int[torch.Tensor, "F R"]
    """Windows whose drawn fragment is active, in a random order of the feature's own."""
    random_start: Int[torch.Tensor, "F R"]
    """Start of the drawn fragment in each of them."""
    firings: Int[torch.Tensor, " F"]
    """Number of kept tokens with a code other than 0."""
    maximum: Float[torch.Tensor, " F"]
    """Largest code over all kept tokens."""
    n_tokens: int
    """Kept tokens looked at."""
    length: int
    """Tokens a fragment."""


def fragment_lists(
    dictionary: Dictionary,
    activations: Activations,
    *,
    length: int,
    top: int,
    random: int,
    seed: int,
    progress: Progress,
    cells: int = 8_000_000,
) -> FragmentLists:
    """Collect the lists for every feature of ``dictionary`` in one pass.

    Args:
        length: tokens a fragment.
        top: entries of the top list.
        random: entries of the random list.
        seed: of each feature's random order of windows and of its drawn fragments.
        cells: codes held at once; the batch of windows follows from it and the number of features.

    Raises:
        CorpusError: the windows are shorter than one fragment.
    """
    N, T, _ = activations.x.shape
    F = dictionary.n_features
    per_window = (T - activations.opening) // length
    if per_window == 0:
        raise CorpusError(
            f"a fragment of {length} tokens does not fit into a window of {T}",
            where="[corpus] context, [[evaluation]] fragment",
            fix="make the context longer or the fragment shorter",
        )
    offset = T - per_window * length

    best = torch.full((top, F), -torch.inf)
    best_id = torch.full((top, F), NONE)
    first = torch.full((random, F), -torch.inf)
    first_id = torch.full((random, F), NONE)
    firings = torch.zeros(F, dtype=torch.int64)
    maximum = torch.full((F,), -torch.inf)
    sparse = dictionary.sparse and not dictionary.signed
    collect = _from_sparse if sparse else _from_dense
    batch = max(1, cells // ((per_window if sparse else T) * F))
    with progress.stage("finding each feature's fragments", total=N, unit="windows") as stage:
        for begin in range(0, N, batch):
            window = torch.arange(begin, min(begin + batch, N))  # (B,)
            keep = activations.keep[begin : begin + batch]  # (B, T)
            found = collect(dictionary, activations.x[begin : begin + batch], keep, offset, length)
            firings += found.firings
            maximum = torch.maximum(maximum, found.maximum)
            peaks = found.peaks
            strongest, where = peaks.max(1)  # (B, F)
            candidate = torch.where(strongest > 0, strongest, -torch.inf)
            best, best_id = _merge(best, best_id, candidate, window[:, None] * per_window + where)
            drawn = draw(seed, window, F, per_window)
            sample = peaks.gather(1, drawn.fragment[:, None])[:, 0]  # (B, F)
            active = sample.isfinite() & (sample != 0)
            order = torch.where(active, drawn.priority, -torch.inf)
            first, first_id = _merge(first, first_id, order, window[:, None] * per_window + drawn.fragment)
            stage.advance(len(window))

    def split(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = ids.T  # (F, K)
        return torch.where(ids >= 0, ids // per_window, NONE), torch.where(ids >= 0, offset + ids % per_window * length, 0)

    top_window, top_start = split(best_id)
    random_window, random_start = split(first_id)
    return FragmentLists(
        top_window, top_start, random_window, random_start, firings, maximum, int(activations.keep.sum()), length
    )


class Draw(NamedTuple):
    """What is drawn for every window and feature."""

    priority: Float[torch.Tensor, "B F"]
    """In [0, 1): a feature's windows are taken in decreasing order of it."""
    fragment: Int[torch.Tensor, "B F"]
    """The window's fragment that may enter the random list."""


def draw(seed: int, windows: Int[torch.Tensor, " B"], n_features: int, fragments: int) -> Draw:
    """Independent uniform draws, the same for a window and a feature whatever else is drawn.

    Args:
        seed: of the draws.
        windows: numbers of the windows.
        n_features: F, features numbered from 0.
        fragments: fragments a window has.
    """
    with np.errstate(over="ignore"):
        place = windows.numpy().astype(np.uint64)[:, None] << np.uint64(32) | np.arange(n_features, dtype=np.uint64)
        bits = _mixed(_mixed(place) + _mixed(np.uint64(seed % 2**64)))  # (B, F)
    high, low = bits >> np.uint64(40), bits & np.uint64(0xFFFFFFFF)
    priority = high.astype(np.float32) / np.float32(1 << 24)
    fragment = (low * np.uint64(fragments) >> np.uint64(32)).astype(np.int64)
    return Draw(torch.from_numpy(priority), torch.from_numpy(fragment))


def _mixed(values: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit numbers whose bits look random."""
    x = np.asarray(values, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ x >> np.uint64(31))


class _Found(NamedTuple):
    """What one batch of windows says of every feature."""

    peaks: torch.Tensor
    """(B, P, F) largest kept code of each fragment; -inf or 0 where none is kept."""
    firings: torch.Tensor
    """(F,) kept positions it fires on."""
    maximum: torch.Tensor
    """(F,) largest kept code."""


def _from_dense(dictionary: Dictionary, x: torch.Tensor, keep: torch.Tensor, offset: int, length: int) -> _Found:
    codes = dictionary.encode(x)  # (B, T, F)
    firings = ((codes != 0) & keep[..., None]).sum((0, 1))
    codes = codes.masked_fill(~keep[..., None], -torch.inf)
    return _Found(codes[:, offset:].unflatten(1, (-1, length)).amax(2), firings, codes.amax((0, 1)))


def _from_sparse(dictionary: Dictionary, x: torch.Tensor, keep: torch.Tensor, offset: int, length: int) -> _Found:
    """The same for codes that are never negative, without a value for every token and feature."""
    B, T, _ = x.shape
    F, fragments = dictionary.n_features, (T - offset) // length
    codes = dictionary.encode_sparse(x[keep])  # (M, K)
    token, place = (codes.values != 0).nonzero(as_tuple=True)
    values, feature = codes.values[token, place], codes.indices[token, place]
    window, position = (which[token] for which in keep.nonzero(as_tuple=True))
    maximum = torch.full((F,), 0.0 if len(codes.values) else -torch.inf)
    maximum.scatter_reduce_(0, feature, values, "amax")
    inside = position >= offset
    cell = (window * fragments + (position - offset) // length) * F + feature
    peaks = torch.zeros(B * fragments * F).scatter_reduce_(0, cell[inside], values[inside], "amax")
    return _Found(peaks.reshape(B, fragments, F), feature.bincount(minlength=F), maximum)


def _merge(
    values: torch.Tensor, ids: torch.Tensor, new_values: torch.Tensor, new_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows with the largest values of both lists, (K, F) each, in decreasing order; -inf rows keep id NONE."""
    all_values = torch.cat([values, new_values])
    all_ids = torch.cat([ids, new_ids])
    kept, index = all_values.topk(len(values), dim=0)
    return kept, torch.where(kept > -torch.inf, all_ids.gather(0, index), NONE)
