"""ACDC on IOI prompts: the straightforward loop over whole forward passes against evalkit's ``acdc`` and ``acdc-fast``.

    python benchmarks/patching.py [--pairs 2] [--layer 24] [--visits 20] [-o FILE]

1. A TopK autoencoder is trained on the model's activations of other IOI prompts, or loaded (``--dictionary FOLDER``).
2. The loop: one whole run of all base prompts for every feature that is visited, patched by a hook, logits at every position. It
   is run for ``--visits`` decisions (0: to its end); its decisions must be those of evalkit's ``acdc`` at the same seed. How
   many visits the whole loop makes is known from the accepted sets, so its cost is visits times the measured time of one.
3. ``acdc`` at several seeds, ``acdc-fast`` and the other rankings; each ordering's curve at the same set sizes.
4. Random TopK dictionaries of growing size and growing k: what the effect of every single feature costs, encoding and the search
   for features that differ included.

Times are processor seconds of one thread, so that other work on the machine does not count. The model is packaged: nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from machine import described

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.loading import load_dictionary
from evalkit.dictionaries.topk import TopK
from evalkit.models.language_model import LanguageModel
from evalkit.models.loading import ModelConfig
from evalkit.patching.acdc import thresholds, visiting_order
from evalkit.patching.curves import grid
from evalkit.patching.patching import Patching, Point
from evalkit.patching.rankings import Ranking, rank
from evalkit.tasks.base import Pairs, build_pairs, report
from evalkit.training.loop.train import train
from evalkit.training.settings.config import train_config
from evalkit.util.progress import Progress

QUIET = Progress(quiet=True)
GROWTH = ((1024, 32), (2048, 32), (4096, 32), (8192, 32), (16384, 32), (16384, 8), (16384, 16), (16384, 64), (16384, 128))
"""Sizes and k of the dictionaries whose cost is compared: the size alone, then what differs."""
T = TypeVar("T")


class Timed(NamedTuple):
    """A ranking and its processor seconds."""

    ranking: Ranking
    seconds: float


def say(line: str) -> None:
    """News while it runs."""
    print(line, file=sys.stderr, flush=True)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What ``work`` returns and the processor seconds it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def real_vectors(pairs: Pairs, model: LanguageModel, hook_point: str) -> torch.Tensor:
    """Activations (M, D) of the base prompts, the first two positions and the padding left out."""
    parts = []
    for rows in torch.arange(pairs.n).split(32):
        x = model.activations(pairs.base[rows], hook_point)
        place = torch.arange(x.shape[1])
        parts.append(x[(place >= 2) & (place <= pairs.last[rows, None])])
    return torch.cat(parts)


class Loop:
    """The straightforward loop. One decision is one whole run of all base prompts."""

    def __init__(self, model: LanguageModel, hook_point: str, dictionary: Dictionary, pairs: Pairs) -> None:
        self.model, self.hook_point, self.pairs, self.dictionary = model, hook_point, pairs, dictionary
        self.rows = torch.arange(pairs.n)
        self.x, target = (model.activations(tokens, hook_point) for tokens in (pairs.base, pairs.target))
        self.codes, self.target_codes = dictionary.encode(self.x), dictionary.encode(target)
        self.error = self.x - dictionary.decode(self.codes)
        self.aim = self.model.logits(pairs.target)[self.rows, pairs.last].double().log_softmax(-1)

    def kl(self, patched: torch.Tensor) -> float:
        """Mean KL(patched || target) with the features where ``patched`` (F,) is True."""
        x = self.dictionary.decode(torch.where(patched, self.target_codes, self.codes)) + self.error
        with torch.no_grad():
            logits = self.model.run(self.pairs.base, [(self.hook_point, lambda found, hook: x)]).logits
        log = logits[self.rows, self.pairs.last].double().log_softmax(-1)
        return float((log.exp() * (log - self.aim)).sum(-1).mean())

    def decide(self, candidates: torch.Tensor, seed: int, visits: int) -> list[tuple[int, int, bool]]:
        """The first ``visits`` decisions (all: 0) as (threshold number, place among ``candidates``, removed)."""
        made: list[tuple[int, int, bool]] = []
        left = torch.ones(len(candidates), dtype=torch.bool)
        patched = torch.zeros(self.dictionary.n_features, dtype=torch.bool)
        patched[candidates] = True
        level = self.kl(patched)
        for step, tau in enumerate(thresholds()):
            for place in visiting_order(seed, step, len(candidates)).tolist():
                if not left[place]:
                    continue
                if visits and len(made) == visits:
                    return made
                patched[candidates[place]] = False
                without = self.kl(patched)
                removed = without - level < tau
                if removed:
                    left[place], level = False, without
                else:
                    patched[candidates[place]] = True
                made.append((step, place, removed))
            if not left.any():
                break
        return made


def agrees(ranking: Ranking, made: list[tuple[int, int, bool]]) -> bool:
    """Whether the loop's decisions are those behind ``ranking``: what left at which threshold, in which order."""
    groups = ranking.groups
    assert groups is not None
    gone = [place for _, place, removed in made if removed]
    history = ranking.order.flip(0).tolist()
    whole = all(not groups.sets[step][place] for step, place, removed in made if removed)
    kept = all(groups.sets[step][place] for step, place, removed in made if not removed)
    return whole and kept and history[: len(gone)] == gone


