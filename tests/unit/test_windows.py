"""Edits in windows agree with whole runs of one window at a time, in float64, wherever the hook point is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from patching_case import Exact, double_model

from evalkit.interventions.windows import WindowCache
from evalkit.models.language_model import LanguageModel

W, T, J = 3, 9, 8


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Float64 throughout: how a softmax in float32 rounds depends on the processor and on the rows beside it."""
    with Exact():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Iterator[LanguageModel]:
    yield double_model(Path(tmp_path_factory.mktemp("windows")))


@pytest.fixture
def case(model):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 300, (W, T), generator=generator)
    window = torch.randint(0, W, (J,), generator=generator)
    last = torch.randint(2, T, (J,), generator=generator)
    amount = torch.randn(J, T, generator=generator, dtype=torch.float64) * (torch.rand(J, T, generator=generator) < 0.4)
    amount[3] = 0
    amount[4, : int(last[4]) + 1] = 0
    return tokens, window, last, amount


def directions(model: LanguageModel, hook_point: str) -> torch.Tensor:
    return torch.randn(J, model.width(hook_point), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def whole_runs(model, hook_point, case, direction):
    """Logits (J, V) of each row, by a run of its window from the first block and position on."""
    tokens, window, last, amount = case
    rows = []
    for j in range(J):
        one = tokens[window[j]][None]
        with torch.no_grad():
            found = {}

            def keep(value, hook, found=found):
                found["x"] = value.clone()

            model.run(one, [(hook_point, keep)], use_cache=False)
            x = found["x"].flatten(2) + amount[j][None, :, None] * direction[j]
        rows.append(model._forward(one, [], "logits")[0, last[j]] if not amount[j].any() else None)
        if rows[-1] is None:
            if "resid" in hook_point and hook_point != "blocks.0.hook_resid_pre":
                logits = with_replaced(model, one, hook_point, x)
            else:
                logits = model._forward(one, [(hook_point, lambda v, hook, x=x: x.reshape(v.shape))], "logits")
            rows[-1] = logits[0, last[j]]
    return torch.stack(rows)


def with_replaced(model, tokens, hook_point, x):
    """Unlike logits_with, in float64."""
    layer = int(hook_point.split(".")[1])
    if "mid" in hook_point:
        with model._skipping(layer, x):
            return model._forward(tokens, model._residual_mid(hook_point, layer, x), "logits")
    with model._skipping(layer + ("post" in hook_point), x):
        return model._forward(tokens, [], "logits")


POINTS = [
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_resid_post",
    "blocks.1.hook_resid_mid",
    "blocks.1.hook_resid_post",
    "blocks.0.hook_mlp_out",
    "blocks.1.mlp.hook_post",
]


@pytest.mark.parametrize("hook_point", POINTS)
def test_batched_edits_are_whole_runs_one_at_a_time(model, case, hook_point):
    tokens, window, last, amount = case
    direction = directions(model, hook_point)
    expected = whole_runs(model, hook_point, case, direction)
    windows = WindowCache(model, hook_point, tokens)
    found = windows.logits(windows.edited(window, last, amount, direction))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    plain = windows.logits(windows.final[window, last])
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("hook_point", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"])
def test_known_activations_spare_the_earlier_blocks(model, case, hook_point):
    tokens, window, last, amount = case
    direction = directions(model, hook_point)
    plain = WindowCache(model, hook_point, tokens)
    known = WindowCache(model, hook_point, tokens, x=plain._enter)
    one, two = (w.edited(window, last, amount, direction) for w in (plain, known))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    ran = []
    inner = model._bridge.original_model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    try:
        WindowCache(model, hook_point, tokens, x=plain._enter).edited(window, last, amount, direction)
    finally:
        inner.remove()
    assert not ran


def test_an_edit_of_nothing_is_exactly_nothing(model, case):
    tokens, window, last, amount = case
    windows = WindowCache(model, "blocks.0.hook_resid_post", tokens)
    direction = directions(model, "blocks.0.hook_resid_post")
    found = windows.edited(window, last, amount, direction)
    assert torch.equal(found[3], windows.final[window[3], last[3]])
    assert torch.equal(found[4], windows.final[window[4], last[4]]), "edits behind the position that is read"
    assert not torch.equal(found[0], windows.final[window[0], last[0]])
    none = windows.edited(window, last, amount, torch.zeros_like(direction))
    assert torch.equal(none, windows.final[window, last])


def test_only_positions_from_the_first_edit_to_the_one_read_are_run(model, case):
    tokens, *_ = case
    windows = WindowCache(model, "blocks.0.hook_resid_post", tokens)
    amount = torch.zeros(1, T, dtype=torch.float64)
    amount[0, 6] = 1.0
    windows.edited(torch.tensor([1]), torch.tensor([7]), amount, directions(model, "blocks.0.hook_resid_post")[:1])
    assert windows.positions == 2


@pytest.mark.parametrize("hook_point", POINTS)
@pytest.mark.parametrize("known", [True, False])
def test_windows_that_end_early_agree_with_whole_ones(model, hook_point, known):
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, 300, (6, T), generator=generator)
    length = torch.tensor([9, 4, 7, 2, 8, 3])
    window = torch.arange(6).repeat(2)
    last = torch.cat([length - 1, (length - 2).clamp(min=0)])
    amount = torch.randn(12, T, generator=generator, dtype=torch.float64)
    amount[torch.arange(12), last - 1] = 0
    direction = torch.randn(12, model.width(hook_point), generator=generator, dtype=torch.float64)
    whole = WindowCache(model, hook_point, tokens)
    x = whole._enter if known and "post" in hook_point and "mlp" not in hook_point else None
    short = WindowCache(model, hook_point, tokens, x=x, length=length)
    for row, end in enumerate(length.tolist()):
        torch.testing.assert_close(short.final[row, :end], whole.final[row, :end], rtol=1e-10, atol=1e-10)
    one, two = (windows.edited(window, last, amount, direction) for windows in (whole, short))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert short.own_positions < whole.own_positions == 6 * T or short._skip == model.n_layers


@pytest.mark.parametrize(
    ("hook_point", "narrow"),
    [("blocks.0.hook_resid_post", True), ("blocks.0.mlp.hook_post", True), ("blocks.1.mlp.hook_post", False),
     ("blocks.1.hook_resid_mid", False)],
)  # fmt: skip
def test_the_last_blocks_mlp_runs_where_it_is_read(model, case, hook_point, narrow):
    tokens, window, last, amount = case
    windows = WindowCache(model, hook_point, tokens)
    widths = []
    inner = model._bridge.original_model.model.layers[1].mlp.down_proj
    handle = inner.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    try:
        windows.edited(window, last, amount, directions(model, hook_point))
    finally:
        handle.remove()
    assert widths and (set(widths) == {1}) == narrow
