"""The images of a source in batches, each decoded once and in order, without a packed file in between.

Pixels are those of a data set that `ingest` has stored and `open_images` serves without FFCV. Memory: the images under
way in decode_pool.py, and one batch.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from spice_dist.data.crops import central_squares
from spice_dist.data.dataset import DataConfig, packing_of
from spice_dist.data.decode import Packed, Packing, pack_image
from spice_dist.data.decode_pool import DecodePool, Result
from spice_dist.data.images import to_device
from spice_dist.data.sources import BadImage, Source
from spice_dist.data.torchvision_decoder import TorchvisionDecoder

Stored = tuple[Packed, bytes] | np.ndarray
Batch = tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]


class Stream:
    """Decodes sources one after another in the same `cores` processes, which `close` ends."""

    def __init__(self, config: DataConfig, device: torch.device, cores: int):
        self._config, self._packing, self._device = config, packing_of(config), device
        self._pool, self._threads = DecodePool(self._packing, cores), ThreadPoolExecutor(cores, "decoder")

    def batches(self, source: Source, batch: int, refused: dict[int, str]) -> Generator[Batch, None, None]:
        """Yield (images on the device, their numbers in the source on the host), of `batch` consecutive ones each.

        A batch lacks the images that cannot be used. So it is the same wherever the images before it are decoded.

        Args:
            refused: takes the reason for each image that cannot be used, by its number; up to date at every batch.
        """
        central = partial(_central, self._config.size)
        with closing(self._usable(source, refused)) as images:
            for _, chunk in groupby(images, lambda image: image[0] // batch):
                numbers, stored = zip(*chunk, strict=True)
                squares = self._threads.map(central, stored) if self._packing.format == "jpg" else stored
                pixels = torch.from_numpy(np.stack(list(squares)))
                yield to_device(pixels, self._device, self._config.channels), torch.tensor(numbers)

    def close(self) -> None:
        self._pool.close()
        self._threads.shutdown(cancel_futures=True)

    def _usable(self, source: Source, refused: dict[int, str]) -> Generator[tuple[int, Stored], None, None]:
        """Yield the number of each image that can be used, with its JPEG or its raw square."""
        packing = self._packing
        if packing.format == "raw" and not source.encoded and _has_side(source, packing.size):
            squares = (_square(source, number, packing) for number in range(len(source.paths)))
        else:
            squares = self._pool.in_order(source)
        with closing(squares) as results:
            for number, result in enumerate(results):
                if isinstance(result, str):
                    refused[number] = result
                elif isinstance(result, np.ndarray) or packing.format == "jpg":
                    yield number, result
                else:
                    yield number, np.frombuffer(result[1], np.uint8).reshape(packing.size, packing.size, 3)


def _has_side(source: Source, size: int) -> bool:
    try:
        return np.shape(source.read(0))[:2] == (size, size)
    except BadImage:
        return False


def _square(source: Source, number: int, packing: Packing) -> UInt8[np.ndarray, "size size 3"] | Result:
    """Take an array that has its side already as it is; the rest as `ingest` does."""
    try:
        pixels = source.read(number)
    except BadImage as error:
        return str(error)
    if isinstance(pixels, np.ndarray) and pixels.shape[:2] == (packing.size, packing.size):
        return np.broadcast_to(pixels.reshape(packing.size, packing.size, -1), (packing.size, packing.size, 3))
    return pack_image(pixels, packing)


def _central(size: int, stored: tuple[Packed, bytes]) -> UInt8[np.ndarray, "size size 3"]:
    """Decode a stored JPEG and reduce its central square to `size`, as `PackedImages` does."""
    packed, data = stored
    decoder = TorchvisionDecoder()
    pixels = np.empty((packed.height, packed.width, 3), np.uint8)
    decoder.decode(bytearray(data), pixels)
    (box,) = central_squares(np.array([packed.height]), np.array([packed.width]))
    square = np.empty((size, size, 3), np.uint8)
    decoder.resize(pixels, box, square)
    return square
