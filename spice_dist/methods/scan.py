"""SCAN (Van Gansbeke et al. 2020), SPICE's baseline, from the same weights of stage 1, in two stages.

`train`: an image and one of its nearest neighbours in the features of stage 1 belong to the same cluster, and all
clusters should be equally frequent. The whole network minimises (eq. 2)

    L = -mean_i log <p_i, p_n(i)> - lambda H(mean_i p_i).

p is the softmax of a linear head on strong views. n(i) is one of the nearest neighbours of image i, itself included,
drawn anew each epoch. The mean in the entropy is over the global batch. After each epoch this loss without labels, on
images without augmentation, with an image and its five nearest others and lambda = 1, selects among epochs and heads.

`self_label`: if an image is predicted with a probability above the threshold, its strong view learns that cluster. All
clusters with such images have equal weight. Predictions are made in eval mode; the authors' program makes them in train
mode (digits: ACC .963 here, .960 so).

As all clustering heads here, these have input of unit norm, which the published ones have not.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_dist import artifacts, losses
from spice_dist.clustering import Clustering
from spice_dist.data import augment
from spice_dist.data.files import Progress
from spice_dist.data.images import Images
from spice_dist.data.order import epoch_order, worker_batches
from spice_dist.data.views import PLAIN, SCAN_STRONG, View
from spice_dist.distributed import collectives
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.inference import outputs, reduced
from spice_dist.methods.plumbing import (
    autocast,
    black_images,
    by_group,
    check_batch,
    finished,
    in_passes,
    load_backbone,
    named,
    open_dataset,
    own_positions,
    passes_that_fit,
    place,
    resume,
    state_of,
    view_lists,
)
from spice_dist.models.backbone import Backbone, unit
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.models.momentum import copy_where
from spice_dist.models.split_batch_norm import update_statistics
from spice_dist.neighbors import nearest
from spice_dist.optim import adam
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.settings import check_ranges, setting
from spice_dist.task import Task
from spice_dist.transfer import send

NEIGHBOR, VIEW = 40, 41  # streams of random numbers
SELECTED_BY = 6  # an image and its five nearest others, by which epochs and heads are compared
BETAS = (0.9, 0.999)  # of Adam


@dataclass(frozen=True)
class ScanConfig:
    epochs: int = setting(50, "passes over the images", above=0)
    batch: int = setting(
        128, "images per optimizer step, all workers together; as many neighbours beside them", above=0
    )
    lr: float = setting(1e-4, "learning rate of Adam", above=0)
    weight_decay: float = setting(1e-4, "on every parameter, as part of the gradient", least=0)
    neighbors: int = setting(
        21, "of each image, itself included", least=2, remedy="give 2 or more: the nearest one is the image itself"
    )
    entropy_weight: float = setting(5.0, "lambda, which keeps all clusters in use", least=0)
    heads: int = setting(1, "linear heads on one backbone, of which the lowest selection loss takes one", above=0)
    view: View = setting(SCAN_STRONG, "of an image and of its neighbour")


@dataclass(frozen=True)
class SelfLabelConfig:
    epochs: int = setting(200, "passes over the images", above=0)
    batch: int = setting(1000, "images per optimizer step, all workers together", above=0)
    lr: float = setting(1e-4, "learning rate of Adam", above=0)
    weight_decay: float = setting(1e-4, "on every parameter, as part of the gradient", least=0)
    threshold: float = setting(0.99, "probability above which a prediction is taken as a label", least=0, below=1)
    view: View = setting(SCAN_STRONG, "that learns this label")


class ScanNet(nn.Module):
    """A backbone and all heads: images (B, C, H, W) to logits (heads, B, K)."""

    def __init__(self, backbone: Backbone, heads: ClusterHeads):
        super().__init__()
        self.backbone, self.heads = backbone, heads

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "heads B K"]:
        return self.heads(unit(self.backbone(images)))


class Selection(nn.Module):
    """Holds the network of the epoch in which a head had the lowest selection loss, and all heads' losses then."""

    def __init__(self, net: ScanNet):
        super().__init__()
        self.net = deepcopy(net).requires_grad_(False)
        self.loss: Tensor
        self.register_buffer("loss", torch.full_like(net.heads.biases[0][:, 0, 0].detach(), torch.inf))

    def update(self, net: ScanNet, loss: Float[Tensor, " heads"]) -> None:
        better = loss.min() < self.loss.min()
        copy_where(better, self.net, net)
        self.loss.copy_(loss.where(better, self.loss))


