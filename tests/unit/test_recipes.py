"""Recipes: evalkit's losses are those that the real trainers had on the same batches, recorded by ``benchmarks/training.py``."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from evalkit.errors import SuiteError
from evalkit.training.loop.trainer import Trainer, begin, schedule
from evalkit.training.settings.config import train_config

ROOT = Path(__file__).parents[2]
RUNS = [
    pytest.param(made["recipe"], run, id=f"{made['recipe']}-{run['job']['architecture']}-{run['job']['window']}")
    for made in (json.loads(path.read_text()) for path in sorted((ROOT / "tests/fixtures/training").glob("*.json")))
    for run in made["runs"]
]


def benchmark(name: str) -> ModuleType:
    """A module of the benchmarks, which are scripts and no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(recipe: str, run: dict[str, Any], **changed: Any) -> list[float]:
    """evalkit's, from the recorded run's start on its batches."""
    contestants = benchmark("contestants")
    job = contestants.Job(**run["job"])
    n = len(run["losses"])
    x = benchmark("vectors").planted(n * job.batch, job.width, directions=32, active=3, seed=1)
    start = contestants.first_weights(job, x, run["length"], 0)
    ours = contestants.Evalkit(job, start, recipe, "float32", x)
    for key, value in changed.items():
        object.__setattr__(ours.trainer.config, key, value)
    return [float(ours.step(part)) for part in x.split(job.batch)]


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(p - q) / abs(p) for p, q in zip(a, b, strict=True))


def test_every_peer_was_recorded() -> None:
    assert {param.values[0] for param in RUNS} == {"saelens", "dictionary_learning", "sparsify"}


@pytest.mark.parametrize(("recipe", "run"), RUNS)
def test_losses_are_the_real_trainers(recipe: str, run: dict[str, Any]) -> None:
    recorded = run["losses"]
    assert recorded[-1] < 0.9 * recorded[0]  # something was learned, so that a wrong step would show
    assert apart(recorded, losses(recipe, run)) < 1e-4


@pytest.mark.parametrize(
    ("recipe", "changed"),
    [("saelens", {"clip": None}), ("dictionary_learning", {"idle_start": False}), ("sparsify", {"decay": 0.0})],
)
def test_each_choice_of_a_recipe_shows_in_the_losses(recipe: str, changed: dict[str, Any]) -> None:
    run = next(p.values[1] for p in RUNS if p.values[0] == recipe and p.values[1]["job"]["architecture"] == "topk")
    assert apart(run["losses"], losses(recipe, run, **changed)) > 1e-4


def test_dead_features_took_part_in_the_recorded_losses() -> None:
    for recipe in ("saelens", "dictionary_learning"):
        plain, revived = (
            next(p.values[1]["losses"] for p in RUNS if p.values[0] == recipe and p.values[1]["job"]["window"] == window)
            for window in (0, 3)
        )
        assert apart(plain[-5:], revived[-5:]) > 1e-3


def test_keys_of_the_user_win() -> None:
    config = train_config({"recipe": "saelens", "lr": 1e-2, "clip": 5.0, "k": 8})
    assert (config.lr, config.clip, config.own.k, config.own.decoder, config.normalise) == (1e-2, 5.0, 8, "free", False)


@pytest.mark.parametrize("architecture", ["tied", "relu"])
def test_the_papers_alphas_mean_what_they_meant(architecture: str) -> None:
    """Its loss by hand, in float64: mean squared error over dimensions plus alpha times the sum of codes, rows of unit length."""
    config = train_config({"recipe": "paper", "architecture": architecture, "features": 24, "batch": 40, "tokens": 40})
    assert (config.own.l1, config.error, config.lr, config.clip, config.normalise) == (8.577e-4, "mean", 1e-3, None, False)
    x = 3 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(config, begin(config, x, "toy"))
    frozen = trainer.freeze(hook_point="h", model="m", details={})
    assert frozen.directions.norm(dim=1).tolist() == pytest.approx([1.0] * 24, abs=1e-5)
    codes = frozen.encode(x).double()
    error = (x.double() - frozen.decode(codes.float()).double()).square().mean(1)
    assert float(trainer.step(x).loss) == pytest.approx(float((error + 8.577e-4 * codes.sum(1)).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "table"),
    [
        ("saelens", {"architecture": "gated"}), ("saelens", {"architecture": "tied"}),
        ("dictionary_learning", {"architecture": "gated"}), ("dictionary_learning", {"architecture": "jumprelu"}),
        ("dictionary_learning", {"architecture": "relu", "penalty": "anneal"}), ("sparsify", {"architecture": "relu"}),
        ("paper", {"architecture": "topk"}), ("paper", {}),
    ],
)  # fmt: skip
def test_a_recipe_that_says_nothing_about_an_architecture_is_refused(recipe: str, table: dict[str, Any]) -> None:
    with pytest.raises(SuiteError, match="does not say how") as caught:
        train_config({"recipe": recipe, "features": 64, **table})
    assert "leave recipe out" in caught.value.fix


def test_learning_rates_follow_the_size() -> None:
    assert train_config({"recipe": "saelens"}).lr == 3e-4
    assert train_config({"recipe": "sparsify", "features": 2**14}).lr == pytest.approx(2e-4)
    assert train_config({"recipe": "dictionary_learning", "features": 2**12}).lr == pytest.approx(4e-4)
    with pytest.raises(SuiteError, match="number of features"):
        train_config({"recipe": "sparsify"})
    assert train_config({"recipe": "sparsify", "lr": 1e-3}).lr == 1e-3
    with pytest.raises(SuiteError, match="batch"):
        train_config({"recipe": "saelens", "batch": "large"})


def test_the_schedule_of_sparsify() -> None:
    config = train_config({"recipe": "sparsify", "features": 64, "batch": 10, "tokens": 20_000})
    rates = [schedule(config, step, config.steps) for step in (0, 500, 1000, 1500, 1999)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.001])
    short = train_config({"recipe": "sparsify", "features": 64, "batch": 10, "tokens": 5_000})
    assert schedule(short, 499, short.steps) == pytest.approx(0.499)
