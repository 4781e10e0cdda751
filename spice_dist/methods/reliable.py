"""Select the labels of stage 2 that are reliable enough for training in stage 3 (III-C, eqs. 6-7).

An image is reliable if its nearest neighbours, in the features of stage 1, have its label. There are two rules:

adaptive (DCBoost, eq. 1): all of its k nearest other images have its label. k maximises k n_k, n_k being the number of
images that pass at k. In a cluster with too few, its best-agreeing images are added, so that no cluster vanishes.
official (the published code): of N_s neighbours, itself included, a share of at least `ratio` has its label, and the
label's probability is above `min_confidence`. All clusters are cut to the size of the smallest: if one has no reliable
image, none is left.

Images with exactly the same features are copies. The adaptive rule counts them as one image: copies are not neighbours
of each other, count once for other images, and are all reliable or none. The official rule counts them like any other
image.
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
CHUNK = 65_536  # images of a head's forward pass
FEW = 0.05  # share of reliable labels below which advice is given
ANOTHER_RULE = "remove the folders reliable and spice_semi of this run and use --set reliable.rule=adaptive"
WITHOUT_STAGE3 = f"stage 3 cannot start, and the result is that of stage 2; for more, {ANOTHER_RULE}"


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
    """Write `reliable/labels.npy` (N,) int64, -100 where not reliable, and `reliable/summary.json`.

    Every worker searches the neighbours of its share of the images. Where no label is reliable, stage 3 cannot start:
    one line says so, and the run's result is that of stage 2.
    """
    check(config)
    run, progress = worker.run, partial(_show, worker)
    manifest = artifacts.manifest(run)
    stored = artifacts.stored_features(run, manifest.clustered)
    stage2 = spice_graph.predicted if task.stage2 == "spice_graph" else _predicted
    predicted = partial(stage2, run, device=worker.device)
    labels, passed, selected, numbers = choose(task, config, stored, predicted, worker.device, progress)

    sizes, passing, per_cluster = (
        torch.bincount(of_images, minlength=task.clusters).tolist()
        for of_images in (labels, labels[passed], labels[selected])
    )
    summary = {
        "rule": config.rule,
        "settings": asdict(config),
        "images": len(labels),
        **numbers,
        "count": int(selected.sum()),
        "passed": int(passed.sum()),
        "added_to_reach_floor": int((selected & ~passed).sum()),
        "dropped_for_balance": int((passed & ~selected).sum()),
        "refused": int((~passed & ~selected).sum()),
        "clusters": sum(count > 0 for count in per_cluster),
        "clusters_that_passed": sum(count > 0 for count in passing),
        "per_cluster": per_cluster,
        "passed_per_cluster": passing,
        "cluster_sizes": sizes,
    }
    summary["advice"] = advice(summary)
    if worker.rank > 0:
        return
    (run / "reliable").mkdir(exist_ok=True)
    publish_json(artifacts.reliable_summary_file(run), summary)
    if summary["advice"]:
        tqdm.write(summary["advice"], sys.stderr)
    labels_of_all = np.full(manifest.n, UNRELIABLE)  # images that are not clustered have no label
    labels_of_all[: manifest.clustered] = torch.where(selected, labels, UNRELIABLE).numpy()
    with publish(artifacts.reliable_labels_file(run)) as file:
        np.save(file, labels_of_all)


@torch.no_grad()
def choose(
    task: Task, config: ReliableConfig, stored: Float16[np.ndarray, "N D"],
    predicted: Callable[[np.ndarray], tuple[Tensor, Tensor]], device: torch.device,
    progress: Progress = lambda done, total: None,
) -> tuple[Int[Tensor, " N"], Bool[Tensor, " N"], Bool[Tensor, " N"], dict[str, Any]]:  # fmt: skip
    """Select among N images of unit features: (labels, passed, selected, numbers for the summary), on the host.

    `predicted` gives the labels of images, by number, and their probabilities. Every worker must call this with the
    same arguments, and gets the same result.
    """
    first, copy_of = distinct(stored) if config.rule == "adaptive" else (np.arange(len(stored)), np.arange(len(stored)))
    features = torch.from_numpy(stored[first].astype(np.float32)).to(device)
    labels, confidence = predicted(first)
    rule = _adaptive if config.rule == "adaptive" else _official
    passed, selected, numbers = rule(task, config, features, labels, confidence, progress)
    labels, passed, selected = (of_distinct.cpu()[copy_of] for of_distinct in (labels, passed, selected))
    return labels, passed, selected, {"copies": len(stored) - len(first), **numbers}


def _predicted(run: Path, index: Int[np.ndarray, " M"], device: torch.device) -> tuple[Tensor, Tensor]:
    """Predict these images by the selected head: (M,) labels and their probabilities."""
    heads, loss = load_heads(run)
    head = heads.select(int(loss.argmin())).to(device)
    features = artifacts.head_features(run)
    chunks = np.array_split(index, -(-len(index) // CHUNK))
    probs = (head(torch.from_numpy(features[chunk].astype(np.float32)).to(device))[0].softmax(1) for chunk in chunks)
    best = [chunk.max(1) for chunk in probs]
    return torch.cat([chunk.indices for chunk in best]), torch.cat([chunk.values for chunk in best])


def _show(worker: Worker, done: int, total: int) -> None:
    worker.progress(done, total, None)


def _adaptive(
    task: Task, config: ReliableConfig, features: Tensor, labels: Tensor, confidence: Tensor, progress: Progress
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Apply the adaptive rule to N distinct images: (passed (N,), selected (N,), numbers for the summary)."""
    most = min(len(features) - 1, max(2, min(config.max_neighbors, len(features) // task.clusters)))
    rows = collectives.share(len(features))
    neighbors = others(_nearest(config, features, most + 1, rows, progress), rows)
    depth = collectives.gather_shares(agreement_depth(labels, neighbors, rows), len(features))
    agreement = collectives.gather_shares(label_agreement(labels, neighbors, rows), len(features))
    k, passing = adaptive_depth(depth, most)
    passed = depth >= k
    # orders by depth, then by agreement, which is 1 only at the largest depth
    score = depth + agreement.nan_to_num()
    selected = raised_to_floor(labels, passed, score, confidence, task.clusters, config.floor_fraction)
    return passed, selected, {"k": k, "passing_at_k": passing.tolist()}


def _official(
    task: Task, config: ReliableConfig, features: Tensor, labels: Tensor, confidence: Tensor, progress: Progress
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Apply the official rule to N images: (passed (N,), selected (N,), numbers for the summary)."""
    count = min(len(features), max(2, min(config.neighbors, len(features) // task.clusters)))
    rows = collectives.share(len(features))
    agreement_of_share = label_agreement(labels, _nearest(config, features, count, rows, progress), rows)
    agreement = collectives.gather_shares(agreement_of_share, len(features))
    agreeing = reliable_images(agreement, confidence, config.ratio, -1.0)
    passed = selected = reliable_images(agreement, confidence, config.ratio, config.min_confidence)
    if config.balance:
        order = np.random.default_rng([task.seed, DRAW]).permutation(len(labels))
        selected = balanced(labels, passed, task.clusters, torch.from_numpy(order).to(labels.device))
    refused = {"refused_for_agreement": ~agreeing, "refused_for_confidence": agreeing & ~passed}
    return passed, selected, {"neighbors": count, **{reason: int(images.sum()) for reason, images in refused.items()}}


def _nearest(config: ReliableConfig, features: Tensor, count: int, rows: range, progress: Progress) -> Tensor:
    if config.search == "index":
        return nearest_by_index(features.cpu(), count, rows, progress=progress).to(features.device)
    return nearest(features, count, rows, progress)


def others(neighbors: Tensor, rows: range) -> Tensor:
    """Remove each of `rows` from its own neighbours, (R, S + 1) -> (R, S), or the last neighbour if it is not there.

    The image is found by its number, since rounding can put another image before it.
    """
    places = torch.arange(neighbors.shape[1] - 1, device=neighbors.device)
    without_itself = []
    for number, chunk in enumerate(neighbors.split(CHUNK)):
        first = rows.start + number * CHUNK
        itself = chunk == torch.arange(first, first + len(chunk), device=neighbors.device)[:, None]
        itself[:, -1] |= ~itself.any(1)
        without_itself.append(chunk.gather(1, places + (places >= itself.int().argmax(1)[:, None])))
    return torch.cat(without_itself)


def advice(summary: dict[str, Any]) -> str:
    """Advise, in one or two sentences, if few labels or not all clusters are reliable; "" otherwise."""
    clusters, settings = len(summary["cluster_sizes"]), summary["settings"]
    if not summary["passed"] and not summary["count"]:
        return (
            f"no label is reliable: nowhere do {settings['ratio']:.0%} of {summary['neighbors']} neighbours agree with "
            f"a label of probability above {settings['min_confidence']:g}; {WITHOUT_STAGE3}"
        )
    if not summary["count"]:
        missing = [str(cluster) for cluster, count in enumerate(summary["passed_per_cluster"]) if not count]
        named = ("s " if len(missing) > 1 else " ") + ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        return (
            f"no label is reliable: {summary['passed']:,} pass, none of cluster{named}, and the official rule takes "
            f"as many of every cluster as the smallest has; {WITHOUT_STAGE3} or reliable.balance=False"
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
        remedies.append(ANOTHER_RULE)
    remedies += ["ask for fewer clusters"] * (passed < clusters)
    return f"{text}. To have more, {', or '.join(remedies)}."


def check(config: ReliableConfig) -> None:
    """Raise a UserError if labels cannot be selected with these settings."""
    check_ranges("reliable", config, "rule", "search", "max_neighbors", "neighbors")
    if config.search == "index" and not find_spec("faiss"):
        raise UserError("reliable.search=index needs faiss: pip install faiss-cpu")
    check_ranges("reliable", config, "ratio", "floor_fraction", "min_confidence")
