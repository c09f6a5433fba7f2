"""What edits of single features do to the next token: the contexts, the runs, and what is kept of them.

1. ``contexts_of``: of the windows where a feature reaches a share of its maximum, some are drawn; each is read at the feature's
   strongest position.
2. ``edits_of``: the edits of one feature as rows of amounts along a direction.
3. ``measure`` runs all rows of all features in groups of windows, so that a window's own run serves every feature that is studied
   in it, and ends with the last position that any of them reads there. Within a group rows of similar length run together.
4. Kept for each (feature, edit): the change of every token's log-probability in each context, mean changes of probabilities, and
   the change through the residual stream alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from evalkit.disk import mapped_array
from evalkit.interventions.hooks import scale
from evalkit.interventions.windows import WindowCache

if TYPE_CHECKING:
    from evalkit.activations.capture import Activations
    from evalkit.dictionaries.base import Dictionary
    from evalkit.evaluations.base import Bench

GROUP = 8192
"""Positions of windows whose keys and values are held at a time, about."""
ROWS = 128
"""Rows run at a time."""
LOGITS = 16
"""Rows whose logits are compared at a time: few, so that they stay near the processor."""
NULL = "random"
"""What the kinds of the null begin with: one kind a direction."""
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
    """'ablate', 'random 1', 'random 2', ... (its null), 'add' or 'clamp'."""
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
    """Of the log-probability, nats; float32, in a temporary file. Not kept of the null: no rows."""
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
    codes: Float[torch.Tensor, "N T"], count: int, level: float, order: Int[np.ndarray, " N"]
) -> tuple[list[Context], float]:
    """Up to ``count`` contexts where the feature is strong, and its maximum.

    They are the first, in ``order``, of the windows whose strongest code is at least ``level`` of the maximum or, where these are
    fewer, of the strongest ones. With an order drawn at random that is a uniform draw from them. The last position of a window
    is left out: its next token lies outside.

    Args:
        order: the windows, in the order in which they are looked at.
    """
    peaks, where = codes[:, :-1].max(1)
    maximum = float(peaks.max())
    if maximum <= 0:
        return [], 0.0
    ranked = torch.argsort(peaks, descending=True, stable=True)
    strong = int(((peaks >= level * maximum) & (peaks > 0)).sum())
    pool = ranked[: max(strong, min(count, int((peaks > 0).sum())))]
    drawn = np.sort(np.argsort(np.argsort(order)[pool.numpy()])[:count])
    return [Context(int(w), int(where[w])) for w in pool[torch.from_numpy(drawn)]], maximum


def silent_contexts(
    codes: Float[torch.Tensor, "N T"], score: Activations, count: int, order: Int[np.ndarray, " N"], random: np.random.Generator
) -> list[Context]:
    """Up to ``count`` kept positions where the feature's code is not above 0, one a window, of the first in ``order`` that have
    any."""
    found = []
    free = score.keep[:, :-1] & (codes[:, :-1] <= 0)
    for window in order.tolist():
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
    nulls: int = 1,
) -> list[Edit]:
    """Every edit of one feature: ablations, their null, and the reverse; none where it never fires.

    1. The null adds as much along each of ``nulls`` random directions of the same length: it moves each activation as far as the
       ablation does.
    2. Windows are looked at in a random order of the feature's own. Its contexts are a uniform draw from the windows it is strong
       in, and independent of those of other features: an interval that resamples features takes them for that. One order for
       all would spare a window's own run where features meet in it, which is little beside the edits.
    """
    order = np.random.default_rng([seed, 4, feature]).permutation(len(codes))
    random = np.random.default_rng([seed, 2, feature])
    strong, maximum = contexts_of(codes, contexts, level, order)
    direction = dictionary.edit_directions[feature]
    noise = torch.from_numpy(random.normal(size=(nulls, len(direction)))).to(direction)
    noise *= direction.norm() / noise.norm(dim=1, keepdim=True)
    edits = []
    for context in strong:
        own = codes[context.window]
        unit = scale(dictionary, score.x[context.window])[:, 0]  # (T,)
        code = float(own[context.position])
        edits.append(Edit(place, "ablate", context, code, -own * unit, direction))
        edits += [Edit(place, f"{NULL} {i}", context, code, -own * unit, one) for i, one in enumerate(noise, start=1)]
        if reverse == "clamp":
            lift = torch.where(own != 0, strength * maximum - own, 0.0)
            edits.append(Edit(place, "clamp", context, code, lift * unit, direction))
    if reverse == "add" and strong:
        for context in silent_contexts(codes, score, contexts, order, random):
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
    sizes = [0 if _is_null(kind) else len(rows) for (_, kind), rows in of.items()]
    change = mapped_array((sum(sizes), V), say=bench.progress.say)
    first = dict(zip(of, np.cumsum([0, *sizes]).tolist(), strict=False))
    kl, moved = np.zeros(len(edits)), np.zeros(len(edits))
    # of the null the halves alone are wanted: there are many of them
    sums = {key: np.zeros((2, V), dtype=np.float32) if _is_null(key[1]) else np.zeros((4, V)) for key in of}
    by_window: dict[int, list[int]] = {}
    for row, edit in enumerate(edits):
        by_window.setdefault(edit.context.window, []).append(row)
    length = {name: 1 + max(edits[row].context.position for row in rows) for name, rows in by_window.items()}
    with bench.progress.stage("editing features", len(edits), "edits") as stage:
        for names in _groups(length):
            group, lengths = torch.tensor(names), torch.tensor([length[name] for name in names])
            T = int(lengths.max())
            windows = WindowCache(model, bench.hook_point, score.tokens[group, :T], score.x[group, :T], lengths)
            local = {name: number for number, name in enumerate(names)}
            rows = sorted((row for name in names for row in by_window[name]), key=lambda row: _span(edits[row]))
            for begin in range(0, len(rows), ROWS):
                chunk = rows[begin : begin + ROWS]
                for row, found in zip(chunk, _run(windows, [edits[row] for row in chunk], local, direct), strict=True):
                    key, number = slot[row]
                    kl[row], moved[row] = found.kl, found.moved
                    sums[key][number % 2] += found.mass
                    if _is_null(key[1]):
                        continue
                    change[first[key] + number] = found.change
                    sums[key][2] += found.before
                    if found.direct is not None:
                        sums[key][3] += found.direct
                stage.advance(len(chunk))
    effects = {}
    for key, rows in of.items():
        mass = sums[key][:2].sum(0) / len(rows)
        before, through = sums[key][2:] / len(rows) if len(sums[key]) == 4 else (mass * np.nan, None)
        odd = len(rows) // 2
        halves = np.stack([sums[key][0] / (len(rows) - odd), sums[key][1] / odd if odd else np.full(V, np.nan)])
        part = change[first[key] : first[key] + (0 if _is_null(key[1]) else len(rows))]
        own = [edits[row] for row in rows]
        following = np.array([int(score.tokens[e.context.window, e.context.position + 1]) for e in own])
        effects[key] = Effects(own, following, part, kl[rows], moved[rows], mass, halves, before, through if direct else None)
    return effects


def _is_null(kind: str) -> bool:
    return kind.startswith(NULL)


def _groups(length: dict[int, int]) -> list[list[int]]:
    """Windows in groups of about ``GROUP`` positions, those of similar length together."""
    groups: list[list[int]] = []
    for name in sorted(length, key=lambda name: (-length[name], name)):
        if not groups or length[groups[-1][0]] * (len(groups[-1]) + 1) > GROUP:
            groups.append([])
        groups[-1].append(name)
    return groups


def _span(edit: Edit) -> tuple[int, int, int]:
    """Sorts rows by how many positions they run again; edits of one context stand together."""
    window, position = edit.context
    edited = edit.amount[: position + 1].nonzero()
    return -(position + 1 - int(edited[0])) if len(edited) else 0, window, position


class _Found(NamedTuple):
    """Of one row."""

    change: np.ndarray
    kl: float
    moved: float
    mass: np.ndarray
    before: np.ndarray
    direct: np.ndarray | None


def _run(windows: WindowCache, edits: Sequence[Edit], local: dict[int, int], direct: bool) -> Iterator[_Found]:
    """What each edit did."""
    T = windows.tokens.shape[1]
    window: Int[torch.Tensor, " J"] = torch.tensor([local[edit.context.window] for edit in edits])
    last = torch.tensor([edit.context.position for edit in edits])
    amount = torch.stack([edit.amount[:T] for edit in edits])
    directions = torch.stack([edit.direction for edit in edits])
    final = windows.edited(window, last, amount, directions)
    here = (amount[torch.arange(len(edits)), last][:, None] * directions).to(final)
    for rows in torch.arange(len(edits)).split(LOGITS):
        # edits of one context are compared with one original
        places, which = torch.stack([window[rows], last[rows]], dim=1).unique(dim=0, return_inverse=True)
        own = windows.final[tuple(places.T.to(final.device))]
        which = which.to(final.device)
        # the null's direct effect is not asked for
        shown = torch.tensor([direct and not _is_null(edits[row].kind) for row in rows.tolist()])
        parts = [own, final[rows], own[which[shown]] + here[rows[shown]]]
        logits = windows.logits(torch.cat(parts)).double().split([len(part) for part in parts])
        through = dict(zip(shown.nonzero()[:, 0].tolist(), logits[2], strict=True))
        log_p = logits[0].log_softmax(-1)
        p, log_q = log_p.exp(), logits[1].log_softmax(-1)
        # a row that changed nothing has the original's logits to the last bit
        same = (final[rows] == own[which]).all(1)
        for line, place in enumerate(which.tolist()):
            after = log_p[place] if same[line] else log_q[line]
            change = after - log_p[place]
            mass = after.exp() - p[place]
            found = [change.float(), mass, p[place]]
            if line in through:
                alone = through[line] - logits[0][place] if here[rows[line]].any() else torch.zeros_like(mass)
                found.append(alone - alone.mean())
            arrays = [part.cpu().numpy() for part in found]
            kl, moved = -float(p[place] @ change), float(mass.abs().sum())
            yield _Found(arrays[0], kl, moved, arrays[1], arrays[2], arrays[3] if line in through else None)
