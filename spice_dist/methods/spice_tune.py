"""Stage 3 in minutes: the last blocks of a trained network learn from the reliable labels (SPICE III-C, eqs. 8-9).

The trunk encodes every view once. The head is fitted to the features first (LP-FT, Kumar et al. 2022). Then head and
last blocks are tuned together as in FixMatch, with learning rates for trained weights. Images with a reliable label,
drawn equally often from every cluster, are learned in weak and in strong views. If any other image is predicted with
confidence, its strong view learns that cluster. The result is the network's moving average.

Tuning improves the features more than the head, which learns from its own errors. So the tuned features are clustered
again, as in stage 2 on the neighbour graph, and the head is fitted to these clusters.

If the loss rises, clusters shrink or reliable labels are no longer predicted, training starts again with a third of the
learning rate (`tune_guard`). After the last retry the result is the network of stage 2.
"""

import math
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from spice_dist import artifacts, graph, losses
from spice_dist.data.files import publish_json
from spice_dist.data.views import PLAIN, View
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.methods.head_calibration import best_temperature
from spice_dist.methods.plumbing import load_state, open_dataset, place, state_of
from spice_dist.methods.spice_graph import SpiceGraphConfig, clusterings
from spice_dist.methods.stage2 import stage2_network
from spice_dist.methods.trunk_activations import encode, features_of, folded_trunk, logits_of, predicted
from spice_dist.methods.tune_guard import SAMPLE, Guard, Limits
from spice_dist.models.backbone import Backbone
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.models.momentum import follow, slow_copy
from spice_dist.models.tail import Tail, split
from spice_dist.neighbors import nearest, without_itself
from spice_dist.optim import cosine, warm_up
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.settings import check_ranges, setting
from spice_dist.task import Task
from spice_dist.transfer import send

DRAW, WEAK, STRONG, HEAD = 50, 51, 52, 54  # streams of random numbers
SMOOTHED = 3  # rounds in which soft labels are averaged with those of the neighbours
FITTED = 512  # features in one step of the head's fit


@dataclass(frozen=True)
class SpiceTuneConfig:
    epochs: float = setting(2.0, "passes of strong views over the images, labelled ones counted", above=0)
    labelled: int = setting(64, "images per step with a reliable label", above=0)
    ratio: float = setting(1.0, "other images per labelled one", least=0, below=math.inf)
    strong_views: int = setting(1, "strong views of each image that are encoded, once", above=0)
    images: int = setting(10_000, "at most that are used, every cluster among them", above=0)
    memory: float = setting(1.5e9, "bytes of activations, at most; fewer images are used if theirs are larger", above=0)
    blocks: int = setting(
        0, "last blocks that are tuned; 0: as many as are 15 % of the forward pass, or one", least=0, below=math.inf
    )
    lr: float = setting(1e-3, "learning rate of the last layer of the network, AdamW's", above=0)
    head_lr: float = setting(1e-3, "learning rate of the clustering head", least=0, below=math.inf)
    layer_decay: float = setting(
        0.7,
        "factor on the rate from one layer to the one before it",
        above=0,
        most=1,
        remedy="it must be between 0 and 1",
    )
    warmup: float = setting(0.1, "share of the steps in which the rate rises", least=0, most=1)
    weight_decay: float = setting(0.05, "on kernels only", least=0, below=math.inf)
    ema: float = setting(0.98, "momentum of the evaluated network", least=0, most=1)
    head_steps: int = setting(
        300, "steps in which the head alone is fitted before; 0: its temperature only", least=0, below=math.inf
    )
    neighbors: int = setting(15, "neighbours that soft labels are averaged with; 0: none", least=0, below=math.inf)
    threshold: float = setting(0.8, "confidence from which a prediction is taken as a label", least=0, most=1)
    regroup: bool = setting(True, "find the clusters again among the tuned features; False: the tuned head's own")
    guard_steps: int = setting(20, "steps between two looks of the guard; 0: no guard", least=0, below=math.inf)
    retries: int = setting(
        2, "attempts at a third of the rate before; then stage 2's network is kept", least=0, below=math.inf
    )
    max_rise: float = setting(1.5, "largest ratio of the smoothed loss to that of the first steps", above=0)
    min_size: float = setting(0.2, "share of a cluster's images that it must keep", least=0, most=1)
    min_agreement: float = setting(
        0.8, "share of the agreement with reliable labels, at the start, that must be kept", least=0, most=1
    )
    weak: View = setting(PLAIN, "what the network is evaluated on")
    strong: View = setting(View((0.4, 1.0), operations=2), "what it learns from beside the weak view")


