"""A whole suite on a tiny random model and made-up text: seconds, no assets, no network."""

from __future__ import annotations

import random
from pathlib import Path

from judge_fakes import tiny_model

WORDS = [
    "fox",
    "dog",
    "rain",
    "snow",
    "storms",
    "because",
    "since",
    "years",
    "reasons",
    "weather",
    "one",
    "thing",
    "text",
    "lazy",
    "quick",
    "brown",
    "over",
    "the",
    "of",
    "a",
]


def tiny_suite(folder: Path, *, judge: str = 'provider = "scripted"', extra: str = "") -> Path:
    """Model, text and suite file below ``folder``; the path of the suite file."""
    if not (folder / "model").exists():
        tiny_model(folder / "model")
        rng = random.Random(0)
        for side, count in (("fit", 12), ("score", 30)):
            (folder / side).mkdir(parents=True)
            for number in range(count):
                words = " ".join(rng.choice(WORDS) for _ in range(400))
                (folder / side / f"{number:02}.txt").write_text(f"{side} {number} {words}")
    path = folder / "tiny.toml"
    path.write_text(
        f"""
hook_points = ["blocks.0.hook_resid_post"]

[suite]
name = "tiny"

[model]
path = "{folder / "model"}"

[corpus]
fit = "folder:{folder / "fit"}"
score = ["folder:{folder / "score"}"]
fit_tokens = 3000
score_tokens = 3000
context = 32

[activations]
norm_multiple = 0

[[dictionary]]
name = "SAE"
train = {{ architecture = "topk", features = 64, k = 4, tokens = 4096, batch = 256 }}

[[dictionary]]
name = "neurons"
baseline = "neurons"

[judge]
{judge}

[[reference]]
provider = "lexical"

[[evaluation]]
name = "reconstruction"
windows = 8
alive_threshold = 1

[[evaluation]]
name = "autointerp"
features = 4
fragments = 2
fragment = 10
null_fragments = 1
{extra}
"""
    )
    return path
