"""Products by either library are the same to rounding, with their gradients; what does not fit goes to PyTorch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from evalkit import products


@pytest.fixture(params=["mkl", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(products.VARIABLE, request.param)
    products.pays.cache_clear()
    if products.pays() != (request.param == "onednn"):
        pytest.skip("this PyTorch has no oneDNN")
    yield request.param
    products.pays.cache_clear()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [(4,), (1,), (2, 3), (2, 1, 3), (40,)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_and_its_gradients_are_those_of_float64(batch: tuple[int, ...], bias: bool, library: str) -> None:
    tensors = [drawn(*batch, 33, seed=1), drawn(17, 33, seed=2), *([drawn(17, seed=3)] if bias else [])]
    single, double = ([t.to(dtype).requires_grad_() for t in tensors] for dtype in (torch.float32, torch.float64))
    direction = drawn(*batch, 17, seed=4)
    got, want = products.linear(*single), F.linear(*double)
    assert got.shape == want.shape and torch.allclose(got.double(), want, atol=1e-4)
    first = torch.autograd.grad(got, single, direction)
    second = torch.autograd.grad(want, double, direction.double())
    for one, two in zip(first, second, strict=True):
        assert one.shape == two.shape and torch.allclose(one.double(), two, atol=1e-4)


def test_gradients_of_gradients(library: str) -> None:
    x, W = drawn(3, 5, seed=1).requires_grad_(), drawn(4, 5, seed=2)
    (slope,) = torch.autograd.grad(products.linear(x, W).square().sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(slope.square().sum(), x)
    both = 2 * W.T @ W
    assert torch.allclose(again, 2 * x @ both @ both, rtol=1e-3, atol=1e-3)


def test_transposed_and_spread_matrices(library: str) -> None:
    a, b = drawn(9, 6).T, drawn(8, 9, seed=2).T[:, ::2]
    assert torch.allclose(products.times(a, b), a.contiguous() @ b.contiguous(), atol=1e-5)
    assert torch.allclose(products.times(a[None], b), (a @ b)[None], atol=1e-5)
    assert products.times(drawn(2, 3, 4), drawn(2, 4, 5)).shape == (2, 3, 5)  # a batch of matrices


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_keep_theirs(dtype: torch.dtype, library: str) -> None:
    x, W = drawn(3, 5).to(dtype), drawn(4, 5).to(dtype)
    assert torch.equal(products.linear(x, W), F.linear(x, W))


def test_vectors_and_nothing(library: str) -> None:
    assert torch.equal(products.linear(drawn(5), drawn(4, 5)), F.linear(drawn(5), drawn(4, 5)))
    assert products.linear(drawn(0, 5), drawn(4, 5)).shape == (0, 4)
    assert products.linear(drawn(2, 0, 5), drawn(4, 5)).shape == (2, 0, 4)


def test_layers_are_exchanged_with_their_parameters(library: str) -> None:
    inner = torch.nn.Linear(6, 7)
    model = torch.nn.Sequential(inner, torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(7, 3, bias=False))).eval()
    x = drawn(5, 6)
    before, names = model(x), [name for name, _ in model.named_parameters()]
    products.quicken(model)
    kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == ({products.Linear} if library == "onednn" else {torch.nn.Linear})
    assert torch.allclose(model(x), before, atol=1e-5) and not any(m.training for m in model.modules())
    assert [name for name, _ in model.named_parameters()] == names and model[0].weight is inner.weight
    assert model[2][0].bias is None


def test_a_processor_of_another_maker_gets_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(products.VARIABLE, raising=False)
    monkeypatch.setattr(products, "_multiplies", lambda: True)
    for capability, intel, expected in [("AVX512", False, True), ("AVX512", True, False), ("AVX2", False, False)]:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(products, "_by_intel", lambda intel=intel: intel)
        products.pays.cache_clear()
        assert products.pays() == expected
    products.pays.cache_clear()


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError, None])
def test_an_operation_that_is_gone_or_wrong_is_not_used(error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        if error is not None:
            raise error("no such operation")
        return F.linear(x, W, b) + 1.0

    monkeypatch.setenv(products.VARIABLE, "onednn")
    monkeypatch.setattr(products, "_product", product)
    products.pays.cache_clear()
    assert not products.pays()
    products.pays.cache_clear()
