"""Stage 3 of SPICE, SPICE-Semi: the whole network learns from the reliable labels, FixMatch-style (III-C, eqs. 8-9).

Weak views of reliably labelled images teach their labels; any other image whose weak view is predicted with high
confidence teaches that class to its strong view. What is evaluated is the exponential moving average of the network.
Optimisation is that of Sohn et al. 2020: 64 labelled and 448 other images, SGD with Nesterov momentum, cosine 7/16.

Beyond the paper: FreeMatch's thresholds, which follow the network's confidence, and reliable labels that are made again
from the averaged network while it trains.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from spice_dist import artifacts, losses
from spice_dist.catalog import USING_LABELS
from spice_dist.data import augment
from spice_dist.data.images import Images
from spice_dist.data.views import FIXMATCH_STRONG, FIXMATCH_WEAK, View
from spice_dist.distributed import collectives
from spice_dist.distributed.worker import Probes, Worker, accumulating
from spice_dist.errors import UserError
from spice_dist.inference import CHUNK, outputs
from spice_dist.methods.plumbing import (
    autocast,
    by_group,
    finished,
    new_backbone,
    open_dataset,
    own_positions,
    passes_per_step,
    place,
    resume,
    state_of,
    view_features,
)
from spice_dist.methods.reliable import ReliableConfig, choose
from spice_dist.methods.stage2 import stage2_network
from spice_dist.models.backbone import unit
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.models.momentum import AdaptiveThreshold, copy_buffers, follow, slow_copy
from spice_dist.models.presets import for_small_images
from spice_dist.models.split_batch_norm import set_momentum, update_statistics
from spice_dist.models.wide_resnet import SHAPES
from spice_dist.optim import decay_kernels_only, fixmatch_cosine, set_lr
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.settings import check_ranges, setting
from spice_dist.task import Task

DRAW, WEAK, STRONG, SAMPLE = 20, 21, 22, 23  # streams of random numbers
CALIBRATED = 2048  # images by which the temperature of stage 2's head is found
SETTLED = 0.1  # share of the steps after which every cluster should be predicted now and then
ENOUGH = 100  # predictions for each cluster from which it can be told that one gets none


@dataclass(frozen=True)
class SpiceSemiConfig:
    steps: int = setting(2**20, "of the optimizer", above=0)
    labelled: int = setting(64, "L, images per step with a reliable label, all workers together", above=0)
    ratio: int = setting(
        7,
        "mu = U / L, other images per labelled one; 0: labelled ones alone",
        least=0,
        remedy="give 1 or more, or 0 for labelled images alone",
    )
    threshold_rule: str = setting(
        "fixed",
        "adaptive: FreeMatch's, which rises with the network's confidence, class by class",
        choices=("fixed", "adaptive"),
        remedy='it can be "fixed" or "adaptive"',
    )
    threshold: float = setting(
        0.95, "eta of the fixed rule, confidence from which a prediction is taken as a label", least=0, most=1
    )
    threshold_momentum: float = setting(0.999, "lambda of the adaptive rule", least=0, most=1)
    lr: float = setting(0.03, "learning rate of SGD; falls along a cosine")
    weight_decay: float = setting(5e-4, "on kernels only")
    ema: float = setting(0.999, "momentum of the evaluated network")
    balanced_draw: bool = setting(
        True, "every cluster gives as many labelled images, however few it has; False: every image"
    )
    init: str = setting(
        "scratch",
        "scratch, as published, or stage2: the network that stages 1 and 2 trained",
        choices=("scratch", "stage2"),
        remedy='it can be "scratch" or "stage2"',
    )
    network: str = setting(
        "", "another than stage 1's, with a linear head: wrn_28_2, wrn_28_8, wrn_37_2, or any of timm"
    )
    mean: tuple[float, ...] = setting((), "of the images, on values in [0, 1]; empty: what the backbone is made for")
    std: tuple[float, ...] = setting((), "standard deviation of the images, as the mean", above=0)
    weak_apart: bool = setting(
        False, "weak views of the other images in a pass of their own, without gradients; False: as published"
    )
    refresh_steps: int = setting(
        0,
        "steps after which the reliable labels are made again; 0: never",
        least=0,
        remedy="give 0, for never, or more",
    )
    refresh_agreement: float = setting(
        0.95, "share of the labels that the averaged network must have learnt to replace them", least=0, most=1
    )
    weak: View = setting(FIXMATCH_WEAK, "the weak view, of labelled and other images")
    strong: View = setting(FIXMATCH_STRONG, "the strong view, of other images")


def train(task: Task, config: SpiceSemiConfig, worker: Worker) -> None:
    """Leaves the averaged network in the stage's last checkpoint, `ema.safetensors`.

    As published, all views of a step are one batch: BatchNorm normalises them together, and so the weak views of the
    other images, which nothing is learnt from, need a backward pass too. With `weak_apart` they are a batch of their
    own without gradients: at ratio 7 that is 31 % less work.

    The thresholds of a step are those that the steps before have left: no worker waits for another within a step.

    Raises:
        UserError: no image has a reliable label, or these settings cannot train.
    """
    images, manifest = open_dataset(task, worker)
    read_labels = artifacts.given_labels if task.method in USING_LABELS else artifacts.reliable_labels
    labels = torch.from_numpy(read_labels(worker.run))
    if not (labels != UNRELIABLE).any():
        raise UserError(
            "no image has a reliable label to start from; use --set reliable.rule=adaptive, ask for fewer clusters, "
            "or train stage 1 longer"
        )
    check(task, config)
    task = network_task(task, config)
    groups = task.bn_groups // worker.world  # on this worker

    torch.manual_seed(task.seed)
    net = place(new_network(task, config, worker.run), worker.device)
    if config.init == "stage2":
        calibrate(task, config, net, images, labels)
    ema = slow_copy(net).eval()
    optimizer = torch.optim.SGD(decay_kernels_only(net, config.weight_decay), config.lr, momentum=0.9, nesterov=True)
    adaptive = AdaptiveThreshold(task.clusters, config.threshold_momentum).to(worker.device)
    reliable = ReliableLabels(labels)

    parts: dict[str, nn.Module] = {"net": net, "ema": ema}
    if config.threshold_rule == "adaptive":
        parts["threshold"] = adaptive
    if config.refresh_steps:
        parts["reliable"] = reliable
    start = resume(worker, parts, optimizer)
    model = worker.wrap(net)

    net.train()
    passes = passes_per_step(net, groups, worker.device)
    labelled = config.labelled // worker.world
    apart = config.weak_apart and config.ratio > 0
    position = own_positions([config.labelled, config.labelled * config.ratio], worker)
    monitor = Monitor(task, config, worker)
    again = partial(labels_again, task, config, ema, images, manifest.clustered, worker)
    stream = batches(images, reliable, again, manifest.training, config, task.seed, start, worker)
    for step, (image, index) in enumerate(stream, start):
        set_lr(optimizer, config.lr * fixmatch_cosine(step / config.steps))
        weak = augment.apply(config.weak, image, position, (task.seed, step, WEAK), task.backbone.statistics)
        key = (task.seed, step, STRONG)
        strong = weak[labelled:]
        if config.ratio:
            strong = augment.apply(config.strong, image[labelled:], position[labelled:], key, task.backbone.statistics)
        watched = weak[labelled:] if config.ratio else weak
        threshold = config.threshold if config.threshold_rule == "fixed" else adaptive.of_classes()

        optimizer.zero_grad()
        sums = torch.zeros(4, device=worker.device)
        predictions: list[Tensor] = []  # logits of the watched views, pass by pass
        together = [weak[:labelled], strong] if apart else [weak[:labelled], weak[labelled:], strong]
        views = by_group(together, groups)  # G V C H W
        sizes = [len(part) // groups for part in together]
        others = by_group([weak[labelled:]], groups).chunk(passes) if apart else ()
        labels_of_pass = reliable.labels[index[:labelled]].to(worker.device, non_blocking=True).chunk(passes)
        for number, (view, label) in enumerate(zip(views.chunk(passes), labels_of_pass, strict=True), 1):
            # an autocast of its own, so that no weight that it casts here without gradients is used again below
            with torch.no_grad(), autocast(worker.device, task.precision):
                ahead = [net(others[number - 1].flatten(0, 1))] if apart else []
            with accumulating(model, last=number == passes), autocast(worker.device, task.precision):
                logits = model(view.flatten(0, 1)).unflatten(0, view.shape[:2])
                taught_logits, *rest = [part.flatten(0, 1) for part in logits.split(sizes, dim=1)]
                weak_logits, strong_logits = ahead + rest
                supervised = F.cross_entropy(taught_logits.float(), label)
                consistent, passed = losses.consistency(weak_logits, strong_logits, threshold)
                loss = (supervised + consistent) / passes
            loss.backward()
            agreed = (taught_logits.argmax(1) == label).float().mean()
            sums += torch.stack([(supervised + consistent).detach(), supervised.detach(), passed, agreed]) / passes
            predictions.append((weak_logits if config.ratio else taught_logits).detach())
        optimizer.step()
        update_statistics(net)
        follow(ema, net, config.ema)
        copy_buffers(ema, net)
        loss, *terms = sums
        metrics: dict[str, Tensor] = dict(
            zip(("supervised_loss", "confident_fraction", "reliable_agreement"), terms, strict=True)
        )
        if config.threshold_rule == "adaptive":
            update_threshold(adaptive, predictions)
            metrics["threshold"] = adaptive.confidence
        probes = monitor.see(step + 1, ema, watched, predictions, reliable)
        worker.report(step + 1, config.steps, loss, lambda: state_of(parts, optimizer), metrics, probes)
    images.close()


@torch.no_grad()
def calibrate(task: Task, config: SpiceSemiConfig, net: ClusterNet, images: Images, labels: Int[Tensor, " N"]) -> None:
    """Divide the head's logits by the temperature that makes the reliable labels likeliest on strong views.

    The double softmax of stage 2 drives logits to where every prediction has a probability near 1: all would pass the
    threshold, and the first gradients of plain cross-entropy would tear the network apart. This is temperature scaling
    (Guo et al. 2017), on a sample of the reliable labels.
    """
    reliable = (labels != UNRELIABLE).nonzero()[:, 0].numpy()
    chosen = np.random.default_rng([task.seed, SAMPLE]).permutation(reliable)[:CALIBRATED]
    net.eval()

    def logits(view: Tensor) -> Tensor:
        with autocast(view.device, task.precision):
            return net(view).float()

    (found,) = view_features(task, images, chosen, [(config.strong, (task.seed, 0, SAMPLE))], [logits])
    temperature = best_temperature(found, labels[torch.from_numpy(chosen)].to(found.device))
    for parameter in (net.head.weights[-1], net.head.biases[-1]):
        parameter /= temperature


def best_temperature(logits: Float[Tensor, "M K"], labels: Int[Tensor, " M"]) -> float:
    """The T, of 0.1 to 1000 in steps of 2 %, with the lowest cross-entropy of the labels under softmax(logits / T)."""
    candidates = 1.02 ** torch.arange(-116, 349)
    losses = torch.stack([F.cross_entropy(logits / value, labels) for value in candidates.tolist()])
    return float(candidates[losses.argmin()])


def update_threshold(adaptive: AdaptiveThreshold, predictions: list[Tensor]) -> None:
    """By the global batch, whose parts, one for each pass of each worker, are added up in the same order everywhere."""
    own = torch.stack([adaptive.summary(logits) for logits in predictions])
    adaptive.update(collectives.all_gather(own).mean(0))


class ReliableLabels(nn.Module):
    """(N,) int64 on the host, UNRELIABLE where an image has none; a module, so that a checkpoint can hold them."""

    def __init__(self, labels: Int[Tensor, " N"]):
        super().__init__()
        self.labels: Tensor
        self.register_buffer("labels", labels)

    def clusters(self) -> list[int]:
        """Those that have a label."""
        return self.labels[self.labels != UNRELIABLE].unique().tolist()


class Monitor:
    """Whether the predictions of weak views are still healthy: counted on the device, read where a line is written.

    Probes: the share of clusters that got an image since the last line; the share of a step's images that the averaged
    network puts elsewhere than the one that trains, whose cost is one forward pass for each line; images per second. A
    cluster with reliable labels into which no image is predicted any more is told once, in a line that says what to do.
    """

    def __init__(self, task: Task, config: SpiceSemiConfig, worker: Worker):
        self.task, self.config, self.worker = task, config, worker
        self.counts = torch.zeros(2, task.clusters, dtype=torch.long, device=worker.device)  # since a line, a judgement
        self.seen, self.since, self.told = 0, time.monotonic(), False

    def see(
        self, step: int, ema: nn.Module, weak: Tensor, predictions: list[Tensor], reliable: ReliableLabels
    ) -> Probes:
        """Count what one step's images (B, C, H, W) were predicted to be."""
        found = torch.cat(predictions).argmax(1)
        self.counts.index_add_(1, found, torch.ones_like(found).expand(2, -1))
        self.seen += self.config.labelled * (1 + self.config.ratio)
        return {
            "clusters_predicted": lambda: self._covered(step, reliable),
            "ema_disagreement": lambda: self._disagreement(ema, weak, found),
            "images_per_second": self._speed,
        }

    def _covered(self, step: int, reliable: ReliableLabels) -> Tensor:
        since_line, since_judgement = collectives.all_gather(self.counts[None]).sum(0)
        self.counts[0] = 0
        if step < SETTLED * self.config.steps:
            self.counts[1] = 0
        elif int(since_judgement.sum()) >= ENOUGH * self.task.clusters:
            self.counts[1] = 0
            empty = [cluster for cluster in reliable.clusters() if since_judgement[cluster] == 0]
            if empty and not self.told and self.worker.rank == 0:
                self.told = True
                tqdm.write(collapsed(step, empty, self.task, self.config), sys.stderr)
        return (since_line > 0).float().mean()

    @torch.no_grad()
    def _disagreement(self, ema: nn.Module, weak: Tensor, found: Tensor) -> Tensor:
        with autocast(self.worker.device, self.task.precision):
            averaged = torch.cat([ema(part).argmax(1) for part in weak.split(CHUNK)])
        return (averaged != found).float().mean()

    def _speed(self) -> Tensor:
        now = time.monotonic()
        speed = self.seen / max(now - self.since, 1e-9)
        self.seen, self.since = 0, now
        return torch.tensor(speed, device=self.worker.device)


