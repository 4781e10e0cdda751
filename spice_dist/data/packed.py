"""Batches from a .beton: each image is read, checked and decoded once for any number of crops.

One thread prepares batches ahead; it hands the rows of a batch to `threads` others, which decode outside the GIL. They
live as long as the set, since FFCV keeps 10 KiB for every thread that has ever decoded, and never hold the process.
Memory of a worker: BATCHES_AHEAD + 2 batches of crops, a decoded image and its JPEG for each thread, and 24 bytes for
each image of the set.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from spice_dist.data.beton import BetonInfo, Samples, jpeg_size
from spice_dist.data.crops import Crop, Key, boxes, central_squares
from spice_dist.data.handover import Handover
from spice_dist.data.images import to_device
from spice_dist.data.order import check_order, global_batches
from spice_dist.errors import DamagedFile
from spice_dist.transfer import page_locked

BATCHES_AHEAD = 2
# indices of a batch -> the pixels of each crop, (B, size, size, 3) uint8
Prepare = Callable[[np.ndarray], list[np.ndarray]]


@runtime_checkable
class Decoder(Protocol):
    """Turns stored bytes into pixels and cuts boxes out of these; both free the GIL for most of their time."""

    def decode(self, data: bytearray, out: UInt8[np.ndarray, "h w 3"]) -> None: ...

    def resize(self, pixels: UInt8[np.ndarray, "h w 3"], box: Int64[np.ndarray, "4"], out: np.ndarray) -> None: ...


class PackedImages:
    """`Images` of a verified file. One thread reads raw squares of `size` without decoding."""

    def __init__(self, info: BetonInfo, decoder: Decoder, device: torch.device, size: int, channels: int, threads: int):
        self.n, self.size, self.channels = info.n, size, channels
        self.decodes = info.format != "raw" or (int(info.heights[0]), int(info.widths[0])) != (size, size)
        self._samples, self._decoder, self._device = Samples(info), decoder, device
        self._threads = _Threads(threads if self.decodes else 0)

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images.batches`."""
        prepare = self._cutter([(self.size, self._central)]) if self.decodes else self._read
        return _single(self._serve(self._checked(order, batch_size), prepare))

    def crops(
        self, order: np.ndarray, batch_size: int, crops: Sequence[tuple[Crop, Key]]
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """As `Images.crops`."""

        def boxes_of(crop: Crop, key: Key) -> Callable[[np.ndarray], np.ndarray]:
            return lambda index: boxes(crop, key, index, *self._shapes(index))

        prepare = self._cutter([(crop.size, boxes_of(crop, key)) for crop, key in crops])
        return self._serve(self._checked(order, batch_size), prepare)

    def close(self) -> None:
        """As `Images.close`."""
        self._threads.close()
        self._samples.close()

    def _serve(self, batches: list[np.ndarray], prepare: Prepare) -> Iterator[tuple[list[Tensor], Tensor]]:
        handover = Handover(BATCHES_AHEAD)
        reader = threading.Thread(
            target=self._prepare_all, args=(batches, prepare, handover), daemon=True, name="spice_dist reader"
        )
        reader.start()
        try:
            for index in batches:
                crops = handover.get(reader)
                yield [to_device(crop, self._device, self.channels) for crop in crops], torch.from_numpy(index.copy())
        finally:
            handover.close(reader)

    def _prepare_all(self, batches: list[np.ndarray], prepare: Prepare, handover: Handover) -> None:
        try:
            for index in batches:
                crops = [page_locked(torch.from_numpy(crop), self._device) for crop in prepare(index)]
                if not handover.put(crops):
                    return
        except BaseException as error:  # noqa: BLE001  the consumer raises it
            handover.put(error)

    def _read(self, index: np.ndarray) -> list[np.ndarray]:
        return [self._samples.raw(index)]

    def _checked(self, order: np.ndarray, batch_size: int) -> list[np.ndarray]:
        return global_batches(check_order(order, batch_size, self.n), batch_size, drop_last=False)

    def _shapes(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        info = self._samples.info
        return info.heights[index].astype(np.int64), info.widths[index].astype(np.int64)

    def _central(self, index: np.ndarray) -> np.ndarray:
        return central_squares(*self._shapes(index))

    def _cutter(self, cuts: list[tuple[int, Callable[[np.ndarray], np.ndarray]]]) -> Prepare:
        """Return a function that cuts the crops of a batch, a (size, boxes of the indices) for each crop."""

        def cut(index: np.ndarray) -> list[np.ndarray]:
            crops = [np.empty((len(index), size, size, 3), np.uint8) for size, _ in cuts]
            boxes_of_crops = [boxes_of(index) for _, boxes_of in cuts]

            def decode_rows(rows: range) -> None:
                for row in rows:
                    pixels = self._pixels(int(index[row]))
                    for crop, box in zip(crops, boxes_of_crops, strict=True):
                        self._decoder.resize(pixels, box[row], crop[row])

            self._threads.share(decode_rows, len(index))
            return crops

        return cut

    def _pixels(self, i: int) -> UInt8[np.ndarray, "h w 3"]:
        info = self._samples.info
        if info.format == "raw":
            return self._samples.raw(np.array([i]))[0]
        shape = int(info.heights[i]), int(info.widths[i])
        data = self._samples.encoded(i)
        if jpeg_size(data) != shape:  # libjpeg-turbo would fill a part of the buffer and report nothing
            raise DamagedFile(f"{info.path}: image {i} is not a JPEG of {shape[1]}x{shape[0]} pixels: pack again")
        pixels = np.empty((*shape, 3), np.uint8)
        self._decoder.decode(data, pixels)
        return pixels


class _Threads:
    """Daemon threads: one that hangs in a read must not keep the process from ending, as an executor's would."""

    def __init__(self, count: int):
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[[range], None], range] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True, name="decoder") for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def share(self, work: Callable[[range], None], count: int) -> None:
        """Call `work` on a share of range(count) in each thread; raise the error of any."""
        shares = [range(start, count, len(self._threads)) for start in range(len(self._threads))]
        results: list[Future] = [Future() for _ in shares]
        for result, rows in zip(results, shares, strict=True):
            self._tasks.put((result, work, rows))
        for result in results:
            result.result()

    def close(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)

    def _work(self) -> None:
        while task := self._tasks.get():
            result, work, rows = task
            try:
                result.set_result(work(rows))
            except BaseException as error:  # noqa: BLE001  `share` raises it
                result.set_exception(error)


def _single(stream: Iterator[tuple[list[Tensor], Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for (crop,), index in stream:
        yield crop, index
