"""The golden suites: every registered evaluation on a tiny random model, made-up text and dictionaries of every source.

1. The text is of drawn words and four-digit years, so that windows rarely begin alike and codes rarely tie.
2. The imported dictionary has planted features: each reads the embedding of one token. The others are trained or fitted here.
3. A suite of one layer has every dictionary; one of two layers has what takes several, and patching, whose rows are many.
4. Both go through ``evalkit.run`` into one results file.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from judge_fakes import tiny_model
from safetensors.torch import load_file

import evalkit

HOOK = "blocks.0.hook_resid_post"

NOUNS = ("fox", "dog", "rain", "snow", "storms", "years", "reasons", "weather", "thing", "text", "lizard", "Vienna", "Otto")
VERBS = ("jumps over", "looks for", "leaves", "sees", "forgets", "paints", "counts")
LINKS = ("because", "since", "while", "and", "but", "until")
ADJECTIVES = ("quick", "lazy", "brown", "cold", "unknown", "small")

PLANTED = (" rain", " snow", " storms", " because", " since", " the", " fox", " dog", " l", " over", "1", "8", "'", "s", ".", ",")
"""Texts whose first token a planted feature reads."""

SUITE = """
hook_points = ["blocks.0.hook_resid_post"]

[suite]
name = "golden"
seed = 3

[model]
path = "model"

[corpus]
fit = "folder:fit"
score = ["folder:score", "folder:other"]
fit_tokens = 2400
score_tokens = 1600
context = 32

[activations]
norm_multiple = 0

[[dictionary]]
name = "planted"
import = "planted"
any_hook_point = true

[[dictionary]]
name = "TopK"
train = { architecture = "topk", features = 24, k = 4, tokens = 2048, batch = 128 }

[[dictionary]]
name = "PCA"
baseline = "pca"
components = 12
top_k = 4

[[dictionary]]
name = "ICA"
baseline = "ica"
components = 8

[[dictionary]]
name = "neurons"
baseline = "neurons"

[[dictionary]]
name = "random"
baseline = "random"
features = 16
normalised = true

[judge]
provider = "scripted"

[[reference]]
provider = "lexical"

[[evaluation]]
name = "reconstruction"
windows = 6
alive_threshold = 3
parity = true

[[evaluation]]
name = "geometry"
alive_threshold = 3
against = "planted"
matched_above = 0.5

[[evaluation]]
name = "autointerp"
features = 3
fragments = 2
fragment = 8

[[evaluation]]
name = "inputs"
features = 3
least_windows = 3
bins = 4
tokens = 3
contexts = 1
around = 3

[[evaluation]]
name = "ablation"
features = 3
least_windows = 3
contexts = 3
tokens = 3
prefer = "one token"

[[evaluation]]
name = "ablation"
features = 2
least_windows = 3
contexts = 3
tokens = 2
reverse = "clamp"
strength = 1.5

[[evaluation]]
name = "concepts"
files = ["dogs.toml", "snow.toml"]
feature_ids = [1]
kept = 2
texts = 12
null_draws = 2
inject = 6
rate = 3

[[evaluation]]
name = "prediction"
contexts = 12
nulls = 2

[[evaluation]]
name = "steering"
features = 1
least_windows = 3
tokens = 4
strengths = [2.0]
prompts = ["The quick brown fox", "Because of the weather"]
judge = true
"""


LAYERS = """
hook_points = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]

[suite]
name = "golden-layers"
seed = 3

[model]
path = "model"

[corpus]
fit = "folder:fit"
score = ["folder:score"]
fit_tokens = 2400
score_tokens = 800
context = 32

[activations]
norm_multiple = 0

[[dictionary]]
name = "planted"
import = "planted"
any_hook_point = true

[[dictionary]]
name = "random"
baseline = "random"
features = 8
normalised = true

[judge]
provider = "scripted"

[[evaluation]]
name = "causal_tree"
features = 2
least_windows = 6
contexts = 8
tested = 5
checked = 3
least_share = 0.0
alpha = 0.5
depth = 1
explain = true
fragments = 2
fragment = 8

