"""Batches of images, the same bit for bit whichever loader serves them.

with closing(open_images(data_dir, device=device)) as images:
    for pixels, index in images.batches(order, batch_size):     # (B, C, H, W) uint8, (B,) int64
"""

import contextlib
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from spice_dist.data import beton
from spice_dist.data.ingest import read_manifest
from spice_dist.errors import DamagedFile, UserError

LOADERS = ("auto", "ffcv", "torch")
RESIDENT_BYTES = 2 << 30
FULL_CHECK_BYTES = 8 << 30  # larger files: the structure is checked whole, the pixels of SPREAD_CHECK images
SPREAD_CHECK = 4_096
STALL_S = 180.0  # longest wait for a batch; the first one includes FFCV's compilation, 30 s on a busy node

log = logging.getLogger("spice_dist.data")
_told: set[str] = set()


@runtime_checkable
class Images(Protocol):
    """N images of one size."""

    n: int
    height: int
    width: int
    channels: int

    def batches(
        self, order: np.ndarray, batch_size: int
    ) -> Iterator[tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]]:
        """(images, index) on the device for order[0:b], order[b:2b], ...

        The last batch may be partial; nothing is dropped, padded or reordered; `order` may repeat indices and have any
        length. Arguments are judged at once, not at the first batch.

        Raises:
            ValueError: an empty order, one that is not 1-D integers, or a batch size below 1.
            IndexError: an entry outside 0 .. n-1.
            RuntimeError: the loader failed or gave nothing for STALL_S seconds.
        """
        ...

    def close(self) -> None:
        """Give back files and memory; `batches` must not be called any more."""
        ...


def open_images(
    data_dir: Path,
    *,
    device: torch.device,
    channels: int = 3,
    loader: str = "auto",
    resident_bytes: int = RESIDENT_BYTES,
) -> Images:
    """Open data_dir/dataset.beton, or data_dir/images.npy where there is none, after verifying it.

    Args:
        channels: 3, or 1 for luma (ITU-R 601).
        loader: "auto" takes FFCV for a .beton where it is installed; "ffcv" and "torch" force one.
        resident_bytes: a set of at most this size is read once and kept on the device.

    Raises:
        UserError: unknown loader or channels, no data set, or FFCV asked for and not there.
        DamagedFile: the data set is truncated, altered or not the one of the manifest.
    """
    if loader not in LOADERS:
        raise UserError(f"unknown loader {loader!r}: choose one of {', '.join(LOADERS)}")
    if channels not in (1, 3):
        raise UserError(f"channels is {channels}: choose 3 (colour) or 1 (grey)")
    images = _open(data_dir, device, channels, loader)
    if images.n * images.height * images.width * channels > resident_bytes:
        return images
    from spice_dist.data.resident import load_resident

    try:
        return load_resident(images, device)
    finally:
        images.close()


def _open(data_dir: Path, device: torch.device, channels: int, loader: str) -> Images:
    from spice_dist.data.torch_loader import TorchImages, open_npy_images

    path = data_dir / "dataset.beton"
    if not path.exists():
        if not (data_dir / "images.npy").exists():
            raise UserError(f"no data set in {data_dir}: neither dataset.beton nor images.npy; pack the images first")
        if loader == "ffcv":
            raise UserError(f"the ffcv loader needs {path}: pack the images with FFCV, or choose the torch loader")
        return open_npy_images(data_dir, device, channels)

    info = beton.verify(path)
    _compare_with_manifest(info, data_dir)
    beton.check_pixels(info, spread=None if info.file_size <= FULL_CHECK_BYTES else SPREAD_CHECK)
    if loader != "torch":
        from spice_dist.data.ffcv_loader import FFCVImages, why_no_ffcv

        missing = why_no_ffcv()
        if missing is None:
            return FFCVImages(info, device, channels)
        if loader == "ffcv":
            raise UserError(missing)
        _tell_once(f"{missing}; the slower torch loader takes its place")
    return TorchImages(beton.read_raw(info), device, channels)


def _compare_with_manifest(info: beton.BetonInfo, data_dir: Path) -> None:
    if not (data_dir / "manifest.json").exists():
        return
    manifest = read_manifest(data_dir)
    if (info.n, info.height) != (manifest.n, manifest.size) or info.fingerprint not in (None, manifest.fingerprint):
        raise DamagedFile(f"{info.path} was written from other images than {data_dir} holds: delete it and pack again")


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.warning(message)


def to_device(
    pixels: UInt8[np.ndarray, "b h w 3"], index: Int64[np.ndarray, " b"], device: torch.device, channels: int
) -> tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]:
    """A copy of a batch on the device, channels first, so that the loader may use its buffers again."""
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    images = to_grey(images) if channels == 1 else images.clone(memory_format=torch.contiguous_format)
    return images, torch.from_numpy(index.copy()).to(device)


def to_grey(images: UInt8[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 1 h w"]:
    """ITU-R 601 luma, rounded: 0.299 R + 0.587 G + 0.114 B in 16-bit fixed point; R = G = B gives that value."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8).unsqueeze(1)


class Handover:
    """A short queue from the one thread that reads to the one that consumes: no wait without a bound."""

    def __init__(self, length: int, stall_s: float = STALL_S):
        self._queue: queue.Queue[Any] = queue.Queue(length)
        self._closed = threading.Event()
        self._stall_s = stall_s

    def put(self, item: Any) -> bool:
        """Reader: wait for room. False means that nobody wants any more."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.5)
                return not self._closed.is_set()
            except queue.Full:
                continue
        return False

    def get(self, reader: threading.Thread) -> Any:
        """Consumer: the next item; an exception that the reader put is raised here. RuntimeError on a stall."""
        deadline = time.monotonic() + self._stall_s
        while True:
            alive = reader.is_alive()  # asked before the queue, so that the last words of a dead reader are heard
            try:
                item = self._queue.get(timeout=0.2)
                break
            except queue.Empty:
                if not alive:
                    raise RuntimeError("the loader's thread ended without a word") from None
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no batch for {self._stall_s:g} s; {_where(reader)}") from None
        if isinstance(item, BaseException):
            raise RuntimeError(f"the loader failed: {item or type(item).__name__}") from item
        return item

    def close(self, reader: threading.Thread) -> None:
        """Consumer: tell the reader to stop and wait for it, a bounded time."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):  # a reader that waits for room wakes at once
            self._queue.get_nowait()
        reader.join(self._stall_s)
        if reader.is_alive():
            log.warning("a loader thread does not end; %s", _where(reader))


def _where(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    place = traceback.extract_stack(frame)[-1] if frame else None
    return f"its thread is at {place.filename}:{place.lineno}" if place else "its thread has no stack"
