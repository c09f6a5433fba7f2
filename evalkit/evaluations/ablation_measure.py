"""What edits of single features do to the next token: the contexts, the runs, and what is kept of them.

1. ``contexts_of``: of the windows where a feature reaches a share of its maximum, some are drawn; each is read at the feature's
   strongest position.
2. ``edits_of``: the edits of one feature as rows of amounts along a direction.
3. ``measure`` runs all rows of all features window by window, so that a window's own run serves every feature that is studied in
   it, and keeps for each (feature, edit): the change of every token's log-probability in each context, mean changes of
   probabilities, and the change through the residual stream alone.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from evalkit.patching.engine import scale
from evalkit.patching.windows import Windows

if TYPE_CHECKING:
    from evalkit.activations.capture import Activations
    from evalkit.dictionaries.base import Dictionary
    from evalkit.evaluations.base import Bench

GROUP = 16
"""Windows run at a time."""
ROWS = 64
"""Rows whose logits are held at a time."""
RESIDUAL = re.compile(r"blocks\.\d+\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out|in|out)")
"""Hook points whose directions the unembedding reads: the residual stream, and what is added to it."""


class Context(NamedTuple):
    """A place where the next token is read."""

    window: int
    position: int


class Edit(NamedTuple):
    """One row: what is added in one context."""

    feature: int
    """Place of the feature among those studied."""
    kind: str
    """'ablate', 'random' (its null), 'add' or 'clamp'."""
    context: Context
    code: float
    """The feature's code where the next token is read."""
    amount: Float[torch.Tensor, " T"]
    """Multiples of the direction, in units of the activations."""
    direction: Float[torch.Tensor, " D"]


class Effects(NamedTuple):
    """What one kind of edit of one feature did in C contexts; V tokens. Float64 unless said otherwise."""

    edits: list[Edit]
    following: Int[np.ndarray, " C"]
    """The token the text goes on with."""
    change: Float[np.ndarray, "C V"]
    """Of the log-probability, nats; float32, in a temporary file."""
    kl: Float[np.ndarray, " C"]
    """KL(original || edited), nats."""
    moved: Float[np.ndarray, " C"]
    """Sum over tokens of the absolute change of the probability."""
    mass: Float[np.ndarray, " V"]
    """Mean change of the probability."""
    halves: Float[np.ndarray, "2 V"]
    """The same over every second context, from the first and from the second; NaN where there is none."""
    probability: Float[np.ndarray, " V"]
    """Mean probability without the edit."""
    direct: Float[np.ndarray, " V"] | None
    """Mean change of the centred logit where only the residual stream carries the edit; None off the residual stream."""


def contexts_of(
    codes: Float[torch.Tensor, "N T"], count: int, level: float, random: np.random.Generator
) -> tuple[list[Context], float]:
    """Up to ``count`` contexts where the feature is strong, and its maximum.

    They are drawn from the windows whose strongest code is at least ``level`` of the maximum or, where these are fewer, are the
    strongest ones. The last position of a window is left out: its next token lies outside.
    """
    peaks, where = codes[:, :-1].max(1)
    maximum = float(peaks.max())
    if maximum <= 0:
        return [], 0.0
    order = torch.argsort(peaks, descending=True, stable=True)
    strong = int(((peaks >= level * maximum) & (peaks > 0)).sum())
    pool = order[: max(strong, min(count, int((peaks > 0).sum())))]
    drawn = sorted(random.permutation(len(pool))[:count].tolist())
    return [Context(int(w), int(where[w])) for w in pool[drawn]], maximum


def silent_contexts(
    codes: Float[torch.Tensor, "N T"], score: Activations, count: int, random: np.random.Generator
) -> list[Context]:
    """Up to ``count`` kept positions where the feature is silent, one a window, of windows in one random order.

    Every feature is given the same order by ``edits_of``: the windows' own runs, which cost most, are then shared.
    """
    found = []
    free = score.keep[:, :-1] & (codes[:, :-1] == 0)
    for window in random.permutation(len(codes)).tolist():
        positions = free[window].nonzero()[:, 0]
        if len(positions):
            found.append(Context(window, int(positions[int(random.integers(len(positions)))])))
        if len(found) == count:
            break
    return found


def edits_of(
    place: int,
    codes: Float[torch.Tensor, "N T"],
    score: Activations,
    dictionary: Dictionary,
    feature: int,
    *,
    contexts: int,
    level: float,
    reverse: str,
    strength: float,
    seed: int,
) -> list[Edit]:
    """Every edit of one feature: ablations, their null, and the reverse; none where it never fires.

    The null adds as much along a random direction of the same length: it moves each activation as far as the ablation does.
    """
    random = np.random.default_rng([seed, 2, feature])
    strong, maximum = contexts_of(codes, contexts, level, random)
    direction = dictionary.directions[feature]
    noise = torch.from_numpy(random.normal(size=len(direction))).to(direction)
    noise *= direction.norm() / noise.norm()
    edits = []
    for context in strong:
        own = codes[context.window]
        unit = scale(dictionary, score.x[context.window])[:, 0]  # (T,)
        code = float(own[context.position])
        edits.append(Edit(place, "ablate", context, code, -own * unit, direction))
        edits.append(Edit(place, "random", context, code, -own * unit, noise))
        if reverse == "clamp":
            lift = torch.where(own != 0, strength * maximum - own, 0.0)
            edits.append(Edit(place, "clamp", context, code, lift * unit, direction))
    if reverse == "add" and strong:
        for context in silent_contexts(codes, score, contexts, np.random.default_rng([seed, 4])):
            amount = torch.zeros(codes.shape[1])
            unit = scale(dictionary, score.x[context.window])[context.position, 0]
            amount[context.position] = strength * maximum * unit
            edits.append(Edit(place, "add", context, 0.0, amount, direction))
    return edits


