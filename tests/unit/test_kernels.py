"""The trainer's kernels: each equals its PyTorch twin and float64, repeats to the bit, compiles; the whole step is Trainer's.

Without a GPU the kernels run in Triton's interpreter, with one they run on it. Run as a script this file compiles every launch
below for a Hopper GPU instead, which needs none.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from evalkit.training.kernels import dense, functions, launch, oracles
from evalkit.training.kernels.oracles import Adam, Moments
from evalkit.training.loop.topk_step import FusedStep
from evalkit.training.loop.trainer import Trainer, begin
from evalkit.training.settings.config import TrainConfig, train_config
from evalkit.training.sparse_ops import topk as sparse
from evalkit.training.sparse_ops.types import Weights

COMPILING = __name__ == "__main__"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
KINDS = [torch.float32, torch.bfloat16]


def compile_instead(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Compile a launch for compute capability 9.0 and say so."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    types = ["*" + short[a.dtype] if isinstance(a, torch.Tensor) else "i32" for a in args]
    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    # as the real launch finds them: tensors begin, and most sizes are, at multiples of 16
    even = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(args) if isinstance(a, torch.Tensor) or a % 16 == 0}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, even)
    made = triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"] and made.metadata.shared <= 232_448  # what a block may have there
    print(kernel.__name__, constants, "shared", made.metadata.shared)


if TRITON:
    before = os.environ.get("TRITON_INTERPRET")
    if COMPILING:
        launch.launch = compile_instead
    elif DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # is read when kernels are made
    from evalkit.training.kernels import counts, gather, segments, select, update

    os.environ.pop("TRITON_INTERPRET", None) if before is None else None


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(got: torch.Tensor, want: torch.Tensor, kind: torch.dtype = torch.float32) -> None:
    """Relative distance as rounding allows; NaN never passes."""
    got, want = got.double().cpu(), want.double().cpu()
    distance = float((got - want).norm() / want.norm().clamp(min=1e-30))
    assert distance <= (1e-6 if kind == torch.float32 else 1e-2), distance


def codes(B: int, k: int, F: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Values with zeros among them, and indices of which the first is the same for all tokens."""
    values = drawn(B, k, seed=seed).relu()
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(F - 2, generator=generator)[:k] for _ in range(B)]).int() + 1
    indices[:, 0] = 0  # hot; F - 1 is never used
    return values, indices.to(DEVICE)


SHAPES = [(5, 3, 21, 37, KINDS[1]), (1, 1, 7, 5, KINDS[1]), (3, 20, 33, 40, KINDS[0]), (9, 4, 16, 600, KINDS[0])]
"""B, k, D, F: widths that are no powers of two, one token, k = 1, k above a block."""


