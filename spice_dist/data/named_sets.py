"""Published data sets by name, from a folder that holds them: nothing is downloaded.

Split 'whole' clusters all labelled images as the clustering literature does: train and test merged, but the train part
alone for ImageNet and its subsets (13,000 images for imagenet-10, 19,500 for imagenet-dogs). Split 'split' clusters the
train part and holds the test part out. The 100,000 unlabelled images of stl10 are extra in both.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from spice_dist.data.folders import scan
from spice_dist.data.sources import Source, files_source, npz_headers
from spice_dist.errors import UserError

CONTENTS = {  # what must be in the folder
    "cifar10": "cifar-10-batches-py/ (data_batch_1 to data_batch_5, test_batch, batches.meta) "
    "or cifar10.npz (train_images, train_labels, test_images, test_labels)",
    "cifar100": "cifar-100-python/ (train, test, meta)",
    "cifar100-20": "cifar-100-python/ (train, test, meta)",
    "stl10": "stl10_binary/ (train_X.bin, train_y.bin, test_X.bin, test_y.bin, unlabeled_X.bin)",
    "fashion-mnist": "FashionMNIST/raw/ (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
    "t10k-labels-idx1-ubyte; unpacked)",
    "tiny-imagenet": "train/<wnid>/images/*.JPEG of 200 classes, val/images/*.JPEG and val/val_annotations.txt",
} | {
    name: f"train/<wnid>/* and, to hold it out, val/<wnid>/* of its {classes:,} classes"
    for name, classes in {
        "imagenet": 1000,
        "imagenet-10": 10,
        "imagenet-dogs": 15,
        "imagenet-50": 50,
        "imagenet-100": 100,
        "imagenet-200": 200,
    }.items()
}
NAMES = tuple(CONTENTS)
SPLITS = ("whole", "split")
SUBSETS = Path(__file__).parent / "imagenet_subsets"  # 10 and dogs: of DAC; 50, 100 and 200: of SCAN
TINY_CLASSES = 200

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STL10_CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
CIFAR100_20 = {  # the official superclasses, in the order of their number
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}


def named_source(name: str, folder: Path, split: str) -> Source:
    """Open data set `name` of `folder`, in the order clustered, extra, held out; labels of extra images are -1.

    Args:
        name: one of NAMES.
        folder: holds CONTENTS[name].
        split: "whole" or "split", see above.

    Raises:
        UserError: one line that says what must be in the folder.
    """
    if name not in NAMES:
        raise UserError(f"unknown data set {name!r}: give one of {', '.join(NAMES)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: give 'whole' (all labelled images) or 'split' (test part held out)")
    if not os.path.isdir(folder):
        raise UserError(f"{str(folder)!r} is no folder: for {name} give one with {CONTENTS[name]}")
    source = _of_files(name, folder, split) if "imagenet" in name else _of_arrays(name, folder, split)
    return replace(source, name=f"{name}:{os.fsencode(folder.absolute()).decode('utf-8', 'backslashreplace')}")


def _unusable(name: str, folder: Path, what: str) -> UserError:
    return UserError(f"{what}: {name} needs in {str(folder)!r} {CONTENTS[name]}")


# ---------------------------------------------------------------- arrays


@dataclass(frozen=True)
class _Part:
    name: str
    images: np.ndarray  # (N, H, W) or (N, H, W, 3) uint8, maybe a transposed view
    labels: np.ndarray  # (N,) integers


def _of_arrays(name: str, folder: Path, split: str) -> Source:
    try:
        parts, label_names = _load(name, folder)
        for part in parts:
            _check(part, len(label_names))
    except Exception as error:  # whatever a parser of torchvision or NumPy trips over
        what = f"a file is missing or is not as published ({type(error).__name__})"
        raise _unusable(name, folder, what) from error
    train, test, *extra = parts
    order = [train, test, *extra] if split == "whole" else [train, *extra, test]
    images = [image for part in order for image in part.images]  # views: stl10 is 3 GB
    return Source(
        name,
        [f"{part.name}/{i:06d}" for part in order for i in range(len(part.images))],
        images.__getitem__,
        np.concatenate([part.labels for part in order]).astype(np.int64),
        label_names,
        extra=sum(len(part.images) for part in extra),
        held_out=len(test.images) if split == "split" else 0,
    )


def _load(name: str, folder: Path) -> tuple[list[_Part], list[str]]:
    """Load (train, test and for stl10 the unlabelled part; label names). CIFAR and STL-10 are checked by MD5."""
    from torchvision import datasets

    if name == "cifar10":
        return _cifar10_npz(folder) if (folder / "cifar10.npz").is_file() else _torchvision(datasets.CIFAR10, folder)
    if name == "fashion-mnist":
        return _torchvision(datasets.FashionMNIST, folder)
    if name == "stl10":
        return _stl10(folder), list(STL10_CLASSES)
    parts, fine = _torchvision(datasets.CIFAR100, folder)
    if name == "cifar100":
        return parts, fine
    coarse = _coarse(fine)
    return [replace(part, labels=coarse[part.labels]) for part in parts], list(CIFAR100_20)


def _torchvision(kind: type, folder: Path) -> tuple[list[_Part], list[str]]:
    sets = [kind(folder, train=train, download=False) for train in (True, False)]
    parts = [
        _Part(part, np.asarray(data.data), np.asarray(data.targets))
        for part, data in zip(("train", "test"), sets, strict=True)
    ]
    return parts, list(sets[0].classes)


def _cifar10_npz(folder: Path) -> tuple[list[_Part], list[str]]:
    path = folder / "cifar10.npz"
    npz_headers(path)  # refuses a truncated one
    with np.load(path, allow_pickle=False) as archive:
        arrays = [(part, archive[f"{part}_images"], archive[f"{part}_labels"]) for part in ("train", "test")]
    return [_Part(*array) for array in arrays], list(CIFAR10_CLASSES)


def _stl10(folder: Path) -> list[_Part]:
    from torchvision.datasets import STL10

    parts = []
    for part in ("train", "test", "unlabeled"):
        data = STL10(folder, part, download=False)
        parts.append(_Part(part, data.data.transpose(0, 2, 3, 1), np.asarray(data.labels, np.int64)))
    return parts


def _coarse(fine: Sequence[str]) -> np.ndarray:
    """Return the number of the superclass of each fine class."""
    number = {name: i for i, names in enumerate(CIFAR100_20.values()) for name in names.split()}
    return np.array([number[name] for name in fine])


def _check(part: _Part, classes: int) -> None:
    lowest = -1 if part.name == "unlabeled" else 0
    if part.images.dtype != np.uint8 or part.images.ndim < 3 or part.images.shape[3:] not in ((), (3,)):
        raise ValueError(f"{part.name} images are {part.images.dtype} {part.images.shape}")
    if (
        part.labels.dtype.kind not in "iu"
        or part.labels.shape != part.images.shape[:1]
        or part.labels.min() < lowest
        or part.labels.max() >= classes
    ):
        raise ValueError(f"{part.name} labels are not one of {classes} for each image")


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class _Listing:
    """Image files of one part of a data set, and the other files there."""

    paths: list[str] = field(default_factory=list)  # relative to the folder of the data set
    labels: list[int] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def scan(self, folder: Path, below: str) -> list[str]:
        """Add the images below a sub-folder, without labels yet, and return their paths relative to it."""
        paths, ignored, refused = scan(folder / below)
        self.paths.extend(f"{below}/{path}" for path in paths)
        self.ignored.update(ignored)
        self.refused.extend((f"{below}/{path}", reason) for path, reason in refused)
        return paths


def _of_files(name: str, folder: Path, split: str) -> Source:
    wnids = _wnids(name, folder)
    train = _in_class_folders(name, folder, "train", wnids)
    test = _Listing()
    if name == "tiny-imagenet":
        test = _tiny_val(folder, wnids)
    elif split == "split":
        test = _in_class_folders(name, folder, "val", wnids)
    paths = train.paths + test.paths
    return replace(
        files_source(name, paths, folder),
        labels=np.array(train.labels + test.labels, np.int64),
        label_names=wnids,
        ignored=dict(train.ignored + test.ignored),
        refused=train.refused + test.refused,
        held_out=len(test.paths) if split == "split" else 0,
    )


def _wnids(name: str, folder: Path) -> list[str]:
    """Return the classes in the order of their WordNet ids, which is that of their numbers."""
    if name == "tiny-imagenet":
        wnids = []
        with contextlib.suppress(OSError):
            wnids = [entry for entry in os.listdir(folder / "train") if re.fullmatch(r"n\d{8}", entry)]
        if len(wnids) != TINY_CLASSES:
            raise _unusable(name, folder, f"{len(wnids)} class folders instead of {TINY_CLASSES} in train/")
        return sorted(wnids)
    if name == "imagenet":
        from timm.data.imagenet_info import ImageNetInfo

        return sorted(ImageNetInfo("imagenet-1k").label_names())
    return (SUBSETS / f"{name}.txt").read_text().split()


def _in_class_folders(name: str, folder: Path, part: str, wnids: list[str]) -> _Listing:
    """List the images below part/<wnid>, class after class, without other classes."""
    missing = [wnid for wnid in wnids if not os.path.isdir(folder / part / wnid)]
    if missing:
        raise _unusable(name, folder, f"{len(missing)} class folders such as {part}/{missing[0]} are missing")
    listing = _Listing()
    for label, wnid in enumerate(wnids):
        images = listing.scan(folder, f"{part}/{wnid}")
        if not images:
            raise _unusable(name, folder, f"no image in {part}/{wnid}")
        listing.labels.extend([label] * len(images))
    return listing


def _tiny_val(folder: Path, wnids: list[str]) -> _Listing:
    """List val/images with the labels of val_annotations.txt, which has file, wnid and a box in each line."""
    if not os.path.isdir(folder / "val" / "images"):
        raise _unusable("tiny-imagenet", folder, "val/images is missing")
    listing = _Listing()
    images = listing.scan(folder, "val/images")
    number = {wnid: i for i, wnid in enumerate(wnids)}
    try:
        lines = (folder / "val" / "val_annotations.txt").read_text("utf-8").splitlines()
        label_of = {file: number[wnid] for file, wnid, *_ in map(str.split, lines)}
        listing.labels.extend(label_of[file] for file in images)
    except (OSError, ValueError, KeyError) as error:
        raise _unusable("tiny-imagenet", folder, "val/val_annotations.txt does not label all of val/images") from error
    if not images:
        raise _unusable("tiny-imagenet", folder, "no image in val/images")
    return listing
