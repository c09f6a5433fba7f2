"""Patch features of a dictionary from the target run into the base run, many sets of features at once.

1. x' = x + sum over the set of (target code - base code) f at every position, where x is the base run's activation and f a
   feature's direction (``Dictionary.edit_directions``). The error term x - x_hat stays as it is, unless ``keep_error`` is
   switched off: then it is removed at the positions that are patched, x' = x_hat + the same sum.
2. At several hook points, in the order of the forward pass, the first is patched as above; at a later one the codes of the
   running activation are set to the target's, so that what an earlier patch has already brought is not added twice.
3. Candidates are the features whose codes differ between base and target on some prompt, at a position a patch can reach.
4. A set is measured by its effect at the last token: KL(patched || target), the other direction, the logit difference and the
   share of its base-to-target change that is recovered, and the size of the edit: the mean over the prompt's positions of
   |x' - x|.
5. What a set does to a prompt depends only on those of its features that differ on that prompt (at a later hook point: on all of
   its features there). Each (prompt, restricted set) is run once and remembered, so that sets which agree on a prompt share
   its run.

Cunningham et al. 2023 (arXiv 2309.08600), section 4; the direction of the KL is theirs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from evalkit.dictionaries.base import Dictionary
from evalkit.errors import DictionaryError
from evalkit.interventions.hooks import Edit, scale
from evalkit.interventions.pairs import PairCache
from evalkit.models.language_model import LanguageModel
from evalkit.tasks.base import Pairs, logit_difference

MEMORY = 400_000
"""Most runs remembered at a time; all are forgotten when there would be more."""


class Point(NamedTuple):
    """A hook point that is patched."""

    hook_point: str
    """TransformerLens name."""
    dictionary: Dictionary
    """Its features."""


class Measures(NamedTuple):
    """What S sets of patched features do to N prompts, float64 on the CPU."""

    kl: Float[torch.Tensor, "S N"]
    """KL(patched || target) in nats."""
    kl_reverse: Float[torch.Tensor, "S N"]
    """KL(target || patched) in nats."""
    logit_difference: Float[torch.Tensor, "S N"]
    """logit(base_answer) - logit(wrong)."""
    recovered: Float[torch.Tensor, "S N"]
    """Share of the logit difference's change from base to target; NaN where it does not change."""
    edit: Float[torch.Tensor, "S N"]
    """Mean over the prompt's positions of |x' - x|, summed over hook points."""


class Spent(NamedTuple):
    """What something cost."""

    passes: int
    """Runs of one prompt from the hook point on."""
    seconds: float
    """Wall time."""


class Candidates(NamedTuple):
    """The C features whose activations differ between base and target on some prompt, over all points; tensors of N prompts."""

    features: Int[torch.Tensor, " C"]
    """Feature ids."""
    points: Int[torch.Tensor, " C"]
    """Which point each belongs to, in the order of the forward pass."""
    delta: Float[torch.Tensor, "N M C"]
    """Target activation - base activation at the positions that are run, in units of x; 0 behind the last token."""
    target_acts: Float[torch.Tensor, "N M C"]
    """The target activation itself, for later points."""
    directions: Float[torch.Tensor, "C D"]
    real: Float[torch.Tensor, "N M"]
    """1 up to the last token, 0 behind it."""


