"""One trial of a sweep: the stages that its settings change, on shared results, then scores without labels.

A sweep's base run holds what no trial changes. A trial is a run folder whose unchanged parts are links to the base; it
begins at the first stage that the searched settings change:

pretrain    stage 1, its features, then the heads
heads       the heads, on the base's features; views that are not searched are read from the base
thresholds  the reliable labels of the base's heads, and students that learn from these on the features

The clustering that is scored is that of the head with the lowest loss, or the students' vote. True labels are never
read here.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spice_dist import artifacts
from spice_dist.config import Config, override
from spice_dist.data.files import publish
from spice_dist.distributed.checkpoint import Tensors
from spice_dist.distributed.worker import LocalWorker, StageCall
from spice_dist.errors import UserError, plain
from spice_dist.methods import reliable, spice_self_joint
from spice_dist.methods.features import embed
from spice_dist.methods.stage2 import load_heads
from spice_dist.ownership import owned
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.stages import check_settings, pretext_stages
from spice_dist.sweep.records import (
    FAILED,
    FINISHED,
    RUNNING,
    Plan,
    Record,
    Scores,
    Settings,
    read_record,
    trial_folder,
    write_record,
)
from spice_dist.sweep.scores import Scorer

RUNGS = (3, 9, 27)  # 27ths of a trial's training after which it is scored, and may be stopped by the scheduler
OnRung = Callable[[int, Scores], None]
"""Called at every rung with the 27ths that are done and the scores so far."""


@dataclass(frozen=True)
class Trial:
    """A trial while it runs."""

    plan: Plan
    config: Config  # the plan's with the settings of this trial
    folder: Path
    device: torch.device
    on_rung: OnRung


def run_trial(plan: Plan, settings: Settings, on_rung: OnRung) -> Scores:
    """Run the trial; write trial.json and clusters.npy, (N,), in its folder, and return the scores.

    Raises:
        Exception: what stopped the trial, such as a UserError; the record says why too.
    """
    folder = trial_folder(plan, settings)
    before = read_record(folder)
    if before and before.state == FINISHED:
        on_rung(RUNGS[-1], before.scores)
        return before.scores
    with owned(folder):
        began = time.time()
        spent = before.seconds if before else 0.0
        record = Record(RUNNING, "", before.started if before else began, spent, dict(settings), {})
        write_record(folder, record)
        try:
            config = override(plan.config, settings)
            check_settings(config, artifacts.manifest(plan.base), "the data set")
            link_base(plan, folder)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            scores = _run_stages(Trial(plan, config, folder, device, on_rung))
        # any error makes a row with its reason, and the sweep goes on
        except Exception as error:
            seconds = spent + time.time() - began
            write_record(folder, replace(record, state=FAILED, reason=reason_of(error), seconds=seconds))
            raise
        write_record(folder, replace(record, state=FINISHED, seconds=spent + time.time() - began, scores=scores))
        # the clustering is kept, the weights are large
        for stage in ("spice_self", plan.config.pretext):
            if not (folder / stage).is_symlink():
                shutil.rmtree(folder / stage / "checkpoints", ignore_errors=True)
    on_rung(RUNGS[-1], scores)
    return scores


def reason_of(error: BaseException) -> str:
    """Return one line that says what stopped a trial."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    # torch raises the second on a CPU
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in first:
        return f"out of memory: {first}"
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def link_base(plan: Plan, folder: Path) -> None:
    """Make the trial's folder a run folder: stages that it does not run are relative links to the base."""
    shared = ["data"]
    if not plan.start.trains_backbone:
        shared += [plan.config.pretext, "features", "views"]
    if not plan.start.trains_heads:
        shared += ["spice_self"]
    for name in shared:
        if (plan.base / name).exists() and not (folder / name).is_symlink():
            (folder / name).symlink_to(os.path.relpath(plan.base / name, folder))


def _run_stages(trial: Trial) -> Scores:
    """Run the stages that the settings change and write the clustering; return its scores."""
    plan, config, folder = trial.plan, trial.config, trial.folder
    scorer = Scorer(plan, config, trial.device)
    if plan.start.trains_backbone:
        for row in pretext_stages(config):
            stage = StageCall(row.name, row.train, config, row.settings_in(config))
            if plan.workers:
                _train_on_workers(trial, stage)
            else:
                _train(trial, stage, partial(scorer.backbone_at_rung, folder))
        _train(trial, StageCall("features", embed, config, None))
    if plan.start.trains_heads:
        at_rung = None if plan.start.trains_backbone else partial(scorer.heads_at_rung, folder)
        train = spice_self_joint.loop_of(config.spice_self)
        _train(trial, StageCall("spice_self", train, config, config.spice_self), at_rung)
    features = artifacts.stored_features(folder, scorer.num_images)
    heads, loss = load_heads(folder)
    clusters, scores = scorer.of_heads(folder, heads, loss, features)
    if plan.reliable:
        _train(trial, StageCall("reliable", reliable.select, config, config.reliable))
        labels = artifacts.reliable_labels(folder)[: scorer.num_images]
        if not (labels != UNRELIABLE).any():
            raise UserError(artifacts.reliable_summary(folder)["advice"])
        clusters, scores = scorer.of_labels(labels, features)
    with publish(folder / "clusters.npy") as file:
        np.save(file, clusters)
    return scores


def _train(trial: Trial, stage: StageCall, score: Callable[[Tensors], Scores] | None = None) -> None:
    """Run a stage in this process.

    Args:
        score: of the state at a rung in the middle of the training; None: such a rung is not scored.
    """

    def on_report(step: int, total: int, loss: Tensor, save: Callable[[], Tensors]) -> None:
        # the last rung is the end of the trial, not of this stage
        for rung in RUNGS[:-1]:
            if score and step == max(1, total * rung // RUNGS[-1]):
                trial.on_rung(rung, score(save()))

    worker = LocalWorker(trial.folder, stage.name, trial.device, on_report=on_report)
    stage.run(worker, trial.plan.threads)


def _train_on_workers(trial: Trial, stage: StageCall) -> None:
    from spice_dist.distributed import ray_elastic, ray_train

    def message(line: str) -> None:
        print(plain(line), file=sys.stderr)

    job = ray_train.Job((stage,), trial.folder, trial.plan.threads, lambda: False, lambda _progress: None, message)
    ray_elastic.train(job, (trial.plan.workers,))
