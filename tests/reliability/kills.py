"""A suite killed again and again, with a healthy judge or a faulty one: equal tables, and nothing paid for twice.

1. One undisturbed run with a healthy judge gives the tables that are expected, character for character, and the number of its
   events.
2. Runs in fresh folders are killed at random events, and started again, until enough kills are made; each folder is run to
   its end. The faulty judge spoils a share of its replies in every way of ``FAULTS``.
3. Of each start it is counted how many prompts got a good answer and how many answers were stored. Where they differ without
   a kill, or by more than what can be in flight with one, an answer that was there has been asked for again.

The long form: ``python tests/reliability/kills.py --kills 50 --features 1000``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import judge_fakes
from judge_fakes import Answer, error, ok
from suite_case import tiny_suite
from warm import STORE, Warm, events, said

import evalkit
from evalkit.judges.calls import CallStore
from evalkit.report.tables import paper_table

BATCH, CONCURRENCY = 2, 2
SHARE = 0.3
"""Of the faulty judge's replies, how many are spoilt."""


def good(body: dict[str, Any]) -> dict[str, Any]:
    """A healthy reply: explanations and digits that differ from prompt to prompt, the same every time."""
    choices = []
    for index, prompt in enumerate(judge_fakes.prompts_of(body)):
        number = zlib.crc32(prompt.encode())
        choice: dict[str, Any] = {"text": f" words of kind {number}\n", "finish_reason": "stop"}
        if body.get("echo"):
            choice = judge_fakes.echoed(prompt) | {"finish_reason": "stop"}
            for place, top in enumerate(choice["logprobs"]["top_logprobs"]):
                if top:
                    top[str((number >> place % 24) % 10)] = -2.6  # beside a digit of 0.90 and another token of 0.02
        choices.append({"index": index, **choice})
    count = len(choices)
    return {"choices": choices, "usage": {"prompt_tokens": 100 * count, "completion_tokens": 5 * count}}