def train(task: Task, config: ScanConfig, worker: Worker) -> None:
    """Train; the last checkpoint holds the selected network and its heads' losses, see `trained`."""
    images, manifest = open_dataset(task, worker)
    check(task, config, manifest.clustered)
    steps_per_epoch = manifest.clustered // config.batch
    total = config.epochs * steps_per_epoch
    groups = task.bn_groups // worker.world  # on this worker
    neighbors = find_neighbors(config, manifest.clustered, worker)

    torch.manual_seed(task.seed)
    backbone = load_backbone(task, worker.run)
    net = place(ScanNet(backbone, ClusterHeads(config.heads, backbone.dim, task.clusters, layers=1)), worker.device)
    selection = Selection(net)
    optimizer = adam(net.parameters(), config.lr, BETAS, config.weight_decay)
    parts: dict[str, nn.Module] = {"net": net, "selection": selection}
    start = resume(worker, parts, optimizer)
    model = worker.wrap(net)

    net.train()

    def trial(passes: int) -> Tensor:
        views = black_images(task, 2 * config.batch // worker.world // passes, config.view.size, worker)
        # the entropy is of the whole batch: all passes wait for it
        return torch.stack([net(views).sum() for _ in range(passes)]).sum()

    passes = passes_that_fit(task, [net], 2 * config.batch, trial, optimizer, worker)
    position = own_positions([config.batch, config.batch], worker)
    for step, (image, _) in enumerate(pairs(images, neighbors, config, task.seed, start, worker), start):
        if worker.leaves_out(step):
            continue
        view = augment.apply(config.view, image, position, (task.seed, step, VIEW), task.backbone.statistics)
        views = by_group(view.chunk(2), groups)  # G V C H W, in each group the images, then their neighbours
        optimizer.zero_grad()
        logits: list[list[Tensor]] = []  # for each pass of the images and of their neighbours, (heads, B, K)
        for (views_of_pass,) in in_passes(model, views.chunk(passes)):
            with autocast(worker.device, task.precision):
                out = model(views_of_pass.flatten(0, 1)).unflatten(1, views_of_pass.shape[:2])  # heads G V K
            logits.append([half.flatten(1, 2) for half in out.chunk(2, dim=2)])
        consistency = torch.stack([losses.neighbor_consistency(image, other) for image, other in logits]).mean(0)
        sums = torch.stack([image.softmax(-1).sum(1) for image, _ in logits]).sum(0)
        entropy = losses.entropy(collectives.total(sums) / config.batch)
        loss = consistency - config.entropy_weight * entropy
        loss.sum().backward()  # heads share no weight: the sum gives each its own gradient
        optimizer.step()
        update_statistics(net)

        if (step + 1) % steps_per_epoch == 0:
            selection.update(net, selection_loss(task, net, images, neighbors[:, :SELECTED_BY], worker))
            net.train()
        metrics = {"consistency": consistency.detach().mean(), "entropy": entropy.detach().mean()}
        mean = loss.detach().mean()
        probes = {"select_loss": selection.loss.min} if step + 1 >= steps_per_epoch else {}  # before, it is infinite
        worker.report(step + 1, total, mean, lambda: state_of(parts, optimizer), metrics, probes)
    images.close()


def self_label(task: Task, config: SelfLabelConfig, worker: Worker) -> None:
    """Train; the stage's last checkpoint holds the network of the last step, see `network`.

    Raises:
        UserError: no image of the first batch is predicted with a probability above the threshold.
    """
    images, manifest = open_dataset(task, worker)
    check_self_label(task, config, manifest.clustered)
    total = config.epochs * (manifest.clustered // config.batch)
    scan_net, loss = trained(task, worker.run)
    net = place(ClusterNet(scan_net.backbone, scan_net.heads.select(int(loss.argmin()))), worker.device)
    optimizer = adam(net.parameters(), config.lr, BETAS, config.weight_decay)
    start = resume(worker, {"net": net}, optimizer)
    model = worker.wrap(net)

    def trial(passes: int) -> Tensor:
        return net(black_images(task, config.batch // worker.world // passes, config.view.size, worker)).sum()

    passes = passes_that_fit(task, [net], config.batch, trial, optimizer, worker)
    kinds = [PLAIN, config.view]
    stream = view_lists(task, images, manifest.clustered, config.batch, config.epochs, kinds, start, worker)
    for step, (plain, strong) in enumerate(stream, start):
        if worker.leaves_out(step):
            continue
        labels = [confident_labels(task, net, view, config.threshold) for view in plain.chunk(passes)]
        counts = collectives.all_gather(label_counts(torch.cat(labels), task.clusters)[None]).sum(0)
        if step == 0 and not counts.any():
            raise UserError(
                f"no image of the first {config.batch} is predicted with a probability above {config.threshold:g}, so "
                "there is nothing to label; lower self_label.threshold, or train longer with scan.epochs"
            )
        net.train()
        optimizer.zero_grad()
        loss = torch.zeros((), device=worker.device)
        for view, label in in_passes(model, strong.chunk(passes), labels):
            with autocast(worker.device, task.precision):
                logits = model(view)
            # the workers' losses are parts of a sum, but their gradients are averaged
            loss_of_pass = worker.world * losses.class_balanced_cross_entropy(logits, label, counts)
            loss_of_pass.backward()
            loss += loss_of_pass.detach()
        optimizer.step()
        update_statistics(net)
        metrics = {
            "confident_fraction": counts.sum() / config.batch,
            "clusters_taught": (counts > 0).float().mean(),
        }
        worker.report(step + 1, total, loss, lambda: state_of({"net": net}, optimizer), metrics)
    images.close()


@torch.no_grad()
def find_neighbors(config: ScanConfig, num_images: int, worker: Worker) -> Int[np.ndarray, "N S"]:
    """Find the nearest images of each in the features of stage 1, itself included; a worker searches its share."""
    stored = artifacts.stored_features(worker.run, num_images)
    features = torch.from_numpy(stored.astype(np.float32)).to(worker.device)
    neighbors = nearest(features, config.neighbors, collectives.share(num_images))
    return collectives.gather_shares(neighbors, num_images).cpu().numpy()


def pairs(
    images: Images, neighbors: Int[np.ndarray, "N S"], config: ScanConfig, seed: int, start: int, worker: Worker
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this worker's images of every step from `start` on, then a neighbour of each, drawn uniformly."""
    num_images, count = neighbors.shape
    steps = num_images // config.batch
    for epoch in range(start // steps, config.epochs):
        order = epoch_order(seed, epoch, num_images)
        drawn = np.random.default_rng([seed, epoch, NEIGHBOR]).integers(count, size=num_images)
        both = (order, neighbors[order, drawn].astype(np.int64))
        batches = np.concatenate([worker_batches(i, config.batch, worker.world, worker.rank) for i in both], axis=1)
        batches = batches[max(0, start - epoch * steps) :]
        if len(batches):
            yield from images.batches(batches.ravel(), batches.shape[1])


@torch.no_grad()
def selection_loss(
    task: Task, net: ScanNet, images: Images, neighbors: Int[np.ndarray, "N S"], worker: Worker
) -> Float[Tensor, " heads"]:
    """Compute every head's eq. (2) with lambda = 1 on images without augmentation, the mean over these neighbours.

    This takes a forward pass over the images, shared by the workers, and memory for their logits of all heads.
    """
    share = collectives.share(len(neighbors))
    index = np.arange(share.start, share.stop)
    chunks = outputs(net, images, index, task.backbone.statistics, precision=task.precision)
    by_image = torch.cat([logits.transpose(0, 1) for logits in chunks])
    logits = collectives.gather_shares(by_image, len(neighbors)).transpose(0, 1)
    columns = send(torch.from_numpy(neighbors), worker.device).long().unbind(1)
    consistency = torch.stack([losses.neighbor_consistency(logits, logits[:, column]) for column in columns]).mean(0)
    return consistency - losses.entropy(logits.softmax(-1).mean(1))


@torch.no_grad()
def confident_labels(
    task: Task, net: ClusterNet, images: Float[Tensor, "B C H W"], threshold: float
) -> Int[Tensor, " B"]:
    """Predict in eval mode the clusters of probability above the threshold, UNRELIABLE for other images."""
    net.eval()
    with autocast(images.device, task.precision):
        logits = net(images)
    confidence, label = logits.float().softmax(1).max(1)
    return label.where(confidence > threshold, UNRELIABLE)


def label_counts(labels: Int[Tensor, " B"], clusters: int) -> Int[Tensor, " K"]:
    """Count the images of every label, without a wait for the GPU; UNRELIABLE is not counted."""
    known = labels != UNRELIABLE
    return (F.one_hot(labels.where(known, 0), clusters) * known[:, None]).sum(0)


def trained(task: Task, run: Path) -> tuple[ScanNet, Float[Tensor, " heads"]]:
    """Load the network that the selection loss chose, before self-labelling, and the loss of each of its heads."""
    tensors = finished(run / "scan").tensors("selection")
    heads = ClusterHeads.holding(named(tensors, "net.heads."))
    backbone = Backbone(task.backbone, task.data.channels, task.data.size)
    backbone.load_state_dict(named(tensors, "net.backbone."))
    return ScanNet(backbone, heads), tensors["loss"]


def network(task: Task, run: Path) -> ClusterNet:
    """Load the network after self-labelling."""
    tensors = finished(run / "self_label").tensors("net")
    backbone = Backbone(task.backbone, task.data.channels, task.data.size)
    net = ClusterNet(backbone, ClusterHeads.holding(named(tensors, "head.")))
    net.load_state_dict(tensors)
    return net


def result(
    task: Task, config: ScanConfig, run: Path, device: torch.device, progress: Progress, until: str | None
) -> Clustering:
    """Return the network after self-labelling, or before it for a run that ends so; heads are those before it."""
    scan_net, loss = trained(task, run)
    by_head = reduced(scan_net, task, run, device, _labels_by_head, progress)[0].T
    selected = int(loss.argmin())
    if until == "scan":
        net = ClusterNet(scan_net.backbone, scan_net.heads.select(selected))
        return Clustering(task, net, by_head, loss, last="scan")
    before = by_head[selected]
    return Clustering(task, network(task, run), by_head, loss, stages={"scan": lambda: before}, last="self_label")


def _labels_by_head(logits: Float[Tensor, "heads B K"]) -> tuple[np.ndarray]:
    return (logits.argmax(2).cpu().numpy().T,)


def check(task: Task, config: ScanConfig, num_images: int) -> None:
    """Raise a UserError if the stage `scan` cannot train on so many images."""
    check_ranges("scan", config, "epochs", "batch", "lr", "heads")
    check_batch(task, "scan", config.batch, num_images)
    check_ranges("scan", config, "neighbors")
    if config.neighbors > num_images:
        raise UserError(f"scan.neighbors is {config.neighbors}, more than the {num_images} images; give fewer")
    check_ranges("scan", config, "weight_decay", "entropy_weight")


def check_self_label(task: Task, config: SelfLabelConfig, num_images: int) -> None:
    """Raise a UserError if the stage `self_label` cannot train on so many images."""
    check_ranges("self_label", config, "epochs", "batch", "lr")
    check_batch(task, "self_label", config.batch, num_images)
    check_ranges("self_label", config, "weight_decay", "threshold")
