"""A sweep: many trials of settings on what one base run left, compared without labels.

SWEEP/sweep.json      what is searched, from which settings, by which command
SWEEP/base/           the run that all trials share, up to what they do not change
SWEEP/trials/ID/      trial.json: settings, state, scores; clusters.npy: the clustering
SWEEP/trials.csv      one row per trial, and the same as trials.parquet
SWEEP/best.json       the best configuration, for `fit --config`
SWEEP/report.html     one page

The trials' folders are what counts: everything else is made from them, and a sweep that was killed goes on from them.
"""

import csv
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spice_dist
from spice_dist.config import Config, dotted, override, read_config
from spice_dist.data.files import csv_cell, publish, publish_json
from spice_dist.data.sources import Source
from spice_dist.distributed import ray_tune
from spice_dist.distributed.ray_tune import Search, Space
from spice_dist.distributed.worker import LocalWorker, Stage, usable_cores
from spice_dist.errors import DamagedFile, UserError
from spice_dist.evaluate import clustering_accuracy
from spice_dist.launching import Launch
from spice_dist.methods import spice_self
from spice_dist.objectives import OBJECTIVES, SHOWN, combined, consensus
from spice_dist.pipeline import check_settings, fit_until, images_of, pretext_stages, stage_settings
from spice_dist.report.sweep import settings_line, with_objective, write_sweep_report
from spice_dist.run_folder import owned, refuse_changes, stage_record
from spice_dist.task import PRETEXTS
from spice_dist.terminal import Bar, StopSignal
from spice_dist.trials import FINISHED, RUNNING, Plan, read_record, start_of

COMBINED = "combined"  # the mean place by several objectives
VIEW_EPOCHS = 10  # epochs whose views the trials share, unless the settings say otherwise
STATES = ("number", "trial", "state", "reason", "seconds")
Row = dict[str, Any]


def tune(
    config: Config,
    source: Source,
    space: str,
    out: Path,
    search: Search,
    launch: Launch,
    *,
    objective: str | None = None,
    resume: bool = False,
    base: Path | None = None,
    command: list[str] | None = None,
) -> list[Row]:
    """Run a sweep in the folder `out`, or go on with it; returns its rows, the best first.

    Args:
        space: heads, thresholds, augmentations, pretrain, or a .py file with SPACE and METRIC.
        search: its metric and direction are those of the objective, and need not be given.
        launch: of the base run; its workers also train stage 1 in the trials of a space that needs it.
        objective: the score that chooses, of `objectives.OBJECTIVES` but those of SHOWN, or "combined"; None: METRIC
            of the space.
        base: a run folder whose data, stage 1 and features are taken in place of a new base run.

    Raises:
        UserError: data, settings, space or folder cannot be used.
        Interrupted: asked to stop; the same call with `resume` goes on.
    """
    ranges, metric = ray_tune.read_space(space_file(space), launch.address, launch.insecure)
    start = start_of(ranges)
    config = with_published_stages(config)
    override(config, ray_tune.values_of(ranges, config.seed))  # a wrong name is told at once
    if start != "pretrain":
        config = _with_shared_views(config)
    searches_labels = any(name.startswith("reliable.") for name in ranges)
    workers = launch.workers if isinstance(launch.workers, int) else 0
    threads = 1 if launch.threads is None else launch.threads
    plan = Plan(out.resolve(), config, start, searches_labels, threads, workers)
    objective = objective or metric
    _check(plan, search, objective, ranges)
    check_settings(config, source, source.name)
    search = replace(search, metric=_guide(objective), direction=OBJECTIVES[_guide(objective)])
    if base is not None:
        _check_base(base, config, source)
    with owned(plan.folder):
        _begin(plan, source, space, ranges, resume, command)
        if base is not None:
            _share(base, plan)
        _run_base(plan, source, ranges, replace(launch, workers=workers, threads=None), command)
        try:
            with StopSignal() as stop:
                _run_trials(plan, ranges, search, launch, stop)
                stop.check()
        finally:
            found = write_results(plan.folder, objective)
    if any(row["state"] == FINISHED for row in found) and not with_objective(found, objective):
        raise UserError(f"no finished trial has the score {objective}; choose by another: --resume --objective ...")
    return found


