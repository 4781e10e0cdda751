"""How a method meets the world: who it is among its peers, where it reports and saves, from where it resumes."""

import json
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from spice_dist.distributed import checkpoint, collectives
from spice_dist.distributed.checkpoint import Checkpoint, Tensors
from spice_dist.errors import Interrupted, UserError

NOTHING, SAVE, STOP = 0, 1, 2


@runtime_checkable
class Worker(Protocol):
    """One training process. Every worker of a stage calls the same methods in the same order."""

    rank: int
    world: int
    device: torch.device
    run: Path
    progress: Callable[[int, int, float | None], None]  # told (done, total, loss); only the first worker's is shown

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, averaging gradients over workers in its backward pass if there are several."""
        ...

    def resume(self) -> Checkpoint | None:
        """The newest valid checkpoint of this stage, the same on every worker; None to start from the beginning."""
        ...

    def report(self, step: int, total: int, metrics: dict[str, Tensor], save: Callable[[], Tensors]) -> None:
        """Tell that `step` of `total` optimizer steps are done; may save, and raises Interrupted when asked to stop."""
        ...


class LocalWorker:
    """The only worker: trains in this process, without Ray."""

    rank = 0
    world = 1
    checkpoint_seconds = 60.0  # between two checkpoints; a function of the clock, so it must not change results

    def __init__(
        self,
        run: Path,
        stage: str,
        device: torch.device,
        stop_requested: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int, float | None], None] = lambda step, total, loss: None,
    ):
        """`progress` gets (step, total, loss) at most twice a second, on the first worker only."""
        self.run, self.stage, self.device = run, stage, device
        self.stop_requested, self.progress = stop_requested, progress
        self.folder = run / stage
        self.log: MetricLog | None = None
        self.saved_at = self.shown_at = time.monotonic()
        self.sums: dict[str, Tensor] = {}
        self.summed = 0

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def resume(self) -> Checkpoint | None:
        found = checkpoint.newest(self.folder / "checkpoints") if self.rank == 0 else None
        step = collectives.broadcast_int(-1 if found is None else found.step, self.device)
        if step >= 0 and found is None:
            found = checkpoint.load(self.folder / "checkpoints" / f"{step:09d}")
        if self.rank == 0:
            self.log = MetricLog(self.folder, max(step, 0))
        return found

    def report(self, step: int, total: int, metrics: dict[str, Tensor], save: Callable[[], Tensors]) -> None:
        for name, value in metrics.items():  # summed on the device: reading a number each step would stall it
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach().clone()
        self.summed += 1
        self._show(step, total, metrics)
        if step % max(1, total // 100) == 0 or step == total:
            self._write_means(step)
        if self.device.type == "cpu" or step % 10 == 0 or step == total:
            self._save_or_stop(step, total, save)

    def _show(self, step: int, total: int, metrics: dict[str, Tensor]) -> None:
        if self.rank == 0 and (time.monotonic() - self.shown_at > 0.5 or step == total):
            self.shown_at = time.monotonic()
            self.progress(step, total, float(metrics["loss"]))

    def _write_means(self, step: int) -> None:
        names = sorted(self.sums)
        means = collectives.mean(torch.stack([self.sums[name].float() for name in names]) / self.summed)
        if self.log:
            self.log.write(step, dict(zip(names, means.tolist(), strict=True)))
        self.sums, self.summed = {}, 0

    def _save_or_stop(self, step: int, total: int, save: Callable[[], Tensors]) -> None:
        due = time.monotonic() - self.saved_at > self.checkpoint_seconds
        wish = STOP if self.stop_requested() else SAVE if due else NOTHING
        decision = collectives.largest_int(wish, self.device)  # all workers save and stop at the same step
        if decision == NOTHING and step < total:
            return
        if self.rank == 0:
            self._save(step, total, save)
        self.saved_at = time.monotonic()
        collectives.barrier()
        if decision == STOP and step < total:
            raise Interrupted

    def _save(self, step: int, total: int, save: Callable[[], Tensors]) -> None:
        try:
            checkpoint.save(self.folder / "checkpoints", step, save(), {"total": total})
        except OSError as error:
            if step == total:
                raise UserError(f"cannot save {self.folder / 'checkpoints'}: {error.strerror or error}") from error
            warnings.warn(f"no checkpoint at step {step} ({error}); training goes on", stacklevel=2)


class MetricLog:
    """metrics.jsonl, one line per reported step, and the same numbers as TensorBoard events."""

    def __init__(self, folder: Path, step: int):
        """Keeps the lines up to `step`, where training resumes, so that steps strictly increase."""
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            self.path.write_text("".join(line + "\n" for line in kept))
        self.events = SummaryWriter(str(folder), purge_step=step + 1, write_to_disk=True)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with open(self.path, "a") as handle:
            handle.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the torn last line of a killed writer


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager:
    """Add up gradients locally in all backward passes of a step but the last, which averages them over workers."""
    no_sync = getattr(module, "no_sync", None)
    return nullcontext() if last or no_sync is None else no_sync()
