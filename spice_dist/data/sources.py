"""What to cluster: a list of images, named and not yet decoded.

Kinds here: `digits` (scikit-learn's 1,797 real 8x8 images), a folder of images (flat or nested), an `.npy` or `.npz`
array. Lists are in lists.py, published data sets in named_sets.py, remote folders in remote.py; dataset.py tells them
apart.
"""

import contextlib
import errno
import hashlib
import os
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist.data.folders import SYMLINK, is_image_name, scan
from spice_dist.data.left_out import why_no_image
from spice_dist.errors import UserError

MAX_FILE_BYTES = 256 << 20  # 50 million uncompressed pixels fit; a video or an archive renamed to .jpg does not
MAX_CELL_BYTES = 64 << 20  # of an image in a table or from elsewhere, of which many are in memory at once
KINDS = (
    "'digits', a folder of images, a list (.txt, .csv, .parquet), an .npy or .npz array, NAME:DIR, a URL or a .beton"
)
LINK_HINT = "give the file that it points to, or --follow-links"
PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev"})
MISSING = frozenset({"", "-1", "-1.0", "none", "null", "nan", "n/a", "<na>"})  # labels that are no class
UNLABELLED = -1  # the number of an image without a class
Listed = tuple[int, str]
"""Size in bytes and stamp of a remote file."""
UNREAD = bytes(16)  # in place of the `file_digest` of a file that cannot be read


class BadImage(Exception):
    """One image that cannot be used; the text is the reason. It is quarantined, the run goes on."""


@dataclass(frozen=True)
class Source:
    """N named images. Names are relative, so a folder can be moved; labels are for scores only."""

    name: str  # "digits", or the absolute path
    paths: list[str]  # N names; bytes that are no UTF-8 are escaped by surrogates
    read: Callable[[int], np.ndarray | bytes]  # (H, W), (H, W, 1) or (H, W, 3) uint8, or an encoded file; or BadImage
    labels: np.ndarray | None = None  # (N,) int64, an index into label_names
    label_names: list[str] = field(default_factory=list)  # in the order of their number
    # what is no candidate: suffix, SYMLINK, SPECIAL, SYSTEM or HIDDEN -> count
    ignored: dict[str, int] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)  # (path, reason): folders that cannot be entered
    encoded: bool = False  # read(i) gives an untrusted encoded file, which child processes decode
    file: Callable[[int], Path] | None = None  # of local files: where image i is, so that children read it themselves
    # of other sources: a text that changes when image i does, where that is cheaper than reading it
    stamps: Callable[[int], str] | None = None
    listed: Callable[[int], Listed] | None = None  # of remote files: what other processes read image i by
    extra: int = 0  # images after the clustered ones that only train stages 1 and 3
    held_out: int = 0  # images after those that train nothing and are scored
    fit: str = ""  # of a packed file, with which it was packed (see `decode`); "": not packed yet

    @property
    def clustered(self) -> int:
        """Return how many images, from the first on, the heads are trained on."""
        return len(self.paths) - self.extra - self.held_out

    @property
    def training(self) -> int:
        """Return how many images, from the first on, stages 1 and 3 see."""
        return len(self.paths) - self.held_out


def open_source(data: str, labels: str | None = None, follow_links: bool = False) -> Source:
    """Find the images of `data` without decoding them.

    Args:
        data: one of KINDS.
        labels: where true labels come from, for scores only: None, "folder" (the top-level sub-folder) or "array"
            (`labels` or `y` of an .npz). The digits come with labels.
        follow_links: take links too that point to files within the folder.

    Raises:
        UserError: one line that says what to give instead.
    """
    if labels not in (None, "folder", "array"):
        raise UserError(f"labels {labels!r} do not belong to {data!r}: give 'folder' (sub-folder names) or 'array'")
    if data == "digits":
        if os.path.isdir(data):
            warnings.warn(
                "'digits' is the built-in set of images; for the folder of this name give ./digits", stacklevel=2
            )
        return _digits()
    path = Path(data)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise UserError(_why_missing(data, error)) from error
    if stat.S_ISDIR(mode):
        if labels == "array":
            raise UserError("labels 'array' belong to an .npz file; for a folder give 'folder' or none")
        return _folder(path, with_labels=labels == "folder", follow_links=follow_links)
    if stat.S_ISREG(mode) and path.suffix.lower() in (".npy", ".npz"):
        if labels == "folder":
            raise UserError("labels 'folder' belong to a folder; for an .npz give 'array' or none")
        return _array(path, with_labels=labels == "array")
    hint = "; for a single image give the folder it is in" if is_image_name(path.name) else ""
    raise UserError(f"{data!r} is not a kind of data that can be read: give {KINDS}{hint}")


