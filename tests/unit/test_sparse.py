"""Sparse encode and decode: exactly what dense float64 computes, in any cutting, with the same bits each time."""

from __future__ import annotations

import pytest
import torch

from evalkit.training.sparse_ops import topk as sparse
from evalkit.training.sparse_ops.types import Weights


def weights(F: int, D: int, dtype: torch.dtype = torch.float32, norms: bool = False, seed: int = 0) -> Weights:
    g = torch.Generator().manual_seed(seed)
    W, W_dec = (torch.randn(F, D, generator=g, dtype=dtype) for _ in range(2))
    b, centre = (torch.randn(n, generator=g, dtype=dtype) for n in (F, D))
    return Weights(W, b, W_dec, centre, 0.2 + torch.rand(F, generator=g, dtype=dtype) if norms else None)


def tokens(B: int, D: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(9), dtype=dtype)


def by_hand(x: torch.Tensor, w: Weights, k: int, relu: bool = True) -> torch.Tensor:
    """Dense codes, differentiable."""
    pre = (x - w.b_dec) @ w.W_enc.T + w.b_enc
    ranked = pre if w.norms is None else pre * w.norms
    kept = torch.zeros_like(pre).scatter(1, ranked.topk(k, dim=1).indices, 1.0)
    return (pre.relu() if relu else pre) * kept


def dense(values: torch.Tensor, indices: torch.Tensor, F: int) -> torch.Tensor:
    return torch.zeros(len(values), F, dtype=values.dtype).scatter(1, indices, values)


@pytest.mark.parametrize(("F", "k"), [(64, 1), (97, 2), (513, 8), (2304, 32), (1000, 7), (40, 39), (5, 5)])
def test_the_largest_are_those_of_a_full_selection(F: int, k: int) -> None:
    pre = torch.randn(300, F, generator=torch.Generator().manual_seed(F))
    pre[:10] = pre[:10].round()  # ties
    pre[10] = 0.0
    pre[11, -k:] = 50.0  # all in one run, at the end
    found = sparse.largest(pre, k)
    assert all(len(row.unique()) == k for row in found)
    want = pre.topk(k, dim=1).values
    assert torch.equal(pre.gather(1, found).sort(dim=1, descending=True).values, want)


def test_the_largest_are_found_where_all_stand_in_one_group() -> None:
    pre = torch.zeros(1, 1024)
    groups = 1024 // round((1024 / 4) ** 0.5)
    pre[0, [7, 7 + groups, 7 + 5 * groups, 7 + 15 * groups]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert set(sparse.largest(pre, 4)[0].tolist()) == {7, 7 + groups, 7 + 5 * groups, 7 + 15 * groups}


@pytest.mark.parametrize("norms", [False, True])
def test_gradients_equal_dense_float64_autograd(norms: bool) -> None:
    B, D, F, k = 40, 6, 200, 4
    x, w = tokens(B, D, torch.float64), weights(F, D, torch.float64, norms)
    leaves = [part.requires_grad_() for part in w[:4]]
    g = torch.Generator().manual_seed(5)
    pull, target = torch.randn(B, k, generator=g, dtype=torch.float64), torch.randn(B, D, generator=g, dtype=torch.float64)

    values, indices, residual = sparse.autoencode(x, w, k)
    ours = torch.autograd.grad((residual - target).square().sum() + (pull * values).sum(), leaves)
    codes = by_hand(x, w, k)
    other = (x - codes @ w.W_dec - w.b_dec - target).square().sum() + (pull * codes.gather(1, indices)).sum()
    theirs = torch.autograd.grad(other, leaves)
    assert torch.allclose(dense(values, indices, F), codes, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("relu", [True, False])
def test_encode_and_decode_are_the_same_in_two_parts(relu: bool) -> None:
    x, w = tokens(30, 5, torch.float64), weights(90, 5, torch.float64, norms=True)
    leaves = [part.requires_grad_() for part in w[:4]]
    values, indices = sparse.encode(x, w, 60, relu=relu)
    assert bool((values < 0).any()) != relu
    ours = torch.autograd.grad((sparse.decode(values, indices, w.W_dec) + w.b_dec - x).square().sum(), leaves)
    theirs = torch.autograd.grad((by_hand(x, w, 60, relu) @ w.W_dec + w.b_dec - x).square().sum(), leaves)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))
    assert torch.allclose(sparse.dense_codes(x, w, 60, relu=relu), dense(values, indices, 90), atol=1e-12)


def test_a_batch_in_blocks_is_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = tokens(50, 16), weights(300, 16)
    whole = sparse.autoencode(x, w, 5)
    monkeypatch.setattr(sparse, "BLOCK", 7 * 300)
    parts = sparse.autoencode(x, w, 5)
    assert torch.allclose(dense(*parts[:2], 300), dense(*whole[:2], 300), atol=1e-5)
    assert torch.allclose(parts.residual, whole.residual, atol=1e-4)


def test_equal_inputs_give_equal_bits() -> None:
    x, w = tokens(500, 24), weights(400, 24)
    runs = []
    for _ in range(2):
        leaves = [part.detach().clone().requires_grad_() for part in w[:4]]
        result = sparse.autoencode(x, Weights(*leaves), 8)
        result.residual.square().sum().backward()
        runs.append([result.indices, result.residual.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_bfloat16_product_only_proposes() -> None:
    x, w = tokens(400, 64), weights(600, 64, norms=True)
    exact = (x.double() - w.b_dec.double()) @ w.W_enc.double().T + w.b_enc.double()
    values, indices = sparse.encode(x, w, 8, compute="bfloat16")
    assert torch.allclose(values.double(), exact.relu().gather(1, indices), atol=1e-4)
    best = torch.zeros_like(exact).scatter(1, (exact * w.norms.double()).topk(8, dim=1).indices, 1.0)
    assert float(best.gather(1, indices).mean()) > 0.999
    rough = (x - w.b_dec).bfloat16() @ w.W_enc.bfloat16().T + w.b_enc.bfloat16()
    alone = (rough.float() * w.norms).topk(8, dim=1).indices
    assert float(best.gather(1, alone).mean()) < 0.999  # what it would be without the second look


def test_dots_and_fired() -> None:
    x, W = tokens(20, 7), weights(30, 7).W_enc
    indices = torch.randint(0, 30, (20, 3), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sparse.dots(x, W, indices), torch.einsum("bd,bkd->bk", x, W[indices]), atol=1e-5)
    values = torch.tensor([[0.0, 2.0], [0.0, 0.5]])
    assert sparse.fired(values, torch.tensor([[1, 3], [1, 0]]), 5).tolist() == [True, False, False, True, False]