def measure(bench: Bench, edits: Sequence[Edit]) -> dict[tuple[int, str], Effects]:
    """Run every edit; effects by (place of the feature, kind of edit)."""
    model, score, V = bench.model, bench.score(), bench.model.n_vocab
    of: dict[tuple[int, str], list[int]] = {}
    for row, edit in enumerate(edits):
        of.setdefault((edit.feature, edit.kind), []).append(row)
    slot = {row: (key, number) for key, rows in of.items() for number, row in enumerate(rows)}
    direct = RESIDUAL.fullmatch(bench.hook_point) is not None
    with tempfile.TemporaryFile() as handle:  # the mapping keeps the file after the handle is closed
        change = np.memmap(handle, dtype=np.float32, mode="w+", shape=(max(1, len(edits)), V))
    first = dict(zip(of, np.cumsum([0, *(len(rows) for rows in of.values())]).tolist(), strict=False))
    kl, moved = np.zeros(len(edits)), np.zeros(len(edits))
    sums = {key: np.zeros((4, V)) for key in of}
    by_window: dict[int, list[int]] = {}
    for row, edit in enumerate(edits):
        by_window.setdefault(edit.context.window, []).append(row)
    names = sorted(by_window)
    with bench.progress.stage("editing features", len(edits), "edits") as stage:
        for start in range(0, len(names), GROUP):
            group = torch.tensor(names[start : start + GROUP])
            windows = Windows(model, bench.hook_point, score.tokens[group], score.x[group])
            local = {int(name): number for number, name in enumerate(group)}
            rows = [row for name in names[start : start + GROUP] for row in by_window[name]]
            for begin in range(0, len(rows), ROWS):
                chunk = rows[begin : begin + ROWS]
                found = _run(windows, [edits[row] for row in chunk], local, direct)
                for line, row in enumerate(chunk):
                    key, number = slot[row]
                    change[first[key] + number] = found.change[line]
                    kl[row], moved[row] = found.kl[line], found.moved[line]
                    sums[key][number % 2] += found.mass[line]
                    sums[key][2:] += np.stack([found.before[line], found.direct[line]])
                stage.advance(len(chunk))
    effects = {}
    for key, rows in of.items():
        mass, (before, through) = sums[key][:2].sum(0) / len(rows), sums[key][2:] / len(rows)
        odd = len(rows) // 2
        halves = np.stack([sums[key][0] / (len(rows) - odd), sums[key][1] / odd if odd else np.full(V, np.nan)])
        part = change[first[key] : first[key] + len(rows)]
        own = [edits[row] for row in rows]
        following = np.array([int(score.tokens[e.context.window, e.context.position + 1]) for e in own])
        effects[key] = Effects(own, following, part, kl[rows], moved[rows], mass, halves, before, through if direct else None)
    return effects


class _Found(NamedTuple):
    """Rows of one chunk."""

    change: np.ndarray
    kl: np.ndarray
    moved: np.ndarray
    mass: np.ndarray
    before: np.ndarray
    direct: np.ndarray


def _run(windows: Windows, edits: Sequence[Edit], local: dict[int, int], direct: bool) -> _Found:
    window: Int[torch.Tensor, " J"] = torch.tensor([local[edit.context.window] for edit in edits])
    last = torch.tensor([edit.context.position for edit in edits])
    amount = torch.stack([edit.amount for edit in edits])
    directions = torch.stack([edit.direction for edit in edits])
    final = windows.edited(window, last, amount, directions)
    own = windows.final[window.to(final.device), last.to(final.device)]
    # a row that changed nothing has the original's logits to the last bit
    same = (final == own).all(1).cpu()
    before = windows.logits(own).double().cpu()
    log_p = before.log_softmax(-1)
    log_q = torch.where(same[:, None], log_p, windows.logits(final).double().cpu().log_softmax(-1))
    p, change = log_p.exp(), log_q - log_p
    mass = log_q.exp() - p
    through = torch.zeros_like(before)
    if direct:
        here = amount[torch.arange(len(edits)), last][:, None] * directions
        through = windows.logits(own + here.to(own)).double().cpu() - before
        through -= through.mean(-1, keepdim=True)
    found = (change, -(p * change).sum(-1), mass.abs().sum(-1), mass, p, through)
    return _Found(*(part.numpy() for part in found))
