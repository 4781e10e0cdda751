"""Stage 3 of SPICE, SPICE-Semi: the whole network learns from the reliable labels, FixMatch-style (III-C, eqs. 8-9).

Weak views of reliably labelled images teach their labels; any other image whose weak view is predicted with high
confidence teaches that class to its strong view. What is evaluated is the exponential moving average of the network.
Optimisation is that of Sohn et al. 2020: 64 labelled and 448 other images, SGD with Nesterov momentum, cosine 7/16.

Beyond the paper: FreeMatch's thresholds, which follow the network's confidence, and reliable labels that are made again
from the averaged network while it trains.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_dist import artifacts, losses
from spice_dist.catalog import USING_LABELS
from spice_dist.data import augment
from spice_dist.data.images import Images
from spice_dist.data.loaders import as_squares
from spice_dist.data.views import FIXMATCH_STRONG, FIXMATCH_WEAK, View
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.methods.head_calibration import calibrate
from spice_dist.methods.label_refresh import ReliableLabels, refreshed_labels
from spice_dist.methods.labelled_draw import groups_of_teachers, images_of_steps
from spice_dist.methods.plumbing import (
    autocast,
    black_images,
    by_group,
    finished,
    in_passes,
    new_backbone,
    open_dataset,
    own_positions,
    passes_that_fit,
    place,
    resume,
    state_of,
)
from spice_dist.methods.prediction_monitor import PredictionMonitor
from spice_dist.methods.stage2 import stage2_network
from spice_dist.methods.thresholds import AdaptiveThreshold, FixedThreshold
from spice_dist.models.heads import ClusterHeads, ClusterNet, LinearNet
from spice_dist.models.momentum import copy_buffers, follow, slow_copy
from spice_dist.models.presets import for_small_images
from spice_dist.models.split_batch_norm import set_momentum, update_statistics
from spice_dist.models.wide_resnet import SHAPES
from spice_dist.optim import decay_kernels_only, fixmatch_cosine, set_lr
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.settings import check_ranges, setting
from spice_dist.task import Task
from spice_dist.transfer import send

WEAK, STRONG = 21, 22  # streams of random numbers; drawing has 20, calibration 23


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
    linear_head: bool = setting(
        False, "one linear layer on features that are not normalised, as published; `network` always has it"
    )
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

    The thresholds of a step are those that the steps before have left: no worker waits for another within a step.
    Where no image has a label to start from, nothing is trained or left.

    Raises:
        UserError: these settings cannot train.
    """
    check(task, config)
    labels = read_labels(task, worker.run)
    if not (labels != UNRELIABLE).any():
        return
    images, manifest = open_dataset(task, worker)
    images_per_step = config.labelled * (1 + config.ratio)
    images = as_squares(images, worker.device, config.steps * images_per_step // worker.world, worker.world)
    task = network_task(task, config)

    torch.manual_seed(task.seed)
    net = place(new_network(task, config, worker.run), worker.device)
    if config.init == "stage2":
        assert isinstance(net, ClusterNet)
        calibrate(task, config.strong, net, images, labels)
    ema = slow_copy(net).eval()
    groups_of_weights = decay_kernels_only(net, config.weight_decay)
    on_gpu = worker.device.type == "cuda"
    optimizer = torch.optim.SGD(groups_of_weights, config.lr, momentum=0.9, nesterov=True, fused=on_gpu)
    threshold = new_threshold(task, config).to(worker.device)
    reliable = ReliableLabels(labels)
    parts = trained_parts(config, net, ema, threshold, reliable)
    start = resume(worker, parts, optimizer)
    model = worker.wrap(net)

    net.train()
    groups = task.bn_groups // worker.world  # on this worker

    def trial(passes: int) -> Tensor:
        labelled, others = (
            black_images(task, count // worker.world // passes, 0, worker)
            for count in (config.labelled, config.labelled * config.ratio)
        )
        apart = config.weak_apart and config.ratio > 0
        with torch.no_grad():
            first = [net(others)] if apart else []
        return net(torch.cat([labelled, others] + [others] * (not apart))).float().sum() + sum(x.sum() for x in first)

    passes = passes_that_fit(task, [net], images_per_step, trial, optimizer, worker)
    position = own_positions([config.labelled, config.labelled * config.ratio], worker)
    labelled = config.labelled // worker.world
    warning = partial(collapse_warning, task, config)
    monitor = PredictionMonitor(task, config.steps, images_per_step, warning, worker)
    refreshed = partial(refreshed_labels, task, config.refresh_agreement, ema, images, manifest.clustered, worker)
    stream = batches(images, reliable, refreshed, manifest.training, config, task.seed, start, worker)
    for step, (image, index) in enumerate(stream, start):
        if worker.leaves_out(step):
            continue
        set_lr(optimizer, config.lr * fixmatch_cosine(step / config.steps))
        weak, strong = views_of_step(task, config, image, position, labelled, step)
        label = send(reliable.labels[index[:labelled]], worker.device)
        eta = threshold.of_classes()

        optimizer.zero_grad()
        metrics_of_passes: list[dict[str, Tensor]] = []
        predictions: list[Tensor] = []  # logits of the weak views that the thresholds and the monitor follow
        logits_of_passes = forward(task, config, net, model, weak, strong, groups, passes)
        for logits, label_of_pass in zip(logits_of_passes, label.chunk(passes), strict=True):
            loss, metrics = step_losses(logits, label_of_pass, eta)
            (loss / passes).backward()
            metrics_of_passes.append(metrics)
            predictions.append((logits.weak if config.ratio else logits.labelled).detach())
        optimizer.step()
        update_statistics(net)
        follow(ema, net, config.ema)
        copy_buffers(ema, net)
        threshold.update(predictions)

        metrics = mean_of_passes(metrics_of_passes) | threshold.metrics()
        loss = metrics.pop("loss")
        watched = weak[labelled:] if config.ratio else weak
        probes = monitor.count(step + 1, ema, watched, predictions, reliable)
        worker.report(step + 1, config.steps, loss, lambda: state_of(parts, optimizer), metrics, probes)
    images.close()


def views_of_step(
    task: Task, config: SpiceSemiConfig, image: Tensor, position: Int[Tensor, " b"], labelled: int, step: int
) -> tuple[Tensor, Tensor]:
    """Weak views of all images of a step, of which `labelled` come first, and strong views of the others."""
    statistics = task.backbone.statistics
    weak = augment.apply(config.weak, image, position, (task.seed, step, WEAK), statistics)
    if not config.ratio:
        return weak, weak[labelled:]
    key = (task.seed, step, STRONG)
    return weak, augment.apply(config.strong, image[labelled:], position[labelled:], key, statistics)


class Logits(NamedTuple):
    """What the network makes of the views of a step, or of one pass of it."""

    labelled: Float[Tensor, "L K"]  # weak views of labelled images
    weak: Float[Tensor, "U K"]  # weak views of the other images
    strong: Float[Tensor, "U K"]  # strong views of the same


def forward(
    task: Task,
    config: SpiceSemiConfig,
    net: nn.Module,
    model: nn.Module,
    weak: Tensor,
    strong: Tensor,
    groups: int,
    passes: int,
) -> Iterator[Logits]:
    """Logits of the views of a step, pass by pass; each is to be followed by its backward pass.

    As published, all views of a step are one batch: BatchNorm normalises them together, and so the weak views of the
    other images, which nothing is learnt from, need a backward pass too. With `weak_apart` they are a batch of their
    own without gradients: at ratio 7 that is 31 % less work.

    Args:
        model: `net` as the worker has wrapped it, which averages gradients over workers.
        groups: BatchNorm groups of this worker.
    """
    labelled, others = weak.split([len(weak) - len(strong), len(strong)])
    apart = config.weak_apart and config.ratio > 0
    together = [labelled, strong] if apart else [labelled, others, strong]
    sizes = [len(views) // groups for views in together]
    batches_apart = [[others]] if apart else []
    views_of_passes = (by_group(parts, groups).chunk(passes) for parts in (together, *batches_apart))  # G V C H W
    for views, *views_apart in in_passes(model, *views_of_passes):
        # an autocast of its own, so that no weight that it casts here without gradients is used again below
        with torch.no_grad(), autocast(weak.device, task.precision):
            first = [net(part.flatten(0, 1)) for part in views_apart]
        with autocast(weak.device, task.precision):
            logits = model(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        on_labelled, *rest = [part.flatten(0, 1) for part in logits.split(sizes, dim=1)]
        yield Logits(on_labelled, *first, *rest)


def step_losses(
    logits: Logits, label: Int[Tensor, " L"], threshold: float | Float[Tensor, " K"]
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """FixMatch's loss and what is logged of it: labels teach labelled images, confident weak views the strong ones."""
    supervised = F.cross_entropy(logits.labelled.float(), label)
    consistency, confident = losses.consistency(logits.weak, logits.strong, threshold)
    loss = supervised + consistency
    metrics = {
        "loss": loss.detach(),
        "supervised_loss": supervised.detach(),
        "confident_fraction": confident,
        "reliable_agreement": (logits.labelled.argmax(1) == label).float().mean(),
    }
    return loss, metrics


def mean_of_passes(metrics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Added up in the order of the passes."""
    total = torch.zeros(len(metrics[0]), device=metrics[0]["loss"].device)
    for metrics_of_pass in metrics:
        total += torch.stack(list(metrics_of_pass.values())) / len(metrics)
    return dict(zip(metrics[0], total, strict=True))


def read_labels(task: Task, run: Path) -> Int[Tensor, " N"]:
    """Labels to start from, given or selected by the stage `reliable`; UNRELIABLE where an image has none."""
    read = artifacts.given_labels if task.method in USING_LABELS else artifacts.reliable_labels
    return torch.from_numpy(read(run))


def new_threshold(task: Task, config: SpiceSemiConfig) -> FixedThreshold | AdaptiveThreshold:
    if config.threshold_rule == "fixed":
        return FixedThreshold(config.threshold)
    return AdaptiveThreshold(task.clusters, config.threshold_momentum)


def trained_parts(
    config: SpiceSemiConfig, net: nn.Module, ema: nn.Module, threshold: nn.Module, reliable: ReliableLabels
) -> dict[str, nn.Module]:
    """What changes from step to step, by its names in a checkpoint."""
    parts: dict[str, nn.Module] = {"net": net, "ema": ema}
    if threshold.state_dict():  # that of a fixed one is empty
        parts["threshold"] = threshold
    if config.refresh_steps:
        parts["reliable"] = reliable
    return parts


def collapse_warning(task: Task, config: SpiceSemiConfig, step: int, empty: list[int]) -> str:
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


def batches(
    images: Images,
    reliable: ReliableLabels,
    refreshed: Callable[[Tensor], Tensor],
    num_images: int,
    config: SpiceSemiConfig,
    seed: int,
    start: int,
    worker: Worker,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`images_of_steps` for all steps; every `refresh_steps`, the labels are first replaced by `refreshed(labels)`.

    That happens at the beginning of a step: a checkpoint after the step before it holds what it takes to do the same.
    """
    first, every = start, config.refresh_steps or config.steps
    while first < config.steps:
        if first and first % every == 0:
            reliable.labels.copy_(refreshed(reliable.labels))
        stop = min(config.steps, (first // every + 1) * every)
        teachers = groups_of_teachers(reliable.labels.numpy(), config.balanced_draw)
        others, steps = config.labelled * config.ratio, range(first, stop)
        yield from images_of_steps(images, teachers, num_images, config.labelled, others, seed, steps, worker)
        first = stop


def network_task(task: Task, config: SpiceSemiConfig) -> Task:
    """The same with the network that stage 3 trains, and the normalisation of its images, in place of stage 1's."""
    statistics = (config.mean, config.std) if config.mean else task.backbone.statistics
    if config.network:
        return replace(task, backbone=for_small_images(config.network, statistics))
    beside = task.backbone.intermediate and config.init == "stage2"  # how much it counts is known from stage 2 alone
    own = replace(task.backbone, mean=statistics[0], std=statistics[1], intermediate=beside)
    return replace(task, backbone=own)


def new_network(task: Task, config: SpiceSemiConfig, run: Path) -> ClusterNet | LinearNet:
    """A network of `network_task` to train.

    It is what stage 1 started from, another from random weights, or the backbone and the selected head of stages 1 and
    2. In a wide ResNet the running statistics of BatchNorm move as slowly as the averaged network does.
    """
    if config.init == "stage2":
        return stage2_network(task, run)
    backbone = new_backbone(task)
    if config.network in SHAPES:
        set_momentum(backbone, 1 - config.ema)
    if config.network or config.linear_head:
        return LinearNet(backbone, backbone.dim, task.clusters)
    return ClusterNet(backbone, ClusterHeads(1, backbone.dim, task.clusters))


def trained_network(task: Task, config: SpiceSemiConfig, run: Path) -> ClusterNet | LinearNet:
    """The averaged network that training has left; `task` is that of `network_task`."""
    net = new_network(task, config, run)
    net.load_state_dict(finished(run / "spice_semi").tensors("ema"))
    return net


def check(task: Task, config: SpiceSemiConfig) -> None:
    """UserError if these settings cannot train."""
    check_ranges("spice_semi", config, "steps", "labelled", "ratio", "init", "threshold_rule", "threshold")
    check_ranges("spice_semi", config, "threshold_momentum", "refresh_agreement", "refresh_steps")
    if config.init == "stage2" and (config.network or config.linear_head or config.mean or config.std):
        raise UserError(
            'spice_semi.init "stage2" goes on with the network of stages 1 and 2 and its normalisation; leave '
            'spice_semi.network, linear_head, mean and std empty, or set init="scratch"'
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
