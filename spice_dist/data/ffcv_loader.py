"""FFCV's loader made safe: a verified file, an explicit order, errors that arrive, waits that end.

Stock FFCV 1.0.2 hangs its consumer when its thread fails, leaks a thread per early break, does not check indices, takes
no order of one's own, and sets torch's number of threads. One Loader is built per process, because compiling it takes
seconds, and is pointed at whichever file is read; each pass over an order gets a thread of its own, joined at its end.
"""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spice_dist.data.beton import BetonInfo, identity_of
from spice_dist.data.images import Handover, to_device
from spice_dist.data.order import check_order
from spice_dist.errors import DamagedFile

BATCHES_AHEAD = 3
_lock = threading.Lock()  # the shared Loader is pointed at one file at a time
_shared: dict[str, Any] = {}  # "loader": the one ffcv.Loader; "iterator": the class of its passes


def why_no_ffcv() -> str | None:
    """None where FFCV can be imported, else one line that says what to install."""
    try:
        _import_ffcv()
    except Exception as error:  # a missing system library is an OSError, an incompatible numba nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"FFCV cannot be imported ({reason}): pip install 'spice_dist[ffcv]' (it needs OpenCV and libjpeg-turbo)"
    return None


class FFCVImages:
    """`Images` over a .beton that `beton.verify` has judged. Raw pixels are copied by one thread without the GIL."""

    def __init__(self, info: BetonInfo, device: torch.device, channels: int):
        self.n, self.height, self.width, self.channels = info.n, info.height, info.width, channels
        self._device = device
        self._reader, self._memory = _open_in_ffcv(info)

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images.batches`."""
        if self._reader is None:
            raise ValueError("these images are closed")
        return self._serve(check_order(order, batch_size, self.n), batch_size)

    def _serve(self, order: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        reading = _start_pass(self._reader, self._memory, order, min(batch_size, len(order)))
        try:
            for start in range(0, len(order), batch_size):
                pixels, stored = reading.handover.get(reading)
                index = order[start : start + batch_size]
                if not np.array_equal(stored[:, 0], index):
                    raise RuntimeError("FFCV returned other images than asked for")
                yield to_device(pixels, index, self._device, self.channels)
        finally:
            reading.close()

    def close(self) -> None:
        """As `Images.close`."""
        self._reader = self._memory = None


def _import_ffcv() -> Any:
    """The package; importing it sets torch to one thread, which is undone."""
    threads = torch.get_num_threads()
    try:
        import ffcv
        import ffcv.loader.epoch_iterator

        # pipelines end in NumPy arrays: without this each pass would open a CUDA context and streams for nothing
        ffcv.loader.epoch_iterator.IS_CUDA = False
        return ffcv
    finally:
        torch.set_num_threads(threads)


def _open_in_ffcv(info: BetonInfo) -> tuple[Any, Any]:
    """FFCV's reader and memory map of exactly the file that was verified; later replacements do not touch them."""
    _import_ffcv()
    from ffcv.reader import Reader

    reader = Reader(str(info.path))
    memory = _mapped_file_class()(reader)
    memory.context.__enter__()  # maps the file
    if identity_of(info.path) != info.identity:
        raise DamagedFile(f"{info.path} was replaced or changed while it was opened: start again")
    return reader, memory


def _mapped_file_class() -> type:
    from ffcv.memory_managers import OSCacheManager
    from ffcv.memory_managers.os_cache import OSCacheContext

    class MappedFile(OSCacheManager):
        """The address table alone: the stock one builds dictionaries over all samples that nothing here reads."""

        def __init__(self, reader: Any):
            table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"], kind="stable")]
            self.reader, self.ptrs, self.sizes = reader, table["ptr"].copy(), table["size"].copy()
            self.context = OSCacheContext(self)

    return MappedFile


def _start_pass(reader: Any, memory: Any, order: np.ndarray, batch_size: int) -> Any:
    threads = torch.get_num_threads()
    with _lock:
        try:
            if not _shared:
                _shared.update(loader=_compile_loader(str(reader.file_name)), iterator=_make_iterator_class())
            loader = _shared["loader"]
            # A pass takes all it needs from the Loader while it is built. The compiled code gets pixels and sizes as
            # arguments, so it serves every file of these two fields.
            loader.reader, loader.memory_manager, loader.batch_size = reader, memory, batch_size
            loader.graph.metadata = reader.metadata
            return _shared["iterator"](loader, order)
        finally:
            torch.set_num_threads(threads)


def _compile_loader(path: str) -> Any:
    import ffcv.loader.loader
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    ffcv.loader.loader.OSCacheManager = _mapped_file_class()
    # One thread: copying raw pixels is bound by memory, and it keeps numba's threading layers, of which some abort when
    # two loaders run at once, out of the process.
    return Loader(
        path,
        batch_size=1,
        num_workers=1,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        seed=0,
        drop_last=False,
        batches_ahead=BATCHES_AHEAD,
        pipelines={"image": [SimpleRGBImageDecoder()], "index": [IntDecoder()]},
    )


def _make_iterator_class() -> type:
    from ffcv.loader.epoch_iterator import EpochIterator

    class Pass(EpochIterator):
        """One pass over an order: FFCV's buffers and compiled code under a loop that cannot hang its consumer."""

        def __init__(self, loader: Any, order: Any):
            self.handover = Handover(BATCHES_AHEAD)
            super().__init__(loader, order)  # allocates BATCHES_AHEAD + 2 buffers and starts the thread

        def run(self) -> None:
            try:
                for number, index in enumerate(self.iter_ixes):
                    # a buffer is used again after BATCHES_AHEAD waiting batches and the one the consumer copies from
                    slot = number % (BATCHES_AHEAD + 2)
                    if not self.handover.put(self.run_pipeline(number, index, slot, None)):
                        return
            except BaseException as error:  # noqa: BLE001  the consumer raises it; this thread has nobody to tell
                self.handover.put(error)

        def close(self) -> None:
            if "handover" in self.__dict__ and self.ident is not None:
                self.handover.close(self)

    return Pass
