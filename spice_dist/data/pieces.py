"""Pieces of an ingest, which several processes store side by side before one of them makes the data set of them.

A piece is a run of consecutive candidates with a journal and pages of its own. Which candidates it has does not depend
on how many processes there are, so that any number of others goes on where some were stopped. Candidates that a piece
refused are decoded again by the process that reads the pieces: one host may lack a file or a decoder that others have.
"""

import contextlib
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from spice_dist.data.beton_writer import BetonWriter
from spice_dist.data.decode import Packed, Packing
from spice_dist.data.decode_pool import Result, packed_in_order
from spice_dist.data.journal import JOURNAL, RECORD, Journal, packed_of, page_size_of, read_call, store
from spice_dist.data.sources import Source
from spice_dist.errors import DamagedFile

PIECES = ".pieces"  # in that of the data set
LEAST, MOST = 64, 1_024  # candidates of a piece, about so many pieces


class Pieces:
    """The pieces of one call of `ingest`; they need not exist."""

    def __init__(self, out_dir: Path, call_hash: str, total: int):
        self.folder, self.call_hash, self.total = out_dir / PIECES / call_hash[:16], call_hash, total
        size = min(MOST, max(LEAST, -(-total // MOST)))
        self.ranges = [range(start, min(start + size, total)) for start in range(0, total, size)]

    def place(self, number: int) -> Path:
        """Return the folder of a piece."""
        return self.folder / f"{self.ranges[number].start:09d}"

    def records(self, number: int) -> np.ndarray:
        """Return a RECORD for each candidate of a piece that is stored or refused so far."""
        try:
            return np.fromfile(self.place(number) / "records", RECORD)[: len(self.ranges[number])]
        except FileNotFoundError:
            return np.zeros(0, RECORD)

    def grey_bits(self) -> int:
        """Return how many bits the 16-bit greys of all pieces use."""
        numbers = range(len(self.ranges)) if self.folder.exists() else ()
        return max((int(self.records(number)["grey_bits"].max(initial=0)) for number in numbers), default=0)

    def unfinished(self, first: int, grey_bits: int) -> list[int]:
        """Return the numbers of the pieces with candidates from `first` on that are not stored with these bits."""
        numbers = [number for number, images in enumerate(self.ranges) if images.stop > first]
        return [number for number in numbers if not self._is_finished(number, grey_bits)]

    def _is_finished(self, number: int, grey_bits: int) -> bool:
        records = self.records(number)
        return len(records) == len(self.ranges[number]) and self._has(number, records, grey_bits)

    def _has(self, number: int, records: np.ndarray, grey_bits: int) -> bool:
        """Tell whether the records are of images that do not depend on the bits, or were stored with these."""
        return not records["grey_bits"].any() or read_call(self.place(number) / "call.json")["grey_bits"] == grey_bits

    def wait_for(self, numbers: Sequence[int], seconds: float) -> None:
        """Wait until pieces that other hosts have finished are seen here: NFS may show an old listing."""
        deadline = time.monotonic() + seconds
        while any(len(self.records(number)) < len(self.ranges[number]) for number in numbers):
            if time.monotonic() > deadline:
                return  # what is not seen is stored again
            time.sleep(0.5)

    def store(
        self, source: Source, packing: Packing, numbers: Sequence[int], processes: int, is_fixed: bool,
        progress: Callable[[int], None],
    ) -> int:  # fmt: skip
        """Store what is missing of these pieces; return the bits of their 16-bit greys, `packing.grey_bits` or more.

        Args:
            processes: that decode.
            is_fixed: greys that use more bits are stored with `packing.grey_bits` too.
            progress: gets the number of candidates that are done.
        """
        while True:
            bits = self._store(source, packing, numbers, processes, is_fixed, progress)
            if bits == packing.grey_bits:
                return bits
            packing = replace(packing, grey_bits=bits)

    def _store(
        self, source: Source, packing: Packing, numbers: Sequence[int], processes: int, is_fixed: bool,
        progress: Callable[[int], None],
    ) -> int:  # fmt: skip
        """Do as `store`, but end at an image whose greys need more bits."""
        journals = {number: self._journal(number, packing.grey_bits) for number in numbers}
        missing = [i for number, journal in journals.items() for i in self.ranges[number][journal.done :]]
        before = 0
        with closing(packed_in_order(source, packing, processes, missing)) as results:
            for number, journal in journals.items():
                of_piece = islice(results, len(self.ranges[number]) - journal.done)
                writer = BetonWriter(journal.folder / "pages", 0, page_size_of(packing), journal.resume_at)
                with closing(writer):
                    bits = store(of_piece, packing, writer, journal, is_fixed, progress=_after(before, progress))
                if bits > packing.grey_bits:
                    return bits
                before += len(self.ranges[number])
                progress(before)
        return packing.grey_bits

    def _journal(self, number: int, grey_bits: int) -> Journal:
        """Open the journal of a piece: anew if it is not finished, and was begun with other bits."""
        place = self.place(number)
        if self._is_finished(number, grey_bits):
            return Journal(place, self.call_hash, 0)
        if read_call(place / "call.json")["grey_bits"] != grey_bits:
            shutil.rmtree(place, ignore_errors=True)
        return Journal(place, self.call_hash, grey_bits)

    def results(self, source: Source, packing: Packing, processes: int, first: int) -> Generator[Result, None, None]:
        """Yield what `packed_in_order` does for the candidates from `first` on; what a piece has stored is read."""
        if not self.folder.exists():
            yield from packed_in_order(source, packing, processes, range(first, self.total))
            return
        stored, refused = self._stored(packing.grey_bits)
        missing = (first + np.flatnonzero(~stored[first:])).tolist()
        retried = 0
        with closing(packed_in_order(source, packing, processes, missing)) as decoded:
            for number, images in enumerate(self.ranges):
                with _PieceFile(self.place(number), self.records(number)) as piece:
                    for i in range(max(first, images.start), images.stop):
                        result = piece.read(i - images.start) if stored[i] else next(decoded)
                        retried += bool(refused[i]) and not isinstance(result, str)
                        yield result
        if retried:
            warnings.warn(
                f"{retried} images could not be read by another worker, but here: does every node see {source.name}?",
                stacklevel=2,
            )

    def _stored(self, grey_bits: int) -> tuple[Bool[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
        """Tell which candidates pieces have stored with these bits, and which they have refused."""
        stored, refused = np.zeros(self.total, bool), np.zeros(self.total, bool)
        for number, images in enumerate(self.ranges):
            records = self.records(number)
            if self._has(number, records, grey_bits):
                stored[images.start : images.start + len(records)] = records["stored"] == 1
                refused[images.start : images.start + len(records)] = records["stored"] == 0
        return stored, refused

    def drop(self, before: int) -> None:
        """Remove the pieces whose candidates all come before this one: they are in the data set by now."""
        for number, images in enumerate(self.ranges):
            if images.stop > before:
                return
            shutil.rmtree(self.place(number), ignore_errors=True)


def _after(before: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    return lambda done: progress(before + done)


class _PieceFile:
    """The pages of a piece, opened when the first image is read."""

    def __init__(self, folder: Path, records: np.ndarray):
        self.folder, self.records, self._file = folder, records, None

    def __enter__(self) -> "_PieceFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def read(self, place: int) -> tuple[Packed, bytes]:
        """Return what `packed_in_order` gave for this candidate of the piece; DamagedFile if the bytes differ."""
        if self._file is None:
            self._file = open(self.folder / "pages", "rb", buffering=0)  # noqa: SIM115  closed by __exit__
        record = self.records[place]
        data = os.pread(self._file.fileno(), int(record["size"]), int(record["offset"]))
        if zlib.crc32(data) != record["crc32"]:
            raise DamagedFile(f"{self.folder} is damaged: delete it and run the command again")
        return packed_of(record), data


def stored_count(out_dir: Path) -> int:
    """Count the candidates that are stored or refused so far in a folder of an unfinished data set."""
    files = [out_dir / JOURNAL / "records", *(out_dir / PIECES).glob("*/*/records")]
    sizes = []
    for file in files:
        with contextlib.suppress(OSError):
            sizes.append(file.stat().st_size)
    return sum(sizes) // RECORD.itemsize
