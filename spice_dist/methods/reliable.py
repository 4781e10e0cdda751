"""Between stages 2 and 3: which labels of SPICE-Self are reliable enough to teach the whole network (III-C, eqs. 6-7).

An image is reliable when its nearest neighbours, in the features of stage 1, carry its label. Two rules say when:

adaptive (DCBoost, eq. 1): all of its k nearest other images do, with the k that maximises k n_k, n_k being how many
images pass at k. Below a floor every cluster is given its best-agreeing images, so that none vanishes.
official (the published code): of N_s neighbours, itself included, a share of at least `ratio` does, the label has a
probability above `min_confidence`, and of every cluster as many are drawn as the smallest has; one cluster without any
leaves nothing.

Images with exactly the same features are copies. Under the adaptive rule they are one image: a copy vouches for
nothing, neither for its original nor twice for a third, and all copies are reliable or none. The published rule counts
them like any other neighbour.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float16, Int
from torch import Tensor
from tqdm import tqdm

from spice_dist import artifacts
from spice_dist.data.files import Progress, publish, publish_json
from spice_dist.distributed import collectives
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.methods import spice_graph
from spice_dist.methods.stage2 import load_heads
from spice_dist.neighbors import distinct, label_agreement, nearest, nearest_by_index
from spice_dist.pseudo_labels import (
    UNRELIABLE,
    adaptive_depth,
    agreement_depth,
    balanced,
    raised_to_floor,
    reliable_images,
)
from spice_dist.settings import check_ranges, setting
from spice_dist.task import Task

DRAW = 30  # stream of random numbers
CHUNK = 65_536  # images that a head is asked about at once
FEW = 0.05  # share of reliable labels below which advice is given


@dataclass(frozen=True)
class ReliableConfig:
    rule: str = setting(
        "adaptive",
        "official: as published, and with ratio=0.96, min_confidence=0, balance=False as in the paper",
        choices=("adaptive", "official"),
    )
    search: str = setting(
        "exact",
        "of neighbours; index: by faiss, for tens of millions of images, approximate",
        choices=("exact", "index"),
    )
    max_neighbors: int = setting(
        50,
        "adaptive: largest k, itself not counted; at most N / K",
        least=2,
        remedy="it must be at least 2",
    )
    floor_fraction: float = setting(
        0.1,
        "adaptive: every cluster keeps its best-agreeing images up to this share, and at least one",
        least=0,
        most=1,
    )
    neighbors: int = setting(
        100,
        "official: N_s, the image itself included; at most N / K, or no cluster could fill it",
        least=2,
        remedy="it must be at least 2",
    )
    ratio: float = setting(
        0.95,
        "official: lambda, share of neighbours that must agree",
        above=0,
        most=1,
        remedy="it must be between 0 and 1",
    )
    min_confidence: float = setting(0.99, "official: the label's probability must be above it", least=0, most=1)
    balance: bool = setting(True, "official: as many of every cluster as the smallest has")


@torch.no_grad()
def select(task: Task, config: ReliableConfig, worker: Worker) -> None:
    """Leaves `reliable/labels.npy` (N,) int64, -100 where not reliable, and `reliable/summary.json`.

    Every worker searches the neighbours of its share of the images.

    Raises:
        UserError: no label is reliable. The summary is there then, the labels are not.
    """
    check(config)
    run, progress = worker.run, partial(_show, worker)
    manifest = artifacts.manifest(run)
    stored = artifacts.stored_features(run, manifest.clustered)
    stage2 = spice_graph.predicted if task.stage2 == "spice_graph" else _predicted
    predicted = partial(stage2, run, device=worker.device)
    labels, passed, kept, numbers = choose(task, config, stored, predicted, worker.device, progress)

    sizes, passing, per_cluster = (
        torch.bincount(part, minlength=task.clusters).tolist() for part in (labels, labels[passed], labels[kept])
    )
    summary = {
        "rule": config.rule,
        "settings": asdict(config),
        "images": len(labels),
        **numbers,
        "count": int(kept.sum()),
        "passed": int(passed.sum()),
        "added_to_reach_floor": int((kept & ~passed).sum()),
        "dropped_for_balance": int((passed & ~kept).sum()),
        "refused": int((~passed & ~kept).sum()),
        "clusters": sum(count > 0 for count in per_cluster),
        "clusters_that_passed": sum(count > 0 for count in passing),
        "per_cluster": per_cluster,
        "passed_per_cluster": passing,
        "cluster_sizes": sizes,
    }
    summary["advice"] = advice(summary)
    if worker.rank == 0:
        (run / "reliable").mkdir(exist_ok=True)
        publish_json(artifacts.reliable_summary_file(run), summary)
    if not summary["count"]:
        raise UserError(summary["advice"])
    if worker.rank > 0:
        return
    if summary["advice"]:
        tqdm.write(summary["advice"], sys.stderr)
    everywhere = np.full(manifest.n, UNRELIABLE)  # images that are not clustered teach no label
    everywhere[: manifest.clustered] = torch.where(kept, labels, UNRELIABLE).numpy()
    with publish(artifacts.reliable_labels_file(run)) as file:
        np.save(file, everywhere)


@torch.no_grad()
def choose(
    task: Task, config: ReliableConfig, stored: Float16[np.ndarray, "N D"],
    predicted: Callable[[np.ndarray], tuple[Tensor, Tensor]], device: torch.device,
    progress: Progress = lambda done, total: None,
) -> tuple[Int[Tensor, " N"], Bool[Tensor, " N"], Bool[Tensor, " N"], dict[str, Any]]:  # fmt: skip
    """(labels, passed, kept, numbers for the summary) of N images with features of unit norm, on the host.

    `predicted` gives the labels and their probabilities of the images that it is asked about. Every worker must call
    this with the same, and gets the same.
    """
    first, copy_of = distinct(stored) if config.rule == "adaptive" else (np.arange(len(stored)), np.arange(len(stored)))
    features = torch.from_numpy(stored[first].astype(np.float32)).to(device)
    labels, confidence = predicted(first)
    rule = _adaptive if config.rule == "adaptive" else _official
    passed, kept, numbers = rule(task, config, features, labels, confidence, progress)
    labels, passed, kept = (part.cpu()[copy_of] for part in (labels, passed, kept))
    return labels, passed, kept, {"copies": len(stored) - len(first), **numbers}


def _predicted(run: Path, index: Int[np.ndarray, " M"], device: torch.device) -> tuple[Tensor, Tensor]:
    """What the selected head says of these images: (M,) labels and their probabilities."""
    heads, loss = load_heads(run)
    head = heads.select(int(loss.argmin())).to(device)
    features = artifacts.head_features(run)
    chunks = np.array_split(index, -(-len(index) // CHUNK))
    probs = (head(torch.from_numpy(features[chunk].astype(np.float32)).to(device))[0].softmax(1) for chunk in chunks)
    best = [part.max(1) for part in probs]
    return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])


def _show(worker: Worker, done: int, total: int) -> None:
    worker.progress(done, total, None)


def _adaptive(
    task: Task, config: ReliableConfig, features: Tensor, labels: Tensor, confidence: Tensor, progress: Progress
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Which of N distinct images pass and which are kept, (N,) bool, and numbers for the summary."""
    most = min(len(features) - 1, max(2, min(config.max_neighbors, len(features) // task.clusters)))
    rows = collectives.share(len(features))
    neighbors = others(_nearest(config, features, most + 1, rows, progress), rows)
    depth = collectives.gather_shares(agreement_depth(labels, neighbors, rows), len(features))
    agreement = collectives.gather_shares(label_agreement(labels, neighbors, rows), len(features))
    k, passing = adaptive_depth(depth, most)
    passed = depth >= k
    # depth first, then the share of all neighbours that agree: it is 1 only at the largest depth, so the sum orders so
    score = depth + agreement.nan_to_num()
    kept = raised_to_floor(labels, passed, score, confidence, task.clusters, config.floor_fraction)
    return passed, kept, {"k": k, "passing_at_k": passing.tolist()}


def _official(
    task: Task, config: ReliableConfig, features: Tensor, labels: Tensor, confidence: Tensor, progress: Progress
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Which of N images pass and which are kept, (N,) bool, and numbers for the summary."""
    count = min(len(features), max(2, min(config.neighbors, len(features) // task.clusters)))
    rows = collectives.share(len(features))
    own = label_agreement(labels, _nearest(config, features, count, rows, progress), rows)
    agreement = collectives.gather_shares(own, len(features))
    agreeing = reliable_images(agreement, confidence, config.ratio, -1.0)
    passed = kept = reliable_images(agreement, confidence, config.ratio, config.min_confidence)
    if config.balance:
        order = np.random.default_rng([task.seed, DRAW]).permutation(len(labels))
        kept = balanced(labels, passed, task.clusters, torch.from_numpy(order).to(labels.device))
    refused = {"refused_for_agreement": ~agreeing, "refused_for_confidence": agreeing & ~passed}
    return passed, kept, {"neighbors": count, **{reason: int(images.sum()) for reason, images in refused.items()}}


def _nearest(config: ReliableConfig, features: Tensor, count: int, rows: range, progress: Progress) -> Tensor:
    if config.search == "index":
        return nearest_by_index(features.cpu(), count, rows, progress=progress).to(features.device)
    return nearest(features, count, rows, progress)


def others(neighbors: Tensor, rows: range) -> Tensor:
    """(R, S) of (R, S + 1): each of `rows` without the image itself, or without the last where it is not among them.

    Rounding can put another image before the image itself, so it is looked for by its number.
    """
    places = torch.arange(neighbors.shape[1] - 1, device=neighbors.device)
    kept = []
    for number, found in enumerate(neighbors.split(CHUNK)):
        first = rows.start + number * CHUNK
        itself = found == torch.arange(first, first + len(found), device=neighbors.device)[:, None]
        itself[:, -1] |= ~itself.any(1)
        kept.append(found.gather(1, places + (places >= itself.int().argmax(1)[:, None])))
    return torch.cat(kept)


def advice(summary: dict[str, Any]) -> str:
    """What to do when few labels are reliable, or not from all clusters, in one or two sentences; "" if all is well."""
    clusters, settings = len(summary["cluster_sizes"]), summary["settings"]
    if not summary["passed"] and not summary["count"]:
        return (
            f"no label is reliable: nowhere do {settings['ratio']:.0%} of {summary['neighbors']} neighbours agree with "
            f"a label of probability above {settings['min_confidence']:g}; use --set reliable.rule=adaptive"
        )
    if not summary["count"]:
        missing = [str(cluster) for cluster, count in enumerate(summary["passed_per_cluster"]) if not count]
        named = ("s " if len(missing) > 1 else " ") + ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        return (
            f"no label is reliable: {summary['passed']:,} pass, none of cluster{named}, and the official rule takes "
            "as many of every cluster as the smallest has; use --set reliable.rule=adaptive or reliable.balance=False"
        )
    share, passed = summary["passed"] / summary["images"], summary["clusters_that_passed"]
    if share >= FEW and passed == clusters:
        return ""
    by_floor, empty = summary["clusters"] - passed, summary["cluster_sizes"].count(0)
    text = (
        f"{'only ' * (share < FEW)}{summary['passed']:,} of {summary['images']:,} labels ({share:.0%}) from {passed} "
        f"of {clusters} clusters are reliable by agreement"
    )
    text += f"; of {by_floor} more only the best-agreeing images are kept" * (by_floor > 0)
    text += f"; {empty} {'is' if empty == 1 else 'are'} empty" * (empty > 0)
    remedies = ["train stage 1 longer, as the features may be too weak"] * (share < FEW)
    if summary["rule"] == "official":
        remedies.append("remove the folders reliable and spice_semi of this run and use --set reliable.rule=adaptive")
    remedies += ["ask for fewer clusters"] * (passed < clusters)
    return f"{text}. To have more, {', or '.join(remedies)}."


def check(config: ReliableConfig) -> None:
    """UserError if these settings cannot select."""
    check_ranges("reliable", config, "rule", "search", "max_neighbors", "neighbors")
    if config.search == "index" and not find_spec("faiss"):
        raise UserError("reliable.search=index needs faiss: pip install faiss-cpu")
    check_ranges("reliable", config, "ratio", "floor_fraction", "min_confidence")
