"""Every trainable architecture: gradients equal dense float64 autograd, scales fold, runs repeat and go on to the bit."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from evalkit.activations import synthetic as toy
from evalkit.dictionaries.matryoshka import Matryoshka
from evalkit.errors import SuiteError
from evalkit.training.architectures.base import TRAINABLES, Start, Trainable
from evalkit.training.architectures.matryoshka import group_sizes
from evalkit.training.architectures.penalties import STEPS, Annealed, risen
from evalkit.training.loop.members import Trained
from evalkit.training.loop.train import train
from evalkit.training.loop.trainer import Trainer, begin
from evalkit.training.settings.config import TrainConfig, TrainingFailed, train_config
from evalkit.training.sparse_ops import pairs as reading
from evalkit.training.sparse_ops.types import Weights
from evalkit.util.progress import Progress

CASES: dict[str, dict[str, Any]] = {
    "relu": {"architecture": "relu", "l1": 1.0},
    "relu unit": {"architecture": "relu", "l1": 0.5, "decoder": "unit", "error": "mean"},
    "relu annealed": {"architecture": "relu", "l1": 1.0, "penalty": "anneal"},
    "gated": {"architecture": "gated", "l1": 1.0},
    "gated free": {"architecture": "gated", "l1": 1.0, "decoder": "free"},
    "batchtopk": {"architecture": "batchtopk", "k": 3.5},
    "batchtopk free": {"architecture": "batchtopk", "k": 3, "decoder": "free"},
    "jumprelu": {"architecture": "jumprelu", "sparsity": 0.02, "bandwidth": 0.8},
    "jumprelu tanh": {
        "architecture": "jumprelu",
        "penalty": "tanh",
        "sparsity": 0.02,
        "bandwidth": 0.8,
        "slope_to": "all",
        "decoder": "free",
    },
    "jumprelu target": {"architecture": "jumprelu", "penalty": "target", "target_l0": 3.0, "sparsity": 1.0, "bandwidth": 0.8},
    "matryoshka": {"architecture": "matryoshka", "k": 3, "fractions": (0.25, 0.25, 0.5)},
    "matryoshka sum": {"architecture": "matryoshka", "k": 3, "fractions": (0.3, 0.7), "prefix_weight": 1.0, "decoder": "free"},
}
every_case = pytest.mark.parametrize("table", CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config: TrainConfig, x: torch.Tensor) -> Trained:
    return train(config, x, hook_point="blocks.0.hook_resid_post", model="toy", progress=Progress(quiet=True))


def module_of(table: dict[str, Any], features: int = 20, width: int = 6, step: int = 50) -> tuple[Trainable, torch.Generator]:
    """A module in the middle of a run of 100 steps, every parameter away from its start."""
    generator = torch.Generator().manual_seed(0)
    config = train_config({**table, "features": features})
    start = Start(features, torch.randn(width, generator=generator), 5.0, 100, generator)
    module = TRAINABLES.get(config.architecture)(config.own, start, config.error, config.compute)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            size = 1.0 if name[0] in "br" else parameter.norm(dim=-1, keepdim=True)
            parameter += 0.2 * size * torch.randn(parameter.shape, generator=generator)
        if hasattr(module, "threshold"):
            module.threshold.add_(0.5).abs_()
        module.constrain_weights()
        module.step_number.fill_(step)
    return module, generator


def dense_loss(name: str, module: Any, x: torch.Tensor) -> torch.Tensor:
    """Each architecture's loss as its paper writes it, on all B x F codes, for autograd."""
    own = module.own
    W, b, W_dec, b_dec = module.W_enc, module.b_enc, module.W_dec, module.b_dec
    pre = (x - b_dec) @ W.T + b
    lengths = W_dec.norm(dim=1) if own.decoder == "free" else torch.ones(len(W)).double()
    scale = {"sum": 1.0, "mean": 1 / x.shape[1], "fvu": 1 / module.start.variance}[module.error]

    def error(x_hat: torch.Tensor) -> torch.Tensor:
        return scale * (x - x_hat).square().sum(1).mean()

    if name == "relu":
        codes = pre.relu()
        return error(codes @ W_dec + b_dec) + own.l1 * (codes * lengths).sum(1).mean()
    if name == "gated":
        read = (x - b_dec) @ W.T
        gate = (read + b).relu()
        codes = (read * module.r_mag.exp() + module.b_mag).relu() * (read + b > 0)
        by_gate = gate @ W_dec.detach() + b_dec.detach()
        return error(codes @ W_dec + b_dec) + own.l1 * (gate * lengths).sum(1).mean() + error(by_gate)
    if name == "jumprelu":
        theta, width = module.threshold, own.bandwidth
        inside = (((pre - theta) / width).abs() < 0.5).double()
        # a term that is 0 and has the slope of the straight-through estimator
        stand_in = (theta.detach() - theta) + ((pre - pre.detach()) if own.slope_to == "all" else 0)
        codes = pre * (pre > theta) + (theta / width * inside).detach() * stand_in
        count = ((pre > theta) + (inside / width) * stand_in).sum(1).mean()
        penalty = {
            "step": count,
            "target": (count / (own.target_l0 or 1) - 1) ** 2,
            "tanh": torch.tanh(own.tanh_scale * codes * W_dec.norm(dim=1)).sum(1).mean(),
        }[own.penalty]
        return error(codes @ W_dec + b_dec) + own.sparsity * penalty
    ranked = (pre * lengths.detach()).relu().flatten()
    kept = torch.zeros_like(ranked).scatter(0, ranked.topk(round(own.k * len(x))).indices, 1.0).view_as(pre)
    codes = pre.relu() * kept
    if name == "batchtopk":
        return error(codes @ W_dec + b_dec)
    ends = torch.tensor(module.sizes).cumsum(0).tolist()
    weight = own.prefix_weight or 1 / len(ends)
    return sum((weight * error(codes[:, :end] @ W_dec[:end] + b_dec) for end in ends), torch.zeros(()).double())