def train(task: Task, config: SpiceTuneConfig, worker: Worker) -> None:
    """Train; the stage's last checkpoint holds the whole network, `net.safetensors`.

    The inputs are `reliable/labels.npy` and the network of stage 2. `spice_tune/summary.json` says which network was
    kept: {"kept": "tuned" or "stage2", "why": ...}. The trunk and BatchNorm's statistics stay the same, bit for bit.
    One worker trains on all cores, with the activations on its device. A resumed run encodes the views again.

    Raises:
        UserError: these settings cannot train.
    """
    check(task, config)
    saved = worker.resume()
    if saved and saved.step == saved.state["total"]:
        return
    net = place(stage2_network(task, worker.run), worker.device).eval()
    assert isinstance(net.backbone, Backbone)
    stage2 = deepcopy(net.state_dict())
    image_labels = artifacts.reliable_labels(worker.run)
    try:
        cut = split(net.backbone, task.data.channels, task.data.size, config.blocks)
        if not (image_labels != UNRELIABLE).any():
            raise UserError("no image has a reliable label")
    except UserError as error:
        leave_stage2(net, str(error), worker)
        return
    tail = cut.tail
    images, manifest = open_dataset(task, worker)
    chosen = chosen_images(image_labels[: manifest.clustered], task, config, cut.activation_bytes)
    views = [(config.weak, (task.seed, 0, WEAK))]
    views += [(config.strong, (task.seed, number, STRONG)) for number in range(config.strong_views)]
    activations = encode(task, views, images, chosen, folded_trunk(task, net.backbone, cut.blocks), worker)
    images.close()
    labels = torch.from_numpy(image_labels[chosen]).to(worker.device)

    guard = Guard(
        task, limits_of(config), labels, predicted(tail, net.head, activations[0], task, torch.arange(len(chosen)))
    )
    features = [features_of(tail, of_view, task) for of_view in activations]
    fit_head(task, config, net.head, features, soft_labels(net.head, features[0], labels, config))
    net.requires_grad_(False)
    on_gpu = worker.device.type == "cuda"
    optimizer = torch.optim.AdamW(layer_groups(tail, net.head, config), config.lr, fused=on_gpu)
    ema = slow_copy(net)
    start_weights = deepcopy(net.state_dict())
    assert isinstance(ema.backbone, Backbone)
    averaged_tail = split(ema.backbone, task.data.channels, task.data.size, cut.blocks).tail
    predicted_by_average = partial(predicted, averaged_tail, ema.head, activations[0], task)
    parts: dict[str, nn.Module] = {"net": ema, "student": net, "guard": guard}
    if saved:
        load_state(parts, optimizer, saved)

    labelled, others = config.labelled, round(config.labelled * config.ratio)
    steps = math.ceil(config.epochs * len(chosen) / (labelled + others))
    teachers = [
        torch.from_numpy(np.flatnonzero(image_labels[chosen] == c))
        for c in np.unique(image_labels[image_labels != UNRELIABLE])
    ]
    step = saved.step if saved else 0
    while step < guard.begun + steps:
        done = step - guard.begun
        rate = cosine(done / steps) * warm_up(done + 1, config.warmup * steps) / 3**guard.retried
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate
        view, taught, any_rows = draw(task.seed, step, teachers, len(chosen), labelled, others, config.strong_views)
        taught, any_rows = (send(rows, worker.device) for rows in (taught, any_rows))
        half = labelled // 2
        x = torch.cat([activations[0][taught[:half]], activations[1 + view][torch.cat([taught[half:], any_rows])]])

        optimizer.zero_grad()
        with torch.no_grad():
            weak_logits = logits_of(tail, net.head, activations[0][any_rows], task)
        logits = logits_of(tail, net.head, x, task)
        supervised = F.cross_entropy(logits[:labelled], labels[taught])
        consistent, passed = losses.consistency(weak_logits, logits[labelled:], config.threshold)
        loss = supervised + consistent
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        # a smaller momentum at first, so that the weights of the start do not dominate the average
        follow(ema, net, min(config.ema, (done + 1) / (done + 10)))
        step += 1

        last = step == guard.begun + steps
        alarm = guard.see(loss.detach(), step, last, predicted_by_average)
        if alarm and guard.retried == config.retries:
            net.load_state_dict(stage2)
            leave_stage2(net, alarm, worker, step)
            return
        if alarm:
            net.load_state_dict(start_weights)
            ema.load_state_dict(start_weights)
            forget(optimizer)
            guard.go_back(step)
        agreed = (logits[:labelled].detach().argmax(1) == labels[taught]).float().mean()
        metrics = {"supervised_loss": supervised.detach().nan_to_num(), "reliable_agreement": agreed}
        metrics |= {"confident_fraction": passed}
        if step == guard.begun + steps:
            groups = (
                regroup(task, config, ema.head, averaged_tail, activations, guard)
                if config.regroup
                else "not found again"
            )
            why = f"{steps} steps at lr {config.lr / 3**guard.retried:.2g}; clusters among the new features {groups}"
            write_summary(worker.run, "tuned", why)
        worker.report(
            step, guard.begun + steps, loss.detach().nan_to_num(), lambda: state_of(parts, optimizer), metrics
        )


