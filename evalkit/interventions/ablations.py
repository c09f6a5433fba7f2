"""Effects of edits of single features on the next token: contexts, edits, runs, and the numbers kept of them.

1. ``contexts_of``: of the windows where a feature reaches a share of its maximum, some are sampled. Each is read at the feature's
   top-activating position.
2. ``edits_of``: the edits of one feature that an ``AblationPlan`` asks for, as rows of amounts along a direction.
3. ``measure`` runs all rows of all features in groups of windows, so that a window's own run serves every feature that is studied
   in it. It ends with the last position that any of them reads there.
4. ``EffectAccumulator`` keeps, for each (feature, kind of edit), the change of every token's log-probability in each context,
   mean changes of probabilities, and the change through the residual stream alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from evalkit.interventions.hooks import scale
from evalkit.interventions.windows import WindowCache
from evalkit.util.disk import mapped_array
from evalkit.util.progress import Progress

if TYPE_CHECKING:
    from evalkit.activations.capture import Activations
    from evalkit.dictionaries.base import Dictionary
    from evalkit.models.language_model import LanguageModel

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
    codes: Float[torch.Tensor, "N T"],
    activations: Activations,
    count: int,
    order: Int[np.ndarray, " N"],
    random: np.random.Generator,
) -> list[Context]:
    """Up to ``count`` kept positions where the feature's code is not above 0, one a window, of the first in ``order`` that have
    any."""
    found = []
    free = activations.keep[:, :-1] & (codes[:, :-1] <= 0)
    for window in order.tolist():
        positions = free[window].nonzero()[:, 0]
        if len(positions):
            found.append(Context(window, int(positions[int(random.integers(len(positions)))])))
        if len(found) == count:
            break
    return found


class AblationPlan(NamedTuple):
    """The edits of a feature."""

    contexts: int
    """Contexts of each feature."""
    level: float
    """Contexts are sampled where the feature reaches this share of its maximum."""
    reverse: str = "none"
    """'add' adds the feature where it is not active, 'clamp' raises it where it is active, 'none' does neither."""
    strength: float = 1.0
    """How far the reverse goes, in units of the feature's maximum."""
    nulls: int = 1
    """Random directions for each ablation."""
    seed: int = 0


def edits_of(
    index: int,
    acts: Float[torch.Tensor, "N T"],
    activations: Activations,
    dictionary: Dictionary,
    feature: int,
    plan: AblationPlan,
) -> list[Edit]:
    """Every edit of one feature: ablations, their null, and the reverse; none where it is never active.

    Args:
        index: of the feature among those studied.
        acts: its feature activations.
    """
    # An order of the feature's own: its contexts are a uniform sample from the windows it is strong in, independent of those of
    # other features. An interval that resamples features needs that; one order for all would save little beside the edits.
    order = np.random.default_rng([plan.seed, 4, feature]).permutation(len(acts))
    random = np.random.default_rng([plan.seed, 2, feature])
    strong, maximum = contexts_of(acts, plan.contexts, plan.level, order)
    direction = dictionary.edit_directions[feature]
    noise = random_directions(direction, plan.nulls, random)
    edits = []
    for context in strong:
        own = acts[context.window]
        unit = scale(dictionary, activations.x[context.window])[:, 0]  # (T,)
        act = float(own[context.position])
        edits.append(Edit(index, "ablate", context, act, -own * unit, direction))
        edits += [Edit(index, f"{NULL} {i}", context, act, -own * unit, null) for i, null in enumerate(noise, start=1)]
        if plan.reverse == "clamp":
            lift = torch.where(own != 0, plan.strength * maximum - own, 0.0)
            edits.append(Edit(index, "clamp", context, act, lift * unit, direction))
    if plan.reverse == "add" and strong:
        for context in silent_contexts(acts, activations, plan.contexts, order, random):
            amount = torch.zeros(acts.shape[1])
            unit = scale(dictionary, activations.x[context.window])[context.position, 0]
            amount[context.position] = plan.strength * maximum * unit
            edits.append(Edit(index, "add", context, 0.0, amount, direction))
    return edits


def random_directions(
    direction: Float[torch.Tensor, " D"], count: int, random: np.random.Generator
) -> Float[torch.Tensor, "count D"]:
    """Random directions as long as ``direction``: as much along one moves each activation as far."""
    noise = torch.from_numpy(random.normal(size=(count, len(direction)))).to(direction)
    return noise * (direction.norm() / noise.norm(dim=1, keepdim=True))


