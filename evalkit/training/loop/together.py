"""The training loop: data in, frozen dictionaries and their histories out, for one dictionary or many from one pass.

1. Members at one hook point share its supply; supplies of several hook points may share one pass of the language model
   (``stream.Chunks``). A seeded sample of the data gives scale, centre and variance (``trainer.begin``), once for members with
   the same ``normalise``.
2. Every batch is stepped through all members, one after the other. Now and then a row of means goes into each member's history
   and to its observer.
3. Losses are checked. On the CPU each is looked at; elsewhere their sums are, every ``WATCH`` steps and with each row, so that
   nothing waits for a single one. A member whose loss is no number is dropped with its message; the others go on as if it had
   never been there.
4. A member that has made its steps is frozen and handed over at once. What fed only members that are gone is let go of.
5. With a ``Checkpoint``, everything that a later start needs is saved together now and then, before members are handed over, and
   on Ctrl-C: weights, moments, counters, histories, and where the supplies stand. The last one with finite weights is kept
   whatever ends the run. A part of the members can go on from it without the others.

On the CPU the same seed, data and number of threads give bit-identical weights, in one go or in several, wherever products do not
depend on where numbers lie (``evalkit.util.arithmetic``). Each member has bit for bit the weights it has alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from evalkit.errors import DiskFailed, EvalkitError, SuiteError
from evalkit.training.architectures.base import Start
from evalkit.training.data.batches import DataExhausted, Supply
from evalkit.training.loop.checkpoint import Checkpoint
from evalkit.training.loop.history import History
from evalkit.training.loop.members import Member, Result, Trained, about, keys_of, one_batch, one_length
from evalkit.training.loop.topk_step import FusedStep
from evalkit.training.loop.trainer import SAMPLE, Beginning, Step, Trainer, begin
from evalkit.training.parallel.group import ALONE, Group
from evalkit.training.settings.config import TrainConfig, TrainingFailed
from evalkit.util import arithmetic

WATCH = 20
"""Steps between looks at the losses where looking at them would make the accelerator wait."""


def beginning_of(config: TrainConfig, shared: Beginning) -> Beginning:
    """``shared`` with the sizes and the generator of one config.

    Raises:
        SuiteError: too few features for the architecture's settings.
    """
    generator = torch.Generator().manual_seed(config.seed)
    features = config.n_features(len(shared.start.centre))
    start = shared.start._replace(features=features, steps=config.steps, generator=generator, centre=shared.start.centre.clone())
    return shared._replace(start=start)


class Together:
    """A run of one member or several as it stands.

    Args:
        members: what is trained; all of one batch size.
        supplies: by hook point, of that batch size.
        model: identity of the language model.
        checkpoint: where the state of all is kept; nowhere when left out.
        device: where it is trained.
        group: other processes that take their share of every batch; ``supplies`` give this process's share.
        saved: what a checkpoint held, to go on from (``members.load``).

    Raises:
        SuiteError: members of different batch sizes, or a batch that cannot be shared out evenly; with a checkpoint, members of
            different lengths.
    """

    def __init__(
        self,
        members: Sequence[Member],
        supplies: Mapping[str, Supply],
        *,
        model: str,
        checkpoint: Checkpoint | None = None,
        device: str | torch.device = "cpu",
        group: Group = ALONE,
        saved: Any = None,
    ) -> None:
        self.members, self.supplies, self.model = list(members), dict(supplies), model
        self.checkpoint, self.device, self.group = checkpoint, torch.device(device), group
        self.batch = one_batch(self.members, group.size)
        if checkpoint is not None:
            one_length(self.members)
        self.keys = keys_of(self.members)
        self.histories = [History(m.config.steps, m.config.batch, m.observe, self.device) for m in self.members]
        self.results: dict[int, Result] = {}
        self.number = 0
        """Steps made."""
        self.seconds = 0.0
        """Time of all steps, those before a checkpoint included."""
        self.size = len(self.members)
        """Members of the whole run, those that were handed over before a checkpoint included."""
        self._since: float | None = None
        self._saved: int | None = None
        self._fed = set(self.supplies)
        self.trainers = self._begin() if saved is None else self._begin_again(saved)
        """Members that are still trained, by number."""
        for trainer in self.trainers.values():
            FusedStep.give(trainer)
        if saved is not None:
            self._go_on(saved)
        self._let_go()

    def _begin(self) -> dict[int, Trainer]:
        """Trainers by member; what cannot begin is a result already."""
        shared: dict[tuple[str, bool, int], Beginning | EvalkitError] = {}
        trainers = {}
        for i, member in enumerate(self.members):
            config, hook_point = member.config, member.hook_point
            key = (hook_point, config.normalise, config.data_seed)
            if key not in shared:
                try:
                    shared[key] = begin(config, self.supplies[hook_point].sample(SAMPLE, config.data_seed), hook_point)
                except SuiteError as error:  # this member's settings, not the data
                    self.results[i] = error
                    continue
                except EvalkitError as error:
                    shared[key] = error
            found = shared[key]
            try:
                if isinstance(found, EvalkitError):
                    raise found
                trainers[i] = Trainer(config, beginning_of(config, found), self.device, self.group)
            except EvalkitError as error:
                self.results[i] = error
        return trainers

    def _begin_again(self, saved: Any) -> dict[int, Trainer]:
        """As ``_begin``, with what was taken from the data then."""
        trainers = {}
        for i, (key, member) in enumerate(zip(self.keys, self.members, strict=True)):
            if key in saved["failed"]:
                what, where, fix = saved["failed"][key]
                self.results[i] = TrainingFailed(what, where=where, fix=fix)
                continue
            state = saved["members"][key]
            start = Start(**state["start"], generator=torch.Generator().manual_seed(member.config.seed))
            trainers[i] = Trainer(member.config, Beginning(state["trainer"]["scale"], start), self.device, self.group)
        return trainers

    def _go_on(self, saved: Any) -> None:
        self.number, self.seconds, self.size = int(saved["number"]), float(saved["seconds"]), int(saved["size"])
        self._saved = self.number
        for i, trainer in self.trainers.items():
            state = saved["members"][self.keys[i]]
            trainer.load_state(state["trainer"])
            trainer.start.generator.set_state(state["generator"])
            self.histories[i].load_state(state["history"])
        for hook_point, supply in self.supplies.items():
            supply.load_state(saved["supplies"][hook_point])

    def save(self, supplies: Mapping[str, dict[str, Any]] | None = None) -> None:
        """Write a checkpoint of all members that are still trained, if their weights are numbers: the last good one is worth more
        than a bad one.

        Args:
            supplies: where the supplies stand, by hook point; asked of them when left out.

        Raises:
            DiskFailed: it cannot be written; the one before is kept.
        """
        if self.checkpoint is None or self.number == self._saved or not self.trainers:
            return
        if not all(trainer.finite for trainer in self.trainers.values()):
            return
        members = {}
        for i, trainer in self.trainers.items():
            start = trainer.start._asdict()
            generator = start.pop("generator").get_state()
            parts = {"trainer": trainer.state(), "start": start, "generator": generator, "history": self.histories[i].state()}
            members[self.keys[i]] = parts
        stood = {hook_point: supply.state() for hook_point, supply in self.supplies.items()} if supplies is None else supplies
        state: dict[str, Any] = {
            "number": self.number,
            "seconds": self.seconds,
            "size": self.size,
            "members": members,
            "failed": {self.keys[i]: [error.what, error.where, error.fix] for i, error in self.failures.items()},
            "supplies": stood,
        }
        header = about(self.members, self.supplies, self.model)
        self.checkpoint.save(header, state, failed=sorted(state["failed"]), arithmetic=arithmetic.words())
        self._saved = self.number

    @property
    def running(self) -> int:
        """Members that still have steps to make."""
        return sum(self.members[i].config.steps > self.number for i in self.trainers)

    @property
    def failures(self) -> dict[int, EvalkitError]:
        """Why there are no dictionaries of some members, by number."""
        return {i: result for i, result in self.results.items() if isinstance(result, EvalkitError)}

    def step(self, finished: Callable[[int, Trained], None] | None = None) -> dict[int, Step]:
        """One batch through every member that is still trained; what each reported, by member.

        Args:
            finished: is given each member that made its last step, as it does.

        Raises:
            DataExhausted: there is no batch left; a checkpoint is written first.
            DiskFailed: the checkpoint cannot be written; the one before is kept.
        """
        if self._since is None:
            self._since = time.perf_counter()
        stood = {hook_point: supply.state() for hook_point, supply in self.supplies.items()}
        try:
            batches = {hook_point: self.supplies[hook_point].next() for hook_point in sorted(self._fed)}
        except DataExhausted:
            self.save(stood)
            raise
        reports = {i: trainer.step(batches[self.members[i].hook_point]) for i, trainer in self.trainers.items()}
        self.number += 1
        for i, step in reports.items():
            self.histories[i].add(step)
        diverged = self._diverged(reports)
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        self._drop(diverged)
        for i, trainer in self.trainers.items():
            if self.histories[i].due(self.number):
                self.histories[i].end_row(self.number, self.seconds, float(trainer.dead.float().mean()))
        if self.running < len(self.trainers):
            self.conclude(finished)
        elif self.checkpoint is not None and self.checkpoint.due(self.number):
            self.save()
        return reports

    def _diverged(self, reports: Mapping[int, Step]) -> dict[int, str]:
        """Members whose loss is no number, and since when; looked for where nothing has to wait for it."""
        found: dict[int, str] = {}
        numbers = list(reports)
        if self.number % WATCH == 0 or any(self.histories[i].due(self.number) for i in numbers):
            fine = torch.isfinite(torch.stack([self.histories[i].sums for i in numbers])).all(1).tolist()
            found = {i: f"became NaN or infinite by step {self.number}" for i, ok in zip(numbers, fine, strict=True) if not ok}
        if self.device.type == "cpu":
            losses = {i: float(step.loss) for i, step in reports.items()}
            found |= {i: f"became {loss} at step {self.number}" for i, loss in losses.items() if not math.isfinite(loss)}
        return {i: f"the loss {words} of {self.members[i].config.steps}" for i, words in found.items()}

    def conclude(self, finished: Callable[[int, Trained], None] | None = None) -> None:
        """Freeze every member that has made its steps, and hand it over; a checkpoint is written first.

        Raises:
            DiskFailed: the checkpoint cannot be written, and members are left that need it; the one before is kept.
        """
        ended = {i: trainer for i, trainer in self.trainers.items() if self.members[i].config.steps <= self.number}
        if not ended:
            return
        bad = [i for i, trainer in ended.items() if not trainer.finite]
        self._drop({i: f"the last of {self.members[i].config.steps} steps left NaN or infinite weights" for i in bad})
        full: DiskFailed | None = None
        try:
            self.save()
        except DiskFailed as error:  # a dictionary is a third of its checkpoint, or less: it may still fit
            full = error
        for i in ended.keys() - set(bad):
            self.results[i] = self._freeze(i, ended[i])
        self._remove(ended.keys() - set(bad))
        for i in sorted(ended):
            result = self.results[i]
            if finished is not None and isinstance(result, Trained):
                finished(i, result)
        if full is not None and self.trainers:
            raise full

    def _freeze(self, i: int, trainer: Trainer) -> Trained:
        member, history = self.members[i], self.histories[i]
        end = {key: history.rows[-1][key] for key in ("loss", "fvu", "l0", "dead_share")}
        details = {
            **({"name": member.name} if member.name else {}),
            **self.supplies[member.hook_point].details(),
            "end": end,
            "seconds": self.seconds,
            "tokens_per_second": member.config.steps * member.config.batch / max(self.seconds, 1e-9),
            "together": self.size,
        }
        return Trained(trainer.freeze(hook_point=member.hook_point, model=self.model, details=details), history.rows)

    def _drop(self, diverged: Mapping[int, str]) -> None:
        """End members without a dictionary."""
        for i, what in diverged.items():
            config, where = self.members[i].config, f"{self.title(i)} at {self.members[i].hook_point}"
            fix = f"lower lr (now {config.peak_lr:g}), or raise warmup; check the activations for extreme values"
            self.results[i] = TrainingFailed(f"training diverged: {what}", where=where, fix=fix)
        self._remove(diverged)

    def _remove(self, numbers: Collection[int]) -> None:
        for i in numbers:
            del self.trainers[i]
        self._let_go()

    def _let_go(self) -> None:
        """Close the supplies that feed nobody any more."""
        fed = {self.members[i].hook_point for i in self.trainers}
        for hook_point in self._fed - fed:
            self.supplies[hook_point].close()
        self._fed = fed

    def title(self, i: int) -> str:
        """What a member is called in messages."""
        return self.members[i].name or self.members[i].config.architecture
