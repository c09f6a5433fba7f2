"""Several dictionaries from one pass: each has the bits it would have alone, and what fails leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evalkit.errors import EvalkitError, SuiteError
from evalkit.training.data.batches import VectorSupply
from evalkit.training.loop.checkpoint import Checkpoint, CheckpointError
from evalkit.training.loop.members import Member, Result, Trained
from evalkit.training.loop.together import Together
from evalkit.training.loop.train import train, train_together
from evalkit.training.settings.config import TrainConfig, TrainingFailed, train_config
from evalkit.util.progress import Progress

QUIET = Progress(quiet=True)
HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planted(n: int = 4_000, d: int = 24, features: int = 48, seed: int = 5) -> torch.Tensor:
    """Sparse combinations (n, d) of unit rows around a common offset."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(features, d, generator=generator), dim=1)
    on = torch.rand(n, features, generator=generator) < 3 / features
    codes = on * (0.5 + torch.rand(n, features, generator=generator))
    return codes @ truth + 0.3 * torch.randn(d, generator=generator)


def config_of(**table: object) -> TrainConfig:
    return train_config({"features": 96, "tokens": 6_400, "batch": 128, "dead_after": 512, "order": 0, **table})


TOPK = [config_of(k=3), config_of(k=5, seed=1), config_of(k=3, seed=2, lr=5e-3)]
TIED = config_of(architecture="tied", l1=0.002)


def together(configs: list[TrainConfig], x: torch.Tensor, **more: object) -> list[Result]:
    members = [Member(f"member {i}", config, HOOK) for i, config in enumerate(configs)]
    supply = VectorSupply(x, configs[0].batch, configs[0].data_seed, identity="toy")
    return train_together(members, {HOOK: supply}, model="toy", progress=QUIET, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "configs",
    [
        [TOPK[0], TOPK[1], TIED, config_of(k=4, normalise=False, lr=1e-3)],
        [config_of(architecture="batchtopk", k=3, seed=seed) for seed in (0, 1)],
        [config_of(architecture="relu", l1=0.5, seed=seed) for seed in (0, 1)],
    ],
    ids=["several", "batchtopk", "relu"],
)
def test_training_together_gives_what_training_alone_gives(configs: list[TrainConfig]) -> None:
    x = planted()
    for config, result in zip(configs, together(configs, x), strict=True):
        single = train(config, x, hook_point=HOOK, model="toy", progress=QUIET)
        assert isinstance(result, Trained)
        assert result.dictionary.identity.hash == single.dictionary.identity.hash
        assert [row["loss"] for row in result.history] == [row["loss"] for row in single.history]
        assert result.dictionary.details["together"] == len(configs)


def test_each_hook_point_has_its_own_batches() -> None:
    data = {HOOK: planted(), OTHER: planted(seed=6)}
    config = TOPK[0]
    supplies = {hook: VectorSupply(x, config.batch, config.data_seed, identity=hook) for hook, x in data.items()}
    results = train_together([Member(hook, config, hook) for hook in data], supplies, model="toy", progress=QUIET)
    for (hook, x), result in zip(data.items(), results, strict=True):
        single = train(config, x, hook_point=hook, model="toy", progress=QUIET)
        assert isinstance(result, Trained) and result.dictionary.hook_point == hook
        for name, tensor in single.dictionary.tensors().items():
            assert torch.equal(result.dictionary.tensors()[name], tensor), name


def test_a_member_that_diverges_is_dropped_with_its_message() -> None:
    x = planted()
    wild = config_of(k=3, seed=9, lr=1e30)
    finished: list[int] = []
    results = together([TOPK[0], wild, TOPK[1]], x, finished=lambda i, _: finished.append(i))
    assert isinstance(results[1], TrainingFailed) and "lower lr" in results[1].fix and "member 1" in results[1].where
    assert finished == [0, 2]
    for i, config in ((0, TOPK[0]), (2, TOPK[1])):
        result = results[i]
        single = train(config, x, hook_point=HOOK, model="toy", progress=QUIET)
        assert isinstance(result, Trained)
        assert result.dictionary.identity.hash == single.dictionary.identity.hash
        assert [row["fvu"] for row in result.history] == [row["fvu"] for row in single.history]


def test_what_cannot_begin_is_a_result_and_the_others_are_trained() -> None:
    results = together([config_of(k=3), config_of(features=40, k=40), config_of(k=40, features=39)], planted())
    assert isinstance(results[0], Trained) and isinstance(results[1], Trained)
    assert isinstance(results[2], SuiteError)
    first = together([config_of(k=40, features=39), config_of(k=3)], planted())
    assert isinstance(first[0], SuiteError) and isinstance(first[1], Trained)
    flat = together([config_of(k=3)], torch.ones(50, 4))
    assert isinstance(flat[0], EvalkitError) and "do not vary" in flat[0].what


def test_one_pass_has_one_batch_size() -> None:
    with pytest.raises(SuiteError, match="64, 128"):
        together([config_of(), config_of(batch=64)], planted())


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    x = planted()
    configs = [*TOPK, config_of(k=3, seed=9, lr=1e30, warmup=0.0)]
    whole = together(configs, x)

    def checkpoint() -> Checkpoint:
        return Checkpoint(tmp_path / "run", every_steps=10)

    members = [Member(f"member {i}", config, HOOK) for i, config in enumerate(configs)]
    killed = Together(members, {HOOK: VectorSupply(x, 128, 0, identity="toy")}, model="toy", checkpoint=checkpoint())
    for _ in range(27):
        killed.step()
    again = together(configs, x, checkpoint=checkpoint())
    for one, two in zip(whole[:3], again[:3], strict=True):
        assert isinstance(one, Trained) and isinstance(two, Trained)
        assert one.dictionary.identity.hash == two.dictionary.identity.hash
        assert [row["loss"] for row in one.history] == [row["loss"] for row in two.history]
    assert isinstance(again[3], TrainingFailed) and str(again[3]) == str(whole[3])
    with pytest.raises(CheckpointError, match="another run: members member 1 own k was 5 and is 3"):
        together([configs[0], config_of(k=3, seed=1)], x, checkpoint=checkpoint())


def test_a_checkpoint_needs_members_of_one_length(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="tokens"):
        together([config_of(), config_of(tokens=1_000)], planted(), checkpoint=Checkpoint(tmp_path))
    short, long = together([config_of(k=3, tokens=1_280), config_of(k=3)], planted())
    assert isinstance(short, Trained) and isinstance(long, Trained)
    assert (short.history[-1]["step"], long.history[-1]["step"]) == (10, 50)
