"""The loop seen from outside: what it says, what it waits for, what it keeps when it is ended early."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from evalkit.errors import EvalkitError
from evalkit.training.data.batches import VectorSupply
from evalkit.training.loop import train as loop
from evalkit.training.loop.checkpoint import Checkpoint
from evalkit.training.loop.interrupts import held
from evalkit.training.loop.members import Member, Result, Trained, load
from evalkit.training.loop.together import WATCH, Together
from evalkit.training.loop.train import status, train, train_together
from evalkit.training.settings.config import TrainConfig, TrainingFailed, train_config
from evalkit.util.progress import Progress, _PlainStage

HOOK = "blocks.0.hook_resid_post"
QUIET = Progress(quiet=True)
STEPS, BATCH = 100, 32


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.relu(torch.randn(500, 30, generator=generator) - 1)
    return codes @ torch.randn(30, 12, generator=generator)


def config_of(**table: Any) -> TrainConfig:
    shared = {
        "architecture": "topk",
        "features": 40,
        "k": 4,
        "batch": BATCH,
        "tokens": STEPS * BATCH,
        "dead_after": 600,
        "order": 0,
    }
    return train_config({**shared, **table})


def members(*configs: TrainConfig, observe: Callable[[dict[str, float]], None] | None = None) -> list[Member]:
    return [Member(f"SAE {i}", config, HOOK, observe if i == 0 else None) for i, config in enumerate(configs)]


def supplies(x: torch.Tensor) -> dict[str, VectorSupply]:
    return {HOOK: VectorSupply(x, BATCH, 0, identity="x")}


def begun(x: torch.Tensor, *configs: TrainConfig, checkpoint: Checkpoint | None = None) -> Together:
    who, data = members(*configs), supplies(x)
    return Together(who, data, model="toy", checkpoint=checkpoint, saved=load(checkpoint, who, data, "toy"))


def together(
    x: torch.Tensor, who: list[Member], checkpoint: Checkpoint | None = None, progress: Progress = QUIET
) -> list[Result]:
    return train_together(who, supplies(x), model="toy", progress=progress, checkpoint=checkpoint)


class Waits(TorchFunctionMode):
    """Counts what makes an accelerator wait: numbers, lists and lengths that are read from tensors."""

    NAMES = frozenset({"item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__"})

    def __init__(self) -> None:
        super().__init__()
        self.looking, self.count = True, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self.looking and getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_on_an_accelerator_the_loop_waits_only_for_rows_and_looks_at_the_losses(device: str, x: torch.Tensor) -> None:
    run = begun(x, config_of(tokens=1000 * BATCH), config_of(k=3, tokens=1000 * BATCH))
    run.device = torch.device(device)  # what the loop goes by; the steps themselves are taken where they were begun
    every = run.histories[0].every
    assert every == WATCH == 20
    waits, counts = Waits(), []

    def apart(of: Any) -> Callable[..., Any]:
        """What is the business of the data and of the architectures."""

        def called(*arguments: Any) -> Any:
            waits.looking = False
            try:
                return of(*arguments)
            finally:
                waits.looking = True

        return called

    for trainer in run.trainers.values():
        trainer.step = apart(trainer.step)  # type: ignore[method-assign]
    run.supplies[HOOK].next = apart(run.supplies[HOOK].next)  # type: ignore[method-assign]
    for _ in range(2 * WATCH):
        waits.count = 0
        with waits:
            run.step()
        counts.append(waits.count)
    others = [count for number, count in enumerate(counts, 1) if number % WATCH]
    assert set(others) == ({0} if device == "cuda" else {2})
    assert counts[WATCH - 1] > 0 and len(run.histories[0].rows) == 2


def test_the_status_is_what_the_last_step_reported(x: torch.Tensor) -> None:
    alone, both = begun(x, config_of()), begun(x, config_of(), config_of(k=3))
    for _ in range(40):
        one, two = alone.step(), both.step()
    loss, fvu, l0 = (float(value) for value in one[0])
    dead = float(alone.trainers[0].dead.float().mean())
    shown = status(alone, one)
    assert shown.startswith(f"loss {loss:.4g}, FVU {fvu:.3f}, L0 {l0:.3g}, dead {dead:.1%}, ") and shown.endswith(" tokens/s")
    low, high = sorted(float(step.fvu) for step in two.values())
    assert status(both, two).startswith(f"FVU {low:.2f}-{high:.2f}, L0 3-4, dead ")
    both.trainers.clear()
    assert status(both, two) == ""


def test_the_lines_of_several_say_how_far_they_are(
    x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "WORDS_S", 0.0)
    monkeypatch.setattr(_PlainStage, "every", 0.0)
    who = members(config_of(), config_of(k=2), config_of(lr=1e30))
    results = together(x, who, progress=Progress(terminal=False))
    assert [isinstance(result, Trained) for result in results] == [True, True, False]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "training 3 SAEs: 500 activations are presented about 6.4 times each"
    assert said[1] == "training 3 SAEs ..." and said[-1].startswith("training 3 SAEs: done in ")
    (failed,) = [line for line in said if " failed: " in line]
    assert failed.startswith(f"training 3 SAEs: SAE 2 at {HOOK} failed: training diverged: the loss became ")
    lines = [line for line in said if "/3,200 tokens" in line]
    assert len(lines) == STEPS
    for line in lines[20:]:
        assert all(part in line for part in ("FVU 0.", "L0 2-4", "dead ", "/s, 1 failed", " left"))


def test_the_speed_of_each_row_and_of_the_whole_adds_up(x: torch.Tensor) -> None:
    results = together(x, members(config_of(), config_of(k=3)))
    for result in results:
        assert isinstance(result, Trained)
        details, rows = result.dictionary.details, result.history
        assert details["together"] == 2 and len(rows) == 50
        assert details["tokens_per_second"] * details["seconds"] == pytest.approx(STEPS * BATCH)
        took = [2 * BATCH / row["tokens_per_second"] for row in rows]
        assert sum(took) == pytest.approx(details["seconds"])


def test_a_member_that_is_found_late_spoils_no_checkpoint_and_no_other(x: torch.Tensor, tmp_path: Path) -> None:
    """As on an accelerator, where losses are looked at every ``WATCH`` steps."""
    checkpoint = Checkpoint(tmp_path / "here", every_steps=1)
    table = {"tokens": 1000 * BATCH}
    run = begun(x, config_of(**table), config_of(k=3, **table), checkpoint=checkpoint)
    run.device = torch.device("cuda")
    alone = begun(x, config_of(**table))
    for _ in range(WATCH):
        run.step()
        alone.step()
    with torch.no_grad():
        run.trainers[1].module.W_dec.fill_(float("nan"))
    for number in range(WATCH + 1, 2 * WATCH):
        run.step()
        alone.step()
        assert set(run.trainers) == {0, 1}
        kept = begun(x, config_of(**table), config_of(k=3, **table), checkpoint=Checkpoint(tmp_path / "here"))
        assert kept.number == WATCH and all(trainer.finite for trainer in kept.trainers.values()), number
    run.step()
    alone.step()
    assert set(run.trainers) == {0} and isinstance(run.results[1], TrainingFailed)
    assert "by step 40 of 1000" in str(run.results[1])
    assert torch.equal(run.trainers[0].module.W_dec, alone.trainers[0].module.W_dec)
    kept = begun(x, config_of(**table), config_of(k=3, **table), checkpoint=Checkpoint(tmp_path / "here"))
    assert kept.number == 2 * WATCH and str(kept.results[1]) == str(run.results[1])
    assert torch.equal(kept.trainers[0].module.W_dec, alone.trainers[0].module.W_dec)


def interrupting(step: int, times: int = 1) -> Callable[[dict[str, float]], None]:
    """Ctrl-C in the row of ``step``."""

    def observe(row: dict[str, float]) -> None:
        if row["step"] == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return observe


def test_ctrl_c_saves_after_the_step_and_the_same_bits_follow(
    x: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = config_of(), config_of(k=3)
    whole = together(x, members(*configs))
    checkpoint = Checkpoint(tmp_path / "here", every_s=1e9)
    with pytest.raises(KeyboardInterrupt):
        together(x, members(*configs, observe=interrupting(14)), checkpoint, Progress(terminal=False))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "training 2 SAEs: interrupted after step 14 of 100" in capsys.readouterr().err
    assert begun(x, *configs, checkpoint=Checkpoint(tmp_path / "here")).number == 14
    again = together(x, members(*configs), Checkpoint(tmp_path / "here"), Progress(terminal=False))
    assert "training 2 SAEs: going on at step 14 of 100" in capsys.readouterr().err
    for one, two in zip(whole, again, strict=True):
        assert isinstance(one, Trained) and isinstance(two, Trained)
        assert one.dictionary.identity.hash == two.dictionary.identity.hash


def test_a_second_ctrl_c_does_not_wait(x: torch.Tensor, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "here", every_s=1e9)
    with pytest.raises(KeyboardInterrupt):
        together(x, members(config_of(), observe=interrupting(14, 2)), checkpoint)
    assert not checkpoint.path.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_checkpoint_ctrl_c_comes_at_once(x: torch.Tensor) -> None:
    seen: list[float] = []

    def observe(row: dict[str, float]) -> None:
        seen.append(row["step"])
        interrupting(14)(row)

    with pytest.raises(KeyboardInterrupt):
        train(config_of(), x, hook_point=HOOK, model="toy", progress=QUIET, observe=observe)
    assert seen[-1] == 14


def test_a_ctrl_c_that_came_too_late_for_a_step_still_ends_what_follows() -> None:
    with pytest.raises(KeyboardInterrupt), held() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_somebody_elses_handler_is_left_alone() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        with held() as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert came == [signal.SIGINT] and not interrupted()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_which_all_diverge_gives_their_messages(x: torch.Tensor) -> None:
    results = together(x, members(config_of(lr=1e30), config_of(lr=1e29)))
    assert all(isinstance(result, EvalkitError) and "lower lr" in str(result) for result in results)