[[evaluation]]
name = "ioi"
task = "jsonl"
path = "pairs.jsonl"
pairs = 6
rankings = ["acdc-fast", "attribution", "integrated-gradients", "single", "greedy", "largest-edit", "acdc", "random"]
settings = ["acdc.count=4", "acdc.low=-2.5"]
seeds = 1
top = 3
area_to = 8
least_accuracy = 0
"""


def sentence(rng: random.Random) -> str:
    """A sentence that no other one is likely to repeat."""
    a, b, c = rng.sample(NOUNS, 3)
    own = "'s" if rng.random() < 0.5 else ""
    head = f"In {rng.randint(1000, 2099)} the {rng.choice(ADJECTIVES)} {a}{own} {b} {rng.choice(VERBS)} {rng.randint(2, 99)} {c}"
    return f"{head} {rng.choice(LINKS)} {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}."


def write_text(folder: Path) -> None:
    """Three folders of documents."""
    rng = random.Random(5)
    for side, documents in (("fit", 8), ("score", 8), ("other", 6)):
        (folder / side).mkdir()
        for number in range(documents):
            (folder / side / f"{number:02}.txt").write_text(" ".join(sentence(rng) for _ in range(16)))


def write_concepts(folder: Path) -> None:
    """A concept of pairs and one of words."""
    rng = random.Random(6)
    pairs = [
        [f"{rng.choice(ADJECTIVES)} {rng.randint(10, 99)} {{}} {rng.choice(VERBS)} {rng.choice(NOUNS)}"] * 2 for _ in range(10)
    ]
    rows = [json.dumps([one.format("dog"), other.format(rng.choice(("thing", "text", "years")))]) for one, other in pairs]
    (folder / "dogs.toml").write_text('title = "dogs"\nwords = ["dog"]\npairs = [\n' + ",\n".join(rows) + "\n]\n")
    (folder / "snow.toml").write_text('title = "snow"\nwords = ["snow"]\n')


def write_pairs(folder: Path) -> None:
    """Pairs of prompts that differ in one digit."""
    lines = []
    for n in range(6):
        a, b, wrong = (str((n + step) % 10) for step in (0, 3, 5))
        rest = f" dogs in the snow, {n} foxes in the rain and"
        pair = {"base": f"{a}{rest}", "target": f"{b}{rest}", "base_answer": a, "target_answer": b, "wrong": wrong}
        lines.append(json.dumps(pair))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def write_planted(folder: Path) -> None:
    """A ReLU dictionary whose features read the embeddings of ``PLANTED``."""
    from transformers import AutoTokenizer

    from evalkit.dictionaries.relu import ReLU
    from evalkit.dictionaries.storage import save_dictionary

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = [tokenizer.encode(text)[0] for text in PLANTED]
    rows = load_file(folder / "model" / "model.safetensors")["model.embed_tokens.weight"][ids]
    norms = rows.norm(dim=1)
    unit = rows / norms[:, None]
    tensors = {
        "W_enc": unit.T.contiguous(),
        "b_enc": -0.4 * norms,
        "W_dec": unit.contiguous(),
        "b_dec": torch.zeros(rows.shape[1]),
    }
    save_dictionary(ReLU(tensors, hook_point=HOOK, model="made-up"), folder / "planted")


def write_suites(folder: Path) -> list[Path]:
    """All that the suites read, below ``folder``; the paths of the suite files."""
    tiny_model(folder / "model")
    write_text(folder)
    write_concepts(folder)
    write_pairs(folder)
    write_planted(folder)
    paths = []
    for name, text in (("golden.toml", SUITE), ("layers.toml", LAYERS)):
        paths.append(folder / name)
        paths[-1].write_text(text)
    return paths


def run_suites(folder: Path) -> Path:
    """Run the suites below ``folder``; their results file.

    Raises:
        AssertionError: a run did not end with code 0.
    """
    store = folder / "out" / "evalkit.duckdb"
    for suite in write_suites(folder):
        outcome = evalkit.run(suite, store)
        assert outcome.exit_code == 0, outcome.message
    return store
