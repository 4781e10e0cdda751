"""The dataset file: FFCV's .beton format as this program writes it, judged and read with NumPy alone.

FFCV trusts every number in a file: a bad pointer or size there is silent garbage, a hang or a heap overflow. So it
gets no file before `verify` has judged every number consistent. Layout, little-endian:

    header        version u2, num_fields u2, page_size u4, num_samples u8, alloc_table_ptr u8
    descriptors   per field: type u1, name 16 bytes, arguments 1024 bytes; here `image` (type 2) and `index` (type 1)
    metadata      per sample: mode u1 (0 JPEG, 1 raw), width u2, height u2, data_ptr u8, 3 bytes of padding, index i8
    pages         from a multiple of page_size behind the metadata: whole pages; a sample never crosses one
    allocations   per sample: sample_id u8, ptr u8, size u8; the end of the file

Beside it lies PATH.json, the sidecar: sizes, SHA-256 of the file and of its structure (all but the pages), CRC-32 of
each sample's bytes, and two seals over the sidecar itself: a checksum, and one by this user's key (seal.py). A file is
of one format: "raw", squares of one size, or "jpg".
"""

import base64
import hashlib
import json
import os
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64, UInt8, UInt16, UInt32

from spice_dist.data import seal
from spice_dist.data.files import publish_json, read_regular
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
VERSION = 2
MODES = {"jpg": 0, "raw": 1}
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 30
MAX_STORED_SIDE = 4_096  # pixels, longest side of a stored image: a longer one is a strip of little use
SIDECAR_VERSION = 2
KEYED = "keyed_seal"  # absent from files of earlier versions
SEALED = ("n", "format", "page_size", "file_size")


@dataclass(frozen=True)
class BetonInfo:
    """What a verified file holds. 20 bytes of memory for each image, 24 with the checksums."""

    path: Path
    n: int
    format: str  # "raw" or "jpg"
    heights: UInt16[np.ndarray, " n"]
    widths: UInt16[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " n"]  # byte where each sample starts
    sizes: Int64[np.ndarray, " n"]  # bytes of each sample
    page_size: int
    file_size: int
    identity: tuple[int, int, int, int]  # device, inode, size, mtime: what was verified
    crc32: UInt32[np.ndarray, " n"] | None = None  # of each sample's bytes; None without the sidecar
    sha256: str | None = None  # of the whole file; None without the sidecar
    fingerprint: str | None = None  # of the images it was written from


def sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def identity_of(file: Path | int) -> tuple[int, int, int, int]:
    """Return (device, inode, size, mtime in ns) of a path or a descriptor: it differs once the file has changed."""
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
    except Exception as error:  # any error that a hostile file provokes means damage
        raise _damage(path, f"{type(error).__name__}: {error}") from error


def _damage(path: Path, what: str) -> DamagedFile:
    return DamagedFile(f"{path} is damaged or was not written by this program ({what}): write the data set again")


# ---------------------------------------------------------------- structure


def _read_structure(path: Path, file: BinaryIO, identity: tuple[int, int, int, int]) -> tuple[BetonInfo, bytes]:
    """Return the judged content, and the SHA-256 of all bytes that are not pages."""
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
    require(MIN_PAGE <= page <= MAX_PAGE and page & (page - 1) == 0, f"page size {page}")
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

    mode = int(metadata["mode"][0])
    require(mode in MODES.values() and (metadata["mode"] == mode).all(), "images of an unknown or of several modes")
    heights, widths = metadata["height"].astype(np.uint16), metadata["width"].astype(np.uint16)
    require((heights > 0).all() and (widths > 0).all(), "images without a pixel")
    require(max(heights.max(), widths.max()) <= MAX_STORED_SIDE, f"images of more than {MAX_STORED_SIDE} pixels a side")
    require((metadata["index"] == np.arange(n)).all(), "the index field is not 0 .. n-1")

    by_sample = np.argsort(table["sample_id"], kind="stable")
    require((table["sample_id"][by_sample] == np.arange(n)).all(), "allocations do not match the samples")
    pointers, allocated = metadata["data_ptr"], table["size"][by_sample]
    require((table["ptr"][by_sample] == pointers).all(), "allocations and pointers disagree")
    require((pointers >= data_start).all() and (pointers < table_start).all(), "a pointer out of the file")
    require((allocated > 0).all() and (allocated <= page).all(), "an image does not fit a page")
    offsets, sizes = pointers.astype(np.int64), allocated.astype(np.int64)
    require((offsets % page + sizes <= page).all(), "an image crosses a page")
    in_file = np.argsort(offsets, kind="stable")
    require((offsets[in_file][1:] >= (offsets + sizes)[in_file][:-1]).all(), "images overlap")
    if mode == MODES["raw"]:
        require((heights == heights[0]).all() and (widths == widths[0]).all(), "raw images of several sizes")
        require((sizes == int(heights[0]) * int(widths[0]) * 3).all(), "an allocation of another size than its image")

    structure = hashlib.sha256(header_bytes + metadata_bytes + table_bytes).digest()
    format = next(name for name, value in MODES.items() if value == mode)
    return BetonInfo(path, n, format, heights, widths, offsets, sizes, page, size, identity), structure


# ---------------------------------------------------------------- sidecar


