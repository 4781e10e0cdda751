"""A copy of the packed images on the local disk of a node, made once and checked by its hash."""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from spice_dist.data import beton
from spice_dist.data.files import fsync
from spice_dist.data.manifest import read_manifest
from spice_dist.errors import DamagedFile

NAMES = ("dataset.beton", "dataset.beton.json", "manifest.json")


def staged(data: Path, scratch: Path) -> Path:
    """Copy the folder of packed images `data` below `scratch`; return `data`, with a warning, if that fails.

    All processes of a node share the copy: one makes it, the others wait. It is named by the hash of its content, so
    that runs on the same images share it too, and it stays until the disk is cleaned.

    Raises:
        DamagedFile: the images are not those of their sidecar.
    """
    info = beton.verify(data / NAMES[0])
    key = hashlib.sha256((data / NAMES[1]).read_bytes())  # small, with hashes of all images
    # without the digests of lists, which are not copied and change with the labels
    key.update(json.dumps(asdict(replace(read_manifest(data), sha256={}))).encode())
    try:
        folder = _private_folder(scratch)
        place = folder / key.hexdigest()[:32]
        with _locked(folder / f"{place.name}.lock"):
            if not _is_whole(place, info.file_size):
                shutil.rmtree(place, ignore_errors=True)
                _copy(data, place, info.sha256)
        return place
    except OSError as error:
        why = error.strerror or error
        warnings.warn(f"the images cannot be copied to {scratch} ({why}); they are read from {data}", stacklevel=2)
        return data


def _private_folder(scratch: Path) -> Path:
    """Make a folder that only this user can write to, also where everybody may write."""
    folder = scratch / f"spice-dist-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o022:
        raise PermissionError(0, f"{folder} can be written by others")
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock for one process of this machine at a time; a process that dies frees it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(place: Path, size: int) -> bool:
    """Return whether the copy is complete: cleaning a disk may remove files and leave their folder."""
    try:
        return all((place / name).is_file() for name in NAMES) and (place / NAMES[0]).stat().st_size == size
    except FileNotFoundError:  # removed at this moment
        return False


def _copy(data: Path, place: Path, sha256: str | None) -> None:
    """Copy whole or not at all."""
    for leftover in place.parent.glob(f".{place.name}.*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        for name in NAMES:
            shutil.copyfile(data / name, temporary / name)
            fsync(temporary / name)
        with open(temporary / NAMES[0], "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise DamagedFile(f"{data / NAMES[0]} does not match its sidecar: write the data set again")
        os.replace(temporary, place)
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)
