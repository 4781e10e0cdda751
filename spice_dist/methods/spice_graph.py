"""Stage 2 on the graph of nearest neighbours: SPICE's EM on frozen features, for a network that is trained already.

`spice_self` starts from random heads and encodes random views. Here each image is encoded once, each head starts from a
clustering of the neighbour graph (`spice_dist.graph`), the best of several attempts by modularity, and neighbours take
the place of views. E-step: a head's probabilities are spread over neighbours and scaled to the sizes of its clusters,
p(k) = mean of its start. These sizes are estimated, where SPICE's quotas are equal (P2OT's aim of an uneven prior, by
Sinkhorn's scaling). The share `anchor` of the start is added, without which the heads drift to the classes that are
easiest to separate. M-step: each head, one linear layer, learns these probabilities by cross-entropy.

The result is the consensus of the heads, the mean after matching their clusters. Their agreement is an image's
confidence. One more head learns the consensus: with the backbone it is the model for new images. The clusters of the
run's images, which have neighbours, come from the head's and the consensus' probabilities together.

Prototypes as in eqs. (2)-(4) were worse: equal quotas on unequal clusters, or the nearest images to one center, cost 5
to 16 points of NMI against the start.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_dist import artifacts, graph
from spice_dist.data.files import Progress, publish
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.methods.plumbing import finished, load_backbone, resume, state_of, tell_if_one_takes_all
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.neighbors import distinct, nearest, nearest_by_index, search, without_itself
from spice_dist.settings import allowed, check_ranges, setting
from spice_dist.task import Task
from spice_dist.transfer import send

SHUFFLE, SAMPLE = 40, 41  # streams of random numbers
CHUNK = 65_536  # images of a head's forward pass
MIN_IMAGES = 10
FEW_CLUSTERS = 20  # up to which all attempts are made
TEMPERATURES = 1.05 ** np.arange(-60, 61)  # 0.05 to 19


@dataclass(frozen=True)
class GraphConfig:
    neighbors: int = setting(30, "S, of each image, itself not counted; at most N - 1", above=0)
    search: str = setting(
        "exact",
        "of neighbours; index: by faiss, for tens of millions of images, approximate",
        choices=("exact", "index"),
    )


@dataclass(frozen=True)
class SpiceGraphConfig:
    counts: tuple[int, ...] = setting(
        (10, 15, 20), "k, neighbours of a graph; with walks they make H clusterings and heads", least=1
    )
    walks: tuple[int, ...] = setting((6, 8, 12), "t, steps of the random walk", least=1)
    attempts: int = setting(
        15,
        "at these H clusterings, with and without the features beside the map; fewer above 20 clusters; 0: once",
        least=0,
    )
    spread: int = setting(15, "neighbours that a probability is averaged over", above=0)
    rounds: int = setting(2, "E-steps", above=0)
    epochs: int = setting(4, "passes over the images in an M-step, at least", above=0)
    steps: int = setting(300, "of the optimizer in an M-step, at least: few images are passed over more often", above=0)
    minibatch: int = setting(256, "images per optimizer step", above=0)
    lr: float = setting(1e-3, "learning rate of AdamW", above=0)
    weight_decay: float = setting(1e-3, "of AdamW", least=0)
    anchor: float = setting(0.25, "share of the start in what a head learns", least=0, most=1)

    @property
    def heads(self) -> int:  # H
        return len(self.counts) * len(self.walks)

    def attempts_for(self, clusters: int) -> int:
        """Return the number of attempts: k-means takes as much longer as there are more clusters."""
        return min(self.attempts, max(1, self.attempts * FEW_CLUSTERS // clusters))


@torch.no_grad()
def find_neighbors(task: Task, config: GraphConfig, worker: Worker) -> None:
    """Write `graph/neighbors.npy` (N, S) int32: the other clustered images nearest to each by cosine, nearest first.

    Raises:
        UserError: a feature is not finite.
    """
    manifest = artifacts.manifest(worker.run)
    features = artifacts.features(worker.run, manifest.clustered)
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(1)).sum())
        raise UserError(f"the network gives features that are no numbers for {bad} images; its weights are damaged")
    count = min(config.neighbors + 1, len(features))

    def progress(done: int, total: int) -> None:
        worker.progress(done, total, None)

    on_device = torch.from_numpy(features).to(worker.device)
    if config.search == "index":
        neighbors = nearest_by_index(on_device.cpu(), count, progress=progress)
    else:
        neighbors = nearest(on_device, count, progress=progress)
    (worker.run / "graph").mkdir(exist_ok=True)
    with publish(artifacts.neighbors_file(worker.run)) as file:
        np.save(file, without_itself(neighbors.cpu().numpy().astype(np.int32)))


def train(task: Task, config: SpiceGraphConfig, worker: Worker) -> None:
    """Train; write `start.npy` (H, N), `posterior.npy` (N, K) and `agreement.npy` (N,) in the stage's folder.

    The last checkpoint holds `heads`, all H of them, and `best`, the head that learned their consensus.
    """
    neighbors = artifacts.neighbors(worker.run)
    config = for_images(config, len(neighbors), task.clusters)
    features = torch.from_numpy(artifacts.features(worker.run, len(neighbors))).to(worker.device)
    check_distinct(task, features)
    starts = start_probabilities(task, config, features, neighbors, worker)

    torch.manual_seed(task.seed)
    heads = ClusterHeads(config.heads, features.shape[1], task.clusters, layers=1).to(worker.device)
    best = ClusterHeads(1, features.shape[1], task.clusters, layers=1).to(worker.device)
    parts: dict[str, nn.Module] = {"heads": heads, "best": best}
    trained = [*heads.parameters(), *best.parameters()]
    optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay, fused=True)
    start = resume(worker, parts, optimizer)
    total = config.rounds + 1
    for step in range(start, total):
        targets = e_step(config, heads, features, neighbors, starts) if step else starts
        learner = heads
        if step == config.rounds:  # last: one more head learns the consensus
            learner, targets = best, consensus(task, targets, worker.run)[0][None]
        loss = m_step(task, config, learner, optimizer, features, targets, step)
        if learner is best:
            calibrate(best, features, targets[0])
        worker.report(step + 1, total, loss, lambda: state_of(parts, optimizer), every=1)
    write_posterior(task, config, worker.run, parts, features, neighbors, starts)
    tell_if_one_takes_all("spice_graph", torch.from_numpy(artifacts.posterior(worker.run).argmax(1)), worker)


def consensus(
    task: Task, targets: Float[np.ndarray, "H N K"], run: Path
) -> tuple[Float[np.ndarray, "N K"], Float[np.ndarray, " N"]]:
    """Do as `graph.consensus`; clusters have the numbers of the earlier run that this one goes on from.

    With as many clusters, an image's cluster there counts as much as all heads together, so that it rarely moves.
    """
    mean, agreement = graph.consensus(targets, seed=task.seed)
    if (earlier := artifacts.earlier_labels(run)) is None:
        return mean, agreement
    earlier = earlier[: len(mean)]
    mean[:, graph.numbered_as(earlier, mean.argmax(1), task.clusters)] = mean.copy()
    known = np.flatnonzero(earlier >= 0)
    if artifacts.earlier_clusters(run)[0] == task.clusters:
        mean[known] = (mean[known] + np.eye(task.clusters)[earlier[known]]) / 2
    return mean, agreement


def for_images(config: SpiceGraphConfig, images: int, clusters: int) -> SpiceGraphConfig:
    """Limit neighbours to half of a cluster's mean size: more would reach into other clusters."""
    most = max(2, images // (2 * clusters))
    counts = tuple(min(count, most) for count in config.counts)
    return replace(config, counts=counts, spread=min(config.spread, most))


def check_distinct(task: Task, features: Float[Tensor, "N D"]) -> None:
    """Raise a UserError if there are fewer distinct images than clusters."""
    count = len(distinct(features.cpu().numpy())[0])
    if count == 1:
        raise UserError(f"all {len(features)} images are alike: there are no groups to find; give other images")
    if count < task.clusters:
        raise UserError(
            f"only {count} of {len(features)} images differ, too few for {task.clusters} clusters: ask for {count} or "
            "fewer"
        )


def start_probabilities(
    task: Task, config: SpiceGraphConfig, features: Tensor, neighbors: Int[np.ndarray, "N S"], worker: Worker
) -> Float[np.ndarray, "H N K"]:
    """Compute each head's start, float32: a clustering of the neighbour graph, spread over neighbours."""
    path = artifacts.graph_starts_file(worker.run)
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        labels = clusterings(task, config, features, neighbors, lambda done, total: worker.progress(done, total, None))
        with publish(path) as file:
            np.save(file, labels.astype(np.int32))
    one_hot = np.eye(task.clusters, dtype=np.float32)
    starts, near = artifacts.graph_starts(worker.run), neighbors[:, : config.spread]
    return np.stack([graph.spread(one_hot[row], near) for row in starts])


def clusterings(
    task: Task,
    config: SpiceGraphConfig,
    features: Tensor,
    neighbors: Int[np.ndarray, "N S"],
    progress: Progress = lambda done, total: None,
) -> Int[np.ndarray, "H N"]:
    """Cluster by `graph.best_clusterings`; if images are many, a sample, and the others by their nearest landmarks."""

    def cluster(rows: Tensor, near: Int[np.ndarray, "M S"]) -> Int[np.ndarray, "H M"]:
        graphs = (task.clusters, config.counts, config.walks)
        attempts = config.attempts_for(task.clusters)
        if not attempts:
            return graph.graph_clusterings(near, *graphs, task.seed)
        return graph.best_clusterings(near, rows.cpu().numpy(), *graphs, attempts, task.seed, progress)

    most = graph.landmarks(task.clusters)
    if len(neighbors) <= most:
        return cluster(features, neighbors)
    chosen = np.sort(np.random.default_rng([task.seed, SAMPLE]).permutation(len(neighbors))[:most])
    sample = features[torch.from_numpy(chosen).to(features.device)]
    among = nearest(sample, max(config.counts) + 1).cpu().numpy().astype(np.int32)
    labels = cluster(sample, without_itself(among))
    _, near = search(sample, features, config.spread)
    near, one_hot = near.cpu().numpy(), np.eye(task.clusters, dtype=np.float32)
    return np.stack([graph.neighbor_mean(one_hot[row], near).argmax(1) for row in labels])


def e_step(
    config: SpiceGraphConfig, heads: ClusterHeads, features: Tensor, neighbors: Int[np.ndarray, "N S"],
    starts: Float[np.ndarray, "H N K"],
) -> Float[np.ndarray, "H N K"]:  # fmt: skip
    """Compute each head's targets: its probabilities spread over neighbours and scaled to its sizes, plus its start.

    The sizes are those of the head's start. Without the scaling large clusters would grow from round to round.
    """
    near = neighbors[:, : config.spread]
    targets = []
    for probs, start in zip(outputs(heads, features), starts, strict=True):
        scaled = graph.with_sizes(graph.spread(probs, near), start.mean(0))
        targets.append((1 - config.anchor) * scaled + config.anchor * start)
    return np.stack(targets).astype(np.float32)


def m_step(
    task: Task, config: SpiceGraphConfig, heads: ClusterHeads, optimizer: torch.optim.Optimizer,
    features: Float[Tensor, "N D"], targets: Float[np.ndarray, "H N K"], step: int,
) -> Float[Tensor, ""]:  # fmt: skip
    """Train by cross-entropy with soft labels, for `passes` over the images; return the mean loss of a head."""
    labels = torch.from_numpy(targets).to(features.device)
    sums, count = torch.zeros((), device=features.device), 0
    for rows in _minibatches(task, config, len(features), step):
        at = send(rows, features.device)
        logits = F.log_softmax(heads(features[at]), 2)
        loss = -(labels[:, at] * logits).sum(2).mean(1).sum()  # heads share no weight: each gets its own gradient
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums, count = sums + loss.detach() / len(heads), count + 1
    return sums / count


def passes(config: SpiceGraphConfig, images: int) -> int:
    """Return the passes over the images in an M-step: `epochs`, or more for at least `steps` minibatches."""
    return max(config.epochs, math.ceil(config.steps / math.ceil(images / config.minibatch)))


def _minibatches(task: Task, config: SpiceGraphConfig, images: int, step: int) -> Iterator[Int[Tensor, " B"]]:
    for epoch in range(passes(config, images)):
        order = np.random.default_rng([task.seed, step, epoch, SHUFFLE]).permutation(images)
        yield from torch.from_numpy(order).split(config.minibatch)


@torch.no_grad()
def outputs(heads: ClusterHeads, features: Float[Tensor, "N D"]) -> Float[np.ndarray, "H N K"]:
    """Compute the probabilities of all heads for all images, float32, on the host."""
    return torch.cat([heads(chunk).softmax(2).cpu() for chunk in features.split(CHUNK)], 1).numpy()


@torch.no_grad()
def calibrate(head: ClusterHeads, features: Float[Tensor, "N D"], targets: Float[np.ndarray, "N K"]) -> None:
    """Divide the logits by the temperature of lowest cross-entropy with `targets`, the mean over the other heads.

    The head's confidence then matches the agreement of the other heads (Guo et al. 2017).
    """
    wanted = torch.from_numpy(targets).to(features.device)
    logits = torch.cat([head(chunk)[0] for chunk in features.split(CHUNK)])
    losses = [-(wanted * F.log_softmax(logits / value, 1)).sum(1).mean() for value in TEMPERATURES.tolist()]
    temperature = float(TEMPERATURES[int(torch.stack(losses).argmin())])
    for parameter in head.parameters():
        parameter /= temperature


def write_posterior(
    task: Task, config: SpiceGraphConfig, run: Path, parts: dict[str, nn.Module], features: Tensor,
    neighbors: Int[np.ndarray, "N S"], starts: Float[np.ndarray, "H N K"],
) -> None:  # fmt: skip
    """Write every image's posterior and the share of the heads that agree with their consensus.

    The posterior is the geometric mean of the consensus and of the head that learned it, both spread over neighbours.
    """
    heads, best = parts["heads"], parts["best"]
    assert isinstance(heads, ClusterHeads)
    assert isinstance(best, ClusterHeads)
    mean, agreement = consensus(task, e_step(config, heads, features, neighbors, starts), run)
    learned = graph.spread(outputs(best, features)[0], neighbors[:, : config.spread])
    joint = np.sqrt(np.maximum(learned, 1e-6) * np.maximum(mean, 1e-6))
    for name, values in {"posterior": joint / joint.sum(1, keepdims=True), "agreement": agreement}.items():
        with publish(run / f"spice_graph/{name}.npy") as file:
            np.save(file, values.astype(np.float16))


def head_of(
    task: Task, config: SpiceGraphConfig, features: Float[Tensor, "N D"], labels: Int[np.ndarray, " N"]
) -> ClusterHeads:
    """Train a linear head on these clusters."""
    return head_for(task, config, features, np.eye(task.clusters, dtype=np.float32)[labels])


def head_for(
    task: Task, config: SpiceGraphConfig, features: Float[Tensor, "N D"], targets: Float[np.ndarray, "N K"]
) -> ClusterHeads:
    """Train a linear head on these probabilities, float32."""
    torch.manual_seed(task.seed)
    head = ClusterHeads(1, features.shape[1], task.clusters, layers=1).to(features.device)
    optimizer = torch.optim.AdamW(head.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
    for step in range(config.rounds + 1):
        m_step(task, config, head, optimizer, features, targets[None], step)
    return head


def network(task: Task, run: Path) -> ClusterNet:
    """Load the trained network with the head that learned the consensus."""
    return ClusterNet(load_backbone(task, run), ClusterHeads.holding(finished(run / "spice_graph").tensors("best")))


def predicted(run: Path, index: Int[np.ndarray, " M"], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the clusters of these images of the run and their probabilities, (M,) each."""
    probs = artifacts.posterior(run)
    best = torch.from_numpy(probs[index].astype(np.float32)).to(device).max(1)
    return best.indices, best.values


def check(task: Task, config: SpiceGraphConfig, neighbors: GraphConfig, num_images: int) -> None:
    """Raise a UserError if these settings cannot train on so many images."""
    check_ranges("spice_graph", config, "attempts", "spread", "rounds", "epochs", "steps", "minibatch", "lr")
    check_ranges("graph", neighbors, "neighbors", "search")
    for name in ("counts", "walks"):
        if not ((values := getattr(config, name)) and allowed(config, name)):
            raise UserError(f"spice_graph.{name} is {values}; give whole numbers from 1 up")
    if max(*config.counts, config.spread) > neighbors.neighbors:
        raise UserError(
            f"spice_graph.counts and spread ask for {max(*config.counts, config.spread)} neighbours, more than "
            f"graph.neighbors, {neighbors.neighbors}; raise that"
        )
    if not (allowed(config, "anchor") and allowed(config, "weight_decay")):
        raise UserError("spice_graph.anchor must be between 0 and 1, and spice_graph.weight_decay at least 0")
    if num_images < max(MIN_IMAGES, 2 * task.clusters):
        raise UserError(
            f"{num_images} images are too few for groups from neighbours: give {max(MIN_IMAGES, 2 * task.clusters)} or "
            f"more" + f", or ask for {num_images // 2} clusters or fewer" * (num_images >= MIN_IMAGES)
        )
