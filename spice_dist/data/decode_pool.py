"""Decoding in child processes, bounded in memory and time and replaced when one dies: a bad image costs only itself."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

from spice_dist.data.decode import Packed, Packing, pack_image, strict_pillow
from spice_dist.data.sources import BadImage, Source

Result = tuple[Packed, bytes] | str
CHUNK = 16  # images of one request
AHEAD = 3  # requests under way for each child
TIMEOUT_S = 60.0  # for an image; the first one's includes importing Pillow
REUSED_BYTES = 64 << 20  # freed memory that a child does not give back
CHILD = (sys.executable, "-m", "spice_dist.data.decode")


def packed_in_order(
    source: Source, packing: Packing, workers: int, which: Sequence[int] | None = None
) -> Generator[Result, None, None]:
    """As `DecodePool.in_order`, in a pool for this source alone."""
    with closing(DecodePool(packing, workers)) as pool:
        yield from pool.in_order(source, which)


class DecodePool:
    """Decodes sources one after another in the same processes, which `close` ends.

    Untrusted files are decoded in `workers` child processes, arrays in as many threads of this one.
    """

    def __init__(self, packing: Packing, workers: int):
        self._packing, self._workers = packing, workers
        self._children = _Children(packing)
        self._threads = ThreadPoolExecutor(workers, "ingest")

    def in_order(self, source: Source, which: Sequence[int] | None = None) -> Generator[Result, None, None]:
        """Yield for each image of `which`, by default all, the bytes to store, or the reason why it cannot be used.

        At most CHUNK * AHEAD * workers images are held at once, whatever their number.
        """
        ahead: deque[Future[list[Result]]] = deque()
        which = range(len(source.paths)) if which is None else which
        try:
            with strict_pillow(self._packing.max_megapixels):
                for start in range(0, len(which), CHUNK):
                    ahead.append(self._threads.submit(self._pack, source, which[start : start + CHUNK]))
                    if len(ahead) >= AHEAD * self._workers:
                        yield from ahead.popleft().result()
                while ahead:
                    yield from ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._children.kill()
        self._threads.shutdown(wait=True)
        self._children.close()

    def _pack(self, source: Source, chunk: Sequence[int]) -> list[Result]:
        return self._children.pack(source, chunk) if source.encoded else _pack_arrays(source, chunk, self._packing)


def _pack_arrays(source: Source, chunk: Sequence[int], packing: Packing) -> list[Result]:
    results: list[Result] = []
    for i in chunk:
        try:
            results.append(pack_image(source.read(i), packing))
        except BadImage as error:
            results.append(str(error))
    return results


class _Children:
    """One child process for each thread that packs images."""

    def __init__(self, packing: Packing):
        self._packing = packing
        self._of_thread = threading.local()
        self._all: list[_Child] = []
        self._closed = False
        self._lock = threading.Lock()

    def pack(self, source: Source, chunk: Sequence[int]) -> list[Result]:
        """Pack a chunk; one that ends its child is packed again image by image, so that only the cause is lost."""
        results: dict[int, Result] = {}
        items: dict[int, Path | bytes] = {}
        for i in chunk:
            if source.file is not None:
                items[i] = source.file(i)
                continue
            try:
                data = source.read(i)
                assert isinstance(data, bytes)
                items[i] = data
            except BadImage as error:
                results[i] = str(error)
        try:
            results |= dict(zip(items, self._ask(list(items.values())), strict=True))
        except ChildEnded:
            for i, item in items.items():
                try:
                    (results[i],) = self._ask([item])
                except ChildEnded as end:
                    results[i] = str(end)
        return [results[i] for i in chunk]

    def _ask(self, items: list[Path | bytes]) -> list[Result]:
        child = getattr(self._of_thread, "child", None)
        if child is None:
            with self._lock:
                if self._closed:
                    raise RuntimeError("ingest has ended")
                child = self._of_thread.child = _Child(self._packing)
                self._all.append(child)
        try:
            return child.ask(items, TIMEOUT_S)
        except ChildEnded:
            self._of_thread.child = None
            with self._lock:
                self._all.remove(child)
            child.close()
            raise

    def kill(self) -> None:
        """Kill all children, so that waiting threads go on at once; connections stay open for these to read from."""
        with self._lock:
            self._closed = True
            for child in self._all:
                child.kill()

    def close(self) -> None:
        """Close all children once the threads have ended."""
        for child in self._all:
            child.close()


class ChildEnded(Exception):
    """A decoding process died or took too long; the text says which."""


class _Child:
    def __init__(self, packing: Packing):
        ours, theirs = socket.socketpair()
        package = str(Path(__file__).parents[2])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # no pool of threads in each
        # the next image uses the memory of the last one: glibc would give it back and fault it in anew each time
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(REUSED_BYTES), "MALLOC_TRIM_THRESHOLD_": str(REUSED_BYTES)}
        command = [*CHILD, str(theirs.fileno()), json.dumps(asdict(packing))]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
            )
        self._connection = Connection(ours.detach())

    def ask(self, items: list[Path | bytes], timeout_s: float) -> list[Result]:
        """Send a request of `decode.serve`; ChildEnded if the child dies or does not answer in `timeout_s` seconds."""
        try:
            paths = [None if isinstance(item, bytes) else os.fspath(item) for item in items]
            self._connection.send_bytes(json.dumps(paths).encode("ascii"))
            for item in items:
                if isinstance(item, bytes):
                    self._connection.send_bytes(item)
            if not self._connection.poll(timeout_s):
                raise ChildEnded(f"decoding took more than {timeout_s:g} s")
            answers = json.loads(self._connection.recv_bytes())
            return [
                answer if isinstance(answer, str) else (Packed(**answer), self._connection.recv_bytes())
                for answer in answers
            ]
        except (EOFError, OSError) as error:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise ChildEnded(f"the decoder {how}") from error

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self.kill()
        self._process.wait()
        self._connection.close()
