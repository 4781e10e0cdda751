"""The journal of an ingest: what became of each candidate so far, so that a stopped one goes on where it was.

It lies in a folder: a record of 80 bytes for each candidate, the reasons of the refused ones as JSON lines, the hash of
the call, and the pages of the file that is being written.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist.data.beton_writer import BetonWriter, page_size_for
from spice_dist.data.decode import MAX_STORED_SIDE, Packed, Packing
from spice_dist.data.decode_pool import Result
from spice_dist.errors import DamagedFile

JOURNAL = ".ingest"  # in the folder of the data set
NOTE_S = 5.0  # what was done in the last seconds before a crash is done again

RECORD = np.dtype(
    [
        ("stored", "u1"),
        ("animated", "u1"),
        ("warned", "u1"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("crc32", "<u4"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("digest", "V32"),
        ("source", "V16"),
        ("pages", "<u2"),
        ("faint", "u1"),
        ("grey_bits", "u1"),
        ("reserved", "V1"),
    ]
)


class Journal:
    """Records of the candidates 0 .. done - 1."""

    def __init__(self, folder: Path, call_hash: str, grey_bits: int):
        """Take up the journal of an equal call that has `grey_bits` or more, or start one with these.

        Raises:
            DamagedFile: its files disagree.
        """
        self.folder = folder
        self._records_file, self._reasons_file = folder / "records", folder / "reasons.jsonl"
        self._records: list[bytes] = []
        self._reasons: list[bytes] = []
        call_file, pages = folder / "call.json", folder / "pages"
        files = (self._records_file, self._reasons_file, pages)
        call = read_call(call_file)
        is_same_call = call["hash"] == call_hash and call["grey_bits"] >= grey_bits
        # the pages alone are missing where a process ended between the file's new name and the manifest
        if not (is_same_call and all(file.exists() for file in files)):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for file in files:
                file.touch()
            call = {"hash": call_hash, "grey_bits": grey_bits}
            call_file.write_text(json.dumps(call))
        self.grey_bits: int = call["grey_bits"]
        self.done = self._records_file.stat().st_size // RECORD.itemsize
        os.truncate(self._records_file, self.done * RECORD.itemsize)
        records, reasons = self.read()
        self._reasons_file.write_bytes(b"".join(json.dumps(entry).encode() + b"\n" for entry in reasons))
        ends = np.where(records["stored"] == 1, records["offset"] + records["size"], 0)
        self.resume_at = int(ends.max()) if ends.any() else 0
        if self.resume_at > pages.stat().st_size or len(reasons) != (records["stored"] == 0).sum():
            raise DamagedFile(f"{folder} is damaged: delete it and run the command again")

    def store(self, packed: Packed, offset: int, size: int) -> None:
        """Note that the next candidate is stored in `size` bytes from `offset` of the pages."""
        record = np.zeros((), RECORD)
        for name in ("height", "width", "crc32", "animated", "warned", "pages", "faint", "grey_bits"):
            record[name] = getattr(packed, name)
        record["stored"], record["offset"], record["size"] = 1, offset, size
        record["digest"] = np.void(bytes.fromhex(packed.digest))
        if packed.source:
            record["source"] = np.void(bytes.fromhex(packed.source))
        self._records.append(record.tobytes())

    def refuse(self, i: int, reason: str) -> None:
        """Note that candidate i, the next one, cannot be stored."""
        self._records.append(bytes(RECORD.itemsize))
        self._reasons.append(json.dumps([i, reason]).encode() + b"\n")

    def flush(self) -> None:
        """Bring all notes to the disk, reasons first: a refusal without its reason would be damage."""
        for path, lines in ((self._reasons_file, self._reasons), (self._records_file, self._records)):
            if lines:
                with open(path, "ab") as file:
                    file.write(b"".join(lines))
                    file.flush()
                    os.fsync(file.fileno())
                lines.clear()

    def read(self) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """Return (a RECORD for each candidate so far, (candidate, reason) of the refused ones)."""
        records = np.fromfile(self._records_file, RECORD)
        reasons = {}
        for line in self._reasons_file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):  # a torn last line belongs to a candidate without a record
                i, reason = json.loads(line)
                reasons[i] = reason
        return records, [(i, reason) for i, reason in sorted(reasons.items()) if i < len(records)]


def packed_of(record: np.void) -> Packed:
    """Return what `Journal.store` noted."""
    return Packed(
        **{name: int(record[name]) for name in ("height", "width", "crc32", "pages", "grey_bits")},
        **{name: bool(record[name]) for name in ("animated", "warned", "faint")},
        digest=record["digest"].tobytes().hex(),
        source=record["source"].tobytes().hex(),
    )


def store(
    results: Iterator[Result],
    packing: Packing,
    writer: BetonWriter,
    journal: Journal,
    is_fixed: bool,
    noted: Callable[[int], None] = lambda done: None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Store the results of the next candidates; return `packing.grey_bits`, or more if an image needs more.

    It ends at such an image, unless the bits are fixed: the images before it were made too bright.

    Args:
        noted: gets the number of candidates whenever all so far are on the disk.
        progress: gets it after every candidate.
    """
    noted_at, done = time.monotonic(), journal.done
    try:
        for done, result in enumerate(results, journal.done + 1):
            if not (isinstance(result, str) or is_fixed) and result[0].grey_bits > packing.grey_bits:
                return result[0].grey_bits
            if isinstance(result, str):
                journal.refuse(done - 1, result)
            elif len(result[1]) > writer.page_size:
                journal.refuse(done - 1, f"{len(result[1]) >> 20} MiB as JPEG, too large to store")
            else:
                packed, data = result
                journal.store(packed, writer.append(data), len(data))
            if time.monotonic() - noted_at > NOTE_S:
                writer.flush()
                journal.flush()
                noted(done)
                noted_at = time.monotonic()
            if progress:
                progress(done)
    finally:  # also after a signal or an error, so that nothing is done twice
        writer.flush()
        journal.flush()
    return packing.grey_bits


def page_size_of(packing: Packing) -> int:
    """Return the size of the pages of a set, in bytes."""
    return page_size_for(packing.size**2 * 3 if packing.format == "raw" else MAX_STORED_SIDE * packing.size)


def read_call(path: Path) -> dict[str, Any]:
    """Read the hash of a call and its `grey_bits`; an empty hash if they cannot be read."""
    try:
        call = json.loads(path.read_text())
        return {"hash": call["hash"], "grey_bits": int(call["grey_bits"])}
    except (OSError, ValueError, TypeError, KeyError):
        return {"hash": "", "grey_bits": 0}
