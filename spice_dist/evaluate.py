"""The end of a run: assignments of every image, and scores.

Only this, metrics.py and probes.py see true labels, and methods/given_labels.py, whose baselines learn from some.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spice_dist import inference, metrics, objectives, verdict
from spice_dist.assignments import write_assignments
from spice_dist.catalog import USING_LABELS
from spice_dist.data.files import Progress, publish, publish_json
from spice_dist.data.images import Images
from spice_dist.data.manifest import Ingested, read_paths
from spice_dist.data.sources import Source
from spice_dist.methods import imc_swav, scan
from spice_dist.methods.imc_swav import ImcSwavConfig
from spice_dist.methods.plumbing import finished, open_dataset, place
from spice_dist.methods.spice_self import followed_images, head_features, load_heads, stage2_network
from spice_dist.methods.spice_semi import SpiceSemiConfig, network_task, new_network
from spice_dist.model_folder import save_model
from spice_dist.models.backbone import unit
from spice_dist.models.heads import ClassifierNet, ClusterNet
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.task import Task

MARGIN = 0.1  # of recognised images, by which a baseline must be better: k-means' clusters are linear by construction
KMEANS_BYTES = 256 << 20  # k-means baselines are fitted on a random sample of this size and assigned to all
Scores = dict[str, float] | None


def evaluate(
    task: Task, semi: SpiceSemiConfig, run: Path, device: torch.device, seconds: dict[str, float],
    progress: Progress = lambda done, total: None, until: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Leaves `model/`, `assignments.csv`, `metrics.json` and the scores of each stage; returns the metrics.

    With `until`, "spice_self" or "reliable", the result is that of stage 2, and there may be no reliable labels yet.
    True labels, where the data has them, are read here for the first time: nothing before depends on them.
    """
    joint, net = task, stage2_network(task, run)
    if until in (None, "spice_semi"):
        joint = network_task(task, semi)
        net = new_network(joint, semi, run)
        net.load_state_dict(finished(run / "spice_semi").tensors("ema"))
    place(net, device)
    images, manifest = open_dataset(task, run, device)
    heads, loss = load_heads(run)
    with torch.no_grad():
        seen = np.load(head_features(run), mmap_mode="r")
        chunks = np.array_split(seen, -(-len(seen) // 4096))
        by_head = np.concatenate([heads(torch.tensor(x).float()).argmax(2).numpy() for x in chunks], 1)  # H N
    selected = by_head[int(loss.argmin())]
    chosen = until != "spice_self"
    reliable = np.load(run / "reliable/labels.npy") if chosen else np.full(manifest.n, UNRELIABLE)
    scored, kept = scored_images(manifest), reliable != UNRELIABLE
    result, _ = _judge(joint, run, net, images, manifest, scored, kept, by_head, loss, progress)
    y_true = true_labels(run)
    if task.pretext == "imc_swav" and y_true is not None:
        stage1 = place(imc_swav.network(task, run), device)
        clusters = inference.probabilities(stage1, images, task.backbone.statistics, precision=task.precision).argmax(1)
        publish_json(run / "imc_swav/eval.json", scores(y_true, scored, clusters))
    images.close()

    summary = json.loads((run / "reliable/summary.json").read_text()) if chosen else {"count": 0, "advice": ""}
    result["seconds"] = seconds
    result["reliable"] = {
        "count": summary["count"],
        "fraction": summary["count"] / manifest.clustered,
        "acc": None
        if y_true is None
        else reliable_accuracy(*(x[: manifest.clustered] for x in (y_true, selected, reliable))),
        "advice": summary["advice"],
    }
    _write_head_selection(task, run, y_true, manifest.clustered)
    publish_json(run / "spice_self/eval.json", scores(y_true, scored, selected))
    if until in (None, "spice_semi"):
        publish_json(run / "spice_semi/eval.json", result["eval"])
    publish_json(run / "metrics.json", result)
    return result


def evaluate_imc_swav(
    task: Task, config: ImcSwavConfig, run: Path, device: torch.device, seconds: dict[str, float],
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """As `evaluate`, of a run of IMC-SwAV, which has no reliable labels."""
    images, manifest = open_dataset(task, run, device)
    net = place(imc_swav.network(task, run), device)
    if config.eval_bn == "adapt_on_test":
        imc_swav.adapt_statistics(net, task, config, images, scored_images(manifest))
    classifiers, loss = imc_swav.trained_classifiers(run)
    place(classifiers, device)
    every = np.arange(images.n)
    raw = inference.outputs(
        net.backbone, images, every, task.backbone.statistics, lambda done, total: None, task.precision
    )
    with torch.no_grad():
        by_head = torch.cat([classifiers(z).argmax(2).cpu() for z in raw], 1).numpy()  # H N
    none = np.zeros(manifest.n, bool)
    result, _ = _judge(task, run, net, images, manifest, scored_images(manifest), none, by_head, loss, progress)
    images.close()
    result |= {"seconds": seconds, "eval_bn": config.eval_bn}
    result["reliable"] = {"count": 0, "fraction": 0.0, "acc": None}
    publish_json(run / "metrics.json", result)
    return result


def evaluate_scan(
    task: Task, run: Path, device: torch.device, seconds: dict[str, float],
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """As `evaluate`, of a run of SCAN: also the scores before self-labelling; there are no reliable labels."""
    images, manifest = open_dataset(task, run, device)
    before, loss = scan.trained(task, run)
    by_head = _labels_by_head(task, place(before, device), images)
    net = place(scan.network(task, run), device)
    scored, none = scored_images(manifest), np.zeros(manifest.n, bool)
    result, _ = _judge(task, run, net, images, manifest, scored, none, by_head, loss, progress)
    images.close()
    result |= {"seconds": seconds, "reliable": {"count": 0, "fraction": 0.0, "acc": None}}
    publish_json(run / "scan/eval.json", scores(true_labels(run), scored, by_head[int(loss.argmin())]))
    publish_json(run / "self_label/eval.json", result["eval"])
    publish_json(run / "metrics.json", result)
    return result


def evaluate_given_labels(
    task: Task, semi: SpiceSemiConfig, run: Path, device: torch.device, seconds: dict[str, float],
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """As `evaluate`, of a run that learned from given labels; scores are of images whose labels were not.

    `given_labels.accuracy` is the share of these put into their own class, without the matching behind ACC. The
    features that are left are those of the trained network.
    """
    joint = network_task(task, semi)
    net = place(new_network(joint, semi, run), device)
    net.load_state_dict(finished(run / "spice_semi").tensors("ema"))
    images, manifest = open_dataset(task, run, device)
    every = np.arange(images.n)
    chunks = inference.outputs(
        net.backbone, images, every, joint.backbone.statistics, lambda done, total: None, task.precision
    )
    features = torch.cat([unit(found).half().cpu() for found in chunks]).numpy()
    (run / "features").mkdir(exist_ok=True)
    with publish(run / "features/features.npy") as file:
        np.save(file, features)

    given = np.load(run / "given_labels/labels.npy") != UNRELIABLE
    scored = scored_images(manifest)
    scored = scored[~given[scored]]
    none, no_heads = np.zeros(manifest.n, bool), np.zeros((0, manifest.n), np.int64)
    result, assigned = _judge(joint, run, net, images, manifest, scored, none, no_heads, torch.zeros(0), progress)
    images.close()
    y_true = np.load(run / "data/labels.npy")
    known = y_true[: manifest.clustered]
    own_class = np.unique(known[known >= 0])[assigned[scored]] == y_true[scored]
    result["given_labels"] = {"count": int(given.sum()), "scored": len(scored), "accuracy": float(own_class.mean())}
    result |= {"seconds": seconds, "reliable": {"count": 0, "fraction": 0.0, "acc": None}}
    publish_json(run / "spice_semi/eval.json", result["eval"])
    publish_json(run / "metrics.json", result)
    return result


def _labels_by_head(task: Task, net: scan.ScanNet, images: Images) -> Int[np.ndarray, "H N"]:
    every = np.arange(images.n)
    found = inference.outputs(net, images, every, task.backbone.statistics, lambda done, total: None, task.precision)
    return torch.cat([logits.argmax(2).cpu() for logits in found], 1).numpy()


def _judge(
    task: Task,
    run: Path,
    net: ClusterNet | ClassifierNet,
    images: Images,
    manifest: Ingested,
    scored: Int[np.ndarray, " M"],
    reliable: Bool[np.ndarray, " N"],
    by_head: Int[np.ndarray, "H N"],
    loss: Float[Tensor, " H"],
    progress: Progress,
) -> tuple[dict[str, Any], Int[np.ndarray, " N"]]:
    """What every method has in common: leaves `model/` and `assignments.csv`, returns its part of metrics.json and the
    cluster of each image. Scores are of the images `scored`."""
    save_model(net, task, run / "model")
    probs = inference.probabilities(net, images, task.backbone.statistics, progress, task.precision)
    assigned, confidence = probs.argmax(1), probs.max(1)
    write_assignments(run / "assignments.csv", read_paths(run / "data"), assigned, confidence, reliable)
    features = np.load(run / "features/features.npy", mmap_mode="r")
    blind = task.method not in USING_LABELS
    baselines = {"kmeans_pixels": kmeans(manifest, task, lambda index: _pixels(images, index))}
    if blind:  # no baseline are features that have seen labels
        baselines["kmeans_features"] = kmeans(manifest, task, lambda index: features[index].astype(np.float32))
    selection = {
        "select_loss": float(loss.min()),
        "agreement": metrics.agreement(by_head) if len(by_head) > 1 else 1.0,
    } if len(loss) else {}  # fmt: skip
    y_true = true_labels(run)
    sizes = metrics.cluster_sizes(assigned, task.clusters)
    judged = verdict.judge(
        verdict.Evidence(
            clusters=task.clusters,
            nonempty=int((sizes > 0).sum()),
            largest=float(sizes.max() / len(assigned)),
            agreement=selection.get("agreement") if len(by_head) > 1 else None,
            confidence=float(confidence.mean()),
            below=_better_baseline(task, manifest, features, assigned, baselines.get("kmeans_features")),
        )
    )
    result = {
        "method": task.method,
        "uses_labels": not blind,
        "n": len(assigned),
        "k": task.clusters,
        "nonempty": int((sizes > 0).sum()),
        "verdict": {**asdict(judged), "text": str(judged)},
        "select": {
            **selection,
            "silhouette": metrics.silhouette(features, assigned, seed=task.seed),
            "mean_confidence": float(confidence.mean()),
            "size_entropy": metrics.size_entropy(assigned, task.clusters),
        },
        "eval": scores(y_true, scored, assigned),
        "baselines": {name: scores(y_true, scored, clusters) for name, clusters in baselines.items()},
        "heads": [
            {
                "select_loss": float(value),
                "acc": None if y_true is None else metrics.accuracy(y_true[scored], labels[scored]),
            }
            for value, labels in zip(loss, by_head, strict=True)
        ],
    }
    return result, assigned


def _better_baseline(
    task: Task, manifest: Ingested, features: np.ndarray, assigned: np.ndarray, baseline: np.ndarray | None
) -> str:
    """The name of k-means on the features if a linear classifier recognises its clusters better by MARGIN; or ""."""
    if baseline is None:
        return ""
    chosen = np.sort(np.random.default_rng(task.seed).permutation(manifest.clustered)[: objectives.SAMPLE])
    reference = features[chosen].astype(np.float32)
    ours, theirs = (
        objectives.generalization(reference, found[chosen], task.clusters, task.seed) for found in (assigned, baseline)
    )
    return "k-means on the same features" if theirs > ours + MARGIN else ""


def scores(y_true: np.ndarray | None, scored: np.ndarray, y_pred: np.ndarray) -> Scores:
    return None if y_true is None else metrics.scores(y_true[scored], y_pred[scored])


def scored_images(manifest: Ingested) -> np.ndarray:
    """Which images the scores are of: those held out, or all that are clustered."""
    return np.arange(manifest.n - manifest.held_out, manifest.n) if manifest.held_out else np.arange(manifest.clustered)


def _write_head_selection(task: Task, run: Path, y_true: np.ndarray | None, clustered: int) -> None:
    """SPICE's Fig. 6, `spice_self/head_selection.jsonl`: after every epoch the accuracy of the head that the loss
    selects, of all so far, and that of the epoch's best head, which takes labels to find; on the images followed."""
    path = run / "spice_self/head_selection.jsonl"
    if y_true is None:
        path.unlink(missing_ok=True)
        return
    saved = finished(run / "spice_self").tensors("select")
    losses, followed = saved["losses"].numpy(), saved["followed"].numpy()
    known = y_true[followed_images(task, clustered, followed.shape[2])]
    accuracy = np.array([[metrics.accuracy(known, labels) for labels in heads] for heads in followed])
    lines = []
    for epoch in range(len(losses)):
        selected = accuracy.flat[losses[: epoch + 1].argmin()]
        lines.append({"step": epoch + 1, "selected": float(selected), "best": float(accuracy[epoch].max())})
    with publish(path) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)


def clustering_accuracy(run: Path, clusters: Int[np.ndarray, " N"]) -> float | None:
    """ACC of a clustering of the run's clustered images; None without true labels. For tables, never to choose by."""
    y_true = true_labels(run)
    return None if y_true is None else metrics.accuracy(y_true[: len(clusters)], clusters)


def relabel(run: Path, source: Source) -> bool:
    """Bring data/labels.npy in line with the labels that `source` has now; whether the scores must be made again."""
    path, before = run / "data/labels.npy", true_labels(run)
    if source.labels is None:
        path.unlink(missing_ok=True)
        return before is not None
    by_name = dict(zip(source.paths, source.labels, strict=True))
    now = np.array([by_name[name] for name in read_paths(run / "data")], np.int64)
    with publish(path) as file:
        np.save(file, now)
    return before is None or not np.array_equal(before, now)


def true_labels(run: Path) -> np.ndarray | None:
    path = run / "data/labels.npy"
    return np.load(path) if path.exists() else None


def reliable_accuracy(y_true: np.ndarray, assigned: np.ndarray, reliable: np.ndarray) -> float | None:
    """Share of the reliable labels (N,) that are right, -100 meaning none; None if there is none at all.

    Clusters are matched to classes over all images that `assigned` gives a cluster, -100 meaning none there too: that
    is the matching behind the accuracy of the clustering, which this number is to be compared with. `assigned` =
    `reliable` matches over the reliable images alone, which can only give as much or more.
    """
    kept, known = reliable != UNRELIABLE, assigned != UNRELIABLE
    if not kept.any():
        return None
    to_class = metrics.match(y_true[known], assigned[known])
    return float(
        np.mean([to_class.get(int(label)) == true for label, true in zip(reliable[kept], y_true[kept], strict=True)])
    )


def kmeans(manifest: Ingested, task: Task, read: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """k-means labels (N,) of the float32 rows that `read(index)` gives; fitted on the clustered images."""
    from sklearn.cluster import KMeans

    width = read(np.arange(1)).nbytes
    order = np.random.default_rng(task.seed).permutation(manifest.clustered)
    chosen = order[: max(KMEANS_BYTES // width, 10 * task.clusters)]
    model = KMeans(task.clusters, n_init=10, random_state=task.seed)  # pyright: ignore[reportArgumentType]
    model.fit(read(np.sort(chosen)))
    parts = np.array_split(np.arange(manifest.n), -(-manifest.n // inference.CHUNK))
    return np.concatenate([model.predict(read(part)) for part in parts])


def _pixels(images: Images, index: np.ndarray) -> np.ndarray:
    """(N, C * H * W) float32 in [0, 1]."""
    return np.concatenate([x.flatten(1).cpu().numpy() for x, _ in images.batches(index, inference.CHUNK)]) / np.float32(
        255
    )
