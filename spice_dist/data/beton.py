"""The dataset file: FFCV's .beton format as this program writes it, judged and read with NumPy alone.

FFCV trusts every number in a file: a bad pointer or size there is silent garbage, a hang or a heap overflow. So nothing
is handed to it before `verify` has found every number consistent. Layout, little-endian:

    header        version u2, num_fields u2, page_size u4, num_samples u8, alloc_table_ptr u8
    descriptors   per field: type u1, name 16 bytes, arguments 1024 bytes; here `image` (type 2) and `index` (type 1)
    metadata      per sample: mode u1 (1 = raw), width u2, height u2, data_ptr u8, 3 bytes of padding, index i8
    pages         from the next multiple of page_size: whole pages; a sample never crosses one
    allocations   per sample: sample_id u8, ptr u8, size u8; the end of the file

Beside it lies PATH.json, the sidecar: sizes, SHA-256 of the file and of its structure (all but the pages), CRC-32 of
each sample's pixels, and a seal over the sidecar itself.
"""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64, UInt8, UInt32

from spice_dist.data.files import publish_json
from spice_dist.errors import DamagedFile

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
METADATA = np.dtype(
    {
        "names": ["mode", "width", "height", "data_ptr", "index"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS = [(2, b"image"), (1, b"index")]
VERSION, RAW = 2, 1
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 32
SIDECAR_VERSION = 1
READ_BYTES = 16 << 20  # pixels held at once while checking


@dataclass(frozen=True)
class BetonInfo:
    """What a verified file holds: n raw RGB images of height x width."""

    path: Path
    n: int
    height: int
    width: int
    page_size: int
    file_size: int
    offsets: Int64[np.ndarray, " n"]  # byte where the pixels of each sample start
    identity: tuple[int, int, int, int]  # device, inode, size, mtime: what was verified
    crc32: UInt32[np.ndarray, " n"] | None = None  # of each sample's pixels; None without the sidecar
    sha256: str | None = None  # of the whole file; None without the sidecar
    fingerprint: str | None = None  # of the images it was written from


def sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def identity_of(file: Path | int) -> tuple[int, int, int, int]:
    """(device, inode, size, mtime in ns) of a path or an open descriptor: differs once it is replaced or written to."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def verify(path: Path, *, trusted_sidecar: bool = True) -> BetonInfo:
    """Judge the structure of the file and its agreement with the sidecar; pixels are left to `check_pixels`.

    Args:
        trusted_sidecar: True asks for a sidecar and compares with it. False judges the structure alone.

    Raises:
        DamagedFile: one line for anything that is wrong; nothing else is ever raised.
    """
    try:
        with open(path, "rb") as file:
            info, structure = _read_structure(path, file, identity_of(file.fileno()))
        return _compare_with_sidecar(info, structure) if trusted_sidecar else info
    except DamagedFile:
        raise
    except FileNotFoundError as error:
        raise DamagedFile(f"{error.filename} is missing: write the data set again") from error
    except Exception as error:  # whatever a hostile file provokes is damage, told in one line
        raise _damage(path, f"{type(error).__name__}: {error}") from error


def _damage(path: Path, what: str) -> DamagedFile:
    return DamagedFile(f"{path} is damaged or was not written by this program ({what}): write the data set again")


# ---------------------------------------------------------------- structure


def _read_structure(path: Path, file: BinaryIO, identity: tuple[int, int, int, int]) -> tuple[BetonInfo, bytes]:
    """The facts, and the SHA-256 of all bytes that are not pages."""
    size = identity[2]

    def require(condition: bool | np.bool_, what: str) -> None:
        if not condition:
            raise _damage(path, what)

    header_bytes = file.read(HEADER.itemsize + 2 * DESCRIPTOR.itemsize)
    metadata_start = HEADER.itemsize + 2 * DESCRIPTOR.itemsize
    require(len(header_bytes) == metadata_start, f"only {size} bytes")
    header = np.frombuffer(header_bytes, HEADER, 1)[0]
    n, page, table_start = int(header["num_samples"]), int(header["page_size"]), int(header["alloc_table_ptr"])
    require(header["version"] == VERSION, f"format version {header['version']} instead of {VERSION}")
    require(header["num_fields"] == len(FIELDS), f"{header['num_fields']} fields instead of {len(FIELDS)}")
    require(MIN_PAGE <= page < MAX_PAGE and page & (page - 1) == 0, f"page size {page}")
    require(table_start != 0, "the writer never finished")

    descriptors = np.frombuffer(header_bytes, DESCRIPTOR, 2, HEADER.itemsize)
    for descriptor, (type_id, name) in zip(descriptors, FIELDS, strict=True):
        require(descriptor["type_id"] == type_id and descriptor["name"] == name, f"no field {name.decode()!r}")
        require(descriptor["arguments"].tobytes() == bytes(1024), f"arguments of field {name.decode()!r}")

    # Python integers: nothing here can overflow. Sizes are known to fit the file before anything is allocated.
    metadata_end = metadata_start + n * METADATA.itemsize
    data_start = -(-metadata_end // page) * page
    require(n >= 1, "no sample")
    require(table_start + n * ALLOCATION.itemsize == size, f"{n} samples do not fit its {size} bytes")
    require(data_start < table_start and (table_start - data_start) % page == 0, "pages are cut short")

    metadata_bytes = file.read(n * METADATA.itemsize)
    file.seek(table_start)
    table_bytes = file.read(n * ALLOCATION.itemsize)
    metadata = np.frombuffer(metadata_bytes, METADATA, n)
    table = np.frombuffer(table_bytes, ALLOCATION, n)

    height, width = int(metadata["height"][0]), int(metadata["width"][0])
    num_bytes = height * width * 3
    require(height > 0 and width > 0, f"images of {width}x{height} pixels")
    require(num_bytes <= page, f"images of {width}x{height} pixels do not fit a page")
    require((metadata["mode"] == RAW).all(), "images that are not raw")
    require((metadata["height"] == height).all() and (metadata["width"] == width).all(), "images of several sizes")
    require((metadata["index"] == np.arange(n)).all(), "the index field is not 0 .. n-1")

    pointers = metadata["data_ptr"]
    require((pointers >= data_start).all() and (pointers <= table_start - num_bytes).all(), "a pointer out of the file")
    offsets = pointers.astype(np.int64)
    require((offsets % page + num_bytes <= page).all(), "an image crosses a page")
    require((np.diff(np.sort(offsets)) >= num_bytes).all(), "images overlap")
    require((table["size"] == num_bytes).all(), "an allocation of another size than its image")
    by_sample = np.argsort(table["sample_id"], kind="stable")
    require((table["sample_id"][by_sample] == np.arange(n)).all(), "allocations do not match the samples")
    require((table["ptr"][by_sample] == pointers).all(), "allocations and pointers disagree")

    structure = hashlib.sha256(header_bytes + metadata_bytes + table_bytes).digest()
    return BetonInfo(path, n, height, width, page, size, offsets, identity), structure


# ---------------------------------------------------------------- sidecar


def write_sidecar(info: BetonInfo, crc32: UInt32[np.ndarray, " n"], fingerprint: str | None, path: Path) -> None:
    """Publish the sidecar of `path` for a verified file that still has the name info.path."""
    with open(info.path, "rb") as file:
        _, structure = _read_structure(info.path, file, info.identity)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    content = {
        "version": SIDECAR_VERSION,
        **{key: getattr(info, key) for key in ("n", "height", "width", "page_size", "file_size")},
        "fingerprint": fingerprint,
        "sha256": sha256,
        "structure_sha256": structure.hex(),
        "crc32": base64.b64encode(crc32.astype("<u4").tobytes()).decode("ascii"),
    }
    publish_json(sidecar_path(path), {**content, "seal": _seal(content)})


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def _compare_with_sidecar(info: BetonInfo, structure: bytes) -> BetonInfo:
    path = sidecar_path(info.path)
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or content.get("version") != SIDECAR_VERSION:
        raise _damage(path, f"not a sidecar of version {SIDECAR_VERSION}")
    if content.pop("seal", None) != _seal(content):
        raise _damage(path, "its seal does not match")
    for key in ("n", "height", "width", "page_size", "file_size"):
        if content[key] != getattr(info, key):
            raise _damage(info.path, f"{key} is {getattr(info, key)}, the sidecar says {content[key]}")
    if content["structure_sha256"] != structure.hex():
        raise _damage(info.path, "its structure is not the one that was written")
    crc32 = np.frombuffer(base64.b64decode(content["crc32"], validate=True), "<u4").astype(np.uint32)
    if len(crc32) != info.n:
        raise _damage(path, f"{len(crc32)} checksums for {info.n} images")
    sealed = {"crc32": crc32, "sha256": content["sha256"], "fingerprint": content["fingerprint"]}
    return BetonInfo(**{**info.__dict__, **sealed})


# ---------------------------------------------------------------- pixels


class RawImages:
    """n images of height x width x 3 bytes at known offsets of a file: `images[index]` reads them.

    Reads with pread rather than a memory map: a file that is cut while in use is an error, not a SIGBUS.
    """

    def __init__(self, path: Path, offsets: Int64[np.ndarray, " n"], height: int, width: int):
        self.path, self.n, self.height, self.width = path, len(offsets), height, width
        self._offsets = offsets
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed by close()
        self.identity = identity_of(self._file.fileno())

    def __getitem__(self, index: np.ndarray | slice) -> UInt8[np.ndarray, "b h w 3"]:
        """Pixels of the samples `index` (a slice or integers in [0, n)); DamagedFile if the file has become shorter."""
        offsets = self._offsets[index].tolist()
        pixels = np.empty((len(offsets), self.height, self.width, 3), np.uint8)
        descriptor, num_bytes = self._file.fileno(), self.height * self.width * 3
        for row, offset in zip(pixels.reshape(len(offsets), num_bytes), offsets, strict=True):
            if os.preadv(descriptor, [row.data], offset) != num_bytes:
                raise _damage(self.path, "it was cut short while in use")
        return pixels

    def close(self) -> None:
        self._file.close()


def read_raw(source: Path | BetonInfo) -> RawImages:
    """A reader of a verified file (verified here if a path is given).

    Raises:
        DamagedFile: as `verify`, or the file was replaced since.
    """
    info = verify(source) if isinstance(source, Path) else source
    try:
        images = RawImages(info.path, info.offsets, info.height, info.width)
    except OSError as error:
        raise DamagedFile(f"cannot read {info.path}: {error.strerror}") from error
    if images.identity != info.identity:
        images.close()
        raise DamagedFile(f"{info.path} was replaced or changed while it was opened: start again")
    return images


def blocks(n: int, num_bytes: int) -> Iterator[slice]:
    """Slices that cover range(n) in order, about READ_BYTES each when one item has `num_bytes`."""
    step = max(1, READ_BYTES // num_bytes)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def checksums(pixels: UInt8[np.ndarray, "b h w 3"]) -> UInt32[np.ndarray, " b"]:
    """CRC-32 of each image's bytes."""
    return np.array([zlib.crc32(image.data) for image in pixels], np.uint32)


def check_pixels(info: BetonInfo, spread: int | None = None) -> None:
    """Compare the pixels with the sidecar's checksums: all, or `spread` images at even distances.

    Raises:
        DamagedFile: naming how many images differ and the first one.
    """
    if info.crc32 is None:
        raise ValueError("no checksums: verify with the sidecar first")
    which = np.arange(info.n) if spread is None or spread >= info.n else np.linspace(0, info.n - 1, spread).astype(int)
    with closing(read_raw(info)) as images:
        for block in blocks(len(which), info.height * info.width * 3):
            wrong = which[block][checksums(images[which[block]]) != info.crc32[which[block]]]
            if wrong.size:
                raise _damage(info.path, f"pixels of image {wrong[0]} and {wrong.size - 1} near it have changed")
