"""A sweep: many trials of settings on the results of one base run, compared without labels.

SWEEP/sweep.json      what is searched, from which settings, by which command
SWEEP/base/           the run that all trials share, up to what they do not change
SWEEP/trials/ID/      trial.json: settings, state, scores; clusters.npy: the clustering
SWEEP/trials.csv      one row per trial, and the same as trials.parquet
SWEEP/best.json       the best configuration, for `fit --config`
SWEEP/report.html     one page

Everything but the base run is made from the trials' folders, and a killed sweep resumes from them.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spice_dist import artifacts
from spice_dist.catalog import PRETEXTS
from spice_dist.config import Config, dotted, override
from spice_dist.data.checksums import publish_sealed, read_sealed
from spice_dist.data.files import require_regular_files
from spice_dist.data.sources import Source
from spice_dist.distributed.worker import LocalWorker, StageCall, usable_cores
from spice_dist.errors import DamagedFile, UserError, plain
from spice_dist.launching import Launch
from spice_dist.methods import spice_self
from spice_dist.objectives import COMBINED, OBJECTIVES, SHOWN
from spice_dist.ownership import owned
from spice_dist.pipeline import fit_until
from spice_dist.stage_records import images_of_run, refuse_changes, stage_record, write_stage_record
from spice_dist.stages import check_settings, pretext_stages, stage_settings
from spice_dist.sweep import ray_tune
from spice_dist.sweep.ray_tune import Round, Search
from spice_dist.sweep.records import FINISHED, RUNNING, Plan, Record, Scores, Settings, complete_record, trial_folder
from spice_dist.sweep.report import Row, settings_line, with_objective
from spice_dist.sweep.results import rows, write_results, write_tables
from spice_dist.sweep.spaces import Ranges, Space, Start, descriptions, read_space, sample, space_file, start_of
from spice_dist.sweep.trials import run_trial
from spice_dist.terminal import Bar, StopSignal

VIEW_EPOCHS = 10  # epochs whose views the trials share, unless the settings say otherwise


@dataclass(frozen=True)
class Place:
    """Where a sweep is kept."""

    folder: Path
    resume: bool = False  # resume the sweep in the folder
    base: Path | None = None  # a run folder whose data, stage 1 and features are taken; None: a new base run


@dataclass(frozen=True)
class Sweep:
    """One call of `tune`."""

    plan: Plan
    source: Source
    space: Space
    search: Search
    launch: Launch
    command: list[str] | None


def tune(
    config: Config, source: Source, space: str, place: Place, search: Search, launch: Launch,
    command: list[str] | None = None,
) -> list[Row]:  # fmt: skip
    """Run a sweep, or go on with it; return its rows, the best first.

    Args:
        space: heads, thresholds, augmentations, pretrain, or a .py file with SPACE and METRIC.
        launch: of the base run; its workers also train stage 1 in the trials of a space that needs it.

    Raises:
        UserError: data, settings, space or folder cannot be used.
        Interrupted: asked to stop; the same call with `resume` continues.
    """
    searched = read_space(space_file(space), launch.address, launch.insecure)
    plan = _plan(place.folder, config, searched.ranges, launch)
    search = replace(search, objective=search.objective or searched.metric)
    sweep = Sweep(plan, source, searched, search, launch, command)
    _check(sweep)
    check_settings(plan.config, source, source.name)
    if place.base is not None:
        _check_base(place.base, sweep)
    with owned(plan.folder):
        require_regular_files(plan.folder)
        _begin(sweep, place.resume)
        if place.base is not None:
            _link_stages(place.base, plan)
        _run_base(sweep)
        try:
            with StopSignal() as stop:
                _run_rounds(sweep, stop)
                stop.check()
        finally:
            trials = write_results(plan.folder, search.objective)
    if any(row["state"] == FINISHED for row in trials) and not with_objective(trials, search.objective):
        raise UserError(
            f"no finished trial has the score {search.objective}; choose by another: --resume --objective ..."
        )
    return trials


def _plan(folder: Path, config: Config, ranges: Ranges, launch: Launch) -> Plan:
    """Return what the trials share.

    Raises:
        UserError: there is no setting of such a name or type, or it cannot be searched.
    """
    start = start_of(ranges)
    config = with_published_stages(config)
    override(config, sample(ranges, config.seed))
    if not start.trains_backbone:
        config = _with_shared_views(config)
    searches_labels = any(name.startswith("reliable.") for name in ranges)
    workers = launch.workers if isinstance(launch.workers, int) else 0
    threads = 1 if launch.threads is None else launch.threads
    return Plan(folder.resolve(), config, start, searches_labels, threads, workers)


def with_published_stages(config: Config) -> Config:
    """Take stages 2 and 3 as published, whose settings trials search, in place of those on the neighbour graph."""
    if config.stage2 != "spice_graph":
        return config
    return override(config, {"stage2": "spice_self", "stage3": "spice_semi"})


def _with_shared_views(config: Config) -> Config:
    """Let views come again after some epochs, so that all trials can read those that the base stored."""
    heads = config.spice_self
    if heads.view_epochs or heads.encodes_anew:
        return config
    return override(config, {"spice_self.view_epochs": min(heads.epochs, VIEW_EPOCHS)})


def objectives_of(plan: Plan) -> list[str]:
    """Return the scores by which the trials of this sweep can be compared."""
    if plan.start is Start.HEADS and not plan.reliable:
        return list(OBJECTIVES)
    # trials have heads on other features, or no heads
    return [name for name in OBJECTIVES if name != "select_loss"]


def _check(sweep: Sweep) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: it names the option and what it can be.
    """
    plan, search, ranges = sweep.plan, sweep.search, sweep.space.ranges
    known = [name for name in objectives_of(plan) if name not in SHOWN] + [COMBINED]
    if search.objective not in known:
        raise UserError(f'--objective is "{search.objective}"; for this space it can be {", ".join(known)}')
    heads = plan.config.spice_self.heads
    if search.objective == "agreement" and heads < 2 and "spice_self.heads" not in ranges and not plan.reliable:
        raise UserError(f"--objective agreement compares the heads of a trial, and spice_self.heads is {heads}")
    if idle := [name for name in ranges if name.split(".")[0] in {*PRETEXTS} - {plan.config.pretext}]:
        raise UserError(
            f'the space searches {idle[0]}, and stage 1 is "{plan.config.pretext}": give another --space, or '
            f"--pretext {idle[0].split('.')[0]}" + " with --backbone scratch" * (plan.config.pretext == "none")
        )
    counts = {"--trials": search.trials, "--max-concurrent": search.max_concurrent, "--threads": plan.threads}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name} is {count}; give 1 or more")
    if search.seconds is not None and not search.seconds > 0:
        raise UserError(f"--time-budget is {search.seconds:g}; give seconds above 0")
    if plan.config.method != "spice":
        raise UserError("a sweep searches the stages of SPICE; leave --method out")
    if search.scheduler == "asha" and (plan.workers or not plan.start.trains_heads):
        raise UserError(
            "--scheduler asha stops trials in the middle of their training: "
            + ("it needs --workers 0" if plan.start.trains_heads else "trials of thresholds have none")
        )


