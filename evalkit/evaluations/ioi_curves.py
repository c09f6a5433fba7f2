"""Numbers of a patching curve: how many patches a share of the effect needs, with a value for every prompt.

A curve is KL(patched || target) of N prompts at S set sizes, the first features of one ordering.

1. Crossing: the first size at which the mean KL is at most a share of the unpatched mean KL, between grid sizes by a straight
   line in log size. The edit needed is the mean edit there, by the same line.
2. A crossing belongs to the mean over prompts, not to a prompt. So that it has an interval like any other mean, each prompt is
   given its jackknife influence value, theta + (N - 1) * (mean of the leave-one-out thetas - theta without it): their mean is
   theta, their spread the jackknife's (Efron and Tibshirani 1993, chapter 11), and prompts pair between dictionaries.
3. Area: the mean share of the KL that is left, over log2 of the number of patches from 1 to ``upto``; beyond the last set it
   stays as it is there. The figure's area under the curve, on one scale for dictionaries of any size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Crossing(NamedTuple):
    """What reaching a share of the unpatched KL takes, one influence value for each prompt; NaN throughout where even the
    largest set does not reach it."""

    log_patches: Float[np.ndarray, " N"]
    """Natural logarithm of the number of patches."""
    edit: Float[np.ndarray, " N"]
    """Mean edit of the prompts there, in the units of the activation."""


class _Reached(NamedTuple):
    """Crossings of R mean curves; NaN where there is none."""

    log_patches: Floats
    edit: Floats


def crossing(
    sizes: Int[np.ndarray, " S"], kl: Float[np.ndarray, "S N"], edit: Float[np.ndarray, "S N"], share: float
) -> Crossing:
    """Patches and edit at which the mean KL first falls to ``share`` of the unpatched one.

    Args:
        sizes: rising, from 0.
        kl: of each set and prompt.
        edit: of each set and prompt.
        share: between 0 and 1.
    """
    N = kl.shape[1]
    whole = _reached(sizes, kl.mean(1)[None], edit.mean(1)[None], share)
    if N == 1 or np.isnan(whole.log_patches[0]):
        return Crossing(np.repeat(whole.log_patches, N), np.repeat(whole.edit, N))
    without = _reached(sizes, _leave_one_out(kl), _leave_one_out(edit), share)
    # without one prompt the share may lie just beyond the last set: then that set is the nearest there is
    beyond = np.isnan(without.log_patches)
    last = _leave_one_out(edit)[:, -1]
    return Crossing(
        _influence(whole.log_patches[0], np.where(beyond, np.log(sizes[-1]), without.log_patches)),
        _influence(whole.edit[0], np.where(beyond, last, without.edit)),
    )


def _leave_one_out(values: Float[np.ndarray, "S N"]) -> Float[np.ndarray, "N S"]:
    """Row n: the mean over all prompts but n."""
    return ((values.sum(1, keepdims=True) - values) / (values.shape[1] - 1)).T


def _influence(theta: float, without: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    return theta + (len(without) - 1) * (without.mean() - without)


def _reached(
    sizes: Int[np.ndarray, " S"], kl: Float[np.ndarray, "R S"], edit: Float[np.ndarray, "R S"], share: float
) -> _Reached:
    """Crossings of R mean curves."""
    if len(sizes) < 2:
        return _Reached(np.full(len(kl), np.nan), np.full(len(kl), np.nan))
    limit = share * kl[:, :1]
    below = kl <= limit
    at = below.argmax(1)
    # nothing to reach where the prompts do not differ for the model: the empty set has a KL of 0
    there = below.any(1) & (at > 0)
    rows, at = np.arange(len(kl)), np.maximum(at, 1)
    before = at - 1
    fall = kl[rows, before] - kl[rows, at]
    part = np.divide(kl[rows, before] - limit[:, 0], fall, out=np.ones(len(kl)), where=fall > 0)
    # between no patch and one there is nothing: the first patch is counted whole
    part = np.where(before == 0, 1.0, np.clip(part, 0.0, 1.0))
    log_sizes = np.log(np.maximum(sizes, 1))
    log_patches = log_sizes[before] + part * (log_sizes[at] - log_sizes[before])
    edits = edit[rows, before] + part * (edit[rows, at] - edit[rows, before])
    return _Reached(np.where(there, log_patches, np.nan), np.where(there, edits, np.nan))


def area(sizes: Int[np.ndarray, " S"], kl: Float[np.ndarray, "S N"], upto: int) -> Float[np.ndarray, " N"]:
    """Mean KL of each prompt over log2 of the number of patches, from 1 to ``upto`` (at least 2), in nats.

    Args:
        sizes: rising, from 0.
        kl: of each set and prompt.
        upto: last number of patches that counts.
    """
    sizes, kl = (sizes[1:], kl[1:]) if len(sizes) > 1 else (np.ones(1), kl)
    within = sizes < upto
    log_sizes = np.log2(sizes.astype(np.float64))
    grid = np.concatenate([log_sizes[within], [np.log2(upto)]])
    # np.interp keeps the last value beyond the last size, and the first before the first
    values = np.stack([np.interp(grid, log_sizes, prompt) for prompt in kl.T])  # (N, G)
    return np.trapezoid(values, grid, axis=1) / grid[-1]
