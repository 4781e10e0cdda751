"""Ray Tune proposes settings and runs trials side by side; what they leave is in their folders, and Ray only schedules.

Ray's own state of a sweep is thrown away: a sweep that goes on tells a new search what the finished trials gave.
"""

import logging
import os
import runpy
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spice_dist.distributed import ray_nodes, ray_train
from spice_dist.distributed.ray_train import last_line
from spice_dist.errors import Interrupted, UserError
from spice_dist.trials import FAILED, RUNGS, RUNNING, STOPPED, Plan, read_record, run_trial, trial_folder, write_record

RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our rows are in the trials' folders
    "RAY_AIR_NEW_OUTPUT": "0",  # the table is ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a failed trial is a row with a reason
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
Space = dict[str, Any]
"""Ray Tune's domains by dotted names of settings."""


@dataclass(frozen=True)
class Search:
    """How a sweep looks for settings."""

    trials: int  # in all, those of earlier calls included
    metric: str = "generalization"  # the score that guides it
    direction: int = +1  # of that score: +1 if high is good
    search: str = "optuna"
    scheduler: str = "none"
    max_concurrent: int | None = None  # trials at a time; None: as many as cores, or GPUs, have room for
    seconds: float | None = None  # after which no trial goes on


@contextmanager
def session(address: str | None, insecure: bool, plan: Plan, search: Search) -> Iterator[None]:
    """A Ray session with room for the trials.

    Raises:
        UserError: a trial fits no node of the cluster, or it cannot be used.
    """
    busy = plan.threads * max(1, plan.workers)  # threads of a trial: it waits while its workers train
    trials = search.max_concurrent or max(1, len(os.sched_getaffinity(0)) // busy)
    with ray_train.session(address, num_cpus=trials * (plan.threads + plan.workers), insecure=insecure):
        require_room(plan, search)
        if address:
            ray_nodes.require_shared(plan.folder)
        yield


def require_room(plan: Plan, search: Search) -> None:
    """UserError if a trial would wait for ever: no node of the current session holds it, or all have too few seats."""
    needed = _resources(plan, search)
    if not ray_nodes.fits_a_node(needed):
        shown = " and ".join(f"{amount:g} {kind}s" for kind, amount in needed.items())
        largest = max(ray_nodes.amounts("CPU"), default=0)
        raise UserError(f"a trial takes {shown}, and the largest node of Ray has {largest} CPUs; give fewer --threads")
    if plan.workers and not _trials_with_workers(plan):
        cpus, seats, kind = sum(ray_nodes.amounts("CPU")), ray_nodes.seats(), ray_nodes.kind_of_seat()
        raise UserError(
            f"a trial takes {plan.threads} CPUs, and a CPU and a seat for each of its {plan.workers} workers, but Ray "
            f"has {cpus} CPUs, {seats} {kind}s for seats; give fewer --workers or --threads"
        )


def trials_at_once(plan: Plan, search: Search) -> int | None:
    """How many trials Tune may run at a time in the current session; None: as many as Ray has room for.

    Trials that start workers leave room for these: Ray would give it to more trials, and all would wait for ever.
    """
    if not plan.workers:
        return search.max_concurrent
    most = _trials_with_workers(plan)
    return min(search.max_concurrent or most, most)


def _trials_with_workers(plan: Plan) -> int:
    """How many trials have room beside each other, their workers included."""
    by_cpu = sum(ray_nodes.amounts("CPU")) // (plan.threads + plan.workers)
    return min(by_cpu, ray_nodes.seats() // plan.workers)


def read_space(path: Path, address: str | None = None, insecure: bool = False) -> tuple[Space, str]:
    """SPACE and METRIC of a Python file, which is run: only read your own.

    Raises:
        UserError: it cannot be run, or lacks one of them.
    """
    if not path.is_file():
        raise UserError(f"there is no search space {path}; give heads, thresholds, augmentations, pretrain or a file")
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    ray_train.prepare(address, insecure)  # the file imports Ray
    try:
        found = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    space, metric = found.get("SPACE"), found.get("METRIC", "generalization")
    if not isinstance(space, dict) or not space:
        raise UserError(f"{path} has no SPACE, a dictionary of Ray Tune's domains by dotted names of settings")
    for name, domain in space.items():
        if not hasattr(domain, "sample"):
            raise UserError(
                f"{path}: {name} is {domain!r}, which is no domain of Ray Tune; use --set for a fixed value"
            )
    return space, str(metric)


def texts(space: Space) -> dict[str, str]:
    """Each range in words, by which a sweep recognises its space."""
    return {name: _text(domain) for name, domain in space.items()}


def _text(domain: Any) -> str:
    parts = {name: value for name, value in vars(domain).items() if name in ("lower", "upper", "categories")}
    sampler = domain.get_sampler() if hasattr(domain, "get_sampler") else ""
    inner = ", ".join(map(str, parts.get("categories", list(parts.values()))))
    return f"{type(sampler).__name__.strip('_')} {type(domain).__name__} {inner}"


def values_of(space: Space, seed: int) -> dict[str, Any]:
    """One value of every range, to see whether there are such settings."""
    import random

    random.seed(seed)
    return {name: domain.sample() for name, domain in space.items()}


def run_trials(
    plan: Plan,
    space: Space,
    search: Search,
    count: int,
    known: Sequence[tuple[Mapping[str, Any], float | None]],
    unfinished: Sequence[Mapping[str, Any]],
    ended: Callable[[Path], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Run `count` trials inside the current session, the unfinished ones first.

    Args:
        known: settings of earlier trials with their scores, None for a failed one.
        ended: told the folder of every trial that has ended, in this process.

    Raises:
        Interrupted: `stop_requested` came true; unfinished trials go on in a later call.
    """
    from ray import tune

    deadline = time.monotonic() + search.seconds if search.seconds else None
    storage = plan.folder / ".ray"
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, plan=plan, search=search), _resources(plan, search)),
        tune_config=tune.TuneConfig(
            search_alg=_search(plan, space, search, known, unfinished),
            scheduler=_scheduler(search),
            num_samples=count,
            max_concurrent_trials=trials_at_once(plan, search),
            time_budget_s=search.seconds,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=secrets.token_hex(4),
            storage_path=str(storage),
            verbose=0,
            callbacks=[_watch(plan, search, deadline, ended)],
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    outcome: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:
            outcome.append(error)

    # beside the main thread, which stays free to take signals, as in ray_train
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.25)
        if stop_requested():
            raise Interrupted
    shutil.rmtree(storage, ignore_errors=True)
    if outcome:
        raise UserError(f"the sweep failed: {last_line(str(outcome[0]))}") from outcome[0]


def _trial(changes: dict[str, Any], plan: Plan, search: Search) -> None:
    """What runs in a trial's process."""
    from ray import tune

    def told(part: int, scores: dict[str, float]) -> None:
        if search.metric in scores:  # a rung of stage 1 knows fewer scores
            tune.report({"part": part, "objective": search.direction * scores[search.metric], "scores": scores})

    run_trial(plan, changes, told)


def _resources(plan: Plan, search: Search) -> dict[str, float]:
    """Of one trial; processes that it starts for several workers ask for their own."""
    if plan.workers or ray_nodes.kind_of_seat() != "GPU":
        return {"CPU": plan.threads}
    gpus = ray_nodes.seats()  # of all nodes; more trials at a time than these share them
    return {"CPU": plan.threads, "GPU": min(1.0, gpus / (search.max_concurrent or gpus))}


def _search(
    plan: Plan, space: Space, search: Search, known: Sequence[tuple[Mapping[str, Any], float | None]],
    unfinished: Sequence[Mapping[str, Any]],
) -> Any:  # fmt: skip
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    seed = plan.config.seed * 1000 + len(known)  # a sweep that goes on draws other settings
    samplers = {"optuna": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    try:
        distributions = OptunaSearch.convert_search_space(space)
    except ValueError as error:
        raise UserError(f"Optuna cannot search this space: {last_line(str(error))}") from error
    algorithm = OptunaSearch(
        distributions, metric="objective", mode="max", sampler=samplers[search.search](seed=seed),
        points_to_evaluate=[dict(changes) for changes in unfinished],
    )  # fmt: skip
    for changes, score in known:
        value = None if score is None else search.direction * score
        algorithm.add_evaluated_point(dict(changes), value, error=value is None)  # pyright: ignore[reportArgumentType]
    return algorithm


def _scheduler(search: Search) -> Any:
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    if search.scheduler == "none":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="part", metric="objective", mode="max", max_t=RUNGS[-1], grace_period=RUNGS[0],
        reduction_factor=RUNGS[1] / RUNGS[0],
    )  # fmt: skip


def _watch(plan: Plan, search: Search, deadline: float | None, ended: Callable[[Path], None]) -> Any:
    from ray.tune import Callback

    class Watch(Callback):
        """Completes the record of a trial whose process could not, then tells that it has ended."""

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            if deadline is not None and time.monotonic() > deadline:
                self._tell_if_recorded(trial)  # one that was cut off stays unfinished
            else:
                self._complete(trial, STOPPED, "the scheduler saw no promise in it")

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            trace = Path(trial.error_file or "")  # get_error looks where it has not been copied to yet
            self._complete(trial, FAILED, why_it_died(trace.read_text() if trace.is_file() else ""))

        def _complete(self, trial: Any, state: str, reason: str) -> None:
            folder = trial_folder(plan, trial.config)
            record = read_record(folder)
            if record is None or record["state"] == RUNNING:
                now = time.time()
                started = record["started"] if record else now
                scores = (trial.last_result or {}).get("scores")
                write_record(folder, trial.config, started, state, now - started, scores, reason)
            ended(folder)

        def _tell_if_recorded(self, trial: Any) -> None:
            folder = trial_folder(plan, trial.config)
            record = read_record(folder)
            if record and record["state"] != RUNNING:
                ended(folder)

    return Watch()


def why_it_died(trace: str) -> str:
    """One line for a trial whose process wrote none, from Ray's trace."""
    if "low on memory" in trace:
        return "out of memory: Ray ended its process, as the machine had too little left"
    if "actor died" in trace or "worker died" in trace:
        return "its process was killed; by the system if memory ran out"
    return last_line(trace)
