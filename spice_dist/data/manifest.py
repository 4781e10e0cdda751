"""The manifest of a packed data set and the names of its images, of a folder or beside a packed file."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from spice_dist.data.checksums import read_sealed, require_digest, require_whole
from spice_dist.data.left_out import left_out, left_out_line
from spice_dist.errors import DamagedFile, UserError

NEARLY_ALL = 0.9  # of the images: what is so of more is told


@dataclass(frozen=True)
class Ingested:
    """manifest.json: what a folder of packed images holds."""

    version: int
    n: int
    format: str  # "raw" or "jpg"
    size: int  # pixels: side of the raw squares, largest shorter side of the JPEGs
    source: str
    bad: int  # images that could not be used: rows of quarantine.csv
    animated: int  # images of which only the first frame was taken
    warned: int  # images that the decoder complained about, but decoded
    duplicates: int  # images whose stored content equals that of an earlier one, training or held out
    dropped: int  # how many of them were left out
    extra: int  # images that only train stages 1 and 3, after the clustered ones
    held_out: int  # images that train nothing and are scored, after those
    listing: str  # hash of the source and the settings
    fingerprint: str  # hash of names, stored content and order: see `fingerprint_of`
    # what earlier versions did not note, with what they did
    content: str = ""  # hash of the names and files of the source: see `sources.content_of`
    ignored: dict[str, int] = field(default_factory=dict)  # what was no candidate, as `Source.ignored`
    closed: int = 0  # of the bad ones, folders that could not be listed
    pages: int = 0  # of TIFFs, after the first of each
    faint: int = 0  # images that are black, white or of one colour
    grey_bits: int = 16  # white is 2^bits - 1 in the 16-bit greys of the set; 0: it has none
    fit: str = "crop"  # how the images became squares, or will when they are read: see `decode`
    sha256: dict[str, str] = field(default_factory=dict)  # of the lists in the folder, by name

    def notes(self) -> list[str]:
        """Say what a user should know of the set, a line each."""
        counts = left_out(self.ignored, self.closed, self.bad - self.closed, self.pages, self.dropped)
        lines = [left_out_line(counts, self.n)] if counts else []
        if self.duplicates > self.dropped:
            lines.append(f"{self.duplicates - self.dropped:,} images are exact copies of others")
        if self.duplicates > NEARLY_ALL * (self.n + self.dropped):
            lines.append("nearly all images are alike: there is little to group")
        if self.faint > NEARLY_ALL * self.n:
            lines.append(
                f"{self.faint:,} of {self.n:,} images are nearly black, white or of one colour: look at some of them"
            )
        if self.grey_bits not in (0, 16):
            lines.append(f"16-bit greys have {self.grey_bits} bits: {(1 << self.grey_bits) - 1:,} is white")
        return lines

    @property
    def clustered(self) -> int:
        """Return how many images, from the first on, the heads are trained on."""
        return self.n - self.extra - self.held_out

    @property
    def training(self) -> int:
        """Return how many images, from the first on, stages 1 and 3 see."""
        return self.n - self.held_out


def read_manifest(folder: Path) -> Ingested:
    """Read the manifest of a folder that `ingest` filled.

    Raises:
        DamagedFile: it is missing, altered or of another version.
    """
    return _read_manifest(folder / "manifest.json")


def _read_manifest(path: Path) -> Ingested:
    try:
        content = read_sealed(path)
        if content.get("version") != 2:
            raise ValueError("another version")
        manifest = Ingested(**content)
        if min(manifest.clustered, manifest.size) < 1 or len(manifest.fingerprint) != 64:
            raise ValueError("values out of range")
    except (OSError, ValueError, TypeError) as error:
        raise DamagedFile(f"{path} is not a finished manifest ({error}): delete the folder and pack again") from error
    return manifest


def manifest_beside(packed: Path) -> Ingested:
    """Read the manifest of a file that `ingest.pack` wrote; UserError if there is none."""
    path = manifest_path(packed)
    if not path.exists():
        raise UserError(
            f"{packed} was not packed by this program: {path.name} is not beside it; "
            "pack the images again, or read it as untrusted images with --trust-foreign-beton"
        )
    return _read_manifest(path)


def manifest_path(packed: Path) -> Path:
    """Return where the manifest of a file that `ingest.pack` wrote lies."""
    return beside(packed, ".manifest.json")


def beside(packed: Path, suffix: str) -> Path:
    """Return the path of what belongs to a packed file, such as x.beton.paths.jsonl."""
    return packed.with_name(packed.name + suffix)


def read_paths(folder: Path) -> list[str]:
    """Read the name of every image, in image order, exactly as the source gave it."""
    return _names_in(require_whole(folder / "paths.jsonl"))


def names_beside(packed: Path) -> list[str]:
    """Read the names of the images of a file that `ingest.pack` wrote, as `read_paths` does."""
    return _names_in(list_beside(packed, "paths.jsonl"))


def list_beside(packed: Path, name: str) -> Path:
    """Return where a list of a packed file lies that is called `name` in a folder.

    Raises:
        DamagedFile: it was altered, or is missing although the manifest names it.
    """
    path, expected = beside(packed, f".{name}"), manifest_beside(packed).sha256.get(name)
    if expected and not path.exists():
        raise DamagedFile(f"{path} is missing: pack the images again")
    require_digest(path, expected)
    return path


def _names_in(path: Path) -> list[str]:
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path} is unreadable ({error}): pack again") from error


def fingerprint_of(names: list[str], digests: Iterable) -> str:
    """Hash by SHA-256, for each image, the length of its name, its name and its `Packed.digest` (32 bytes)."""
    total = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        encoded = os.fsencode(name)
        total.update(len(encoded).to_bytes(8, "little") + encoded + bytes(digest))
    return total.hexdigest()
