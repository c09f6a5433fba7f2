"""``kill -9`` a run anywhere, start it again: the same table, and no judge call made twice."""

import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import judge_fakes
import pytest
from suite_case import tiny_suite

import evalkit

ROOT = Path(__file__).parents[2]
COLUMNS = ["dictionary", "metric", "mean", "low", "high", "n", "failed", "undefined"]


def start(suite: Path, store: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "evalkit", "run", str(suite), "--results", str(store), "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "EVALKIT_TEST_KEY": "k"},
    )


def answer(prompt: str, echo: bool) -> dict:
    """Explanations and digits that differ from prompt to prompt and from slot to slot, the same every time."""
    number = zlib.crc32(prompt.encode())
    if not echo:
        return {"text": f" words of kind {number}\n"}
    choice = judge_fakes.echoed(prompt)
    for place, top in enumerate(choice["logprobs"]["top_logprobs"]):
        if top:
            top[str((number >> place % 24) % 10)] = -0.5
    return choice


def tables(store: Path):
    with evalkit.open_results(store) as results:
        return [results.table(name)[COLUMNS] for name in ("reconstruction", "autointerp")]


@pytest.mark.timeout(900)
def test_killed_anywhere_and_started_again_gives_the_same_table_and_buys_nothing_twice(tmp_path):
    bought: list[str] = []

    def script(number, path, body):
        (prompt,) = judge_fakes.prompts_of(body)
        bought.append(prompt)
        time.sleep(0.05)
        usage = {"prompt_tokens": 100, "completion_tokens": 5}
        return judge_fakes.ok({"choices": [{"index": 0, **answer(prompt, body.get("echo"))}], "usage": usage})

    with judge_fakes.endpoint(script) as endpoint:
        judge = (
            f'provider = "openai"\nmodel = "fake"\nbase_url = "{endpoint.url}"\napi_key_env = "EVALKIT_TEST_KEY"\n'
            'simulation = "slots"\nbatch = 1\nconcurrency = 1'
        )
        suite = tiny_suite(tmp_path / "case", judge=judge)
        whole = tmp_path / "whole" / "evalkit.duckdb"
        done = start(suite, whole)
        _, errors = done.communicate()
        assert done.returncode == 0, errors.decode()
        expected, full = tables(whole), len(bought)
        assert expected[1]["mean"].notna().any()
        assert full > 20
        assert len(set(bought)) == full

        bought.clear()
        killed = tmp_path / "killed" / "evalkit.duckdb"
        rng = random.Random(1)
        for _ in range(3):
            run = start(suite, killed)
            before = len(bought)
            # past the start, in the middle of the judge's work, at no particular place
            wanted = before + rng.randint(3, 12)
            while len(bought) < wanted and run.poll() is None:
                time.sleep(0.01)
            run.send_signal(signal.SIGKILL)
            run.communicate()
        last = start(suite, killed)
        _, errors = last.communicate()
        assert last.returncode == 0, errors.decode()
        for a, b in zip(expected, tables(killed), strict=True):
            assert a.equals(b)
        # a call in flight at a kill may be asked again: one for each kill, as one is in flight at a time
        assert len(bought) <= full + 3
        again = start(suite, killed)
        again.communicate()
        assert again.returncode == 0
        assert len(bought) <= full + 3
