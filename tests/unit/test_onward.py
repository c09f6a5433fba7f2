"""Runs from one hook point on to another: against whole runs, finite differences, and what changes nothing."""

from __future__ import annotations

import pytest
import torch
from patching_case import Exact, double_model

from evalkit.errors import ModelError
from evalkit.interventions.hooks import depth
from evalkit.interventions.paths import PathCache

PRE, MID, POST, END = (
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_resid_mid",
    "blocks.0.hook_resid_post",
    "blocks.1.hook_resid_post",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return double_model(tmp_path_factory.mktemp("onward") / "model")


@pytest.fixture(autouse=True)
def exact():
    with Exact():
        yield


@pytest.fixture(scope="module")
def contexts():
    tokens = torch.randint(1, 300, (3, 9), generator=torch.Generator().manual_seed(3))
    return tokens, torch.tensor([8, 5, 6])


def whole_run(model, tokens, last, source, sink, change):
    """One ordinary run of one context, with ``change`` (T, D) added at ``source`` by hand; (E,) at ``sink``."""
    kept = {}
    middle = source.endswith("resid_mid")

    def add(value, hook):
        return value + change[: value.shape[1]]

    def leave(value, hook):
        kept["y"] = value[0, int(last)].clone()

    # the residual branch does not pass hook_resid_mid: the block's output needs the change as well
    hooks = [(source, add), *([("blocks.0.hook_out", add)] if middle else []), (sink, leave)]
    with torch.no_grad(), model._bridge.hooks(fwd_hooks=hooks):
        model._bridge.original_model(input_ids=tokens[None, : int(last) + 1], use_cache=False)
    return kept["y"]


@pytest.mark.parametrize("source,sink", [(PRE, POST), (PRE, END), (MID, END), (POST, END), ("blocks.0.hook_mlp_out", END),
                                         (MID, POST), (POST, "blocks.1.hook_attn_out")])  # fmt: skip
def test_rows_in_one_batch_are_whole_runs_one_at_a_time(model, contexts, source, sink):
    tokens, last = contexts
    onward = PathCache(model, source, sink, tokens, last)
    rows = torch.tensor([0, 1, 2, 1, 0, 2])
    generator = torch.Generator().manual_seed(5)
    change = torch.randn(len(rows), onward.x.shape[1], onward.x.shape[2], generator=generator, dtype=torch.float64)
    for row, first in enumerate([0, 3, 6, 1, 8, 2]):
        change[row, :first] = 0
    found = onward.run(rows, change)
    for row, context in enumerate(rows.tolist()):
        expected = whole_run(model, tokens[context], last[context], source, sink, change[row])
        assert torch.allclose(found[row], expected, atol=1e-10, rtol=0), (row, (found[row] - expected).abs().max())
        assert (expected - onward.y[context]).abs().max() > 1e-4


def test_no_change_and_a_change_behind_the_last_token_change_nothing(model, contexts):
    tokens, last = contexts
    onward = PathCache(model, POST, END, tokens, last)
    rows = torch.arange(3)
    nothing = torch.zeros_like(onward.x)
    # rows without a change are not run; in truth they would come out the same, from whichever position they are run
    for first in ((0, 0, 0), (3, 5, 1)):
        ran = onward.run_from(rows, nothing, torch.tensor(first))
        assert torch.allclose(ran, onward.y, atol=1e-12, rtol=0)
    assert torch.equal(onward.run(rows, nothing), onward.y)
    behind = nothing.clone()
    behind[1, 6:] = 5.0
    behind[2, 6] = 5.0  # the last token of its context
    found = onward.run(rows, behind)
    assert torch.equal(found[:2], onward.y[:2]) and (found[2] - onward.y[2]).abs().max() > 1e-2


@pytest.mark.parametrize("source,sink", [(POST, END), (POST, "blocks.1.hook_mlp_out")])
def test_a_known_source_spares_the_blocks_before_it(model, contexts, source, sink):
    tokens, last = contexts
    plain = PathCache(model, source, sink, tokens, last)
    ran = []
    handle = model._bridge.original_model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    try:
        known = PathCache(model, source, sink, tokens, last, plain.x)
    finally:
        handle.remove()
    assert not ran
    rows = torch.tensor([0, 1, 2, 0])
    change = torch.randn(4, *plain.x.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    change[0, :5] = 0
    for one, two in ((plain.y, known.y), (plain.run(rows, change), known.run(rows, change))):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    read = [onward.gradient(lambda y: y[:, 4].square()) for onward in (plain, known)]
    torch.testing.assert_close(*read, rtol=1e-8, atol=1e-10)


def test_rows_of_different_length_are_not_padded_to_the_longest(model):
    tokens = torch.randint(1, 300, (1, 40), generator=torch.Generator().manual_seed(3))
    onward = PathCache(model, POST, END, tokens, torch.tensor([39]))
    change = torch.zeros(30, *onward.x.shape[1:], dtype=torch.float64)
    change[:2, 0], change[2:, 38] = 1.0, 1.0
    onward.run(torch.zeros(30, dtype=torch.int64), change)
    assert onward.positions == 2 * 40 + 28 * 2


@pytest.mark.parametrize("source", [PRE, MID, POST])
def test_gradients_are_those_of_finite_differences(model, contexts, source):
    tokens, last = contexts
    onward = PathCache(model, source, END, tokens, last)
    gradient = onward.gradient(lambda y: y[:, 4].square())
    step = 1e-6
    for context, place, dimension in ((0, 8, 3), (0, 2, 11), (1, 0, 7), (2, 5, 30)):
        change = torch.zeros(2, *onward.x.shape[1:], dtype=torch.float64)
        change[0, place, dimension], change[1, place, dimension] = step, -step
        up, down = onward.run(torch.tensor([context] * 2), change)[:, 4].square()
        assert float(gradient[context, place, dimension]) == pytest.approx(float(up - down) / (2 * step), rel=1e-5, abs=1e-8)
    assert (gradient[1, 6:] == 0).all()


@pytest.mark.parametrize("source,sink,narrow", [(PRE, END, True), (POST, END, True), ("blocks.1.hook_attn_out", END, False),
                                                (PRE, "blocks.1.hook_resid_mid", False)])  # fmt: skip
def test_the_mlp_in_front_of_the_sink_runs_where_it_is_read(model, contexts, source, sink, narrow):
    onward = PathCache(model, source, sink, *contexts)
    widths = []
    inner = model._bridge.original_model.model.layers[1].mlp.down_proj
    handle = inner.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    try:
        onward.run(torch.arange(3), torch.ones_like(onward.x))
    finally:
        handle.remove()
    assert (set(widths) == {1}) == narrow


def test_what_comes_after_what():
    names = ["blocks.0.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.0.hook_attn_out", "blocks.0.hook_resid_mid",
             "blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre",
             "blocks.10.hook_resid_pre"]  # fmt: skip
    assert sorted(reversed(names), key=depth) == names


def test_refusals(model, contexts):
    with pytest.raises(ModelError, match="not known what comes before"):
        depth("hook_embed")
    with pytest.raises(ModelError, match="does not come after"):
        PathCache(model, END, POST, *contexts)
    with pytest.raises(ModelError, match="no hook point"):
        PathCache(model, "blocks.7.hook_resid_post", "blocks.8.hook_resid_post", *contexts)
