"""Predict on many workers by Ray Data, which hands parts of the images to them as they get free.

Ray Data sees numbers of parts and short answers; rows go through the files of the parts, which `merged` reads. So Ray
keeps only as many parts under way as there are workers, and lost workers are its to replace.
"""

import contextlib
import logging
import queue
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from spice_dist import artifacts
from spice_dist.data.excerpts import excerpts
from spice_dist.data.files import publish_json
from spice_dist.data.sources import Source
from spice_dist.distributed import ray_local, ray_nodes, ray_train
from spice_dist.distributed.ray_train import WorkersLost, last_line
from spice_dist.distributed.worker import usable_cores
from spice_dist.errors import UserError, plain
from spice_dist.inference import chunk_of
from spice_dist.ownership import owned
from spice_dist.predicting import Predictions, Unreadable, load_for_images, predictions_of, require_all, require_finite
from spice_dist.prediction_parts import (
    PartJob,
    PartWorker,
    digest_of_model,
    file_of_part,
    read_part,
    size_of_part,
)
from spice_dist.terminal import Bar, StopSignal

RESTARTS = 3  # for each worker, until the next part is done
POLL_SECONDS = 0.5  # between two looks at whether a signal has come
MARK = "parts.json"  # by which a folder of parts is known


@dataclass(frozen=True)
class Cluster:
    """Where workers run."""

    workers: int | None  # None: as many as the cluster has room for
    address: str | None  # of a running Ray cluster; None: one is started on this machine
    insecure: bool  # join a cluster that asks for no token


@dataclass(frozen=True)
class Images:
    """What `source` was opened from, as other processes open it again, and how they read it."""

    source: Source
    data: str
    trust_list: bool
    max_megapixels: int | None


class Answer(NamedTuple):
    """What a worker says of a part: Ray Data's row."""

    part: int
    digest: str
    unreadable: int
    decoded: int  # images that were, 0 where the part was written before
    error: str  # of a user


@contextlib.contextmanager
def predicted(
    model: Path, images: Images, out: Path | None, unreadable: Unreadable, cluster: Cluster
) -> Iterator[Predictions]:
    """Assign every image to a cluster of the model in the folder `model`, as `predicting.predict` does, on workers.

    The parts are in OUT.parts until the block has ended without an error, or in a temporary folder without `out`: an
    equal call goes on with those that are written.

    Memory of this process: the names of the N images, 17 N bytes, a part, and the reasons of unreadable images. Of a
    worker: see `PartWorker`.

    Raises:
        UserError: what `predicting.predict` raises; the cluster or OUT.parts cannot be used; WorkersLost if workers end
            again and again.
        Interrupted: a signal ended the call.
    """
    with contextlib.ExitStack() as opened:
        if out is None:
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="spice-")))
        else:
            folder = out.absolute().with_name(f"{out.name}.parts")
            if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
                raise UserError(f"{folder} holds other files than parts of predictions; move it, or give another --out")
        opened.enter_context(owned(folder))
        publish_json(folder / MARK, {"version": 1})
        names = artifacts.model_names(model)
        with StopSignal() as stop:
            job = _job(model, images, folder)
            best, reasons = _computed(job, images.source, unreadable == "error", cluster, stop)
        yield predictions_of(images.source, best, reasons, unreadable, names)
        shutil.rmtree(folder, ignore_errors=True)


def _job(model: Path, images: Images, folder: Path) -> PartJob:
    """Describe the work; what can be refused is refused before a cluster is waited for."""
    _, task = load_for_images(model, torch.device("cpu"), images.max_megapixels)
    size = size_of_part(len(images.source.paths), chunk_of(task.data.size))
    divided = excerpts(images.source, images.data, images.trust_list, size, folder)
    model = model.absolute()
    return PartJob(model, digest_of_model(model), divided, images.max_megapixels, folder, torch.get_num_threads(), 1)


