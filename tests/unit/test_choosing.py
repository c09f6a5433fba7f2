"""The sample of features: seeded, nested, of the active ones only."""

from __future__ import annotations

import pytest
import torch

from evalkit.activations.capture import Activations
from evalkit.dictionaries.controls import Identity
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError, UnitFailed
from evalkit.evaluations.sampling import activity, choose_features, feature_codes

N, T, D = 12, 6, 40


@pytest.fixture
def activations() -> Activations:
    """Dimension d is positive in the first d % 10 windows, at position 3, and everywhere at position 0, which is not kept."""
    x = -torch.ones(N, T, D)
    x[:, 0] = 1.0
    for d in range(D):
        x[: d % 10, 3, d] = 1.0
    keep = torch.ones(N, T, dtype=torch.bool)
    keep[:, 0] = False
    return Activations(x, keep, torch.zeros(N, T, dtype=torch.int64), torch.arange(N), "choosing", 9.0)


def test_activity_counts_kept_positive_codes(activations):
    found = activity(Identity(torch.eye(D)), activations)
    assert found.windows.tolist() == found.positions.tolist() == [d % 10 for d in range(D)]
    assert found.kept == N * (T - 1)


def test_a_sparse_dictionary_counts_the_same_way(activations):
    sae = TopK({"W_enc": torch.eye(D), "b_enc": torch.zeros(D), "W_dec": torch.eye(D), "b_dec": torch.zeros(D)}, k=D)
    assert activity(sae, activations).windows.tolist() == [d % 10 for d in range(D)]


def test_the_sample_is_of_the_active_ones_seeded_and_not_the_first(activations):
    d = Identity(torch.eye(D))
    eligible = {f for f in range(D) if f % 10 >= 4}
    samples = [choose_features(d, activations, features=8, least_windows=4, seed=seed) for seed in range(5)]
    assert all(set(s) <= eligible and len(s) == 8 and s == sorted(s) for s in samples)
    assert len({tuple(s) for s in samples}) > 1
    assert samples[0] == choose_features(d, activations, features=8, least_windows=4, seed=0)
    assert all(s != sorted(eligible)[:8] for s in samples)
    assert set(choose_features(d, activations, features=99, least_windows=4)) == eligible


def test_a_smaller_sample_is_part_of_a_larger_one(activations):
    d = Identity(torch.eye(D))
    small, large = (choose_features(d, activations, features=n, least_windows=1, seed=3) for n in (4, 9))
    assert set(small) < set(large)


def test_named_features_are_taken_as_they_are(activations):
    d = Identity(torch.eye(D))
    assert choose_features(d, activations, ids=[7, 0, 7], features=1) == [0, 7]
    with pytest.raises(UnitFailed, match="no feature 40"):
        choose_features(d, activations, ids=[40])
    with pytest.raises(UnitFailed, match="no feature -1"):
        choose_features(d, activations, ids=[-1])


def test_nothing_active_and_another_width(activations):
    with pytest.raises(UnitFailed, match="active in 10 windows"):
        choose_features(Identity(torch.eye(D)), activations, least_windows=10)
    with pytest.raises(DictionaryError, match="width"):
        choose_features(Identity(torch.eye(D - 1)), activations)


def test_codes_of_some_features_are_those_of_the_dictionary_and_0_where_nothing_is_kept(activations):
    sae = TopK({"W_enc": torch.eye(D), "b_enc": torch.zeros(D), "W_dec": torch.eye(D), "b_dec": torch.zeros(D)}, k=D)
    wanted = sae.encode(activations.x)[..., [9, 3]] * activations.keep[..., None]
    assert torch.equal(feature_codes(sae, activations, [9, 3]), wanted) and wanted.any()
    exact = Identity(torch.eye(D))
    assert torch.equal(feature_codes(exact, activations, [9, 3]), activations.x[..., [9, 3]] * activations.keep[..., None])


def test_one_token_is_preferred_where_asked():
    x = torch.zeros(N, T, 8)
    tokens = torch.arange(N * T).reshape(N, T) % 5
    x[..., 2:] = 1.0  # fire on everything
    x[..., 0] = (tokens == 3).float()
    x[..., 1] = (tokens == 4).float() + (tokens == 1).float()
    text = Activations(x, torch.ones(N, T, dtype=torch.bool), tokens, torch.arange(N), "one token", 9.0)
    d = Identity(torch.eye(8))
    purest = activity(d, text).purest
    assert purest[0] == 1 and purest[1] == pytest.approx(0.5, abs=0.03) and purest[2:].max() < 0.25
    assert choose_features(d, text, features=2, least_windows=1, prefer="one token") == [0, 1]
    assert choose_features(d, text, features=1, least_windows=1, seed=1, prefer="one token")[0] in (0, 1)
    assert len(choose_features(d, text, features=8, least_windows=1)) == 8
    other = text._replace(x=x.roll(2, 2), identity="another text")  # there it is 2 and 3 that fire on few tokens
    assert choose_features(d, text, features=2, least_windows=1, prefer="one token", fit=lambda: other) == [2, 3]
    assert len(choose_features(d, text, features=8, least_windows=1, fit=lambda: other)) == 8


def test_purity_adds_up_over_groups(activations, monkeypatch):
    x, d = activations.x.clone(), Identity(torch.eye(D))
    tokens = torch.randint(0, 4, (N, T), generator=torch.Generator().manual_seed(0))
    whole = activity(d, activations._replace(x=x, tokens=tokens, identity="whole")).purest
    monkeypatch.setattr("evalkit.util.batching.MOST", 1)
    assert torch.equal(activity(d, activations._replace(x=x, tokens=tokens, identity="parts")).purest, whole)
    active = (x[..., 9] > 0) & activations.keep
    assert whole[9] == pytest.approx(float(tokens[active].bincount().max() / active.sum()))
