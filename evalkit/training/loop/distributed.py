"""Several processes that train together, each on its rows of every batch (data parallel, ``torch.distributed``).

1. ``torchrun --nproc-per-node 2 -m evalkit train SUITE``: the first process does everything that it does alone; the others
   ``follow``: they wait for something to train, help, and wait again. They read no data and write nothing.
2. For each run the first process sends out the members' settings, the sample behind scale, centre and variance, and, where a
   checkpoint is gone on from, the state. So all begin with the same weights.
3. Each step: the first process reads the batch and scatters it in equal parts; every process goes forward and backward on its
   part; gradients, losses and running buffers are averaged, features that fired anywhere have fired. As the parts are equal,
   means over them average to the mean over the batch, and all processes take the same step.
4. What is not a mean over tokens is asked of all processes (``reductions``): BatchTopK's choice of the k * B largest, variances,
   the auxiliary loss's denominator, the squared distance from a target L0. So every architecture in every setting takes the
   steps of one process on the whole batch, up to float32 rounding.
5. The first process may take its time between steps: to capture activations, to write a checkpoint, to publish. A thread of it
   tells the others every now and then that it is alive (``_Line``), so that they wait as long as that takes.
6. A process that dies closes its connections, and one that hangs runs into the time-out: the others end with one clear message.

gloo on the CPU, nccl between GPUs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float

from evalkit.errors import DictionaryError, EvalkitError, SuiteError, UsageError
from evalkit.training.data.batches import DataExhausted, Supply
from evalkit.training.loop.checkpoint import Checkpoint
from evalkit.training.loop.members import Member, Result, Trained, load, one_batch
from evalkit.training.loop.together import Together
from evalkit.training.loop.train import carry_out
from evalkit.training.settings.config import TrainConfig
from evalkit.util.progress import Progress

STEP_S = 300.0
"""Longest wait within a step, and for a sign of life of the first process between steps."""
SIGN_S = 30.0
"""Seconds between signs of life at most."""
SIGNS = 10
"""Signs of life within the longest wait at least: one that comes late is no reason to give up."""
IDLE = timedelta(days=7)
"""Longest wait for something to train: the first process may evaluate for long."""
ALIVE, END = -1, -2
"""What the first process says while it is busy, and when a run is over."""


class ProcessLost(EvalkitError):
    """Another process of a distributed run died or hangs."""

    exit_code = 4


class ProcessGroup:
    """The processes that were started together: the ``Group`` of a ``Trainer``.

    Args:
        rank: this process, 0 for the first.
        size: how many there are.
        device: where this process computes.
        jobs: the connection on which the others wait for something to train.
        line: the connection on which they hear, during a run, what follows.
        timeout_s: longest wait for a process that should answer, seconds.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, jobs: dist.ProcessGroup, line: dist.ProcessGroup, timeout_s: float
    ) -> None:
        self.rank, self.size, self.device, self._jobs, self._line, self.timeout_s = rank, size, device, jobs, line, timeout_s
        self.lost = False
        """Whether another process went away: nothing is sent any more."""

    def leave(self) -> None:
        """Close the connections, their threads included.

        A thread of gloo ends with the last reference to its connection. One that still lets go of the last message's tensors
        while the interpreter shuts down aborts the process, so no reference may be left to chance.
        """
        del self._jobs, self._line
        dist.destroy_process_group()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Turn what torch raises about the other processes into one clear error."""
        try:
            yield
        except RuntimeError as error:  # torch has no narrower class for a connection that gloo lost
            self.lost = True
            raise ProcessLost(
                f"another process of this training went away or hangs: {str(error).splitlines()[0]}",
                where=f"process {self.rank}",
                fix="look at the other processes' messages, then run the same command again: it goes on from the last checkpoint",
            ) from error

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        whole = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
        with self._listening():
            waiting = [dist.all_reduce(tensor, async_op=True) for tensor in whole]
            for work in waiting:
                work.wait()
        for tensor, summed in zip(tensors, whole, strict=True):
            if summed is not tensor:
                tensor.copy_(summed)
            tensor.div_(self.size)

    def any(self, flags: torch.Tensor) -> torch.Tensor:
        """Where a flag is set in any process."""
        number = flags.to(torch.uint8)
        with self._listening():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return number.bool()

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every process's tensor, all of one shape."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self._listening():
            dist.all_gather(parts, tensor.contiguous())
        return parts

    def send(self, job: Any) -> Any:
        """From the first process to all: anything that can be pickled. The others call it to receive."""
        box = [job]
        with self._listening():
            dist.broadcast_object_list(box, src=0, group=self._jobs)
        return box[0]

    def say(self, number: int) -> int:
        """A number from the first process to all; the others call it to hear, for ``timeout_s`` at most."""
        said = torch.tensor([number])
        with self._listening():
            dist.broadcast(said, src=0, group=self._line)
        return int(said)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first process's tensor, in place."""
        with self._listening():
            dist.broadcast(tensor, src=0)
        return tensor

    def scatter(self, out: torch.Tensor, parts: list[torch.Tensor] | None) -> torch.Tensor:
        """One of the first process's ``parts`` to each process, into ``out``."""
        with self._listening():
            dist.scatter(out, parts, src=0)
        return out


