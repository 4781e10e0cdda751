"""The worker that trains a stage: its rank, where it reports and saves, and from where it resumes."""

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from spice_dist.data import augment
from spice_dist.distributed import checkpoint, collectives, pace, setbacks, trackers
from spice_dist.distributed.checkpoint import Checkpoint, Tensors
from spice_dist.distributed.metric_log import MetricLog
from spice_dist.distributed.pace import Pace
from spice_dist.distributed.setbacks import Setbacks
from spice_dist.errors import Interrupted, NotFinite, UserError, out_of_memory
from spice_dist.task import Task

NOTHING, SAVE, STOP, NOT_FINITE = 0, 1, 2, 3  # the largest wish of any worker is what all do
LOOK_STEPS = 10  # between two looks at whether the loss is finite, for which a GPU is waited for
BETWEEN_FAILURES = 3 * 3600.0  # seconds, before any failure was seen
FIRST_SECONDS, LEAST_SECONDS = 60.0, 10.0  # between checkpoints: before one was written, and at least
Probes = Mapping[str, Callable[[], Tensor]]
NO_METRICS: Mapping[str, Tensor] = {}
NO_PROBES: Probes = {}
OnReport = Callable[[int, int, Tensor, Callable[[], Tensors]], None]
"""Called with (step, total, loss, save) at the end of every report; `save` gives the state at this step."""


@dataclass(frozen=True)
class Storage:
    """How workers use disks; no field changes a result."""

    # between two checkpoints: what a lost node or worker can cost; None: by the time that saving takes, see `interval`
    checkpoint_seconds: float | None = None
    scratch: Path | None = None  # on each node's own disk: where the packed images are copied to and read from
    owner: str = ""  # token of the process that owns the run folder: when it is another's, nothing is saved any more

    def __post_init__(self) -> None:
        if self.checkpoint_seconds is not None and not self.checkpoint_seconds > 0:
            raise UserError(f"--checkpoint-seconds is {self.checkpoint_seconds:g}; it must be above 0, such as 60")


@dataclass(frozen=True)
class StageCall:
    """A stage with its arguments, to be called on every worker; its files are in a folder of its name."""

    name: str
    train: Callable[[Any, Any, Any], None]
    task: Task
    config: Any
    shared: bool = True  # False: one worker does it, on all cores of its node, and the others wait
    has_folder: bool = True  # False: it leaves neither checkpoints nor a record, and is done again if it was cut off

    def run(self, worker: "LocalWorker", threads: int) -> None:
        """Run the stage in this process on `threads` CPU threads, or on all cores if it is not shared.

        Where the loss is not finite, the stage goes back to its last checkpoint: see `setbacks`.

        Raises:
            UserError: the GPU's memory does not suffice.
            NotFinite: the loss is not finite, also with a lower rate.
        """
        before, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
        torch.set_num_threads(threads if self.shared else usable_cores())
        augment.set_compiled(self.task.compile_views)
        torch.backends.cudnn.benchmark = True  # the batches of a stage have the same shapes, whose best kernels pay
        try:
            while not self._tried(worker):
                pass
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.name, error) from error
        finally:
            torch.set_num_threads(before)
            torch.backends.cudnn.benchmark = benchmark

    def _tried(self, worker: "LocalWorker") -> bool:
        """Train; return False if the loss was not finite and another try may succeed."""
        rate = worker.read_setbacks().rate
        config = self.config if rate == 1 else replace(self.config, lr=rate * self.config.lr)
        try:
            self.train(self.task, config, worker)
        except NotFinite as error:
            worker.note_setback(error, hasattr(config, "lr"))
            return False
        return True


def usable_cores() -> int:
    """Return the cores that this process may run on: a SLURM share or a container has fewer than its machine."""
    return len(os.sched_getaffinity(0))


@runtime_checkable
class Worker(Protocol):
    """One training process. Every worker of a stage calls the same methods in the same order."""

    rank: int
    world: int
    device: torch.device
    run: Path
    scratch: Path | None  # where the packed images are copied to first, on this node's own disk
    progress: Callable[[int, int, float | None], None]  # gets (done, total, loss); only the first worker's is shown

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module, which averages gradients over workers in its backward pass if there are several."""
        ...

    def resume(self) -> Checkpoint | None:
        """Return the stage's newest valid checkpoint, the same on every worker; None to start from the beginning."""
        ...

    def leaves_out(self, step: int) -> bool:
        """Tell whether step `step` + 1 is to be left out, because its loss was not finite before."""
        ...

    def report(
        self,
        step: int,
        total: int,
        loss: Tensor,
        save: Callable[[], Tensors],
        metrics: Mapping[str, Tensor] = NO_METRICS,
        probes: Probes = NO_PROBES,
        every: int = 10,
    ) -> None:
        """Report that `step` of `total` steps are done; may save.

        Loss and metrics are averaged over steps; `probes`, which cost more, are computed only where a line is written.

        Args:
            save: gives the state at this step, for a checkpoint.
            every: on a GPU, steps from one chance to save or stop to the next: each waits for the device.

        Raises:
            Interrupted: the worker was asked to stop, and has saved.
            NotFinite: the loss of a step since the last chance to save is not finite, on any worker.
            UserError: the last state cannot be saved.
        """
        ...


