"""Propose settings and run trials in parallel by Ray Tune, which only schedules: results are in the trials' folders.

Ray's own state of a sweep is deleted: a resumed sweep gives a new search the scores of the finished trials.
"""

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spice_dist.distributed import ray_nodes, ray_train
from spice_dist.distributed.ray_train import last_line
from spice_dist.distributed.worker import usable_cores
from spice_dist.errors import Interrupted, UserError
from spice_dist.objectives import COMBINED, OBJECTIVES
from spice_dist.sweep.records import FAILED, RUNNING, STOPPED, Plan, Scores, Settings
from spice_dist.sweep.spaces import Ranges
from spice_dist.sweep.trials import RUNGS, OnRung

RunTrial = Callable[[Plan, Settings, OnRung], Scores]
"""Runs one trial in the process in which it is called, and calls back at its rungs."""
OnEnd = Callable[[Settings, str, str, Scores], None]
"""Called in this process with (settings, state, reason, scores) of a trial that has ended, as far as Ray knows them.

The state is RUNNING if the trial was cut off and has to go on in a later call.
"""


@dataclass(frozen=True)
class Search:
    """How a sweep looks for settings, and by which score it chooses."""

    trials: int  # in all, those of earlier calls included
    objective: str = ""  # of OBJECTIVES but not SHOWN, or COMBINED; empty: METRIC of the space
    sampler: str = "optuna"  # or random
    scheduler: str = "none"  # or asha
    max_concurrent: int | None = None  # trials at a time; None: as many as cores, or GPUs, have room for
    seconds: float | None = None  # after which trials stop

    @property
    def metric(self) -> str:
        """Return the score that Optuna and ASHA follow: one of a trial alone, without comparison with others."""
        return "generalization" if self.objective in ("", COMBINED, "consensus") else self.objective

    @property
    def direction(self) -> int:
        """Return +1 if a high metric is good, -1 if a low one is."""
        return OBJECTIVES[self.metric]


@dataclass(frozen=True)
class Round:
    """Trials to run now, and the scores of earlier ones for the search."""

    ranges: Ranges
    count: int
    scored: Sequence[tuple[Settings, float | None]]  # trials that have ended with their metric, None without one
    unfinished: Sequence[Settings]  # of trials that were cut off: they run first
    seconds: float | None = None  # after which trials stop


