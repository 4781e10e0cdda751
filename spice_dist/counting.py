"""Count operations and memory of a stage on its networks, layer by layer.

The networks run on tensors without contents (PyTorch's fake tensors), so that a laptop counts a recipe for a large GPU
in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from spice_dist.data.images import chunk_of
from spice_dist.data.ingest import stored_format
from spice_dist.data.loaders import RESIDENT_BYTES
from spice_dist.methods.plumbing import autocast
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.task import Task

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Network:
    """A backbone for images of one size, with its memory and the cost of an image."""

    config: BackboneConfig
    channels: int
    side: int  # pixels
    dim: int  # of the features
    weights: float  # bytes
    forward: float  # operations for an image, two per multiply-add; a backward pass costs twice as many
    saved: float  # bytes for an image, kept for its backward pass
    widest: float  # bytes of the largest of these tensors


@dataclass(frozen=True)
class Work:
    """Images that go through a network in one stage."""

    network: Network
    seen: float  # forward passes
    learned: float  # forward passes with a backward pass

    @property
    def operations(self) -> float:
        return self.network.forward * (self.seen + 2 * self.learned)


@dataclass(frozen=True)
class Cost:
    """The cost of one stage for all workers together; the memory is one worker's, without its libraries."""

    work: tuple[Work, ...]
    products: float  # operations of matrix products outside the networks
    memory: float  # bytes on the device at most, without temporary tensors
    fixed: float = 0.0  # further seconds of a CPU core, as measured: decoding, eigenvectors, k-means

    @property
    def operations(self) -> float:
        return self.products + sum(work.operations for work in self.work)

    def seconds(self, speed: Callable[[Network, bool], float]) -> float:
        """Convert to time by `speed(network, learns)`, operations per second; products run at the first network's."""
        passes = sum(work.operations / speed(work.network, work.learned > 0) for work in self.work if work.operations)
        learns = any(work.learned for work in self.work)
        return passes + self.products / speed(self.work[0].network, learns) + self.fixed


@dataclass(frozen=True)
class Counting:
    """The input of `cost(counting, settings) -> Cost`, which counts a stage."""

    task: Task
    training: int  # images that train stages 1 and 3
    clustered: int  # images that are clustered
    passes: int  # forward passes in which all workers together compute a step

    def network(self, side: int | None = None, backbone: BackboneConfig | None = None) -> Network:
        """Count the run's backbone or another one, for images of `side` pixels or the data set's size."""
        data = self.task.data
        return counted(backbone or self.task.backbone, side or data.size, data.channels, self.task.precision)

    @cached_property
    def backbone(self) -> Network:
        return self.network()

    @property
    def images(self) -> float:
        """Count the bytes of images on the device: raw ones of RESIDENT_BYTES at most.

        More stay there only where a GPU has three times the room.
        """
        data, count = self.task.data, max(self.training, self.clustered)
        size = count * data.channels * data.size**2
        return size if stored_format(data.format, data.size, count) == "raw" and size <= RESIDENT_BYTES else 0

    @property
    def embedding(self) -> float:
        """Count the bytes of embedding: without gradients memory holds a layer's input, output and shortcut only."""
        return self.backbone.weights + 3 * min(chunk_of(self.backbone.side), self.clustered) * self.backbone.widest

    def saved(self, network: Network, views: float) -> float:
        """Count the bytes that one worker keeps for the backward passes of a step of `views`."""
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
        # the difference of 4 and 2 images leaves out the weights
        per_image = [(after - before) / 2 for before, after in zip(few, saved_by(4), strict=True)]
    weights = sum(parameter.numel() for parameter in network.parameters()) * FLOAT
    forward = operations.get_total_flops() / 2
    return Network(config, channels, side, network.dim, weights, forward, sum(per_image), max(per_image))
