"""Rows of a history reach Weights & Biases and TensorBoard through their own calls; a missing library names its command."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import UsageError
from evalkit.training.loop.loggers import library, open_log

ROW = {"step": 4, "tokens": 1024, "loss": 0.5, "fvu": 0.25, "l0": 8.0, "dead_share": 0.1, "tokens_per_second": 9.0}
SENT = {f"training/{key}": value for key, value in ROW.items() if key != "step"}


def test_wandb_gets_each_row_under_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[dict, int]] = []
    ended: list[bool] = []

    class FakeRun:
        def log(self, values: dict, step: int) -> None:
            logged.append((values, step))

        def finish(self) -> None:
            ended.append(True)

    def init(**settings: Any) -> FakeRun:
        begun.append(settings)
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    log = open_log("wandb", tmp_path, "SAE", "sae-12ab", {"lr": 1e-3})
    log.observe(ROW)
    log.close()
    assert logged == [(SENT, 4)] and ended == [True]
    (settings,) = begun
    # the same id again goes on with the same run after a kill
    assert (settings["name"], settings["id"], settings["resume"], settings["config"]) == (
        "SAE",
        "sae-12ab",
        "allow",
        {"lr": 1e-3},
    )
    assert Path(settings["dir"]).is_dir() and tmp_path in Path(settings["dir"]).parents


def test_tensorboard_gets_each_measure_under_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, tuple[float, int]] = {}
    ended: list[str] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.log_dir = log_dir

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written[name] = (value, step)

        def close(self) -> None:
            ended.append(self.log_dir)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    log = open_log("tensorboard", tmp_path, "SAE", "sae-12ab", {})
    log.observe(ROW)
    log.close()
    assert written == {key: (value, 4) for key, value in SENT.items()}
    assert ended == [str(tmp_path / "logs" / "tensorboard" / "sae-12ab")]


@pytest.mark.parametrize(("log", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_library_that_is_not_installed_names_the_command(log: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    with pytest.raises(UsageError, match="not installed") as caught:
        library(log)
    assert caught.value.fix == f"pip install {log}"
