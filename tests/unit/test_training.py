"""The trainer: known dictionaries are recovered, gradients are exact, runs repeat to the bit, bad runs say so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from evalkit.errors import DictionaryError, SuiteError
from evalkit.training.architectures import losses
from evalkit.training.architectures.base import TRAINABLES, Start
from evalkit.training.data.batches import batches, orders
from evalkit.training.loop.members import Trained
from evalkit.training.loop.train import train
from evalkit.training.loop.trainer import geometric_median, schedule
from evalkit.training.settings.config import TrainConfig, TrainingFailed, train_config
from evalkit.training.sparse_ops import topk as sparse
from evalkit.util.progress import Progress

QUIET = Progress(quiet=True)


def settings_of(**table: object) -> TrainConfig:
    return train_config({key: value for key, value in table.items() if value is not None})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config: TrainConfig, x: torch.Tensor | np.ndarray) -> Trained:
    return train(config, x, hook_point="blocks.0.hook_resid_post", model="toy", progress=QUIET)


def planted(n: int, d: int = 32, features: int = 64, active: float = 2, seed: int = 1234) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse combinations (n, d) of unit rows (features, d), strengths uniform in [0.5, 1.5), about ``active`` a vector."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(features, d, generator=generator), dim=1)
    on = torch.rand(n, features, generator=generator) < active / features
    codes = on * (0.5 + torch.rand(n, features, generator=generator))
    return codes @ truth, truth


def recovered(truth: torch.Tensor, directions: torch.Tensor) -> float:
    """Mean over true features of the largest cosine with a learned direction."""
    return float((truth @ torch.nn.functional.normalize(directions, dim=1).T).amax(1).mean())


TOPK = settings_of(architecture="topk", features=128, k=3, tokens=200_000, batch=256, lr=1e-2, dead_after=20_000)
SMALL: dict[str, dict[str, int]] = {"topk": {"k": 3}, "tied": {}}
TIED = settings_of(architecture="tied", features=128, l1=0.04, tokens=800_000, batch=256, lr=1e-2)


@pytest.mark.parametrize("config", [TOPK, TIED], ids=["topk", "tied"])
def test_a_planted_dictionary_is_recovered(config: TrainConfig) -> None:
    x, truth = planted(20_000)
    trained = run(config, x)
    assert recovered(truth, trained.dictionary.directions) > 0.9
    untrained = run(dataclasses.replace(config, tokens=config.batch), x)
    assert recovered(truth, untrained.dictionary.directions) < 0.7
    assert trained.history[-1]["fvu"] < 0.2 < untrained.history[-1]["fvu"]


@pytest.mark.parametrize("architecture", ["topk", "tied"])
def test_the_same_seed_gives_the_same_bits(architecture: str) -> None:
    x, _ = planted(500)
    config = settings_of(architecture=architecture, features=48, tokens=6_000, batch=100, dead_after=300, **SMALL[architecture])
    first, second = run(config, x), run(config, x)
    assert first.dictionary.identity.hash == second.dictionary.identity.hash
    assert [row["loss"] for row in first.history] == [row["loss"] for row in second.history]
    assert run(dataclasses.replace(config, seed=1), x).dictionary.identity.hash != first.dictionary.identity.hash


def test_a_memory_mapped_file_trains_as_memory_does(tmp_path) -> None:
    x, _ = planted(300)
    np.save(tmp_path / "x.npy", x.numpy())
    config = settings_of(features=48, k=3, tokens=1_000, batch=64)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert run(config, mapped).dictionary.identity.hash == run(config, x).dictionary.identity.hash


def test_topk_gradients_equal_dense_float64_autograd() -> None:
    B, D, F, k = 7, 5, 11, 3
    generator = torch.Generator().manual_seed(3)
    x, W, W_dec = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, D), (F, D), (F, D)))
    b, centre = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (F, D))
    target = torch.randn(B, D, generator=generator, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (W, b, centre, W_dec)]

    values, indices = sparse.encode(x, sparse.Weights(W, b, W_dec, centre), k)
    ours = torch.autograd.grad((sparse.decode(values, indices, W_dec) - target).square().sum(), leaves)

    pre = (x - centre) @ W.T + b
    kept = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
    dense = torch.autograd.grad((((pre * kept).relu() @ W_dec) - target).square().sum(), leaves)
    for got, want in zip(ours, dense, strict=True):
        assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("architecture", ["topk", "tied"])
@pytest.mark.parametrize("scale", [0.03, 7.0])
def test_the_input_scale_is_folded_exactly(architecture: str, scale: float) -> None:
    more = {"centre": True} if architecture == "tied" else {"k": 4}
    config = settings_of(architecture=architecture, features=20, **more)
    generator = torch.Generator().manual_seed(0)
    start = Start(20, torch.randn(6, generator=generator), 6.0, 1, generator)
    module = TRAINABLES.get(architecture)(config.own, start)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("b"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    x = torch.randn(50, 6, generator=generator)
    result = module(x, torch.zeros(20, dtype=torch.bool))
    dictionary = module.freeze(scale)
    assert torch.allclose(x / scale - dictionary.reconstruct(x / scale), result.residual / scale, atol=1e-5 / scale)
    assert result.l0 == pytest.approx(float((dictionary.encode(x / scale) != 0).sum(1).float().mean()))


@pytest.mark.parametrize("architecture", ["topk", "tied"])
def test_directions_are_of_unit_length_and_the_history_adds_up(architecture: str) -> None:
    x, _ = planted(400)
    trained = run(settings_of(architecture=architecture, features=40, tokens=2_010, batch=100, **SMALL[architecture]), x * 5 + 3)
    assert torch.allclose(trained.dictionary.directions.norm(dim=1), torch.ones(40), atol=1e-5)
    last = trained.history[-1]
    assert set(last) == {"step", "tokens", "loss", "fvu", "l0", "dead_share", "tokens_per_second"}
    assert (last["step"], last["tokens"]) == (21, 2_100)
    assert trained.dictionary.details["trained"]["features"] == 40


def test_silent_features_are_counted_as_dead() -> None:
    x, _ = planted(2_000)
    config = settings_of(features=256, k=1, tokens=20_000, batch=200, dead_after=10_000, lr=1e-2, auxk=0)
    end = run(config, x).history
    assert end[0]["dead_share"] == 0.0
    assert 0.2 < end[-1]["dead_share"] < 1.0
    never = run(dataclasses.replace(config, dead_after=30_000), x).history
    assert never[-1]["dead_share"] == 0.0


@pytest.mark.parametrize(("auxk", "learns"), [(None, True), (2, True), (0, False)])
def test_only_the_auxiliary_loss_teaches_dead_features(auxk: int | None, learns: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    module = TRAINABLES.get("topk")(settings_of(features=20, k=2, auxk=auxk).own, Start(20, torch.zeros(6), 6.0, 1, generator))
    dead = torch.arange(20) >= 12
    with torch.no_grad():
        module.b_enc[:12] += 50.0  # the dead never win a place among the k largest
    result = module(torch.randn(100, 6, generator=generator), dead)
    assert not result.fired[dead].any()
    result.loss.backward()
    for gradient in (module.W_dec.grad, module.W_enc.grad):
        assert gradient[:12].abs().sum() > 0 and bool(gradient[12:].abs().sum() > 0) == learns


def test_normalising_makes_the_result_independent_of_the_units() -> None:
    x, _ = planted(500)
    config = settings_of(features=48, k=3, tokens=4_000, batch=100)
    small, large = run(config, x).dictionary, run(config, x * 64).dictionary  # a power of two: no rounding differs
    assert torch.allclose(large.reconstruct(x * 64), 64 * small.reconstruct(x), rtol=1e-3, atol=1e-2)


def test_divergence_names_the_step_and_gives_nothing() -> None:
    x, _ = planted(200)
    with pytest.raises(TrainingFailed, match=r"at step \d+ of 40") as caught:
        run(settings_of(architecture="topk", features=40, k=2, tokens=4_000, batch=100, lr=1e30, warmup=0.0), x)
    assert "lower lr" in caught.value.fix


@pytest.mark.parametrize(
    "settings",
    [
        {"architecture": "topkk"},
        {"k": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"warmup": 0.9},
        {"architecture": "tied", "l1": -1.0},
        {"auxk": -1},
        {"l1": 0.1},
        {"recipe": "sealens"},
    ],
)
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(SuiteError):
        settings_of(**settings)


def test_fewer_features_than_k_are_refused() -> None:
    with pytest.raises(SuiteError, match="k = 32"):
        run(settings_of(features=8), planted(50)[0])


@pytest.mark.parametrize("bad", [torch.ones(10, 4), torch.zeros(10, 4), torch.full((10, 4), float("nan")), torch.ones(1, 4)])
def test_data_without_anything_to_learn_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(DictionaryError):
        run(settings_of(features=8, k=2), bad)


def test_the_paper_loss_in_its_code_scale() -> None:
    residual = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    module = TRAINABLES.get("tied")(
        settings_of(architecture="tied", l1=0.1).own, Start(3, torch.zeros(2), 2.0, 1, torch.Generator())
    )
    assert float(module.reconstruction_loss(residual)) == pytest.approx((1 + 4 + 0 + 1) / 4)
    assert float(losses.reconstruction(residual, "sum", 2.0)) == pytest.approx((1 + 4 + 0 + 1) / 2)
    assert float(losses.unexplained(residual, 2.0)) == pytest.approx((5 + 1) / 2 / 2)
    assert float(losses.auxiliary(torch.zeros(2, 2), residual)) == pytest.approx(1.0)


def test_the_schedule_rises_holds_and_falls() -> None:
    config = settings_of(warmup=0.1, decay=0.2)
    rates = [schedule(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == 1.0
    assert rates[-1] == pytest.approx(0.05) and all(a >= b for a, b in zip(rates[50:], rates[51:], strict=False))
    assert all(schedule(settings_of(warmup=0.0, decay=0.0), step, 3) == 1.0 for step in range(3))


def test_the_geometric_median_ignores_far_points() -> None:
    x = torch.cat([torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + 1, torch.full((20, 3), 1e4)])
    assert torch.allclose(geometric_median(x), torch.ones(3), atol=0.1)
    assert float(x.mean(0).norm()) > 1e3


@pytest.mark.parametrize("buffer", [10, 64, 10_000])
def test_every_pass_visits_every_row_once(buffer: int) -> None:
    stream = orders(203, buffer, torch.Generator().manual_seed(0), run=8)
    seen: list[int] = []
    while len(seen) < 203:
        block = next(stream)
        assert len(block) <= max(buffer, 8) or buffer > 203
        seen += block.tolist()
    assert sorted(seen) == list(range(203)) and seen != sorted(seen)


def test_batches_are_full_and_a_small_buffer_loses_nothing(tmp_path) -> None:
    rows = np.arange(203, dtype=np.float32)[:, None].repeat(2, 1)
    np.save(tmp_path / "x.npy", rows)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    supply = batches(mapped, 29, seed=0, buffer=64)
    taken = torch.cat([next(supply) for _ in range(7)])  # 203 = 7 * 29
    assert sorted(taken[:, 0].tolist()) == list(range(203))
    assert torch.equal(next(batches(mapped, 500, seed=0)).unique(), torch.arange(203.0))
    again = batches(mapped, 29, seed=0, buffer=64)
    assert torch.equal(torch.cat([next(again) for _ in range(7)]), taken)
    assert math.isfinite(float(taken.sum()))
