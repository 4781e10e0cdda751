"""Where the files lie that a run was made of."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spice_dist import artifacts
from spice_dist.data.lists import SUFFIXES, is_saved_dataset
from spice_dist.errors import UserError
from spice_dist.group_names import plain

WITHOUT_FILES = (".npy", ".npz", ".beton")  # their images have names, but no files


@dataclass(frozen=True)
class Originals:
    """The folder that the names of the images are relative to."""

    root: Path
    listed: bool  # a list named the files: they may lie outside of the root

    def __str__(self) -> str:
        return plain(str(self.root))

    def path(self, name: str) -> Path:
        return Path(os.path.abspath(self.root / name))

    def size(self, name: str) -> int | None:
        """Return the bytes of an image's file; None if it is gone, a link, or outside of a folder that was scanned."""
        pure = PurePosixPath(name)
        if not self.listed and (pure.is_absolute() or ".." in pure.parts):
            return None
        try:
            status = os.lstat(self.root / name)
        except (OSError, ValueError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None


def find_originals(run: Path, given: Path | None, first: str) -> Originals | None:
    """Find the files of a run's images; None if they come from an array, a packed or a remote set.

    Args:
        given: where they are now; None: where they were when the run was made.
        first: name of the first image.

    Raises:
        UserError: the folder is not there.
    """
    if given is not None:
        if not given.is_dir():
            raise UserError(f"--source {given} is no folder; give the one that the names in assignments.csv begin in")
        return Originals(given, listed=False)
    source = artifacts.manifest(run).source
    if source == "a list of files":
        return Originals(Path.cwd(), listed=True)
    path = Path(source)
    if not path.is_absolute() or path.suffix.lower() in WITHOUT_FILES or is_saved_dataset(path):
        return None
    if path.is_dir():
        return Originals(path, listed=False)
    if path.suffix.lower() in SUFFIXES:
        holds_images = first == f"{path.name}/0000000"
        return None if holds_images else Originals(path.parent, listed=True)
    raise UserError(
        f"the images' folder {plain(source)} is not there; give the folder where they are now: --source DIR"
    )
