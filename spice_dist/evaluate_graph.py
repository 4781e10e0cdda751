"""The end of a run on the neighbour graph: the best of its groupings by label-free scores, as result and as model.

k-means and spectral clustering of the same features are always made. Whichever scores best goes out; true labels are
read after that choice.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from spice_dist import graph, inference, metrics, objectives, verdict
from spice_dist.assignments import write_assignments
from spice_dist.config import Config
from spice_dist.data.files import Progress, publish, publish_json
from spice_dist.data.manifest import Ingested, read_manifest, read_paths
from spice_dist.evaluate import KMEANS_BYTES, reliable_accuracy, scored_images, scores, true_labels
from spice_dist.methods import spice_graph, suggested
from spice_dist.methods.plumbing import finished, load_backbone, open_dataset, place
from spice_dist.model_folder import save_model
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.suggest import FEW_PER_CLUSTER, Suggestion, cut, merge_tree

SCORES = ("generalization", "consensus")  # without labels, higher is better
STARTS = 10  # of k-means, of which the best counts
SPECTRAL_NEIGHBORS = 15  # of the graph of the spectral baseline
BASELINES = {"kmeans_features": "k-means on the same features", "spectral": "spectral clustering of the same features"}


@dataclass(frozen=True)
class Grouping:
    """One clustering of all images; `conclude` makes the probability (N,) of each image's cluster, and the model."""

    labels: Int[np.ndarray, " N"]
    conclude: Callable[[], tuple[Float[np.ndarray, " N"], ClusterNet]]


