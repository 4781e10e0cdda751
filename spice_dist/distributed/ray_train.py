"""Run stages on many workers by Ray Train, which only schedules: state is in our checkpoints.

One group of workers runs all stages: its start, with Python and torch in every process, takes longer than many stages.
"""

import contextlib
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from spice_dist.data.pieces import stored_count
from spice_dist.distributed import (
    checkpoint,
    collectives,
    pace,
    ray_auth,
    ray_channel,
    ray_local,
    ray_nodes,
    ray_pulse,
    trackers,
)
from spice_dist.distributed.ray_channel import Progress
from spice_dist.distributed.worker import LocalWorker, StageCall, Storage
from spice_dist.errors import Interrupted, UserError
from spice_dist.stage_records import stage_record

STOP_SECONDS = 120.0  # how long workers may take to save and stop
ENDING_SECONDS = 5.0  # for Ray's workers to end with their cluster
_cluster_is_ours = False  # of the session; Ray allows one
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # a finished stage is noticed soon; four looks cost 5 % of a core
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # importing torch on a busy laptop takes minutes
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process; `run_group` looks for nodes that leave itself
    "RAY_TRAIN_METRICS_ENABLED": "0",  # without a dashboard they are not read
    "RAY_enable_metrics_collection": "0",  # metrics of the daemons, which are not read
    "RAY_task_events_report_interval_ms": "0",  # the history of the tasks: never sent
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # the state of the machine, which is not read
    "RAY_worker_niceness": "0",  # Ray's 15 prefers its own daemons and other programs to training
    "RAY_num_workers_soft_limit": "0",  # idle processes wake 100 times a second: end them
    "RAY_prestart_worker_first_driver": "0",  # start none in advance
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives our session must not start another cluster
}

NCCL_SETTINGS = {  # Ray's detector of collectives that do not end, where the workers have NVIDIA's program ncclras
    "RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR": "1",
    "RAY_TRAIN_NCCL_RAS_ACTION": "fail",  # the group starts again
    "RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S": "300",
}


class RayWorker(LocalWorker):
    """One of several workers of a Ray Train job."""

    def __init__(self, run: Path, stage: StageCall, storage: Storage):
        import ray.train.torch

        stop_requested = (run / ray_channel.STOP).exists

        def progress(done: int, total: int, loss: float | None) -> None:
            if self.rank == 0:
                ray_channel.write_progress(run, Progress(stage.name, done, total, loss))
            if loss is None and not stage.shared and stop_requested():  # the others wait for the stage's end
                raise Interrupted

        super().__init__(run, stage.name, ray.train.torch.get_device(), stop_requested, progress, storage)

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.world == 1:
            return module
        return data_parallel(module)


def data_parallel(module: nn.Module) -> nn.Module:
    """Wrap the module to average gradients over all workers; buffers, the same everywhere, are not sent."""
    wrapped = nn.parallel.DistributedDataParallel(module)
    wrapped.broadcast_buffers = False  # the argument for it has another name from torch 2.15 on
    pace.time_averaging(wrapped)
    return wrapped


@contextmanager
def session(address: str | None, num_cpus: int, insecure: bool = False) -> Iterator[None]:
    """Hold a Ray session: the cluster at `address`, or one of our own on this machine, with a secret token.

    Args:
        num_cpus: how many workers our own cluster has room for; unused with `address`.
        insecure: join a cluster that asks for no token.

    Raises:
        UserError: no cluster answers there; it asks for no token and `insecure` is False; it refuses our token.
    """
    address = prepare(address, insecure)
    global _cluster_is_ours
    _cluster_is_ours = address is None
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with ray_local.private_folder() if address is None else contextlib.nullcontext(Path()) as folder:
        if address is None:
            options |= {"include_dashboard": False, "num_cpus": num_cpus, "object_store_memory": 128 << 20}
            options["_temp_dir"] = str(folder)
        import ray

        if ray.is_initialized():
            raise UserError("Ray runs in this process already: call ray.shutdown() first")
        try:
            try:
                with ray_local.our_handler_of_sigterm(), contextlib.nullcontext() if address else ray_local.loopback():
                    ray.init(address or "local", **options)
            except Exception as error:  # Ray raises errors of any kind
                place = f"no Ray cluster answers at {address}" if address else "Ray does not start on this machine"
                raise UserError(f"{place}: {last_line(str(error))}") from error
            with contextlib.nullcontext() if address else ray_local.watched(folder.parent, *ray_auth.own_folders):
                yield
        except WorkersLost as error:
            if address:
                raise
            raise WorkersLost(f"{error}; Ray's logs are kept in {ray_local.keep_logs(folder)}") from error
        finally:
            workers = _worker_processes() if _cluster_is_ours else []
            ray.shutdown()
            _end(workers)