@needs_triton
@pytest.mark.parametrize(("B", "k", "D", "F", "kind"), SHAPES)
@pytest.mark.parametrize("tile", [16_384, 64])
def test_decoding_with_error_and_dots(
    B: int, k: int, D: int, F: int, kind: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "TILE", tile)  # small: rows are read twice, in several blocks
    values, indices = codes(B, k, F)
    W, x, b = drawn(F, D, seed=2).to(kind), drawn(B, D, seed=3), drawn(D, seed=4)
    want = x.double() - torch.einsum("bk,bkd->bd", values.double(), W.double()[indices.long()]) - b.double()
    for made in (gather, oracles):
        got = made.decode_error(values, indices, W, x, b, torch.float32)
        close(got.residual, want)
        close(got.squares, want.square().sum(1))
        close(got.dots, torch.einsum("bd,bkd->bk", want, W.double()[indices.long()]), torch.float32)
        close(made.decode(values, indices, W), x.double() - b.double() - want)
        close(made.dots(x, indices, W), torch.einsum("bd,bkd->bk", x.double(), W.double()[indices.long()]))
        kept = made.decode_error(values, indices, W, x, b, kind)
        assert kept.residual.dtype == kind
        close(kept.residual, want, kind)
    close(dense.decode_error(values, indices, W.float(), x, b, torch.float32).dots, got.dots)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few groups, read in several turns, in the interpreter, which sorts slowly."""
    if DEVICE == "cpu" and TRITON:
        monkeypatch.setattr(select, "GROUPS", 8)
        monkeypatch.setattr(select, "WIDE", 32)


@needs_triton
@pytest.mark.parametrize(
    ("B", "k", "F", "kind"), [(2, 3, 37, KINDS[1]), (1, 1, 5, KINDS[0]), (1, 7, 150, KINDS[0]), (2, 5, 5, KINDS[1])]
)
def test_the_k_largest(B: int, k: int, F: int, kind: torch.dtype, narrow: None) -> None:
    scores, bias, norms = drawn(B, F, seed=5).to(kind), drawn(F, seed=6), drawn(F, seed=7).abs()
    for weigh in (None, norms):
        ranked = scores.float() + bias if weigh is None else (scores.float() + bias) * weigh
        best = ranked.topk(k, dim=1)
        raw = (scores.float() + bias).gather(1, best.indices)
        for made in (select, oracles):
            got = made.select(scores, bias, k, weigh, relu=weigh is not None)
            assert torch.equal(got.indices.long(), best.indices)
            assert torch.equal(got.values, raw if weigh is None else raw.relu())


@needs_triton
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_equal_scores_are_taken_by_the_lowest_index(scale: float, narrow: None) -> None:
    """Rounded scores, most of them equal, overflow the candidates' list; all equal ones do so in every row."""
    scores = (drawn(2, 130, seed=8) * scale).round()
    scores[0, ::2] = -0.0
    zero = torch.zeros(130, device=DEVICE)
    got, want = select.select(scores, zero, 5), oracles.select(scores, zero, 5)
    assert torch.equal(got.indices, want.indices) and torch.equal(got.values, want.values)
    if not scale:
        assert got.indices.tolist() == [[0, 1, 2, 3, 4]] * 2


@needs_triton
def test_places_that_nothing_may_fill_are_empty_and_nan_is_seen(narrow: None) -> None:
    scores, bias = drawn(2, 50, seed=9).abs() + 1, torch.zeros(50, device=DEVICE)
    allowed = torch.zeros(50, dtype=torch.bool, device=DEVICE)
    allowed[[11, 40]] = True
    for made in (select, oracles):
        got = made.select(scores, bias, 4, None, allowed)
        assert (got.values > 0).sum(1).tolist() == [2, 2]
        assert set(got.indices[:, :2].flatten().tolist()) == {11, 40} and not got.indices[:, 2:].any()
        assert torch.equal(got.values[:, :2], scores.gather(1, got.indices[:, :2].long()))
        assert not made.select(scores, bias, 4, None, allowed & False).values.any()
        broken = scores.clone()
        broken[1, 7] = float("nan")
        assert made.select(broken, bias, 4).values.isnan().any(1).tolist() == [False, True]


