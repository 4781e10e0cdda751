"""What a run will cost before it starts: arithmetic, time and memory of every stage that trains or embeds.

Operations and saved activations are counted on the networks themselves, layer by layer, on tensors without contents
(PyTorch's fake tensors), so that a recipe for a large GPU is counted on a laptop in seconds. Time is operations by
speed: this machine's is measured on the run's own networks; a GPU's is PEAK times USED, which is an assumption. Left
out are reading and augmentation, which overlap with training, the heads of stage 1, metrics, and what workers exchange.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from spice_dist.config import Config
from spice_dist.graph import DIMENSIONS, landmarks
from spice_dist.inference import chunk_of
from spice_dist.methods.plumbing import autocast, place
from spice_dist.methods.spice_graph import passes
from spice_dist.methods.spice_semi import network_task
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.folding import folded
from spice_dist.neighbors import BLOCK_GPU
from spice_dist.task import USING_LABELS

PEAK = {"A100": 312e12, "H100": 989e12}  # bf16 operations per second without sparsity, from their data sheets
USED = 0.2  # share of it that training a ResNet reaches
FLOAT = 4  # bytes
SUGGEST_SECONDS, SUGGEST_IMAGES = 8.0, 4_000  # measured, of one core; more images are sampled
START_SECONDS = 1.5e-8  # of one core, for an image, a cluster, a coordinate and a clustering: eigenvectors and k-means
SUPPOSED = 20  # clusters where the features are to say how many
TAIL = 0.2  # share of a network's forward pass in its last blocks


@dataclass(frozen=True)
class Network:
    """A backbone for images of one size: what it holds, and what every image costs."""

    config: BackboneConfig
    channels: int
    side: int  # pixels
    dim: int  # of the features
    weights: float  # bytes
    forward: float  # operations of an image, two per multiply-add; a backward pass costs twice as many
    saved: float  # bytes of an image that are kept for its backward pass
    widest: float  # those of them in the largest tensor


@dataclass(frozen=True)
class Work:
    """Images that go through a network in one stage."""

    network: Network
    seen: float  # forward passes
    learned: float  # those of them with a backward pass

    @property
    def operations(self) -> float:
        return self.network.forward * (self.seen + 2 * self.learned)


@dataclass(frozen=True)
class Stage:
    """The cost of one stage, of all workers together; the memory is one worker's, beside its libraries."""

    name: str
    work: tuple[Work, ...]
    products: float  # operations of matrix products outside the networks
    memory: float  # bytes on the device at most, without temporary tensors
    fixed: float = 0.0  # seconds of a CPU core beside: decoding, eigenvectors, k-means, as measured

    @property
    def operations(self) -> float:
        return self.products + sum(part.operations for part in self.work)

    def seconds(self, speed: Callable[[Network, bool], float]) -> float:
        """At `speed(network, learns)` operations per second; the products run as fast as the first network."""
        passes = sum(part.operations / speed(part.network, part.learned > 0) for part in self.work if part.operations)
        learns = any(part.learned for part in self.work)
        return passes + self.products / speed(self.work[0].network, learns) + self.fixed


def estimate(config: Config, training: int, clustered: int, workers: int = 1, passes: int = 1) -> list[Stage]:
    """The stages of a run that cost something, in order.

    Args:
        training: images that train stages 1 and 3.
        clustered: images that are clustered.
        workers: processes that share the images of every step.
        passes: in how many forward passes each computes its share: one on a GPU, one per BatchNorm group on a CPU.
    """
    count = _Count(config, training, clustered, workers * passes)
    pretext = {"moco": count.moco, "byol": count.byol, "imc_swav": count.imc_swav}
    found = [pretext[config.pretext]()] if config.pretext in pretext else []
    if config.method in USING_LABELS:
        return [count.spice_semi()]
    found.append(count.features())
    if config.method == "spice":
        stage2 = [count.graph(), count.spice_graph()] if config.stage2 == "spice_graph" else [count.spice_self()]
        stage3 = {"spice_semi": count.spice_semi, "spice_tune": count.spice_tune}
        found += [*stage2, count.reliable(), *([stage3[config.stage3]()] if config.stage3 in stage3 else [])]
    if config.method == "scan":
        found += [count.scan(), count.self_label()]
    return found


