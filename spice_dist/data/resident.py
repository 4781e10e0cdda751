"""Data sets that stay in memory, decoded: a batch is one indexing, without a loader."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from spice_dist.data.crops import Crop, Key, boxes, cut
from spice_dist.data.images import Images
from spice_dist.data.order import check_order, global_batches
from spice_dist.transfer import send, send_beside

READ_BATCH = 1_024


class ResidentImages:
    """`Images` of one tensor, served on the device that it is on, or on another."""

    def __init__(self, images: UInt8[Tensor, "n c h w"], device: torch.device | None = None):
        self.n, self.channels, self.size, _ = images.shape
        self.decodes = False
        self._images, self._device = images, device or images.device

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images.batches`."""
        checked = check_order(order, batch_size, self.n)
        return self._serve(global_batches(checked, batch_size, drop_last=False))

    def _serve(self, batches: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            index = torch.from_numpy(batch.copy())
            chosen = self._images[send(index, self._images.device)]
            yield send_beside(chosen, self._device), index

    def crops(
        self, order: np.ndarray, batch_size: int, crops: Sequence[tuple[Crop, Key]]
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """As `Images.crops`: cut on the device, antialiased."""
        for images, index in self.batches(order, batch_size):
            host = index.numpy()
            sides = np.full(len(host), self.size)
            cuts = [(boxes(crop, key, host, sides, sides), crop.size) for crop, key in crops]
            yield [cut(images.float(), box, size, size).round().byte() for box, size in cuts], index

    def close(self) -> None:
        """As `Images.close`."""
        self._images = self._images[:0]


def load_resident(images: Images, kept: torch.device, device: torch.device | None = None) -> ResidentImages:
    """Read every image once, in order, into n * c * h * w bytes of `kept`; serve them on `device`, or there."""
    resident = torch.empty((images.n, images.channels, images.size, images.size), dtype=torch.uint8, device=kept)
    start = 0
    for pixels, _ in images.batches(np.arange(images.n), READ_BATCH):
        resident[start : start + len(pixels)] = pixels
        start += len(pixels)
    return ResidentImages(resident, device)
