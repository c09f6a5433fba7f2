"""Ensembles: a member is the autoencoder it would be alone; stacks agree to rounding; what fails leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evalkit.errors import EvalkitError, SuiteError
from evalkit.progress import Progress
from evalkit.training.checkpoint import Checkpoint, CheckpointError
from evalkit.training.config import TrainConfig, TrainingFailed, train_config
from evalkit.training.ensemble import Ensemble, Stack, stack_key
from evalkit.training.loop import train, train_together
from evalkit.training.members import Member, Result, Trained
from evalkit.training.supply import VectorSupply
from evalkit.training.together import Together
from evalkit.training.trainer import Step, Trainer, begin

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


TOPK = [
    config_of(k=3),
    config_of(k=5, seed=1),
    config_of(k=3, seed=2, lr=5e-3),
    config_of(k=3, seed=3, clip=0.05, dead_after=256),
    config_of(k=5, seed=4, auxk=4, auxk_weight=0.2, auxk_form="error"),
    config_of(k=3, seed=5, auxk=0, beta1=0.5, lr=5e-3),
]
FREE = [config_of(k=k, seed=k, decoder="free", error="sum") for k in (2, 4, 4)]
TIED = [
    config_of(architecture="tied", l1=0.002),
    config_of(architecture="tied", l1=0.02, seed=1),
    config_of(architecture="tied", l1=0.005, seed=2, lr=4e-3, clip=0.01),
]


def trainers(configs: list[TrainConfig], x: torch.Tensor) -> list[Trainer]:
    return [Trainer(config, begin(config, x, HOOK)) for config in configs]


def batch(x: torch.Tensor, number: int, size: int = 128) -> torch.Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(number))[:size]]


def alone(config: TrainConfig, x: torch.Tensor, steps: int) -> tuple[Trainer, list[Step]]:
    trainer = trainers([config], x)[0]
    return trainer, [trainer.step(batch(x, number)) for number in range(steps)]


def same_to_rounding(member: Trainer, other: Trainer, tolerance: float = 1e-5) -> None:
    for (name, mine), theirs in zip(member.module.named_parameters(), other.module.parameters(), strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max(), name
    assert torch.equal(member.quiet_for, other.quiet_for)


@pytest.mark.parametrize("configs", [TOPK, FREE, TIED], ids=["topk", "free", "tied"])
def test_stacked_members_equal_single_runs(configs: list[TrainConfig]) -> None:
    x = planted()
    members = trainers(configs, x)
    ensemble = Ensemble(members, [HOOK] * len(members))
    assert ensemble.stacks == [list(range(len(configs)))]
    reports = [ensemble.step({HOOK: batch(x, number)}) for number in range(50)]
    died = 0
    for i, config in enumerate(configs):
        single, steps = alone(config, x, 50)
        died += int(single.dead.sum())
        same_to_rounding(members[i], single)
        for report, step in zip(reports, steps, strict=True):
            assert torch.allclose(torch.stack(report[i]), torch.stack(step), rtol=1e-5)
    assert configs is TIED or died > 0  # so that the loss for dead features was at work


@pytest.mark.parametrize(
    "table", [{"k": 3}, {"architecture": "tied"}, {"architecture": "batchtopk", "k": 3}, {"architecture": "relu", "l1": 0.5}]
)
def test_members_stepped_one_after_the_other_are_the_same_bits(table: dict) -> None:
    x = planted()
    configs = [config_of(**table, seed=seed) for seed in (0, 1)]
    members = trainers(configs, x)
    ensemble = Ensemble(members, [HOOK, HOOK], batched=False)
    assert ensemble.stacks == []
    for number in range(20):
        ensemble.step({HOOK: batch(x, number)})
    for member, config in zip(members, configs, strict=True):
        single, _ = alone(config, x, 20)
        for mine, theirs in zip(member.module.state_dict().values(), single.module.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs)


def test_only_members_that_fit_are_stacked() -> None:
    x = planted()
    configs = [
        config_of(k=3),
        config_of(k=4),
        config_of(k=3, features=44),
        *TIED[:2],
        config_of(k=3),
        config_of(k=3, decoder="free"),
    ]
    hooks = [HOOK] * 5 + [OTHER, HOOK]
    ensemble = Ensemble(trainers(configs, x), hooks)
    assert ensemble.stacks == [[0, 1], [3, 4]]
    assert sorted(ensemble.step({HOOK: batch(x, 0), OTHER: batch(x, 1)})) == list(range(7))


def test_each_hook_point_has_its_own_batches() -> None:
    x, y = planted(), planted(seed=6)
    config = config_of(k=3)
    members = [Trainer(config, begin(config, data, HOOK)) for data in (x, y)]
    ensemble = Ensemble(members, [HOOK, OTHER])
    for number in range(5):
        ensemble.step({HOOK: batch(x, number), OTHER: batch(y, number)})
    for member, data in zip(members, (x, y), strict=True):
        single, _ = alone(config, data, 5)
        assert torch.equal(member.module.W_enc, single.module.W_enc)


def test_a_stack_shares_memory_with_its_members() -> None:
    x = planted()
    members = trainers(TOPK, x)
    stack = Stack(members)
    stack.step(batch(x, 0))
    for member in members:
        place = stack.trainers.index(member)
        assert member.module.W_enc.data_ptr() == stack.stacked["W_enc"][place].data_ptr()
        moments = member.optimiser.state[member.module.W_enc]["exp_avg"]
        assert moments.abs().sum() > 0


def test_a_member_that_leaves_changes_nothing_for_the_others() -> None:
    x = planted()
    members = trainers(TOPK, x)
    ensemble = Ensemble(members, [HOOK] * len(members))
    for number in range(30):
        if number == 12:
            ensemble.remove([0, 4])
        ensemble.step({HOOK: batch(x, number)})
    for i in (1, 2, 3, 5):
        same_to_rounding(members[i], alone(TOPK[i], x, 30)[0])
    ensemble.remove([1, 2, 3])
    ensemble.step({HOOK: batch(x, 30)})
    same_to_rounding(members[5], alone(TOPK[5], x, 31)[0])


@pytest.mark.parametrize("configs", [TOPK, TIED], ids=["topk", "tied"])
def test_a_stack_goes_on_from_its_state_to_the_bit(configs: list[TrainConfig]) -> None:
    x = planted()
    first = Ensemble(trainers(configs, x), [HOOK] * len(configs))
    for number in range(8):
        first.step({HOOK: batch(x, number)})
    state = first.state()
    second = Ensemble(trainers(configs, x), [HOOK] * len(configs))
    second.load_state(state)
    for number in range(8, 14):
        one, two = first.step({HOOK: batch(x, number)}), second.step({HOOK: batch(x, number)})
        assert all(torch.equal(torch.stack(one[i]), torch.stack(two[i])) for i in one)
    for i, trainer in first.trainers.items():
        assert torch.equal(
            trainer.module.b_enc if configs is TOPK else trainer.module.b,
            dict(second.trainers[i].module.named_parameters())["b_enc" if configs is TOPK else "b"],
        )


def together(configs: list[TrainConfig], x: torch.Tensor, **more: object) -> list[Result]:
    members = [Member(f"member {i}", config, HOOK) for i, config in enumerate(configs)]
    supply = VectorSupply(x, configs[0].batch, configs[0].data_seed, identity="toy")
    return train_together(members, {HOOK: supply}, model="toy", progress=QUIET, **more)  # type: ignore[arg-type]


def test_training_together_gives_what_training_alone_gives() -> None:
    x = planted()
    configs = [TOPK[0], TOPK[1], TIED[0], config_of(k=4, normalise=False, lr=1e-3)]
    for config, result in zip(configs, together(configs, x), strict=True):
        single = train(config, x, hook_point=HOOK, model="toy", progress=QUIET)
        assert isinstance(result, Trained)
        assert result.dictionary.identity.hash == single.dictionary.identity.hash
        assert [row["loss"] for row in result.history] == [row["loss"] for row in single.history]
        assert result.dictionary.details["together"] == 4


@pytest.mark.parametrize("batched", [True, False])
def test_a_member_that_diverges_is_dropped_with_its_message(batched: bool) -> None:
    x = planted()
    wild = config_of(k=3, seed=9, lr=1e30)  # all else as the others, so that it stands in one stack with them
    assert stack_key(Trainer(wild, begin(wild, x, HOOK))) == stack_key(Trainer(TOPK[0], begin(TOPK[0], x, HOOK)))
    finished: list[int] = []
    results = together([TOPK[0], wild, TOPK[1]], x, batched=batched, finished=lambda i, _: finished.append(i))
    assert isinstance(results[1], TrainingFailed) and "lower lr" in results[1].fix and "member 1" in results[1].where
    assert finished == [0, 2]
    for i, config in ((0, TOPK[0]), (2, TOPK[1])):
        result = results[i]
        single = train(config, x, hook_point=HOOK, model="toy", progress=QUIET)
        assert isinstance(result, Trained)
        for mine, theirs in zip(result.history, single.history, strict=True):  # a rounding error may choose another feature
            assert mine["fvu"] == (pytest.approx(theirs["fvu"], rel=1e-3) if batched else theirs["fvu"])


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


@pytest.mark.parametrize("batched", [True, False])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, batched: bool) -> None:
    x = planted()
    configs = [*TOPK[:3], config_of(k=3, seed=9, lr=1e30, warmup=0.0)]
    whole = together(configs, x, batched=batched)

    def checkpoint() -> Checkpoint:
        return Checkpoint(tmp_path / "run", every_steps=10)

    members = [Member(f"member {i}", config, HOOK) for i, config in enumerate(configs)]
    killed = Together(
        members, {HOOK: VectorSupply(x, 128, 0, identity="toy")}, model="toy", checkpoint=checkpoint(), batched=batched
    )
    for _ in range(27):
        killed.step()
    again = together(configs, x, checkpoint=checkpoint(), batched=batched)
    for one, two in zip(whole[:3], again[:3], strict=True):
        assert isinstance(one, Trained) and isinstance(two, Trained)
        assert one.dictionary.identity.hash == two.dictionary.identity.hash
        assert [row["loss"] for row in one.history] == [row["loss"] for row in two.history]
    assert isinstance(again[3], TrainingFailed) and str(again[3]) == str(whole[3])
    with pytest.raises(CheckpointError, match="another run: members member 1 own k was 5 and is 3"):
        together([configs[0], config_of(k=3, seed=1)], x, checkpoint=checkpoint(), batched=batched)


def test_a_checkpoint_needs_members_of_one_length(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="tokens"):
        together([config_of(), config_of(tokens=1_000)], planted(), checkpoint=Checkpoint(tmp_path))
    short, long = together([config_of(k=3, tokens=1_280), config_of(k=3)], planted())
    assert isinstance(short, Trained) and isinstance(long, Trained)
    assert (short.history[-1]["step"], long.history[-1]["step"]) == (10, 50)