def _check_base(base: Path, sweep: Sweep) -> None:
    """Refuse a run whose stages cannot be taken.

    Raises:
        UserError: they are not finished, or are those of another task.
    """
    if not (stage_record(base, "features") or {}).get("done"):
        raise UserError(f"--base {base} has no features yet: give the folder of a run that is past stage 1")
    config = sweep.plan.config
    settings = stage_settings(config, sweep.source, images_of_run(base, sweep.source))
    remedy = f"give its images, and its settings by --config {base / 'config.json'}, or leave --base out"
    for stage in _shared_stages(config):
        refuse_changes(base, stage, settings[stage], remedy)


def _shared_stages(config: Config) -> list[str]:
    return ["data", *(stage.name for stage in pretext_stages(config)), "features"]


def _begin(sweep: Sweep, resume: bool) -> None:
    """Write sweep.json, or check that the existing one is of this sweep; before the first trial it may change."""
    plan = sweep.plan
    if artifacts.config_file(plan.folder).exists():
        raise UserError(f"{plan.folder} holds a run; give another --out, or --base {plan.folder} to sweep on it")
    path = artifacts.sweep_file(plan.folder)
    contents = {
        "version": 1,
        "space": sweep.space.name,
        "ranges": descriptions(sweep.space.ranges),
        "config": asdict(plan.config),
        "start": plan.start,
        "reliable": plan.reliable,
        "images": images_of_run(plan.base, sweep.source),
        "command": sweep.command,
    }
    contents = json.loads(json.dumps(contents))
    if not path.exists() or not (plan.folder / "trials").exists():
        publish_sealed(path, contents)
        return
    if not resume:
        raise UserError(f"{plan.folder} holds a sweep; go on with it by --resume, or give another --out")
    before = read_sweep(plan.folder)
    for name in ("space", "ranges", "images"):
        if before[name] != contents[name]:
            raise UserError(f"{plan.folder} holds a sweep with other {name}: {before[name]}; give another --out")
    then, now = dotted(before["config"]), dotted(contents["config"])
    changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if changed:
        shown = ", ".join(f"{name} was {then.get(name)}, now {now.get(name)}" for name in changed[:3])
        raise UserError(f"{plan.folder} holds a sweep with other settings: {shown}; give the same, or another --out")