@pytest.mark.parametrize("few", [0.0, 1.0], ids=["dense", "pairs"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "relu annealed"])
def test_loss_and_gradients_equal_dense_float64_autograd(name: str, few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "FEW", few)
    module, generator = module_of(CASES[name])
    module.double()
    x = torch.randn(40, 6, generator=generator).double()
    result = module(x, torch.zeros(20, dtype=torch.bool))
    parameters = list(module.parameters())
    got = torch.autograd.grad(result.loss, parameters)
    loss = dense_loss(CASES[name]["architecture"], module, x)
    want = torch.autograd.grad(loss, parameters)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for ours, theirs in zip(got, want, strict=True):
        assert theirs.abs().max() > 1e-3  # the case tests something
        assert torch.allclose(ours, theirs, atol=1e-11)


@every_case
@pytest.mark.parametrize("scale", [0.03, 7.0])
def test_the_input_scale_is_folded_exactly(table: dict[str, Any], scale: float) -> None:
    module, generator = module_of(table, step=0)
    x = torch.randn(50, 6, generator=generator)
    result = module(x, torch.zeros(20, dtype=torch.bool))
    if "topk" in table["architecture"] or table["architecture"] == "matryoshka":
        module.threshold *= 0.99999  # it is the smallest kept code now, and what equals it would not be kept
    dictionary = module.freeze(scale)
    assert torch.allclose(x / scale - dictionary.reconstruct(x / scale), result.residual / scale, atol=1e-5 / scale)
    codes = dictionary.encode(x / scale) != 0
    assert float(result.l0) == pytest.approx(float(codes.sum(1).float().mean()))
    assert torch.equal(result.fired, codes.any(0))
    assert 0 < result.l0 < 20