def space_file(name: str) -> Path:
    """The file of a search space: one of ours by its name, in a checkout or an installation, or the user's own."""
    package = Path(spice_dist.__file__).parent
    ours = [folder / f"tune_spaces/{name}.py" for folder in (package, package.parent)]
    return next((path for path in ours if path.is_file()), Path(name))


def objectives_of(plan: Plan) -> list[str]:
    """The scores by which the trials of this sweep can be compared."""
    if plan.start == "heads" and not plan.reliable:
        return list(OBJECTIVES)
    return [name for name in OBJECTIVES if name != "select_loss"]  # heads of other features, or no heads


def _guide(objective: str) -> str:
    """The score that Optuna and ASHA follow: one that a trial has alone, not by comparison with the others."""
    return "generalization" if objective in (COMBINED, "consensus") else objective


def with_published_stages(config: Config) -> Config:
    """Stages 2 and 3 as published, whose settings trials search, in the place of those on the neighbour graph."""
    if config.stage2 != "spice_graph":
        return config
    return override(config, {"stage2": "spice_self", "stage3": "spice_semi"})


def _with_shared_views(config: Config) -> Config:
    """Views that come again after some epochs, so that all trials can read those that the base stored."""
    own = config.spice_self
    if own.view_epochs or own.encodes_anew:
        return config
    return override(config, {"spice_self.view_epochs": min(own.epochs, VIEW_EPOCHS)})


def _check(plan: Plan, search: Search, objective: str, ranges: Space) -> None:
    known = [name for name in objectives_of(plan) if name not in SHOWN] + [COMBINED]
    if objective not in known:
        raise UserError(f'--objective is "{objective}"; for this space it can be {", ".join(known)}')
    heads = plan.config.spice_self.heads
    if objective == "agreement" and heads < 2 and "spice_self.heads" not in ranges and not plan.reliable:
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
    if search.scheduler == "asha" and (plan.start == "thresholds" or plan.workers):
        raise UserError(
            "--scheduler asha stops trials in the middle of their training: "
            + ("trials of thresholds have none" if plan.start == "thresholds" else "it needs --workers 0")
        )


def _check_base(base: Path, config: Config, source: Source) -> None:
    """UserError if the stages that are taken from this run are not finished, or are those of another task."""
    if not (stage_record(base, "features") or {}).get("done"):
        raise UserError(f"--base {base} has no features yet: give the folder of a run that is past stage 1")
    settings = stage_settings(config, source)
    remedy = f"give its images, and its settings by --config {base / 'config.json'}, or leave --base out"
    for stage in _shared_stages(config):
        refuse_changes(base, stage, settings[stage], remedy)


def _shared_stages(config: Config) -> list[str]:
    return ["data", *(name for name, _, _ in pretext_stages(config)), "features"]


def _begin(
    plan: Plan, source: Source, space: str, ranges: Space, resume: bool, command: list[str] | None
) -> None:  # fmt: skip
    """Write sweep.json, or see that the one that is there is of this sweep: one without a trial yet may change."""
    if (plan.folder / "config.json").exists():
        raise UserError(f"{plan.folder} holds a run; give another --out, or --base {plan.folder} to sweep on it")
    path = plan.folder / "sweep.json"
    about = {
        "version": 1,
        "space": Path(space).stem,
        "ranges": ray_tune.texts(ranges),
        "config": asdict(plan.config),
        "start": plan.start,
        "reliable": plan.reliable,
        "images": images_of(source),
        "command": command,
    }
    about = json.loads(json.dumps(about))
    if not path.exists() or not (plan.folder / "trials").exists():
        publish_json(path, about)
        return
    if not resume:
        raise UserError(f"{plan.folder} holds a sweep; go on with it by --resume, or give another --out")
    before = read_sweep(plan.folder)
    for name in ("space", "ranges", "images"):
        if before[name] != about[name]:
            raise UserError(f"{plan.folder} holds a sweep with other {name}: {before[name]}; give another --out")
    then, now = dotted(before["config"]), dotted(about["config"])
    changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if changed:
        shown = ", ".join(f"{name} was {then.get(name)}, now {now.get(name)}" for name in changed[:3])
        raise UserError(f"{plan.folder} holds a sweep with other settings: {shown}; give the same, or another --out")