class Patching:
    """Base and target runs of some pairs, ready to be patched with any sets of features.

    Args:
        model: the language model.
        points: where to patch, and the dictionaries whose features are patched there.
        pairs: N pairs of prompts.
        keep_error: leave the error term x - x_hat in place.
        batch: prompts of one forward pass.

    Attributes:
        candidates: (C,) ids of the features whose activations differ anywhere between base and target.
        points: (C,) which hook point each candidate belongs to; all 0 where there is one.
        hooks: the points in the order of the forward pass.
        reference: measures (S = 1) of the base run as it is. With the error term kept, ``unpatched`` is the same.
        passes: runs of one prompt from the hook point on so far; a gradient counts 3, the set-up 2 for each pair.
        seconds: time spent in them.
        setup: passes and seconds of the set-up alone, finding the candidates included.

    Raises:
        DictionaryError: a dictionary reads vectors of another width than its hook point has, or a hook point stands there twice.
        ModelError: there is no such hook point, or a prompt is too long.
    """

    def __init__(
        self,
        model: LanguageModel,
        points: Sequence[tuple[str, Dictionary]],
        pairs: Pairs,
        *,
        keep_error: bool = True,
        batch: int = 64,
    ) -> None:
        self.hooks = _checked(model, [Point(*point) for point in points])
        began = time.perf_counter()
        self.model, self.pairs, self.keep_error, self.batch = model, pairs, keep_error, max(1, batch)
        self._measured: dict[tuple[int, bytes], tuple[float, float, float, float]] = {}
        self._runs = PairCache(model, [point.hook_point for point in self.hooks], pairs, batch=self.batch)
        counts = torch.tensor([0, *(point.dictionary.n_features for point in self.hooks)]).cumsum(0).tolist()
        offsets = dict(zip((point.hook_point for point in self.hooks), counts, strict=False))
        self.hooks.sort(key=lambda point: self._runs.order.index(point.hook_point))
        self._offsets = torch.tensor([offsets[point.hook_point] for point in self.hooks])
        self._found = find_candidates(self.hooks, self._runs)
        self.candidates, self.points = self._found.features, self._found.points
        # at a later hook point activations are set to the target's, which may move any of them on any prompt
        differs = self._found.delta.ne(0).any(1) | (self.points > 0)  # (N, C)
        self._differing = [row.nonzero()[:, 0] for row in differs]
        everyone = torch.arange(pairs.n)
        with torch.no_grad():
            base = self._runs.base_logits.double().log_softmax(-1)
            target = [self._runs.logits_with(part, target=True).double() for part in everyone.split(self.batch)]
            self._target_log_probs = torch.cat(target).log_softmax(-1)
            self._target_probs = self._target_log_probs.exp()
        self._base_difference = self._difference(base, everyone)
        self._target_difference = self._difference(self._target_log_probs, everyone)
        ratio = base - self._target_log_probs
        none = torch.zeros(1, pairs.n, dtype=torch.float64)
        self.reference = Measures(
            (base.exp() * ratio).sum(-1).cpu()[None],
            -(self._target_probs * ratio).sum(-1).cpu()[None],
            self._base_difference[None],
            torch.where(self._target_difference == self._base_difference, torch.nan, none),
            none,
        )
        self.passes, self.seconds = 2 * pairs.n, time.perf_counter() - began
        self.setup = Spent(self.passes, self.seconds)

    def fresh(self) -> Patching:
        """The same set-up with nothing remembered: what a ranking on it costs does not depend on what was run before."""
        other = copy.copy(self)
        other._measured = {}
        other.passes, other.seconds = self.setup
        return other

    @property
    def n(self) -> int:
        """Number of prompts N."""
        return self.pairs.n

    @property
    def ids(self) -> Int[torch.Tensor, " C"]:
        """Feature ids that no two hook points share: those of a further one are numbered on behind those given before it."""
        return self.candidates + self._offsets[self.points]

    @property
    def affected(self) -> Bool[torch.Tensor, "N C"]:
        """Which candidates' codes differ on which prompt."""
        found = torch.zeros(self.n, len(self.candidates), dtype=torch.bool)
        for row, own in enumerate(self._differing):
            found[row, own] = True
        return found

    @property
    def sizes(self) -> Float[torch.Tensor, " C"]:
        """How far each candidate alone moves x: the root of its summed squared edits over prompts and positions, float64."""
        return self._found.delta.double().square().sum((0, 1)).sqrt().cpu() * self._found.directions.double().norm(dim=1).cpu()

    @property
    def unpatched(self) -> Measures:
        """Measures of the empty set, S = 1."""
        return self.measure(torch.zeros(1, len(self.candidates), dtype=torch.bool))

    @property
    def everything(self) -> Measures:
        """Measures of the set of all candidates, S = 1."""
        return self.measure(torch.ones(1, len(self.candidates), dtype=torch.bool))

    def measure(self, sets: Bool[torch.Tensor, "S C"]) -> Measures:
        """What patching each of ``sets`` does to each prompt. Runs made before are looked up."""
        sets = torch.as_tensor(sets, dtype=torch.bool)
        if sets.ndim != 2 or sets.shape[1] != len(self.candidates):
            raise ValueError(f"sets have shape {tuple(sets.shape)}, expected (S, {len(self.candidates)})")
        if len(self._measured) > MEMORY:
            self._measured.clear()
        keys, jobs = [], {}
        for row, own in enumerate(self._differing):
            packed = np.packbits(sets[:, own].numpy(), axis=1)
            keys.append([(row, line.tobytes()) for line in packed])
            jobs.update({key: place for place, key in enumerate(keys[-1]) if key not in self._measured})
        self._run_all(jobs, sets)
        found = torch.tensor([[self._measured[key] for key in line] for line in keys], dtype=torch.float64)
        kl, reverse, difference, edit = found.reshape(self.n, len(sets), 4).permute(2, 1, 0)
        change = self._target_difference - self._base_difference
        recovered = torch.where(change == 0, torch.nan, (difference - self._base_difference) / change)
        return Measures(kl, reverse, difference, recovered, edit)

    def gradients(self, sets: Float[torch.Tensor, "S C"]) -> Float[torch.Tensor, "S N C"]:
        """d KL(patched || target) / d (share of each candidate that is patched), at ``sets`` of shares between 0 and 1.

        At a 0 of a set it is the first-order effect of patching that candidate, at a 1 minus that of leaving it out.
        """
        began = time.perf_counter()
        shares = sets.to(self.model.device, self.model.dtype)
        effects = torch.zeros(len(sets), self.n, len(self.candidates), dtype=torch.float64)
        jobs = sorted(((row, place) for row in range(self.n) for place in range(len(sets))), key=self._length)
        for start in range(0, len(jobs), self.batch):
            chunk = jobs[start : start + self.batch]
            rows, places = (torch.tensor(part) for part in zip(*chunk, strict=True))
            weights = shares[places].clone().requires_grad_(True)
            with torch.enable_grad():
                logits = self._runs.logits_with(rows, self._edits(rows, weights, []))
                log = logits.log_softmax(-1)
                kl = (log.exp() * (log - self._target_log_probs[rows].to(log.dtype))).sum()
                (gradient,) = torch.autograd.grad(kl, weights)
            effects[places, rows] = gradient.double().cpu()
        self.passes += 3 * len(jobs)
        self.seconds += time.perf_counter() - began
        return effects

    def _length(self, job: tuple[int, int]) -> tuple[int, int]:
        """Jobs of prompts of one length stand together, so that batches hold little padding."""
        return int(self._runs.count[job[0]]), job[0]

    @torch.no_grad()
    def _run_all(self, jobs: dict[tuple[int, bytes], int], sets: torch.Tensor) -> None:
        began = time.perf_counter()
        ordered = sorted(jobs.items(), key=lambda job: self._length((job[0][0], job[1])))
        for start in range(0, len(ordered), self.batch):
            chunk = ordered[start : start + self.batch]
            rows = torch.tensor([key[0] for key, _ in chunk])
            shares = sets[[place for _, place in chunk]].to(self.model.device, self.model.dtype)
            moved: list[torch.Tensor] = []
            log = self._runs.logits_with(rows, self._edits(rows, shares, moved)).double().log_softmax(-1)
            against = self._target_log_probs[rows]
            log_ratio = log - against
            numbers = torch.stack(
                [
                    (log.exp() * log_ratio).sum(-1).cpu(),
                    -(self._target_probs[rows] * log_ratio).sum(-1).cpu(),
                    self._difference(log, rows),
                    torch.stack(moved).sum(0).double().cpu() / (self.pairs.last[rows] + 1),
                ],
                dim=1,
            )
            self._measured.update(zip([key for key, _ in chunk], map(tuple, numbers.tolist()), strict=True))
        self.passes += len(ordered)
        self.seconds += time.perf_counter() - began

    def _difference(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logit difference (J,) of runs of prompts ``rows``, on the CPU; logs of probabilities do as well as logits."""
        device = logits.device
        right, wrong = self.pairs.base_answer[rows].to(device), self.pairs.wrong[rows].to(device)
        return logit_difference(logits, right, wrong).double().cpu()

    def _edits(self, rows: torch.Tensor, shares: torch.Tensor, moved: list[torch.Tensor]) -> dict[str, Edit]:
        """What is added at each hook point to prompts ``rows`` (J,) when ``shares`` (J, C) of the candidates are patched.

        The summed norms (J,) of what was added are appended to ``moved`` as the run goes on.
        """
        M = int(self._runs.count[rows].max())
        return {point.hook_point: self._edit(index, rows, shares, M, moved) for index, point in enumerate(self.hooks)}

    def _edit(self, index: int, rows: torch.Tensor, shares: torch.Tensor, M: int, moved: list[torch.Tensor]) -> Edit:
        def first(found: torch.Tensor) -> torch.Tensor:
            change = found.new_zeros(len(rows), M, found.shape[-1])
            for row in rows.unique().tolist():
                these = (rows == row).nonzero()[:, 0]
                own = self._differing[row][self.points[self._differing[row]] == index]
                codes = shares[these][:, None, own] * self._found.delta[row, None, :M, own]  # (J', M, own)
                change = change.index_put((these,), codes @ self._found.directions[own].to(codes.dtype))
            return change

        def later(found: torch.Tensor) -> torch.Tensor:
            point, mine = self.hooks[index], (self.points == index).nonzero()[:, 0]
            features = self.candidates[mine]
            here = found.cpu()  # where dictionaries are
            unit = scale(point.dictionary, here).to(found)
            running = point.dictionary.encode(here)[..., features].to(found)
            codes = (self._found.target_acts[rows][:, :M, mine] - running) * unit * shares[:, None, mine]
            return codes @ self._found.directions[mine].to(found.dtype) * self._found.real[rows, :M, None]

        def edit(found: torch.Tensor) -> torch.Tensor:
            change = first(found) if index == 0 else later(found)
            if not self.keep_error:
                x_hat = self.hooks[index].dictionary.reconstruct(found.cpu()).to(found)
                change = change + (x_hat - found) * self._found.real[rows, :M, None]
            moved.append(change.detach().norm(dim=-1).sum(1))
            return change

        return edit


@torch.no_grad()
def find_candidates(points: Sequence[Point], runs: PairCache) -> Candidates:
    """The candidates of ``points``, which stand in the order of the forward pass.

    Raises:
        DictionaryError: the points have different widths.
    """
    N, M = len(runs.count), int(runs.count.max())
    real = torch.arange(M) < runs.count[:, None]
    later = len(points) > 1
    features, deltas, targets, directions = [], [], [], []
    for name, dictionary in points:
        differs = torch.zeros(dictionary.n_features, dtype=torch.bool)
        of_prompts = []
        for row in range(N):
            base, target = runs.base[name][row].cpu(), runs.target[name][row].cpu()
            acts = [dictionary.encode(x) for x in (base, target)]  # (M, F) each
            differs |= ((acts[0] != acts[1]) & real[row, :, None]).any(0)
            unit = scale(dictionary, base)
            kept = [*(act * unit for act in acts), *([acts[1]] if later else [])]
            # of wide sparse dictionaries all prompts at once would fill the memory
            of_prompts.append([act.to_sparse() if dictionary.sparse else act for act in kept])
        here = differs.nonzero()[:, 0]
        picked = [[(act.to_dense() if act.is_sparse else act)[:, here] for act in kept] for kept in of_prompts]
        base_acts, target_acts, *raw = (torch.stack(acts) for acts in zip(*picked, strict=True))
        features.append(here)
        deltas.append((target_acts - base_acts) * real[..., None])
        targets += raw
        directions.append(dictionary.edit_directions[here])
    if len({rows.shape[1] for rows in directions}) > 1:
        names = ", ".join(point.hook_point for point in points)
        what = "hook points of different widths cannot be patched together"
        raise DictionaryError(what, where=names, fix="patch each alone")
    device, dtype = runs.model.device, runs.model.dtype
    delta = torch.cat(deltas, dim=-1).to(device, dtype)
    return Candidates(
        torch.cat(features),
        torch.cat([torch.full_like(ids, index) for index, ids in enumerate(features)]),
        delta,
        torch.cat(targets, dim=-1).to(device, dtype) if later else delta,
        torch.cat(directions).to(device, dtype),
        real.to(device, dtype),
    )


def _checked(model: LanguageModel, points: list[Point]) -> list[Point]:
    names = [point.hook_point for point in points]
    for name, dictionary in points:
        if dictionary.d_in != model.width(name):
            raise DictionaryError(
                f"the dictionary reads vectors of width {dictionary.d_in}, {name} has {model.width(name)}",
                where=name,
                fix="use a dictionary that was fitted at this hook point of this model",
            )
        if names.count(name) > 1:
            raise DictionaryError(
                "a hook point stands there twice", where=name, fix="name each once: one would overwrite the other"
            )
    return points
