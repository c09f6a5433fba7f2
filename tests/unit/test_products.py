"""Products by either library are the same to rounding, with their gradients; what does not fit goes to PyTorch's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from evalkit.errors import UsageError
from evalkit.util import matmul as products


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What was decided by a test is not what others go by."""
    products.pays.cache_clear()
    yield
    products.pays.cache_clear()


@pytest.fixture(params=products.LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(products.VARIABLE, request.param)
    assert products.pays() == (request.param == "onednn"), "the PyTorch of the tests has oneDNN"
    return request.param


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


def test_matrices_and_biases_of_any_strides(library: str) -> None:
    x, wide = drawn(6, 9), drawn(20, 30, seed=2)
    for W in (
        wide[:, :9],
        wide[::3, 5:14],
        wide.T[:8, 3:12],
        drawn(3, 2, 9)[:, 1],
        drawn(1, 9).expand(5, 9),
        wide.flatten().unfold(0, 9, 4),
    ):
        assert torch.allclose(products.linear(x, W), F.linear(x, W.contiguous()), atol=1e-5), W.stride()
    W = drawn(17, 9, seed=3)
    for b in (drawn(34)[::2], drawn(1).expand(17), drawn(1), drawn(1, 17)):
        assert torch.allclose(products.linear(x, W, b), F.linear(x, W, b.contiguous()), atol=1e-5), b.stride()
    rows = drawn(6, 18)[:, ::2].requires_grad_()
    (slope,) = torch.autograd.grad(products.linear(rows, W.requires_grad_()).sum(), W)
    assert torch.allclose(slope, rows.sum(0).expand(17, 9), atol=1e-5)


def test_where_no_gradient_of_x_is_wanted_weights_may_change(library: str) -> None:
    W = drawn(7, 9).requires_grad_()
    made = products.linear(drawn(6, 9, seed=1), W)
    with torch.no_grad():
        W.add_(1)
    made.sum().backward()
    assert torch.allclose(W.grad, drawn(6, 9, seed=1).sum(0).expand(7, 9), atol=1e-5)


def test_inference_autocast_copies_and_other_defaults(library: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(9, 7))
    products.quicken(model)
    x = drawn(6, 9)
    with torch.inference_mode():
        assert torch.allclose(model(x), F.linear(x, model[0].weight, model[0].bias), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(again[0]) is type(model[0]) and torch.equal(again(x), model(x))
    chosen = products.pays()
    products.pays.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert products.pays() == chosen
    finally:
        torch.set_default_dtype(before)


def test_an_unknown_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.VARIABLE, "onednnn")
    with pytest.raises(UsageError, match="onednn"):
        products.linear(drawn(6, 9), drawn(7, 9))


def test_vectors_and_nothing(library: str) -> None:
    assert torch.equal(products.linear(drawn(5), drawn(4, 5)), F.linear(drawn(5), drawn(4, 5)))
    assert products.linear(drawn(0, 5), drawn(4, 5)).shape == (0, 4)
    assert products.linear(drawn(2, 0, 5), drawn(4, 5)).shape == (2, 0, 4)


def test_layers_are_exchanged_with_their_parameters(library: str) -> None:
    inner, heard = torch.nn.Linear(6, 7), []
    inner.register_forward_hook(lambda *_: heard.append(1))
    model = torch.nn.Sequential(inner, torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(7, 3, bias=False))).eval()
    x = drawn(5, 6)
    before, names = model(x), [name for name, _ in model.named_parameters()]
    products.quicken(model)
    kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == ({products.Linear} if library == "onednn" else {torch.nn.Linear})
    assert torch.allclose(model(x), before, atol=1e-5) and not any(m.training for m in model.modules())
    assert [name for name, _ in model.named_parameters()] == names and model[0].weight is inner.weight
    assert model[2][0].bias is None and len(heard) == 2


XEON = (
    "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Platinum 8481C\nflags\t\t: fpu avx512f amx_tile\n"
)
EPYC = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu avx2 avx512f\n"
GRAVITON = "processor\t: 0\nBogoMIPS\t: 2100.00\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("capability", "told", "expected"),
    [("AVX512", EPYC, True), ("AVX512", XEON, False), ("AVX2", EPYC, False), ("AVX2", XEON, False), ("DEFAULT", GRAVITON, False)],
)
def test_an_avx512_processor_of_another_maker_gets_onednn(
    capability: str, told: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux tells of the processor; what was asked for goes first on every one, and both ways give the same product."""
    (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(products, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    x, W = drawn(6, 9), drawn(7, 9, seed=2)
    for asked, chosen in (("", expected), ("mkl", False), ("onednn", True)):
        monkeypatch.setenv(products.VARIABLE, asked)
        products.pays.cache_clear()
        assert products.pays() == chosen
        assert torch.allclose(products.linear(x, W), F.linear(x.double(), W.double()).float(), atol=1e-5)


def test_where_linux_tells_nothing_python_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(products.VARIABLE, raising=False)
    monkeypatch.setattr(products, "CPU_INFO", tmp_path / "nowhere")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for name, expected in (("Intel64 Family 6 Model 143, GenuineIntel", False), ("AMD64 Family 25, AuthenticAMD", True)):
        monkeypatch.setattr(products.platform, "processor", lambda name=name: name)
        products.pays.cache_clear()
        assert products.pays() == expected


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError, None])
def test_an_operation_that_is_gone_or_wrong_is_not_used(error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        if error is not None:
            raise error("no such operation")
        return F.linear(x, W, b) + 1.0

    monkeypatch.setenv(products.VARIABLE, "onednn")
    monkeypatch.setattr(products, "_product", product)
    assert not products.pays()
