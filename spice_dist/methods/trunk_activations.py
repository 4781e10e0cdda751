"""Compute activations by the frozen first blocks of a network once, and features by its last blocks from them.

`trunk` maps a view to an activation, `tail` an activation to features (`spice_dist.models.tail`). M = chosen images,
S = rows of them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float16, Int
from torch import Tensor

from spice_dist.data import augment
from spice_dist.data.crops import Key
from spice_dist.data.images import Images
from spice_dist.data.views import View
from spice_dist.distributed.worker import Worker
from spice_dist.methods.plumbing import autocast, place
from spice_dist.models.backbone import Backbone, unit
from spice_dist.models.folding import folded
from spice_dist.models.heads import ClusterHeads
from spice_dist.models.tail import Tail, Trunk, split
from spice_dist.task import Task

ENCODED = 32  # images between two reports of progress, about a second on a core
CHUNK = 256  # activations per forward pass without gradients


def folded_trunk(task: Task, backbone: Backbone, blocks: int) -> Trunk:
    """Fold the trunk's BatchNorms: a CPU runs it two to four times as fast, with equal outputs up to rounding."""
    channels, size = task.data.channels, task.data.size
    device = next(backbone.parameters()).device
    example = torch.rand((2, channels, size, size), generator=torch.Generator().manual_seed(0)).to(device)
    return split(place(folded(backbone, example), device), channels, size, blocks).trunk


def encode(
    task: Task, views: Sequence[tuple[View, Key]], images: Images, chosen: np.ndarray, trunk: Trunk, worker: Worker
) -> list[Tensor]:
    """Compute the activations (M, ...), float16, of each view of the images `chosen`, on the device."""
    activations: list[Tensor] = []
    done = 0
    for batch, _ in augment.view_batches(images, chosen, ENCODED, views, task.backbone.statistics):
        with autocast(worker.device, task.precision):
            encoded = [trunk(ready(view)) for view in batch]
        if not activations:
            activations = [x.new_empty((len(chosen), *x.shape[1:])) for x in encoded]
        for whole, x in zip(activations, encoded, strict=True):
            whole[done : done + len(x)] = x
        done += len(encoded[0])
        worker.progress(done, len(chosen), None)
    return activations


def ready(x: Tensor) -> Tensor:
    """Convert to float32 and to the memory layout of the fastest convolutions."""
    return x.float().contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.float()


def logits_of(tail: Tail, head: ClusterHeads, activations: Tensor, task: Task) -> Float[Tensor, "B K"]:
    with autocast(activations.device, task.precision):
        return head(head.inputs(tail(ready(activations)).float()))[0]


@torch.no_grad()
def features_of(
    tail: Tail, activations: Float16[Tensor, "M ..."], task: Task, rows: Int[Tensor, " S"] | None = None
) -> Float[Tensor, "S D"]:
    """Compute unit features of these rows, or of all, by the current tail."""
    rows = torch.arange(len(activations)) if rows is None else rows
    with autocast(activations.device, task.precision):
        return torch.cat([unit(tail(ready(activations[chunk])).float()) for chunk in rows.split(CHUNK)])


@torch.no_grad()
def predicted(
    tail: Tail, head: ClusterHeads, activations: Float16[Tensor, "M ..."], task: Task, rows: Int[Tensor, " S"]
) -> Int[Tensor, " S"]:
    """Predict the clusters of these rows."""
    return head(features_of(tail, activations, task, rows))[0].argmax(1)
