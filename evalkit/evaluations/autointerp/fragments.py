"""Which features and fragments explain-and-simulate scoring looks at (Cunningham et al. 2023, appendix A).

1. A feature is eligible where it is active in 4n windows and n random ones. Of these features some are drawn uniformly.
2. Windows are ranked by the feature's maximum. Of the top 4n, ranks 0, 4, 8, ... are explained and 2, 6, 10, ... are scored.
   The n random fragments come from none of these windows.
3. Explained and scored fragments share no document: a scored one whose document is explained gives way to the next rank.
4. Small explainers are shown one token a fragment, so further peaks are chosen for them, up to ``PEAKS`` in all: the strongest
   windows that are not scored, of documents that are not.
5. The donor of a feature is another feature of the sample, about as dense and with about as strong a peak. Its explanation
   is the null: what is known of such features in general, and nothing of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evalkit.activations.fragments import NONE, Fragment, FragmentLists

SPARE = 8
"""Ranked and drawn windows that are kept of each feature for every fragment of a kind: some give way to others."""
PEAKS = 8
"""Peaks that an explainer which is shown peaks alone sees, where there are so many."""
BIN = 4
"""Features that are at least in a bin of equal density, where the sample has so many."""


class Chosen(NamedTuple):
    """A sampled feature and its disjoint fragments."""

    feature: int
    explain: list[Fragment]
    top: list[Fragment]
    random: list[Fragment]
    further: list[Fragment] = []
    """Strong ones that are neither explained in full nor scored."""


class Eligible(NamedTuple):
    """Features that can be explained and scored."""

    features: list[Chosen]
    """In ascending order of the feature."""
    of_one_document: int
    """Features that are active in enough windows, but whose fragments cannot be kept to different documents."""


def eligible_features(lists: FragmentLists, n: int, document: Sequence[int], same_document: bool = False) -> Eligible:
    """Every feature with ``n`` fragments to explain, to score from the top, and to score at random.

    Args:
        lists: of ``SPARE`` * n entries.
        n: fragments of each kind.
        document: document of each window.
        same_document: let explained and scored fragments share documents.
    """
    found, shared = [], 0
    for feature in range(len(lists.firings)):
        top, drawn = lists.top[feature].tolist(), lists.random[feature].tolist()
        active = [rank for rank, window in enumerate(top) if window != NONE]
        if len(active) < 4 * n:
            continue
        explained = range(0, 4 * n, 4)
        taken = set() if same_document else {document[top[rank]] for rank in explained}
        order = [*range(2, 4 * n, 4), *(rank for rank in active if rank % 2 or rank >= 4 * n)]
        scored = sorted([rank for rank in order if document[top[rank]] not in taken][:n])
        pool = {top[rank] for rank in (*explained, *scored)} | set(top[: 4 * n : 2])
        free = [rank for rank, window in enumerate(drawn) if window != NONE and window not in pool]
        random = [rank for rank in free if document[drawn[rank]] not in taken][:n]
        if min(len(scored), len(random)) < n:
            shared += len(free) >= n
            continue
        used = {top[rank] for rank in scored} | {drawn[rank] for rank in random}
        barred = set() if same_document else {document[window] for window in used}
        left = [rank for rank in active if rank not in explained and top[rank] not in used and document[top[rank]] not in barred]
        starts, random_starts = lists.top_start[feature].tolist(), lists.random_start[feature].tolist()
        found.append(
            Chosen(
                feature,
                [Fragment(top[rank], starts[rank], lists.length) for rank in explained],
                [Fragment(top[rank], starts[rank], lists.length) for rank in scored],
                [Fragment(drawn[rank], random_starts[rank], lists.length) for rank in random],
                [Fragment(top[rank], starts[rank], lists.length) for rank in left[: max(0, PEAKS - n)]],
            )
        )
    return Eligible(found, shared)


def sample(eligible: Sequence[Chosen], features: int, seed: int) -> list[Chosen]:
    """``features`` of them, drawn uniformly; the sample of n is part of that of n + 1. In ascending order."""
    picked = np.random.default_rng(seed).permutation(len(eligible))[:features]
    return [eligible[index] for index in sorted(picked.tolist())]


def donors(chosen: Sequence[Chosen], lists: FragmentLists) -> list[int]:
    """For each of ``chosen`` the index of the one whose explanation is its null; empty where there is none but itself.

    A cyclic shift within bins of density, in order of peak activation: everybody gives once, and nobody to itself.
    """
    if len(chosen) < 2:
        return []
    firings = np.array([int(lists.firings[c.feature]) for c in chosen])
    peak = np.array([float(lists.maximum[c.feature]) for c in chosen])
    found = np.zeros(len(chosen), dtype=np.int64)
    for members in np.array_split(np.argsort(firings, kind="stable"), max(1, len(chosen) // BIN)):
        ranked = members[np.argsort(peak[members], kind="stable")]
        found[ranked] = np.roll(ranked, -1)
    return [int(index) for index in found]
