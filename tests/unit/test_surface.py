"""Counts of a text's surface: known values, and packaged concepts that none of them tells."""

from __future__ import annotations

import numpy as np
import pytest

from evalkit.concepts.loading import FOLDER, load_concept, packaged
from evalkit.concepts.surface import NAMES, counts
from evalkit.models.language_model import LanguageModel, ModelConfig
from evalkit.util.progress import Progress
from evalkit.util.statistics import auroc

MOST = 0.65
"""AUROC that no count may exceed on the pairs of a packaged concept."""


def test_counts_of_a_text_that_can_be_counted_by_hand():
    row = dict(zip(NAMES, counts(['Été 1987: "Ja!" (a_b) + 2'], [11])[0], strict=True))
    assert row == {
        "tokens": 11, "characters": 25, "words": 6, "capitals": 2, "digits": 5, "stops": 1, "commas": 1, "quotes": 2,
        "brackets": 2, "dashes": 1, "signs": 1, "accents": 2,
    }  # fmt: skip
    assert counts([], []).shape == (0, len(NAMES))


def separation(present: np.ndarray, absent: np.ndarray) -> dict[str, float]:
    """By count: the AUROC with which it separates two sets of texts, whichever of them has more."""
    label = np.arange(len(present) + len(absent)) < len(present)
    columns = np.concatenate([present, absent]).T
    values = {name: auroc(label, column) for name, column in zip(NAMES, columns, strict=True)}
    return {name: max(value, 1 - value) for name, value in values.items()}


def test_separation_is_the_auroc_of_whichever_side_has_more():
    found = separation(counts(["a", "bb", "A1"], [1, 1, 1]), counts(["aaa", "bbb", "aaaa"], [1, 1, 1]))
    assert found["characters"] == 1 and found["tokens"] == 0.5
    assert found["capitals"] == found["digits"] == pytest.approx((3 + 3 * 2 * 0.5) / 9)


def sides(name: str, length):
    pairs = load_concept(FOLDER / f"{name}.toml").pairs
    for texts in ([pair.present for pair in pairs], [pair.absent for pair in pairs]):
        yield counts(texts, [length(text) for text in texts])


@pytest.mark.parametrize("name", packaged())
def test_no_count_of_the_surface_tells_a_packaged_concept(name):
    found = separation(*sides(name, len))
    assert max(found.values()) <= MOST, found


@pytest.mark.assets
def test_nor_does_the_number_of_tokens_of_the_packaged_model():
    model = LanguageModel.load(ModelConfig(package="smollm2-135m-instruct"), Progress(quiet=True))
    found = {name: separation(*sides(name, lambda text: len(model.tokenise(text))))["tokens"] for name in packaged()}
    assert max(found.values()) <= MOST, found


def test_packaged_pairs_are_of_about_one_length():
    for name in packaged():
        present, absent = sides(name, len)
        ratio = present[:, NAMES.index("characters")] / absent[:, NAMES.index("characters")]
        assert 0.8 < np.median(ratio) < 1.25, name
