"""A judge of another service is one module outside the package: it registers itself, has settings of its own and judges."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from suite_case import tiny_suite

from evalkit.errors import JudgeSetupError, SuiteError
from evalkit.judges.base import JUDGES, Example, ExplainTask, RateTask, SimulateTask, settings_class
from evalkit.judges.config import JudgeConfig, in_key
from evalkit.judges.model_judge import ModelJudge
from evalkit.suite import load_suite
from evalkit.util.progress import Progress

TOY = '''"""A judge of a toy service that only chats."""
import json
from dataclasses import dataclass

from evalkit.judges.requests import Backend, Completion, Failed, Request
from evalkit.judges.base import JUDGES
from evalkit.judges.config import JudgeConfig, not_in_key
from evalkit.judges.model_judge import judge_of
from evalkit.judges.troubles import Trouble


@dataclass(frozen=True)
class ToySettings(JudgeConfig):
    level: int = 7
    """Activation that it gives to every token."""
    region: str = not_in_key("north")
    """Where the service runs."""


class ToyBackend(Backend):
    def __init__(self, level):
        self.where, self.level, self.requests = "the toy service", level, []

    def complete(self, request: Request) -> Completion:
        self.requests.append(request)
        if not request.messages:
            raise Failed(Trouble(404, "this service only chats"))
        if "grade" in (request.schema or {}).get("properties", {}):
            return Completion.of([json.dumps({"grade": 3})])
        if request.schema:
            tokens = request.messages[-1]["content"].split("one a line:\\n")[1].split("\\n")
            entries = [{"token": token, "activation": self.level} for token in tokens]
            return Completion.of([json.dumps({"activations": entries})], prompt_tokens=9, completion_tokens=5)
        return Completion.of(["words about rain"], prompt_tokens=4, completion_tokens=3)


@JUDGES.register("toy")
def toy(config, folder, progress):
    return judge_of(ToyBackend(config.level), config, folder, progress, {"service": "toy"})


toy.settings = ToySettings
'''
RAIN = ExplainTask([Example([" rain", " fell"], [4.0, 0.0])])


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[ModuleType]:
    path = tmp_path / "toy_judge.py"
    path.write_text(TOY)
    spec = importlib.util.spec_from_file_location("toy_judge", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_judge"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["toy_judge"], JUDGES._items["toy"]


def judge(config: JudgeConfig, folder: Path) -> ModelJudge:
    return JUDGES.get("toy")(config, folder, Progress(quiet=True))


def test_a_backend_from_outside_the_package_judges(toy: ModuleType, tmp_path: Path) -> None:
    code = [line for line in TOY.splitlines() if line.strip()]
    assert len(code) < 40
    config = settings_class("toy")(provider="toy", model="small")
    with judge(config, tmp_path) as one:
        assert one.identity["simulation"] == "constrained", "it was tried out"
        assert one.explain([RAIN])[0].text == "words about rain"
        assert one.simulate([SimulateTask("rain", [" rain", " fell"])])[0].expected == pytest.approx([70 / 9] * 2, abs=1e-6)
        assert one.rate([RateTask("rain", [" rain"], [True])])[0].grade == 3.0
        rows = one.drain_calls()
        assert [(row["purpose"], row["prompt_tokens"]) for row in rows] == [
            ("simulate", 9), ("explain", 4), ("simulate", 9), ("rate", None),
        ]  # fmt: skip
    with judge(config, tmp_path) as again:
        assert again.explain([RAIN])[0].text == "words about rain"
        assert again.transport.backend.requests == []  # type: ignore[attr-defined]


def test_its_settings_are_part_of_the_key_unless_they_are_marked(toy: ModuleType, tmp_path: Path) -> None:
    def identity(**settings: object) -> dict[str, object]:
        with judge(toy.ToySettings(provider="toy", model="small", simulation="constrained", **settings), tmp_path) as one:
            return one.identity

    assert identity()["level"] == 7 and "region" not in identity()
    assert identity(level=8) != identity() == identity(region="south", timeout_s=9.0, budget_tokens=99)


def test_its_settings_stand_in_a_suite_and_are_checked(toy: ModuleType, tmp_path: Path) -> None:
    def suite(judge: str) -> JudgeConfig | None:
        return load_suite(tiny_suite(tmp_path, judge=judge)).judge

    found = suite('provider = "toy"\nmodel = "small"\nlevel = 3')
    assert isinstance(found, toy.ToySettings) and found.level == 3
    with pytest.raises(JudgeSetupError, match="no judge provider called 'toi'") as caught:
        suite('provider = "toi"')
    assert "did you mean 'toy'" in str(caught.value)
    with pytest.raises(SuiteError, match="unknown key 'levle'") as unknown:
        suite('provider = "toy"\nlevle = 3')
    assert "did you mean 'level'" in str(unknown.value)


def test_a_failure_of_another_service_is_judged_by_its_kind(toy: ModuleType, tmp_path: Path) -> None:
    config = toy.ToySettings(provider="toy", model="small", simulation="slots")
    with judge(config, tmp_path) as one, pytest.raises(JudgeSetupError, match="only chats") as caught:
        one.simulate([SimulateTask("rain", [" rain"])])
    assert caught.value.where == "the toy service"


def test_a_mistake_in_a_backend_ends_the_run_with_its_words(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: object, request: object) -> None:
        raise KeyError("no such field")

    monkeypatch.setattr(toy.ToyBackend, "complete", wrong)
    config = toy.ToySettings(provider="toy", model="small", simulation="constrained")
    with judge(config, tmp_path) as one, pytest.raises(JudgeSetupError, match="KeyError: 'no such field'"):
        one.explain([RAIN])


def test_what_changes_no_answer_is_marked_where_it_is_declared() -> None:
    marked = set(JudgeConfig.__dataclass_fields__) - set(in_key(JudgeConfig()))
    assert marked == {
        *("api_key_env", "concurrency", "batch", "timeout_s", "max_attempts", "rounds", "give_up_after", "startup_s"),
        *("budget_tokens", "budget_dollars", "dollars_per_million_prompt", "dollars_per_million_completion"),
    }
