"""Writing the .beton format of `beton.py` directly: sample by sample, resumable, the same bytes every time.

FFCV's writer hangs on nearly every fault and cannot resume. FFCV reads its files and these alike.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt16, UInt32

from spice_dist.data import beton
from spice_dist.data.files import commit

SAMPLES_PER_PAGE = 32  # at least, so that little of a page is wasted; 2 MiB or more


def page_size_for(num_bytes: int) -> int:
    """Return the smallest power of two that holds SAMPLES_PER_PAGE samples of `num_bytes`, 2 MiB to 1 GiB."""
    return min(max(beton.MIN_PAGE, 1 << (SAMPLES_PER_PAGE * num_bytes - 1).bit_length()), beton.MAX_PAGE)


class BetonWriter:
    """Pages of a new file. Space for the metadata of `capacity` samples is left in front of them."""

    def __init__(self, path: Path, capacity: int, page_size: int, resume_at: int = 0):
        """Go on at byte `resume_at` of what an earlier writer left at `path`, or start anew."""
        self.path, self.page_size = path, page_size
        metadata_end = beton.HEADER.itemsize + 2 * beton.DESCRIPTOR.itemsize + capacity * beton.METADATA.itemsize
        self.position = resume_at or -(-metadata_end // page_size) * page_size
        self._file = open(path, "r+b" if resume_at else "w+b", buffering=1 << 20)  # noqa: SIM115  closed by close()
        self._file.truncate(self.position)
        self._file.seek(self.position)

    def append(self, data: bytes) -> int:
        """Store one sample and return the byte where it starts. A sample never crosses a page."""
        assert 0 < len(data) <= self.page_size
        room = self.page_size - self.position % self.page_size
        if len(data) > room:
            self._file.write(bytes(room))
            self.position += room
        start = self.position
        self._file.write(data)
        self.position += len(data)
        return start

    def flush(self) -> None:
        """Bring all samples so far to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(
        self,
        format: str,
        heights: UInt16[np.ndarray, " n"],
        widths: UInt16[np.ndarray, " n"],
        offsets: Int64[np.ndarray, " n"],
        sizes: Int64[np.ndarray, " n"],
    ) -> None:
        """Write header, metadata and allocations of the samples named here and close the file."""
        n = len(offsets)
        header = np.zeros(1, beton.HEADER)
        descriptors = np.zeros(2, beton.DESCRIPTOR)
        metadata = np.zeros(n, beton.METADATA)
        table = np.zeros(n, beton.ALLOCATION)
        end = -(-self.position // self.page_size) * self.page_size
        header[0] = (beton.VERSION, len(beton.FIELDS), self.page_size, n, end)
        for descriptor, (type_id, name) in zip(descriptors, beton.FIELDS, strict=True):
            descriptor["type_id"], descriptor["name"] = type_id, name
        metadata["mode"] = beton.MODES[format]
        metadata["width"], metadata["height"] = widths, heights
        metadata["data_ptr"], metadata["index"] = offsets, np.arange(n)
        table["sample_id"], table["ptr"], table["size"] = np.arange(n), offsets, sizes
        self._file.truncate(end)
        self._file.seek(end)
        self._file.write(table.tobytes())
        self._file.seek(beton.HEADER.itemsize)
        self._file.write(descriptors.tobytes() + metadata.tobytes())
        self._file.flush()
        self._file.seek(0)
        self._file.write(header.tobytes())  # last: a file without it is not a finished one
        self.close()

    def close(self) -> None:
        self._file.close()


def publish_beton(temporary: Path, path: Path, crc32: UInt32[np.ndarray, " n"], fingerprint: str) -> None:
    """Compare a finished file with the checksums of what went into it, write its sidecar, give it its name.

    Order: old file away, sidecar, new file. Whenever it stops, no file lies beside the sidecar of another one.
    """
    info = beton.verify(temporary, trusted_sidecar=False)
    beton.check_pixels(replace(info, crc32=crc32))
    path.unlink(missing_ok=True)
    beton.write_sidecar(info, crc32, fingerprint, path)
    commit(temporary, path)
