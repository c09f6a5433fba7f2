"""A server that evalkit did not write: llama.cpp's, with the weights of the packaged judge, asked as any endpoint is.

The same weights in other arithmetic: llama.cpp multiplies the quantised numbers by 8-bit activations; the packaged judge
takes them to float32 or bfloat16 first. So the numbers agree and are not equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from llama_server import Running, llama_server

from evalkit.assets.install import path
from evalkit.errors import JudgeSetupError
from evalkit.judges.base import JUDGES, Example, ExplainTask, RateTask, SimulateTask
from evalkit.judges.config import JudgeConfig
from evalkit.judges.model_judge import ModelJudge
from evalkit.util.progress import Progress

MODEL = "qwen2.5-coder-1.5b-instruct"
SECRET = "sk-of-this-test-alone"
TASKS = [
    SimulateTask("numbers of years and ages", ["In", " 1848", " there", " was", " a"]),
    # nothing here fits: hardly any probability is on digits, and they are far from the 20 likeliest tokens
    SimulateTask("commas and full stops", ["\n", ' "', "\\", " é", "日本", "ing", ".", " Mr"]),
]

pytestmark = [pytest.mark.assets, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with llama_server(path(MODEL), SECRET, slots=2) as running:
        yield running


def judge_at(server: Running, folder: Path) -> ModelJudge:
    config = JudgeConfig(provider="openai", model=MODEL, base_url=server.base_url, api_key_env="TEST_KEY", explanation_tokens=4)
    return JUDGES.get("openai")(config, folder, Progress(quiet=True))


def test_a_wrong_key_is_refused_clearly(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-wrong")
    with judge_at(server, tmp_path) as judge, pytest.raises(JudgeSetupError) as caught:
        judge.simulate(TASKS)
    assert "refuses the key (HTTP 401" in str(caught.value) and "TEST_KEY" in str(caught.value)
    assert "sk-wrong" not in str(caught.value)


def test_every_token_has_a_value_that_agrees_with_the_packaged_judge(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", SECRET)
    example = Example(TASKS[0].tokens, [6.0 if token == " 1848" else 0.0 for token in TASKS[0].tokens])
    rates = [RateTask("years", example.tokens, [token == " 1848" for token in example.tokens])]
    with judge_at(server, tmp_path / "server") as judge:
        assert judge.identity["simulation"] == "one-at-a-time-wide"
        served = judge.simulate(TASKS)
        (said,) = judge.explain([ExplainTask([example])])
        grades = [rating.grade for rating in judge.rate(rates)]
        rows = judge.drain_calls()
    assert said.status == "ok" and said.text
    assert {row["status"] for row in rows} == {"ok"}
    with JUDGES.get("local")(JudgeConfig(), tmp_path / "local", Progress(quiet=True)) as packaged:
        known = packaged.simulate(TASKS)
        known_grades = [rating.grade for rating in packaged.rate(rates)]
    for one, other in zip(served, known, strict=True):
        assert (one.status, other.status) == ("ok", "ok")
        assert one.expected is not None and None not in one.expected
        assert one.mass is not None and one.unseen is not None
        assert all(bound < 0.01 * mass for mass, bound in zip(one.mass, one.unseen, strict=True))
        assert np.abs(one.values - other.values).max() < 1.5  # of 10
        assert np.abs(np.log(np.array(one.mass) / np.array(other.mass))).max() < 1.5
    both = [np.concatenate([simulation.values for simulation in side]) for side in (served, known)]
    assert np.corrcoef(*both)[0, 1] > 0.95
    assert None not in grades and np.abs(np.array(grades, float) - np.array(known_grades, float)).max() < 0.3  # of 3
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes()


def test_no_server_is_left_behind(tmp_path: Path) -> None:
    with llama_server(path("smollm2-135m-instruct"), SECRET) as running:
        os.kill(running.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(running.pid, 0)