class _Count:
    def __init__(self, config: Config, training: int, clustered: int, parts: int):
        self.config, self.training, self.clustered = config, training, clustered
        self.parts = parts  # forward passes in which all workers together compute a step
        self.network = partial(counted, channels=config.data.channels, precision=config.precision)
        self.plain = self.network(config.backbone, side=config.data.size)

    def moco(self) -> Stage:
        own = self.config.moco
        network = self.network(self.config.backbone, side=own.view.size or self.config.data.size)
        queries = own.epochs * (self.training // own.batch) * own.new_keys
        similarities = own.queue * (own.dim + own.new_keys / self.parts) * FLOAT
        weights = 4 * network.weights  # with gradients, momentum and the key network
        memory = weights + self._saved(network, own.new_keys) + similarities
        return Stage("moco", (Work(network, 2 * queries, queries),), 6.0 * queries * own.queue * own.dim, memory)

    def byol(self) -> Stage:
        own = self.config.byol
        network = self.network(self.config.backbone, side=own.view.size or self.config.data.size)
        views = own.epochs * (self.training // own.batch) * own.batch * 2
        memory = 4 * network.weights + self._saved(network, 2 * own.batch)
        return Stage("byol", (Work(network, 2 * views, views),), 0.0, memory)

    def imc_swav(self) -> Stage:
        own = self.config.imc_swav
        images = own.epochs * (self.training // own.batch) * own.batch
        sizes = [view.size or self.config.data.size for view in own.views]
        networks = {side: self.network(self.config.backbone, side=side) for side in sizes}
        work = [Work(networks[side], images * sizes.count(side), images * sizes.count(side)) for side in networks]
        saved = sum(self._saved(networks[side], own.batch) for side in sizes)
        seen = (own.batch + own.queue) * (own.dim + own.prototypes) * FLOAT  # by Sinkhorn
        weights = 4 * self.plain.weights  # with gradients and both moments of Adam
        return Stage(
            "imc_swav", tuple(work), 6.0 * images * len(sizes) * own.dim * own.prototypes, weights + saved + seen
        )

    def features(self) -> Stage:
        return Stage("features", (Work(self.plain, self.clustered, 0),), 0.0, self._embedding)

    def spice_self(self) -> Stage:
        own, clusters, dim = self.config.spice_self, self.config.clusters, self.plain.dim
        batch = min(self.clustered, own.samples_per_cluster * clusters)  # M
        steps_per_epoch = self.clustered // batch
        taught = (
            steps_per_epoch * own.epochs * own.repeats * own.center_fraction * batch
        )  # pairs (image, label) per head
        made = min(own.epochs, own.view_epochs or own.epochs) * steps_per_epoch * batch * 2.0
        again = taught * own.heads if own.encodes_anew else 0.0
        work = Work(self.plain, made + again, again if own.joint else 0.0)
        head = dim * dim * (own.layers - 1) + dim * clusters  # weights
        asked = own.epochs * (steps_per_epoch * batch + self.clustered) + 3 * taught
        kept = (self.clustered + 2 * batch) * dim + own.heads * (4 * head + batch * clusters)
        return Stage("spice_self", (work,), 2.0 * own.heads * head * asked, self._embedding + kept * FLOAT)

    def graph(self) -> Stage:
        """Neighbours, and the number of clusters that they suggest."""
        own, images, dim = self.config.graph, self.clustered, self.plain.dim
        memory = (images * (dim + 10 * own.neighbors) + min(BLOCK_GPU, images) ** 2) * FLOAT
        suggested = SUGGEST_SECONDS * min(1.0, images / SUGGEST_IMAGES)
        return Stage("graph", (Work(self.plain, 0, 0),), float(images) ** 2 * dim, memory, suggested)

    def spice_graph(self) -> Stage:
        own, images, dim = self.config.spice_graph, self.clustered, self.plain.dim
        clusters = self.config.clusters or SUPPOSED
        asked = (own.rounds + 1) * (3 * passes(own, images) + 1) * images
        sample = min(images, landmarks(clusters))
        start = own.heads * sample * clusters * (DIMENSIONS * clusters + max(own.counts)) * START_SECONDS
        memory = (images * dim + 4 * images * own.heads * clusters) * FLOAT
        return Stage("spice_graph", (Work(self.plain, 0, 0),), 2.0 * own.heads * dim * clusters * asked, memory, start)

    def spice_tune(self) -> Stage:
        """Encoding of every view; the last blocks' share of the network, forth and back; once more to evaluate."""
        own = self.config.spice_tune
        images = min(self.clustered, own.images)
        views = images * (1 + own.strong_views)
        passes = own.epochs * images * (1 + 1 / max(own.ratio, 0.5)) * TAIL
        work = Work(self.plain, views + self.clustered, 0), Work(self.plain, passes, passes)
        memory = 4 * self.plain.weights + min(own.memory, views * self.plain.widest / 8) + self._embedding
        return Stage("spice_tune", work, 0.0, memory)

    def reliable(self) -> Stage:
        block = min(BLOCK_GPU, self.clustered)
        memory = (self.clustered * self.plain.dim + block**2) * FLOAT
        products = float(self.clustered) ** 2 * self.plain.dim  # of symmetric similarities, half are computed
        return Stage("reliable", (Work(self.plain, 0, 0),), products, memory)

    def spice_semi(self) -> Stage:
        own = self.config.spice_semi
        backbone = network_task(self.config, own).backbone
        network = self.network(backbone, side=self.config.data.size)
        views = own.labelled * (1 + 2 * own.ratio)
        learnt = views - own.labelled * own.ratio * own.weak_apart
        memory = 4 * network.weights + self._saved(network, learnt)  # with gradients, momentum and the averaged network
        return Stage("spice_semi", (Work(network, own.steps * views, own.steps * learnt),), 0.0, memory)

    def scan(self) -> Stage:
        own, clusters = self.config.scan, self.config.clusters
        views = own.epochs * (self.clustered // own.batch) * own.batch * 2
        selected = own.epochs * self.clustered  # images that choose among epochs and heads
        weights = 5 * self.plain.weights  # with gradients, both moments of Adam and the selected network
        kept = self.clustered * (own.neighbors + own.heads * clusters) * FLOAT
        work = Work(self.plain, views + selected, views)
        products = float(self.clustered) ** 2 * self.plain.dim  # of symmetric similarities, half are computed
        return Stage("scan", (work,), products, weights + self._saved(self.plain, 2 * own.batch) + kept)

    def self_label(self) -> Stage:
        own = self.config.self_label
        images = own.epochs * (self.clustered // own.batch) * own.batch
        memory = 4 * self.plain.weights + self._saved(self.plain, own.batch)
        return Stage("self_label", (Work(self.plain, 2 * images, images),), 0.0, memory)

    @property
    def _embedding(self) -> float:
        """Without gradients only neighbouring layers are in memory: an input, an output and a shortcut."""
        return self.plain.weights + 3 * min(chunk_of(self.plain.side), self.clustered) * self.plain.widest

    def _saved(self, network: Network, views: int) -> float:
        return network.saved * views / self.parts


@cache
def counted(config: BackboneConfig, side: int, channels: int, precision: str = "auto") -> Network:
    """The cost of a backbone, from one pass over fake tensors; "auto" counts activations as on a GPU, in bf16."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    low = "fp32" if precision == "fp32" else "bf16"

    def kept(images: int) -> list[int]:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(torch.device("cpu"), low):
            network(torch.empty(images, channels, side, side))
        return list(storages.values())

    network = Backbone(config, channels, side)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with FlopCounterMode(display=False) as operations:
            few = kept(2)
        per_image = [(after - before) / 2 for before, after in zip(few, kept(4), strict=True)]  # of weights: 0
    weights = sum(parameter.numel() for parameter in network.parameters()) * FLOAT
    forward = operations.get_total_flops() / 2
    return Network(config, channels, side, network.dim, weights, forward, sum(per_image), max(per_image))


def measured_speed(
    network: Network, learns: bool, device: torch.device, precision: str = "auto", seconds: float = 2.0
) -> float:
    """Operations per second of this network on this device, after a first pass: of training passes, or of forward
    passes in evaluation, where BatchNorm is folded as for embedding."""
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
    while not done or time.perf_counter() - started < seconds:
        run()
        done += 1
    return (1 + 2 * learns) * network.forward * len(images) * done / (time.perf_counter() - started)


def table(stages: list[Stage], device: torch.device, precision: str = "auto", workers: int = 1) -> str:
    """The costs, with the time that `workers` take here, as measured now, and that one GPU of each kind takes."""
    own = cache(partial(measured_speed, device=device, precision=precision))
    speeds: list[Callable[[Network, bool], float]] = [lambda network, learns: workers * own(network, learns)]
    speeds += [lambda network, learns, peak=peak: peak * USED for peak in PEAK.values()]
    rows = [["stage", "operations", "here", *(f"one {gpu}" for gpu in PEAK), "memory"]]
    seconds = np.array([[stage.seconds(speed) for speed in speeds] for stage in stages])
    for stage, times in zip(stages, seconds, strict=True):
        rows.append([stage.name, f"{stage.operations:.1e}", *map(duration, times), f"{stage.memory / 1e9:.2f} GB"])
    total = sum(stage.operations for stage in stages)
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
