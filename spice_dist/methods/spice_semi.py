"""Stage 3 of SPICE, SPICE-Semi: the whole network learns from the reliable labels, FixMatch-style (III-C, eqs. 8-9).

Weak views of reliably labelled images teach their labels; any other image whose weak view is predicted with high
confidence teaches that class to its strong view. What is evaluated is the exponential moving average of the network.
Optimisation is that of Sohn et al. 2020: 64 labelled and 448 other images, SGD with Nesterov momentum, cosine 7/16.
The strong view draws from the 14 operations of stage 2, at their strength there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spice_dist import losses
from spice_dist.data import augment
from spice_dist.data.augment import FIXMATCH_STRONG, FIXMATCH_WEAK, View
from spice_dist.data.images import Images
from spice_dist.distributed.worker import Worker, accumulating
from spice_dist.errors import UserError
from spice_dist.methods.plumbing import (
    autocast,
    load_state,
    new_backbone,
    open_dataset,
    passes_per_step,
    place,
    state_of,
)
from spice_dist.methods.spice_self import stage2_network
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.models.momentum import copy_buffers, follow, slow_copy
from spice_dist.models.split_batch_norm import update_statistics
from spice_dist.optim import decay_kernels_only, fixmatch_cosine, set_lr
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.task import Task, require_positive

DRAW, WEAK, STRONG = 20, 21, 22  # streams of random numbers


@dataclass(frozen=True)
class SpiceSemiConfig:
    steps: int = 2**20
    labelled: int = 64  # L, images per step with a reliable label, all workers together
    ratio: int = 7  # mu = U / L, other images per labelled one
    threshold: float = 0.95  # eta, confidence from which a prediction is taken as a label
    lr: float = 0.03
    weight_decay: float = 5e-4  # on kernels only
    ema: float = 0.999  # momentum of the evaluated network
    balanced_draw: bool = True  # every cluster gives as many labelled images, however few it has; False: every image
    init: str = "scratch"  # "scratch", as published, or "stage2": the network that stages 1 and 2 trained
    weak: View = FIXMATCH_WEAK
    strong: View = FIXMATCH_STRONG


def train(task: Task, config: SpiceSemiConfig, worker: Worker) -> None:
    """Leaves the averaged network in the stage's last checkpoint, `ema.safetensors`."""
    images, manifest = open_dataset(task, worker.run, worker.device)
    labels = np.load(worker.run / "reliable/labels.npy")
    teachers = groups_of_teachers(labels, config.balanced_draw)
    if not teachers:
        raise UserError("no image has a reliable label; use --set reliable.rule=adaptive")
    groups = task.bn_groups // worker.world  # on this worker
    check(task, config)

    torch.manual_seed(task.seed)
    net = place(new_network(task, config, worker.run), worker.device)
    ema = slow_copy(net)
    optimizer = torch.optim.SGD(decay_kernels_only(net, config.weight_decay), config.lr, momentum=0.9, nesterov=True)

    parts: dict[str, nn.Module] = {"net": net, "ema": ema}
    start = 0
    if saved := worker.resume():
        start = saved.step
        load_state(parts, optimizer, saved)
    model = worker.wrap(net)

    net.train()
    passes = passes_per_step(net, groups, worker.device)
    targets = torch.from_numpy(labels)
    labelled = config.labelled // worker.world
    position = own_positions(config, worker)
    stream = images_of_steps(images, teachers, manifest.training, config, task.seed, start, worker)
    for step, (image, index) in enumerate(stream, start):
        set_lr(optimizer, config.lr * fixmatch_cosine(step / config.steps))
        weak = augment.apply(config.weak, image, position, (task.seed, step, WEAK), task.backbone.statistics)
        key = (task.seed, step, STRONG)
        strong = augment.apply(config.strong, image[labelled:], position[labelled:], key, task.backbone.statistics)

        optimizer.zero_grad()
        sums = torch.zeros(3, device=worker.device)
        views = by_group([weak[:labelled], weak[labelled:], strong], groups)  # G V C H W
        sizes = [labelled // groups, *[len(strong) // groups] * 2]
        labels_of_pass = targets[index[:labelled]].to(worker.device, non_blocking=True).chunk(passes)
        for number, (view, label) in enumerate(zip(views.chunk(passes), labels_of_pass, strict=True), 1):
            with accumulating(model, last=number == passes), autocast(worker.device, task.precision):
                logits = model(view.flatten(0, 1)).unflatten(0, view.shape[:2])
                taught_logits, weak_logits, strong_logits = (part.flatten(0, 1) for part in logits.split(sizes, dim=1))
                supervised = F.cross_entropy(taught_logits.float(), label)
                consistent, passed = losses.consistency(weak_logits, strong_logits, config.threshold)
                loss = (supervised + consistent) / passes
            loss.backward()
            sums += torch.stack([(supervised + consistent).detach(), supervised.detach(), passed]) / passes
        optimizer.step()
        update_statistics(net)
        follow(ema, net, config.ema)
        copy_buffers(ema, net)
        metrics = {"loss": sums[0], "supervised_loss": sums[1], "confident_fraction": sums[2]}
        worker.report(step + 1, config.steps, metrics, lambda: state_of(parts, optimizer))
    images.close()


def own_positions(config: SpiceSemiConfig, worker: Worker) -> Tensor:
    """Where this worker's images are in a step's global batch of L labelled and U other ones: names their views."""
    order = torch.arange(config.labelled * (1 + config.ratio))
    labelled, others = order.split([config.labelled, config.labelled * config.ratio])
    return torch.cat([part.chunk(worker.world)[worker.rank] for part in (labelled, others)])


def groups_of_teachers(labels: np.ndarray, balanced: bool) -> list[np.ndarray]:
    """The images with a reliable label, by label or all in one: every group is drawn from as often.

    A labelled image of a cluster of n_c among N then counts as if its loss had the weight N / (K n_c), of mean 1 over
    these images, but no single step sees such a weight: a cluster of one image in 5,000, K = 10, would have 500.
    """
    clusters = np.unique(labels[labels != UNRELIABLE])
    if not balanced and len(clusters):
        return [np.flatnonzero(labels != UNRELIABLE)]
    return [np.flatnonzero(labels == cluster) for cluster in clusters]


def by_group(parts: list[Tensor], groups: int) -> Tensor:
    """(G, V, ...): what each BatchNorm group sees, its share of every part (labelled, weak, strong) in turn."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1)


def new_network(task: Task, config: SpiceSemiConfig, run: Path) -> ClusterNet:
    """A network to train: what stage 1 started from, or the backbone and the selected head of stages 1 and 2."""
    if config.init == "stage2":
        return stage2_network(task, run)
    backbone = new_backbone(task)
    return ClusterNet(backbone, ClusterHeads(1, backbone.dim, task.clusters))


def images_of_steps(
    images: Images,
    teachers: list[np.ndarray],
    num_images: int,
    config: SpiceSemiConfig,
    seed: int,
    start: int,
    worker: Worker,
    span: int = 256,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This worker's images of every step from `start` on: labelled ones first, then the others, with replacement.

    A labelled one comes from any group of `teachers` with the same probability, then from any image of it alike. All
    draws are functions of (seed, step); the loader is asked for `span` steps at a time.
    """
    reliable = np.concatenate(teachers)
    sizes = np.array([len(group) for group in teachers])
    starts = sizes.cumsum() - sizes
    for first in range(start, config.steps, span):
        order = []
        for step in range(first, min(first + span, config.steps)):
            generator = np.random.default_rng([seed, step, DRAW])
            group = generator.integers(len(sizes), size=config.labelled)
            labelled = reliable[starts[group] + generator.integers(sizes[group])]
            others = generator.integers(num_images, size=config.labelled * config.ratio)
            order += [part.reshape(worker.world, -1)[worker.rank] for part in (labelled, others)]
        yield from images.batches(np.concatenate(order), config.labelled * (1 + config.ratio) // worker.world)


def check(task: Task, config: SpiceSemiConfig) -> None:
    """UserError if these settings cannot train."""
    require_positive("spice_semi", steps=config.steps, labelled=config.labelled, ratio=config.ratio)
    if config.init not in ("scratch", "stage2"):
        raise UserError(f'spice_semi.init is "{config.init}"; it can be "scratch" or "stage2"')
    if config.labelled % task.bn_groups:
        raise UserError(
            f"spice_semi.labelled is {config.labelled}, which {task.bn_groups} BatchNorm groups cannot share evenly; "
            f"make it a multiple of bn_groups"
        )
