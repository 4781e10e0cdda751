"""The contract of everything that serves images; raw ones are the same bit for bit from every server.

with closing(loaders.open_images(data_dir, device=device, size=32)) as images:
    for pixels, index in images.batches(order, batch_size):     # (B, C, H, W) uint8, (B,) int64
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from spice_dist.data.crops import Crop, Key
from spice_dist.transfer import send_beside

CHUNK = 512  # images of up to 64 pixels in a forward pass; fewer larger ones, see `chunk_of`


def chunk_of(size: int) -> int:
    """Return how many images of `size` pixels a forward pass takes: about the pixels of CHUNK images of 64."""
    return max(16, min(CHUNK, CHUNK * 64**2 // size**2))


@runtime_checkable
class Images(Protocol):
    """N images, as squares of `size` pixels or as crops."""

    n: int
    size: int
    channels: int
    decodes: bool  # whether images are larger than `size`, so that a crop must be cut before they are reduced to it

    def batches(
        self, order: np.ndarray, batch_size: int
    ) -> Iterator[tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]]:
        """Yield (images on the device, index on the host) of order[0:b], order[b:2b], ...: central squares.

        The last batch may be partial; nothing is dropped, padded or reordered; `order` may repeat indices and have any
        length. Arguments are checked at once, not at the first batch.

        Raises:
            ValueError: an empty order, one that is not 1-D integers, or a batch size below 1.
            IndexError: an entry outside 0 .. n-1.
            RuntimeError: the loader failed or was silent for handover.STALL_S seconds.
        """
        ...

    def crops(
        self, order: np.ndarray, batch_size: int, crops: Sequence[tuple[Crop, Key]]
    ) -> Iterator[tuple[list[Tensor], Int64[Tensor, " b"]]]:
        """Yield ([a batch (B, C, size, size) uint8 for each crop], index); every image is decoded once."""
        ...

    def close(self) -> None:
        """Release files and memory; `batches` must not be called any more."""
        ...


def to_device(pixels: UInt8[Tensor, "b h w 3"], device: torch.device, channels: int) -> UInt8[Tensor, "b c h w"]:
    """Bring a batch to the device, channels first."""
    images = send_beside(pixels, device).permute(0, 3, 1, 2)
    return to_grey(images) if channels == 1 else images.contiguous()


def to_grey(images: UInt8[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 1 h w"]:
    """Return ITU-R 601 luma, rounded: 0.299 R + 0.587 G + 0.114 B in 16-bit fixed point; grey stays exact."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8).unsqueeze(1)