@contextmanager
def session(address: str | None, insecure: bool, plan: Plan, search: Search) -> Iterator[None]:
    """Hold a Ray session with room for the trials.

    Raises:
        UserError: a trial fits no node of the cluster, or it cannot be used.
    """
    # a trial waits while its workers train
    busy = plan.threads * max(1, plan.workers)
    trials = search.max_concurrent or max(1, usable_cores() // busy)
    with ray_train.session(address, num_cpus=trials * (plan.threads + plan.workers), insecure=insecure):
        require_room(plan, search)
        if address:
            ray_nodes.require_shared(plan.folder)
        yield


def require_room(plan: Plan, search: Search) -> None:
    """Refuse a trial that would wait for ever.

    Raises:
        UserError: no node of the current session holds it, or all together have too few seats.
    """
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
    """Return how many trials Tune may run at a time in the current session; None: as many as Ray has room for.

    Trials that start workers leave room for these: Ray would give it to more trials, and all would wait for ever.
    """
    if not plan.workers:
        return search.max_concurrent
    most = _trials_with_workers(plan)
    return min(search.max_concurrent or most, most)


def _trials_with_workers(plan: Plan) -> int:
    """Return how many trials have room beside each other, their workers included."""
    by_cpu = sum(ray_nodes.amounts("CPU")) // (plan.threads + plan.workers)
    return min(by_cpu, ray_nodes.seats() // plan.workers)


def run_trials(
    run_trial: RunTrial,
    plan: Plan,
    search: Search,
    this_round: Round,
    on_end: OnEnd,
    stop_requested: Callable[[], bool],
) -> None:
    """Run the trials of a round inside the current session.

    Raises:
        Interrupted: `stop_requested` came true; unfinished trials go on in a later call.
    """
    from ray import tune

    deadline = time.monotonic() + this_round.seconds if this_round.seconds else None
    storage = plan.folder / ".ray"
    trial = tune.with_parameters(_trial, run_trial=run_trial, plan=plan, search=search)
    tuner = tune.Tuner(
        tune.with_resources(trial, _resources(plan, search)),
        tune_config=tune.TuneConfig(
            search_alg=_search_algorithm(search, this_round, plan.config.seed),
            scheduler=_scheduler(search),
            num_samples=this_round.count,
            max_concurrent_trials=trials_at_once(plan, search),
            time_budget_s=this_round.seconds,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=secrets.token_hex(4),
            storage_path=str(storage),
            verbose=0,
            callbacks=[_end_callback(deadline, on_end)],
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:
            errors.append(error)

    # not in the main thread, which takes signals, as in ray_train
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.25)
        if stop_requested():
            raise Interrupted
    shutil.rmtree(storage, ignore_errors=True)
    if errors:
        raise UserError(f"the sweep failed: {last_line(str(errors[0]))}") from errors[0]


def _trial(settings: dict[str, Any], run_trial: RunTrial, plan: Plan, search: Search) -> None:
    """Run one trial in the process that Ray gave it."""
    from ray import tune

    def on_rung(rung: int, scores: Scores) -> None:
        # a rung of stage 1 has fewer scores
        if search.metric in scores:
            tune.report({"rung": rung, "objective": search.direction * scores[search.metric], "scores": scores})

    run_trial(plan, settings, on_rung)


def _resources(plan: Plan, search: Search) -> dict[str, float]:
    """Return what Ray reserves for one trial; processes that it starts for several workers ask for their own."""
    if plan.workers or ray_nodes.kind_of_seat() != "GPU":
        return {"CPU": plan.threads}
    gpus = ray_nodes.seats()  # of all nodes; more trials at a time than these share them
    return {"CPU": plan.threads, "GPU": min(1.0, gpus / (search.max_concurrent or gpus))}


def _search_algorithm(search: Search, this_round: Round, seed: int) -> Any:
    """Return the search that proposes the settings of the next trial."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    # a resumed sweep draws other settings
    seed = seed * 1000 + len(this_round.scored)
    samplers = {"optuna": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    try:
        distributions = OptunaSearch.convert_search_space(this_round.ranges)
    except ValueError as error:
        raise UserError(f"Optuna cannot search this space: {last_line(str(error))}") from error
    algorithm = OptunaSearch(
        distributions, metric="objective", mode="max", sampler=samplers[search.sampler](seed=seed),
        points_to_evaluate=[dict(settings) for settings in this_round.unfinished],
    )  # fmt: skip
    for settings, score in this_round.scored:
        value = None if score is None else search.direction * score
        algorithm.add_evaluated_point(dict(settings), value, error=value is None)  # pyright: ignore[reportArgumentType]
    return algorithm


def _scheduler(search: Search) -> Any:
    """Return the scheduler that may stop a trial at a rung."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    if search.scheduler == "none":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="rung", metric="objective", mode="max", max_t=RUNGS[-1], grace_period=RUNGS[0],
        reduction_factor=RUNGS[1] / RUNGS[0],
    )  # fmt: skip


def _end_callback(deadline: float | None, on_end: OnEnd) -> Any:
    """Return Ray's callback that passes on the end of every trial."""
    from ray.tune import Callback

    class EndCallback(Callback):
        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            # a trial that finished has written so itself; any other was ended by the scheduler, or by the time budget
            if deadline is not None and time.monotonic() > deadline:
                self._end(trial, RUNNING, "")
            else:
                self._end(trial, STOPPED, "stopped early by the scheduler")

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            # Ray's get_error reads a copy that does not exist yet
            trace = Path(trial.error_file or "")
            self._end(trial, FAILED, why_it_died(trace.read_text() if trace.is_file() else ""))

        def _end(self, trial: Any, state: str, reason: str) -> None:
            on_end(trial.config, state, reason, (trial.last_result or {}).get("scores") or {})

    return EndCallback()


def why_it_died(trace: str) -> str:
    """Return one line from Ray's trace, for a trial whose process wrote none."""
    if "low on memory" in trace:
        return "out of memory: Ray ended its process, as the machine had too little left"
    if "actor died" in trace or "worker died" in trace:
        return "its process was killed; by the system if memory ran out"
    return last_line(trace)
