"""Ray Train runs a stage on many workers; the training code never knows. Ray only schedules: state is in our store."""

import contextlib
import json
import logging
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spice_dist.distributed import ray_auth, ray_nodes, trackers
from spice_dist.distributed.worker import LocalWorker, Storage
from spice_dist.errors import Interrupted, UserError, out_of_memory, warn_in_one_line
from spice_dist.task import Task

STOP_SECONDS = 120.0  # how long workers may take to save and stop
STOP_FILE = ".stop"  # in the run folder: asks every worker to save and stop
Train = Callable[[Task, Any, Any], None]
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # a finished stage is noticed soon; four looks cost 5 % of a core
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # importing torch on a busy laptop takes minutes
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # signals reach us through the stop file
    "RAY_TRAIN_METRICS_ENABLED": "0",  # no dashboard reads them
    "RAY_enable_metrics_collection": "0",  # those of the daemons: nobody reads them
    "RAY_task_events_report_interval_ms": "0",  # the history of the tasks: never sent
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # the state of the machine: nobody reads it
    "RAY_worker_niceness": "0",  # Ray's 15 lets its own daemons, and whatever else runs here, go before training
    "RAY_num_workers_soft_limit": "0",  # processes that wait for work wake 100 times a second: end them,
    "RAY_prestart_worker_first_driver": "0",  # and start none before it is known what for
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives our session must not start another cluster
}


class RayWorker(LocalWorker):
    """One of several workers of a Ray Train job."""

    def __init__(self, run: Path, stage: str, storage: Storage):
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        stop, shown = run / STOP_FILE, run / stage / ".progress.json"
        shown.parent.mkdir(parents=True, exist_ok=True)

        def progress(step: int, total: int, loss: float | None) -> None:
            if self.rank == 0:
                beside = shown.with_suffix(".new")
                beside.write_text(json.dumps([step, total, loss]))
                beside.replace(shown)

        super().__init__(run, stage, ray.train.torch.get_device(), stop.exists, progress, storage)

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.world == 1:
            return module
        return data_parallel(module)


