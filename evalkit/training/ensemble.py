"""Any number of autoencoders fed from one pass over the data, same-shape ones as one batched step.

1. A member is a ``Trainer``. Members of one architecture, number of features and hook point, that differ only in what their
   mechanism can compute at once (``stacks``) and in seed, Adam's settings, clipping and dead-feature patience, form a ``Stack``.
2. A stack owns tensors (E, ...); the members' parameters, moments and counters are views of them. So a member's ``state``,
   ``freeze`` and constraints work as ever, and nothing is copied between the two.
3. ``Stack.step`` is ``Trainer.step`` for all: one forward and one backward, then clipping and constraints member by member, and
   one Adam over the stacked moments with each member's own learning rate.
4. All others are stepped one after the other on the same batch: bit for bit what they would be alone.
5. A member that is removed leaves the others untouched: its stack is built again without it.

A stacked member equals the same autoencoder trained alone on the same batches up to float32 rounding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float

from evalkit.training.base import Forward
from evalkit.training.compute import stacking_pays
from evalkit.training.config import TrainConfig
from evalkit.training.stacks import Joint, Leaves, shaped
from evalkit.training.topk import TrainableTopK
from evalkit.training.trainer import Step, Trainer, schedule

FREE: dict[str, Any] = {
    "lr": None, "beta1": None, "beta2": None, "clip": None, "dead_after": 1, "seed": 0, "order": None, "recipe": "",
    "features": 1, "expansion": 1.0,
}  # fmt: skip
"""Shared settings in which members of a stack may differ (the number of features is compared as it came out)."""


def stack_key(trainer: Trainer) -> tuple[Any, ...] | None:
    """What members of one stack have in common; None where the architecture is stepped member by member."""
    config, start = trainer.config, trainer.start
    module = trainer.module
    if module.stackable is None or type(trainer.optimiser) is not torch.optim.Adam:
        return None
    if trainer.group is not None and module.pools and not isinstance(module, TrainableTopK):
        return None  # what it asks of other processes, it asks for one member
    free = module.stackable | module.shaping
    own = tuple((key, repr(value)) for key, value in vars(config.own).items() if key not in free)
    shared = tuple(
        (field.name, repr(getattr(config, field.name)))
        for field in dataclasses.fields(config)
        if field.name not in FREE and field.name != "own"
    )
    data = (trainer.scale, start.variance, start.centre.cpu().numpy().tobytes())
    return (shared, own, start.features, trainer.steps_done, str(trainer.device), data)


def _pace(config: TrainConfig) -> tuple[Any, ...]:
    """What Adam has to be told; members that agree in it are one group of parameters."""
    return (config.peak_lr, config.betas)


class _Block(NamedTuple):
    """Neighbours in the stack with one k and one pace."""

    members: range
    cut: int
    """Which run of leaves they belong to."""


class Stack:
    """Same-shape trainers that take their steps together.

    Args:
        trainers: of equal ``stack_key``. From now on their tensors are views of the stack's.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.places = sorted(range(len(trainers)), key=lambda i: (shaped(trainers[i].module), _pace(trainers[i].config)))
        self.trainers = [trainers[i] for i in self.places]
        self.joint = Joint([trainer.module for trainer in self.trainers])
        self._stack_weights()
        self._stack_moments()
        self.quiet_for = torch.stack([trainer.quiet_for for trainer in self.trainers])  # (E, F)
        self.patience = torch.tensor([[trainer.config.dead_after] for trainer in self.trainers], device=self.quiet_for.device)
        self._look_at = 0
        """Step at which a feature can be dead."""
        for trainer, row in zip(self.trainers, self.quiet_for, strict=True):
            trainer.quiet_for = row

    def _stack_weights(self) -> None:
        parameters = [dict(trainer.module.named_parameters()) for trainer in self.trainers]
        self.stacked = {name: torch.stack([own[name].detach() for own in parameters]) for name in parameters[0]}
        for own, rows in zip(parameters, zip(*self.stacked.values(), strict=True), strict=True):
            for parameter, row in zip(own.values(), rows, strict=True):
                parameter.data = row
        self.cuts = self.joint.cuts
        self.groups: list[Leaves] = [
            {name: torch.nn.Parameter(tensor[cut]) for name, tensor in self.stacked.items()} for cut in self.cuts
        ]

    def _stack_moments(self) -> None:
        self.blocks = []
        for number, cut in enumerate(self.cuts):
            here = range(cut.start, cut.stop)
            for _, alike in groupby(here, key=lambda i: _pace(self.trainers[i].config)):
                members = list(alike)
                self.blocks.append(_Block(range(members[0], members[-1] + 1), number))
        groups = []
        for block in self.blocks:
            a, b = block.members.start, block.members.stop
            config = self.trainers[a].config
            groups.append(
                {
                    "params": [torch.nn.Parameter(tensor[a:b]) for tensor in self.stacked.values()],
                    "lr": config.peak_lr,
                    "betas": config.betas,
                }
            )
        self.optimiser = torch.optim.Adam(groups, fused=True)
        for block, group in zip(self.blocks, self.optimiser.param_groups, strict=True):
            for name, parameter in zip(self.stacked, group["params"], strict=True):
                self._stack_state(block, name, parameter)

    def _stack_state(self, block: _Block, name: str, parameter: torch.nn.Parameter) -> None:
        """Moments of one parameter of a block, gathered from its members and given back to them as views."""
        owners = [self.trainers[i] for i in block.members]
        mine = [dict(trainer.module.named_parameters())[name] for trainer in owners]
        states = [trainer.optimiser.state.get(own, {}) for trainer, own in zip(owners, mine, strict=True)]
        step = states[0].get("step", torch.zeros((), dtype=torch.float32, device=parameter.device)).clone()
        moments = {
            key: torch.stack([state.get(key, torch.zeros_like(own)) for state, own in zip(states, mine, strict=True)])
            for key in ("exp_avg", "exp_avg_sq")
        }
        self.optimiser.state[parameter] = {"step": step, **moments}
        for i, (trainer, own) in enumerate(zip(owners, mine, strict=True)):
            trainer.optimiser.state[own] = {"step": step, **{key: tensor[i] for key, tensor in moments.items()}}

    def _with_dead(self, dead: Bool[torch.Tensor, "E F"], batch: int) -> list[int]:
        """Members with dead features. The device is asked only when one can be: what has been silent for q activations cannot
        die within the next (patience - q) / batch steps."""
        first = self.trainers[0]
        if first.steps_done < self._look_at:
            return []
        found = [member for member, some in enumerate(dead.any(1).tolist()) if some]
        if not found:
            presented = batch if first.group is None else batch * first.group.size
            self._look_at = first.steps_done + max(1, -(-int((self.patience - self.quiet_for).min()) // presented))
        return found

    def step(self, x: Float[torch.Tensor, "B D"]) -> list[Step]:
        """One step of every member on a batch in the units of the data; reports in the order the trainers were given."""
        first = self.trainers[0]
        x = x.to(first.device, torch.float32) * first.scale
        for block, group in zip(self.blocks, self.optimiser.param_groups, strict=True):
            config = self.trainers[block.members.start].config
            group["lr"] = config.peak_lr * schedule(config, first.steps_done, first.start.steps)
        dead = self.quiet_for >= self.patience
        passes = self.joint.forward(x, self.groups)
        for leaves in self.groups:
            for leaf in leaves.values():
                leaf.grad = None
        passes.loss.sum().backward()
        self._hand_out_gradients()
        loss = passes.loss.detach()
        for member in self._with_dead(dead, len(x)):
            own = Forward(*(values[member] for values in passes))
            extra = self.trainers[member].module.extra(x, own, dead[member])
            if extra is not None:
                extra.backward()  # adds to the member's gradients, which are the stack's
                loss[member] += extra.detach()
        fvu = passes.residual.square().sum((1, 2)) / (len(x) * first.start.variance)
        report, fired, presented = [loss, fvu, passes.l0], passes.fired, len(x)
        if first.group is not None:
            gradients = [leaf.grad for leaves in self.groups for leaf in leaves.values() if leaf.grad is not None]
            buffers = [buffer for trainer in self.trainers for buffer in trainer.module.buffers_to_average()]
            first.group.average(gradients + report + buffers)
            fired, presented = first.group.any(fired), presented * first.group.size
        for trainer in self.trainers:
            trainer.module.constrain_gradients()
            if trainer.config.clip is not None:
                torch.nn.utils.clip_grad_norm_(trainer.module.parameters(), trainer.config.clip)
        self.optimiser.step()
        for trainer in self.trainers:
            trainer.module.constrain_weights()
            trainer.module.step_number += 1
            trainer.steps_done += 1
        self.quiet_for += presented
        self.quiet_for[fired] = 0
        steps = [Step(*values) for values in zip(*(tensor.unbind() for tensor in report), strict=True)]
        return [step for _, step in sorted(zip(self.places, steps, strict=True), key=lambda pair: pair[0])]

    def _hand_out_gradients(self) -> None:
        """Members and blocks of the optimiser see the leaves' gradients, as views."""
        for block, group in zip(self.blocks, self.optimiser.param_groups, strict=True):
            begin = self.cuts[block.cut].start
            for leaf, parameter in zip(self.groups[block.cut].values(), group["params"], strict=True):
                grad = leaf.grad
                parameter.grad = None if grad is None else grad[block.members.start - begin : block.members.stop - begin]
        for cut, leaves in zip(self.cuts, self.groups, strict=True):
            for member in range(cut.start, cut.stop):
                for parameter, leaf in zip(self.trainers[member].module.parameters(), leaves.values(), strict=True):
                    parameter.grad = None if leaf.grad is None else leaf.grad[member - cut.start]


class _Part(NamedTuple):
    """Members that are fed together."""

    hook_point: str
    members: list[int]
    stack: Stack | None
    """None for a member that is stepped alone."""


def pays(trainers: Sequence[Trainer]) -> bool:
    """Whether trainers of equal ``stack_key`` are faster as a stack than one after the other.

    On a CPU it is left alone: eight TopK autoencoders took 1.4 times as many steps a second as a stack where each was small (256
    tokens, 512 features), and 0.6 times as many at 2048 tokens and 2304 features (``benchmarks/ensemble.py``). On a GPU TopK has
    a fused step that a stack has to beat (``compute.stacking_pays``, an estimate); what has none is stacked.
    """
    first = trainers[0]
    if first.device.type == "cpu":
        return False
    return first.fused is None or stacking_pays(len(trainers), len(first.start.centre), first.start.features)


class Ensemble:
    """Members that are fed the same batches.

    Args:
        trainers: the members.
        hook_points: which activations each is fed, in the same order.
        batched: step same-shape members at once; False steps each alone, None decides for each shape (``pays``).
    """

    def __init__(self, trainers: Sequence[Trainer], hook_points: Sequence[str], *, batched: bool | None = True) -> None:
        self.trainers = dict(enumerate(trainers))
        """Members that are still trained, by their number."""
        self.hook_points, self.batched = list(hook_points), batched
        self._arrange()

    def _arrange(self) -> None:
        alike: dict[Any, list[int]] = {}
        for number, trainer in self.trainers.items():
            key = None if self.batched is False else stack_key(trainer)
            alike.setdefault((self.hook_points[number], number if key is None else key), []).append(number)
        self.parts = []
        for (hook_point, _), members in alike.items():
            trainers = [self.trainers[i] for i in members]
            if len(members) > 1 and (self.batched or pays(trainers)):
                self.parts.append(_Part(hook_point, members, Stack(trainers)))
            else:
                self.parts += [_Part(hook_point, [i], None) for i in members]

    @property
    def stacks(self) -> list[list[int]]:
        """Numbers of the members that are stepped at once."""
        return [part.members for part in self.parts if part.stack is not None]

    def step(self, batches: Mapping[str, Float[torch.Tensor, "B D"]]) -> dict[int, Step]:
        """One step of every member; ``batches`` by hook point, in the units of the data."""
        reports: dict[int, Step] = {}
        for part in self.parts:
            x = batches[part.hook_point]
            steps = [self.trainers[part.members[0]].step(x)] if part.stack is None else part.stack.step(x)
            reports.update(zip(part.members, steps, strict=True))
        return dict(sorted(reports.items()))

    def remove(self, numbers: Sequence[int]) -> None:
        """Train on without some members; they keep their last weights."""
        for number in numbers:
            del self.trainers[number]
        if numbers:
            self._arrange()

    def state(self) -> dict[int, dict[str, Any]]:
        """A copy of every member's state."""
        return {number: copy.deepcopy(trainer.state()) for number, trainer in self.trainers.items()}

    def load_state(self, states: Mapping[int, dict[str, Any]]) -> None:
        """Go on from ``states``; members that are not in it had been removed."""
        for number in set(self.trainers) - set(states):
            del self.trainers[number]
        for number, trainer in self.trainers.items():
            trainer.load_state(states[number])
        self._arrange()
