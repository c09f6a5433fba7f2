"""Features that fire on the last token of a text: how one starts to look for a feature by hand.

1. The text is read by the suite's model up to each hook point, behind the BOS as windows are; each dictionary that is built
   encodes the last token.
2. Features that fire there are listed from the rarest to the most common, as measured on the scoring text: what fires on
   everything says nothing about this token. ``most_density`` leaves out common ones (the paper's notebook: above 0.1).
3. Beside each stands its code, the largest code it has in the scoring text, and the share of its firings that are on this very
   token.

After Cunningham et al. 2023 (arXiv 2309.08600), section 5, where "... Dave'" leads to an apostrophe feature. Nothing is trained.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

import torch

from evalkit.errors import ModelError, UsageError
from evalkit.evaluations.sampling import activity, feature_codes
from evalkit.models.finite import broken, broken_message
from evalkit.runs.workbench import Workbench
from evalkit.suite import Suite, parse_suite
from evalkit.util.progress import Progress
from evalkit.util.registry import near_miss
from evalkit.util.user_files import half_character


class Firing(NamedTuple):
    """A feature that fires on the last token."""

    dictionary: str
    hook_point: str
    feature: int
    code: float
    largest: float
    """Largest code in the scoring text; 0 where it never fires there."""
    density: float
    """Share of the kept scoring tokens it is active on (code above 0)."""
    on_token: float | None
    """Share of those that are this token; None where there are none."""


class Finding(NamedTuple):
    """What was found."""

    tokens: list[str]
    """The text as the model reads it."""
    firings: list[Firing]
    """By dictionary and hook point, the rarest first."""
    left_out: list[str]
    """Dictionaries that are not built yet."""


def suite_of(text: str) -> Suite:
    """The suite whose file read ``text``; relative paths in it start here.

    Raises:
        SuiteError: this evalkit does not understand it.
    """
    return parse_suite(tomllib.loads(text), path=Path("suite.toml"), text=text)


def find(
    suite: Suite,
    folder: Path,
    text: str,
    *,
    only: str | None = None,
    most_density: float = 1.0,
    limit: int = 20,
    progress: Progress,
) -> Finding:
    """Features of the suite's dictionaries that fire on the last token of ``text``.

    Args:
        folder: results folder: dictionaries and captured activations lie below it.
        only: one dictionary of the suite.
        most_density: leave out features active on a larger share of the scoring tokens.
        limit: at most so many a dictionary and hook point.

    Raises:
        UsageError: the text has too few tokens, there is no such dictionary, or none is built.
        ModelError: the text is longer than the model can read.
    """
    specs = [spec for spec in suite.dictionaries if only in (None, spec.name)]
    if not specs:
        known = [spec.name for spec in suite.dictionaries]
        raise UsageError(f"the suite has no dictionary called '{only}'", where="--only", fix=near_miss(str(only), known))
    with Workbench(suite, folder, progress) as bench:
        if half := half_character(text):
            what = f"the text holds half of a character ({half}), or bytes that are not UTF-8"
            raise UsageError(what, where="--text", fix="give the text as UTF-8")
        ids, opening = bench.inputs.model.opened(text), int(bench.inputs.model.bos is not None)
        least = suite.activations.left_out(opening) + 1
        if len(ids) < least:
            what = f"the text has {len(ids) - opening} tokens, and the first {least - 1 - opening} of a text are not studied"
            raise UsageError(what, where="--text", fix="give some more text before the token")
        tokens = torch.tensor([ids])
        built = [(h, spec) for h in suite.hook_points for spec in specs if bench.dictionaries.is_built(spec, h)]
        if not built:
            names = ", ".join(spec.name for spec in specs)
            raise UsageError(f"not built yet: {names}", where=str(folder), fix="evalkit run or evalkit train the suite first")
        found = bench.inputs.model.activations_at(tokens, list(dict.fromkeys(h for h, _ in built)))
        firings = []
        for hook_point, spec in built:
            last = found[hook_point][0, -1:].cpu()  # (1, D)
            if lost := broken(last):
                what, fix = broken_message(lost, 1, "text", bench.inputs.model.dtype)
                raise ModelError(what, where=hook_point, fix=fix)
            firings += _of_dictionary(bench, spec.name, hook_point, last, ids[-1], most_density, limit)
        missing = [f"{spec.name} at {h}" for h in suite.hook_points for spec in specs if (h, spec) not in built]
        return Finding(bench.inputs.model.token_strings(ids), firings, missing)


def _of_dictionary(
    bench: Workbench, name: str, hook_point: str, last: torch.Tensor, token: int, most_density: float, limit: int
) -> list[Firing]:
    dictionary, score = bench.dictionaries.get(bench.dictionaries.spec(name), hook_point), bench.inputs.score(hook_point)
    codes = dictionary.encode(last)[0]  # (F,)
    seen = activity(dictionary, score)
    density = seen.positions / max(1, seen.kept)
    firing = ((codes > 0) & (density <= most_density)).nonzero()[:, 0]
    # rarest first, the stronger first where two are as rare
    order = sorted(firing.tolist(), key=lambda f: (float(density[f]), -float(codes[f])))[:limit]
    all_codes = feature_codes(dictionary, score, order)  # (N, T, S)
    rows = []
    for place, feature in enumerate(order):
        active = all_codes[..., place] > 0
        share = float((score.tokens[active] == token).float().mean()) if active.any() else None
        largest = max(0.0, float(all_codes[..., place].max()))
        rows.append(Firing(name, hook_point, feature, float(codes[feature]), largest, float(density[feature]), share))
    return rows


def listing(finding: Finding) -> str:
    """The finding as lines to read."""
    lines = [f"last token: {finding.tokens[-1]!r} of {len(finding.tokens)}"]
    before: tuple[str, str] | None = None
    for row in finding.firings:
        if (row.dictionary, row.hook_point) != before:
            before = (row.dictionary, row.hook_point)
            lines += ["", f"{row.dictionary} at {row.hook_point}", "feature      code   largest   density  on this token"]
        share = "-" if row.on_token is None else f"{row.on_token:.0%}"
        lines.append(f"{row.feature:7} {row.code:9.3f} {row.largest:9.3f} {row.density:9.5f}  {share:>13}")
    if not finding.firings:
        lines.append("no feature fires on it")
    lines += [f"not built yet: {name}" for name in finding.left_out]
    return "\n".join(lines)
