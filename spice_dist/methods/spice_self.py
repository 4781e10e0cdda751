"""Stage 2 of SPICE, SPICE-Self: clustering heads on the frozen features by EM (Niu, Shan and Wang 2021, III-B).

E-step: per cluster, the mean feature of the most confident images is its center, and the images nearest to it get its
label; confidence comes from weak views, similarity from the images as they are. M-step: the heads learn these labels on
strong views. Several heads differ by their initial weights only; the one with the lowest loss over the whole set is
kept, which needs no labels. The backbone stays in eval mode, as the paper says (the published code lets its BatchNorm
drift), so the strong view's features are computed once per E-step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from spice_dist.data import augment
from spice_dist.data.augment import SCAN_STRONG, SCAN_WEAK, Key, View
from spice_dist.data.images import Images
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.losses import double_softmax_cross_entropy
from spice_dist.methods.plumbing import autocast, finished, load_backbone, load_state, open_dataset, place, state_of
from spice_dist.models.backbone import Backbone, unit
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.pseudo_labels import prototype_labels, selection_loss
from spice_dist.task import Task, require_positive

WEAK, STRONG, ORDER, SHUFFLE = 10, 11, 12, 13  # streams of random numbers


@dataclass(frozen=True)
class SpiceSelfConfig:
    heads: int = 10  # H
    epochs: int = 100
    samples_per_cluster: int = 500  # M / K, images of one E-step per cluster; fewer if the data set is smaller
    center_fraction: float = 0.5  # share of them that make up a center
    repeats: int = 8  # R, passes over the labels of one E-step
    minibatch: int = 128  # labelled images per head and Adam step
    lr: float = 0.005
    weak: View = SCAN_WEAK
    strong: View = SCAN_STRONG


def train(task: Task, config: SpiceSelfConfig, worker: Worker) -> None:
    """Leaves, in the last checkpoint, `heads` (all, as trained last), `best` (the selected head) and `select`."""
    images, manifest = open_dataset(task, worker.run, worker.device)
    num_images = manifest.clustered
    check(task, config, num_images)
    features = np.load(worker.run / "features/features.npy", mmap_mode="r")[:num_images]
    features = torch.from_numpy(features.astype(np.float32)).to(worker.device)
    batch = min(num_images, config.samples_per_cluster * task.clusters)  # M
    steps_per_epoch = num_images // batch
    total = config.epochs * steps_per_epoch

    backbone = place(load_backbone(task, worker.run), worker.device).eval()
    torch.manual_seed(task.seed)
    heads = ClusterHeads(config.heads, backbone.dim, task.clusters).to(worker.device)
    selection = Selection(heads, task.clusters)
    # at K clusters the first gradients are K times smaller than plain cross-entropy's; Adam's eps must not hide them
    optimizer = torch.optim.Adam(heads.parameters(), lr=config.lr, eps=1e-8 / task.clusters)

    parts: dict[str, nn.Module] = {"heads": heads, "select": selection}
    start = 0
    if saved := worker.resume():
        start = saved.step
        load_state(parts, optimizer, saved)

    for step in range(start, total):
        chosen = np.random.default_rng([task.seed, step, ORDER]).permutation(num_images)[:batch]
        views = [(config.weak, (task.seed, step, WEAK)), (config.strong, (task.seed, step, STRONG))]
        weak, strong = view_features(task, backbone, images, chosen, views)

        with torch.no_grad():  # E-step
            probs = heads(weak).softmax(2)
            members, labels = prototype_labels(features[chosen], probs, config.center_fraction)

        losses = torch.zeros((), device=worker.device)  # M-step
        order = _shuffles(config, members.shape[1], (task.seed, step, SHUFFLE)).to(worker.device)
        for positions in order:
            rows = members[:, positions]
            per_head = double_softmax_cross_entropy(heads(strong[rows]), labels[:, positions])
            optimizer.zero_grad()
            per_head.sum().backward()  # heads share no weight: the sum gives each its own gradient
            optimizer.step()
            losses += per_head.detach().mean()

        if (step + 1) % steps_per_epoch == 0:
            selection.update(heads, features, config.center_fraction)
        probes = {"select_loss": selection.loss.min} if step + 1 >= steps_per_epoch else {}  # infinite before
        worker.report(step + 1, total, {"loss": losses / len(order)}, lambda: state_of(parts, optimizer), probes)
    images.close()


class Selection(nn.Module):
    """The lowest label-free loss that each head has had, with its weights and labels at that moment."""

    def __init__(self, heads: ClusterHeads, clusters: int):
        super().__init__()
        count = len(heads.out_weight)
        self.best = ClusterHeads(count, heads.hidden_weight.shape[1], clusters).requires_grad_(False)
        self.best.load_state_dict(heads.state_dict())
        self.best.to(heads.out_weight.device)
        self.loss: Tensor
        self.register_buffer("loss", torch.full((count,), torch.inf, device=heads.out_weight.device))

    @torch.no_grad()
    def update(self, heads: ClusterHeads, features: Tensor, center_fraction: float) -> None:
        loss = selection_loss(features, heads(features), center_fraction)
        better = loss < self.loss
        self.loss[better] = loss[better]
        for kept, new in zip(self.best.parameters(), heads.parameters(), strict=True):
            kept[better] = new[better]


@torch.no_grad()
def view_features(
    task: Task,
    backbone: Backbone,
    images: Images,
    index: np.ndarray,
    views: Sequence[tuple[View, Key]],
    chunk: int = 512,
) -> list[Tensor]:
    """For each kind of random view the unit-norm features (M, D), in the order of `index`; every image is read once."""
    found: list[list[Tensor]] = [[] for _ in views]
    for batch, _ in augment.view_batches(images, index, chunk, views, task.backbone.statistics):
        for features, view in zip(found, batch, strict=True):
            with autocast(view.device, task.precision):
                features.append(unit(backbone(view).float()))
    return [torch.cat(features) for features in found]


def load_heads(task: Task, run: Path, dim: int) -> tuple[ClusterHeads, Tensor]:
    """Every head at its best moment, and their label-free losses (H,): the lowest one is the one to use."""
    saved = finished(run / "spice_self").tensors("select")
    loss = saved.pop("loss")
    heads = ClusterHeads(len(loss), dim, task.clusters)
    heads.load_state_dict({name.removeprefix("best."): value for name, value in saved.items()})
    return heads, loss


def stage2_network(task: Task, run: Path) -> ClusterNet:
    """The backbone of stage 1 with the selected head of stage 2."""
    backbone = load_backbone(task, run)
    heads, loss = load_heads(task, run, backbone.dim)
    return ClusterNet(backbone, heads.select(int(loss.argmin())))


def _shuffles(config: SpiceSelfConfig, positions: int, key: tuple[int, int, int]) -> Tensor:
    """(steps, minibatch) positions: R shuffles, each cut into whole minibatches, shared by all heads as published."""
    size = min(config.minibatch, positions)
    generator = np.random.default_rng(key)
    rounds = [generator.permutation(positions)[: positions // size * size] for _ in range(config.repeats)]
    return torch.from_numpy(np.concatenate(rounds).reshape(-1, size))


def check(task: Task, config: SpiceSelfConfig, num_images: int) -> None:
    """UserError if these settings cannot train on so many images."""
    sizes = {"heads": config.heads, "repeats": config.repeats, "minibatch": config.minibatch}
    require_positive("spice_self", epochs=config.epochs, samples_per_cluster=config.samples_per_cluster, **sizes)
    if num_images < 2 * task.clusters:
        raise UserError(
            f"{num_images} images are too few for {task.clusters} clusters: prototypes need at least two images each; "
            f"ask for {num_images // 2} clusters or fewer"
        )
