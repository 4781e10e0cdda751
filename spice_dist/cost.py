"""Estimate what a run will cost: operations, time and memory of every stage that trains or embeds.

Time is operations divided by speed. This machine's speed is measured on the run's own networks; a GPU's is assumed to
be PEAK times USED. Not counted are reading and augmentation, which overlap with training, the heads of stage 1,
metrics, and the exchange between workers.
"""

import time
from collections.abc import Callable, Mapping
from functools import cache, partial

import numpy as np
import torch

from spice_dist.counting import FLOAT, Cost, Counting, Network, Work
from spice_dist.data.images import chunk_of
from spice_dist.graph import DIMENSIONS, landmarks
from spice_dist.methods.byol import BYOLConfig
from spice_dist.methods.imc_swav import ImcSwavConfig
from spice_dist.methods.moco import MoCoConfig
from spice_dist.methods.plumbing import autocast, place
from spice_dist.methods.scan import ScanConfig, SelfLabelConfig
from spice_dist.methods.spice_graph import GraphConfig, SpiceGraphConfig
from spice_dist.methods.spice_graph import passes as passes_of
from spice_dist.methods.spice_self import SpiceSelfConfig
from spice_dist.methods.spice_semi import SpiceSemiConfig, network_task
from spice_dist.methods.spice_tune import SpiceTuneConfig
from spice_dist.models.backbone import Backbone
from spice_dist.models.folding import folded
from spice_dist.neighbors import STRIP, STRIP_GPU

PEAK = {"A100": 312e12, "H100": 989e12}  # bf16 operations per second without sparsity, from their data sheets
USED = 0.2  # share of the peak that training a ResNet reaches
SUGGEST_SECONDS, SUGGEST_IMAGES = 8.0, 4_000  # measured, of one core; more images are sampled
START_SECONDS = 1.5e-8  # of one core, for an image, a cluster, a coordinate and a clustering: eigenvectors and k-means
SUPPOSED = 20  # clusters, where the features will suggest the number
MEASURED_SECONDS = 2.0  # at least, of each network
TAIL = 0.2  # share of a network's forward pass in its last blocks