class EffectAccumulator:
    """Effects of ``edits``, added row by row.

    Attributes:
        rows: the numbers of the edits of each (feature, kind).
        kl, moved: (E,) of each edit, as in ``Effects``.
        halves: (2, V) sums of the change of probability over every second context. Of the null float32: it has many.
        change: (C, V) change of the log-probability, in a temporary file; as the following not kept of the null.
        probability, direct: (V,) sums over contexts.
    """

    def __init__(self, edits: Sequence[Edit], n_vocab: int, say: Callable[[str], None]) -> None:
        self._edits, self._n_vocab = edits, n_vocab
        self.rows: dict[tuple[int, str], list[int]] = {}
        self._number: list[int] = []  # of each edit among those of its feature and kind
        for row, edit in enumerate(edits):
            rows = self.rows.setdefault((edit.feature, edit.kind), [])
            self._number.append(len(rows))
            rows.append(row)
        self.kl, self.moved = np.zeros(len(edits)), np.zeros(len(edits))
        kept = [key for key in self.rows if not _is_null(key[1])]
        self.halves = {key: np.zeros((2, n_vocab), np.float64 if key in kept else np.float32) for key in self.rows}
        ends = np.cumsum([len(self.rows[key]) for key in kept], dtype=int)
        change = mapped_array((int(ends[-1]) if kept else 0, n_vocab), say=say)
        self.change = dict(zip(kept, np.split(change, ends[:-1]), strict=False))
        self.probability, self.direct = ({key: np.zeros(n_vocab) for key in kept} for _ in range(2))

    def add(self, row: int, effect: RowEffect) -> None:
        """Add the effect of edit number ``row``."""
        key, number = (self._edits[row].feature, self._edits[row].kind), self._number[row]
        self.kl[row], self.moved[row] = effect.kl, effect.moved
        self.halves[key][number % 2] += effect.mass
        if key in self.change:
            self.change[key][number] = effect.change
            self.probability[key] += effect.before
            if effect.direct is not None:
                self.direct[key] += effect.direct

    def effects(self, tokens: Int[torch.Tensor, "N T"], direct: bool) -> dict[tuple[int, str], Effects]:
        """Effects by (feature, kind of edit).

        Args:
            tokens: the windows' token ids.
            direct: whether the direct effect was measured.
        """
        return {key: self._effect(key, tokens, direct) for key in self.rows}

    def _effect(self, key: tuple[int, str], tokens: torch.Tensor, direct: bool) -> Effects:
        rows, halves = self.rows[key], self.halves[key]
        C = len(rows)
        own = [self._edits[row] for row in rows]
        following = np.array([int(tokens[edit.context.window, edit.context.position + 1]) for edit in own])
        mass = halves.sum(0) / C
        odd = C // 2
        means = np.stack([halves[0] / (C - odd), halves[1] / odd if odd else np.full(self._n_vocab, np.nan)])
        change = self.change.get(key, np.zeros((0, self._n_vocab), np.float32))
        probability = self.probability[key] / C if key in self.change else mass * np.nan
        through = self.direct[key] / C if direct and key in self.change else None
        return Effects(own, following, change, self.kl[rows], self.moved[rows], mass, means, probability, through)


def measure(
    model: LanguageModel,
    hook_point: str,
    activations: Activations,
    edits: Sequence[Edit],
    progress: Progress | None = None,
) -> dict[tuple[int, str], Effects]:
    """Run every edit; effects by (index of the feature, kind of edit)."""
    progress = progress or Progress(quiet=True)
    direct = RESIDUAL.fullmatch(hook_point) is not None
    effects = EffectAccumulator(edits, model.n_vocab, progress.say)
    of_window: dict[int, list[int]] = {}
    for row, edit in enumerate(edits):
        of_window.setdefault(edit.context.window, []).append(row)
    length = {window: 1 + max(edits[row].context.position for row in rows) for window, rows in of_window.items()}
    with progress.stage("editing features", len(edits), "edits") as stage:
        for group in _groups(length):
            windows, lengths = torch.tensor(group), torch.tensor([length[window] for window in group])
            T = int(lengths.max())
            cache = WindowCache(model, hook_point, activations.tokens[windows, :T], activations.x[windows, :T], lengths)
            local = {window: number for number, window in enumerate(group)}
            rows = sorted((row for window in group for row in of_window[window]), key=lambda row: _span(edits[row]))
            for begin in range(0, len(rows), ROWS):
                chunk = rows[begin : begin + ROWS]
                for row, effect in zip(chunk, _run(cache, [edits[row] for row in chunk], local, direct), strict=True):
                    effects.add(row, effect)
                stage.advance(len(chunk))
    return effects.effects(activations.tokens, direct)


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


class RowEffect(NamedTuple):
    """Effect of one edit, as in ``Effects``; ``before`` is the probability without it."""

    change: np.ndarray
    kl: float
    moved: float
    mass: np.ndarray
    before: np.ndarray
    direct: np.ndarray | None


def _run(cache: WindowCache, edits: Sequence[Edit], local: dict[int, int], direct: bool) -> Iterator[RowEffect]:
    """What each edit did."""
    T = cache.tokens.shape[1]
    window: Int[torch.Tensor, " J"] = torch.tensor([local[edit.context.window] for edit in edits])
    last = torch.tensor([edit.context.position for edit in edits])
    amount = torch.stack([edit.amount[:T] for edit in edits])
    directions = torch.stack([edit.direction for edit in edits])
    final = cache.edited(window, last, amount, directions)
    here = (amount[torch.arange(len(edits)), last][:, None] * directions).to(final)
    for rows in torch.arange(len(edits)).split(LOGITS):
        # edits of one context are compared with one original
        places, which = torch.stack([window[rows], last[rows]], dim=1).unique(dim=0, return_inverse=True)
        own = cache.final[tuple(places.T.to(final.device))]
        which = which.to(final.device)
        # the null's direct effect is not asked for
        shown = torch.tensor([direct and not _is_null(edits[row].kind) for row in rows.tolist()])
        parts = [own, final[rows], own[which[shown]] + here[rows[shown]]]
        logits = cache.logits(torch.cat(parts)).double().split([len(part) for part in parts])
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
            yield RowEffect(arrays[0], kl, moved, arrays[1], arrays[2], arrays[3] if line in through else None)
