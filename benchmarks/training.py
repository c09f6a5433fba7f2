"""evalkit's trainer against SAELens, dictionary_learning and sparsify, unmodified, side by side in one process.

1. All contestants of a shape start from the same weights and see the same batches in the same order. evalkit runs once in the
   recipe of each peer, so that losses mean the same.
2. Parity: twenty steps in float32 of the peer and of evalkit in its recipe; the largest relative difference of losses.
3. Timing: rounds of a few steps, contestants in turn (ABCABC...), after untimed first steps. A ratio is the median over rounds of
   two contestants' times in the same round.
4. Quality: after the rounds, on held-out vectors: share of the variance unexplained (FVU), active features a token (L0), share of
   features that never fired (dead).
5. A ratio is printed only where parity is below 1e-4, FVU and L0 differ by less than 1 % and dead shares by less than 2 points;
   otherwise the reason stands in its place.

``--record FOLDER`` writes the losses of small parity runs for evalkit's own tests, which cannot import the peers.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import shlex
import statistics
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from contestants import Contestant, Evalkit, Job, Weights, first_weights
from machine import Ceilings, Timing, ceilings, described, floor_seconds, timed
from peers import ENTRIES, REFERENCE, STUBBED, DictionaryLearning, prepare
from vectors import Vectors, load, planted

PARITY_STEPS = 20
PARITY, CLOSE, DEAD = 1e-4, 0.01, 0.02
"""The gate: relative difference of losses, of FVU and L0, and points of the dead share."""


class Quality(NamedTuple):
    """Of held-out vectors."""

    fvu: float
    l0: float
    dead: float


class Line(NamedTuple):
    """One contestant's results."""

    contestant: Contestant
    times: list[Timing]
    quality: Quality


def losses(contestant: Contestant, batches: list[torch.Tensor]) -> list[float]:
    """The loss of each step."""
    told = []
    for x in batches:
        before = contestant.loss(x) if isinstance(contestant, DictionaryLearning) and contestant.silent else math.nan
        after = float(contestant.step(x))
        told.append(before if math.isnan(after) else after)
    return told


def difference(theirs: list[float], ours: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(theirs, ours, strict=True))


def quality(contestant: Contestant, x: torch.Tensor, batch: int) -> Quality:
    """What the contestant does with held-out vectors, in whole batches."""
    parts = [contestant.held_out(part) for part in x.split(batch) if len(part) == batch]
    n = batch * len(parts)
    variance = float((x[:n] - x[:n].mean(0)).double().square().sum())
    fired = torch.stack([part.fired for part in parts]).any(0)
    return Quality(sum(p.error for p in parts) / variance, sum(p.active for p in parts) / n, 1 - float(fired.float().mean()))


def gate(ours: Quality, theirs: Quality, parity: float, comparable: str) -> str:
    """Why the two may not be compared; empty where they may."""
    if comparable:
        return comparable
    reasons = [] if parity < PARITY else [f"losses differ by {parity:.1e}"]
    for name, a, b in (("FVU", ours.fvu, theirs.fvu), ("L0", ours.l0, theirs.l0)):
        if not abs(a - b) <= CLOSE * max(abs(b), 1e-12):
            reasons.append(f"{name} {a:.4f} against {b:.4f}")
    if not abs(ours.dead - theirs.dead) <= DEAD:
        reasons.append(f"dead {ours.dead:.1%} against {theirs.dead:.1%}")
    return "; ".join(reasons)