def is_beton(data: str) -> bool:
    return data.endswith(".beton") and Path(data).is_file()


def listing(source: Source) -> str:
    """Hash the images by name and content: of local files size and time of change, of arrays the pixels.

    The SHA-256 does not depend on where the files lie. `content_of` tells copies with other times from other images.
    """
    total = hashlib.sha256(f"{source.extra} {source.held_out}".encode())
    for i, name in enumerate(source.paths):
        total.update(os.fsencode(name) + b"\0")
        if source.file is not None:
            with contextlib.suppress(OSError, ValueError):  # ingest will report a listed file that is missing
                status = os.stat(source.file(i))
                total.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        elif source.stamps is not None:
            total.update(source.stamps(i).encode())
        elif not source.encoded:
            total.update(np.ascontiguousarray(source.read(i)).data)
    return total.hexdigest()


def content_of(source: Source) -> str:
    """Hash the names of encoded images and the bytes of their files, all of which are read; "" for arrays."""
    if not source.encoded:
        return ""

    count, chunk = len(source.paths), 256
    chunks = (range(start, min(start + chunk, count)) for start in range(0, count, chunk))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "hash") as threads:
        digests = threads.map(lambda images: [digest_of_image(source, i) for i in images], chunks)
        return hash_of_contents(source.paths, chain.from_iterable(digests))


def digest_of_image(source: Source, i: int) -> bytes:
    """Return the `file_digest` of encoded image i, UNREAD if it cannot be read."""
    try:
        return file_digest(bytes(source.read(i)))
    except BadImage:
        return UNREAD


def file_digest(data: bytes) -> bytes:
    """Return the first half of the SHA-256 of a file, by which it is known again wherever it is copied."""
    return hashlib.sha256(data).digest()[:16]


def hash_of_contents(names: Sequence[str], digests: Iterable[bytes]) -> str:
    """Hash the name and the `file_digest` of each image, UNREAD for one that cannot be read."""
    total = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        total.update(os.fsencode(name) + b"\0" + digest)
    return total.hexdigest()


