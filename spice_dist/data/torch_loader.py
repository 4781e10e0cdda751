"""Batches read with NumPy and torch alone: where FFCV is not installed, and as the oracle of its loader."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spice_dist.data import beton
from spice_dist.data.images import FULL_CHECK_BYTES, Handover, to_device
from spice_dist.data.ingest import check_fingerprint, read_manifest
from spice_dist.data.order import check_order, global_batches
from spice_dist.errors import DamagedFile

BATCHES_AHEAD = 2


class TorchImages:
    """`Images` over a file of raw pixels; one thread reads ahead. Owns `raw` and closes it."""

    def __init__(self, raw: beton.RawImages, device: torch.device, channels: int):
        self.n, self.height, self.width, self.channels = raw.n, raw.height, raw.width, channels
        self._raw, self._device = raw, device

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images.batches`."""
        return self._serve(global_batches(check_order(order, batch_size, self.n), batch_size, drop_last=False))

    def _serve(self, batches: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        handover = Handover(BATCHES_AHEAD)
        reader = threading.Thread(target=self._read, args=(batches, handover), daemon=True, name="torch_loader")
        reader.start()
        try:
            for index in batches:
                yield to_device(handover.get(reader), index, self._device, self.channels)
        finally:
            handover.close(reader)

    def _read(self, batches: list[np.ndarray], handover: Handover) -> None:
        try:
            for index in batches:
                if not handover.put(self._raw[index]):
                    return
        except BaseException as error:  # noqa: BLE001  the consumer raises it; this thread has nobody to tell
            handover.put(error)

    def close(self) -> None:
        """As `Images.close`."""
        self._raw.close()


def open_npy_images(data_dir: Path, device: torch.device, channels: int) -> TorchImages:
    """Serve data_dir/images.npy after comparing it with the manifest: its pixels too if they are at most 8 GiB.

    Raises:
        DamagedFile: images.npy is not the one that the manifest seals.
    """
    manifest = read_manifest(data_dir)
    path = data_dir / "images.npy"
    offset = _data_offset(path, (manifest.n, manifest.size, manifest.size, 3))
    num_bytes = manifest.size**2 * 3
    if manifest.n * num_bytes <= FULL_CHECK_BYTES:
        check_fingerprint(data_dir)
    raw = beton.RawImages(path, offset + num_bytes * np.arange(manifest.n), manifest.size, manifest.size)
    return TorchImages(raw, device, channels)


def _data_offset(path: Path, shape: tuple[int, ...]) -> int:
    """Where the pixels start in an .npy of exactly this shape, uint8, and no byte more or less."""
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("another version of the format")
            found, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
        if (found, fortran, dtype) != (shape, False, np.uint8) or path.stat().st_size != offset + int(np.prod(shape)):
            raise ValueError(f"{dtype} {found} instead of uint8 {shape}, or cut short")
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path} is damaged ({error}): pack the images again") from error
    return offset
