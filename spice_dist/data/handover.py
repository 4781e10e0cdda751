"""The hand-over of batches from the thread that reads to the one that consumes, with bounded waits on both sides."""

import contextlib
import logging
import queue
import sys
import threading
import time
import traceback
from typing import Any

STALL_S = 180.0  # longest wait for a batch

log = logging.getLogger("spice_dist.data")


class Handover:
    """A bounded queue between one reader thread and one consumer; no wait is unbounded."""

    def __init__(self, length: int, stall_s: float = STALL_S):
        self._queue: queue.Queue[Any] = queue.Queue(length)
        self._closed = threading.Event()
        self._stall_s, self._stalled = stall_s, False

    def put(self, item: Any) -> bool:
        """Add an item for the consumer once there is room; False if the consumer has closed the queue."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.5)
                return not self._closed.is_set()
            except queue.Full:
                continue
        return False

    def get(self, reader: threading.Thread) -> Any:
        """Return the next item for the consumer.

        Raises:
            RuntimeError: from an exception that the reader put, or no item within the bound.
        """
        deadline = time.monotonic() + self._stall_s
        while True:
            # read before the queue: a reader may put its last item and end between the two
            alive = reader.is_alive()
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
        """Ask the reader to stop and wait for its end within the bound."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):  # a reader that waits for room wakes at once
            self._queue.get_nowait()
        # after a stall the reader has exhausted the bound already
        reader.join(1.0 if self._stalled else self._stall_s)
        if reader.is_alive():
            log.warning("a loader thread does not end; %s", _where(reader))


def _where(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    place = traceback.extract_stack(frame)[-1] if frame else None
    return f"its thread is at {place.filename}:{place.lineno}" if place else "its thread has no stack"