def limits_of(config: SpiceTuneConfig) -> Limits:
    return Limits(
        steps=config.guard_steps,
        max_rise=config.max_rise,
        min_size=config.min_size,
        min_agreement=config.min_agreement,
    )


def check(task: Task, config: SpiceTuneConfig) -> None:
    """Raise a UserError if these settings cannot train."""
    check_ranges("spice_tune", config, "epochs", "labelled", "strong_views", "images", "memory", "lr", "layer_decay")
    check_ranges("spice_tune", config, "max_rise", "ratio", "head_lr", "weight_decay", "blocks", "head_steps")
    check_ranges("spice_tune", config, "neighbors", "guard_steps", "retries", "warmup", "ema", "threshold")
    check_ranges("spice_tune", config, "min_size", "min_agreement")
    if config.images < 2 * task.clusters:
        raise UserError(f"spice_tune.images is {config.images}; {task.clusters} clusters need {2 * task.clusters}")


def chosen_images(
    labels: Int[np.ndarray, " N"], task: Task, config: SpiceTuneConfig, activation_bytes: int
) -> Int[np.ndarray, " M"]:
    """Choose all images, or at random as many as `images` and `memory` allow; return their numbers, ascending.

    In a random choice up to a half have reliable labels, in equal numbers of every cluster as far as it has them.
    """
    most = min(config.images, int(config.memory / ((1 + config.strong_views) * activation_bytes)))
    if len(labels) <= most:
        return np.arange(len(labels))
    order = np.random.default_rng([task.seed, SAMPLE]).permutation(len(labels))
    quota = max(1, most // (2 * task.clusters))
    first = np.concatenate([order[labels[order] == c][:quota] for c in np.unique(labels[labels != UNRELIABLE])])
    rest = order[~np.isin(order, first)]
    return np.sort(np.concatenate([first, rest[: max(0, most - len(first))]]))


@torch.no_grad()
def soft_labels(
    head: ClusterHeads, features: Float[Tensor, "M D"], labels: Int[Tensor, " M"], config: SpiceTuneConfig
) -> Float[Tensor, "M K"]:
    """Predict each image by the head, then SMOOTHED times mix in half of the nearest neighbours' mean.

    The head is calibrated by the reliable labels first, which replace its predictions.
    """
    logits = head(features)[0]
    reliable = labels != UNRELIABLE
    predictions = (logits / best_temperature(logits[reliable].cpu(), labels[reliable].cpu())).softmax(1)
    predictions[reliable] = F.one_hot(labels[reliable], predictions.shape[1]).to(predictions.dtype)
    count = min(config.neighbors, len(features) - 1)
    if count <= 0:
        return predictions
    index = nearest(features, count + 1)[:, 1:].long()
    probs = predictions
    for _ in range(SMOOTHED):
        # neighbour by neighbour: (M, S, K) of many clusters would not fit
        probs = 0.5 * predictions + 0.5 * torch.stack([probs[column] for column in index.T]).mean(0)
    return probs


def fit_head(
    task: Task,
    config: SpiceTuneConfig,
    head: ClusterHeads,
    views: Sequence[Float[Tensor, "M D"]],
    targets: Float[Tensor, "M K"],
) -> None:
    """Calibrate the head, then fit it to soft labels on the features of all views; the network is fixed.

    After the double softmax of stage 2 logits are so large that the first gradients would destroy the network.
    """
    with torch.no_grad():
        temperature = best_temperature(head(views[-1])[0].cpu(), targets.argmax(1).cpu())
        for parameter in (head.weights[-1], head.biases[-1]):
            parameter /= temperature
    head.requires_grad_(True)
    kernels, rest = list(head.weights), list(head.biases)
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, config.head_lr)
    for step in range(config.head_steps):
        rows = send(drawn_rows(len(targets), FITTED, (task.seed, step, HEAD)), targets.device)
        logits = head(views[step % len(views)][rows])[0]
        for group in optimizer.param_groups:
            group["lr"] = config.head_lr * cosine(step / config.head_steps)
        optimizer.zero_grad()
        F.cross_entropy(logits, targets[rows]).backward()
        optimizer.step()
    head.requires_grad_(False)


