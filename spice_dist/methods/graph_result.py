"""The result of a run on the neighbour graph: the best of its groupings by scores without true labels.

k-means and spectral clustering of the same features are always compared too.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from spice_dist import artifacts, objectives
from spice_dist.baselines import SPECTRAL_NEIGHBORS, STARTS, kmeans_of_features, spectral
from spice_dist.clustering import Choice, Clustering, Reliable
from spice_dist.data.files import Progress
from spice_dist.inference import predictions
from spice_dist.methods import spice_graph
from spice_dist.methods.levels import write_levels
from spice_dist.methods.plumbing import finished, load_backbone
from spice_dist.methods.spice_graph import SpiceGraphConfig
from spice_dist.methods.suggested import read_suggestion, with_suggested_clusters
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.task import Task

SCORES = ("generalization", "consensus")  # without labels, higher is better
BASELINES = {"kmeans_features": "k-means on the same features", "spectral": "spectral clustering of the same features"}


@dataclass(frozen=True)
class Grouping:
    """One clustering of all images; `conclude` computes the probability (N,) of each image's cluster, and the model."""

    labels: Int[np.ndarray, " N"]
    conclude: Callable[[], tuple[Float[np.ndarray, " N"], ClusterNet]]


def result(
    task: Task, config: SpiceGraphConfig, run: Path, device: torch.device, progress: Progress, until: str | None
) -> Clustering:
    """Return the best grouping, its network, and its coarser and finer levels, which are written to `levels.csv`."""
    task = with_suggested_clusters(task, run)
    manifest = artifacts.manifest(run)
    features = torch.from_numpy(artifacts.features(run, manifest.n)).to(device)
    reference = features[: manifest.clustered].cpu().numpy()
    tuned = (until or task.stage3) == "spice_tune"
    groupings = _groupings(task, config, run, features, manifest.clustered, tuned, progress)
    compared = label_free(groupings, reference, task)
    chosen = best(compared, stays=artifacts.earlier_labels(run) is not None)
    labels = groupings[chosen].labels
    confidence, net = groupings[chosen].conclude()
    if chosen in BASELINES:
        scored_better = "scores better without labels than the groups of stages 2 and 3"
        tqdm.write(f"{BASELINES[chosen]} {scored_better}: it is the result", sys.stderr)

    suggestion = read_suggestion(run)
    by_head = _labels_by_head(run, features[: manifest.clustered])
    # a baseline, or a single head, has no agreement of heads
    by_others = chosen in BASELINES or len(by_head) < 2
    choice = Choice(
        name=chosen,
        labels=labels,
        confidence=confidence,
        compared=compared,
        baselines={name: groupings[name].labels for name in BASELINES},
        agreement=compared[chosen]["consensus"] if by_others else None,
        suggestion=suggestion,
        levels=write_levels(task, run, reference, labels[: manifest.clustered], suggestion, SPECTRAL_NEIGHBORS),
    )
    stages = {name: partial(_labels_of, groupings[name]) for name in groupings if name not in BASELINES}
    # reliable labels belong to stage 2's clusters
    reliable = None if until == "spice_graph" or chosen in BASELINES else _reliable(run, labels)
    progress(STARTS + 2, STARTS + 2)
    return Clustering(task, net, by_head, None, reliable, stages=stages, choice=choice)


def label_free(
    groupings: dict[str, Grouping], reference: Float[np.ndarray, "M D"], task: Task
) -> dict[str, dict[str, float]]:
    """Compute each grouping's scores, by which sweeps choose; higher is better (see `objectives`)."""
    labels = {name: grouping.labels[: len(reference)] for name, grouping in groupings.items()}
    agreements = objectives.consensus(np.stack(list(labels.values())), task.seed)
    return {
        name: {
            "generalization": objectives.generalization(reference, clusters, task.clusters, task.seed),
            "consensus": float(agreement),
        }
        for (name, clusters), agreement in zip(labels.items(), agreements, strict=True)
    }