def evaluate_graph(
    config: Config, run: Path, device: torch.device, seconds: dict[str, float],
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Leaves `model/`, `assignments.csv`, `metrics.json` and the levels; returns the metrics.

    Args:
        config: with the number of clusters that the run has.
        seconds: of the stages that are done; those that are not give no grouping.
    """
    manifest = read_manifest(run / "data")
    reference = spice_graph.read_features(run, manifest.clustered)
    groupings = _groupings(config, run, device, manifest, "spice_tune" in seconds, progress)
    compared = label_free(groupings, reference, config)
    chosen = best(compared)
    labels = groupings[chosen].labels
    confidence, net = groupings[chosen].conclude()
    save_model(net, config, run / "model")

    y_true, scored = true_labels(run), scored_images(manifest)
    known = "reliable" in seconds and chosen not in BASELINES  # reliable labels are of stage 2's clusters
    kept, reliable = _reliable(run, manifest, y_true, labels, known)
    write_assignments(run / "assignments.csv", read_paths(run / "data"), labels, confidence, kept != UNRELIABLE)
    suggestion = suggested.read_suggestion(run)
    heads = _heads(run, torch.from_numpy(reference).to(device))
    # heads are those of stage 2: of another grouping its agreement with all others speaks
    agreement = compared[chosen]["consensus"] if chosen in BASELINES or len(heads) < 2 else metrics.agreement(heads)
    evidence = _evidence(config, labels, confidence, agreement, suggestion)
    judged = verdict.judge(evidence)
    if chosen in BASELINES:
        scored_better = "scores better without labels than the groups of stages 2 and 3"
        tqdm.write(f"{BASELINES[chosen]} {scored_better}: it is the result", sys.stderr)
    clustered = labels[: manifest.clustered]
    result = {
        "method": config.method,
        "uses_labels": False,
        "n": len(labels),
        "k": config.clusters,
        "nonempty": evidence.nonempty,
        "verdict": {**asdict(judged), "text": str(judged)},
        "result": chosen,
        "seconds": seconds,
        "select": {
            **compared[chosen],
            "agreement": evidence.agreement,
            "silhouette": metrics.silhouette(reference, clustered, seed=config.seed),
            "mean_confidence": evidence.confidence,
            "size_entropy": metrics.size_entropy(labels, config.clusters),
        },
        "compared": compared,
        "suggestion": asdict(suggestion) if suggestion else None,
        "levels": _levels(config, run, reference, clustered, suggestion),
        "eval": scores(y_true, scored, labels),
        "baselines": {name: scores(y_true, scored, groupings[name].labels) for name in BASELINES},
        "heads": [
            {
                "select_loss": 1 - metrics.agreement([head, clustered]),
                "acc": None if y_true is None else metrics.accuracy(y_true[: manifest.clustered], head),
            }
            for head in heads
        ],
        "reliable": reliable,
    }
    for name in ("spice_graph", "spice_tune"):
        if name in groupings:
            publish_json(run / name / "eval.json", scores(y_true, scored, groupings[name].labels))
    publish_json(run / "metrics.json", result)
    progress(STARTS + 2, STARTS + 2)
    return result


def _evidence(
    config: Config, labels: Int[np.ndarray, " N"], confidence: Float[np.ndarray, " N"],
    agreement: float, suggestion: Suggestion | None,
) -> verdict.Evidence:  # fmt: skip
    sizes = metrics.cluster_sizes(labels, config.clusters)
    return verdict.Evidence(
        clusters=config.clusters,
        nonempty=int((sizes > 0).sum()),
        largest=float(sizes.max() / len(labels)),
        agreement=agreement,
        confidence=float(confidence.mean()),
        too_few=suggestion is not None and not suggestion.candidates,
        groups_found=suggestion.found if suggestion else None,
        suggested=(suggestion.low, suggestion.high) if suggestion and suggestion.found else None,
    )


def label_free(
    groupings: dict[str, Grouping], reference: Float[np.ndarray, "M D"], config: Config
) -> dict[str, dict[str, float]]:
    """For each grouping the scores that sweeps choose by; higher is better (see `objectives`)."""
    labels = {name: grouping.labels[: len(reference)] for name, grouping in groupings.items()}
    agreeing = objectives.consensus(np.stack(list(labels.values())), config.seed)
    return {
        name: {
            "generalization": objectives.generalization(reference, found, config.clusters, config.seed),
            "consensus": float(agreed),
        }
        for (name, found), agreed in zip(labels.items(), agreeing, strict=True)
    }


def best(compared: dict[str, dict[str, float]]) -> str:
    """The name of the grouping that goes out.

    Fine-tuning counts where it does not lower generalization. A baseline replaces SPICE's groups where it is better in
    both scores: generalization alone favours groups of equal size and linear borders, as k-means makes them, and the
    mean place over both chose groups of 4 points of NMI less on the clothing photos.
    """
    chosen = "spice_graph"
    tuned = compared.get("spice_tune")
    if tuned and tuned["generalization"] >= compared[chosen]["generalization"]:
        chosen = "spice_tune"
    better = [name for name in BASELINES if all(compared[name][score] > compared[chosen][score] for score in SCORES)]
    return max(better, key=lambda name: compared[name]["generalization"], default=chosen)


def _groupings(
    config: Config, run: Path, device: torch.device, manifest: Ingested, tuned: bool, progress: Progress
) -> dict[str, Grouping]:  # fmt: skip
    """Baselines first, then the stages that are done, in order."""
    features = torch.from_numpy(spice_graph.read_features(run, manifest.n)).to(device)
    neighbors = np.load(run / "graph/neighbors.npy")
    baselines = {
        "kmeans_features": _kmeans(config, features, manifest.clustered, progress),
        "spectral": _spectral(config, neighbors, features),
    }
    progress(STARTS + 1, STARTS + 2)
    found = {
        name: Grouping(labels, partial(_taught, config, run, features, labels)) for name, labels in baselines.items()
    }
    probs = _posterior(run, features)
    found["spice_graph"] = _with_network(probs, partial(spice_graph.network, config, run))
    if tuned:
        net = place(_tuned_network(config, run), device)
        images, _ = open_dataset(config, run, device)
        probs = inference.probabilities(net, images, config.backbone.statistics, progress, config.precision)
        images.close()
        found["spice_tune"] = _with_network(probs, lambda: net)
    return found


def _tuned_network(config: Config, run: Path) -> ClusterNet:
    net = spice_graph.network(config, run)
    net.load_state_dict(finished(run / "spice_tune").tensors("net"))
    return net


def _with_network(probs: Float[np.ndarray, "N K"], network: Callable[[], ClusterNet]) -> Grouping:
    return Grouping(probs.argmax(1), lambda: (probs.max(1), network()))


def _posterior(run: Path, features: Float[Tensor, "N D"]) -> Float[np.ndarray, "N K"]:
    """Of clustered images from their neighbours too, of others, which have none, from the head alone."""
    known = np.load(run / "spice_graph/posterior.npy").astype(np.float32)
    others = features[len(known) :]
    if not len(others):
        return known
    head = ClusterHeads.holding(finished(run / "spice_graph").tensors("best")).to(features.device)
    return np.concatenate([known, spice_graph.outputs(head, others)[0]])


def _kmeans(
    config: Config, features: Float[Tensor, "N D"], clustered: int, progress: Progress
) -> Int[np.ndarray, " N"]:
    """The best of STARTS starts of k-means on the clustered images, at most KMEANS_BYTES of them; labels of all."""
    from sklearn.cluster import KMeans

    x = features.cpu().numpy()
    order = np.random.default_rng(config.seed).permutation(clustered)
    chosen = x[np.sort(order[: max(KMEANS_BYTES // x[0].nbytes, 10 * config.clusters)])]
    models = []
    for start in range(STARTS):
        model = KMeans(config.clusters, n_init=1, random_state=config.seed * STARTS + start)  # pyright: ignore
        models.append(model.fit(chosen))
        progress(start + 1, STARTS + 2)
    return min(models, key=lambda model: model.inertia_).predict(x).astype(np.int64)


def _spectral(
    config: Config, neighbors: Int[np.ndarray, "M S"], features: Float[Tensor, "N D"]
) -> Int[np.ndarray, " N"]:
    """Shi and Malik 2000 on the graph of nearest neighbours; an image without neighbours takes the nearest center."""
    settings = replace(config.spice_graph, counts=(SPECTRAL_NEIGHBORS,), walks=(0,))
    labels = spice_graph.clusterings(config, settings, features[: len(neighbors)], neighbors)[0]
    others = features[len(neighbors) :]
    if not len(others):
        return labels
    one_hot = torch.eye(config.clusters, device=features.device)[torch.from_numpy(labels).to(features.device)]
    centers = one_hot.T @ features[: len(neighbors)] / one_hot.sum(0).clamp(min=1)[:, None]
    return np.concatenate([labels, (others @ centers.T).argmax(1).cpu().numpy()])


def _taught(
    config: Config, run: Path, features: Float[Tensor, "N D"], labels: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " N"], ClusterNet]:
    """The probability of each image's cluster by a linear head that has learnt these clusters, and its network."""
    head = spice_graph.head_of(config, config.spice_graph, features, labels)
    probs = spice_graph.outputs(head, features)[0]
    return probs[np.arange(len(labels)), labels], ClusterNet(load_backbone(config, run), head)


def _heads(run: Path, features: Float[Tensor, "N D"]) -> Int[np.ndarray, "H N"]:
    """The cluster of every image by each head of stage 2, matched to nothing."""
    heads = ClusterHeads.holding(finished(run / "spice_graph").tensors("heads")).to(features.device)
    return spice_graph.outputs(heads, features).argmax(2)


def _reliable(
    run: Path, manifest: Ingested, y_true: np.ndarray | None, labels: Int[np.ndarray, " N"], done: bool
) -> tuple[Int[np.ndarray, " N"], dict[str, Any]]:
    """The reliable labels (N,), UNRELIABLE where there are none, and their part of metrics.json."""
    if not done:
        return np.full(manifest.n, UNRELIABLE), {"count": 0, "fraction": 0.0, "acc": None}
    kept = np.load(run / "reliable/labels.npy")
    summary = json.loads((run / "reliable/summary.json").read_text())
    first = slice(0, manifest.clustered)
    accuracy = None if y_true is None else reliable_accuracy(y_true[first], labels[first], kept[first])
    about = {"count": summary["count"], "fraction": summary["count"] / manifest.clustered}
    return kept, {**about, "acc": accuracy, "advice": summary["advice"]}


def _levels(
    config: Config, run: Path, features: Float[np.ndarray, "M D"], labels: Int[np.ndarray, " M"],
    suggestion: Suggestion | None,
) -> dict[str, Any] | None:  # fmt: skip
    """Leaves `levels.csv`: the coarse group, the cluster and the fine group of every clustered image.

    Coarse groups join clusters (Ward on their means). Fine groups divide them: a group of the finer graph clustering
    belongs to the cluster of most of its images, and images of another cluster go to that cluster's nearest group.
    """
    (run / "levels.csv").unlink(missing_ok=True)
    if suggestion is None or not suggestion.found or config.clusters < 3:
        return None
    tree = merge_tree(features, labels)
    coarse = cut(tree, min(suggestion.coarse, 2 * config.clusters // 3))[labels]  # of other K's suggestion too
    finer = -(-3 * config.clusters // 2)
    fine = _divided(config, run, labels, max(suggestion.fine, finer if FEW_PER_CLUSTER * finer <= len(labels) else 0))
    rows = [f"{index},{a},{b},{c}" for index, (a, b, c) in enumerate(zip(coarse, labels, fine, strict=True))]
    with publish(run / "levels.csv") as file:
        file.write("\n".join(["index,coarse,cluster,fine", *rows, ""]).encode())
    return {
        "coarse": int(coarse.max()) + 1,
        "clusters": config.clusters,
        "fine": int(fine.max()) + 1,
        "tree": tree.tolist(),
    }


def _divided(config: Config, run: Path, labels: Int[np.ndarray, " M"], count: int) -> Int[np.ndarray, " M"]:
    """Groups inside of clusters: the pairs (cluster, finer group) with a tenth of the finer group, the rest joins the
    largest pair of its cluster."""
    neighbors = np.load(run / "graph/neighbors.npy")
    if count <= config.clusters or len(neighbors) > graph.landmarks(count):
        return labels
    finer = graph.graph_clusterings(neighbors, count, (SPECTRAL_NEIGHBORS,), (8,), config.seed)[0]
    pairs, index, sizes = np.unique(labels * count + finer, return_inverse=True, return_counts=True)
    kept = sizes >= np.bincount(finer, minlength=count)[pairs % count] / 2
    of_cluster = pairs // count
    order = np.argsort(sizes, kind="stable")
    largest = np.zeros(config.clusters, np.int64)
    largest[of_cluster[order]] = order  # the last of a cluster is its largest
    target = np.where(kept, np.arange(len(pairs)), largest[of_cluster])
    return np.unique(target, return_inverse=True)[1][index]
