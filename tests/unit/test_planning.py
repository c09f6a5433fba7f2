"""What a plan promises is never exceeded, by a judge that counts, spoils every first answer and writes as much as it may."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_fakes import Answer, echoed, endpoint, ok, prompts_of
from suite_case import tiny_suite

import evalkit
from evalkit.cli import main
from evalkit.judges.base import Questions
from evalkit.judges.bounds import Bill, Widths, bill
from evalkit.judges.config import JudgeConfig
from evalkit.judges.cost import Usage
from evalkit.runs.run import make_plan, run

PRICES = "dollars_per_million_prompt = 1.0\ndollars_per_million_completion = 30.0\n"
MOST = 7
"""Tokens of an explanation."""


class Counting:
    """An endpoint that charges a token for every two bytes of prompt and all completion tokens, and spoils each first answer."""

    def __init__(self) -> None:
        self.calls, self.prompt, self.completion = 0, 0, 0
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, number: int, path: str, body: dict[str, Any]) -> Answer:
        prompts, most = prompts_of(body), int(body["max_tokens"])
        with self._lock:
            again = [prompt in self._seen for prompt in prompts]
            self._seen |= set(prompts)
            used = {"prompt_tokens": sum(len(p.encode()) // 2 for p in prompts), "completion_tokens": most * len(prompts)}
            self.calls += len(prompts)
            self.prompt += used["prompt_tokens"]
            self.completion += used["completion_tokens"]
        choices: list[dict[str, Any]] = []
        for index, (prompt, known) in enumerate(zip(prompts, again, strict=True)):
            choice: dict[str, Any] = {"text": " words about rain\n", "finish_reason": "stop"}
            if body.get("echo"):
                choice = echoed(prompt)
            elif body.get("logprobs"):
                choice = {"text": "3", "logprobs": {"top_logprobs": [{"3": -0.1, "x": -4.0}]}}
            choices.append({"index": index, **(choice if known else {"text": None, "logprobs": None})})
        return ok({"choices": choices, "usage": used})

    @property
    def dollars(self) -> float:
        return (self.prompt * 1.0 + self.completion * 30.0) / 1e6


@pytest.mark.parametrize("way", ["slots", "one-at-a-time"])
@pytest.mark.parametrize("explain_from", ["peaks", "table"])
def test_a_run_costs_no_more_than_its_plan_even_if_every_call_fails_once(
    way: str, explain_from: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVALKIT_TEST_KEY", "k")
    counting = Counting()
    with endpoint(counting) as fake:
        judge = (
            f'provider = "openai"\nmodel = "m"\nbase_url = "{fake.url}"\napi_key_env = "EVALKIT_TEST_KEY"\nrounds = 2\n'
            f'simulation = "{way}"\nexplain_from = "{explain_from}"\nexplanation_tokens = {MOST}\nbatch = 1\n{PRICES}'
        )
        suite, store = tiny_suite(tmp_path / "case", judge=judge), tmp_path / "out" / "evalkit.duckdb"
        planned = make_plan(suite, store).estimate.bill
        assert run(suite, store, only="autointerp").status == "done"
        assert fake.requests > 20
    assert counting.calls <= planned.calls
    assert counting.prompt <= planned.usage.prompt and counting.completion <= planned.usage.completion
    assert planned.dollars is not None and 0 < counting.dollars <= planned.dollars
    assert planned.calls <= 2 * counting.calls and planned.usage.prompt <= 6 * counting.prompt, "a bound, and not far off"
    left = make_plan(suite, store).estimate
    assert left.units == 2 and left.bill == Bill(), "what is done costs nothing; reconstruction asks nobody"


def test_a_second_judge_is_in_the_bill(tmp_path: Path) -> None:
    suite = tiny_suite(tmp_path / "case")
    one = make_plan(suite, tmp_path / "out" / "evalkit.duckdb").estimate.bill
    suite.write_text(suite.read_text() + '\n[[reference]]\nprovider = "scripted"\nmodel = "second"\n')
    both = make_plan(suite, tmp_path / "out" / "evalkit.duckdb").estimate.bill
    # two dictionaries and two rounds: four features are explained, and fragments of either half simulated: two, and one (the
    # judge) or two (the reference) of the null
    assert one.calls == 2 * 2 * (4 + 2 * 4 * (2 + 1))
    assert both.calls == one.calls + 2 * 2 * (4 + 2 * 4 * (2 + 2)) and both.usage.prompt > 2 * one.usage.prompt


def test_a_bill_by_hand() -> None:
    """One explanation of one token of five bytes: the prompt's own text, two rounds, and each price for its own tokens."""
    widths = Widths(lambda ids: [["a", "bc", "defgh"][i] for i in ids], np.array([[0, 1, 0, 2], [1, 1, 1, 1]]), 3)
    assert [widths.stretch(n) for n in (1, 2, 3, 4, 9)] == [5, 6, 8, 9, 9]
    assert widths.written(3) == 15 and widths.context == 4
    config = JudgeConfig(
        provider="openai", model="m", simulation="slots", explanation_tokens=11, dollars_per_million_prompt=2.0,
        dollars_per_million_completion=50.0,
    )  # fmt: skip
    asked = [Questions("explain", 3, fragments=1, tokens=1)]
    found = bill(config, "slots", asked, widths)
    assert found.calls == 2 * 3 and found.usage.completion == 2 * 3 * 11
    assert found.dollars == pytest.approx((2.0 * found.usage.prompt + 50.0 * found.usage.completion) / 1e6)
    longer = bill(config, "slots", [asked[0]._replace(tokens=4)], widths)
    assert longer.usage.prompt > found.usage.prompt
    unpriced = JudgeConfig(provider="openai", model="m", dollars_per_million_prompt=2.0)
    assert bill(unpriced, "slots", asked, widths).dollars is None
    assert bill(JudgeConfig(provider="lexical"), "slots", asked, widths) == Bill(0, Usage(), 0.0)
    # not known how the endpoint simulates: as if in the dearest way, and all are tried
    simulated = [Questions("simulate", 5, tokens=4)]
    assert bill(config, None, simulated, widths).calls == 2 * 5 * 4 + 4


def test_a_plan_says_what_room_the_disk_must_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight windows of 32 tokens, read at 31 places, and the captures of both texts in float32 with a byte a position."""
    suite, store = tiny_suite(tmp_path / "case"), tmp_path / "out" / "evalkit.duckdb"
    vocabulary = json.loads((tmp_path / "case" / "model" / "config.json").read_text())["vocab_size"]
    room = make_plan(suite, store).estimate.room
    assert room.temporary == 3 * 4 * 8 * 31 * vocabulary
    tokens = 2 * (3000 // 32) * 32
    assert room.cache == tokens * (4 * 32 + 1)
    assert main(["plan", str(suite), "--results", str(store)]) == 0
    assert "room on the disk: at most 1.0 MB of temporary files" in capsys.readouterr().out
    run(suite, store, only="reconstruction")
    with evalkit.open_results(store):
        assert make_plan(suite, store).estimate.room == (0, 0)
