"""The result of a run whose groups were corrected: a head that has learned them, on the run's features.

New images are assigned by the network that made these features, with this head. Where the run was fine-tuned by
`spice_tune`, that stage runs again from the corrected groups, with what the user fixed among its reliable labels. The
tuned network is the model if a linear classifier recognises its groups as well.
"""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spice_dist import artifacts, objectives
from spice_dist.clustering import Choice, Clustering, Reliable
from spice_dist.data.files import Progress, publish
from spice_dist.distributed import checkpoint
from spice_dist.distributed.worker import LocalWorker
from spice_dist.inference import probabilities
from spice_dist.methods import spice_graph, spice_tune
from spice_dist.methods.corrections import Corrections, Learned, resolved
from spice_dist.methods.levels import write_levels
from spice_dist.methods.plumbing import finished, load_backbone, open_run_dataset, place
from spice_dist.methods.reliable import ReliableConfig, choose
from spice_dist.methods.spice_graph import SpiceGraphConfig
from spice_dist.methods.spice_tune import SpiceTuneConfig
from spice_dist.methods.suggested import read_suggestion
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.task import Task

Confidence = Literal["posterior", "head"]
"""What gives the probabilities that the confidence is of: the neighbour graph, or a head trained on the groups."""
NEVER = -1e4  # logit of the group outside, which no new image joins


@dataclass(frozen=True)
class Settings:
    """Of the stages that are done again; None: the run is without this stage."""

    head: SpiceGraphConfig
    reliable: ReliableConfig | None
    tune: SpiceTuneConfig | None
    confidence: Confidence  # as in the run before


def result(
    task: Task, settings: Settings, run: Path, device: torch.device, corrections: Corrections, learned: Learned,
    before: Int[np.ndarray, " N"], progress: Progress,
) -> tuple[Clustering, Learned]:  # fmt: skip
    """Train head and network; return the result, and what was learned with the labels that tuning may have changed.

    Args:
        task: with the number of corrected groups, the group of images outside among them.
        run: the folder of the corrected run, with images, features and neighbours.
        before: the groups before the corrections, which are scored too.
    """
    features = torch.from_numpy(artifacts.features(run, len(before))).to(device)
    inside = ~corrections.outside
    among = replace(task, clusters=task.clusters - bool(corrections.outside.any()))  # groups that attract images
    head, confident = _head(among, settings, features, learned, inside)
    net = ClusterNet(load_backbone(task, run), head)
    others = spice_graph.outputs(head, features[len(inside) :])[0]
    probs = np.concatenate([_padded(confident, task), _padded(others, task)])
    reliable = None
    if settings.reliable is not None:
        reliable = _reliable(task, settings.reliable, run, device, learned, corrections.outside, len(before))
    labels = np.concatenate([learned.labels, others.argmax(1)])
    if settings.tune is not None:
        tuned = _tuned(among, settings.tune, run, device, net.head, task.clusters, corrections, learned, progress)
        if tuned is not None:
            net, probs = tuned
            labels = probs.argmax(1)
            learned = replace(learned, probs=probs[: len(inside)], labels=labels[: len(inside)])
    net.head = _widened(net.head, task.clusters)
    reference = features[: len(inside)].cpu().numpy()
    scores = {"generalization": objectives.generalization(reference, learned.labels, task.clusters, task.seed)}
    suggestion = read_suggestion(run)
    choice = Choice(
        name="corrected",
        labels=labels,
        confidence=probs[np.arange(len(labels)), labels],
        compared={"corrected": scores},
        baselines={"before": before},
        agreement=None,
        suggestion=suggestion,
        levels=write_levels(task, run, reference, learned.labels, suggestion, settings.head.spread),
    )
    by_head = np.zeros((0, len(inside)), np.int64)
    return Clustering(task, net, by_head, None, reliable, choice=choice, corrected=True), learned


