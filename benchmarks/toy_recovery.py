"""Are true features found, and in which band of sparsity and size: MMCS on toy data with known directions.

    python benchmarks/toy_recovery.py [--architecture NAME ...] [--quick] [-o FILE]

1. Data: sparse sums of known directions, more of them than dimensions (``synthetic``; Sharkey, Braun and Millidge 2022).
2. One autoencoder for each sparsity setting (rows) and number of features (columns, in multiples of the true ones).
3. A cell is the mean over true directions of the largest cosine with a learned one, 1 where every one is found, and in brackets
   the features active a row. Random directions of the same number are what chance gives.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evalkit.activations import synthetic as toy
from evalkit.dictionaries.similarity import nearest
from evalkit.training.loop.train import train
from evalkit.training.settings.config import train_config
from evalkit.util.progress import Progress

GRIDS: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    "tied": ("l1", (0.003, 0.01, 0.02, 0.03, 0.04, 0.1), {"lr": 3e-2, "batch": 128}),
    "relu": ("l1", (0.1, 0.5, 1.0, 2.0, 4.0, 8.0), {}),
    "topk": ("k", (1, 2, 3, 4, 8, 32), {}),
}
"""Sparsity setting, its values, and what else the architecture needs at this size."""
SIZES = (0.5, 1.0, 2.0, 4.0)
"""Features for each true one."""
WIDTH, TRUE, ACTIVE = 32, 64, 2.0


class Cell(NamedTuple):
    """One trained autoencoder."""

    mmcs: float
    l0: float


def mmcs(truth: torch.Tensor, directions: torch.Tensor) -> float:
    """Mean over true directions of the largest cosine with a direction that is not 0."""
    return float(nearest(truth, directions[(directions != 0).any(1)]).cosines.mean())


def trained(data: toy.ToyData, name: str, value: float, size: float, tokens: int) -> Cell:
    """An autoencoder of ``size`` times as many features as there are true ones."""
    key, _, own = GRIDS[name]
    table = {"architecture": name, "features": round(size * TRUE), key: value, "tokens": tokens, "batch": 256, "lr": 1e-2}
    config = train_config({**table, "dead_after": 20_000, **own})
    found = train(config, data.x, hook_point="blocks.0.hook_resid_post", model="toy", progress=Progress(quiet=True))
    return Cell(mmcs(data.truth, found.dictionary.directions), float(found.history[-1]["l0"]))


def grid(name: str, data: toy.ToyData, tokens: int, values: tuple[float, ...], sizes: tuple[float, ...]) -> str:
    """The table of one architecture, in Markdown."""
    key = GRIDS[name][0]
    lines = [f"{name}: MMCS (features active a row)", "", f"| {key} | " + " | ".join(f"{size:g} x" for size in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for value in values:
        fits = [None if key == "k" and value > size * TRUE else trained(data, name, value, size, tokens) for size in sizes]
        lines.append(f"| {value:g} | " + " | ".join("" if c is None else f"{c.mmcs:.3f} ({c.l0:.1f})" for c in fits) + " |")
    generator = torch.Generator().manual_seed(1)
    chance = [mmcs(data.truth, torch.randn(round(size * TRUE), WIDTH, generator=generator)) for size in sizes]
    lines.append("| random | " + " | ".join(f"{value:.3f}" for value in chance) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the grids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", action="append", choices=sorted(GRIDS), help="only these; all by default")
    parser.add_argument("--tokens", type=int, default=200_000, help="presentations for each autoencoder")
    parser.add_argument("--quick", action="store_true", help="two settings, two sizes and a tenth of the presentations")
    parser.add_argument("-o", "--output", type=Path, help="write the tables there too")
    options = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small are slower on several
    data = toy.superposition(50_000, width=WIDTH, features=TRUE, active=ACTIVE)
    tokens = options.tokens // 10 if options.quick else options.tokens
    head = f"{TRUE} true features in {WIDTH} dimensions, {ACTIVE:g} active a row, {tokens:,} presentations"
    tables = [head]
    for name in options.architecture or GRIDS:
        values, sizes = (GRIDS[name][1][1:3], SIZES[1:3]) if options.quick else (GRIDS[name][1], SIZES)
        tables.append(grid(name, data, tokens, values, sizes))
        print("\n" + (head + "\n\n" if len(tables) == 2 else "") + tables[-1], flush=True)
    if options.output:
        options.output.write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
