"""Children that decode: each bounded in memory and time, replaced when one dies, so that an image costs only itself."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

from spice_dist.data.decode import Packed, Packing, pack_image, strict_pillow
from spice_dist.data.sources import BadImage, Source

Result = tuple[Packed, bytes] | str
CHUNK = 16  # images of one request
AHEAD = 3  # requests under way for each child
TIMEOUT_S = 60.0  # for an image; importing Pillow on a busy node takes some of the first one's
KEPT_BYTES = 64 << 20  # of freed memory that a child keeps
CHILD = (sys.executable, "-m", "spice_dist.data.decode")


def packed_in_order(
    source: Source, packing: Packing, workers: int, first: int = 0, timeout_s: float = TIMEOUT_S
) -> Iterator[Result]:
    """For each image from `first` on, in order, what is stored of it, or the reason why it cannot be.

    Untrusted files are decoded in `workers` child processes, arrays in as many threads of this one. At most
    CHUNK * AHEAD * workers images are held at once, whatever their number.
    """
    children = _Children(packing, timeout_s)
    work = (
        (lambda chunk: children.pack(source, chunk))
        if source.encoded
        else (lambda chunk: _here(source, chunk, packing))
    )
    ahead: deque[Future[list[Result]]] = deque()
    pool = ThreadPoolExecutor(workers, "ingest")
    try:
        with strict_pillow():
            for start in range(first, len(source.paths), CHUNK):
                ahead.append(pool.submit(work, range(start, min(start + CHUNK, len(source.paths)))))
                if len(ahead) >= AHEAD * workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        children.kill()
        pool.shutdown(wait=True)
        children.close()


def _here(source: Source, chunk: range, packing: Packing) -> list[Result]:
    return [_read(source, i, lambda data: pack_image(data, packing)) for i in chunk]


def _read(source: Source, i: int, use: Callable[..., Result]) -> Result:
    try:
        return use(source.read(i))
    except BadImage as error:
        return str(error)


class _Children:
    """One child per thread that asks for it."""

    def __init__(self, packing: Packing, timeout_s: float):
        self._packing, self._timeout_s = packing, timeout_s
        self._own = threading.local()
        self._all: list[_Child] = []
        self._closed = False
        self._lock = threading.Lock()

    def pack(self, source: Source, chunk: range) -> list[Result]:
        """A chunk that ends its child is done again image by image: the one to blame is found, and only it is lost."""
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
        child = getattr(self._own, "child", None)
        if child is None:
            with self._lock:
                if self._closed:
                    raise RuntimeError("ingest has ended")
                child = self._own.child = _Child(self._packing)
                self._all.append(child)
        try:
            return child.ask(items, self._timeout_s)
        except ChildEnded:
            self._own.child = None
            with self._lock:
                self._all.remove(child)
            child.close()
            raise

    def kill(self) -> None:
        """Threads that wait for a child go on at once; they alone close what they may still read from."""
        with self._lock:
            self._closed = True
            for child in self._all:
                child.kill()

    def close(self) -> None:
        """Once the threads have ended."""
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
        # an image's memory is used again for the next one: glibc would give it back and fault it in anew each time
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(KEPT_BYTES), "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES)}
        command = [*CHILD, str(theirs.fileno()), json.dumps(asdict(packing))]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, env=environment,
            )  # fmt: skip
        self._connection = Connection(ours.detach())

    def ask(self, items: list[Path | bytes], timeout_s: float) -> list[Result]:
        """See `decode.serve`. ChildEnded if it dies, or is silent for `timeout_s` seconds."""
        try:
            paths = [None if isinstance(item, bytes) else os.fspath(item) for item in items]
            self._connection.send_bytes(json.dumps(paths).encode("ascii"))
            for item in items:
                if isinstance(item, bytes):
                    self._connection.send_bytes(item)
            if not self._connection.poll(timeout_s):
                raise ChildEnded(f"decoding took more than {timeout_s:g} s")
            about = json.loads(self._connection.recv_bytes())
            return [
                entry if isinstance(entry, str) else (Packed(**entry), self._connection.recv_bytes()) for entry in about
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
