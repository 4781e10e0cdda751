"""Baselines that use true labels (SPICE's Tables III to V): the loop of stage 3 on n given labels of each class.

`--method fixmatch` is FixMatch (Sohn et al. 2020): true labels take the place of SPICE's reliable labels. `--method
supervised` learns from the given images alone, `spice_semi.ratio` = 0: cross-entropy on weak views. Neither has a stage
1 or 2. Scores are computed on images whose labels were not given.

Beside evaluate.py and probes.py this is the only file that reads true labels. It reads all of them to draw n of each
class. Training gets the labels of the drawn images only.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from spice_dist import artifacts
from spice_dist.clustering import Clustering
from spice_dist.data.files import Progress, publish
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.inference import reduced
from spice_dist.methods.spice_semi import SpiceSemiConfig, network_task, trained_network
from spice_dist.models.backbone import unit
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.settings import check_ranges, setting
from spice_dist.task import Task

DRAW = 50  # stream of random numbers


@dataclass(frozen=True)
class GivenLabelsConfig:
    per_class: int = setting(
        4,
        "n, labelled images of each class, drawn by the seed; 0: all labels, where --split split holds images out",
        least=0,
        remedy="give 1 or more, or 0 for all labels",
    )


def give(task: Task, config: GivenLabelsConfig, worker: Worker) -> None:
    """Write `given_labels/labels.npy`, (N,) int64: the class of the images whose labels are given, -100 elsewhere.

    Raises:
        UserError: the data has no such labels.
    """
    manifest = artifacts.manifest(worker.run)
    labels = artifacts.true_labels(worker.run)
    given = np.full(manifest.n, UNRELIABLE)
    given[: manifest.clustered] = draw(task, config, labels, manifest.clustered, manifest.held_out)
    path = artifacts.given_labels_file(worker.run)
    path.parent.mkdir(exist_ok=True)
    with publish(path) as file:
        np.save(file, given)


def draw(
    task: Task, config: GivenLabelsConfig, labels: Int[np.ndarray, " N"] | None, clustered: int, held_out: int
) -> NDArray[np.int64]:
    """Draw images of each class: the index of its class for each drawn image, UNRELIABLE for others, (clustered,).

    Classes are indexed in ascending order of their labels; labels below 0 are missing. The seed alone decides the order
    of the images.

    Raises:
        UserError: there are no labels, too few of a class, more or fewer classes than clusters, or no image would be
            left to score.
    """
    if labels is None:
        raise UserError(
            f'method "{task.method}" learns from true labels, which this data has not; say where they are by --labels '
            "folder (names of sub-folders), array or list, or use --method spice, which needs none"
        )
    labels = labels[:clustered]
    classes, sizes = np.unique(labels[labels >= 0], return_counts=True)
    if len(classes) != task.clusters:
        raise UserError(f"--clusters is {task.clusters}, but the labels name {len(classes)} classes; give that number")
    if sizes.min() < config.per_class:
        raise UserError(
            f"given_labels.per_class is {config.per_class}, but the smallest class has {sizes.min()} images; give that "
            "or less"
        )
    order = np.random.default_rng([task.seed, DRAW]).permutation(clustered)
    given = np.full(clustered, UNRELIABLE)
    for number, name in enumerate(classes):
        of_class = order[labels[order] == name]
        given[of_class[: config.per_class or len(of_class)]] = number
    if not held_out and (given[labels >= 0] != UNRELIABLE).all():
        raise UserError(
            "all labels would be given, and no image be left to score; set a smaller given_labels.per_class, or hold "
            "the test part of a named data set out by --split split"
        )
    return given


def result(
    task: Task, config: SpiceSemiConfig, run: Path, device: torch.device, progress: Progress, until: str | None
) -> Clustering:
    """Return the network of stage 3, without heads; write its features as `features/features.npy`."""
    stage3 = network_task(task, config)
    net = trained_network(stage3, config, run)
    (features,) = reduced(net.backbone, stage3, run, device, _unit_rows, progress)
    artifacts.features_file(run).parent.mkdir(exist_ok=True)
    with publish(artifacts.features_file(run)) as file:
        np.save(file, features)
    given = artifacts.given_labels(run) != UNRELIABLE
    no_heads = np.zeros((0, len(given)), np.int64)
    return Clustering(stage3, net, no_heads, torch.zeros(0), given=given, last="spice_semi")


def _unit_rows(features: Float[Tensor, "B D"]) -> tuple[np.ndarray]:
    return (unit(features).half().cpu().numpy(),)


def check(task: Task, config: GivenLabelsConfig, semi: SpiceSemiConfig) -> None:
    """Raise a UserError if stage 3 cannot learn from given labels with these settings."""
    check_ranges("given_labels", config, "per_class")
    if semi.init != "scratch":
        raise UserError(
            f'spice_semi.init is "{semi.init}", but method "{task.method}" has no stage 2 to go on from; leave it '
            '"scratch": the backbone as it is, with its --weights if it has any'
        )
    if semi.refresh_steps:
        raise UserError(f'spice_semi.refresh_steps is {semi.refresh_steps}; with method "{task.method}" give 0')
    if (semi.ratio == 0) != (task.method == "supervised"):
        raise UserError(
            f'spice_semi.ratio is {semi.ratio}, but method "{task.method}" '
            + ("is 0 images beside the given ones" if semi.ratio else "learns from other images too; use supervised")
        )