def data_parallel(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over all workers; buffers, which are the same everywhere, are not sent."""
    wrapped = nn.parallel.DistributedDataParallel(module)
    wrapped.broadcast_buffers = False  # the argument for it has another name from torch 2.15 on
    return wrapped


@contextmanager
def session(address: str | None, num_cpus: int, insecure: bool = False) -> Iterator[None]:
    """A Ray session: the cluster at `address`, or one of our own on this machine, with a token that only we know.

    Args:
        num_cpus: how many workers our own cluster has room for; a running one knows its room.
        insecure: join a cluster that asks for no token.

    Raises:
        UserError: no cluster answers there; it lets anybody in, and `insecure` is False; it refuses our token.
    """
    address = prepare(address, insecure)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": num_cpus, "object_store_memory": 128 << 20}
    import ray

    try:
        ray.init(address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        place = f"no Ray cluster answers at {address}" if address else "Ray does not start on this machine"
        raise UserError(f"{place}: {last_line(str(error))}") from error
    try:
        yield
    finally:
        ray.shutdown()


def prepare(address: str | None, insecure: bool = False) -> str | None:
    """Before Ray is imported, if it can be: that is when it reads its settings. Ours and a token; the address in full.

    It raises what `session` raises.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    if "ray" in sys.modules:  # a notebook imported it, and Ray has read that setting
        from ray._private import auto_init_hook

        auto_init_hook.enable_auto_connect = False
    if address is None:
        ray_auth.use_own_token()
        return None
    address = ray_auth.resolved(address)
    ray_auth.use_token_of(address, insecure)
    return address


@dataclass(frozen=True)
class Job:
    """One stage for workers: they call `train(task, config, worker)`."""

    train: Train
    task: Task
    config: Any
    run: Path
    stage: str
    threads: int  # of the CPU, for each worker
    stop_requested: Callable[[], bool]
    progress: Callable[[int, int, float | None], None]  # told (done, total, loss)
    storage: Storage = Storage()  # how often workers save, and where they read images from

    @property
    def shown(self) -> Path:
        """Where the first worker writes how far it is; there is none until its first step."""
        return self.run / self.stage / ".progress.json"


class WorkersLost(UserError):
    """Workers ended without saying why: they were killed, their node went down, or the program has a bug."""


def train_on_workers(job: Job, workers: int) -> None:
    """Train on exactly `workers` workers of the current session; Ray restarts lost ones, up to three times.

    Raises:
        Interrupted: `stop_requested` came true; the state is saved.
        UserError: there is no room for them, or they reported one.
    """
    there, kind = ray_nodes.seats(), ray_nodes.kind_of_seat()
    if there < workers:
        raise UserError(f"--workers is {workers}, but Ray has {there} {kind}s for them; ask for fewer workers")
    if not run_group(job, workers, max_failures=3):
        raise Interrupted


def run_group(job: Job, workers: int, max_failures: int, leave: Callable[[], bool] = lambda: False) -> bool:
    """Start one group of workers and wait for its end: True if the stage is done, False if it saved and stopped.

    Args:
        max_failures: how often Ray may replace lost workers by itself.
        leave: asked every quarter of a second; once True, the workers save and stop, as by `stop_requested`.

    Raises:
        Interrupted: `stop_requested` came true, and the workers did not stop in STOP_SECONDS; what was saved is intact.
        UserError: the workers reported one; WorkersLost if they did not report at all.
    """
    (job.run / STOP_FILE).unlink(missing_ok=True)
    job.shown.unlink(missing_ok=True)
    storage = job.run / job.stage / ".ray"
    trainer = _trainer(job, workers, max_failures, storage)
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:
            outcome.append(error)

    # beside the main thread, which stays free to take signals: Ray would answer them by killing the workers
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    asked_at = None
    while thread.is_alive():
        thread.join(0.25)
        if asked_at is None and (job.stop_requested() or leave()):
            (job.run / STOP_FILE).touch()
            asked_at = time.monotonic()
        if asked_at is not None and time.monotonic() - asked_at > STOP_SECONDS:
            raise Interrupted  # workers that never started or hang; what was saved before is intact
        _show(job)
    (job.run / STOP_FILE).unlink(missing_ok=True)
    job.shown.unlink(missing_ok=True)
    shutil.rmtree(storage, ignore_errors=True)
    return _is_done(outcome[0])


def _trainer(job: Job, workers: int, max_failures: int, storage: Path) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    from spice_dist.distributed.ray_network import OnNodeAddress

    use_gpu = ray_nodes.kind_of_seat() == "GPU"
    return TorchTrainer(
        _train_loop,
        train_loop_config={
            "train": job.train, "task": job.task, "config": job.config, "run": str(job.run), "stage": job.stage,
            "threads": job.threads, "environment": trackers.environment(), "storage": job.storage,
        },
        torch_config=OnNodeAddress(backend="nccl" if use_gpu else "gloo", timeout_s=600),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if use_gpu else {})},
            placement_strategy="PACK" if use_gpu else "SPREAD",  # cores of one node are shared with its other workers
        ),
        run_config=ray.train.RunConfig(
            name=secrets.token_hex(4),  # never an old one: Ray must not resume by itself
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=max_failures, controller_failure_limit=max_failures),
        ),
    )  # fmt: skip


def _train_loop(options: dict[str, Any]) -> str:
    """What every worker runs. Its value says how it ended: an exception would make Ray try again."""
    warn_in_one_line()
    torch.set_num_threads(options["threads"])
    os.environ.update(options["environment"])
    worker = RayWorker(Path(options["run"]), options["stage"], options["storage"])
    try:
        options["train"](options["task"], options["config"], worker)
    except Interrupted:
        return "interrupted"
    except UserError as error:
        return f"error: {error}"
    except torch.OutOfMemoryError as error:
        return f"error: {out_of_memory(options['stage'], error)}"
    return "done"


def _show(job: Job) -> None:
    with contextlib.suppress(FileNotFoundError):  # until the first step
        job.progress(*json.loads(job.shown.read_text()))


def _is_done(outcome: Any) -> bool:
    if isinstance(outcome, BaseException):
        cause = outcome
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise WorkersLost(f"the training workers failed: {last_line(str(cause))}") from outcome
    if outcome.return_value not in ("done", "interrupted"):
        raise UserError(str(outcome.return_value).removeprefix("error: "))
    return outcome.return_value == "done"


def last_line(text: str) -> str:
    """Where an exception of Ray, which may hold a trace, says what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
