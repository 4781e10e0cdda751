"""Operations and memory of a stage, counted on its networks layer by layer.

The networks run on tensors without contents (PyTorch's fake tensors), so that a recipe for a large GPU is counted on a
laptop in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from spice_dist.data.ingest import stored_format
from spice_dist.data.loaders import RESIDENT_BYTES
from spice_dist.inference import chunk_of
from spice_dist.methods.plumbing import autocast
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.task import Task

FLOAT = 4  # bytes


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
class Cost:
    """The cost of one stage, of all workers together; the memory is one worker's, beside its libraries."""

    work: tuple[Work, ...]
    products: float  # operations of matrix products outside the networks
    memory: float  # bytes on the device at most, without temporary tensors
    fixed: float = 0.0  # seconds of a CPU core beside: decoding, eigenvectors, k-means, as measured

    @property
    def operations(self) -> float:
        return self.products + sum(work.operations for work in self.work)

    def seconds(self, speed: Callable[[Network, bool], float]) -> float:
        """At `speed(network, learns)` operations per second; the products run as fast as the first network."""
        passes = sum(work.operations / speed(work.network, work.learned > 0) for work in self.work if work.operations)
        learns = any(work.learned for work in self.work)
        return passes + self.products / speed(self.work[0].network, learns) + self.fixed


@dataclass(frozen=True)
class Counting:
    """What the cost of a stage is counted from, beside its settings: `cost(counting, settings) -> Cost`."""

    task: Task
    training: int  # images that train stages 1 and 3
    clustered: int  # images that are clustered
    passes: int  # forward passes in which all workers together compute a step

    def network(self, side: int | None = None, backbone: BackboneConfig | None = None) -> Network:
        """The run's backbone or another one, for images of `side` pixels, or of the size of the data set."""
        data = self.task.data
        return counted(backbone or self.task.backbone, side or data.size, data.channels, self.task.precision)

    @cached_property
    def backbone(self) -> Network:
        return self.network()

    @property
    def images(self) -> float:
        """Bytes of the images that stay on the device: raw squares that are few enough."""
        data, count = self.task.data, max(self.training, self.clustered)
        held = count * data.channels * data.size**2
        return held if stored_format(data.format, data.size, count) == "raw" and held <= RESIDENT_BYTES else 0

    @property
    def embedding(self) -> float:
        """Bytes without gradients: only neighbouring layers are in memory, an input, an output and a shortcut."""
        return self.backbone.weights + 3 * min(chunk_of(self.backbone.side), self.clustered) * self.backbone.widest

    def saved(self, network: Network, views: float) -> float:
        """Bytes of one worker that a step of so many views keeps for its backward passes."""
        return network.saved * views / self.passes


@cache
def counted(config: BackboneConfig, side: int, channels: int, precision: str = "auto") -> Network:
    """Count a backbone's cost in one pass over fake tensors; "auto" counts activations as on a GPU, in bf16."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    low = "fp32" if precision == "fp32" else "bf16"

    def saved_by(images: int) -> list[int]:
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
            few = saved_by(2)
        per_image = [(after - before) / 2 for before, after in zip(few, saved_by(4), strict=True)]  # of weights: 0
    weights = sum(parameter.numel() for parameter in network.parameters()) * FLOAT
    forward = operations.get_total_flops() / 2
    return Network(config, channels, side, network.dim, weights, forward, sum(per_image), max(per_image))
