"""Finish a run of any method: write the assignments of all images, the model, and scores.

Only this module, metrics.py and probes.py read true labels, and methods/given_labels.py, whose baselines learn from
some.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from spice_dist import artifacts, graph, metrics, objectives, verdict
from spice_dist.assignments import write_assignments
from spice_dist.baselines import kmeans, of_features, of_pixels
from spice_dist.catalog import USING_LABELS
from spice_dist.clustering import Clustering, scored_images
from spice_dist.config import Config
from spice_dist.data.checksums import publish_sealed, record_files, sha256
from spice_dist.data.files import Progress, publish, publish_json
from spice_dist.data.manifest import Ingested, read_paths
from spice_dist.data.sources import UNLABELLED, Source
from spice_dist.errors import DamagedFile
from spice_dist.inference import predictions
from spice_dist.inspection import inspect
from spice_dist.methods.plumbing import finished
from spice_dist.methods.spice_self import followed_images
from spice_dist.model_folder import save_model
from spice_dist.models.heads import ClusterNet, LinearNet, renumber
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.stages import evaluation_settings, result_of
from spice_dist.task import Task

SAMPLED = 10_000  # images whose features are compared with each other
MARGIN = 0.1  # of recognised images, by which a baseline must be better, since clusters of k-means are linear
RECORDED = (
    "config.json", "assignments.csv", "levels.csv", "duplicates.csv", "outliers.csv", "metrics.json",
    "spice_self/head_selection.jsonl",
)  # fmt: skip
OF_STAGES = ("features/features.npy", "reliable/labels.npy")  # written with the result where no stage writes them
Scores = dict[str, float] | None


def evaluate(
    config: Config, run: Path, device: torch.device, seconds: dict[str, float],
    progress: Progress = lambda done, total: None, until: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `model/`, the scores of each stage and the tables of the run; return the content of `metrics.json`.

    True labels, where the data has them, are read here for the first time: nothing before depends on them.

    Args:
        seconds: the time of each stage; see `note_seconds`.
        until: the last stage that is done; None: all stages of these settings.
    """
    return conclude(result_of(config)(run, device, progress, until), config, run, device, seconds, progress)


