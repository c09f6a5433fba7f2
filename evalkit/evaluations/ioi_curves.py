"""Numbers of a patching curve: how many patches a share of the effect needs, with a value for every prompt.

A curve is KL(patched || target) of N prompts at S set sizes, the first features of one ordering.

1. Crossing: the first size at which the mean KL is at most a share of the reference's, the KL of the model as it is (one for all
   dictionaries), between grid sizes by a straight line in log size. The edit needed is the mean edit there, by the same line.
2. A crossing belongs to the mean over prompts, not to a prompt. So that it has an interval like any other mean, each prompt is
   given its jackknife influence value, theta + (N - 1) * (mean of the leave-one-out thetas - theta without it): their mean is
   theta, their spread the jackknife's (Efron and Tibshirani 1993, chapter 11), and prompts pair between dictionaries.
3. A curve that barely gets there does not get there without some prompt. Nothing is made up for such a leave-one-out curve: the
   crossing is given alone, without influence values, so it has no interval; and ``missed`` says in which share of bootstrap
   draws of the prompts the mean curve stays above.
4. Area: the mean share of the KL that is left, over log2 of the number of patches from 1 to ``upto``; beyond the last set it
   stays as it is there. The figure's area under the curve, on one scale for dictionaries of any size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

Floats = NDArray[np.float64]


DRAWS = 200
"""Bootstrap draws behind ``missed``."""


class Crossing(NamedTuple):
    """What reaching a share of the reference KL takes: one influence value for each prompt (M = N), NaN throughout where no
    measured set reaches it; or one number (M = 1) where it is not reached without some prompt."""

    log_patches: Float[np.ndarray, " M"]
    """Natural logarithm of the number of patches."""
    edit: Float[np.ndarray, " M"]
    """Mean edit of the prompts there, in the units of the activation."""
    missed: float
    """Share of ``DRAWS`` bootstrap draws of the prompts in which it is not reached."""


class _Reached(NamedTuple):
    """Crossings of R mean curves; NaN where there is none."""

    log_patches: Floats
    edit: Floats


def crossing(
    sizes: Int[np.ndarray, " S"],
    kl: Float[np.ndarray, "S N"],
    edit: Float[np.ndarray, "S N"],
    reference: Float[np.ndarray, " N"],
    share: float,
) -> Crossing:
    """Patches and edit at which the mean KL first falls to ``share`` of the mean reference.

    Args:
        sizes: rising, from 0.
        kl: of each set and prompt.
        edit: of each set and prompt.
        reference: KL(base || target) of each prompt, the model as it is.
        share: between 0 and 1.
    """
    N = kl.shape[1]
    whole = _reached(sizes, kl.mean(1)[None], edit.mean(1)[None], share * reference.mean(keepdims=True))
    draws = np.random.default_rng(0).integers(0, N, (DRAWS, N))
    drawn = _reached(sizes, kl[:, draws].mean(2).T, edit[:, draws].mean(2).T, share * reference[draws].mean(1))
    missed = float(np.isnan(drawn.log_patches).mean())
    if N == 1 or np.isnan(whole.log_patches[0]):
        return Crossing(np.repeat(whole.log_patches, N), np.repeat(whole.edit, N), missed)
    limits = share * _leave_one_out(reference[None])[:, 0]
    without = _reached(sizes, _leave_one_out(kl), _leave_one_out(edit), limits)
    if np.isnan(without.log_patches).any():
        return Crossing(whole.log_patches, whole.edit, missed)
    return Crossing(_influence(whole.log_patches[0], without.log_patches), _influence(whole.edit[0], without.edit), missed)


def _leave_one_out(values: Float[np.ndarray, "S N"]) -> Float[np.ndarray, "N S"]:
    """Row n: the mean over all prompts but n."""
    return ((values.sum(1, keepdims=True) - values) / (values.shape[1] - 1)).T


def _influence(theta: float, without: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    return theta + (len(without) - 1) * (without.mean() - without)


def _reached(
    sizes: Int[np.ndarray, " S"],
    kl: Float[np.ndarray, "R S"],
    edit: Float[np.ndarray, "R S"],
    limit: Float[np.ndarray, " R"],
) -> _Reached:
    """Crossings of R mean curves with their limits."""
    if len(sizes) < 2:
        return _Reached(np.full(len(kl), np.nan), np.full(len(kl), np.nan))
    below = kl <= limit[:, None]
    at = below.argmax(1)
    # nothing to reach where the empty set is there already: prompts that do not differ for the model, or an error term whose
    # removal alone does it
    there = below.any(1) & (at > 0)
    rows, at = np.arange(len(kl)), np.maximum(at, 1)
    before = at - 1
    fall = kl[rows, before] - kl[rows, at]
    part = np.divide(kl[rows, before] - limit, fall, out=np.ones(len(kl)), where=fall > 0)
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