def collapsed(step: int, empty: list[int], task: Task, config: SpiceSemiConfig) -> str:
    """One line: which clusters have vanished, and what to do."""
    labels_given = task.method in USING_LABELS
    named = ", ".join(map(str, empty[:5])) + ", ..." * (len(empty) > 5)
    remedies = ["use --set spice_semi.threshold_rule=adaptive"] * (config.threshold_rule == "fixed")
    remedies += ["use --set spice_semi.balanced_draw=True"] * (not config.balanced_draw)
    own = config.network or config.mean
    remedies += ["use --set spice_semi.init=stage2"] * (config.init == "scratch" and not own and not labels_given)
    remedies += [f"lower spice_semi.lr, now {config.lr:g}"]
    remedies += ["give more labels" if labels_given else "ask for fewer clusters"]
    many = "s" * (len(empty) > 1)
    return f"step {step}: no image is predicted into cluster{many} {named} any more; {', or '.join(remedies)}"


def labels_again(
    task: Task,
    config: SpiceSemiConfig,
    ema: ClusterNet,
    images: Images,
    num_images: int,
    worker: Worker,
    now: Int[Tensor, " N"],
) -> Int[Tensor, " N"]:
    """Reliable labels (N,) by the rule and settings of the stage `reliable`, from what the averaged network sees.

    Its clusters and its features of the first `num_images` images take the place of those of stages 1 and 2: an image
    is reliable where its neighbours among these features agree with its cluster. Costs one forward pass over these
    images and their nearest neighbours; every worker does its share. The file `reliable/labels.npy` stays as it is.

    Those of `now` stay, and a line says so, if no new one would be reliable, and if the averaged network disagrees with
    too many of them: it has not learnt them yet, and would replace them by its own errors.
    """
    settings = artifacts.reliable_summary(worker.run)["settings"]
    share = collectives.share(num_images)
    own = np.arange(share.start, share.stop)
    found = outputs(ema.backbone, images, own, task.backbone.statistics, lambda done, total: None, task.precision)
    features = collectives.gather_shares(torch.cat([unit(chunk).half() for chunk in found]), num_images)

    def predicted(index: np.ndarray) -> tuple[Tensor, Tensor]:
        chunks = (features[torch.from_numpy(part).to(features.device)] for part in np.array_split(index, splits))
        best = [ema.head(chunk.float())[0].softmax(1).max(1) for chunk in chunks]
        return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])

    def unchanged(why: str) -> Tensor:
        if worker.rank == 0:
            tqdm.write(f"{why}; those of before are kept", sys.stderr)
        return now

    splits = -(-num_images // 65_536)
    taught = (now[:num_images] != UNRELIABLE).nonzero()[:, 0]
    learnt = float((predicted(taught.numpy())[0].cpu() == now[taught]).float().mean())
    if learnt < config.refresh_agreement:
        return unchanged(f"the averaged network has learnt {learnt:.0%} of the reliable labels")
    labels, _, kept, _ = choose(task, ReliableConfig(**settings), features.cpu().numpy(), predicted, worker.device)
    if not kept.any():
        return unchanged("no label of the averaged network is reliable")
    again = torch.full_like(now, UNRELIABLE)
    again[:num_images] = torch.where(kept, labels, UNRELIABLE)
    return again


def batches(
    images: Images,
    reliable: ReliableLabels,
    again: Callable[[Tensor], Tensor],
    num_images: int,
    config: SpiceSemiConfig,
    seed: int,
    start: int,
    worker: Worker,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`images_of_steps` for all steps; every `refresh_steps`, the labels are first replaced by `again(labels)`.

    That happens at the beginning of a step: a checkpoint after the step before it holds what it takes to do the same.
    """
    first, every = start, config.refresh_steps or config.steps
    while first < config.steps:
        if first and first % every == 0:
            reliable.labels.copy_(again(reliable.labels))
        stop = min(config.steps, (first // every + 1) * every)
        teachers = groups_of_teachers(reliable.labels.numpy(), config.balanced_draw)
        yield from images_of_steps(images, teachers, num_images, replace(config, steps=stop), seed, first, worker)
        first = stop


def groups_of_teachers(labels: np.ndarray, balanced: bool) -> list[np.ndarray]:
    """The images with a reliable label, by label or all in one: every group is drawn from as often.

    A labelled image of a cluster of n_c among N then counts as if its loss had the weight N / (K n_c), of mean 1 over
    these images, but no single step sees such a weight: a cluster of one image in 5,000, K = 10, would have 500.
    """
    clusters = np.unique(labels[labels != UNRELIABLE])
    if not balanced and len(clusters):
        return [np.flatnonzero(labels != UNRELIABLE)]
    return [np.flatnonzero(labels == cluster) for cluster in clusters]


def network_task(task: Task, config: SpiceSemiConfig) -> Task:
    """The same with the network that stage 3 trains, and the normalisation of its images, in place of stage 1's."""
    statistics = (config.mean, config.std) if config.mean else task.backbone.statistics
    if config.network:
        return replace(task, backbone=for_small_images(config.network, statistics))
    beside = task.backbone.intermediate and config.init == "stage2"  # how much it counts is known from stage 2 alone
    own = replace(task.backbone, mean=statistics[0], std=statistics[1], intermediate=beside)
    return replace(task, backbone=own)


def new_network(task: Task, config: SpiceSemiConfig, run: Path) -> ClusterNet:
    """A network of `network_task` to train.

    It is what stage 1 started from, another from random weights, or the backbone and the selected head of stages 1 and
    2. In a wide ResNet the running statistics of BatchNorm move as slowly as the averaged network does.
    """
    if config.init == "stage2":
        return stage2_network(task, run)
    backbone = new_backbone(task)
    if config.network in SHAPES:
        set_momentum(backbone, 1 - config.ema)
    return ClusterNet(backbone, ClusterHeads(1, backbone.dim, task.clusters, layers=1 if config.network else 2))


def trained_network(task: Task, config: SpiceSemiConfig, run: Path) -> ClusterNet:
    """The averaged network that training has left; `task` is that of `network_task`."""
    net = new_network(task, config, run)
    net.load_state_dict(finished(run / "spice_semi").tensors("ema"))
    return net


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
    check_ranges("spice_semi", config, "steps", "labelled", "ratio", "init", "threshold_rule", "threshold")
    check_ranges("spice_semi", config, "threshold_momentum", "refresh_agreement", "refresh_steps")
    if config.init == "stage2" and (config.network or config.mean or config.std):
        raise UserError(
            'spice_semi.init "stage2" goes on with the network of stages 1 and 2 and its normalisation; leave '
            'spice_semi.network, mean and std empty, or set init="scratch"'
        )
    if (len(config.mean), len(config.std)) not in ((0, 0), (3, 3)) or not all(value > 0 for value in config.std):
        raise UserError(
            f"spice_semi.mean is {config.mean} and std {config.std}; give three numbers of each, deviations above 0, "
            "or neither"
        )
    if config.network:
        for_small_images(config.network, task.backbone.statistics)
    if config.labelled % task.bn_groups:
        raise UserError(
            f"spice_semi.labelled is {config.labelled}, which {task.bn_groups} BatchNorm groups cannot share evenly; "
            f"make it a multiple of bn_groups"
        )