def note_seconds(run: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Add the time of each stage to the scores, without which they count as unfinished; return `metrics.json`."""
    result = artifacts.metrics(run)
    if result["seconds"] != seconds:
        result["seconds"] = seconds
        publish_json(artifacts.metrics_file(run), result)
        record_files(run, ["metrics.json"])
    return result


def conclude(
    clustering: Clustering, config: Config, run: Path, device: torch.device, seconds: dict[str, float],
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Do as `evaluate` with this clustering."""
    task, manifest = clustering.task, artifacts.manifest(run)
    artifacts.metrics_file(run).unlink(missing_ok=True)  # it comes last: a call that was cut off is seen by it
    record_files(run, ["config.json"], anew=True)
    bits = manifest.grey_bits or task.data.grey_bits  # other images must be scaled as these were
    labels, confidence, baselines = _labels_and_baselines(clustering, run, device, manifest, progress)
    labels = _numbered_as_earlier(clustering, labels, run)
    save_model(clustering.net, replace(task, data=replace(task.data, grey_bits=bits)), artifacts.model(run))
    reliable = clustering.reliable
    has_reliable = np.zeros(manifest.n, bool) if reliable is None else reliable.labels != UNRELIABLE
    write_assignments(
        artifacts.assignments_file(run), read_paths(artifacts.data(run)), labels, confidence, has_reliable
    )

    y_true, scored = artifacts.true_labels(run), scored_images(manifest)
    if clustering.given is not None:
        scored = scored[~clustering.given[scored]]
    classes = {} if y_true is None else {"classes": _classes(run, y_true[scored])}
    if y_true is not None:
        scored = scored[y_true[scored] != UNLABELLED]
        y_true = y_true if len(scored) else None
    agreement = _agreement(clustering)
    features = artifacts.stored_features(run)
    below = _better_baseline(task, manifest, features, labels, baselines) if clustering.choice is None else ""
    evidence = _evidence(clustering, features, labels, confidence, agreement, below)
    judgement = verdict.judge(evidence)
    result = {
        "method": task.method,
        "uses_labels": task.method in USING_LABELS,
        "n": len(labels),
        "k": task.clusters,
        "nonempty": evidence.nonempty,
        "verdict": {**asdict(judgement), "text": str(judgement)},
        **_selection(clustering, features, labels, confidence, agreement),
        "eval": scores(y_true, scored, labels),
        **classes,
        "baselines": {name: scores(y_true, scored, clusters) for name, clusters in baselines.items()},
        "heads": _heads(clustering, manifest, labels, y_true, scored),
        **_given_labels(clustering, manifest, y_true, scored, labels),
        "seconds": seconds,
        **{name: value for name, value in evaluation_settings(config).items() if value is not None},
        "reliable": _reliable(clustering, manifest, y_true),
        "duplicates": inspect(task, run, device),
    }
    of_stages = {} if y_true is None else {name: scores(y_true, scored, of()) for name, of in clustering.stages.items()}
    if clustering.last:
        of_stages[clustering.last] = result["eval"]
    for stage in {*clustering.stages, *of_stages}:
        publish_json(artifacts.stage_scores_file(run, stage), of_stages.get(stage))
    if "spice_self" in clustering.stages:
        _write_head_selection(task, run, y_true, manifest.clustered)
    publish_json(artifacts.metrics_file(run), result)
    written = [f"{stage}/eval.json" for stage in {*clustering.stages, *of_stages}]
    of_no_stage = [name for name in OF_STAGES if not (run / name).with_name("stage.json").exists()]
    record_files(run, [*RECORDED, *written, *of_no_stage])
    return result


def _numbered_as_earlier(clustering: Clustering, labels: Int[np.ndarray, " N"], run: Path) -> Int[np.ndarray, " N"]:
    """Give the clusters the numbers, and the names, of the run that this one goes on from; return the labels."""
    earlier, net = artifacts.earlier_labels(run), clustering.net
    if earlier is None:
        return labels
    path, (_, names) = artifacts.names_file(run), artifacts.earlier_clusters(run)
    if names and not path.exists():
        path.parent.mkdir(exist_ok=True)
        publish_json(path, names)
    if clustering.choice is not None and clustering.choice.name == "spice_graph":
        return labels  # its stage has numbered them, and left their probabilities
    assert isinstance(net, ClusterNet | LinearNet)  # of SPICE
    numbers = graph.numbered_as(earlier, labels, clustering.task.clusters)
    renumber(net, numbers)
    return numbers[labels]


def _labels_and_baselines(
    clustering: Clustering, run: Path, device: torch.device, manifest: Ingested, progress: Progress
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"], dict[str, Int[np.ndarray, " N"]]]:
    """Return the cluster of every image, its probability, and the clusters of the baselines by name."""
    task, choice = clustering.task, clustering.choice
    if choice is not None:
        known, more = choice.baselines, {}
        if "spectral" in known:  # else it is compared with the groups before corrections
            more = of_features(task, artifacts.stored_features(run), manifest.clustered, device, known)
        return choice.labels, choice.confidence, known | more
    labels, confidence = predictions(clustering.net, task, run, device, progress)
    baselines = {"kmeans_pixels": of_pixels(task, run, device)}
    if clustering.given is None:  # features that have learned from labels are no baseline
        features = artifacts.stored_features(run)
        baselines["kmeans_features"] = kmeans(manifest, task, lambda index: features[index].astype(np.float32))
        baselines |= of_features(task, features, manifest.clustered, device)
    return labels, confidence, baselines


def _agreement(clustering: Clustering) -> float | None:
    """Return the mean ARI of clusterings of different starts; None if there are fewer than two."""
    if clustering.choice is not None and clustering.choice.agreement is not None:
        return clustering.choice.agreement
    return metrics.agreement(clustering.by_head) if len(clustering.by_head) > 1 else None


def _evidence(
    clustering: Clustering, features: np.ndarray, labels: Int[np.ndarray, " N"],
    confidence: Float[np.ndarray, " N"], agreement: float | None, below: str,
) -> verdict.Evidence:  # fmt: skip
    sizes = metrics.cluster_sizes(labels, clustering.task.clusters)
    suggestion = clustering.choice.suggestion if clustering.choice else None
    return verdict.Evidence(
        clusters=clustering.task.clusters,
        nonempty=int((sizes > 0).sum()),
        largest=float(sizes.max() / len(labels)),
        agreement=agreement,
        confidence=float(confidence.mean()),
        corrected=clustering.corrected,
        alike=objectives.mean_cosine(features[:SAMPLED].astype(np.float32)),
        too_few=suggestion is not None and not suggestion.candidates,
        groups_found=suggestion.found if suggestion else None,
        suggested=(suggestion.low, suggestion.high) if suggestion and suggestion.found else None,
        below=below,
    )


def _selection(
    clustering: Clustering, features: np.ndarray, labels: Int[np.ndarray, " N"], confidence: Float[np.ndarray, " N"],
    agreement: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the entries of metrics.json that need no true labels."""
    task, choice = clustering.task, clustering.choice
    count = clustering.by_head.shape[1]
    select: dict[str, float] = {}
    if choice is not None:
        select |= choice.compared[choice.name]
    elif clustering.loss is not None and len(clustering.loss):
        select["select_loss"] = float(clustering.loss.min())
    if len(clustering.by_head):
        select["agreement"] = 1.0 if agreement is None else agreement
    select["silhouette"] = metrics.silhouette(features[:count], labels[:count], seed=task.seed)
    select["mean_confidence"] = float(confidence.mean())
    select["size_entropy"] = metrics.size_entropy(labels, task.clusters)
    if choice is None:
        return {"select": select}
    return {
        "result": choice.name,
        "select": select,
        "compared": choice.compared,
        "suggestion": asdict(choice.suggestion) if choice.suggestion else None,
        "levels": choice.levels,
    }


def _heads(
    clustering: Clustering, manifest: Ingested, labels: Int[np.ndarray, " N"], y_true: np.ndarray | None,
    scored: Int[np.ndarray, " S"],
) -> list[dict[str, float | None]]:  # fmt: skip
    """Return the label-free loss of every head, and its accuracy on the scored images, or on all that it clusters."""
    by_head, count = clustering.by_head, clustering.by_head.shape[1]
    known = scored
    if y_true is not None and count < manifest.n:
        known = np.flatnonzero(y_true[:count] != UNLABELLED)
    losses = clustering.loss
    if losses is None:
        losses = [1 - metrics.agreement([head, labels[:count]]) for head in by_head]
    return [
        {
            "select_loss": float(loss),
            "acc": None if y_true is None else metrics.accuracy(y_true[known], head[known]),
        }
        for loss, head in zip(losses, by_head, strict=True)
    ]


def _given_labels(
    clustering: Clustering, manifest: Ingested, y_true: np.ndarray | None, scored: Int[np.ndarray, " M"],
    labels: Int[np.ndarray, " N"],
) -> dict[str, Any]:  # fmt: skip
    """Return the accuracy of a method that learns from labels: the share of scored images put into their own class.

    Cluster c is the class of the c-th smallest label, so that no matching is needed.
    """
    if clustering.given is None or y_true is None:
        return {}
    known = y_true[: manifest.clustered]
    right = np.unique(known[known >= 0])[labels[scored]] == y_true[scored]
    count = int(clustering.given.sum())
    return {"given_labels": {"count": count, "scored": len(scored), "accuracy": float(right.mean())}}


def _reliable(clustering: Clustering, manifest: Ingested, y_true: np.ndarray | None) -> dict[str, Any]:
    """Return how many labels of the clustered images are reliable, their fraction, and the share that is right."""
    reliable, clustered = clustering.reliable, slice(0, manifest.clustered)
    if reliable is None:
        return {"count": 0, "fraction": 0.0, "acc": None}
    count = int((reliable.labels != UNRELIABLE).sum())
    accuracy = None
    if y_true is not None:
        accuracy = reliable_accuracy(y_true[clustered], reliable.clusters[clustered], reliable.labels[clustered])
    return {"count": count, "fraction": count / manifest.clustered, "acc": accuracy, "advice": reliable.advice}


def _better_baseline(
    task: Task, manifest: Ingested, features: np.ndarray, labels: Int[np.ndarray, " N"],
    baselines: dict[str, Int[np.ndarray, " N"]],
) -> str:  # fmt: skip
    """Return the name of k-means on the features if a linear classifier recognises its clusters better by MARGIN."""
    if "kmeans_features" not in baselines:
        return ""
    sample = np.sort(np.random.default_rng(task.seed).permutation(manifest.clustered)[: objectives.SAMPLE])
    reference = features[sample].astype(np.float32)
    accuracy, baseline_accuracy = (
        objectives.generalization(reference, clusters[sample], task.clusters, task.seed)
        for clusters in (labels, baselines["kmeans_features"])
    )
    return "k-means on the same features" if baseline_accuracy > accuracy + MARGIN else ""


def scores(y_true: np.ndarray | None, scored: np.ndarray, y_pred: np.ndarray) -> Scores:
    return None if y_true is None else metrics.scores(y_true[scored], y_pred[scored])


def _classes(run: Path, y_true: Int[np.ndarray, " S"]) -> dict[str, Any]:
    """Count the scored images of each class by its name, and those without a class."""
    numbers, counts = np.unique(y_true[y_true != UNLABELLED], return_counts=True)
    names = artifacts.class_names(run)
    named = {
        names.get(number, str(number)): count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
    }
    return {"images": named, "unlabelled": int((y_true == UNLABELLED).sum())}


def _write_head_selection(task: Task, run: Path, y_true: np.ndarray | None, clustered: int) -> None:
    """Write SPICE's Fig. 6, two accuracies on the followed images after every epoch, to the file of head selection.

    `selected` is of the head with the lowest loss so far, `best` of the epoch's best head by true labels.
    """
    path = artifacts.head_selection_file(run)
    if y_true is None:
        path.unlink(missing_ok=True)
        return
    saved = finished(run / "spice_self").tensors("select")
    losses, followed = saved["losses"].numpy(), saved["followed"].numpy()
    known = y_true[followed_images(task, clustered, followed.shape[2])]
    followed, known = followed[..., known != UNLABELLED], known[known != UNLABELLED]
    if not len(known):
        path.unlink(missing_ok=True)
        return
    accuracy = np.array([[metrics.accuracy(known, labels) for labels in heads] for heads in followed])
    lines = []
    for epoch in range(len(losses)):
        selected = accuracy.flat[losses[: epoch + 1].argmin()]
        lines.append({"step": epoch + 1, "selected": float(selected), "best": float(accuracy[epoch].max())})
    with publish(path) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)


def true_classes(run: Path) -> Int[np.ndarray, " N"] | None:
    """Return the true class of every scored image, -1 for the others; None without true labels. For the report."""
    y_true = artifacts.true_labels(run)
    if y_true is None:
        return None
    classes = np.full(len(y_true), -1)
    scored = scored_images(artifacts.manifest(run))
    classes[scored] = y_true[scored]
    return classes


def clustering_accuracy(run: Path, clusters: Int[np.ndarray, " N"]) -> float | None:
    """Return the ACC of a clustering of the clustered images; None without true labels. For tables, never to choose."""
    y_true = artifacts.true_labels(run)
    if y_true is None:
        return None
    known = np.flatnonzero(y_true[: len(clusters)] != UNLABELLED)
    return metrics.accuracy(y_true[known], clusters[known]) if len(known) else None


def relabel(run: Path, source: Source) -> bool:
    """Bring data/labels.npy in line with the labels that `source` has now; return whether scores must be made again."""
    path, manifest = artifacts.true_labels_file(run), artifacts.manifest(run)
    classes = artifacts.class_names_file(run)
    try:
        before = artifacts.true_labels(run)
    except DamagedFile as error:
        print(f"{error}: they are read again from {source.name}", file=sys.stderr)
        before = None
    sums = {name: digest for name, digest in manifest.sha256.items() if name not in (path.name, classes.name)}
    now = None
    if source.labels is not None:
        by_name = dict(zip(source.paths, source.labels, strict=True))
        now = np.array([by_name[name] for name in read_paths(artifacts.data(run))], np.int64)
        with publish(path) as file:
            np.save(file, now)
        publish_json(classes, source.label_names)
        sums |= {file.name: sha256(file) for file in (path, classes)}
    if sums != manifest.sha256:
        publish_sealed(artifacts.manifest_file(run), asdict(replace(manifest, sha256=sums)))
    if now is None:
        path.unlink(missing_ok=True)
        classes.unlink(missing_ok=True)
    if before is None or now is None:
        return before is not now
    return not np.array_equal(before, now)


def reliable_accuracy(y_true: np.ndarray, assigned: np.ndarray, reliable: np.ndarray) -> float | None:
    """Return the share of reliable labels (N,) that are right; -100 is no label, and None is returned if all are.

    Images without a true label do not count.

    Clusters are matched to classes over all images that `assigned` gives a cluster (-100: none), as for the accuracy of
    the clustering, with which this number is compared. `assigned` = `reliable` would match over the reliable images
    alone, which gives as much or more.
    """
    labelled = y_true != UNLABELLED
    mask, known = (reliable != UNRELIABLE) & labelled, (assigned != UNRELIABLE) & labelled
    if not mask.any():
        return None
    to_class = metrics.match(y_true[known], assigned[known])
    return float(
        np.mean([to_class.get(int(label)) == true for label, true in zip(reliable[mask], y_true[mask], strict=True)])
    )