def moco(counting: Counting, config: MoCoConfig) -> Cost:
    network = counting.network(config.view.size)
    queries = config.epochs * (counting.training // config.batch) * config.new_keys
    similarities = config.queue * (config.dim + config.new_keys / counting.passes) * FLOAT
    weights = 4 * network.weights  # with gradients, momentum and the key network
    memory = weights + counting.saved(network, config.new_keys) + similarities
    return Cost((Work(network, 2 * queries, queries),), 6.0 * queries * config.queue * config.dim, memory)


def byol(counting: Counting, config: BYOLConfig) -> Cost:
    network = counting.network(config.view.size)
    views = config.epochs * (counting.training // config.batch) * config.batch * 2
    memory = 4 * network.weights + counting.saved(network, 2 * config.batch)
    return Cost((Work(network, 2 * views, views),), 0.0, memory)


def imc_swav(counting: Counting, config: ImcSwavConfig) -> Cost:
    images = config.epochs * (counting.training // config.batch) * config.batch
    sizes = [view.size for view in config.views(counting.task.data.size)]
    networks = {side: counting.network(side) for side in sizes}
    work = [Work(networks[side], images * sizes.count(side), images * sizes.count(side)) for side in networks]
    saved = sum(counting.saved(networks[side], config.batch) for side in sizes)
    assigned = (config.batch + config.queue) * (config.dim + config.prototypes) * FLOAT  # by Sinkhorn
    weights = 4 * counting.backbone.weights  # with gradients and both moments of Adam
    return Cost(tuple(work), 6.0 * images * len(sizes) * config.dim * config.prototypes, weights + saved + assigned)


def features(counting: Counting, config: None) -> Cost:
    return Cost((Work(counting.backbone, counting.clustered, 0),), 0.0, counting.embedding)


def spice_self(counting: Counting, config: SpiceSelfConfig) -> Cost:
    clusters, images, dim = counting.task.clusters, counting.clustered, counting.backbone.dim
    batch = config.e_step_images(images, clusters)
    steps_per_epoch = images // batch
    # pairs (image, label) per head
    learned_pairs = steps_per_epoch * config.epochs * config.repeats * config.center_fraction * batch
    encoded_views = min(config.epochs, config.view_epochs or config.epochs) * steps_per_epoch * batch * 2.0
    encoded_again = learned_pairs * config.heads if config.encodes_anew else 0.0
    work = Work(counting.backbone, encoded_views + encoded_again, encoded_again if config.joint else 0.0)
    head_weights = dim * dim * (config.layers - 1) + dim * clusters
    head_passes = config.epochs * (steps_per_epoch * batch + images) + 3 * learned_pairs
    numbers = (images + 2 * batch) * dim + config.heads * (4 * head_weights + batch * clusters)
    return Cost((work,), 2.0 * config.heads * head_weights * head_passes, counting.embedding + numbers * FLOAT)


def graph(counting: Counting, config: GraphConfig) -> Cost:
    """Count the search for neighbours, and the suggestion of a number of clusters."""
    images, dim = counting.clustered, counting.backbone.dim
    memory = (images * (dim + 10 * config.neighbors) + min(_strip(), images**2)) * FLOAT
    suggested = SUGGEST_SECONDS * min(1.0, images / SUGGEST_IMAGES)
    return Cost((Work(counting.backbone, 0, 0),), _similarities(counting), memory, suggested)


def spice_graph(counting: Counting, config: SpiceGraphConfig) -> Cost:
    images, dim = counting.clustered, counting.backbone.dim
    clusters = counting.task.clusters or SUPPOSED
    head_passes = (config.rounds + 1) * (3 * passes_of(config, images) + 1) * images
    sample = min(images, landmarks(clusters))
    start = config.heads * sample * clusters * (DIMENSIONS * clusters + max(config.counts)) * START_SECONDS
    memory = (images * dim + 4 * images * config.heads * clusters) * FLOAT
    return Cost((Work(counting.backbone, 0, 0),), 2.0 * config.heads * dim * clusters * head_passes, memory, start)


def reliable(counting: Counting, config: object) -> Cost:
    images = counting.clustered
    memory = (images * counting.backbone.dim + min(_strip(), images**2)) * FLOAT
    return Cost((Work(counting.backbone, 0, 0),), _similarities(counting), memory)


def spice_semi(counting: Counting, config: SpiceSemiConfig) -> Cost:
    network = counting.network(backbone=network_task(counting.task, config).backbone)
    views = config.labelled * (1 + 2 * config.ratio)
    learned = views - config.labelled * config.ratio * config.weak_apart
    # weights with gradients, momentum and the averaged network
    memory = 4 * network.weights + counting.saved(network, learned)
    return Cost((Work(network, config.steps * views, config.steps * learned),), 0.0, memory)


def spice_tune(counting: Counting, config: SpiceTuneConfig) -> Cost:
    """Count the encoding of every view, training of the last blocks, and one more pass for evaluation."""
    network = counting.backbone
    images = min(counting.clustered, config.images)
    views = images * (1 + config.strong_views)
    passes = config.epochs * images * (1 + 1 / max(config.ratio, 0.5)) * TAIL
    work = Work(network, views + counting.clustered, 0), Work(network, passes, passes)
    memory = 4 * network.weights + min(config.memory, views * network.widest / 8) + counting.embedding
    return Cost(work, 0.0, memory)


def scan(counting: Counting, config: ScanConfig) -> Cost:
    images, network = counting.clustered, counting.backbone
    views = config.epochs * (images // config.batch) * config.batch * 2
    selected = config.epochs * images  # images that choose among epochs and heads
    weights = 5 * network.weights  # with gradients, both moments of Adam and the selected network
    neighbors_and_logits = images * (config.neighbors + config.heads * counting.task.clusters) * FLOAT
    memory = weights + counting.saved(network, 2 * config.batch) + neighbors_and_logits
    return Cost((Work(network, views + selected, views),), _similarities(counting), memory)


def self_label(counting: Counting, config: SelfLabelConfig) -> Cost:
    network = counting.backbone
    images = config.epochs * (counting.clustered // config.batch) * config.batch
    memory = 4 * network.weights + counting.saved(network, config.batch)
    return Cost((Work(network, 2 * images, images),), 0.0, memory)


def _strip() -> int:
    """Return how many products the search for neighbours computes at once on this machine."""
    return STRIP_GPU if torch.cuda.is_available() else STRIP


def _similarities(counting: Counting) -> float:
    """Count the operations of all similarities of features."""
    return 2 * float(counting.clustered) ** 2 * counting.backbone.dim


def measured_speed(network: Network, learns: bool, device: torch.device, precision: str = "auto") -> float:
    """Measure operations per second of this network on this device, after a first pass.

    The passes are training passes, or forward passes in eval mode with BatchNorm folded as for embedding.
    """
    net = place(Backbone(network.config, network.channels, network.side), device).train(learns)
    images = torch.zeros(min(32, chunk_of(network.side)), network.channels, network.side, network.side, device=device)
    if not learns:
        net = folded(net, images[:1])

    def run() -> float:
        with torch.set_grad_enabled(learns), autocast(device, precision):
            loss = net(images).float().sum()
        if learns:
            loss.backward()
        return loss.item()  # waits for the device

    run()
    started, done = time.perf_counter(), 0
    while not done or time.perf_counter() - started < MEASURED_SECONDS:
        run()
        done += 1
    return (1 + 2 * learns) * network.forward * len(images) * done / (time.perf_counter() - started)


def table(costs: Mapping[str, Cost], device: torch.device, precision: str = "auto", workers: int = 1) -> str:
    """Tabulate costs, with the time of `workers` on this machine, measured now, and of one GPU of each kind."""
    here = cache(partial(measured_speed, device=device, precision=precision))
    speeds: list[Callable[[Network, bool], float]] = [lambda network, learns: workers * here(network, learns)]
    speeds += [lambda network, learns, peak=peak: peak * USED for peak in PEAK.values()]
    rows = [["stage", "operations", "here", *(f"one {gpu}" for gpu in PEAK), "memory"]]
    seconds = np.array([[cost.seconds(speed) for speed in speeds] for cost in costs.values()])
    for (name, cost), times in zip(costs.items(), seconds, strict=True):
        rows.append([name, f"{cost.operations:.1e}", *map(duration, times), f"{cost.memory / 1e9:.2f} GB"])
    total = sum(cost.operations for cost in costs.values())
    rows.append(["together", f"{total:.1e}", *map(duration, seconds.sum(0)), ""])
    peaks = ", ".join(f"{peak / 1e12:.0f}" for peak in PEAK.values())
    note = (
        f"here: by the speed measured now on this {device.type}; one GPU: if {USED:.0%} of its bf16 peak is reached "
        f"({peaks} TFLOP/s),\nof which small networks on small images reach less; memory: of one worker, beside 1 GB "
        "of libraries"
    )
    return "\n".join([*(f"{row[0]:<12}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows), note])


def duration(seconds: float) -> str:
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:,.1f} h"