def _share(base: Path, plan: Plan) -> None:
    """Make the base run of links to the finished stages of another run."""
    plan.base.mkdir(exist_ok=True)
    for name in _shared_stages(plan.config):
        if (base / name).is_dir() and not (plan.base / name).exists():
            (plan.base / name).symlink_to((base / name).resolve())


def _run_base(plan: Plan, source: Source, ranges: Space, launch: Launch, command: list[str] | None) -> None:
    """What the trials share: features, and either the views of stage 2 or its heads."""
    last = "spice_self" if plan.start == "thresholds" else "features"
    fit_until(last, plan.config, source, plan.base, launch, command)
    own = plan.config.spice_self
    kinds = [kind for kind in ("weak", "strong") if not any(name.startswith(f"spice_self.{kind}.") for name in ranges)]
    if plan.start != "heads" or not own.view_epochs:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with StopSignal() as stop, Bar("views", stop) as bar:
        worker = LocalWorker(plan.base, "views", device, stop.requested, bar.show)
        store = partial(spice_self.store_views, kinds=kinds)
        Stage("views", store, plan.config, own).run(worker, usable_cores())


def _run_trials(plan: Plan, ranges: Space, search: Search, launch: Launch, stop: StopSignal) -> None:
    """Rounds of trials until there are enough, or a round finds no settings that are new."""
    began = time.monotonic()
    shown = Progress(plan.folder, search)

    def ended(folder: Path) -> None:
        shown.show(folder)
        write_tables(plan.folder, rows(plan.folder))

    missing = search.trials - len(_ended(plan.folder))
    if missing <= 0:
        return
    with ray_tune.session(launch.address, launch.insecure, plan, search):
        while missing > 0:
            left = None if search.seconds is None else search.seconds - (time.monotonic() - began)
            if left is not None and left <= 0:
                return
            found = rows(plan.folder)
            known = [(_settings(row), row.get(search.metric)) for row in found if row["state"] != RUNNING]
            unfinished = [_settings(row) for row in found if row["state"] == RUNNING]
            this = replace(search, seconds=left)
            ray_tune.run_trials(plan, ranges, this, missing, known, unfinished, ended, stop.requested)
            before, missing = missing, search.trials - len(_ended(plan.folder))
            if missing == before:
                return


class Progress:
    """The table in the terminal: a line per trial as it ends, the best so far marked."""

    def __init__(self, folder: Path, search: Search):
        self.folder, self.search = folder, search
        self.best = float("-inf")

    def show(self, folder: Path) -> None:
        record = read_record(folder)
        if record is None:
            return
        done, value = len(_ended(self.folder)), record["scores"].get(self.search.metric)
        mark = " "
        if record["state"] == FINISHED and value is not None and self.search.direction * value > self.best:
            self.best, mark = self.search.direction * value, "*"
        score = f"{self.search.metric} {value:8.4f}" if value is not None else record["reason"]
        line = f"trial {done:>3}/{self.search.trials} {record['state']:<8} {mark} {score} {record['seconds']:7.1f} s"
        print(f"{line}  {settings_line(record['settings'])}", file=sys.stderr, flush=True)


def _settings(row: Row) -> dict[str, Any]:
    return row["settings"]


def _ended(folder: Path) -> list[Row]:
    return [row for row in rows(folder) if row["state"] != RUNNING]


def rows(folder: Path) -> list[Row]:
    """What is known of every trial, in the order in which they began: its record, with the scores among it."""
    found = []
    for trial in (folder / "trials").glob("*"):
        if record := read_record(trial):
            scores = record.pop("scores")
            found.append({"trial": trial.name, **record, **scores})
    found.sort(key=lambda row: (row["started"], row["trial"]))
    return [{"number": number, **row} for number, row in enumerate(found)]


