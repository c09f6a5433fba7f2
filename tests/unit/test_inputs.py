"""Input histograms against planted features: one token, one token when strong, numbers, and nothing in particular."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from evalkit.activations.capture import Activations
from evalkit.dictionaries.controls import Identity
from evalkit.errors import DictionaryError, UnitFailed
from evalkit.evaluations.inputs import Inputs, InputsConfig, closest_dimensions, entropy, profile
from evalkit.text.token_classes import Vocabulary, token_class
from evalkit.util.progress import Progress

N, T, D = 40, 32, 8
WORDS = ["the", " The", "of", "1", "22", "'", " cat", " dog", " fish", " bird"]


class Names:
    """Tokens have names; nothing else is asked of the model."""

    def token_strings(self, ids):
        return [WORDS[i] for i in ids]


class InputsBench:
    """Random text; dimension 0 rises on 'the' in any spelling, 1 on "'" when strong and anything when weak, 2 on numbers, 3 on
    nothing in particular; 4 is never positive; 5 copies dimension 0 upside down with noise; 6 is strongly negative on "'",
    strongly positive on ' cat' and weakly either on 'of'."""

    hook_point, judge, references, seed = "blocks.0.hook_resid_post", None, {}, 5
    progress = Progress(quiet=True)
    model = Names()

    def __init__(self):
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, len(WORDS), (N, T))
        x = np.zeros((N, T, D))
        strength = rng.uniform(0.1, 10, (N, T))
        x[..., 0] = np.where(np.isin(tokens, (0, 1)), strength, 0)
        x[..., 1] = np.where(tokens == 5, 5 + strength / 2, np.where(rng.random((N, T)) < 0.3, strength / 2, 0))
        x[..., 2] = np.where(np.isin(tokens, (3, 4)), strength, 0)
        x[..., 3] = np.where(rng.random((N, T)) < 0.3, strength, 0)
        x[..., 4] = 0
        x[..., 5] = -x[..., 0] + 0.1 * rng.normal(size=(N, T))
        x[..., 6] = np.select([tokens == 5, tokens == 6, tokens == 2], [-20 - strength, 5 + strength, strength / 4 - 1.2])
        keep = np.ones((N, T), dtype=bool)
        keep[:, :2] = False
        x[:, :2] = 1e4
        self.activations = Activations(
            torch.tensor(x, dtype=torch.float32), torch.tensor(keep), torch.tensor(tokens), torch.arange(N), "inputs", 99.0
        )

    def score(self):
        return self.activations


@pytest.fixture(scope="module")
def found():
    return Inputs().run(InputsBench(), Identity(torch.eye(D)), InputsConfig(feature_ids=(0, 1, 2, 3, 4)))


def value(result, metric, feature):
    (score,) = [s for s in result.scores if s.metric == metric and s.item == feature]
    return score.value


def bins(result, feature, scale, of="feature"):
    return [r for r in result.tables["input_bins"] if (r["feature"], r["scale"], r["of"]) == (feature, scale, of)]


def test_spellings_and_numbers_are_one_class_and_marks_are_not():
    assert token_class(" The") == token_class("the") and token_class("7") == token_class(" 1848")
    assert len({token_class(t) for t in ("'", '"', ".", " ", "s", "7")}) == 6
    vocabulary = Vocabulary(Names(), np.arange(len(WORDS)))
    assert [vocabulary.names[c] for c in vocabulary.classes(np.array([1, 0, 4, 5]))] == ["the", "the", "number", "'"]


@pytest.mark.parametrize(("feature", "name"), [(0, "the"), (2, "number")])
def test_a_feature_of_one_class_is_monosemantic_at_every_level(found, feature, name):
    for metric in ("monosemantic", "level_low", "level_middle", "level_high"):
        assert value(found, metric, feature) == 1
    assert {row["main_class"] for row in bins(found, feature, "range")} == {name}
    assert value(found, "monosemantic_random", feature) < 0.5
    assert value(found, "token_entropy", feature) == pytest.approx(1, abs=0.02)
    assert value(found, "token_entropy_random", feature) > 3


def test_a_feature_that_is_pure_only_when_strong_says_so_by_level(found):
    assert value(found, "level_high", 1) > 2 * value(found, "level_low", 1)
    shares = [row["main_share"] for row in bins(found, 1, "range")]
    assert min(shares[6:]) == 1 and max(shares[:3]) < 0.5
    assert bins(found, 1, "range")[-1]["main_class"] == "'"
    assert value(found, "monosemantic", 1) == pytest.approx(0.5, abs=0.06)


def test_of_signed_codes_the_upper_tail_is_described():
    bench = InputsBench()
    result = Inputs().run(bench, Identity(torch.eye(D)), InputsConfig(feature_ids=(4, 6)))
    kept = bench.activations.x[..., 6][bench.activations.keep]
    assert (kept < 0).sum() > 100 < (kept > 0).sum()
    assert value(result, "density", 6) == pytest.approx(float((kept > 0).float().mean()))
    assert sum(row["n"] for row in bins(result, 6, "decile")) == int((kept > 0).sum())
    assert all(row["low"] > 0 for scale in ("range", "decile", "top") for row in bins(result, 6, scale))
    assert {row["main_class"] for row in bins(result, 6, "range")} == {"cat"}
    assert not any("'" in token for row in bins(result, 6, "range") for token, _ in row.get("tokens", []))
    assert value(result, "level_high", 6) == 1 and value(result, "level_low", 6) < 0.5


def test_a_feature_of_nothing_in_particular_is_like_its_null(found):
    assert value(found, "monosemantic", 3) == pytest.approx(value(found, "monosemantic_random", 3), abs=0.1)
    assert value(found, "token_entropy", 3) == pytest.approx(value(found, "token_entropy_random", 3), abs=0.1)


def test_a_feature_that_never_fires_is_undefined_and_has_no_bins(found):
    assert value(found, "monosemantic", 4) is None and value(found, "neuron_r", 4) is None
    assert value(found, "density", 4) == 0
    assert not bins(found, 4, "range")


def test_bins_hold_every_firing_once_within_their_ends(found):
    kept = InputsBench().activations
    firings = kept.x[..., 3][kept.keep]
    firings = firings[firings != 0]
    for scale in ("range", "decile"):
        rows = bins(found, 3, scale)
        assert len(rows) == 10 and sum(row["n"] for row in rows) == len(firings)
    for row in bins(found, 3, "range"):
        inside = ((firings >= row["low"] - 1e-6) & (firings <= row["high"] + 1e-6)).sum()
        assert abs(int(inside) - row["n"]) <= 1
        assert sum(share for _, share in row["tokens"]) <= 1 + 1e-9
    (top,) = bins(found, 3, "top")
    assert top["high"] == pytest.approx(float(firings.max()))
    assert [c["value"] for c in top["contexts"]] == sorted((c["value"] for c in top["contexts"]), reverse=True)


def test_contexts_show_the_firing_token(found):
    for row in bins(found, 0, "range"):
        for context in row["contexts"]:
            assert token_class(context["tokens"][context["at"]]) == "the"
            assert row["low"] - 1e-6 <= context["value"] <= row["high"] + 1e-6
    json.dumps(found.tables)


def test_the_contrast_is_the_closest_dimension_at_as_many_positions():
    bench = InputsBench()
    codes = bench.activations.x[..., :1].clone() * bench.activations.keep[..., None]
    hidden = bench.activations._replace(x=bench.activations.x[..., 1:])
    ((neuron, sign, r),) = closest_dimensions(hidden, codes)
    kept = bench.activations.x[bench.activations.keep].double().numpy()
    assert (neuron, sign) == (4, -1)
    assert r == pytest.approx(abs(np.corrcoef(kept[:, 0], kept[:, 5])[0, 1]), abs=1e-9)
    result = Inputs().run(bench, Identity(torch.eye(D)), InputsConfig(feature_ids=(1,)))
    own, contrast = (sum(row["n"] for row in bins(result, 1, "decile", of)) for of in ("feature", "neuron"))
    assert own == contrast
    found = {score.metric: score.value for score in result.scores}
    assert found["monosemantic_gain"] == found["monosemantic"] - found["monosemantic_neuron"]


def test_the_main_class_is_chosen_by_its_mean_share_over_the_range():
    values = np.concatenate([np.linspace(0, 1, 90), np.linspace(1.1, 10, 10)])
    classes = np.concatenate([np.zeros(90, dtype=int), np.ones(10, dtype=int)])
    seen = profile(values, classes, 10)
    assert seen.main == 1 and np.nanmean(seen.shares) == pytest.approx(0.85)
    assert np.bincount(seen.decile).tolist() == [10] * 10
    assert profile(np.full(3, 2.0), np.zeros(3, dtype=int), 4).shares[-1] == 1


def test_entropy_of_known_frequencies():
    assert entropy(np.array([1, 2, 3, 4])) == 2
    assert entropy(np.array([7, 7])) == 0
    assert entropy(np.array([0, 0, 0, 1])) == pytest.approx(-0.75 * math.log2(0.75) + 0.5)


def test_a_sample_twice_is_the_same(found):
    config = InputsConfig(features=3, least_windows=5)
    one, two = (Inputs().run(InputsBench(), Identity(torch.eye(D)), config) for _ in range(2))
    assert one == two
    assert len({score.item for score in one.scores}) == 3


def test_what_cannot_be_studied_is_refused():
    with pytest.raises(UnitFailed, match="no feature 99"):
        Inputs().run(InputsBench(), Identity(torch.eye(D)), InputsConfig(feature_ids=(99,)))
    with pytest.raises(DictionaryError, match="width"):
        Inputs().run(InputsBench(), Identity(torch.eye(3)), InputsConfig())
    with pytest.raises(ValueError, match="bins = 1"):
        InputsConfig(bins=1)