def _without_choices(body: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> Answer:
    reply = good(body)
    for choice in reply["choices"]:
        change(choice)
    return ok(reply)


def _lost(body: dict[str, Any]) -> Answer:
    """A connection that breaks off: more is announced than comes."""
    status, _, data = ok(good(body))
    return status, {"Content-Length": str(len(data) + 100), "Connection": "close"}, data


def _answered(body: dict[str, Any], text: str) -> Answer:
    """Words in the place of what was asked for, as a chat model writes them; nothing is echoed."""
    return _without_choices(body, lambda c: (c.pop("logprobs", None), c.update(text=text)))


def _cut(body: dict[str, Any]) -> Answer:
    """Every answer ends after its first piece: half of the echo, or an explanation without a word."""

    def cut(choice: dict[str, Any]) -> None:
        choice["finish_reason"] = "length"
        logprobs = choice.get("logprobs")
        if logprobs is None:
            choice["text"] = ""
            return
        half = len(logprobs["text_offset"]) // 2
        choice["text"] = choice["text"][: logprobs["text_offset"][half]]
        choice["logprobs"] = {name: values[:half] for name, values in logprobs.items()}

    return _without_choices(body, cut)


def _other(body: dict[str, Any]) -> Answer:
    """The answer to another prompt, which the echo shows; an explanation is empty, as its prompt is not echoed."""
    if not body.get("echo"):
        return _answered(body, "")
    return ok(good({**body, "prompt": [f"Another text.\t{prompt[::-1]}" for prompt in judge_fakes.prompts_of(body)]}))


FAULTS: dict[str, Callable[[dict[str, Any]], Answer]] = {
    "HTTP 500": lambda body: error(500),
    "HTTP 502, a page": lambda body: (502, {"Content-Type": "text/html"}, b"<html>bad gateway</html>"),
    "HTTP 503": lambda body: error(503, "overloaded"),
    "HTTP 429": lambda body: error(429, "slow down", {"Retry-After": "0"}),
    "a page under 200": lambda body: (200, {"Content-Type": "text/html"}, b"<html>oops</html>"),
    "half a reply": lambda body: (200, {}, json.dumps(good(body)).encode()[:-40]),
    "a lost connection": _lost,
    "nothing in it": lambda body: ok({}),
    "no choices": lambda body: ok({**good(body), "choices": []}),
    "null choices": lambda body: ok({**good(body), "choices": None}),
    "choices of nothing": lambda body: ok({**good(body), "choices": [{"index": i} for i in range(BATCH)]}),
    "answers cut by length": _cut,
    "refusals": lambda body: _answered(body, "I'm sorry, but I can't help with that.\n"),
    "answers to another prompt": _other,
    "null in the place of the answer": lambda body: _without_choices(body, lambda c: c.update(text=None, logprobs=None)),
}


class Judge:
    """The script of an endpoint that counts the prompts it gave a good answer to."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.seed = share, seed
        self.given: list[str] = []
        self.met: set[str] = set()
        """Faults that were sent."""
        self._lock = threading.Lock()

    def __call__(self, number: int, path: str, body: dict[str, Any]) -> Answer:
        chance = random.Random(self.seed * 1_000_003 + number)
        if chance.random() < self.share:
            name = chance.choice(sorted(FAULTS))
            with self._lock:
                self.met.add(name)
            return FAULTS[name](body)
        with self._lock:
            self.given += judge_fakes.prompts_of(body)
        return ok(good(body))


class Report(NamedTuple):
    """What a series of kills came to."""

    kills: int
    folders: int
    starts: int
    unequal: list[Path]
    """Folders whose tables differ."""
    left: list[Path]
    """Temporary files and folders that are still there."""
    asked_again: int
    """Stored answers that were asked for again."""
    in_flight: int
    """Good answers that a kill kept from being stored."""
    faults: frozenset[str]
    """Kinds of faults the judge sent."""

    def __str__(self) -> str:
        return (
            f"{self.kills} kills in {self.folders} folders, {self.starts} starts; tables differ in {len(self.unequal)} folders; "
            f"stored answers asked again: {self.asked_again}; answers in flight at a kill: {self.in_flight}; "
            f"temporary folders left: {len(self.left)}; kinds of faults: {len(self.faults)}"
        )


def tables(folder: Path) -> str:
    """Every table of a results folder as text and as CSV."""
    with evalkit.open_results(folder / STORE) as results:
        found = [results.table(name) for name in results.evaluations(results.run_id(None))]
        run = results.run_id(None)
        return "\n".join(paper_table(table, kind).replace(run, "RUN") for table in found for kind in ("text", "csv"))


def suite(folder: Path, url: str, features: int) -> Path:
    """The tiny suite with a judge at ``url``."""
    judge = (
        f'provider = "openai"\nmodel = "fake"\nbase_url = "{url}"\napi_key_env = "EVALKIT_TEST_KEY"\nsimulation = "slots"\n'
        f"batch = {BATCH}\nconcurrency = {CONCURRENCY}\nmax_attempts = 3\ngive_up_after = 1000\ntimeout_s = 600.0"
    )
    path = tiny_suite(folder, judge=judge)
    text = path.read_text()
    if features > 4:
        text = text.replace("features = 4", f"features = {features}")
        text = text.replace("features = 64, k = 4", f"features = {2 * features}, k = 16")
        text = text.replace("score_tokens = 3000", "score_tokens = 11000")
    path.write_text(text)
    return path


def series(warm: Warm, home: Path, *, kills: int, share: float, features: int = 4, seed: int = 0) -> Report:
    """Kill runs until ``kills`` are made; what it came to.

    Args:
        warm: forks the runs.
        home: a new folder for all of it.
        kills: how many.
        share: of the judge's replies that are spoilt.
        features: explained in each dictionary.
        seed: of the moments and of the faults.
    """
    healthy = Judge(0.0, seed)
    with judge_fakes.endpoint(healthy) as endpoint:
        path = suite(home / "case", endpoint.url, features)
        whole = home / "whole"
        assert warm.run(path, whole) == 0, said(whole)
        expected, count = tables(whole), events(whole)
        assert len(CallStore(whole / "calls")) == len(set(healthy.given)) == len(healthy.given)

        judge = endpoint.script = Judge(share, seed)
        chance, starts, made, again, lost = random.Random(seed), 0, 0, 0, 0
        folders: list[Path] = []
        while made < kills:
            folders.append(home / f"killed-{len(folders)}")
            ended = -1
            # a faulty judge ends starts with 4: calls failed, and the same command asks for those alone
            while ended != 0:
                stored, answered = len(CallStore(folders[-1] / "calls")), len(judge.given)
                die_at = chance.randint(1, count * 2 // 3) if made < kills else 0
                ended = warm.run(path, folders[-1], die_at=die_at)
                assert ended in (-9, 0, 4), said(folders[-1])
                starts, made = starts + 1, made + (ended == -9)
                missed = len(judge.given) - answered - (len(CallStore(folders[-1] / "calls")) - stored)
                if ended == -9 and missed <= BATCH * CONCURRENCY:
                    lost += missed
                else:
                    again += missed
                assert starts < 20 * kills + 50, said(folders[-1])
    return Report(
        made,
        len(folders),
        starts,
        [folder for folder in folders if tables(folder) != expected],
        [path for folder in folders for path in folder.rglob(".*") if path.suffix in (".tmp", ".training", ".old")],
        again,
        lost,
        frozenset(judge.met),
    )


def main() -> int:
    """The long form from the command line; 0 where all is as it must be."""
    parser = argparse.ArgumentParser(description="Kill runs of a suite at random events and compare their tables.")
    parser.add_argument("--kills", type=int, default=50, help="kills with a healthy judge, and as many with a faulty one")
    parser.add_argument("--features", type=int, default=1000, help="features explained in the largest dictionary")
    parser.add_argument("--seed", type=int, default=0, help="of moments and faults")
    given = parser.parse_args()
    wrong = False
    with tempfile.TemporaryDirectory(prefix="evalkit-kills-") as folder, Warm() as warm:
        for name, share in (("healthy", 0.0), ("faulty", SHARE)):
            found = series(warm, Path(folder) / name, kills=given.kills, share=share, features=given.features, seed=given.seed)
            print(f"{name} judge: {found}", flush=True)
            wrong |= bool(found.unequal or found.left or found.asked_again)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