def read_sweep(folder: Path) -> dict[str, Any]:
    """Return the contents of sweep.json.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = artifacts.sweep_file(folder)
    try:
        contents = read_sealed(path)
        names = ("space", "ranges", "config", "start", "reliable", "images", "command")
        return {name: contents[name] for name in names}
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no sweep") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged; give another --out") from error


def _link_stages(base: Path, plan: Plan) -> None:
    """Make the base run of links to the finished stages of another run."""
    plan.base.mkdir(exist_ok=True)
    for name in _shared_stages(plan.config):
        if (base / name).is_dir() and not (plan.base / name).exists():
            (plan.base / name).symlink_to((base / name).resolve())


def _run_base(sweep: Sweep) -> None:
    """Make what the trials share: features, and either the views of stage 2 or its heads."""
    plan, config = sweep.plan, sweep.plan.config
    last = "features" if plan.start.trains_heads else "spice_self"
    launch = replace(sweep.launch, workers=plan.workers, threads=None)
    fit_until(last, config, sweep.source, plan.base, launch, sweep.command)
    if plan.start is not Start.HEADS or not config.spice_self.view_epochs:
        return
    ranges = sweep.space.ranges
    kinds = [kind for kind in ("weak", "strong") if not any(name.startswith(f"spice_self.{kind}.") for name in ranges)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with StopSignal() as stop, Bar("views", stop) as bar:
        worker = LocalWorker(plan.base, "views", device, stop.requested, bar.show)
        store = partial(spice_self.store_views, kinds=kinds)
        StageCall("views", store, config, config.spice_self).run(worker, usable_cores())
    write_stage_record(plan.base, "views", {}, True, 0.0)


def _run_rounds(sweep: Sweep, stop: StopSignal) -> None:
    """Run rounds of trials until there are enough, or a round draws no new settings."""
    plan, search, launch = sweep.plan, sweep.search, sweep.launch
    began = time.monotonic()
    lines = TrialLines(plan.folder, search)

    def on_end(settings: Settings, state: str, reason: str, scores: Scores) -> None:
        record = complete_record(trial_folder(plan, settings), settings, state, reason, scores)
        if record and record.state != RUNNING:
            lines.show(record)
            write_tables(plan.folder, rows(plan.folder))

    missing = search.trials - _num_ended(plan.folder)
    if missing <= 0:
        return
    with ray_tune.session(launch.address, launch.insecure, plan, search):
        while missing > 0:
            left = None if search.seconds is None else search.seconds - (time.monotonic() - began)
            if left is not None and left <= 0:
                return
            trials = rows(plan.folder)
            scored = [(row["settings"], row.get(search.metric)) for row in trials if row["state"] != RUNNING]
            unfinished = [row["settings"] for row in trials if row["state"] == RUNNING]
            this_round = Round(sweep.space.ranges, missing, scored, unfinished, left)
            ray_tune.run_trials(run_trial, plan, search, this_round, on_end, stop.requested)
            before, missing = missing, search.trials - _num_ended(plan.folder)
            if missing == before:
                return


def _num_ended(folder: Path) -> int:
    return sum(row["state"] != RUNNING for row in rows(folder))


class TrialLines:
    """The table in the terminal: a line per trial as it ends, the best so far marked."""

    def __init__(self, folder: Path, search: Search):
        self.folder, self.search = folder, search
        self.best = float("-inf")

    def show(self, record: Record) -> None:
        ended, value = _num_ended(self.folder), record.scores.get(self.search.metric)
        mark = " "
        if record.state == FINISHED and value is not None and self.search.direction * value > self.best:
            self.best, mark = self.search.direction * value, "*"
        score = f"{self.search.metric} {value:8.4f}" if value is not None else record.reason
        line = f"trial {ended:>3}/{self.search.trials} {record.state:<8} {mark} {score} {record.seconds:7.1f} s"
        print(plain(f"{line}  {settings_line(record.settings)}"), file=sys.stderr, flush=True)
