"""Two processes on the CPU train what one does; one that dies or hangs ends the other with a message."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from suite_case import tiny_suite

from evalkit.errors import SuiteError, UsageError
from evalkit.training.loop import distributed
from evalkit.training.loop.members import Member, one_batch
from evalkit.training.settings.config import train_config

CASE = Path(__file__).with_name("dist_case.py")
sys.path.insert(0, str(CASE.parent))
from dist_case import TABLES  # noqa: E402


class Ended(NamedTuple):
    code: int
    said: str


def start(
    out: Path, ranks: int, what: str = "few", at: int = 0, seconds: float = distributed.STEP_S, wait_for: int | None = None
) -> list[Ended]:
    """Run the case in one process, or in several that meet as torchrun's do; all but the first ``wait_for`` are ended then."""
    return processes([str(CASE), str(out), what, str(at), str(seconds)], ranks, wait_for)


def processes(words: list[str], ranks: int, wait_for: int | None = None, cwd: Path | None = None) -> list[Ended]:
    """Python with ``words`` behind it, as often as there are ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(ranks):
        env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CASE.parents[2]), env.get("PYTHONPATH")]))
        if ranks > 1:
            env |= {
                "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "",
            }  # fmt: skip
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen([sys.executable, *words], env=env, cwd=cwd, **pipes))
    try:
        for process in running[:wait_for]:
            process.wait()
    finally:
        for process in running:
            process.kill()
    said = [process.communicate()[0] for process in running]
    return [Ended(process.returncode, text) for process, text in zip(running, said, strict=True)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Weights and history of every case, from one process and from two."""
    folder = tmp_path_factory.mktemp("trained")
    alone, both = start(folder / "one.pt", 1, "all"), start(folder / "two.pt", 2, "all")
    assert [e.code for e in alone + both] == [0, 0, 0], (alone, both)
    return {
        name: list(pair)
        for name, pair in zip(TABLES, zip(load(folder / "one.pt"), load(folder / "two.pt"), strict=True), strict=True)
    }


@pytest.mark.parametrize("name", TABLES)
def test_every_architecture_takes_the_steps_of_one_process(name: str, trained: dict[str, list[dict[str, Any]]]) -> None:
    one, two = trained[name]
    for key, tensor in one["tensors"].items():
        assert (two["tensors"][key] - tensor).abs().max() <= 1e-4 * tensor.abs().max().clamp(min=1e-3), key
    for before, after in zip(one["history"], two["history"], strict=True):
        assert after["dead_share"] == before["dead_share"]
        for key in ("loss", "fvu", "l0"):
            assert after[key] == pytest.approx(before[key], rel=1e-5), key
    assert one["history"][-1]["fvu"] < one["history"][0]["fvu"]


def load(path: Path) -> list[dict[str, Any]]:
    return torch.load(path, weights_only=True)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    assert start(tmp_path / "one.pt", 1) == [Ended(0, "")]
    ended = start(tmp_path / "two.pt", 2)
    assert [e.code for e in ended] == [0, 0], ended
    for one, two in zip(load(tmp_path / "one.pt"), load(tmp_path / "two.pt"), strict=True):
        for name, tensor in one["tensors"].items():
            assert (two["tensors"][name] - tensor).abs().max() <= 1e-5 * tensor.abs().max().clamp(min=1e-3), name
        assert len(one["history"]) == 30
        for before, after in zip(one["history"], two["history"], strict=True):
            assert (before["l0"], before["dead_share"]) == (after["l0"], after["dead_share"])
            assert before["loss"] == pytest.approx(after["loss"], rel=1e-5)
            assert before["fvu"] == pytest.approx(after["fvu"], rel=1e-5)
    assert max(row["dead_share"] for row in one["history"]) == 0  # tied
    assert max(row["dead_share"] for row in load(tmp_path / "two.pt")[0]["history"]) > 0


def test_a_killed_process_ends_the_other_with_a_message(tmp_path: Path) -> None:
    first, second = start(tmp_path / "out.pt", 2, "kill", at=7)
    assert second.code == 9
    assert first.code == 4 and "another process of this training went away" in first.said and "to do:" in first.said
    assert "Traceback" not in first.said
    assert not (tmp_path / "out.pt").exists()


def test_a_process_that_hangs_runs_into_the_time_limit(tmp_path: Path) -> None:
    first, _ = start(tmp_path / "out.pt", 2, "hang", at=3, seconds=8.0, wait_for=1)
    assert first.code == 4 and "another process of this training went away or hangs" in first.said


def test_a_first_process_that_is_busy_for_long_is_waited_for(tmp_path: Path) -> None:
    """Until it has given more signs of life than come in the longest wait: those that follow count from each anew."""
    ended = start(tmp_path / "out.pt", 2, "pause", at=3)
    assert [e.code for e in ended] == [0, 0], ended
    assert len(load(tmp_path / "out.pt")) == 3
    assert Path(f"{tmp_path / 'out.pt'}.heard").stat().st_size > distributed.SIGNS


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    members = [Member("a", train_config({"batch": 100}), "h")]
    assert one_batch(members, 2) == 50 * 2
    with pytest.raises(SuiteError, match="among 3 processes"):
        one_batch(members, 3)


def test_a_process_without_torchrun_is_told_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.current() is None
    with pytest.raises(UsageError, match="torchrun"):
        distributed.join()


OWN = """
from evalkit.training.architectures.base import TRAINABLES
TRAINABLES.names()
from evalkit.training.architectures.topk import TrainableTopK

@TRAINABLES.register("own_topk")
class Own(TrainableTopK):
    pass
"""


@pytest.mark.timeout(240)
def test_an_architecture_of_ones_own_is_there_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "own_architecture.py").write_text(OWN)
    suite = tiny_suite(tmp_path)
    suite.write_text(suite.read_text().replace('"topk"', '"own_topk"'))
    command = [
        "-m",
        "evalkit",
        "train",
        str(suite),
        "--plugin",
        "own_architecture",
        "--results",
        str(tmp_path / "out" / "e.duckdb"),
    ]
    ended = processes(command, 2, cwd=tmp_path)
    assert [e.code for e in ended] == [0, 0], ended
    (card,) = (tmp_path / "out" / "dictionaries").glob("sae-*/*.json")
    assert json.loads(card.read_text())["details"]["processes"] == 2


def test_a_module_that_cannot_be_imported_is_said_once(tmp_path: Path) -> None:
    ended = processes(["-m", "evalkit", "train", str(tiny_suite(tmp_path)), "--plugin", "no_such_module"], 2, cwd=tmp_path)
    assert ended[0].code == 2 and "no_such_module" in ended[0].said
    assert ended[1] == Ended(0, "")