def visits_of(ranking: Ranking) -> int:
    """Decisions of the whole loop: each threshold visits what the one before left."""
    groups = ranking.groups
    assert groups is not None
    return len(ranking.order) + int(groups.sets[:-1].sum())


def random_topk(width: int, features: int, k: int, x: torch.Tensor) -> TopK:
    """Random unit directions read and written, centred on ``x``."""
    rows = torch.nn.functional.normalize(torch.randn(features, width, generator=torch.Generator().manual_seed(0)), dim=1)
    tensors = {"W_enc": rows.T.clone(), "b_enc": torch.zeros(features), "W_dec": rows, "b_dec": x.mean(0)}
    return TopK(tensors, k=k)


def rows_of(cells: list[list[str]]) -> list[str]:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]


def growth(model: LanguageModel, layer: int, pairs: Pairs) -> list[str]:
    """The table of point 4."""
    hook_point = f"blocks.{layer}.hook_resid_post"
    x = real_vectors(pairs, model, hook_point)
    cells = [["features", "k", "differ on the prompt", "runs", "seconds, finding them included", "ms for each that differs"]]
    for features, k in GROWTH:
        dictionary = random_topk(model.d_model, features, k, x)

        def whole(dictionary: Dictionary = dictionary) -> tuple[int, Ranking]:
            patching = Patching(model, [Point(hook_point, dictionary)], pairs)
            return int(patching.affected.sum()), rank("single", patching)

        (differ, ranking), seconds = timed(whole)
        cells.append([f"{features:,}", str(k), f"{differ / pairs.n:.0f}", f"{ranking.passes:,}", f"{seconds:.1f}",
                      f"{1000 * seconds / differ:.2f}"])  # fmt: skip
    return rows_of(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", default="smollm2-135m-instruct")
    parser.add_argument("--layer", type=int, default=24)
    parser.add_argument("--late", type=int, default=27, help="layer of the growth table")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--visits", type=int, default=20, help="decisions of the loop; 0: all")
    parser.add_argument("--dictionary", type=Path, help="folder of an autoencoder trained at that layer")
    parser.add_argument("--features", type=int, default=1152)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = described("cpu")
    model = LanguageModel.load(ModelConfig(package=options.package), QUIET)
    hook_point = f"blocks.{options.layer}.hook_resid_post"
    pairs = build_pairs("ioi", model.tokenise, options.pairs, 0)
    task = report(model, pairs)
    if options.dictionary:
        dictionary = load_dictionary(str(options.dictionary))
    else:
        x = real_vectors(build_pairs("ioi", model.tokenise, 200, 1), model, hook_point)
        config = train_config({"architecture": "topk", "features": options.features, "k": options.k, "tokens": 30_000})
        dictionary = train(config, x, hook_point=hook_point, model=model.identity, progress=QUIET).dictionary

    def fresh() -> Patching:
        return Patching(model, [Point(hook_point, dictionary)], pairs)

    judge = fresh()
    C, sizes = len(judge.candidates), grid(len(judge.candidates))
    say(f"{C} candidates, autoencoder ready")
    unpatched, floor = float(judge.unpatched.kl.mean()), float(judge.everything.kl.mean())

    def ranked(name: str, seed: int = 0) -> Timed:
        return Timed(*timed(lambda: rank(name, fresh(), seed=seed)))

    def levels(ranking: Ranking) -> torch.Tensor:
        first = ranking.order.argsort()[None] < torch.tensor(sizes)[:, None]  # (S, C) the first features of the order
        return judge.measure(first).kl.mean(1)

    acdc = []
    for seed in range(options.seeds):
        acdc.append(ranked("acdc", seed))
        say(f"acdc, seed {seed}: {acdc[-1].seconds:.1f} s, {acdc[-1].ranking.passes} runs, {visits_of(acdc[-1].ranking)} visits")
    loop = Loop(model, hook_point, dictionary, pairs)
    made, seconds = timed(lambda: loop.decide(judge.candidates, 0, options.visits))
    assert agrees(acdc[0].ranking, made), "the loop decided otherwise than acdc"
    visits = visits_of(acdc[0].ranking)
    whole = seconds / len(made) * visits
    curves = torch.stack([levels(one.ranking) for one in acdc])  # (seeds, S)
    low, high, middle = curves.min(0).values, curves.max(0).values, curves.mean(0)
    cells = [["ranking", "runs of a prompt", "processor s", "times faster than the loop", "mean KL over sizes",
              "sizes at or below acdc's highest seed"]]  # fmt: skip
    cells.append(["loop (acdc, seed 0)", f"{visits * pairs.n:,} whole", f"{whole:,.0f}", "1", "as acdc", ""])
    for seed, one in enumerate(acdc):
        cells.append([f"acdc, seed {seed}", f"{one.ranking.passes:,}", f"{one.seconds:.1f}", f"{whole / one.seconds:.0f}",
                      f"{float(curves[seed].mean()):.3f}", ""])  # fmt: skip
    shown = {}
    for name in ("acdc-fast", "integrated-gradients", "attribution", "single", "random"):
        one = ranked(name)
        shown[name] = levels(one.ranking)
        within = int((shown[name] <= high + 1e-6).sum())
        cells.append([name, f"{one.ranking.passes:,}", f"{one.seconds:.1f}", f"{whole / max(one.seconds, 1e-3):,.0f}",
                      f"{float(shown[name].mean()):.3f}", f"{within} of {len(sizes)}"])  # fmt: skip
    lines = [
        "# Feature ranking on IOI",
        "",
        f"{machine}. PyTorch {torch.__version__}. {options.package}, {hook_point}, {type(dictionary).__name__} with "
        f"{dictionary.n_features:,} features, {pairs.n} pairs of IOI prompts (accuracy {task.accuracy.mean:.2f}, logit "
        f"difference {task.logit_difference.mean:.2f}, probability of the indirect object {task.answer_probability.mean:.2f}).",
        f"{C} candidates, {float(judge.affected.sum(1).double().mean()):.0f} of them differ on a prompt. KL(patched || target): "
        f"{unpatched:.3f} with nothing patched, {floor:.3f} with everything.",
        f"The loop was run for {len(made):,} of its {visits:,} decisions ({seconds:.0f} s); all are those of evalkit's acdc. Its "
        "whole cost is decisions times the time of one.",
        f"acdc-fast: mean over sizes {float(shown['acdc-fast'].mean()) - float(middle.mean()):+.4f} nats from acdc's; at "
        f"the worst size {float((shown['acdc-fast'] - high).max()):+.4f} from acdc's highest seed.",
        "",
        *rows_of(cells),
        "",
        "KL by number of patched features:",
        "",
        *rows_of(
            [["features", "acdc, lowest", "acdc, mean", "acdc, highest", *shown]]
            + [
                [str(size), *(f"{float(part[place]):.3f}" for part in (low, middle, high, *shown.values()))]
                for place, size in enumerate(sizes)
            ]
        ),
        "",
        f"Cost as the dictionary grows (random TopK at layer {options.late}, one prompt, effect of every feature alone):",
        "",
        *growth(model, options.late, pairs.take([0])),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
