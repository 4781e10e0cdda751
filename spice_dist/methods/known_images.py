"""Collect batches of the images to be clustered, where the others of a step train the features alone."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_dist.data.order import epoch_order
from spice_dist.distributed import collectives
from spice_dist.distributed.worker import Worker
from spice_dist.transfer import send


class Bank(nn.Module):
    """Collects views of images to be clustered until they fill a batch.

    If some images only train the features, such as STL-10's unlabelled ones, a batch has too few others for a
    classifier. Every worker holds all rows, in the order of the images, which does not depend on the number of workers.
    """

    def __init__(self, views: int, batch: int, width: int):
        super().__init__()
        self.rows: Tensor
        self.register_buffer("rows", torch.zeros(views, batch, width))

    def push(
        self, rows: Float[Tensor, "V b width"], positions: np.ndarray, before: int, worker: Worker
    ) -> Tensor | None:
        """Add a step's rows of images to be clustered; return a full batch (V, B, width) once there is one.

        Args:
            rows: of this worker's share of the step's batch.
            positions: in the whole batch, of the images to be clustered.
            before: number of such images earlier in the epoch. The bank is empty at the start of an epoch.
        """
        if not len(positions):
            return None
        size, first = self.rows.shape[1], worker.rank * rows.shape[1]
        in_share = (positions >= first) & (positions < first + rows.shape[1])
        new = rows.new_zeros(len(rows), len(positions), rows.shape[2])
        to, of = (send(torch.from_numpy(x), rows.device) for x in (in_share.nonzero()[0], positions[in_share] - first))
        new[:, to] = rows[:, of]
        new = collectives.total(new)  # a row is zero in all workers but one
        start = before % size
        room = min(size - start, new.shape[1])
        self.rows[:, start : start + room] = new[:, :room]
        if start + room < size:
            return None
        full = self.rows.clone()
        self.rows[:, : new.shape[1] - room] = new[:, room:]
        return full


def shares(rows: Tensor, dim: int, passes: int, worker: Worker) -> list[tuple[Tensor, Tensor]]:
    """Return (features, probabilities) for each pass of this worker's share of a full bank (V, B, D + J)."""
    rows_of_worker = rows.chunk(worker.world, 1)[worker.rank]
    return [(of_pass[:, :, :dim], of_pass[:, :, dim:]) for of_pass in rows_of_worker.chunk(passes, 1)]


def known_images(
    seed: int, epochs: int, batch: int, num_images: int, clustered: int, start: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield for every step from `start` on (positions in the global batch of the first `clustered` images, their number
    earlier in the epoch)."""
    steps = num_images // batch
    for epoch in range(start // steps, epochs):
        order = epoch_order(seed, epoch, num_images)[: steps * batch]
        known = order.reshape(steps, batch) < clustered
        before = known.sum(1).cumsum() - known.sum(1)
        for step in range(max(0, start - epoch * steps), steps):
            yield known[step].nonzero()[0], int(before[step])
