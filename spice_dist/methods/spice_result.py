"""The result of SPICE as published: the network of stage 3, or of stage 2 if the run ends before stage 3."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int

from spice_dist import artifacts
from spice_dist.clustering import Clustering, Reliable
from spice_dist.data.files import Progress
from spice_dist.inference import predictions
from spice_dist.methods import imc_swav
from spice_dist.methods.spice_semi import SpiceSemiConfig, network_task, trained_network
from spice_dist.methods.stage2 import load_heads, stage2_network
from spice_dist.models.heads import ClusterHeads
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.task import Task

CHUNK = 4096  # images of a forward pass of the heads


def result(
    task: Task, config: SpiceSemiConfig, run: Path, device: torch.device, progress: Progress, until: str | None
) -> Clustering:
    """Return the network of the last stage of the run, of stage 2 where no label was reliable enough for stage 3.

    Heads and reliable labels are those of stage 2.
    """
    heads, loss = load_heads(run)
    by_head = _labels_by_head(heads, run)
    selected = by_head[int(loss.argmin())]
    stages: dict[str, Callable[[], Int[np.ndarray, " N"]]] = {"spice_self": lambda: selected}
    if task.pretext == "imc_swav":
        stages = {"imc_swav": lambda: _labels_of_pretext(task, run, device), **stages}
    reliable = Reliable(np.full(len(selected), UNRELIABLE), selected)
    if until != "spice_self":
        advice = artifacts.reliable_summary(run)["advice"]
        reliable = Reliable(artifacts.reliable_labels(run), selected, advice)
    if until not in (None, "spice_semi") or not (reliable.labels != UNRELIABLE).any():
        return Clustering(task, stage2_network(task, run), by_head, loss, reliable, stages=stages)
    stage3 = network_task(task, config)
    net = trained_network(stage3, config, run)
    return Clustering(stage3, net, by_head, loss, reliable, stages=stages, last="spice_semi")


@torch.no_grad()
def _labels_by_head(heads: ClusterHeads, run: Path) -> Int[np.ndarray, "H N"]:
    """Predict the clusters of all images by every head, on the features of its training."""
    features = artifacts.head_features(run)
    chunks = np.array_split(features, -(-len(features) // CHUNK))
    return np.concatenate([heads(torch.tensor(chunk).float()).argmax(2).numpy() for chunk in chunks], 1)


def _labels_of_pretext(task: Task, run: Path, device: torch.device) -> Int[np.ndarray, " N"]:
    """Predict the clusters of all images by IMC-SwAV, the run's stage 1."""
    return predictions(imc_swav.network(task, run), task, run, device)[0]
