"""What comes before and after training, as stages that a group of workers can do: packing and evaluation."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from spice_dist import artifacts
from spice_dist.config import Config
from spice_dist.data.checksums import OF_RUN, differing, sums_in
from spice_dist.data.decode import LEAST_BITS, Packing
from spice_dist.data.ingest import Call, call_with
from spice_dist.data.manifest import Ingested
from spice_dist.data.pieces import Pieces
from spice_dist.data.sources import Source
from spice_dist.distributed import checkpoint, collectives, helpers
from spice_dist.distributed.worker import StageCall, Worker, usable_cores
from spice_dist.errors import DamagedFile, UserError
from spice_dist.evaluate import evaluate
from spice_dist.model_folder import damaged_model
from spice_dist.stage_records import stage_record
from spice_dist.stages import check_settings, evaluation_settings
from spice_dist.task import Task

ROUNDS = 3  # of storing pieces: the second if greys need more bits than was known, the third should find nothing to do
SHOWN_S = 0.5  # between two reports of progress


def evaluation(config: Config, until: str) -> StageCall:
    """Return the stage that writes the result of a run whose stages are done up to `until`.

    The first worker does it on all cores of its node; passes over the images are shared by all workers. The times of
    the stages are left to the process that knows them.
    """
    return StageCall("evaluate", _evaluate, config, until, has_folder=False)


def is_evaluated(config: Config, run: Path, stages: set[str]) -> bool:
    """Tell whether the results are there and whole: of these stages, this method and these settings of evaluation."""
    try:
        recorded = sums_in(run / OF_RUN)
        results = differing(run, recorded)
        if "metrics.json" not in recorded and any((stage_record(run, name) or {}).get("sha256") for name in stages):
            results = [OF_RUN]  # it was lost; folders of earlier versions have no digests at all
    except DamagedFile:
        results = [OF_RUN]
    damaged = results + [f"model/{name}" for name in damaged_model(artifacts.model(run))]
    if not (artifacts.metrics_file(run).exists() and artifacts.assignments_file(run).exists()):
        return False
    if damaged:
        print(f"{run / damaged[0]} is damaged or missing: the results are made again", file=sys.stderr)
        return False
    metrics = artifacts.metrics(run)
    now = {"method": config.method} | evaluation_settings(config)
    return all(metrics.get(name) == value for name, value in now.items()) and set(metrics.get("seconds", ())) == stages


def _evaluate(config: Config, until: str, worker: Worker) -> None:
    helpers.lead(partial(_evaluate_first, config, until, worker), worker.device)


def _evaluate_first(config: Config, until: str, worker: Worker) -> None:
    def progress(done: int, total: int) -> None:
        worker.progress(done, total, None)

    progress(0, artifacts.manifest(worker.run).n)  # from now on the process that started the group may end it
    torch.set_num_threads(usable_cores())
    with threadpool_limits(usable_cores()):  # Ray gives a worker one thread for NumPy and scikit-learn
        evaluate(config, worker.run, worker.device, {}, progress, until)


@dataclass(frozen=True)
class Images:
    """Images that are to be packed, and the options of `ingest`."""

    source: Source
    options: dict[str, Any]


def packing(config: Config | None, source: Source, options: dict[str, Any]) -> StageCall:
    """Return the stage that packs the images of a run; of `spice-dist pack`, if `config` is None.

    The workers decode pieces of the images side by side; the first one makes the data set of them, byte for byte as
    one process makes it of the images. A group of any size goes on where another one was stopped.
    """
    return StageCall("data", _pack, config or Task(), Images(source, options), has_folder=config is not None)


def accept(config: Config, manifest: Ingested, folder: Path) -> None:
    """Tell what was left out of the packed images of a run; UserError if they are too few for its settings."""
    check_settings(config, manifest, manifest.source)
    for note in manifest.notes():
        tqdm.write(note, sys.stderr)
    if manifest.bad:
        tqdm.write(f"{folder / 'quarantine.csv'} says why", sys.stderr)


def _pack(task: Task, images: Images, worker: Worker) -> None:
    folder, total = artifacts.data(worker.run), len(images.source.paths)
    call = _store_pieces(images, folder, worker)
    if call is None:
        return  # the first worker does the rest
    shown = _seldom(lambda done: worker.progress(total + done, 2 * total, None))
    manifest = call.carry_out(usable_cores(), lambda done, total: shown(done))
    if isinstance(task, Config):
        accept(task, manifest, folder)


class _Plan(NamedTuple):
    """What the workers are to store."""

    call_hash: str
    packing: Packing
    is_fixed: bool  # the bits of 16-bit greys
    numbers: list[int]  # of the pieces


def _store_pieces(images: Images, folder: Path, worker: Worker) -> Call | None:
    """Store all pieces, each worker a share of them; return the call that they are of, on the first worker."""
    group, total = collectives.patient_group(), len(images.source.paths)
    calls: list[Call] = []  # made by the first worker alone: it looks at every file

    def begin() -> None:
        if worker.rank == 0:
            calls.append(call_with(images.source, folder, **images.options))

    collectives.agreed(begin, group)

    processes, bits = max(1, usable_cores() // collectives.on_this_host(group)), 0
    for _ in range(ROUNDS if worker.world > 1 else 0):
        planned: _Plan = collectives.agreed(lambda bits=bits: _plan(calls[0], bits) if calls else None, group)[0]
        if not planned.numbers:
            break
        pieces = Pieces(folder, planned.call_hash, total)
        share = [planned.numbers[place] for place in collectives.share(len(planned.numbers))]
        left = sum(len(pieces.ranges[number]) for number in planned.numbers)

        def show(done: int, left: int = left) -> None:
            worker.progress(min(total, total - left + done * worker.world), 2 * total, None)

        store = partial(_stored, pieces, images.source, planned, share, processes, _seldom(show))
        bits = max(collectives.agreed(store, group))
        pieces.wait_for(planned.numbers, checkpoint.STALE_SECONDS if worker.rank == 0 else 0)
    return calls[0] if calls else None


def _plan(call: Call, bits: int) -> _Plan:
    pieces, fixed = call.pieces, call.packing.grey_bits
    bits = fixed or max(LEAST_BITS, pieces.grey_bits(), bits)
    numbers = [] if call.finished() else pieces.unfinished(call.done(bits), bits)
    return _Plan(call.call_hash, replace(call.packing, grey_bits=bits), fixed > 0, numbers)


def _stored(
    pieces: Pieces, source: Source, plan: _Plan, share: list[int], processes: int, progress: Callable[[int], None]
) -> int:
    try:
        return pieces.store(source, plan.packing, share, processes, plan.is_fixed, progress)
    except OSError as error:
        raise UserError(f"cannot write into {pieces.folder}: {error.strerror or error}") from error


def _seldom(progress: Callable[[int], None]) -> Callable[[int], None]:
    """Return a function that calls `progress` every SHOWN_S seconds at most."""
    shown_at = -SHOWN_S

    def show(done: int) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at > SHOWN_S:
            shown_at = time.monotonic()
            progress(done)

    return show
