"""The images of a source in batches, each decoded once and in order, without a packed file in between.

Pixels are those of a data set that `ingest` has stored and `open_images` serves without FFCV. Memory: the images under
way in decode_pool.py, and one batch.
"""

import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from spice_dist.data.crops import central_squares
from spice_dist.data.dataset import DataConfig, packing_of
from spice_dist.data.decode import Packed, Packing, pack_image
from spice_dist.data.decode_pool import Result, packed_in_order
from spice_dist.data.images import to_device
from spice_dist.data.sources import BadImage, Source
from spice_dist.data.torchvision_decoder import TorchvisionDecoder

Stored = tuple[Packed, bytes] | np.ndarray


def stream(
    source: Source, config: DataConfig, batch: int, device: torch.device, refused: dict[int, str]
) -> Generator[tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]], None, None]:
    """Yield (images on the device, their numbers in the source on the host), `batch` at a time.

    Args:
        refused: takes the reason for each image that cannot be used, by its number; up to date at every batch.
    """
    packing = packing_of(config)
    cores = len(os.sched_getaffinity(0))
    images = _usable(source, packing, cores, refused)
    with ThreadPoolExecutor(cores, "decoder") as threads, closing(images):
        while chunk := list(islice(images, batch)):
            numbers, stored = zip(*chunk, strict=True)
            squares = threads.map(partial(_central, config.size), stored) if packing.format == "jpg" else stored
            yield to_device(torch.from_numpy(np.stack(list(squares))), device, config.channels), torch.tensor(numbers)


def _usable(
    source: Source, packing: Packing, cores: int, refused: dict[int, str]
) -> Generator[tuple[int, Stored], None, None]:
    """Yield the number of each image that can be used, with its JPEG or its raw square."""
    if packing.format == "raw" and not source.encoded and _has_side(source, packing.size):
        squares = (_square(source, number, packing) for number in range(len(source.paths)))
    else:
        squares = packed_in_order(source, packing, cores)
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
