"""What a folder holds: image files by their suffix, and counts of all else."""

import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from spice_dist.errors import UserError

HEIC_SUFFIXES = frozenset({"heic", "heif", "hif"})  # read where pillow-heif is installed
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif"})
if find_spec("pillow_heif") is not None:
    IMAGE_SUFFIXES |= HEIC_SUFFIXES
SYMLINK, SPECIAL, SYSTEM, HIDDEN = "symbolic link", "special file", "system folder", "hidden image"
# of thumbnails on a NAS, of what macOS adds to archives, of deleted files
SYSTEM_FOLDERS = frozenset({"@eadir", "__macosx", "#recycle", "$recycle.bin"})
IMAGE, FOLDER = "an image", "a folder"


def is_image_name(name: str) -> bool:
    return suffix_of(name) in IMAGE_SUFFIXES


def scan(root: Path, follow_links: bool = False) -> tuple[list[str], dict[str, int], list[tuple[str, str]]]:
    """List (names of image files in byte order, counts of what else there is, sub-folders that cannot be entered).

    Hidden names and SYSTEM_FOLDERS are skipped, and no folder is entered twice, however it is mounted. Links to files
    within `root` are taken if asked for, no others.
    """
    tree = os.path.realpath(root)
    paths: list[str] = []
    ignored: Counter[str] = Counter()
    refused: list[tuple[str, str]] = []
    visited: set[tuple[int, int]] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as entries:
                for entry in sorted(entries, key=lambda e: os.fsencode(e.name)):
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    kind = _kind_of(entry, tree if follow_links else None)
                    if kind == IMAGE:
                        paths.append(name)
                    elif kind == FOLDER:
                        folders.append(name)
                    elif kind is not None:
                        ignored[kind] += 1
        except OSError as error:
            if not folder:
                raise UserError(f"cannot list the folder {str(root)!r}: {error.strerror}") from error
            refused.append((folder, f"cannot list this folder: {error.strerror}"))
    return sorted(paths, key=os.fsencode), dict(ignored), refused


def _kind_of(entry: os.DirEntry[str], tree: str | None) -> str | None:
    """Return IMAGE, FOLDER, or as what the entry is counted; None: it is not even counted.

    Args:
        tree: the folder within which links are followed; None: they are not.
    """
    is_file = entry.is_file(follow_symlinks=False)
    if entry.name.startswith("."):
        return HIDDEN if is_file and is_image_name(entry.name) else None
    if entry.is_symlink():
        is_taken = tree is not None and is_image_name(entry.name) and os.path.isfile(entry.path)
        return IMAGE if is_taken and os.path.realpath(entry.path).startswith(f"{tree}{os.sep}") else SYMLINK
    if entry.is_dir(follow_symlinks=False):
        return SYSTEM if entry.name.lower() in SYSTEM_FOLDERS else FOLDER
    if not is_file:
        return SPECIAL
    return IMAGE if is_image_name(entry.name) else suffix_of(entry.name)


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()