_current: ProcessGroup | None = None


def current() -> ProcessGroup | None:
    """The group that this process joined; None where it works alone."""
    return _current


def join(timeout_s: float = STEP_S) -> ProcessGroup:
    """Meet the other processes that torchrun started.

    Raises:
        UsageError: torchrun's variables are missing.
        ProcessLost: the others do not come.
    """
    global _current
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise UsageError(
            "this process was not started by torchrun", where="RANK, WORLD_SIZE", fix="torchrun --nproc-per-node 2 -m evalkit ..."
        ) from error
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
        jobs = dist.new_group(backend="gloo", timeout=IDLE)
        line = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:  # torch's own classes for this are its subclasses
        raise ProcessLost(
            f"the processes did not find each other: {str(error).splitlines()[0]}",
            where=f"process {rank} of {size}",
            fix="start all of them with one torchrun command",
        ) from error
    _current = ProcessGroup(rank, size, device, jobs, line, timeout_s)
    return _current


def command(main: Callable[[], int], timeout_s: float = STEP_S, *, prepare: Callable[[], None] = lambda: None) -> int:
    """Run a command in the first process while the others follow; its exit code.

    Args:
        main: the command.
        timeout_s: longest wait for a process that should answer, seconds.
        prepare: what the others do before they follow, such as importing the user's own architectures.

    Raises:
        ProcessLost: in a process that follows, where another one died or hangs.
        EvalkitError: of ``prepare``, where there was something to train after all.
    """
    global _current
    group = join(timeout_s)
    try:
        if group.rank:
            unready: EvalkitError | None = None
            try:
                prepare()
            except EvalkitError as error:  # the first process, which mostly has the same trouble, says it
                unready = error
            follow(group, unready)
            return 0
        return main()
    finally:
        _current = None
        if not group.lost:  # connections to a process that hangs would make this one wait for it
            if not group.rank:
                group.send(None)
            group.leave()


class Job(NamedTuple):
    """What the other processes receive of a run."""

    members: list[tuple[str, TrainConfig, str, None, str]]
    """Each one's parts; it is observed in the first process."""
    widths: dict[str, int]
    """Width D at each hook point."""
    model: str
    state: Any
    """What was loaded from the checkpoint, if anything."""