def ratio(theirs: list[Timing], ours: list[Timing]) -> str:
    """How many times faster: median over rounds and the middle half."""
    ratios = [a.seconds / b.seconds for a, b in zip(theirs, ours, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"**{statistics.median(ratios):.2f}x** ({low:.2f} to {high:.2f})"


def compare(job: Job, names: list[str], data: Vectors, asked: argparse.Namespace, most: Ceilings | None) -> list[str]:
    """The table of one shape, as Markdown lines; with the share of the floor where ``most`` is known."""
    rounds, steps, first, seed = asked.rounds, asked.steps, asked.first, asked.seed
    entries = {name: ENTRIES[name] for name in names if job.architecture in ENTRIES[name].architectures}
    sample = data.train[: 4 * job.batch]
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))

    def batch(number: int) -> torch.Tensor:
        rows = torch.arange(number * job.batch, (number + 1) * job.batch) % len(order)
        return data.train[order[rows]].to(job.device)

    @functools.cache
    def weights(length: float) -> Weights:
        """Drawn once; every contestant copies them."""
        return first_weights(job, sample, length, seed)

    def start(name: str) -> Contestant:
        return entries[name].make(job, weights(entries[name].kind.length))

    def own(recipe: str, compute: str) -> Contestant:
        return Evalkit(job, weights(ENTRIES[REFERENCE[recipe]].kind.length), recipe, compute, sample)

    unable = {}
    for name in list(entries):
        try:
            start(name).step(batch(0))
        except (NotImplementedError, RuntimeError) as error:  # an operation that this PyTorch lacks on this device
            del entries[name]
            unable[f"`{name}`"] = str(error).strip().splitlines()[0].partition(". ")[0]
    recipes = list(dict.fromkeys(entry.kind.recipe for entry in entries.values()))
    parity, twenty = {}, [batch(number) for number in range(PARITY_STEPS)]
    for recipe in recipes:
        peer = ENTRIES[REFERENCE[recipe]].make(job, weights(ENTRIES[REFERENCE[recipe]].kind.length))
        parity[recipe] = difference(losses(peer, twenty), losses(own(recipe, "float32"), twenty))
    computes = ["float32", "bfloat16"] if job.architecture == "topk" else ["float32"]
    field = [start(name) for name in entries] + [own(recipe, compute) for recipe in recipes for compute in computes]
    times: list[list[Timing]] = [[] for _ in field]
    for number in range(first):
        for contestant in field:
            contestant.step(batch(number))
    for turn in range(rounds):
        given = [batch(first + turn * steps + number) for number in range(steps)]
        for place in [(turn + n) % len(field) for n in range(len(field))]:
            times[place].append(timed(lambda c=field[place], g=given: [c.step(x) for x in g], steps, job.device, asked.clock))  # type: ignore[misc]
    held_out = data.held_out.to(job.device)
    lines = [Line(c, t, quality(c, held_out, job.batch)) for c, t in zip(field, times, strict=True)]
    return [*table(job, lines, parity, computes, most), *(f"\n{name} cannot run here: {why}." for name, why in unable.items())]


def table(job: Job, lines: list[Line], parity: dict[str, float], computes: list[str], most: Ceilings | None) -> list[str]:
    """Markdown of one shape: evalkit's lines, then the peers' with the ratios."""
    own = {(line.contestant.recipe, line.contestant.name.rsplit(", ", 1)[1]): line for line in lines if _ours(line)}
    floor = floor_seconds(job.batch, job.width, job.features, job.k, most) if most else 0.0
    heads = ["contestant", "tokens/s", "ms a step (least, middle half)", "peak MB"] + (["share of the floor"] if floor else [])
    heads += ["FVU", "L0", "dead"] + [f"evalkit {compute} is faster" for compute in computes]
    chosen = f", k {job.k}" if job.architecture in ("topk", "batchtopk", "matryoshka") else ""
    out = [f"### {job.architecture}: batch {job.batch}, width {job.width}, {job.features} features{chosen}", ""]
    out += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for line in sorted(lines, key=_ours, reverse=True):
        seconds = [t.seconds for t in line.times]
        low, middle, high = statistics.quantiles(seconds, n=4)
        peak = statistics.median(t.peak for t in line.times) / 1e6
        cells = [line.contestant.name, f"{job.batch / middle:,.0f}"]
        cells += [f"{middle * 1e3:.1f} ({min(seconds) * 1e3:.1f}, {low * 1e3:.1f} to {high * 1e3:.1f})", f"{peak:,.0f}"]
        cells += [f"{floor / middle:.0%}"] if floor else []
        cells += [f"{line.quality.fvu:.4f}", f"{line.quality.l0:.2f}", f"{line.quality.dead:.1%}"]
        for compute in computes:
            ours = own[line.contestant.recipe, compute]
            why = gate(ours.quality, line.quality, parity[line.contestant.recipe], line.contestant.comparable)
            cells.append("" if _ours(line) else f"no ratio: {why}" if why else ratio(line.times, ours.times))
        out.append("| " + " | ".join(cells) + " |")
    said = ", ".join(f"{recipe} {value:.1e}" for recipe, value in parity.items())
    return [*out, "", f"Largest relative difference of losses over {PARITY_STEPS} steps in float32: {said}."]


def _ours(line: Line) -> bool:
    return isinstance(line.contestant, Evalkit)