def regroup(
    task: Task, config: SpiceTuneConfig, head: ClusterHeads, tail: Tail, activations: Sequence[Tensor], guard: Guard
) -> str:
    """Cluster the tuned features by their neighbour graph, as at the start of `spice_graph`, and fit the head to that.

    Clusters keep stage 2's numbers. Return "are found again", or why the head is not changed.
    """
    before, settings = deepcopy(head.state_dict()), SpiceGraphConfig()
    features = [features_of(tail, of_view, task) for of_view in activations]
    count = min(max(*settings.counts, settings.spread), len(features[0]) - 1)
    near = without_itself(nearest(features[0], count + 1).cpu().numpy().astype(np.int32))
    labels = clusterings(task, settings, features[0], near)
    one_hot = np.eye(task.clusters, dtype=np.float32)
    starts = np.stack([graph.spread(one_hot[row], near[:, : settings.spread]) for row in labels])
    probs, _ = graph.consensus(starts, seed=task.seed)
    to = graph.matched(guard.before.cpu().numpy(), probs.argmax(1), task.clusters)
    targets = np.empty_like(probs, dtype=np.float32)
    targets[:, to] = probs
    fit_head(task, config, head, features, torch.from_numpy(targets).to(activations[0].device))
    with torch.no_grad():
        now = head(features[0])[0].argmax(1)
    if why := guard.changed(guard.everything, now):
        head.load_state_dict(before)
        return f"are not taken: {why}"
    return "are found again"


def layer_groups(tail: Tail, head: ClusterHeads, config: SpiceTuneConfig) -> list[dict]:
    """Make AdamW's groups with rates `base`: the head's, then each layer's, `layer_decay` times the next layer's."""
    layers: list[tuple[nn.Module, float]] = [(head, config.head_lr)]
    for depth, layer in enumerate(reversed(tail.layers)):
        layers.append((layer, config.lr * config.layer_decay**depth))
    groups = []
    for layer, rate in layers:
        layer.requires_grad_(True)
        kernels = [p for name, p in layer.named_parameters() if p.ndim >= 2 and "bias" not in name]
        others = [p for name, p in layer.named_parameters() if p.ndim < 2 or "bias" in name]
        for parameters, decay in ((kernels, config.weight_decay), (others, 0.0)):
            if parameters:
                groups.append({"params": parameters, "base": rate, "weight_decay": decay})
    return groups


def drawn_rows(count: int, size: int, key: tuple[int, int, int]) -> Int[Tensor, " size"]:
    return torch.from_numpy(np.random.default_rng(key).integers(count, size=size))


def draw(
    seed: int, step: int, teachers: list[Tensor], count: int, labelled: int, others: int, views: int
) -> tuple[int, Int[Tensor, " L"], Int[Tensor, " U"]]:
    """Draw (strong view, rows with a reliable label, rows of any images) of a step, with replacement.

    For a labelled row a cluster is drawn uniformly, then one of its images.
    """
    generator = np.random.default_rng((seed, step, DRAW))
    clusters = generator.integers(len(teachers), size=labelled)
    places = generator.random(labelled)
    taught = [teachers[c][int(place * len(teachers[c]))] for c, place in zip(clusters, places, strict=True)]
    view = int(generator.integers(views))
    return view, torch.stack(taught), torch.from_numpy(generator.integers(count, size=others))


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Set AdamW's moments and step counts to zero."""
    for values in optimizer.state.values():
        for value in values.values():
            value.zero_()


def leave_stage2(net: ClusterNet, why: str, worker: Worker, step: int = 1) -> None:
    """Leave stage 2's network as the result, and print why."""
    tqdm.write(f"the last blocks are not tuned, stage 2's result is kept: {why}", sys.stderr)
    write_summary(worker.run, "stage2", why)
    state = {"net": net.state_dict()}
    worker.report(step, step, torch.zeros((), device=worker.device), lambda: state)


def write_summary(run: Path, kept: str, why: str) -> None:
    (run / "spice_tune").mkdir(exist_ok=True)
    publish_json(artifacts.tuning_summary_file(run), {"kept": kept, "why": why})
