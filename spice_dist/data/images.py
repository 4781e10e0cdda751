"""Batches of images, of raw ones the same bit for bit whichever loader serves them.

with closing(open_images(data_dir, device=device, size=32)) as images:
    for pixels, index in images.batches(order, batch_size):     # (B, C, H, W) uint8, (B,) int64
"""

import contextlib
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from spice_dist.data import beton
from spice_dist.data.crops import Crop, Key
from spice_dist.data.ingest import read_manifest
from spice_dist.errors import DamagedFile, UserError

if TYPE_CHECKING:
    from spice_dist.data.packed import Decoder

LOADERS = ("auto", "ffcv", "torch")
RESIDENT_BYTES = 2 << 30
FULL_CHECK_BYTES = 8 << 30  # larger files: the structure is checked whole, the samples of SPREAD_CHECK images
SPREAD_CHECK = 4_096
STALL_S = 180.0  # longest wait for a batch

log = logging.getLogger("spice_dist.data")


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
        """(images on the device, index on the host) for order[0:b], order[b:2b], ...: the central square of each image.

        The last batch may be partial; nothing is dropped, padded or reordered; `order` may repeat indices and have any
        length. Arguments are judged at once, not at the first batch.

        Raises:
            ValueError: an empty order, one that is not 1-D integers, or a batch size below 1.
            IndexError: an entry outside 0 .. n-1.
            RuntimeError: the loader failed or gave nothing for STALL_S seconds.
        """
        ...

    def crops(
        self, order: np.ndarray, batch_size: int, crops: Sequence[tuple[Crop, Key]]
    ) -> Iterator[tuple[list[Tensor], Int64[Tensor, " b"]]]:
        """([a batch (B, C, size, size) uint8 for each crop], index): every image is read and decoded once for all."""
        ...

    def close(self) -> None:
        """Give back files and memory; `batches` must not be called any more."""
        ...


def open_images(
    data_dir: Path,
    *,
    device: torch.device,
    size: int,
    channels: int = 3,
    loader: str = "auto",
    resident_bytes: int = RESIDENT_BYTES,
    threads: int | None = None,
) -> Images:
    """Open data_dir/dataset.beton after verifying it.

    Args:
        size: side in pixels of what `batches` gives.
        channels: 3, or 1 for luma (ITU-R 601).
        loader: what decodes: "auto" takes FFCV where it is installed; "ffcv" forces it, "torch" does without. Raw
            squares of `size` need no decoder.
        resident_bytes: a set of raw squares of at most this size is read once and kept on the device.
        threads: that decode; default: torch's, which are the share of this worker.

    Raises:
        UserError: unknown loader or channels, no data set, or FFCV asked for and not there.
        DamagedFile: the data set is truncated, altered or not the one of the manifest.
    """
    if loader not in LOADERS:
        raise UserError(f"unknown loader {loader!r}: choose one of {', '.join(LOADERS)}")
    if channels not in (1, 3):
        raise UserError(f"channels is {channels}: choose 3 (colour) or 1 (grey)")
    from spice_dist.data.packed import PackedImages

    info = _verified(data_dir)
    as_they_are = info.format == "raw" and (info.heights[0], info.widths[0]) == (size, size)
    decoder = _decoder("torch" if as_they_are and loader == "auto" else loader)  # importing FFCV takes seconds
    images = PackedImages(info, decoder, device, size, channels, threads or torch.get_num_threads())
    if images.decodes or images.n * size * size * channels > resident_bytes:
        return images
    from spice_dist.data.resident import load_resident

    try:
        return load_resident(images, device)
    finally:
        images.close()


def _verified(data_dir: Path) -> beton.BetonInfo:
    path = data_dir / "dataset.beton"
    if not path.exists():
        raise UserError(f"no data set in {data_dir}: {path.name} is missing; pack the images first")
    info = beton.verify(path)
    if (data_dir / "manifest.json").exists():
        manifest = read_manifest(data_dir)
        if info.n != manifest.n or info.fingerprint != manifest.fingerprint:
            raise DamagedFile(f"{path} was written from other images than {data_dir} holds: delete it and pack again")
    beton.check_pixels(info, spread=None if info.file_size <= FULL_CHECK_BYTES else SPREAD_CHECK)
    return info


@cache
def _decoder(loader: str) -> "Decoder":
    from spice_dist.data.ffcv_decoder import FFCVDecoder, why_no_ffcv
    from spice_dist.data.pillow_decoder import PillowDecoder

    if loader == "torch":
        return PillowDecoder()
    missing = why_no_ffcv()
    if missing is None:
        return FFCVDecoder()
    if loader == "ffcv":
        raise UserError(missing)
    log.warning("%s; Pillow, which is slower, takes its place", missing)
    return PillowDecoder()


def to_device(pixels: UInt8[np.ndarray, "b h w 3"], device: torch.device, channels: int) -> UInt8[Tensor, "b c h w"]:
    """A batch on the device, channels first."""
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    return to_grey(images) if channels == 1 else images.contiguous()


def to_grey(images: UInt8[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 1 h w"]:
    """ITU-R 601 luma, rounded: 0.299 R + 0.587 G + 0.114 B in 16-bit fixed point; R = G = B gives that value."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8).unsqueeze(1)


class Handover:
    """A short queue from the one thread that reads to the one that consumes: no wait without a bound."""

    def __init__(self, length: int, stall_s: float = STALL_S):
        self._queue: queue.Queue[Any] = queue.Queue(length)
        self._closed = threading.Event()
        self._stall_s, self._stalled = stall_s, False

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
                    self._stalled = True
                    raise RuntimeError(f"no batch for {self._stall_s:g} s; {_where(reader)}") from None
        if isinstance(item, BaseException):
            raise RuntimeError(f"the loader failed: {item or type(item).__name__}") from item
        return item

    def close(self, reader: threading.Thread) -> None:
        """Consumer: tell the reader to stop and wait for it, a bounded time."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):  # a reader that waits for room wakes at once
            self._queue.get_nowait()
        reader.join(1.0 if self._stalled else self._stall_s)  # it has had its time already
        if reader.is_alive():
            log.warning("a loader thread does not end; %s", _where(reader))


def _where(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    place = traceback.extract_stack(frame)[-1] if frame else None
    return f"its thread is at {place.filename}:{place.lineno}" if place else "its thread has no stack"
