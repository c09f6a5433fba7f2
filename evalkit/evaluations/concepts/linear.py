"""What needs no feature: a probe on the activations, and a model of the surface that reads no activation.

1. The probe is a logistic regression on the mean of the raw activations over the text.
2. The surface model is one on the counts of ``surface`` and on which of the 200 commonest words are in the text. It reads no
   activation.
3. Either is fitted on the first half alone, the choice of words and the standardisation included, with an L2 penalty, and tested
   on the second as features are.
4. Each count alone is tested too; the first half says which side has more of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from evalkit.concepts.surface import NAMES, counts
from evalkit.evaluations.concepts.pooling import Values
from evalkit.evaluations.concepts.search import Found, check, given

WORDS = 200
"""Words in the bag: the commonest of the first half."""


class Fitted(NamedTuple):
    """A model fitted on the first half."""

    chosen: float
    """AUROC on the half it was fitted on."""
    auroc: float
    """AUROC on the other half."""
    p: float
    """One-sided p of the other half."""


class Counted(NamedTuple):
    """One count of the surface alone."""

    name: str
    """One of ``text.surface.NAMES``."""
    sign: int
    """-1 where texts with the concept have less of it on the first half."""
    found: Found


class Surface(NamedTuple):
    """What the surface of the texts tells."""

    model: Fitted
    counted: tuple[Counted, ...]
    """Each count, the best of the first half first."""


def probe(
    x: Float[torch.Tensor, "N T D"],
    keep: Bool[torch.Tensor, "N T"],
    label: Bool[np.ndarray, " N"],
    held: Bool[np.ndarray, " N"],
    group: Int[np.ndarray, " N"],
    strength: float,
) -> Fitted:
    """The probe, with inverse penalty ``strength``."""
    weight = keep.float()[..., None]
    mean = ((x * weight).sum(1) / weight.sum(1).clamp(min=1)).double().numpy()  # (N, D)
    return _fitted(mean, label, held, group, strength)


def surface(
    texts: Sequence[str],
    tokens: Sequence[int],
    label: Bool[np.ndarray, " N"],
    held: Bool[np.ndarray, " N"],
    group: Int[np.ndarray, " N"],
    strength: float,
) -> Surface:
    """The surface model, with inverse penalty ``strength``, and each count alone.

    Args:
        texts: N texts.
        tokens: how many tokens each has.
    """
    of_text = counts(texts, tokens)  # (N, K)
    model = _fitted(np.concatenate([of_text, _bag(texts, held)], 1), label, held, group, strength)
    K = len(NAMES)
    both = Values(np.concatenate([of_text, -of_text], 1), np.tile(np.arange(K), 2), np.repeat([1, -1], K))
    alone = given(both, label, held, group, range(K))
    found = [Counted(name, int(both.sign[one.candidate]), one) for name, one in zip(NAMES, alone, strict=True)]
    return Surface(model, tuple(sorted(found, key=lambda one: -one.found.chosen)))


def _bag(texts: Sequence[str], held: Bool[np.ndarray, " N"]) -> Float[np.ndarray, "N V"]:
    """Which of the commonest words of the first half are in each text: 1 or 0."""
    words = [re.findall(r"[^\W\d_]+", text.lower()) for text in texts]
    common = Counter(word for row in np.flatnonzero(~held) for word in words[row]).most_common(WORDS)
    return np.array([[word in set(own) for word, _ in common] for own in words], dtype=np.float64).reshape(
        len(texts), len(common)
    )


def _fitted(
    inputs: Float[np.ndarray, "N V"],
    label: Bool[np.ndarray, " N"],
    held: Bool[np.ndarray, " N"],
    group: Int[np.ndarray, " N"],
    strength: float,
) -> Fitted:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000)).fit(inputs[~held], label[~held])
    score = fitted.decision_function(inputs)
    first = check(score[~held], label[~held], group[~held])
    return Fitted(first.auroc, *check(score[held], label[held], group[held]))