def best(compared: dict[str, dict[str, float]], stays: bool = False) -> str:
    """Name the grouping that is the result.

    Stage 3 replaces stage 2 if it does not lower generalization. A baseline replaces SPICE's groups if it is better in
    both scores. Generalization alone favours k-means' groups, of equal size and linear borders. The mean place over
    both scores chose groups of 4 points of NMI less on the clothing photos.

    Args:
        stays: the groups go on from an earlier run's: no baseline replaces them, which would move images.
    """
    chosen = "spice_graph"
    tuned = compared.get("spice_tune")
    if tuned and tuned["generalization"] >= compared[chosen]["generalization"]:
        chosen = "spice_tune"
    if stays:
        return chosen
    better = [name for name in BASELINES if all(compared[name][score] > compared[chosen][score] for score in SCORES)]
    return max(better, key=lambda name: compared[name]["generalization"], default=chosen)


def _labels_of(grouping: Grouping) -> Int[np.ndarray, " N"]:
    return grouping.labels


def _groupings(
    task: Task, config: SpiceGraphConfig, run: Path, features: Float[Tensor, "N D"], clustered: int, tuned: bool,
    progress: Progress,
) -> dict[str, Grouping]:  # fmt: skip
    """Collect the groupings: baselines first, then the stages that are done, in order."""
    neighbors = artifacts.neighbors(run)
    starts_of_all = partial(_show_starts, progress)
    baselines = {
        "kmeans_features": kmeans_of_features(task, features.cpu().numpy(), clustered, starts_of_all),
        "spectral": spectral(task, features, clustered, neighbors),
    }
    progress(STARTS + 1, STARTS + 2)
    groupings = {
        name: Grouping(labels, partial(_learnt, task, config, run, features, labels))
        for name, labels in baselines.items()
    }
    probs = _posterior(run, features)
    network = partial(spice_graph.network, task, run)
    groupings["spice_graph"] = Grouping(probs.argmax(1), lambda: (probs.max(1), network()))
    if tuned:
        net = _tuned_network(task, run)
        labels, confidence = predictions(net, task, run, features.device, progress)
        groupings["spice_tune"] = Grouping(labels, lambda: (confidence, net))
    return groupings


def _show_starts(progress: Progress, done: int, total: int) -> None:
    progress(done, total + 2)


def _tuned_network(task: Task, run: Path) -> ClusterNet:
    net = spice_graph.network(task, run)
    net.load_state_dict(finished(run / "spice_tune").tensors("net"))
    return net


def _posterior(run: Path, features: Float[Tensor, "N D"]) -> Float[np.ndarray, "N K"]:
    """Return probabilities: by stage 2's posterior for clustered images, by the head for others, without neighbours."""
    clustered = artifacts.posterior(run).astype(np.float32)
    others = features[len(clustered) :]
    if not len(others):
        return clustered
    head = ClusterHeads.holding(finished(run / "spice_graph").tensors("best")).to(features.device)
    return np.concatenate([clustered, spice_graph.outputs(head, others)[0]])


def _learnt(
    task: Task, config: SpiceGraphConfig, run: Path, features: Float[Tensor, "N D"], labels: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " N"], ClusterNet]:
    """Train a linear head on these clusters; return the probability of each image's cluster, and the network."""
    head = spice_graph.head_of(task, config, features, labels)
    probs = spice_graph.outputs(head, features)[0]
    return probs[np.arange(len(labels)), labels], ClusterNet(load_backbone(task, run), head)


def _labels_by_head(run: Path, features: Float[Tensor, "M D"]) -> Int[np.ndarray, "H M"]:
    """Predict the cluster of every image by each head of stage 2; heads number the same clusters differently."""
    heads = ClusterHeads.holding(finished(run / "spice_graph").tensors("heads")).to(features.device)
    return spice_graph.outputs(heads, features).argmax(2)


def _reliable(run: Path, labels: Int[np.ndarray, " N"]) -> Reliable:
    advice = artifacts.reliable_summary(run)["advice"]
    return Reliable(artifacts.reliable_labels(run), labels, advice)
