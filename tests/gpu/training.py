"""Parts 3 and 4: minutes of training on CIFAR-10, with what they reach.

`cluster` trains stage 1 for a planned time, then stages 2 and 3 from what it has left. `labels` trains stage 3 from
given reliable labels and tells the test accuracy by the minute. A plan is made once, from the time of a step, so that
learning rates fall as they should; a call whose time ends saves, and the next one goes on.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spice_dist import artifacts, metrics
from spice_dist.clustering import scored_images
from spice_dist.config import Config, flatten, override
from spice_dist.data.dataset import prepare
from spice_dist.distributed import checkpoint
from spice_dist.distributed.checkpoint import Tensors
from spice_dist.distributed.worker import LocalWorker, StageCall, Storage, usable_cores
from spice_dist.errors import Interrupted, UserError
from spice_dist.inference import outputs
from spice_dist.methods import spice_semi
from spice_dist.methods.plumbing import open_run_dataset, place
from spice_dist.models.heads import Network
from spice_dist.probes import knn_accuracy_leave_one_out
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.recipes import cifar10, cifar10_short
from spice_dist.stages import TABLE, result_of
from spice_dist.task import Task
from tests.gpu import speed
from tests.gpu.context import Context
from tests.gpu.results import OutOfTime
from tests.methods.conftest import SMALL

CLUSTER, LABELS = "cluster", "labels"
STAGE1_MINUTES, STAGE3_MINUTES, LABELS_MINUTES = 5.0, 1.5, 8.0
TINY_MINUTES = 0.01
ROWS = {row.name: row for row in TABLE}


def cluster(context: Context) -> None:
    """Train stages 1, 2 and 3, and score each."""
    context.require_time()
    folder = context.folder / "runs" / CLUSTER
    config = SMALL if context.tiny else cifar10_short()
    manifest = prepare(context.source(), config.data, artifacts.data(folder))
    at_most = {"moco.queue": manifest.training // 2, "spice_self.epochs": 10}
    config = override(config, {name: min(flatten(config)[name], most) for name, most in at_most.items()})
    steps_of_epoch = manifest.training // config.moco.batch
    epochs = planned(context, "moco", STAGE1_MINUTES, steps_of_epoch)
    steps = planned(context, "spice_semi", STAGE3_MINUTES)
    config = override(config, {"moco.epochs": epochs, "spice_semi.steps": steps})
    for stage in ("moco", "features", "spice_self", "reliable", "spice_semi"):
        name = f"{stage} of {epochs} epochs of stage 1"
        if is_done(folder, stage) and context.results.row(CLUSTER, name):
            continue
        with context.results.measured(CLUSTER, name) as numbers:
            train(context, config, folder, stage)
            if stage == "features":
                numbers["knn_accuracy"] = knn_of_features(context, folder)
            elif stage == "reliable":
                numbers |= reliable_numbers(folder)
            elif stage in ("spice_self", "spice_semi"):
                numbers |= scores_after(context, config, folder, stage)
        if not context.results.row(CLUSTER, name):
            raise UserError(f"{stage} failed, so that the stages after it cannot begin")


def from_labels(context: Context) -> None:
    """Train stage 3 from reliable labels, and score its averaged network each minute."""
    folder = context.folder / "runs" / LABELS
    config = SMALL if context.tiny else cifar10()
    given = reliable_labels(context)
    context.require_time()
    manifest = prepare(context.source("split"), config.data, artifacts.data(folder))
    if len(given) > manifest.n or given.max() >= config.clusters:
        raise UserError(
            f"{context.labels} holds {len(given):,} labels up to {given.max()}; the {manifest.n:,} images take as many "
            f"or fewer, below {config.clusters}"
        )
    labels = np.full(manifest.n, UNRELIABLE)
    labels[: len(given)] = np.where(given < 0, UNRELIABLE, given)
    artifacts.reliable_labels_file(folder).parent.mkdir(exist_ok=True)
    np.save(artifacts.reliable_labels_file(folder), labels)

    steps = planned(context, "spice_semi", LABELS_MINUTES)
    config = override(config, {"spice_semi.steps": steps})
    scored = scored_images(manifest) if manifest.held_out else np.flatnonzero(labels == UNRELIABLE)
    accuracy = by_the_minute(context, config, folder, scored, steps)
    with context.results.measured(LABELS, f"{steps} steps") as numbers:
        train(context, config, folder, "spice_semi", accuracy)
        task = spice_semi.network_task(config, config.spice_semi)
        net = spice_semi.trained_network(task, config.spice_semi, folder)
        numbers |= {"labels": int((labels != UNRELIABLE).sum()), "images": len(scored)}
        numbers["accuracy"] = accuracy_of(context, task, net, folder, scored)


def planned(context: Context, stage: str, minutes: float, steps_of_unit: int = 1) -> int:
    """Return how many steps of a stage, or epochs of so many, take these minutes; the same in every later call."""
    minutes = TINY_MINUTES if context.tiny else minutes
    name = f"{stage} in {minutes:g} minutes"
    if name not in context.results.plans:
        row = context.results.row(speed.NAME, stage) or speed.measured(context, stage)
        context.results.plans[name] = max(2, int(60e3 * minutes / row["step_ms"] / steps_of_unit))
        context.results.write()
    return context.results.plans[name]


def train(
    context: Context, config: Config, folder: Path, stage: str,
    on_report: Callable[[int, int, Tensor, Callable[[], Tensors]], None] = lambda *_: None,
) -> None:  # fmt: skip
    """Run a stage of the run, or go on with it, unless it is done; OutOfTime if it has saved and stopped."""
    context.require_time()
    if is_done(folder, stage):
        return
    row = ROWS[stage]
    worker = LocalWorker(
        folder, stage, context.device, context.out_of_time, storage=Storage(30), on_report=on_report
    )  # fmt: skip
    try:
        StageCall(stage, row.train, config, row.settings_in(config)).run(worker, usable_cores())
    except Interrupted:
        raise OutOfTime from None


def is_done(folder: Path, stage: str) -> bool:
    """Tell whether a stage has left its result."""
    if stage in ("features", "reliable"):
        file = artifacts.features_file(folder) if stage == "features" else artifacts.reliable_labels_file(folder)
        return file.exists()
    saved = checkpoint.newest(folder / stage / "checkpoints")
    return saved is not None and saved.step == saved.state["total"]


# ---------------------------------------------------------------- scores


def knn_of_features(context: Context, folder: Path) -> float:
    features = torch.from_numpy(artifacts.features(folder)).to(context.device)
    labels = artifacts.true_labels(folder)
    assert labels is not None
    return knn_accuracy_leave_one_out(features, labels)


def reliable_numbers(folder: Path) -> dict[str, float]:
    labels, y_true = artifacts.reliable_labels(folder), artifacts.true_labels(folder)
    assert y_true is not None
    chosen = labels != UNRELIABLE
    return {"labels": int(chosen.sum()), "accuracy": metrics.accuracy(y_true[chosen], labels[chosen])}


def scores_after(context: Context, config: Config, folder: Path, stage: str) -> dict[str, float]:
    """Score the network that a stage has left, on all clustered images."""
    clustering = result_of(config)(folder, context.device, lambda done, total: None, stage)
    everything = np.arange(artifacts.manifest(folder).clustered)
    found = predicted(context, clustering.task, clustering.net, folder, everything)
    y_true = artifacts.true_labels(folder)
    assert y_true is not None
    return {name: value for name, value in metrics.scores(y_true[everything], found).items() if name in ("acc", "nmi")}


def accuracy_of(context: Context, task: Task, net: Network, folder: Path, index: np.ndarray) -> float:
    y_true = artifacts.true_labels(folder)
    assert y_true is not None
    return metrics.accuracy(y_true[index], predicted(context, task, net, folder, index))


def predicted(context: Context, task: Task, net: Network, folder: Path, index: np.ndarray) -> np.ndarray:
    images, _ = open_run_dataset(task, folder, context.device)
    with closing(images):
        chunks = outputs(place(net, context.device), images, index, task.backbone.statistics, precision=task.precision)
        return torch.cat([logits.argmax(1) for logits in chunks]).cpu().numpy()


def reliable_labels(context: Context) -> np.ndarray:
    if context.labels is None:
        raise UserError("there are no labels to start from; give --labels FILE.npy, or pack them")
    return np.load(context.labels, allow_pickle=False).astype(np.int64)


def by_the_minute(
    context: Context, config: Config, folder: Path, scored: np.ndarray, steps: int
) -> Callable[[int, int, Tensor, Callable[[], Tensors]], None]:
    """Make the function that is told of every step, and adds a row for each minute of training."""
    task = spice_semi.network_task(config, config.spice_semi)
    minute = LABELS_MINUTES if not context.tiny else 2.0
    due = {round(steps * number / minute): number for number in range(1, int(minute) + 1)}

    def told(step: int, total: int, loss: Tensor, save: Callable[[], Tensors]) -> None:
        if step not in due:
            return
        with context.results.measured(LABELS, f"minute {due[step]} of {minute:g}") as numbers:
            net = spice_semi.new_network(task, replace(config.spice_semi, init="scratch"), folder)
            net.load_state_dict(save()["ema"])
            numbers |= {"step": step, "accuracy": accuracy_of(context, task, net, folder, scored)}

    return told
