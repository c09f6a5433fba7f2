"""Equal numbers give equal bits wherever they lie in memory, in every order of imports; where they may not, that is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import evalkit
from evalkit.report.page.run_facts import _pairs
from evalkit.runs import recorder
from evalkit.training.architectures.base import TRAINABLES
from evalkit.training.data.batches import VectorSupply
from evalkit.training.loop.checkpoint import Checkpoint
from evalkit.training.loop.members import Member, Trained, load
from evalkit.training.loop.together import Together
from evalkit.training.loop.train import train
from evalkit.training.settings.config import TrainConfig, train_config
from evalkit.util import arithmetic
from evalkit.util.progress import Progress

HOOK = "blocks.0.hook_resid_post"
STEPS, BATCH = 16, 64

CHILD = """
import json, os, sys, torch
for case in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    if os.fork() == 0:
        # nothing multiplied yet: every library still reads its variables
        os.environ.update(case["variables"])
        if case["multiplied"]:
            torch.ones(3, 3) @ torch.ones(3, 3)
        import evalkit
        from evalkit.util import arithmetic
        from evalkit.util import matmul as products
        found = {"mode": arithmetic.mode(), "alike": arithmetic.placed_alike(), "facts": arithmetic.facts(),
                 "doubts": arithmetic.doubts(arithmetic.words()), "products": products.pays(), "words": arithmetic.words()}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    print(os.fdopen(reading).read())
    os.wait()
