"""Settings of a run's images, and the way from any kind of DATA to one packed data set."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spice_dist.data import beton
from spice_dist.data.decode import FITS, MAX_MEGAPIXELS, MIN_SIDE, Packing
from spice_dist.data.files import Progress
from spice_dist.data.folders import is_image_name
from spice_dist.data.foreign import foreign_source
from spice_dist.data.ingest import MAX_SIZE, ingest, require_fit, stored_format
from spice_dist.data.lists import SUFFIXES, is_saved_dataset, list_source, saved_dataset_source
from spice_dist.data.manifest import Ingested, manifest_beside, manifest_path
from spice_dist.data.named_sets import NAMES, named_source
from spice_dist.data.packed_files import adopt, packed_source
from spice_dist.data.remote import is_remote, remote_source
from spice_dist.data.seal import key_file
from spice_dist.data.sources import Source, from_files, is_beton, open_source
from spice_dist.errors import UserError
from spice_dist.settings import setting

LOADERS = ("auto", "ffcv", "torch")  # what decodes packed images
JPEG_MARGIN = 8 / 7  # a JPEG keeps its shorter side this much larger than the network's input, as 256 is to 224


@dataclass(frozen=True)
class DataConfig:
    size: int = setting(32, "pixels, the side of the square that the network sees", least=MIN_SIDE, most=MAX_SIZE)
    channels: int = setting(3, "3 colours, or 1 for grey")
    loader: str = setting("auto", "auto: FFCV where it is installed", choices=LOADERS)
    format: str = setting(
        "auto",
        "raw: squares of data.size; jpg: whole images; auto: raw up to 128 pixels and 8 GiB",
        choices=("auto", "raw", "jpg"),
    )
    quality: int = setting(90, "JPEG quality of jpg", least=1, most=100)
    grey_bits: int = setting(
        0, "white is 2^bits - 1 in 16-bit greys; 0: as many bits as those of the set use", least=0, most=16
    )
    max_megapixels: int = setting(
        MAX_MEGAPIXELS, "largest image, in millions of pixels; a JPEG may have five times as many", least=1, most=1000
    )
    max_bad: float = setting(0.05, "share of unreadable images above which the run is refused", least=0, most=1)
    fit: str = setting("crop", "crop: squares are central ones; squash: whole images, distorted", choices=tuple(FITS))
    drop_duplicates: bool = setting(False, "leave out exact copies of earlier images")


def prepare(source: Source, config: DataConfig, out_dir: Path, progress: Progress | None = None) -> Ingested:
    """Make `out_dir` the packed data set of `source`: a reference to a `.beton`, or its images ingested.

    Raises:
        UserError: too many unreadable images, a folder that cannot be written, or a `.beton` of another `fit`.
    """
    require_fit(source, config.fit, source.name)
    if is_ours(source.name):
        return adopt(Path(source.name), out_dir)
    return ingest(source, out_dir, **ingest_options(config), progress=progress)


def ingest_options(config: DataConfig) -> dict[str, Any]:
    """Return the options with which the images of a run are ingested."""
    return {
        "size": config.size,
        "jpeg_side": _jpeg_side(config),
        "format": config.format,
        "quality": config.quality,
        "grey_bits": config.grey_bits,
        "max_megapixels": config.max_megapixels,
        "fit": config.fit,
        "max_bad": config.max_bad,
        "drop_duplicates": config.drop_duplicates,
    }


def can_travel(source: Source) -> bool:
    """Return whether workers on other nodes can read the images: files of a folder or a list, or of a bucket."""
    return source.file is not None or is_remote(source.name)


def is_ours(name: str) -> bool:
    """Return whether a source of that name is a file that this program packed for this user."""
    return is_beton(name) and manifest_path(Path(name)).exists() and beton.is_ours(Path(name))


def packing_of(config: DataConfig) -> Packing:
    """Return how `prepare` stores the images of a small set; each 16-bit grey by its own bits unless they are set."""
    format = stored_format(config.format, config.size, images=1)
    size = config.size if format == "raw" else _jpeg_side(config)
    return Packing(format, size, config.quality, config.grey_bits, config.max_megapixels, config.fit)


def _jpeg_side(config: DataConfig) -> int:
    return round(config.size * JPEG_MARGIN)


def open_given(data: str, follow_links: bool = False, trust_list: bool = False) -> Source:
    """Open what `open_data` opens, one image file, or "-": paths on standard input, a line each or NUL-terminated."""
    if data == "-":
        return from_files(paths_in(sys.stdin.buffer.read()))
    path = Path(data)
    if is_image_name(path.name) and path.is_file():
        return from_files([data])
    return open_data(data, follow_links=follow_links, trust_list=trust_list)


def paths_in(listed: bytes) -> list[str]:
    """Split the output of find or ls, or of find -print0."""
    end = b"\0" if b"\0" in listed else b"\n"
    return [os.fsdecode(line) for line in listed.split(end) if line.strip()]


def open_data(
    data: str,
    labels: str | None = None,
    split: str = "whole",
    trust_foreign_beton: bool = False,
    follow_links: bool = False,
    trust_list: bool = False,
) -> Source:
    """Open DATA of any kind as a source of images that are not decoded yet.

    Args:
        data: `digits`, a folder, a list file, an array, `NAME:DIR`, a URL, or a `.beton`.
        labels: where true labels come from, for scores only: None, "folder", "array" or "list".
        split: "whole", or "split": the test part of a named data set is held out.
        trust_foreign_beton: read a `.beton` of another program or user, as a collection of untrusted images, never by
            FFCV.
        follow_links: read links that point to files within the folder, or within that of the list.
        trust_list: read files outside of its folder that a list names.

    Raises:
        UserError: one line that says what to give instead.
    """
    path, (name, colon, folder) = Path(data.removeprefix("file://")), data.partition(":")
    if colon and name in NAMES:
        _check_labels(data, labels, None)
        return named_source(name, Path(folder), split)
    if split != "whole":
        raise UserError(f"--split {split} is for named data sets, which have a test part; {data!r} has none")
    if is_remote(data):
        _check_labels(data, labels, "folder")
        return remote_source(data, with_labels=labels is not None)
    if is_beton(data):
        _check_labels(data, labels, None)
        return _beton_source(path, trust_foreign_beton)
    if path.suffix.lower() in SUFFIXES and path.is_file():
        _check_labels(data, labels, "list")
        return list_source(path, with_labels=labels is not None, follow_links=follow_links, trusted=trust_list)
    if is_saved_dataset(path):
        _check_labels(data, labels, "list")
        return saved_dataset_source(path, with_labels=labels is not None, trusted=trust_list)
    return open_source(data.removeprefix("file://"), labels, follow_links)


def _check_labels(data: str, labels: str | None, possible: str | None) -> None:
    if labels not in (None, possible):
        hint = f"give {possible!r} or none" if possible else "give none, it brings its own if it has any"
        raise UserError(f"labels {labels!r} do not belong to {data!r}: {hint}")


def _beton_source(path: Path, trust_foreign_beton: bool) -> Source:
    if not manifest_path(path).exists() and trust_foreign_beton:
        return foreign_source(path)
    manifest_beside(path)
    if not (trust_foreign_beton or beton.is_ours(path)):
        raise UserError(
            f"{path} was not packed by spice-dist for this user (the key of {key_file()} has not sealed it); pack the "
            "images again, or read it as untrusted images with --trust-foreign-beton"
        )
    return packed_source(path)