def best_first(found: Sequence[Row], objective: str) -> list[Row]:
    """Finished trials by the objective, then the others as they came."""
    finished = [row for row in found if row["state"] == FINISHED]
    others = [row for row in found if row["state"] != FINISHED]
    if objective == COMBINED:
        values = combined(finished).tolist() if finished else []
    else:
        values = [OBJECTIVES[objective] * row.get(objective, float("-inf")) for row in finished]
    order = sorted(range(len(finished)), key=lambda place: (-values[place], place))
    return [finished[place] for place in order] + others


def scored(folder: Path, found: Sequence[Row]) -> list[Row]:
    """The rows with the ACC of each clustering beside, where there are true labels: for tables only."""
    with_accuracy = []
    for row in found:
        clusters = folder / "trials" / row["trial"] / "clusters.npy"
        accuracy = clustering_accuracy(folder / "base", np.load(clusters)) if clusters.exists() else None
        with_accuracy.append(row if accuracy is None else {**row, "acc": accuracy})
    return with_accuracy


def write_results(folder: Path, objective: str) -> list[Row]:
    """Leaves trials.csv, trials.parquet, report.html, and best.json if a finished trial has the objective.

    Returns the rows, the best first.
    """
    found = write_tables(folder, with_consensus(folder, rows(folder)))
    ordered = best_first(found, objective)
    if comparable := with_objective(ordered, objective):
        best = comparable[0]
        config = override(config_of(folder), best["settings"])
        about = {"version": 1, "trial": best["trial"], "objective": objective, "config": asdict(config)}
        publish_json(folder / "best.json", about)
    else:
        (folder / "best.json").unlink(missing_ok=True)  # an earlier call's, by another objective
    write_sweep_report(folder, found, ordered, objective)
    return ordered


def with_consensus(folder: Path, found: Sequence[Row]) -> list[Row]:
    """The rows with what only all trials together can tell: how far each agrees with the others."""
    finished = [row["trial"] for row in found if row["state"] == FINISHED]
    if len(finished) < 2:
        return list(found)
    clusterings = np.stack([np.load(folder / "trials" / trial / "clusters.npy") for trial in finished])
    known = dict(zip(finished, consensus(clusterings).tolist(), strict=True))
    return [{**row, "consensus": known[row["trial"]]} if row["trial"] in known else row for row in found]


def write_tables(folder: Path, found: Sequence[Row]) -> list[Row]:
    """Leaves trials.csv and trials.parquet of these rows; returns them with their ACC, where there are true labels."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    found = scored(folder, found)
    flat = [_flat(row) for row in found]
    names = list(dict.fromkeys(name for row in flat for name in row))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(names)
    for row in flat:
        writer.writerow([csv_cell(value) if isinstance(value := row.get(name, ""), str) else value for name in names])
    with publish(folder / "trials.csv") as file:
        file.write(table.getvalue().encode())
    columns = {name: pa.array(_column([row.get(name) for row in flat])) for name in names}
    with publish(folder / "trials.parquet") as file:
        write_table(pa.table(columns), file)
    return found


def _flat(row: Row) -> Row:
    about = {name: row[name] for name in STATES}
    scores = {name: value for name, value in row.items() if name not in (*STATES, "settings", "started")}
    return {**about, **row["settings"], **scores}


def _column(values: list[Any]) -> list[Any]:
    """Values of one type, as a column must hold: what is not, as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) <= 1:
        return values
    return [None if value is None else str(value) for value in values]


def read_sweep(folder: Path) -> dict[str, Any]:
    """The contents of sweep.json. UserError if there is none, or it is damaged."""
    path = folder / "sweep.json"
    try:
        about = json.loads(path.read_bytes())
        return {name: about[name] for name in ("space", "ranges", "config", "start", "reliable", "images", "command")}
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no sweep") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged; give another --out") from error


def config_of(folder: Path) -> Config:
    """What the trials of a sweep change."""
    return read_config(folder / "sweep.json")