"""

FORCED = [
    {},
    {"EVALKIT_PRODUCTS": "mkl"},
    {"EVALKIT_PRODUCTS": "onednn"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"EVALKIT_PRODUCTS": "onednn", "ONEDNN_MAX_CPU_ISA": "SSE41"},
]
"""The ways of other processors, as far as this one can go them."""

OWN = [{"MKL_CBWR": "COMPATIBLE"}, {"MKL_CBWR": ""}]
LATE: dict[str, str] = {}
"""Multiplies before it imports evalkit."""

mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch multiplies without MKL here")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processes() -> list[dict[str, Any]]:
    """What processes find of their arithmetic: one for each of ``FORCED``, then those of ``OWN`` and the one of ``LATE``."""
    cases = [{"variables": case, "multiplied": case is LATE} for case in (*FORCED, *OWN, LATE)]
    environment = {name: value for name, value in os.environ.items() if name not in (arithmetic.VARIABLE, "EVALKIT_PRODUCTS")}
    environment["PYTHONPATH"] = str(Path(evalkit.__file__).parents[1])
    command = [sys.executable, "-c", CHILD, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@mkl
def test_products_hang_on_no_address_on_the_ways_of_any_maker(processes: list[dict[str, Any]]) -> None:
    for case, found in zip(FORCED, processes, strict=False):
        assert found["mode"] == "AUTO,STRICT" and found["alike"] and found["doubts"] == "", (case, found)
        assert found["products"] == (case.get("EVALKIT_PRODUCTS") == "onednn") or not case.get("EVALKIT_PRODUCTS"), case
        assert found["facts"]["MKL_CBWR"] == "AUTO,STRICT" and found["facts"]["equal bits"] == "wherever numbers lie"


@mkl
def test_a_mode_of_the_users_own_is_kept_and_told(processes: list[dict[str, Any]]) -> None:
    compatible, off = processes[len(FORCED) : -1]
    assert compatible["mode"] == compatible["facts"]["MKL_CBWR"] == "COMPATIBLE"
    assert off["mode"] == off["facts"]["MKL_CBWR"] == "off"
    assert bool(off["doubts"]) != off["alike"], "there is a doubt where bits differ, and nowhere else"


@mkl
def test_where_mkl_multiplied_first_it_is_said_that_the_mode_came_too_late(processes: list[dict[str, Any]]) -> None:
    late = processes[-1]
    assert late["mode"] == "off" and late["facts"]["MKL_CBWR"] == "off (too late for AUTO,STRICT)"
    assert late["alike"] or "MKL multiplied before evalkit was imported" in late["doubts"]


def test_the_facts_of_a_run_hold_it() -> None:
    machine = recorder.machine_facts()
    assert machine.items() >= arithmetic.facts().items() and machine["threads"] == 1
    assert f"equal bits {machine['equal bits']}" in _pairs(json.dumps(machine))


def test_a_copy_lies_where_it_is_put() -> None:
    tensor = torch.arange(15.0).view(3, 5)
    for offset in (0, 4, 60):
        copy = arithmetic.placed(tensor, offset)
        assert torch.equal(copy, tensor) and copy.data_ptr() % arithmetic.LINE == offset and copy.is_contiguous()


def settings(architecture: str) -> TrainConfig:
    sparse = {"k": 3} if architecture in ("topk", "batchtopk", "matryoshka") else {}
    table = {"architecture": architecture, "features": 40, "tokens": STEPS * BATCH, "batch": BATCH, "dead_after": 300}
    return train_config({**table, **sparse})


def vectors() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    codes = torch.rand(500, 50, generator=generator) * (torch.rand(500, 50, generator=generator) < 0.1)
    return codes @ torch.randn(50, 33, generator=generator)


class Moved(VectorSupply):
    """Gives every batch at another address."""

    offset = 0

    def next(self) -> torch.Tensor:
        return arithmetic.placed(super().next(), self.offset)


def trained(architecture: str, folder: Path, steps: int, offset: int | None = None) -> dict[str, torch.Tensor]:
    """The dictionary's tensors after going on from what is in ``folder``, with everything ``offset`` bytes off where it is given;
    none where ``steps`` are not all, which leaves a checkpoint."""
    config = settings(architecture)
    members, checkpoint = [Member("SAE", config, HOOK)], Checkpoint(folder, every_steps=10**9)
    supply = Moved(vectors(), BATCH, 0, identity="toy")
    supply.offset = offset or 0
    saved = load(checkpoint, members, {HOOK: supply}, "toy")
    run = Together(members, {HOOK: supply}, model="toy", checkpoint=checkpoint, saved=saved)
    if offset is not None:
        (trainer,) = run.trainers.values()
        for parameter in trainer.module.parameters():
            parameter.data = arithmetic.placed(parameter.data, offset)
            moments = trainer.optimiser.state[parameter]
            moments.update({name: arithmetic.placed(moment, offset) for name, moment in moments.items()})
    while run.running and run.number < steps:
        run.step()
    if steps < STEPS:
        run.save()
        return {}
    result = run.results[0]
    assert isinstance(result, Trained)
    return result.dictionary.tensors()


@pytest.mark.parametrize("architecture", TRAINABLES.names())
def test_resumed_at_odd_addresses_a_training_has_the_bits_of_one_in_one_go(architecture: str, tmp_path: Path) -> None:
    whole = trained(architecture, tmp_path / "whole", STEPS)
    for offset in (4, 20, 36):
        folder = tmp_path / str(offset)
        trained(architecture, folder, STEPS // 2)
        resumed = trained(architecture, folder, STEPS, offset)
        equal = all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
        assert equal or arithmetic.doubts(arithmetic.words()), f"{offset} bytes off, and nothing was said"
    if torch.backends.mkl.is_available():
        assert arithmetic.placed_alike() and equal


def test_a_checkpoint_is_loaded_to_where_pytorch_would_put_its_tensors(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "here")
    state = {str(size): torch.arange(float(size)) for size in (1, 3, 7, 30)}
    checkpoint.save({}, state)
    loaded = checkpoint.load({})
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert {tensor.data_ptr() % arithmetic.LINE for tensor in loaded.values()} == {0}


@pytest.mark.parametrize("other", [True, False])
def test_a_training_that_goes_on_with_other_arithmetic_says_so(
    other: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as elsewhere:
        if other:
            elsewhere.setattr(arithmetic, "words", lambda: "OpenBLAS on 64 threads")
        trained("topk", tmp_path, STEPS // 2)
    result = train(
        settings("topk"),
        VectorSupply(vectors(), BATCH, 0, identity="toy"),
        hook_point=HOOK,
        model="toy",
        progress=Progress(),
        name="SAE",
        checkpoint=Checkpoint(tmp_path),
    )
    said = capsys.readouterr().err
    assert result.history and f"going on at step {STEPS // 2}" in said
    assert ("it began with OpenBLAS on 64 threads, and this is" in said) == other


def test_where_bits_hang_on_addresses_a_training_says_so_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arithmetic, "placed_alike", lambda: False)
    told = {"hook_point": HOOK, "model": "toy", "progress": Progress()}
    train(settings("tied"), vectors(), **told)
    assert "where numbers lie" not in capsys.readouterr().err, "without a checkpoint nothing is resumed"
    train(settings("tied"), vectors(), checkpoint=Checkpoint(tmp_path / "here"), **told)
    assert capsys.readouterr().err.count("products here depend on where numbers lie") == 1
