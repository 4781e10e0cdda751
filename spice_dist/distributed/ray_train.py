"""Ray Train runs a stage on many workers; the training code never knows. Ray only schedules: state is in our store."""

import atexit
import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spice_dist.distributed import trackers
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import Interrupted, UserError, out_of_memory
from spice_dist.task import Task

STOP_SECONDS = 120.0  # how long workers may take to save and stop
STOP_FILE = ".stop"  # in the run folder: asks every worker to save and stop
Train = Callable[[Task, Any, Any], None]
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # a finished stage is noticed at once
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # importing torch on a busy laptop takes minutes
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # signals reach us through the stop file
    "RAY_TRAIN_METRICS_ENABLED": "0",  # no dashboard reads them
}


class RayWorker(LocalWorker):
    """One of several workers of a Ray Train job."""

    def __init__(self, run: Path, stage: str):
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

        super().__init__(run, stage, ray.train.torch.get_device(), stop.exists, progress)

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.world == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


@contextmanager
def session(address: str | None, num_cpus: int) -> Iterator[None]:
    """A Ray session: the cluster at `address`, or one of our own on this machine, with a token that only we know."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        _require_token()
        options |= {"include_dashboard": False, "num_cpus": num_cpus, "object_store_memory": 128 << 20}
    else:
        _require_answer(address)
    import ray  # reads its environment when it is imported

    try:
        ray.init(address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        place = f"no Ray cluster answers at {address}" if address else "Ray does not start on this machine"
        raise UserError(f"{place}: {_last_line(str(error))}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str, seconds: float = 10.0) -> None:
    """UserError at once if nobody listens at host:port; Ray itself would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto" and other names that Ray resolves
    try:
        socket.create_connection((host, int(port)), timeout=seconds).close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"no Ray cluster answers at {address} ({reason}); start one or leave --address out") from error


def _require_token() -> None:
    """Token authentication for the cluster that we start: the user's token, or a secret of this process.

    Ray reads the token once in the life of a process, so all sessions of a process share it.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        return
    private = tempfile.TemporaryDirectory(prefix="spice-")
    atexit.register(private.cleanup)
    token = Path(private.name) / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def train_on_workers(
    train: Train,
    task: Task,
    config: Any,
    run: Path,
    stage: str,
    workers: int,
    threads: int,
    stop_requested: Callable[[], bool],
    progress: Callable[[int, int, float | None], None],
) -> None:
    """Run `train(task, config, worker)` on `workers` workers inside the current session, restarting lost ones.

    Raises:
        Interrupted: `stop_requested` came true; the state is saved.
        UserError: the workers reported one.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = torch.cuda.is_available()
    kind = "GPU" if use_gpu else "CPU"
    available = int(ray.cluster_resources().get(kind, 0))
    if available < workers:
        raise UserError(f"--workers is {workers}, but Ray has {available} {kind}s for them; ask for fewer workers")
    (run / STOP_FILE).unlink(missing_ok=True)
    storage = run / stage / ".ray"
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={
            "train": train, "task": task, "config": config, "run": str(run), "stage": stage, "threads": threads,
            "environment": trackers.environment(),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=600),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1, **({"GPU": 1} if use_gpu else {})}
        ),
        run_config=ray.train.RunConfig(
            name=secrets.token_hex(4),  # never an old one: Ray must not resume by itself
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=3, controller_failure_limit=3),
        ),
    )  # fmt: skip
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:
            outcome.append(error)

    # beside the main thread, which stays free to take signals: Ray would answer them by killing the workers
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    shown = run / stage / ".progress.json"
    shown.unlink(missing_ok=True)
    asked_at = None
    while thread.is_alive():
        thread.join(0.25)
        if stop_requested():
            (run / STOP_FILE).touch()
            asked_at = asked_at or time.monotonic()
            if time.monotonic() - asked_at > STOP_SECONDS:
                raise Interrupted  # workers that never started or hang; what was saved before is intact
        _show(shown, progress)
    (run / STOP_FILE).unlink(missing_ok=True)
    shown.unlink(missing_ok=True)
    shutil.rmtree(storage, ignore_errors=True)
    _raise_outcome(outcome[0])


def _train_loop(options: dict[str, Any]) -> str:
    """What every worker runs. Its value says how it ended: an exception would make Ray try again."""
    torch.set_num_threads(options["threads"])
    os.environ.update(options["environment"])
    worker = RayWorker(Path(options["run"]), options["stage"])
    try:
        options["train"](options["task"], options["config"], worker)
    except Interrupted:
        return "interrupted"
    except UserError as error:
        return f"error: {error}"
    except torch.OutOfMemoryError as error:
        return f"error: {out_of_memory(options['stage'], error)}"
    return "done"


def _show(path: Path, progress: Callable[[int, int, float | None], None]) -> None:
    with contextlib.suppress(FileNotFoundError):  # until the first step
        progress(*json.loads(path.read_text()))


def _raise_outcome(outcome: Any) -> None:
    if isinstance(outcome, BaseException):
        cause = outcome
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"the training workers failed: {_last_line(str(cause))}") from outcome
    if outcome.return_value == "interrupted":
        raise Interrupted
    if outcome.return_value != "done":
        raise UserError(str(outcome.return_value).removeprefix("error: "))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