def record(folder: Path, versions: dict[str, str]) -> None:
    """Write the losses of small runs of every peer and architecture, with and without dead features."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in REFERENCE.values():
        entry, runs = ENTRIES[name], []
        for architecture in entry.architectures:
            auxiliary = architecture in ("topk", "batchtopk", "matryoshka") and entry.kind.recipe != "sparsify"
            for window in (0, 3) if auxiliary else (0,):
                lr = 3e-2 if entry.kind.recipe == "saelens" else 1e-2  # high, so that twenty steps learn something
                job = Job(architecture, 64, 16, 64, 4, 30, 5, "cpu", window, lr)
                x = planted(PARITY_STEPS * job.batch, job.width, directions=32, active=3, seed=1)
                peer = entry.make(job, first_weights(job, x, entry.kind.length, 0))
                told = losses(peer, list(x.split(job.batch)))
                own = Evalkit(job, first_weights(job, x, entry.kind.length, 0), peer.recipe, "float32", x)
                mine = losses(own, list(x.split(job.batch)))
                print(f"{peer.name}, {architecture}, window {window}: {difference(told, mine):.1e}")
                runs.append({"job": job._asdict(), "length": entry.kind.length, "losses": told})
        made = {"recipe": entry.kind.recipe, "versions": {**versions, "torch": torch.__version__}, "runs": runs}
        (folder / f"{entry.kind.recipe}.json").write_text(json.dumps(made, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", action="append", help="batch,width,features,k; may be repeated (default: 2048,576,2304,32 on the CPU)")
    add("--architecture", action="append", choices=["topk", "batchtopk", "matryoshka", "relu", "jumprelu"])
    add("--contestants", default="", help=f"names with commas; known: {', '.join(ENTRIES)} (default: all but compiled)")
    add("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, for a machine that others use too")
    add("--threads", type=int, help="of PyTorch on the CPU")
    add("--rounds", type=int, default=12)
    add("--steps", type=int, default=5, help="steps a round")
    add("--first", type=int, default=5, help="untimed first steps")
    add("--vectors", type=int, default=65536, help="training vectors")
    add("--activations", type=Path, help=".npy file of activations; planted vectors when left out")
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add("--record", type=Path, help="write small parity runs into this folder, and nothing else")
    add("--note", default="", help="a sentence for the head of the table: what else the machine did")
    add("-o", "--output", type=Path, help="write the Markdown here too")
    return parser.parse_args()


def main() -> None:
    """Run what the command line asks for."""
    asked = arguments()
    warnings.simplefilter("ignore")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    versions = prepare()
    if asked.record:
        return record(asked.record, versions)
    cuda = asked.device.startswith("cuda")
    usual = ["8192,512,16384,32", "4096,2304,65536,64"] if cuda else ["2048,576,2304,32"]
    names = asked.contestants.split(",") if asked.contestants else [name for name in ENTRIES if "compiled" not in name]
    if unknown := [name for name in names if name not in ENTRIES]:
        sys.exit(f"no contestant is called {unknown[0]}; known: {', '.join(ENTRIES)}")
    said = ", ".join(f"{name} {number}" for name, number in {**versions, "torch": torch.__version__}.items())
    out = [f"Command: `python benchmarks/training.py {shlex.join(sys.argv[1:])}`", ""]
    out += [f"Machine: {described(asked.device)}. {datetime.date.today()}."]
    out += [f"Versions: {said}, Python {sys.version.split()[0]}."]
    out += [f"Replaced by empty modules, off the path of a step: {', '.join(STUBBED) or 'nothing'}."]
    out += [f"{asked.rounds} rounds of {asked.steps} steps, contestants in turn, after {asked.first} untimed steps. {asked.note}"]
    out += [f"Times are {'processor time of this process' if asked.clock == 'cpu' else 'wall time'}."]
    most = ceilings() if cuda else None
    if most:
        out += [f"This GPU copies {most.bytes / 1e12:.2f} TB/s and multiplies {most.operations / 1e12:.0f} TFLOP/s in bfloat16,"
                " measured first: what the floor is made of."]  # fmt: skip
    for shape in asked.shape or usual:
        batch, width, features, k = (int(part) for part in shape.split(","))
        data = load(asked.activations, asked.vectors, width, features, asked.seed)
        out += ["", f"Vectors: {data.name}; held out: {len(data.held_out)}."]
        for architecture in asked.architecture or ["topk"]:
            steps = asked.first + asked.rounds * asked.steps
            job = Job(architecture, batch, width, features, k, max(steps, PARITY_STEPS + 1), max(2, steps // 10), asked.device)
            out += ["", *compare(job, names, data, asked, most)]
    if not cuda:
        out += ["", "GPU: not run; this machine has none. The same command with `--device cuda` runs its two shapes."]
    print("\n".join(out))
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