def _head(
    task: Task, settings: Settings, features: Float[Tensor, "N D"], learned: Learned, inside: Bool[np.ndarray, " M"]
) -> tuple[ClusterHeads, Float[np.ndarray, "M K"]]:
    """Train the head; return it and the probabilities of which the confidence is, of images outside as well."""
    index = torch.from_numpy(np.flatnonzero(inside)).to(features.device)
    if settings.confidence == "posterior":
        targets = learned.probs[inside, : task.clusters].astype(np.float32)
        head = spice_graph.head_for(task, settings.head, features[index], targets)
        spice_graph.calibrate(head, features[index], targets)
        return head, learned.probs
    head = spice_graph.head_of(task, settings.head, features[index], learned.labels[inside])
    probs = learned.probs.copy()
    certain = learned.fixed != UNRELIABLE
    probs[~certain, : task.clusters] = spice_graph.outputs(head, features[: len(inside)])[0][~certain]
    probs[certain] = np.eye(probs.shape[1])[learned.fixed[certain]]
    return head, probs


def _padded(probs: Float[np.ndarray, "R G"], task: Task) -> Float[np.ndarray, "R K"]:
    return np.pad(probs, ((0, 0), (0, task.clusters - probs.shape[1])))


def _widened(head: ClusterHeads, clusters: int) -> ClusterHeads:
    """Return the head with outputs that are never the largest for groups beyond its own."""
    more = clusters - head.biases[-1].shape[2]
    tensors = {
        name: torch.nn.functional.pad(value, (0, more), value=NEVER if name.startswith("biases") else 0.0)
        for name, value in head.state_dict().items()
    }
    return ClusterHeads.holding(tensors)


def _reliable(
    task: Task, config: ReliableConfig, run: Path, device: torch.device, learned: Learned,
    outside: Bool[np.ndarray, " M"], images: int,
) -> Reliable:  # fmt: skip
    """Choose reliable labels among the corrected ones, and write them: those that the user fixed are, too."""

    def predicted(index: Int[np.ndarray, " R"]) -> tuple[Tensor, Tensor]:
        confidence = torch.from_numpy(learned.probs[index].max(1)).float()
        return torch.from_numpy(learned.labels[index]).to(device), confidence.to(device)

    stored = artifacts.stored_features(run, len(outside))
    _, _, selected, _ = choose(task, config, stored, predicted, device)
    chosen = (selected.numpy() | (learned.fixed != UNRELIABLE)) & ~outside
    labels = np.full(images, UNRELIABLE)
    labels[: len(outside)] = np.where(chosen, learned.labels, UNRELIABLE)
    artifacts.reliable_labels_file(run).parent.mkdir(exist_ok=True)
    with publish(artifacts.reliable_labels_file(run)) as file:
        np.save(file, labels)
    clusters = np.full(images, UNRELIABLE)
    clusters[: len(outside)] = learned.labels
    return Reliable(labels, clusters)


def _tuned(
    task: Task, config: SpiceTuneConfig, run: Path, device: torch.device, head: ClusterHeads, clusters: int,
    corrections: Corrections, learned: Learned, progress: Progress,
) -> tuple[ClusterNet, Float[np.ndarray, "N K"]] | None:  # fmt: skip
    """Run stage 3 again; return the tuned network and its probabilities, None if its groups are worse.

    Args:
        clusters: with the group of images outside, if there is one.
    """
    checkpoint.save(run / "spice_graph/checkpoints", 1, {"best": dict(head.state_dict())}, {"total": 1})
    worker = LocalWorker(run, "spice_tune", device, progress=lambda done, total, loss: progress(done, total))
    spice_tune.train(task, config, worker)
    tuned = spice_graph.network(task, run)
    tuned.load_state_dict(finished(run / "spice_tune").tensors("net"))
    images, _ = open_run_dataset(task, run, device)
    with closing(images):
        found = probabilities(place(tuned, device), images, task.backbone.statistics, progress, task.precision)
    found = _padded(found, replace(task, clusters=clusters)).astype(np.float64)
    count = len(learned.labels)
    labels = resolved(found[:count], learned.fixed, corrections.all_same, corrections.all_different)
    certain = np.flatnonzero((learned.fixed != UNRELIABLE) | (labels != found[:count].argmax(1)))
    found[certain] = np.eye(clusters)[labels[certain]]
    reference = artifacts.features(run, count)
    before, after = (
        objectives.generalization(reference, chosen, clusters, task.seed) for chosen in (learned.labels, labels)
    )
    emptied = len(np.unique(labels)) < len(np.unique(learned.labels))
    return None if emptied or after < before else (tuned, found)
