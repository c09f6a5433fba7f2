"""Fragment lists against a straightforward search over dense codes."""

import pytest
import torch

from evalkit.activations.capture import Activations
from evalkit.activations.fragments import NONE, draw, fragment_lists
from evalkit.dictionaries.controls import Identity
from evalkit.errors import CorpusError
from evalkit.util.progress import Progress

N, T, D, LENGTH = 40, 26, 5, 8
OFFSET = T - T // LENGTH * LENGTH


@pytest.fixture
def activations():
    x = torch.relu(torch.randn(N, T, D) - 1.2)  # sparse, like an SAE's codes
    keep = torch.rand(N, T) > 0.1
    keep[:, :2] = False
    return Activations(x, keep, torch.randint(99, (N, T)), torch.arange(N), "planted", float("inf"))


def lists(activations, **changes):
    settings = {"length": LENGTH, "top": 6, "random": 6, "seed": 3, "progress": Progress(quiet=True)} | changes
    return fragment_lists(Identity(torch.eye(D)), activations, **settings)


def test_top_lists_equal_a_search_over_everything(activations):
    found = lists(activations)
    codes = activations.x.masked_fill(~activations.keep[..., None], 0.0)
    peaks = codes[:, OFFSET:].reshape(N, -1, LENGTH, D).amax(2)  # (N, P, D)
    for feature in range(D):
        strongest, place = peaks[:, :, feature].max(1)
        order = strongest.argsort(descending=True)[:6]
        expected = [(int(w), OFFSET + int(place[w]) * LENGTH) for w in order if strongest[w] > 0]
        got = [(int(w), int(s)) for w, s in zip(found.top[feature], found.top_start[feature], strict=True) if w != NONE]
        assert got == expected


def test_counts_and_maxima_leave_out_what_the_rule_leaves_out(activations):
    found = lists(activations)
    kept = activations.x[activations.keep]
    assert found.n_tokens == int(activations.keep.sum())
    assert torch.equal(found.firings, (kept != 0).sum(0))
    assert torch.equal(found.maximum, kept.amax(0))


def test_random_lists_hold_active_fragments_of_different_windows(activations):
    found = lists(activations)
    for feature in range(D):
        windows = [int(w) for w in found.random[feature] if w != NONE]
        assert windows
        assert len(set(windows)) == len(windows)
        for window, start in zip(windows, found.random_start[feature].tolist(), strict=False):
            span = slice(start, start + LENGTH)
            assert activations.x[window, span, feature][activations.keep[window, span]].max() > 0


def test_the_batch_size_changes_nothing(activations):
    whole, small = lists(activations), lists(activations, cells=T * D)
    for a, b in zip(whole, small, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_another_seed_draws_other_random_fragments_and_the_same_top(activations):
    one, two = lists(activations), lists(activations, seed=4)
    assert torch.equal(one.top, two.top)
    assert not torch.equal(one.random, two.random)


def test_a_feature_with_few_active_windows_is_padded(activations):
    activations.x[:, :, 0] = 0
    activations.x[7, 20, 0] = 5.0
    activations.keep[7, 20] = True
    found = lists(activations)
    assert found.top[0].tolist() == [7] + [NONE] * 5
    assert found.firings[0] == 1


def test_a_fragment_longer_than_the_window_is_refused(activations):
    with pytest.raises(CorpusError, match="does not fit"):
        lists(activations, length=T + 1)


def test_features_that_are_active_everywhere_have_random_fragments_of_their_own(activations):
    dense = activations._replace(x=torch.ones(N, T, D), keep=torch.ones(N, T, dtype=torch.bool))
    found = lists(dense, random=3)
    draws = {(*found.random[feature].tolist(), *found.random_start[feature].tolist()) for feature in range(D)}
    assert len(draws) == D


def test_draws_are_uniform_and_independent_of_each_other():
    drawn = draw(5, torch.arange(400), 300, 3)
    assert drawn.priority.mean() == pytest.approx(0.5, abs=0.005)
    assert drawn.priority.var() == pytest.approx(1 / 12, abs=0.002)
    shares = drawn.fragment.flatten().bincount(minlength=3) / drawn.fragment.numel()
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.005)
    between = torch.corrcoef(drawn.priority.T)  # (F, F)
    assert between.triu(1).abs().mean() < 0.06  # 0.04 is expected of 400 independent pairs
    assert torch.corrcoef(torch.stack([drawn.priority.flatten(), drawn.fragment.flatten().float()]))[0, 1].abs() < 0.01
    assert not torch.equal(drawn.priority, draw(6, torch.arange(400), 300, 3).priority)