@needs_triton
def test_counts_ignore_other_keys() -> None:
    keys = torch.randint(0, 50, (3000,), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    want = torch.bincount(keys.cpu().long(), minlength=50)[:37]
    for made in (counts, oracles):
        assert torch.equal(made.counts(keys, 37).cpu().long(), want)


def by_hand(values: torch.Tensor, rows: torch.Tensor, source: torch.Tensor, keys: torch.Tensor, F: int) -> torch.Tensor:
    """The sums in float64, one pair after the other."""
    out = torch.zeros(F, source.shape[1], dtype=torch.float64)
    for value, row, key in zip(values.tolist(), rows.tolist(), keys.tolist(), strict=True):
        out[key] += value * source[row].double().cpu()
    return out


@needs_triton
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("B", "k", "D", "F", "kind"), [*SHAPES, (150, 2, 11, 6, KINDS[1])])
def test_weight_gradients_by_feature(
    B: int, k: int, D: int, F: int, kind: torch.dtype, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last shape has a feature with more pairs than two chunks; some features have none. In blocks of columns too."""
    if blocks:
        monkeypatch.setattr(segments, "WARP_D", 4)
        monkeypatch.setattr(segments, "WIDE_D", 16)
    values, indices = codes(B, k, F)
    flat, live = indices.flatten(), torch.ones(B * k, dtype=torch.bool, device=DEVICE)
    live[-1] = B == 1
    other, tokens = drawn(B * k, seed=11), torch.arange(B, device=DEVICE).repeat_interleave(k).int()
    first, second, used = drawn(B, D, seed=12).to(kind), drawn(2 * B, D, seed=13).to(kind), live.float()
    for made in (segments, oracles):
        pairs = made.by_feature(flat, live, F)
        got = made.segment_sums(pairs, values.flatten(), tokens, first, other, tokens + B, second)
        again = made.segment_sums(pairs, values.flatten(), tokens, first, other, tokens + B, second)
        on = (pairs.counts > 0).cpu()
        assert pairs.counts.sum() == live.sum() and not on[F - 1]
        close(got.decoder.cpu()[on], by_hand(values.flatten() * used, tokens, first, flat, F)[on])
        close(got.encoder.cpu()[on], by_hand(other * used, tokens + B, second, flat, F)[on])
        close(got.bias.cpu(), by_hand(other * used, tokens, torch.ones(B, 1), flat, F)[:, 0])
        assert all(torch.equal(one.cpu()[on], two.cpu()[on]) for one, two in zip(got, again, strict=True))
        alone = made.segment_sums(pairs, values.flatten(), tokens, first)
        assert torch.equal(alone.decoder.cpu()[on], got.decoder.cpu()[on]) and alone.encoder is None
    plain = dense.sums(values * used.view(B, k), other.view(B, k) * used.view(B, k), indices, F, first, second[B:])
    close(plain.encoder.cpu()[on], got.encoder.cpu()[on], kind)


def four(F: int, D: int) -> list[Moments]:
    """Decoder with unit rows, encoder, bias, b_dec: with gradients and moments from earlier steps."""
    made = []
    for i, shape in enumerate([(F, D), (F, D), (F,), (D,)]):
        p = [drawn(*shape, seed=20 + 4 * i + j) for j in range(4)]
        made.append(Moments(p[0], p[1], 0.1 * p[2], 0.1 * p[3].square()))
    made[0].weight.div_(made[0].weight.norm(dim=1, keepdim=True))
    return made


@needs_triton
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(("F", "D"), [(9, 21), (3, 1), (5, 64)])
def test_adam_with_the_constraint_equals_torch_and_float64(F: int, D: int, unit: bool) -> None:
    adam = Adam(torch.tensor([2e-3, 1.7, 0.8], device=DEVICE), 0.9, 0.999, 1e-8)
    counts_of = torch.arange(F, device=DEVICE).int() % 3  # every third was not used: its gradient is garbage
    results = []
    for made, kind in ((update, torch.float32), (oracles, torch.float32), (oracles, torch.float64)):
        dec, enc, bias, b_dec = (Moments(*(t.to(kind) for t in m)) for m in four(F, D))
        dec.gradient[counts_of == 0] = enc.gradient[counts_of == 0] = float("nan")
        shadows = [torch.empty(F, D, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
        norms = torch.empty(F, device=DEVICE, dtype=kind)
        squares = made.row_squares(dec.gradient, enc.gradient, counts_of, dec.weight if unit else None)
        made.adam_features(dec, enc, bias, counts_of, adam, unit, *shadows, norms)
        made.adam_vector(b_dec, adam)
        close(torch.cat(shadows), torch.cat([dec.weight, enc.weight]), torch.bfloat16)
        close(norms, dec.weight.norm(dim=1))
        results.append([squares, *(t for m in (dec, enc, bias, b_dec) for t in (m.weight, m.first, m.second))])
    for got, want, exact in zip(*results, strict=True):
        close(got, exact)
        close(want, exact)


def test_the_twins_are_torch_adam() -> None:
    dec, enc, bias, b_dec = four(6, 5)
    mine = [Moments(m.weight.clone(), m.gradient, m.first * 0, m.second * 0) for m in (dec, enc, bias)]
    theirs = [torch.nn.Parameter(m.weight.clone()) for m in (dec, enc, bias)]
    optimiser = torch.optim.Adam(theirs, lr=0.01, betas=(0.8, 0.99))
    used = torch.ones(6, dtype=torch.int32, device=DEVICE)
    for t in range(1, 6):
        for p, m in zip(theirs, mine, strict=True):
            p.grad = m.gradient.clone()
        optimiser.step()
        rates = torch.tensor([0.01 / (1 - 0.8**t), (1 - 0.99**t) ** -0.5, 1.0], device=DEVICE)
        oracles.adam_features(*mine, used, Adam(rates, 0.8, 0.99, 1e-8), False)
    for p, m in zip(theirs, mine, strict=True):
        close(m.weight, p.detach())


@pytest.mark.parametrize("norms", [False, True])
def test_the_functions_are_those_of_sparse(norms: bool, narrow: None) -> None:
    B, D, F, k = 3, 13, 20, 4
    x, target = drawn(B, D, seed=30), drawn(B, D, seed=31)
    leaves = [drawn(*shape, seed=32 + i) for i, shape in enumerate([(F, D), (F,), (F, D), (D,)])]
    gradients = []
    for made in (functions, sparse):
        parts = [leaf.clone().requires_grad_() for leaf in leaves]
        W_enc, b_enc, W_dec, b_dec = parts
        lengths = leaves[2].norm(dim=1) if norms else None
        if made is functions:
            values, indices = functions.encode(x, W_enc, b_enc, b_dec, lengths, k)
        else:
            values, indices = sparse.encode(x, Weights(W_enc, b_enc, W_dec, b_dec, lengths), k)
        loss = (made.decode(values, indices, W_dec) - target).square().sum()
        gradients.append(torch.autograd.grad(loss, parts))
    for got, want in zip(*gradients, strict=True):
        close(got, want)


def trainer(**table: Any) -> Trainer:
    config: TrainConfig = train_config({"features": 48, "k": 3, "batch": 32, "tokens": 32 * 20, "seed": 4, **table})
    made = Trainer(config, begin(config, drawn(400, 12, seed=40).cpu() + 1, "toy"), DEVICE)
    with torch.no_grad():
        made.module.b_enc[:8] -= 2.0  # these are seldom among the largest
    return made


@pytest.mark.parametrize(
    "table",
    [
        {"dead_after": 64, "clip": 0.5},
        {"dead_after": 96, "decoder": "free", "auxk_form": "error", "auxk_weight": 1.0, "error": "sum", "auxk_relu": False},
        {"dead_after": 64, "auxk_form": "variance", "error": "mean", "auxk": 3, "auxk_silent": True},
        {"dead_after": 10_000, "variance": "batch", "normalise": False},
        {"dead_after": 64, "auxk": 0, "clip": 1e-3, "beta1": 0.0},
    ],
)
@pytest.mark.parametrize("watch", [1, 32])
def test_twenty_steps_are_those_of_the_trainer(table: dict[str, Any], watch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalkit.training.loop.topk_step.WATCH", watch)  # 1: the auxiliary part comes and goes
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the twins on a CPU; kernels and graphs on a GPU
    plain, fast = trainer(**table), trainer(**table)
    assert FusedStep.fits(fast)
    fused = FusedStep(fast, torch.float32)
    start, died = fast.module.W_dec.detach().clone(), False
    for i in range(20):
        x = drawn(32, 12, seed=100 + i) + 1
        want, got = plain.step(x), fused.step(x)
        for name in ("loss", "fvu", "l0"):
            assert float(getattr(got, name)) == pytest.approx(float(getattr(want, name)), rel=2e-5), (i, name)
        assert torch.equal(plain.quiet_for, fast.quiet_for)
        died |= bool(fast.dead.any())
    for (name, a), (_, b) in zip(plain.module.named_parameters(), fast.module.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5), name
    assert not torch.allclose(fast.module.W_dec, start, atol=1e-3)
    assert died == (table["dead_after"] < 1000) and fast.steps_done == 20
    assert float(fast.optimiser.state[fast.module.W_enc]["step"]) == int(fast.module.step_number) == 20


def test_a_fused_run_goes_on_from_a_checkpoint_and_the_plain_step_takes_over() -> None:
    whole, first = trainer(dead_after=64), trainer(dead_after=64)
    batches = [drawn(32, 12, seed=200 + i) + 1 for i in range(9)]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        steps = FusedStep(whole)
        for x in batches:
            steps.step(x)
        before, used = FusedStep(first), trainer(dead_after=64, seed=5)
        for x in batches[:4]:
            before.step(x)
        after = FusedStep(used)
        after.step(batches[0])  # has a state of its own, which loading replaces
        used.load_state(first.state())
        for x in batches[4:8]:
            after.step(x)
        used.step(batches[8])
    for a, b in zip(whole.module.parameters(), used.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_two_whole_steps_by_kernels(kind: torch.dtype, narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has dead features."""
    monkeypatch.setattr("evalkit.training.loop.topk_step.WATCH", 1)
    by_kernels, by_twins = (trainer(features=12, k=2, batch=3, dead_after=3, auxk=2, clip=1.0) for _ in range(2))
    one, two = FusedStep(by_kernels, kind), FusedStep(by_twins, kind)
    for i in range(2):
        x = drawn(3, 12, seed=300 + i)
        got = one.step(x)
        with monkeypatch.context() as patch:
            patch.setattr("evalkit.training.kernels.ops.ready", lambda tensor: False)
            want = two.step(x)
        assert float(got.loss) == pytest.approx(float(want.loss), rel=1e-5 if kind == torch.float32 else 2e-2)
    assert by_kernels.dead.any()
    for a, b in zip(by_kernels.module.parameters(), by_twins.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5 if kind == torch.float32 else 5e-3)


def test_dense_products_give_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    few, many = trainer(dead_after=64, clip=1.0), trainer(dead_after=64, clip=1.0)
    sparse_step, dense_step = FusedStep(few), FusedStep(many)
    for i in range(5):
        x = drawn(32, 12, seed=400 + i)
        sparse_step.step(x)
        with monkeypatch.context() as patch:
            patch.setattr("evalkit.training.loop.topk_step.sparse_pays", lambda k, features, device: False)
            dense_step.step(x)
    for a, b in zip(few.module.parameters(), many.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


@needs_triton
def test_every_kernel_compiles_for_a_hopper_gpu() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in (
        "bag",
        "dots",
        "count",
        "plan",
        "sum",
        "combine",
        "candidates",
        "order",
        "features",
        "vector",
        "squares",
    ):
        assert f"_{name} " in done.stdout


def compile_everything() -> None:
    """Launch each kernel once at a size of real runs; ``compile_instead`` compiles it."""
    B, k, D, F, kind = 8, 32, 512, 4096, torch.bfloat16
    W, rows, b = torch.empty(F, D, dtype=kind), torch.empty(B, D, dtype=kind), torch.empty(F)
    values, indices, tokens = torch.empty(B, k), torch.zeros(B, k, dtype=torch.int32), torch.zeros(B * k, dtype=torch.int32)
    gather.decode_error(values, indices, W, torch.empty(B, D), torch.empty(D), kind)
    gather.decode(values, indices, torch.empty(F, 2304, dtype=kind))
    gather.dots(rows, indices, W)
    select.select(torch.empty(B, F, dtype=kind), b, k, b, torch.ones(F, dtype=torch.bool))
    pairs = segments.Pairs(torch.arange(B * k), torch.zeros(F, dtype=torch.int32))
    for width in (D, 2304):
        rows = torch.empty(B, width, dtype=kind)
        segments.segment_sums(pairs, values.flatten(), tokens, rows, values.flatten(), tokens, rows)
    counts.counts(tokens, F)
    adam = Adam(torch.ones(3), 0.9, 0.999, 1e-8)
    dec, enc, bias, b_dec = (Moments(*[torch.empty(shape)] * 4) for shape in ((F, D), (F, D), (F,), (D,)))
    shadows = [torch.empty(F, D, dtype=kind) for _ in range(2)]
    update.adam_features(dec, enc, bias, pairs.counts, adam, True, *shadows, b)
    update.adam_vector(b_dec, adam)
    update.row_squares(dec.gradient, enc.gradient, pairs.counts, dec.weight)


if COMPILING:
    compile_everything()