def _computed(
    job: PartJob, source: Source, strict: bool, cluster: Cluster, stop: StopSignal
) -> tuple[Float[np.ndarray, "N 2"], dict[int, str]]:
    """Return what `predicting.apply` does."""
    best = np.full((len(source.paths), 2), np.nan, np.float32)
    reasons: dict[int, str] = {}
    todo = dict.fromkeys(range(job.excerpts.parts))
    done = 0
    with _session(cluster, job.folder, stop) as room, Bar("predict", stop) as bar:
        job = replace(job, cores=room.cores)
        bar.show(0, len(source.paths))
        while todo:
            before, failure = len(todo), WorkersLost(f"{job.folder} does not hold what the workers wrote")
            try:
                for answer in _answers(job, list(todo), room, stop):
                    if answer.part not in todo:
                        continue
                    numbers = job.excerpts.numbers(answer.part)
                    part = read_part(file_of_part(job.folder, answer.part))
                    if part is None or part.digest != answer.digest:
                        continue  # of a process that has not ended in time: once more
                    best[numbers.start : numbers.stop] = part.best
                    reasons |= {numbers[image]: reason for image, reason in part.reasons.items()}
                    del todo[answer.part]
                    done += len(numbers)
                    bar.show(done, len(source.paths))
                    if strict and part.reasons:  # only the parts before can have one that comes earlier
                        todo = dict.fromkeys(part for part in todo if part < answer.part)
                    if not todo:
                        break
            except WorkersLost as error:
                failure = error
                tqdm.write(f"{error}; going on with what is left", sys.stderr)
            stop.check()
            if len(todo) == before:
                raise failure
    reasons = dict(sorted(reasons.items()))
    if strict:
        require_all(source, reasons)
    require_finite(best, reasons)
    return best, reasons


class _Room(NamedTuple):
    """What the session has for each worker."""

    workers: int
    resources: dict[str, Any]  # as Ray counts them
    cores: int  # for decoding


@contextlib.contextmanager
def _session(cluster: Cluster, folder: Path, stop: StopSignal) -> Iterator[_Room]:
    where = f"joining the Ray cluster at {cluster.address}" if cluster.address else "starting Ray"
    print(plain(where), file=sys.stderr)
    with ray_local.quiet_driver(), ray_train.session(cluster.address, cluster.workers or 1, cluster.insecure):
        stop.check()  # Ray takes many seconds to start, and cannot be interrupted meanwhile
        if cluster.address:
            ray_nodes.require_shared(folder)
        yield _room(cluster)


def _room(cluster: Cluster) -> _Room:
    kind, seats = ray_nodes.kind_of_seat(), ray_nodes.seats()
    workers = cluster.workers or (seats if kind == "GPU" else seats // torch.get_num_threads()) or 1
    cpus = ray_nodes.cpus_each(workers)
    if not cpus:
        raise UserError(f"--workers is {workers}, but Ray has {seats} {kind}s for them; ask for fewer workers")
    resources = {"num_cpus": cpus, **({"num_gpus": 1} if kind == "GPU" else {})}
    return _Room(workers, resources, cpus if cluster.address else max(1, usable_cores() // workers))


def _answers(job: PartJob, parts: list[int], room: _Room, stop: StopSignal) -> Iterator[Answer]:
    """Yield what the workers say of the parts, as they are done.

    Raises:
        UserError: a worker reported one; WorkersLost if they ended without.
        Interrupted: a signal asked this process to stop.
    """
    results: queue.SimpleQueue[Answer | BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            for batch in _dataset(job, parts, room).iter_batches(batch_size=None, prefetch_batches=0):
                for row in zip(*(batch[name].tolist() for name in Answer._fields), strict=True):
                    results.put(Answer(*row))
            results.put(None)
        except BaseException as error:
            results.put(error)

    # not in the main thread, which takes signals; it ends with the session
    threading.Thread(target=run, daemon=True).start()
    restarts = before = ray_nodes.restarts()
    while True:
        stop.check()
        try:
            result = results.get(timeout=POLL_SECONDS)
        except queue.Empty:
            restarts = ray_nodes.restarts()  # Ray Data has no limit
            if restarts - before > RESTARTS * room.workers:
                raise WorkersLost("workers end again and again (killed, out of memory, a node that is down)") from None
            continue
        before = restarts
        if result is None:
            return
        if isinstance(result, BaseException):
            raise WorkersLost(f"the workers failed: {last_line(str(result))}") from result
        if result.error:
            raise UserError(result.error)
        yield result


def _dataset(job: PartJob, parts: list[int], room: _Room) -> Any:
    """Return the data set of the workers' answers; a block, and so a task, is a part."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.CRITICAL + 1)  # the log files of the session have it
    numbers = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    return numbers.map_batches(
        _Worker,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=room.workers),
        **room.resources,
    )


class _Worker:
    """What Ray Data calls in the process of a worker.

    A user's mistake is an answer: after an exception Ray would try again.
    """

    def __init__(self, job: PartJob):
        self._job = job
        self._worker: PartWorker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (number,) = batch["part"].tolist()
        try:
            if self._worker is None:
                self._worker = PartWorker(self._job)
            part, decoded = self._worker.part(number)
            answer = Answer(number, part.digest, len(part.reasons), decoded, "")
        except UserError as error:
            answer = Answer(number, "", 0, 0, plain(str(error)))
        return {name: [value] for name, value in answer._asdict().items()}
