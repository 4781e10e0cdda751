"""Labelled data sets as folders of image files, one sub-folder per class, for programs that read nothing else.

SET is `digits`; NAME:DIR, a published data set as `spice-dist fit` reads it (cifar10, fashion-mnist, stl10, ...); any
other NAME:DIR, a folder DIR with a list labels.csv (path,label); or a folder whose sub-folders are the classes, which
is taken as it is. SET@N is a random subset of N images.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from spice_dist.data.dataset import open_data
from spice_dist.data.named_sets import NAMES
from spice_dist.data.sources import Source


@dataclass(frozen=True)
class PhotoSet:
    name: str  # "cifar10-4000"
    folder: Path  # folder / class / image
    images: int
    classes: int


def photo_set(text: str, images: int | None, below: Path) -> PhotoSet:
    """The SET `text` as a folder; where it is none, or only `images` of it are wanted, one is made in `below`, once.

    Raises:
        UserError: there is no such data; one line says what to give instead.
    """
    data, at, count = text.rpartition("@")
    if at and count.isdecimal():
        text, images = data, int(count)
    name, source, folder = _open(text)
    number = source.clustered if images is None else min(images, source.clustered)
    chosen = np.arange(source.clustered)
    if number < source.clustered:
        chosen = np.random.default_rng(0).permutation(source.clustered)[:number]
        name, folder = f"{name}-{number}", None
    assert source.labels is not None
    classes = len(np.unique(source.labels[chosen]))
    if folder is None:
        folder = below / name
        if not folder.exists():
            _write(source, np.random.default_rng(1).permutation(chosen), folder)
    return PhotoSet(name, folder, number, classes)


def _open(text: str) -> tuple[str, Source, Path | None]:
    """(a name for it, its images with labels, the folder of classes if it is one already)."""
    name, colon, folder = text.partition(":")
    if text == "digits" or (colon and name in NAMES):
        return name, open_data(text), None
    if colon:
        return name, open_data(str(Path(folder) / "labels.csv"), "list"), None
    return Path(text).resolve().name, open_data(text, "folder"), Path(text)


def _write(source: Source, chosen: np.ndarray, folder: Path) -> None:
    """These images in this order, called by their place in it: neither names nor their order tell a class."""
    assert source.labels is not None
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for place, i in enumerate(chosen):
        label = int(source.labels[i])
        below = unfinished / f"{label:03d}-{re.sub(r'[^a-z0-9]+', '-', source.label_names[label].lower())}"
        below.mkdir(parents=True, exist_ok=True)
        if source.file is not None:
            _link(source.file(i), below / f"{place:06d}{Path(source.paths[i]).suffix.lower()}")
            continue
        pixels = source.read(i)
        assert isinstance(pixels, np.ndarray), "data sets by name are files or arrays"
        Image.fromarray(pixels.squeeze()).save(below / f"{place:06d}.png", compress_level=1)
    unfinished.rename(folder)


def _link(file: Path, target: Path) -> None:
    """A hard link, since `spice-dist` follows no symbolic ones; a copy on another file system."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