def write_sidecar(info: BetonInfo, crc32: UInt32[np.ndarray, " n"], fingerprint: str | None, path: Path) -> None:
    """Publish the sidecar of `path` for a verified file that still has the name info.path."""
    with open(info.path, "rb") as file:
        _, structure = _read_structure(info.path, file, info.identity)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    content = {
        "version": SIDECAR_VERSION,
        **{key: getattr(info, key) for key in SEALED},
        "fingerprint": fingerprint,
        "sha256": sha256,
        "structure_sha256": structure.hex(),
        "crc32": base64.b64encode(crc32.astype("<u4").tobytes()).decode("ascii"),
    }
    publish_json(sidecar_path(path), {**content, "seal": _seal(content), KEYED: seal.seal(_canonical(content))})


def seal_anew(path: Path) -> None:
    """Seal the sidecar of a file by this user's key on this host; the worker that wrote it may have another one."""
    content = _sidecar(path)
    checksum, _ = content.pop("seal"), content.pop(KEYED)
    publish_json(sidecar_path(path), {**content, "seal": checksum, KEYED: seal.seal(_canonical(content))})


def is_ours(path: Path) -> bool:
    """Return whether this user's key sealed the sidecar; a file and a sidecar that strangers made agree as well."""
    try:
        content = _sidecar(path)
        del content["seal"]
        keyed = content.pop(KEYED)
        return seal.is_sealed(_canonical(content), keyed)
    except (OSError, ValueError, KeyError, RecursionError, DamagedFile):
        return False


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode("ascii")


def _sidecar(path: Path) -> dict[str, Any]:
    """Read the sidecar of a file, of no more bytes than the sidecar of a file of that size can have."""
    sidecar = sidecar_path(path)
    if sidecar.stat().st_size > 4096 + path.stat().st_size:
        raise _damage(sidecar, "larger than its file")
    content = json.loads(read_regular(sidecar))
    if not isinstance(content, dict) or content.get("version") != SIDECAR_VERSION:
        raise _damage(sidecar, f"not a sidecar of version {SIDECAR_VERSION}")
    return content


def _compare_with_sidecar(info: BetonInfo, structure: bytes) -> BetonInfo:
    path, content = sidecar_path(info.path), _sidecar(info.path)
    content.pop(KEYED, None)
    if content.pop("seal", None) != _seal(content):
        raise _damage(path, "its seal does not match")
    for key in SEALED:
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


class Samples:
    """The stored bytes of each sample of a verified file.

    Reads with pread rather than a memory map: a file that is cut while in use is an error, not a SIGBUS.
    """

    def __init__(self, info: BetonInfo):
        """Open the file; DamagedFile if it was replaced or changed since it was verified."""
        self.info = info
        try:
            self._file = open(info.path, "rb", buffering=0)  # noqa: SIM115  closed by close()
        except OSError as error:
            raise DamagedFile(f"cannot read {info.path}: {error.strerror}") from error
        if identity_of(self._file.fileno()) != info.identity:
            self.close()
            raise DamagedFile(f"{info.path} was replaced or changed while it was opened: start again")

    def read_into(self, i: int, out: memoryview) -> None:
        """Read sample i into `out`, of exactly its size; DamagedFile if the file was cut. Frees the GIL."""
        if os.preadv(self._file.fileno(), [out], int(self.info.offsets[i])) != len(out):
            raise _damage(self.info.path, "it was cut short while in use")

    def encoded(self, i: int) -> bytearray:
        """Read sample i; DamagedFile if a known checksum differs, so that no decoder gets damaged bytes."""
        data = bytearray(int(self.info.sizes[i]))
        self.read_into(i, memoryview(data))
        if self.info.crc32 is not None and zlib.crc32(data) != self.info.crc32[i]:
            raise _damage(self.info.path, f"image {i} has changed")
        return data

    def raw(self, index: np.ndarray) -> UInt8[np.ndarray, "b h w 3"]:
        """Read the pixels of the raw samples `index`."""
        shape = (int(self.info.heights[0]), int(self.info.widths[0]), 3)
        pixels = np.empty((len(index), *shape), np.uint8)
        rows = pixels.reshape(len(index), -1)
        descriptor, num_bytes = self._file.fileno(), rows.shape[1]
        for row, offset in zip(rows, self.info.offsets[index].tolist(), strict=True):
            if os.preadv(descriptor, [row.data], offset) != num_bytes:
                raise _damage(self.info.path, "it was cut short while in use")
        return pixels

    def close(self) -> None:
        self._file.close()


def check_pixels(info: BetonInfo, spread: int | None = None) -> None:
    """Compare the samples with the sidecar's checksums: all, or `spread` of them at even distances.

    Raises:
        DamagedFile: naming the first one that differs.
    """
    if info.crc32 is None:
        raise ValueError("no checksums: verify with the sidecar first")
    which = np.arange(info.n) if spread is None or spread >= info.n else np.linspace(0, info.n - 1, spread).astype(int)
    with closing(Samples(info)) as samples:
        for i in which.tolist():
            samples.encoded(i)


def jpeg_size(data: bytes | bytearray) -> tuple[int, int] | None:
    """Return (height, width) of a whole JPEG of one frame, 1 or 3 components and 8 bits; None for others."""
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    position, size = 2, None
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended and progressive frames
            frame = data[position + 4 : position + 10]
            if size is not None or len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3):
                return None
            size = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
        elif 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # lossless, hierarchical and arithmetic frames
        elif marker == 0xDA:
            return size
        position += 2 + length
    return None