class LocalWorker:
    """A worker without Ray, the only one; in subclasses `wrap` averages gradients over a process group."""

    def __init__(
        self,
        run: Path,
        stage: str,
        device: torch.device,
        stop_requested: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int, float | None], None] = lambda step, total, loss: None,
        storage: Storage = Storage(),  # noqa: B008  immutable
        on_report: OnReport = lambda step, total, loss, save: None,
    ):
        """Take `progress`, which gets (step, total, loss) at most twice a second, on the first worker only."""
        self.rank, self.world = collectives.rank(), collectives.world()
        self.run, self.stage, self.device = run, stage, device
        self.stop_requested, self.progress, self.on_report = stop_requested, progress, on_report
        self.checkpoint_seconds, self.scratch = storage.checkpoint_seconds, storage.scratch
        self.folder, self.store = run / stage, run / stage / "checkpoints"
        self.log: MetricLog | None = None
        self.history, self.pace = History(), Pace()
        self.writer = checkpoint.Writer(self.store, storage.owner)
        self.setbacks, self.can_leave_out = Setbacks(), False
        self.started_at = self.saved_at = self.shown_at = time.monotonic()
        self.sums: dict[str, Tensor] = {}
        self.summed = 0
        self.first_bad = torch.tensor(torch.inf, device=device)  # step whose loss is not finite

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def resume(self) -> Checkpoint | None:
        saved = None
        # not the first call after a loss that was not finite
        self.sums, self.summed, self.first_bad = {}, 0, torch.full_like(self.first_bad, torch.inf)
        self.started_at = self.saved_at = time.monotonic()
        self.pace = Pace()
        if self.log:
            self.log.close()
        if self.rank == 0:
            self.writer.wait()
            checkpoint.sweep(self.store)
            saved = checkpoint.newest(self.store)
        step = collectives.broadcast_int(-1 if saved is None else saved.step, self.device)
        if step >= 0 and saved is None:
            saved = checkpoint.load(self.store / f"{step:09d}")
        if saved is not None:
            self.history = History.of(saved.state).resumed()
        if self.rank == 0:
            opened = trackers.open_trackers(trackers.requested(), self.run, self.stage)
            self.log = MetricLog(self.folder, max(step, 0), opened)
        return saved

    def report(
        self,
        step: int,
        total: int,
        loss: Tensor,
        save: Callable[[], Tensors],
        metrics: Mapping[str, Tensor] = NO_METRICS,
        probes: Probes = NO_PROBES,
        every: int = 10,
    ) -> None:
        # summed on the device: reading a number each step would stall it
        for name, value in {"loss": loss, **metrics}.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach().clone()
        self.summed += 1
        self.first_bad = torch.where(torch.isfinite(loss.detach()), self.first_bad, self.first_bad.clamp(max=step))
        self._show(step, total, loss)
        if step % max(1, total // 100) == 0 or step == total:
            self._write_means(step, probes)
        if self.device.type == "cpu" or step % every == 0 or step == total:
            self._save_or_stop(step, total, save)
        self.on_report(step, total, loss, save)

    def _show(self, step: int, total: int, loss: Tensor) -> None:
        if self.rank == 0 and (time.monotonic() - self.shown_at > 0.5 or step == total):
            self.shown_at = time.monotonic()
            self.progress(step, total, float(loss))

    def _write_means(self, step: int, probes: Probes) -> None:
        values = {name: value.float() / self.summed for name, value in self.sums.items()}
        values |= {name: probe().float() for name, probe in probes.items()}
        names = sorted(values)
        means = collectives.mean(torch.stack([values[name] for name in names]))
        if self.log:
            self.log.write(step, dict(zip(names, means.tolist(), strict=True)))
        self.sums, self.summed = {}, 0
        self._name_slowest()

    def _name_slowest(self) -> None:
        """Say once a stage which worker the others wait for."""
        passed = self.pace.passed()
        # by the first worker's clock
        if self.world == 1 or not collectives.broadcast_int(int(passed > pace.SECONDS), self.device):
            return
        worked = torch.tensor([self.pace.worked()], device=self.device)
        shares = (collectives.all_gather(worked) / passed).tolist()
        slowest = self.pace.slowest(shares)
        if slowest is None:
            return
        hosts = collectives.all_gather(pace.host_name().to(self.device)).cpu().numpy()
        if self.rank == 0:
            host = hosts[slowest].tobytes().rstrip(b"\0").decode(errors="replace")
            print(
                f"worker {slowest} on {host} is the slowest in {self.stage}: it works for {shares[slowest]:.0%} of a "
                f"step, the {self.world} workers for {sum(shares) / self.world:.0%} on average; the others wait",
                file=sys.stderr,
            )

    def leaves_out(self, step: int) -> bool:
        self.can_leave_out = True
        return step + 1 == self.setbacks.left_out

    def read_setbacks(self) -> Setbacks:
        """Read the stage's setbacks, the same on every worker."""
        found = setbacks.read(self.folder) if self.rank == 0 else Setbacks()
        self.setbacks = Setbacks(*(collectives.broadcast_int(n, self.device) for n in (found.count, found.left_out)))
        return self.setbacks

    def note_setback(self, error: NotFinite, has_rate: bool) -> None:
        """Write down that the loss was not finite; raise the error if nothing is left to try."""
        self.setbacks = self.setbacks.after(error.step, self.can_leave_out and error.step < error.total)
        last = self.setbacks.count >= setbacks.MOST or not has_rate
        if self.rank == 0:
            setbacks.write(self.folder, self.setbacks)
        collectives.barrier()
        if last:
            raise error
        if self.rank == 0:
            how = f"with {setbacks.LOWERED:g} times its rate" if self.setbacks.count > 1 else "without that step"
            print(f"{error}: it goes back to its last checkpoint, and on {how}", file=sys.stderr)

    def _save_or_stop(self, step: int, total: int, save: Callable[[], Tensors]) -> None:
        if self.rank == 0 and not self.writer.busy and (error := self.writer.wait()):
            warnings.warn(f"no checkpoint at step {self.writer.step} ({error}); training goes on", stacklevel=2)
        wish = STOP if self.stop_requested() else SAVE if self._is_due() else NOTHING
        looks = wish != NOTHING or step % LOOK_STEPS == 0 or step == total or self.device.type == "cpu"
        if looks and torch.isfinite(self.first_bad):  # nothing can go on from such a state
            wish = NOT_FINITE
        decision = collectives.largest_int(wish, self.device)  # all workers save and stop at the same step
        if decision == NOT_FINITE:
            self._raise_not_finite(total)
        if decision == NOTHING and step < total:
            return
        waits = step == total or decision == STOP
        if self.rank == 0:
            self.saved_at = time.monotonic()
            self._save(step, total, save, waits)
        if not waits:
            return
        error = self.writer.wait() if self.rank == 0 else None
        outcome = NOT_FINITE if isinstance(error, ValueError) else SAVE if error else NOTHING
        outcome = collectives.largest_int(outcome, self.device)  # all workers wait for it
        if self.log:
            self.log.close()
        if outcome == NOT_FINITE:
            raise NotFinite(f"the weights of {self.stage} are no numbers at step {step}", step, total)
        if isinstance(error, UserError):
            raise error
        if outcome:
            why = error or "the first worker says why"
            raise UserError(f"cannot save {self.store}: {why}; make room, then run the same command again")
        if step < total:
            raise Interrupted

    def _raise_not_finite(self, total: int) -> NoReturn:
        """Raise NotFinite, with the first such step of any worker, on all of them."""
        step = int(self.first_bad) if torch.isfinite(self.first_bad) else total
        step = total - collectives.largest_int(total - step, self.device)
        raise NotFinite(f"the loss of {self.stage} is not finite at step {step}", step, total)

    def _is_due(self) -> bool:
        """Tell whether it is time for a checkpoint; the first worker, which writes it, decides."""
        if self.rank != 0 or self.writer.busy:
            return False
        seconds = self.checkpoint_seconds
        if seconds is None:
            seconds = interval(self.writer.seconds, self.history.between_failures(self._trained()))
        return time.monotonic() - self.saved_at > seconds

    def _trained(self) -> float:
        return time.monotonic() - self.started_at

    def _save(self, step: int, total: int, save: Callable[[], Tensors], waits: bool) -> None:
        """Begin to write a checkpoint."""
        state = {"total": total, **asdict(self.history.after(self._trained(), stopped=waits))}
        self.writer.start(step, save(), state)


@dataclass(frozen=True)
class History:
    """How long a stage has trained before this call, and how often it was cut off."""

    seconds: float = 0.0
    failures: int = 0
    stopped: bool = True  # as asked, or by its end

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "History":
        """Return what a checkpoint tells; those of earlier versions tell nothing."""
        return cls(**{field.name: state[field.name] for field in fields(cls) if field.name in state})

    def resumed(self) -> "History":
        return replace(self, failures=self.failures + (not self.stopped))

    def after(self, seconds: float, stopped: bool) -> "History":
        return History(round(self.seconds + seconds, 3), self.failures, stopped)

    def between_failures(self, seconds: float) -> float:
        """Estimate the seconds between failures: as if there had been one in BETWEEN_FAILURES before the stage."""
        return (BETWEEN_FAILURES + self.seconds + seconds) / (1 + self.failures)


def interval(saving: float | None, between_failures: float) -> float:
    """Return the seconds between checkpoints that lose least, by Young 1974: sqrt(2 x saving x between failures).

    Args:
        saving: seconds that the last checkpoint took; None: FIRST_SECONDS is returned.
    """
    return FIRST_SECONDS if saving is None else max(LEAST_SECONDS, math.sqrt(2 * saving * between_failures))


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager:
    """Add up gradients locally in all backward passes of a step but the last, which averages them over workers."""
    no_sync = getattr(module, "no_sync", None)
    return nullcontext() if last or no_sync is None else no_sync()
