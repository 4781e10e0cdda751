"""A .beton of another program as a collection of untrusted images: FFCV never opens it.

Its structure is judged with NumPy. Its samples are read one by one within the bounds of the file and go through the
same bounded decoding as any file from outside, so that a faulty sample costs only itself.
"""

import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spice_dist.data import beton
from spice_dist.data.sources import MAX_CELL_BYTES, BadImage, Source
from spice_dist.errors import DamagedFile

IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
NUMBERS = {0: "<f8", 1: "<i8"}  # FFCV's types of plain numbers, as labels are: skipped, never read
MAX_SAMPLES = 1 << 31


def foreign_source(path: Path) -> Source:
    """Open a file with one image field and plain numbers.

    Raises:
        DamagedFile: its structure is inconsistent, or it has other fields.
    """
    try:
        with open(path, "rb") as file:
            metadata, table = _read_tables(path, file, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:
        raise DamagedFile(f"cannot read {path}: {error}") from error
    order = np.argsort(table["ptr"], kind="stable")
    at = np.searchsorted(table["ptr"][order], metadata["data_ptr"]).clip(max=len(table) - 1)
    allocation = table[order][at]
    sizes = np.where(allocation["ptr"] == metadata["data_ptr"], allocation["size"], 0)

    def read(i: int) -> bytes:
        return _read_sample(path, metadata[i], int(sizes[i]))

    names = [f"{path.name}/{i:07d}" for i in range(len(metadata))]
    return Source(str(path.absolute()), names, read, encoded=True, stamps=lambda i: f"{sizes[i]} {metadata[i]}")


def _read_tables(path: Path, file: BinaryIO, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Read (the image field's metadata of each sample, the allocations); the tables lie within the file."""

    def require(condition: bool | np.bool_, what: str) -> None:
        if not condition:
            raise DamagedFile(f"{path} is not a .beton that can be read ({what})")

    start = file.read(beton.HEADER.itemsize)
    require(len(start) == beton.HEADER.itemsize, f"only {size} bytes")
    header = np.frombuffer(start, beton.HEADER)[0]
    n, fields, table_start = int(header["num_samples"]), int(header["num_fields"]), int(header["alloc_table_ptr"])
    require(header["version"] == beton.VERSION, f"format version {header['version']} instead of {beton.VERSION}")
    require(1 <= fields <= 64 and 1 <= n <= MAX_SAMPLES, f"{fields} fields, {n} samples")
    descriptors = np.frombuffer(file.read(fields * beton.DESCRIPTOR.itemsize), beton.DESCRIPTOR)
    kinds = descriptors["type_id"].tolist()
    require(len(kinds) == fields and kinds.count(2) == 1 and set(kinds) <= {0, 1, 2}, "other fields than one image")
    layout = np.dtype([(f"f{i}", IMAGE if kind == 2 else NUMBERS[kind]) for i, kind in enumerate(kinds)], align=True)
    end = beton.HEADER.itemsize + fields * beton.DESCRIPTOR.itemsize + n * layout.itemsize
    require(end <= table_start < size, f"{n} samples do not fit its {size} bytes")
    metadata = np.frombuffer(file.read(n * layout.itemsize), layout)[f"f{kinds.index(2)}"].copy()
    file.seek(table_start)
    room = (size - table_start) // beton.ALLOCATION.itemsize
    table = np.frombuffer(file.read(room * beton.ALLOCATION.itemsize), beton.ALLOCATION).copy()
    require(len(table) >= 1, "no allocation")
    return metadata, table


def _read_sample(path: Path, metadata: np.void, size: int) -> bytes:
    """Read a sample as an image file: a JPEG as it is, raw pixels as a lossless file."""
    height, width, mode = int(metadata["height"]), int(metadata["width"]), int(metadata["mode"])
    if not 0 < size <= MAX_CELL_BYTES:
        raise BadImage(f"sample of {size} bytes")
    if mode == beton.MODES["raw"] and size != height * width * 3:
        raise BadImage(f"{size} bytes for {width}x{height} raw pixels")
    try:
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), size, int(metadata["data_ptr"]))
    except (OSError, OverflowError) as error:
        raise BadImage(f"cannot read: {error}") from error
    if len(data) != size:
        raise BadImage("lies beyond the end of the file")
    if mode == beton.MODES["raw"]:
        return _as_bmp(np.frombuffer(data, np.uint8).reshape(height, width, 3))
    if mode != beton.MODES["jpg"]:
        raise BadImage(f"unknown mode {mode}")
    if beton.jpeg_size(data) not in (None, (height, width)):
        raise BadImage(f"is not a JPEG of {width}x{height} pixels, as the file says")
    return data


def _as_bmp(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()