def _why_missing(data: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"there is no {data!r}: check the path, or give {KINDS}"
    return f"cannot read {data!r}: {getattr(error, 'strerror', None) or error}"


def _digits() -> Source:
    from sklearn.datasets import load_digits

    images, target = map(np.asarray, load_digits(return_X_y=True))
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # stored as 0..16
    names = [f"digits/{i:04d}" for i in range(len(pixels))]
    return Source("digits", names, pixels.__getitem__, target.astype(np.int64), [str(c) for c in range(10)])


def from_files(files: Sequence[Any]) -> Source:
    """Take images by their paths, in the order given."""
    if not len(files):
        raise UserError("the list of images is empty: give at least one path")
    if others := {type(file).__name__ for file in files if not isinstance(file, str | os.PathLike)}:
        raise UserError(f"the list of images holds {', '.join(sorted(others))}: give paths, or uint8 arrays, alone")
    return files_source("a list of files", [os.fspath(file) for file in files], Path())


def from_arrays(images: Sequence[Any]) -> Source:
    """Take images of any sizes, each (H, W), (H, W, 1) or (H, W, 3) uint8, named by their number."""
    for i, image in enumerate(images):
        is_array = isinstance(image, np.ndarray)
        if not is_array or image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in ((), (1,), (3,)):
            got = f"{image.dtype} {image.shape}" if is_array else type(image).__name__
            raise UserError(f"image {i} of the list is {got}: give uint8 of shape (H, W), (H, W, 1) or (H, W, 3)")
    return Source("a list of arrays", [f"{i:07d}" for i in range(len(images))], images.__getitem__)


def from_array(images: np.ndarray) -> Source:
    """Take (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8 images, named by their number."""
    _check_images(Path("the array"), images)
    return Source("an array", [f"{i:07d}" for i in range(len(images))], images.__getitem__)


# ---------------------------------------------------------------- folders


def _folder(root: Path, *, with_labels: bool, follow_links: bool) -> Source:
    paths, ignored, refused = scan(root, follow_links)
    if not paths:
        raise UserError(why_no_image(root, ignored, len(refused)))
    labels, label_names = folder_labels(root, paths) if with_labels else (None, [])
    name = os.fsencode(root.absolute()).decode("utf-8", "backslashreplace")

    return replace(
        files_source(name, paths, root, root if follow_links else None),
        labels=labels,
        label_names=label_names,
        ignored=ignored,
        refused=refused,
    )


def files_source(
    name: str, paths: list[str], folder: Path, tree: Path | None = None, places: list[str] | None = None
) -> Source:
    """Take images in local files: image i is at folder / paths[i].

    Args:
        tree: a folder; links are followed to files within it. None: links are not followed.
        places: where the images are below the folder, if not at their paths.
    """
    files = _Files(
        folder.absolute(), paths if places is None else places, None if tree is None else os.path.realpath(tree)
    )
    return Source(name, paths, files.read, encoded=True, file=files.place)


@dataclass(frozen=True)
class _Files:
    """Local files; unlike functions within functions, its methods can be sent to any process."""

    folder: Path
    names: list[str]
    tree: str | None  # within which links are followed

    def place(self, i: int) -> Path:
        """Return the path of image i, or where it points to, if that is within the tree."""
        path = self.folder / self.names[i]
        if self.tree is None or not os.path.islink(path):
            return path
        target = os.path.realpath(path)
        return Path(target) if target.startswith(self.tree + os.sep) else path

    def read(self, i: int) -> bytes:
        return read_file(self.place(i))


def folder_labels(root: Path | str, paths: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return (the number of each image's top-level sub-folder, their names).

    Where the top level is a division into parts, such as train/ and val/, the folders below it are the classes, and a
    warning says so.
    """
    loose = [path for path in paths if "/" not in path]
    if loose:
        raise UserError(
            f"labels 'folder': {len(loose)} images such as {loose[0]!r} lie directly in {str(root)!r}: "
            "move each into the sub-folder of its class, or do without labels"
        )
    parts, depth = {path.split("/", 1)[0] for path in paths}, 0
    if {part.lower() for part in parts} <= PARTS and all(path.count("/") > 1 for path in paths):
        depth = 1
        named = " and ".join(f"{part}/" for part in sorted(parts))
        warnings.warn(f"{named} of {str(root)!r} are taken for parts; the classes are the folders below", stacklevel=2)
    names, labels = np.unique([os.fsencode(path.split("/")[depth]) for path in paths], return_inverse=True)
    return labels.astype(np.int64), [os.fsdecode(name) for name in names]


def read_file(path: Path) -> bytes:
    """Read all bytes of a regular file of at most MAX_FILE_BYTES; BadImage with the reason otherwise."""
    try:
        # O_NONBLOCK: a pipe that took the place of a file since the scan must not block the run
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise BadImage(f"file of {status.st_size >> 20} MiB, at most {MAX_FILE_BYTES >> 20} are read")
            if status.st_size == 0:
                raise BadImage("empty file")
            return file.read(MAX_FILE_BYTES)
    except OSError as error:
        reason = f"{SYMLINK}: {LINK_HINT}" if error.errno == errno.ELOOP else error.strerror
        raise BadImage(f"cannot read: {reason}") from error
    except ValueError as error:  # a name with a NUL
        raise BadImage(f"cannot read: {error}") from error


# ---------------------------------------------------------------- arrays


def _array(path: Path, *, with_labels: bool) -> Source:
    try:
        if path.suffix.lower() == ".npy":
            if with_labels:
                raise UserError(f"{str(path)!r} has no labels: an .npy is one array; save an .npz with key 'labels'")
            images, labels = np.load(path, mmap_mode="r", allow_pickle=False), None
        else:
            images, labels = _read_npz(path, with_labels)
    except (OSError, ValueError, EOFError, KeyError, MemoryError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {str(path)!r} as a NumPy array file without pickled objects: {error}") from error
    _check_images(path, images)
    encoded, label_names = encode_labels(path, labels, len(images)) if labels is not None else (None, [])
    names = [f"{path.name}/{i:07d}" for i in range(len(images))]
    return Source(str(path.absolute()), names, images.__getitem__, encoded, label_names)


def _read_npz(path: Path, with_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the image array whole into memory, and the raw labels if `with_labels`."""
    with np.load(path, allow_pickle=False) as archive:
        shapes = npz_headers(path)
        key = "images"
        if key not in shapes:
            candidates = [k for k, (shape, dtype) in shapes.items() if len(shape) in (3, 4) and dtype == np.uint8]
            if len(candidates) != 1:
                raise UserError(
                    f"{str(path)!r} must have an array 'images' or exactly one uint8 array of 3 or 4 axes; "
                    f"it has {', '.join(f'{k} {dtype}{shape}' for k, (shape, dtype) in shapes.items()) or 'none'}"
                )
            key = candidates[0]
        labels = None
        if with_labels:
            label_key = next((k for k in ("labels", "y") if k in shapes), None)
            if label_key is None:
                raise UserError(f"{str(path)!r} has no array 'labels' or 'y': add one, or do without labels")
            labels = archive[label_key]
        return archive[key], labels


def npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Read name -> (shape, dtype). An array that claims more than its member holds is refused unallocated."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                continue
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            claimed = dtype.itemsize
            for side in shape:
                claimed *= int(side)
            if claimed > member.file_size:
                raise ValueError(f"array {member.filename!r} is truncated")
            headers[member.filename.removesuffix(".npy")] = (shape, dtype)
    return headers


def _check_images(path: Path, images: np.ndarray) -> None:
    wanted = "give uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
    got = f"{str(path)!r} holds {images.dtype} {images.shape}"
    if images.dtype != np.uint8:
        raise UserError(f"{got}: {wanted}; pixels in [0, 1] convert with (x * 255).round().astype('uint8')")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise UserError(f"{got}: {wanted}; channels come last")
    if images.ndim == 3 and images.shape[2] == 3:
        raise UserError(f"{got}, which looks like one colour image: {wanted}")
    if 0 in images.shape:
        raise UserError(f"{got}, no pixel at all: {wanted}")


def encode_labels(path: Path, labels: np.ndarray, n: int) -> tuple[np.ndarray, list[str]]:
    """Return (the number of each image's class, UNLABELLED where it has none, the names of the classes).

    Args:
        labels: (n,) integers or strings; those of MISSING, in any case, are no class.

    Raises:
        UserError: they are of another kind or number, or all are missing.
    """
    if labels.shape != (n,) or labels.dtype.kind not in "iubSU":
        raise UserError(
            f"the labels of {str(path)!r} are {labels.dtype} {labels.shape}: give integers or strings of shape ({n},)"
        )
    values, encoded = np.unique(labels, return_inverse=True)
    names = [value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value) for value in values]
    is_class = np.array([name.strip().lower() not in MISSING for name in names])
    if not is_class.any():
        raise UserError(f"all labels of {str(path)!r} are missing: do without labels")
    number = np.where(is_class, np.cumsum(is_class) - 1, UNLABELLED)
    return number[encoded].astype(np.int64), [name for name, kept in zip(names, is_class, strict=True) if kept]