class _Line:
    """How the first process says, during one run, what follows: a number of rows, 0 where there are none, or ``END``.

    Its thread says ``ALIVE`` several times within the others' patience.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.ended = group, False
        self._turn, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="evalkit alive", daemon=True)
        if group.rank == 0:
            self._thread.start()

    def _live(self) -> None:
        while not self._closing.wait(min(SIGN_S, self.group.timeout_s / SIGNS)):
            with self._turn, suppress(ProcessLost):  # the next thing that is sent says so
                if self._closing.is_set() or self.group.lost:
                    return
                self.group.say(ALIVE)

    def say(self, number: int) -> None:
        """Rows that follow."""
        with self._turn:
            self.group.say(number)

    def hear(self) -> int:
        """Rows that follow, or ``END``."""
        if self.ended:
            return END
        while (number := self.group.say(ALIVE)) == ALIVE:
            pass
        self.ended = number == END
        return number

    def close(self) -> None:
        """The end of the run, in every process: the others listen until they hear it."""
        if self.group.rank == 0:
            self._closing.set()
            self._thread.join()
            if not self.group.lost:
                self.say(END)
        while self.group.rank and not self.ended:
            self.hear()


class _Feed(Supply):
    """A supply of which every process gets its part; ``source`` is there in the first process only."""

    def __init__(self, line: _Line, batch: int, width: int, source: Supply | None) -> None:
        super().__init__(batch, source.seed if source else 0, source.repeat if source else True)
        self.line, self.group, self.source, self.width = line, line.group, source, width

    @property
    def identity(self) -> str:
        return self.source.identity if self.source else ""

    @property
    def vectors(self) -> int:
        return self.source.vectors if self.source else 0

    def sample(self, rows: int, seed: int) -> Float[torch.Tensor, "N D"]:
        if self.source is None:
            number = self.line.hear()
            if number <= 0:
                raise DictionaryError("the first process could not read its data")
            return self.group.broadcast(torch.empty(number, self.width, device=self.group.device)).cpu()
        try:
            drawn = self.source.sample(rows, seed)
        except EvalkitError:
            self.line.say(0)
            raise
        self.line.say(len(drawn))
        self.group.broadcast(drawn.to(self.group.device, torch.float32).contiguous())
        return drawn

    def next(self) -> Float[torch.Tensor, "B D"]:
        """This process's rows of the next batch."""
        rows = self.batch // self.group.size
        out = torch.empty(rows, self.width, device=self.group.device)
        if self.source is None:
            if self.line.hear() == END:
                raise DataExhausted("the first process ended this run")
            return self.group.scatter(out, None)
        x = self.source.next().to(self.group.device, torch.float32)
        self.line.say(self.batch)
        return self.group.scatter(out, [part.contiguous() for part in x.split(rows)])

    def state(self) -> dict[str, Any]:
        return self.source.state() if self.source else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.source:
            self.source.load_state(state)

    def details(self) -> dict[str, Any]:
        return {**(self.source.details() if self.source else {}), "processes": self.group.size}

    def note(self, wanted: int) -> str:
        return self.source.note(wanted) if self.source else ""

    def close(self) -> None:
        if self.source:
            self.source.close()


def lead(
    group: ProcessGroup,
    members: Sequence[Member],
    supplies: Mapping[str, Supply],
    widths: Mapping[str, int],
    *,
    model: str,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    finished: Callable[[int, Trained], None] | None = None,
) -> list[Result]:
    """``loop.train_together`` with the help of the processes that ``follow``; called in the first one.

    Args:
        widths: width D at each hook point.

    Raises:
        ProcessLost: another process died or hangs.
        SuiteError, DataExhausted, CheckpointError, DiskFailed: as ``train_together``.
    """
    line: _Line | None = None
    try:
        batch = one_batch(members, group.size)
        saved = load(checkpoint, members, supplies, model)
        members_sent = [(m.name, m.config, m.hook_point, None, m.key) for m in members]
        group.send(Job(members_sent, dict(widths), model, saved))
        line = _Line(group)
        feeds = {hook_point: _Feed(line, batch, widths[hook_point], source) for hook_point, source in supplies.items()}
        run = Together(members, feeds, model=model, checkpoint=checkpoint, device=group.device, group=group, saved=saved)
        return carry_out(run, progress, finished)
    finally:
        if line is not None:
            with suppress(ProcessLost):
                line.close()
        for supply in supplies.values():
            supply.close()


def follow(group: ProcessGroup, unready: EvalkitError | None = None) -> None:
    """Help with everything the first process trains, until it is done.

    Args:
        unready: why this process cannot help; None where it can.

    Raises:
        ProcessLost: another process died or hangs.
        EvalkitError: ``unready``, as soon as there is something to train.
    """
    while (job := group.send(None)) is not None:
        if unready is not None:
            raise unready
        line = _Line(group)
        with suppress(DataExhausted, SuiteError):  # said by the first process
            _help(group, line, job)
        line.close()


def _help(group: ProcessGroup, line: _Line, job: Job) -> None:
    members = [Member(*fields) for fields in job.members]
    batch = members[0].config.batch
    feeds = {hook_point: _Feed(line, batch, width, None) for hook_point, width in job.widths.items()}
    run = Together(members, feeds, model=job.model, device=group.device, group=group, saved=job.state)
    while run.running:
        run.step()
