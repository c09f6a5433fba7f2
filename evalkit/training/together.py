"""Many dictionaries from one pass: every batch is read once and stepped through all members.

1. Members at one hook point share its supply; supplies of several hook points may share one pass of the language model
   (``stream.Chunks``). Members with the same ``normalise`` share scale, centre and variance, from one sample of the data.
2. An ``Ensemble`` steps them: same-shape ones at once where that is wanted, the others one after the other.
3. A member whose loss is no longer a number is dropped with its message; the others go on as if it had never been there.
4. A member that has made its steps is frozen and handed over at once.
5. With a ``Checkpoint``, the state of all is saved together now and then, and the run goes on from there after a kill.

Stepped one after the other, each member has bit for bit the weights it has alone (``loop.train``) on the CPU.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from evalkit.errors import EvalkitError, SuiteError
from evalkit.progress import Progress
from evalkit.training.checkpoint import Checkpoint
from evalkit.training.config import TrainConfig, TrainingFailed
from evalkit.training.ensemble import Ensemble
from evalkit.training.loop import WORDS_S, History, Observer, Trained, check_end, failed
from evalkit.training.supply import DataExhausted, Supply
from evalkit.training.trainer import SAMPLE, Beginning, Group, Step, Trainer, begin


class Member(NamedTuple):
    """One dictionary to train."""

    name: str
    config: TrainConfig
    hook_point: str
    observe: Observer | None = None
    """Is given each row of the history."""


Result = Trained | EvalkitError
"""What became of a member: the finished dictionary, or why there is none."""


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
    """A run of several members as it stands.

    Args:
        members: what is trained; all of one batch size.
        supplies: by hook point, of that batch size.
        model: identity of the language model.
        checkpoint: where the state of all is kept; nowhere when left out.
        device: where it is trained.
        group: other processes that take their share of every batch; ``supplies`` give this process's share.
        batched: step same-shape members at once; None where the device gains by it.
        saved: what a checkpoint held, to go on from.

    Raises:
        SuiteError: members of different batch sizes, or a batch that cannot be shared out evenly.
    """

    def __init__(
        self,
        members: Sequence[Member],
        supplies: Mapping[str, Supply],
        *,
        model: str,
        checkpoint: Checkpoint | None = None,
        device: str | torch.device = "cpu",
        group: Group | None = None,
        batched: bool | None = None,
        saved: Any = None,
    ) -> None:
        self.members, self.supplies, self.model = list(members), dict(supplies), model
        self.checkpoint, self.group = checkpoint, group
        self.batch = one_batch(self.members, 1 if group is None else group.size)
        if checkpoint is not None:
            _one_length(self.members)
        self.histories = [History(m.config.steps, m.config.batch, m.observe) for m in self.members]
        self.results: dict[int, Result] = {}
        self.number = 0
        """Steps made."""
        trainers = self._begin(device)
        self._numbers = sorted(trainers)
        on = torch.device(device).type != "cpu" if batched is None else batched
        self.ensemble = Ensemble(
            [trainers[i] for i in self._numbers], [self.members[i].hook_point for i in self._numbers], batched=on
        )
        if saved is not None:
            self._go_on(saved)

    def _begin(self, device: str | torch.device) -> dict[int, Trainer]:
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
                trainers[i] = Trainer(config, beginning_of(config, found), device, self.group)
            except EvalkitError as error:
                self.results[i] = error
        return trainers

    def _go_on(self, saved: Any) -> None:
        self.number = int(saved["number"])
        states = {int(i): state for i, state in saved["states"].items()}
        self.ensemble.load_state({place: states[i] for place, i in enumerate(self._numbers) if i in states})
        for place, trainer in self.ensemble.trainers.items():
            i = self._numbers[place]
            trainer.start.generator.set_state(saved["generators"][str(i)])
            self.histories[i].load_state(saved["histories"][str(i)], trainer.device)
        for i, (what, where, fix) in saved["failed"].items():
            self.results.setdefault(int(i), TrainingFailed(what, where=where, fix=fix))
        for hook_point, supply in self.supplies.items():
            supply.load_state(saved["supplies"][hook_point])

    def save(self) -> None:
        """Write a checkpoint of all members that are still trained."""
        if self.checkpoint is None:
            return
        running = {self._numbers[place]: trainer for place, trainer in self.ensemble.trainers.items()}
        if not all(trainer.finite for trainer in running.values()):
            return  # the last one with finite weights is kept
        errors = {i: result for i, result in self.results.items() if isinstance(result, EvalkitError)}
        state = {
            "number": self.number,
            "states": {str(i): trainer.state() for i, trainer in running.items()},
            "generators": {str(i): trainer.start.generator.get_state() for i, trainer in running.items()},
            "histories": {str(i): self.histories[i].state() for i in running},
            "supplies": {hook_point: supply.state() for hook_point, supply in self.supplies.items()},
            "failed": {str(i): [error.what, error.where, error.fix] for i, error in errors.items()},
        }
        self.checkpoint.save(about(self.members, self.supplies, self.model), state)

    @property
    def running(self) -> int:
        """Members that are still trained."""
        return len(self.ensemble.trainers)

    def step(self, finished: Callable[[int, Trained], None] | None = None) -> dict[int, Step]:
        """One batch through every member that is still trained; what each reported, by member.

        Args:
            finished: is given each member that made its last step, as it does.
        """
        used = {self.ensemble.hook_points[place] for place in self.ensemble.trainers}
        try:
            batches = {hook_point: self.supplies[hook_point].next() for hook_point in sorted(used)}
        except DataExhausted:
            self.save()
            raise
        reports = {self._numbers[place]: step for place, step in self.ensemble.step(batches).items()}
        self.number += 1
        losses = torch.stack([step.loss.double() for step in reports.values()]).tolist()
        gone, ended = [], []
        for (i, step), loss in zip(reports.items(), losses, strict=True):
            trainer, config = self.ensemble.trainers[self._numbers.index(i)], self.members[i].config
            if not math.isfinite(loss):
                what = f"the loss became {loss} at step {self.number} of {config.steps}"
                self.results[i] = failed(what, config, self._where(i))
                gone.append(i)
                continue
            self.histories[i].add(self.number, step, trainer)
            if self.number == config.steps:
                self.results[i] = result = self._finish(i, trainer)
                gone.append(i)
                ended += [(i, result)] if isinstance(result, Trained) else []
        self.ensemble.remove([self._numbers.index(i) for i in gone])
        if finished is not None:
            for i, trained in ended:
                finished(i, trained)
        if self.checkpoint is not None and self.running and self.checkpoint.due(self.number):
            self.save()
        return reports

    def _where(self, i: int) -> str:
        member = self.members[i]
        return f"{member.name or member.config.architecture} at {member.hook_point}"

    def _finish(self, i: int, trainer: Trainer) -> Result:
        try:
            check_end(trainer, self._where(i))
        except EvalkitError as error:
            return error
        member, history = self.members[i], self.histories[i]
        end = {key: history.rows[-1][key] for key in ("loss", "fvu", "l0", "dead_share")}
        speed = member.config.steps * member.config.batch / max(history.seconds, 1e-9)
        details = {
            **({"name": member.name} if member.name else {}),
            **self.supplies[member.hook_point].details(), "end": end, "seconds": history.seconds, "tokens_per_second": speed,
            "together": len(self.members),
        }  # fmt: skip
        return Trained(trainer.freeze(hook_point=member.hook_point, model=self.model, details=details), history.rows)


def about(members: Sequence[Member], supplies: Mapping[str, Supply], model: str) -> dict[str, Any]:
    """What a run is: a checkpoint of another one is refused."""
    return {
        "model": model,
        "data": {hook_point: supply.identity for hook_point, supply in supplies.items()},
        "members": [{"hook_point": m.hook_point, **dataclasses.asdict(m.config)} for m in members],
    }


def one_batch(members: Sequence[Member], processes: int = 1) -> int:
    """The batch size of all members.

    Raises:
        SuiteError: they have several, or it cannot be shared out evenly.
    """
    sizes = sorted({member.config.batch for member in members})
    if len(sizes) != 1:
        raise SuiteError(
            f"one pass gives batches of one size, and these members want {', '.join(map(str, sizes)) or 'none'}",
            where="batch",
            fix="train members of each batch size by themselves",
        )
    if sizes[0] % processes:
        raise SuiteError(
            f"a batch of {sizes[0]} cannot be shared out evenly among {processes} processes",
            where="batch",
            fix=f"choose a multiple of {processes}",
        )
    return sizes[0]


def _one_length(members: Sequence[Member]) -> None:
    if len({member.config.steps for member in members}) != 1:
        raise SuiteError(
            "a checkpoint holds members that end at the same step, and these have different tokens",
            where="tokens",
            fix="train members of each length by themselves",
        )


def carry_out(run: Together, progress: Progress, finished: Callable[[int, Trained], None] | None) -> list[Result]:
    """All steps that are left, shown as one stage; a result for each member."""
    title = f"training {len(run.members)} dictionaries together" if len(run.members) > 1 else f"training {run.members[0].name}"
    steps = max(member.config.steps for member in run.members)
    if run.number:
        progress.say(f"{title}: going on at step {run.number} of {steps}")
    for note in sorted({supply.note(steps * run.batch) for supply in run.supplies.values()} - {""}):
        progress.say(f"{title}: {note}")
    with progress.stage(title, steps * run.batch, "tokens") as stage:
        stage.advance(run.number * run.batch)
        spoken = 0.0
        while run.running:
            reports = run.step(finished)
            words = ""
            if time.monotonic() - spoken > WORDS_S:
                spoken = time.monotonic()
                values = [float(step.fvu) for step in reports.values()]
                lost = sum(isinstance(result, EvalkitError) for result in run.results.values())
                words = f"FVU {min(values):.3f} to {max(values):.3f}" + (f", {lost} failed" if lost else "")
            stage.advance(run.batch, words)
    return [run.results[i] for i in range(len(run.members))]


def train_together(
    members: Sequence[Member],
    supplies: Mapping[str, Supply],
    *,
    model: str,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    device: str | torch.device = "cpu",
    batched: bool | None = None,
    finished: Callable[[int, Trained], None] | None = None,
) -> list[Result]:
    """Train several dictionaries on one pass over the data.

    Args:
        members: what is trained; all of one batch size.
        supplies: batches by hook point; closed at the end.
        model: identity of the language model.
        progress: where the stage is shown.
        checkpoint: where the state of all is kept now and then. It is left there at the end: discard it once what was finished
            is safe.
        device: where the steps are computed.
        batched: step same-shape members at once; None where the device gains by it.
        finished: is given the number and the result of each member as it ends well.

    Returns:
        A result for each member, in order: the dictionary with its history, or the error that ended it.

    Raises:
        SuiteError: members of different batch sizes; with a checkpoint, of different lengths.
        DataExhausted: the data may not be repeated and gave out.
        CheckpointError: the checkpoint is damaged or of another run.
        DiskFailed: a checkpoint could not be written.
    """
    try:
        saved = checkpoint.load(about(members, supplies, model)) if checkpoint is not None else None
        run = Together(members, supplies, model=model, checkpoint=checkpoint, device=device, batched=batched, saved=saved)
        return carry_out(run, progress, finished)
    finally:
        for supply in supplies.values():
            supply.close()