def _worker_processes() -> list[psutil.Process]:
    """Return the worker processes of our own cluster, which descend from this process."""
    workers = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "".join(process.cmdline()).startswith("ray::"):
                workers.append(process)
    return workers


def _end(workers: list[psutil.Process]) -> None:
    """Kill workers that do not end by themselves: the daemon that started them is gone.

    A worker of Ray 2.60 may wait for a lock that it holds itself.
    """
    for process in psutil.wait_procs(workers, ENDING_SECONDS)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def prepare(address: str | None, insecure: bool = False) -> str | None:
    """Set Ray's settings and token, before Ray is imported if possible, as it reads them then; return the full address.

    Raises what `session` raises.
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
    """Stages for one group of workers, in this order."""

    stages: tuple[StageCall, ...]
    run: Path
    threads: int  # of the CPU, for each worker
    stop_requested: Callable[[], bool]
    progress: Callable[[Progress], None]  # called at intervals; it may miss a short stage
    message: Callable[[str], None]  # called with each line of the first worker's messages
    storage: Storage = Storage()  # how often workers save, and where they read images from

    def reached(self) -> list[tuple[bool, int, int]]:
        """Return a value that grows with every finished stage, every checkpoint, and every image that is packed."""
        return [
            (
                _is_finished(self.run, stage),
                checkpoint.newest_step(self.run / stage.name / "checkpoints"),
                stored_count(self.run / stage.name),
            )
            for stage in self.stages
        ]


class WorkersLost(UserError):
    """Workers ended without a report: they were killed, their node went down, or the program has a bug."""


def ray_replaces() -> int:
    """Return how often Ray replaces lost workers by itself.

    Only in our own cluster, where their seats stay. Elsewhere it would wait without a word for a node that is lost.
    """
    return 3 if _cluster_is_ours else 0


def failure_config() -> Any:
    """Return when Ray replaces lost workers.

    It counts those of nodes that were drained apart, and by default replaces them for ever.
    """
    import ray.train

    most = ray_replaces()
    return ray.train.FailureConfig(max_failures=most, max_preemption_failures=most, controller_failure_limit=most)


def run_group(job: Job, workers: int, leave: Callable[[], bool] = lambda: False) -> bool:
    """Run one group of workers to its end; return True if all stages are done, False if it saved and stopped.

    It also saves and stops when a node of its workers is about to leave the cluster.

    Args:
        leave: asked every quarter of a second; once True, the workers save and stop, as by `stop_requested`.

    Raises:
        Interrupted: `stop_requested` came true, and the workers did not stop in STOP_SECONDS; what was saved is intact.
        UserError: the workers reported one; WorkersLost if they did not report at all.
    """
    ray_channel.open_channel(job.run)
    trainer = _trainer(job, workers)
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:
            outcome.append(error)

    # not in the main thread, which takes signals: Ray would kill the workers
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    watch = ray_pulse.Watch(job.run, workers, job.message)
    position, stop_at, asked = 0, None, False
    try:
        while thread.is_alive():
            thread.join(0.25)
            if stop_at is None and job.stop_requested():
                stop_at = time.monotonic() + STOP_SECONDS
            if stop_at is not None and time.monotonic() > stop_at:
                raise Interrupted  # workers that never started or hang; what was saved before is intact
            if (watch.node_leaves() or leave() or stop_at is not None) and not asked:
                (job.run / ray_channel.STOP).touch()
                asked = True
            position = _relay(job, position)
        _relay(job, position)
    finally:
        ray_channel.close_channel(job.run)
    return _is_done(outcome[0])


def _relay(job: Job, position: int) -> int:
    """Pass on the messages from byte `position` on and the progress; return where the next call starts."""
    position = ray_channel.pass_on_messages(job.run, position, job.message)
    if progress := ray_channel.read_progress(job.run):
        job.progress(progress)
    return position


def _trainer(job: Job, workers: int) -> Any:
    import ray.train

    from spice_dist.distributed.ray_trainer import OnNodeAddress, Trainer

    seat = ray_nodes.seat()
    use_gpu = "GPU" in seat
    if use_gpu:
        for name, value in NCCL_SETTINGS.items():
            os.environ.setdefault(name, value)
    trainer = Trainer(
        _train_loop,
        train_loop_config={
            "stages": job.stages, "run": job.run, "threads": job.threads, "environment": trackers.environment(),
            "storage": job.storage,
        },
        torch_config=OnNodeAddress(backend="nccl" if use_gpu else "gloo", timeout_s=600),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker=seat,
            placement_strategy="PACK" if use_gpu else "SPREAD",  # cores of one node are shared with its other workers
        ),
        run_config=ray.train.RunConfig(
            name=secrets.token_hex(4),  # never an old one: Ray must not resume by itself
            storage_path=str(job.run / ray_channel.RAY_FILES),
            failure_config=failure_config(),
        ),
    )  # fmt: skip
    # after a lost controller we go on, and need the resources that it reserved
    trainer.cleans_up = not _cluster_is_ours
    return trainer


def _train_loop(options: dict[str, Any]) -> str:
    """Run the stages on one worker; return how they ended, since an exception would make Ray try again."""
    import ray
    import ray.train.torch

    os.environ.update(options["environment"])
    run, stages, device = options["run"], options["stages"], ray.train.torch.get_device()
    group = collectives.patient_group()
    # only the first worker looks: NFS would cache for the others that later stages have no files
    first = collectives.rank() == 0
    finished = sum(_is_finished(run, stage) for stage in stages) if first else 0
    with (
        ray_pulse.beating(run, collectives.rank(), ray.get_runtime_context().get_node_id()),
        # what other workers print goes to Ray's logs
        ray_channel.errors_as_messages(run) if first else contextlib.nullcontext(),
    ):
        for stage in stages[collectives.broadcast_int(finished, device) :]:
            if stage.has_folder:
                (run / stage.name).mkdir(exist_ok=True)  # on every node: NFS may cache that it was missing
            if first:
                ray_channel.write_progress(run, Progress(stage.name, 0, 0, None))
            if collectives.largest_int(int((run / ray_channel.STOP).exists()), device):
                return "interrupted"
            outcome = "done"
            if stage.shared or first:
                with contextlib.nullcontext() if stage.shared else collectives.apart():
                    outcome = _outcome(stage, RayWorker(run, stage, options["storage"]), options["threads"])
            store = run / stage.name / "checkpoints"
            outcome, last = _agreed(outcome, checkpoint.newest_step(store) if first else -1, group)
            if outcome != "done":
                return outcome
            _wait_to_see(last, store)
    return "done"


def _is_finished(run: Path, stage: StageCall) -> bool:
    return bool((stage_record(run, stage.name) or {}).get("done"))


def _outcome(stage: StageCall, worker: LocalWorker, threads: int) -> str:
    try:
        stage.run(worker, threads)
    except Interrupted:
        return "interrupted"
    except UserError as error:
        return f"error: {error}"
    return "done"


def _agreed(outcome: str, step: int, everybody: Any) -> tuple[str, int]:
    """Wait for all workers; return how the stage ended, and the largest of their steps."""
    outcomes, steps = zip(*collectives.of_all((outcome, step), everybody), strict=True)
    return next((each for each in outcomes if each != "done"), "done"), max(steps)


def _wait_to_see(step: int, store: Path) -> None:
    """Wait until this node shows the checkpoint: NFS may show an old listing of the folder."""
    deadline = time.monotonic() + checkpoint.STALE_SECONDS
    while checkpoint.newest_step(store) != step:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{store} does not show the checkpoint of step {step} on this node")
        time.sleep(0.5)


def _is_done(outcome: Any) -> bool:
    if isinstance(outcome, BaseException):
        cause = outcome
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise WorkersLost(f"the training workers failed: {_reason(cause)}") from outcome
    if outcome.return_value not in ("done", "interrupted"):
        raise UserError(str(outcome.return_value).removeprefix("error: "))
    return outcome.return_value == "done"


def _reason(cause: BaseException) -> str:
    if type(cause).__name__ == "NCCLHangError":  # many lines of advice follow the second, which says what hangs
        return str(cause).splitlines()[1].partition(". ")[0]
    return last_line(str(cause))


def last_line(text: str) -> str:
    """Return the last line, in which an exception of Ray, after a possible trace, states the cause."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