@every_case
def test_the_same_seed_gives_the_same_bits(table: dict[str, Any]) -> None:
    x = toy.superposition(400, width=16, features=24, active=2.0).x
    config = train_config({**table, "features": 32, "tokens": 4_000, "batch": 100, "dead_after": 300})
    first, second = run(config, x), run(config, x)
    assert first.dictionary.identity.hash == second.dictionary.identity.hash
    assert [row["loss"] for row in first.history] == [row["loss"] for row in second.history]
    assert run(dataclasses.replace(config, seed=1), x).dictionary.identity.hash != first.dictionary.identity.hash


@every_case
def test_a_saved_run_goes_on_to_the_bit(table: dict[str, Any]) -> None:
    x = toy.superposition(640, width=16, features=24, active=2.0).x
    config = train_config({**table, "features": 32, "tokens": 30 * 64, "batch": 64, "dead_after": 200})
    batches = [x[(64 * i) % 640 :][:64] for i in range(30)]

    def trainer() -> Trainer:
        return Trainer(config, begin(config, x, "toy"))

    whole = trainer()
    losses = [whole.step(batch).loss for batch in batches]
    before = trainer()
    for batch in batches[:13]:
        before.step(batch)
    file = io.BytesIO()
    torch.save(before.state(), file)
    file.seek(0)
    after = trainer()
    after.load_state(torch.load(file, weights_only=True))
    assert [after.step(batch).loss for batch in batches[13:]] == losses[13:]
    for (name, ours), theirs in zip(after.module.state_dict().items(), whole.module.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(after.quiet_for, whole.quiet_for)


@every_case
def test_divergence_names_the_step(table: dict[str, Any]) -> None:
    x = toy.superposition(200, width=16, features=24, active=2.0).x
    config = train_config({**table, "features": 32, "tokens": 4_000, "batch": 100, "lr": 1e30, "warmup": 0.0})
    with pytest.raises(TrainingFailed, match=r"at step \d+ of 40") as caught:
        run(config, x)
    assert "lower lr" in caught.value.fix


@every_case
def test_decoder_rows_keep_their_rule(table: dict[str, Any]) -> None:
    x = toy.superposition(400, width=16, features=24, active=2.0).x
    trained = run(train_config({**table, "features": 32, "tokens": 4_000, "batch": 100}), x * 5 + 3)
    lengths = trained.dictionary.directions.norm(dim=1)
    held = table.get("decoder", "free" if table["architecture"] == "relu" else "unit") == "unit"
    by_codes = table["architecture"] in ("batchtopk", "matryoshka")  # they divide directions by the lengths
    assert torch.allclose(lengths, torch.ones(32), atol=1e-5) == (held or by_codes)
    assert trained.history[-1]["fvu"] < trained.history[0]["fvu"]


@pytest.mark.parametrize(
    "table",
    [
        {"architecture": "relu", "l1": -1.0},
        {"architecture": "relu", "p_end": 0.0},
        {"architecture": "relu", "anneal_from": 1.0},
        {"architecture": "gated", "l1_warmup": -0.1},
        {"architecture": "gated", "penalty": "anneal"},
        {"architecture": "batchtopk", "k": 0},
        {"architecture": "batchtopk", "threshold_rate": 0.0},
        {"architecture": "jumprelu", "bandwidth": 0.0},
        {"architecture": "jumprelu", "penalty": "target"},
        {"architecture": "jumprelu", "target_l0": 3.0},
        {"architecture": "matryoshka", "fractions": (0.5, 0.4)},
        {"architecture": "matryoshka", "prefix_weight": 0.0},
    ],
)
def test_impossible_settings_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(SuiteError):
        train_config(table)


@pytest.mark.parametrize(
    ("table", "word"),
    [({"architecture": "batchtopk", "k": 40}, "k = 40"), ({"architecture": "matryoshka", "k": 2}, "group without any")],
)
def test_too_few_features_are_refused(table: dict[str, Any], word: str) -> None:
    with pytest.raises(SuiteError, match=word):
        train_config({**table, "features": 8}).n_features(4)


def chosen(ranked: torch.Tensor, count: int, norms: torch.Tensor | None = None) -> torch.Tensor:
    """Flat places that ``largest`` picks where the encoder is the identity."""
    n = ranked.shape[1]
    pairs = reading.largest(ranked, Weights(torch.eye(n), torch.zeros(n), torch.eye(n), torch.zeros(n), norms), count)
    assert torch.equal(pairs.pre, ranked[pairs.places.tokens, pairs.places.features])
    return pairs.places.tokens * n + pairs.places.features


@pytest.mark.parametrize("block", [1 << 20, 700])
@pytest.mark.parametrize("count", [1, 7, 300, 4_000, 9_000, 12_800, 20_000])
def test_the_largest_of_a_batch_are_those_of_a_full_sort(count: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", block)
    generator = torch.Generator().manual_seed(count)
    pre, norms = torch.randn(128, 100, generator=generator), 0.5 + torch.rand(100, generator=generator)
    for ranked, weights in ((pre, None), (pre * norms, norms)):
        want = ranked.flatten().sort(descending=True)
        expected = want.indices[:count][want.values[:count] > 0].sort().values
        assert torch.equal(chosen(pre, count, weights), expected)


def test_the_largest_are_found_where_the_sampled_rows_mislead() -> None:
    ranked = torch.rand(256, 10, generator=torch.Generator().manual_seed(0))
    ranked[:: 256 // reading.SAMPLE_ROWS] += 100  # only the rows that are looked at are large
    assert torch.equal(chosen(ranked, 1_000), ranked.flatten().topk(1_000).indices.sort().values)
    assert len(chosen(torch.ones(64, 10), 100)) == 100


def test_features_that_nothing_activates_give_an_empty_batch() -> None:
    for name in ("relu", "batchtopk", "matryoshka", "gated"):
        module, generator = module_of(CASES[name])
        with torch.no_grad():
            module.b_enc -= 1e3
        x = torch.randn(10, 6, generator=generator)
        result = module(x, torch.zeros(20, dtype=torch.bool))
        result.loss.backward()
        assert float(result.l0) == 0 and torch.allclose(result.residual, x - module.b_dec)
        assert torch.isfinite(module.b_dec.grad).all()


def test_the_threshold_is_a_mean_and_then_a_moving_average() -> None:
    module, generator = module_of({"architecture": "batchtopk", "k": 2, "threshold_rate": 0.25}, step=0)
    dead = torch.zeros(20, dtype=torch.bool)
    seen: list[float] = []
    for step in range(8):
        module.step_number.fill_(step)
        x = torch.randn(30, 6, generator=generator)
        module(x, dead)
        pre = (x - module.b_dec) @ module.W_enc.T + module.b_enc
        seen.append(pre.flatten().topk(60).values[-1].item())
    expected = sum(seen[:4]) / 4
    for value in seen[4:]:
        expected = 0.75 * expected + 0.25 * value
    assert float(module.threshold) == pytest.approx(expected, rel=1e-4)
    assert module.buffers_to_average() == []  # processes that train together choose from the whole batch
    module.eval()
    module(x * 10, dead)
    assert float(module.threshold) == pytest.approx(expected, rel=1e-4)


def test_the_finished_batchtopk_has_k_active_features_on_new_data() -> None:
    data = toy.superposition(12_000, width=32, features=64, active=3.0)
    config = train_config(
        {"architecture": "batchtopk", "features": 96, "k": 3, "tokens": 30_000, "batch": 100, "lr": 5e-3, "threshold_rate": 0.05}
    )
    codes = run(config, data.x[:10_000]).dictionary.encode(data.x[10_000:])
    assert float((codes != 0).sum(1).float().mean()) == pytest.approx(3, rel=0.15)
    assert (codes != 0).sum(1).float().std() > 0.5  # some tokens have more than others


def test_nested_parts_of_a_matryoshka_are_its_prefixes() -> None:
    assert group_sizes((1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32), 2304) == [72, 144, 288, 576, 1224]
    assert sum(group_sizes((0.1, 0.2, 0.7), 37)) == 37
    module, generator = module_of(CASES["matryoshka"], step=0)
    x = torch.randn(50, 6, generator=generator)
    result = module(x, torch.zeros(20, dtype=torch.bool))
    module.threshold *= 0.99999
    dictionary = module.freeze(2.0)
    assert isinstance(dictionary, Matryoshka) and dictionary.groups == [5, 5, 10]
    errors = [(x / 2 - dictionary.nested(n).reconstruct(x / 2)).square().sum(1).mean() * 4 / 5 for n in (1, 2, 3)]
    assert result.loss.item() == pytest.approx(float(sum(errors) / 3), rel=1e-4)


def test_free_decoders_gain_nothing_by_shrinking_codes() -> None:
    module, generator = module_of(CASES["relu"])
    x = torch.randn(50, 6, generator=generator)
    dead = torch.zeros(20, dtype=torch.bool)
    before = module(x, dead).loss.item()
    with torch.no_grad():
        module.W_enc /= 10
        module.b_enc /= 10
        module.W_dec *= 10
    assert module(x, dead).loss.item() == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("name", ["jumprelu", "batchtopk"])
def test_dead_features_are_taught(name: str) -> None:
    dead = torch.arange(20) >= 12
    for weight, learns in ((1.0, True), (0.0, False)):
        key = "pre_act" if name == "jumprelu" else "auxk_weight"
        module, generator = module_of({**CASES[name], key: weight})
        with torch.no_grad():
            module.b_enc[12:] -= 50.0 if name == "jumprelu" else 0.0
            module.b_enc[:12] += 0.0 if name == "jumprelu" else 50.0
        result = module(torch.randn(100, 6, generator=generator), dead)
        assert not result.fired[dead].any()
        result.loss.backward()
        assert module.W_enc.grad[:12].abs().sum() > 0 and bool(module.W_enc.grad[12:].abs().sum() > 0) == learns


def test_jumprelu_reaches_its_target_and_keeps_thresholds_positive() -> None:
    data = toy.superposition(10_000, width=32, features=64, active=3.0)
    table = {"architecture": "jumprelu", "penalty": "target", "target_l0": 4.0, "sparsity": 1.0, "bandwidth": 1.0}
    trained = run(train_config({**table, "features": 96, "tokens": 40_000, "batch": 100, "lr": 1e-2, "threshold": 0.0}), data.x)
    assert trained.history[-1]["l0"] == pytest.approx(4, rel=0.2) and trained.history[0]["l0"] > 8
    threshold = trained.dictionary.tensors()["threshold"]
    assert (threshold >= 0).all() and threshold.max() > 0.1


def test_penalties_rise() -> None:
    assert [risen(step, 100, 0.1) for step in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert [risen(step, 100, 20.0) for step in (0, 5, 40)] == [0.0, 0.25, 1.0]
    assert risen(0, 100, 0.0) == 1.0


@pytest.mark.parametrize("steps", [200, 12, 7])
def test_annealing_lowers_p_without_a_jump(steps: int) -> None:
    annealed = Annealed(p_end=0.2, begins=0.5)
    codes = torch.tensor([[0.0, 0.0, 3.0], [1e-6, 2.0, 0.5]], requires_grad=True)
    sizes, slopes = [], []
    for step in range(steps):
        size = annealed(codes, 2, step, steps)
        (slope,) = torch.autograd.grad(size, codes)
        assert torch.isfinite(slope).all()
        sizes.append(size.item())
        slopes.append(float(slope[0, 2] / slope[1, 2]))
    assert sizes == pytest.approx([5.5 / 2] * steps, rel=1e-3)  # codes stand still, so the size does
    assert int(annealed.stage) == annealed.due(steps - 1, steps) and annealed.power(STEPS - 1) == pytest.approx(0.2)
    assert slopes[0] == slopes[steps // 2] == 1.0  # L1 pushes all codes alike
    last = annealed.power(int(annealed.stage))
    assert (last == pytest.approx(0.2)) == (steps == 200)
    assert slopes[-1] == pytest.approx((3.0 / 0.5) ** (last - 1), rel=0.01)  # at the end the strong one is pushed least
