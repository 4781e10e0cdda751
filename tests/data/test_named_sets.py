import hashlib
import pickle
import re
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from spice_dist.data import beton
from spice_dist.data.ingest import ingest
from spice_dist.data.named_sets import CIFAR100_20, NAMES, SUBSETS, named_source
from spice_dist.data.sources import Source, listing
from spice_dist.errors import UserError

SUBSET_SIZES = {"imagenet-10": 10, "imagenet-dogs": 15, "imagenet-50": 50, "imagenet-100": 100, "imagenet-200": 200}
FINE = sorted(fine for names in CIFAR100_20.values() for fine in names.split())
COARSE_OF_FINE = (  # the coarse label of fine labels 0 to 99
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 "
    "5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13 "
    "16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"
)


def put(path: Path, content: bytes) -> list[str]:
    """Write a file; returns its name and MD5, as torchvision lists them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return [path.name, hashlib.md5(content).hexdigest()]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, 256, shape, np.uint8)


def refusal(name: str, folder: Path, split: str = "whole") -> str:
    with pytest.raises(UserError) as caught:
        named_source(name, folder, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(source: Source) -> list[np.ndarray]:
    images = [source.read(i) for i in range(len(source.paths))]
    assert all(isinstance(image, np.ndarray) and image.dtype == np.uint8 for image in images)
    return [np.asarray(image) for image in images]


def labels(source: Source) -> list[int]:
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert len(set(source.paths)) == len(source.paths) == len(source.labels)
    return source.labels.tolist()


# ---------------------------------------------------------------- arrays


TRAIN_LABELS, TEST_LABELS = [6, 9, 9, 4, 1, 1, 2, 7, 8, 3], [3, 8, 8, 0, 6, 6]


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A folder with a cifar10.npz of ten training and six test images."""
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (10, 32, 32, 3), np.uint8),
        "train_labels": np.array(TRAIN_LABELS),
        "test_images": rng.integers(0, 256, (6, 32, 32, 3), np.uint8),
        "test_labels": np.array(TEST_LABELS),
    }
    (tmp_path / "cifar").mkdir()
    np.savez(tmp_path / "cifar/cifar10.npz", **arrays)  # pyright: ignore[reportArgumentType]
    return tmp_path / "cifar"


def test_cifar10_comes_out_of_an_npz_train_part_first(cifar: Path):
    source = named_source("cifar10", cifar, "whole")
    assert source.name == f"cifar10:{cifar}"
    assert labels(source) == TRAIN_LABELS + TEST_LABELS
    assert [source.label_names[i] for i in (6, 9, 3)] == ["frog", "truck", "cat"]
    arrays = np.load(cifar / "cifar10.npz")
    assert np.array_equal(pixels(source), np.concatenate([arrays["train_images"], arrays["test_images"]]))
    assert (source.clustered, source.extra, source.held_out) == (16, 0, 0)
    split = named_source("cifar10", cifar, "split")
    assert (split.clustered, split.extra, split.held_out) == (10, 0, 6)
    assert split.paths == source.paths
    assert source.paths[9:11] == ["train/000009", "test/000000"]
    assert listing(split) != listing(source)


@pytest.mark.parametrize(
    "changes",
    [
        {"test_labels": np.array([10])},
        {"test_labels": np.array([-1])},
        {"test_labels": np.array([0.5])},
        {"test_labels": np.array(["cat"])},
        {"test_labels": np.array([3, 3])},
        {"test_labels": np.array([None])},
        {"test_labels": None},
        {"test_images": np.zeros((1, 3, 32, 32), np.uint8)},
        {"test_images": np.zeros((1, 3072), np.uint8)},
        {"test_images": np.zeros((1, 32, 32, 3))},
        {"test_images": np.zeros((0, 32, 32, 3), np.uint8), "test_labels": np.zeros(0, np.int64)},
    ],
)
def test_an_npz_that_is_not_cifar10_is_refused_in_one_line(changes: dict, cifar: Path, tmp_path: Path):
    arrays = dict(np.load(cifar / "cifar10.npz"))
    arrays |= {"test_images": arrays["test_images"][:1], "test_labels": arrays["test_labels"][:1]}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    assert labels(named_source("cifar10", tmp_path, "whole"))[10:] == [3]
    np.savez(tmp_path / "cifar10.npz", **{k: v for k, v in (arrays | changes).items() if v is not None})
    assert "train_images, train_labels, test_images, test_labels" in refusal("cifar10", tmp_path)


def test_a_truncated_npz_is_refused_in_one_line(cifar: Path, tmp_path: Path):
    (tmp_path / "cifar10.npz").write_bytes((cifar / "cifar10.npz").read_bytes()[:30_000])
    assert "cifar10.npz" in refusal("cifar10", tmp_path)


def cifar_rows(images: np.ndarray) -> np.ndarray:
    """One row an image: all of red, all of green, all of blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def write_cifar10(folder: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five batches of two images and a test batch of two, pickled as the official ones, labels 0 to 9 and 8, 9."""
    batches = folder / "cifar-10-batches-py"
    parts = [f"data_batch_{i + 1}" for i in range(5)] + ["test_batch"]
    files = []
    for i, part in enumerate(parts):
        first = min(2 * i, 8)
        batch = {"data": cifar_rows(images[2 * i : 2 * i + 2]), "labels": [first, first + 1], "batch_label": part}
        files.append(put(batches / part, pickle.dumps(batch, 2)))
    meta = put(batches / "batches.meta", pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}, 2))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", files[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", files[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta[1]})


def test_cifar10_comes_out_of_its_python_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = noise(12, 32, 32, 3)
    write_cifar10(tmp_path, images, monkeypatch)
    source = named_source("cifar10", tmp_path, "split")
    assert np.array_equal(pixels(source), images)
    assert labels(source) == [*range(10), 8, 9]
    assert source.label_names == [f"class {i}" for i in range(10)]
    assert (source.clustered, source.held_out) == (10, 2)


def test_a_cifar_batch_of_another_checksum_is_refused_before_it_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_cifar10(tmp_path, noise(12, 32, 32, 3), monkeypatch)
    trap = tmp_path / "trap"
    evil = b"cos\nmkdir\n(S'" + str(trap).encode() + b"'\ntR."
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(evil)
    assert "cifar-10-batches-py/" in refusal("cifar10", tmp_path)
    assert not trap.exists()
    pickle.loads(evil)
    assert trap.exists()


def write_cifar100(folder: Path, images: np.ndarray, fine: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for part, of_part in zip(("train", "test"), fine, strict=True):
        rows, images = cifar_rows(images[: len(of_part)]), images[len(of_part) :]
        content = pickle.dumps({"data": rows, "fine_labels": of_part, "filenames": []}, 2)
        files.append(put(folder / "cifar-100-python" / part, content))
    meta = put(folder / "cifar-100-python" / "meta", pickle.dumps({"fine_label_names": FINE}, 2))
    monkeypatch.setattr(datasets.CIFAR100, "train_list", files[:1])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", files[1:])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": meta[1]})


def test_cifar100_has_its_fine_or_its_official_coarse_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images, fine = noise(103, 32, 32, 3), [list(range(100)), [19, 0, 99]]
    write_cifar100(tmp_path, images, fine, monkeypatch)
    source, coarse = (named_source(name, tmp_path, "whole") for name in ("cifar100", "cifar100-20"))
    assert np.array_equal(pixels(source), images)
    assert np.array_equal(pixels(coarse), images)
    assert labels(source) == fine[0] + fine[1]
    assert source.label_names == FINE
    assert labels(coarse) == [*map(int, COARSE_OF_FINE.split()), 11, 4, 13]
    assert len(coarse.label_names) == 20
    assert coarse.label_names[11] == "large_omnivores_and_herbivores"  # cattle


def test_stl10_has_its_unlabelled_images_as_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = noise(9, 96, 96, 3)
    parts = {"train": (images[:3], [1, 10, 2]), "test": (images[3:5], [7, 1]), "unlabeled": (images[5:], None)}
    files = {}
    for part, (of_part, numbers) in parts.items():
        columns = of_part.transpose(0, 3, 2, 1)  # a colour at a time, column after column
        files[part] = [put(tmp_path / "stl10_binary" / f"{part}_X.bin", columns.tobytes())]
        if numbers:
            files[part].append(put(tmp_path / "stl10_binary" / f"{part}_y.bin", bytes(numbers)))
    monkeypatch.setattr(datasets.STL10, "train_list", files["train"] + files["unlabeled"])
    monkeypatch.setattr(datasets.STL10, "test_list", files["test"])

    whole, split = (named_source("stl10", tmp_path, kind) for kind in ("whole", "split"))
    assert np.array_equal(pixels(whole), images)
    assert labels(whole) == [0, 9, 1, 6, 0, -1, -1, -1, -1]
    assert (whole.clustered, whole.extra, whole.held_out) == (5, 4, 0)
    assert np.array_equal(pixels(split), images[[0, 1, 2, 5, 6, 7, 8, 3, 4]])
    assert labels(split) == [0, 9, 1, -1, -1, -1, -1, 6, 0]
    assert (split.clustered, split.extra, split.held_out) == (3, 4, 2)
    assert whole.label_names[6] == "horse"


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = b"".join(side.to_bytes(4, "big") for side in array.shape)
    put(path, bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def write_fashion_mnist(raw: Path, images: np.ndarray) -> None:
    """All but two train, labels 0, 1, ... in each part."""
    for part, of_part in (("train", images[:-2]), ("t10k", images[-2:])):
        write_idx(raw / f"{part}-images-idx3-ubyte", of_part)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(len(of_part)))


def test_fashion_mnist_comes_out_of_its_idx_files_in_grey(tmp_path: Path):
    images = noise(12, 28, 28)
    write_fashion_mnist(tmp_path / "FashionMNIST" / "raw", images)
    source = named_source("fashion-mnist", tmp_path, "split")
    assert np.array_equal(pixels(source), images)
    assert labels(source) == [*range(10), 0, 1]
    assert source.label_names[9] == "Ankle boot"
    assert (source.clustered, source.held_out) == (10, 2)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", b"<html>not found</html>", b"\0\0\x08\x01\0\0\0\2\0"])
def test_a_damaged_idx_file_is_refused_in_one_line(content: bytes, tmp_path: Path):
    raw = tmp_path / "FashionMNIST" / "raw"
    write_fashion_mnist(raw, noise(12, 28, 28))
    (raw / "t10k-images-idx3-ubyte").write_bytes(content)
    assert "t10k-images-idx3-ubyte" in refusal("fashion-mnist", tmp_path)


# ---------------------------------------------------------------- files


def subset(name: str) -> list[str]:
    return (SUBSETS / f"{name}.txt").read_text().split()


def all_wnids() -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    return sorted(ImageNetInfo("imagenet-1k").label_names())


def write_classes(folder: Path, wnids: list[str], count: int, below: str = "") -> None:
    for wnid in wnids:
        for i in range(count):
            put(folder / wnid / below / f"{wnid}_{i}.JPEG", f"{folder.name} {wnid} {i}".encode())


@pytest.mark.parametrize("name", SUBSET_SIZES)
def test_a_subset_of_imagenet_is_a_list_of_distinct_ids_of_imagenet(name: str):
    wnids = subset(name)
    assert len(set(wnids)) == len(wnids) == SUBSET_SIZES[name]
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids)
    assert wnids == sorted(wnids)
    assert set(wnids) <= set(all_wnids())


def test_the_subsets_of_scan_are_nested_and_the_dogs_are_dogs():
    assert set(subset("imagenet-50")) < set(subset("imagenet-100")) < set(subset("imagenet-200"))
    assert all("n02085620" <= wnid <= "n02113978" for wnid in subset("imagenet-dogs"))  # Chihuahua to Mexican hairless


@pytest.mark.parametrize("name", SUBSET_SIZES)
def test_a_subset_takes_its_classes_out_of_an_imagenet_folder(name: str, tmp_path: Path):
    wnids = subset(name)
    write_classes(tmp_path / "train", [*wnids, "n01440764"], 2)  # the tench is in none of them
    put(tmp_path / "train" / wnids[1] / "notes.txt", b"x")
    whole = named_source(name, tmp_path, "whole")  # needs no val/
    assert whole.paths == [f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in wnids for i in (0, 1)]
    assert whole.read(3) == f"train {wnids[1]} 1".encode()
    assert whole.encoded
    assert whole.file is not None
    assert whole.file(3) == tmp_path / whole.paths[3]
    assert labels(whole) == [label for label in range(len(wnids)) for _ in (0, 1)]
    assert whole.label_names == wnids
    assert whole.ignored == {"txt": 1}
    assert (whole.clustered, whole.held_out) == (2 * len(wnids), 0)

    write_classes(tmp_path / "val", wnids, 1)
    split = named_source(name, tmp_path, "split")
    assert split.paths == whole.paths + [f"val/{wnid}/{wnid}_0.JPEG" for wnid in wnids]
    assert labels(split) == labels(whole) + list(range(len(wnids)))
    assert (split.clustered, split.extra, split.held_out) == (2 * len(wnids), 0, len(wnids))
    assert named_source(name, tmp_path, "whole").paths == whole.paths


def test_imagenet_is_its_thousand_classes(tmp_path: Path):
    wnids = all_wnids()
    assert len(wnids) == 1000
    write_classes(tmp_path / "train", wnids[:-1], 1)
    assert f"1 class folders such as train/{wnids[-1]}" in refusal("imagenet", tmp_path)
    write_classes(tmp_path / "train", wnids[-1:], 1)
    source = named_source("imagenet", tmp_path, "whole")
    assert labels(source) == list(range(1000))
    assert source.label_names == wnids


def write_tiny_imagenet(folder: Path) -> list[str]:
    wnids = subset("imagenet-200")
    write_classes(folder / "train", wnids, 1, "images")
    put(folder / "train" / wnids[0] / f"{wnids[0]}_boxes.txt", b"x")
    boxes = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in ((0, wnids[7]), (10, wnids[3]), (9, wnids[0]))]
    put(folder / "val" / "val_annotations.txt", "".join(boxes).encode())
    for i in (0, 9, 10):
        put(folder / "val" / "images" / f"val_{i}.JPEG", f"val {i}".encode())
    return wnids


def test_tiny_imagenet_has_the_labels_of_its_annotations(tmp_path: Path):
    wnids = write_tiny_imagenet(tmp_path)
    whole, split = (named_source("tiny-imagenet", tmp_path, kind) for kind in ("whole", "split"))
    val = [f"val/images/val_{i}.JPEG" for i in (0, 10, 9)]
    assert whole.paths == split.paths == [f"train/{wnid}/images/{wnid}_0.JPEG" for wnid in wnids] + val
    assert labels(whole) == labels(split) == [*range(200), 7, 3, 0]
    assert whole.label_names == wnids
    assert whole.read(201) == b"val 10"
    assert (whole.clustered, whole.held_out) == (203, 0)
    assert (split.clustered, split.held_out) == (200, 3)
    assert whole.ignored == {"txt": 1}


def test_an_incomplete_tiny_imagenet_is_refused_in_one_line(tmp_path: Path):
    wnids = write_tiny_imagenet(tmp_path)
    annotations = tmp_path / "val" / "val_annotations.txt"
    text = annotations.read_text()
    for broken in ("val_0.JPEG", text.replace(wnids[7], "n99999999"), text.replace("val_10", "val_11"), "\udcff"):
        annotations.write_bytes(broken.encode("utf-8", "surrogateescape"))
        assert "val_annotations.txt does not label all" in refusal("tiny-imagenet", tmp_path)
    annotations.unlink()
    assert "val_annotations.txt does not label all" in refusal("tiny-imagenet", tmp_path)
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    assert "val/images is missing" in refusal("tiny-imagenet", tmp_path)
    (tmp_path / "train" / wnids[5]).rename(tmp_path / "train" / "other")
    assert "199 class folders instead of 200" in refusal("tiny-imagenet", tmp_path)


def test_an_incomplete_imagenet_folder_is_refused_in_one_line(tmp_path: Path):
    wnids = subset("imagenet-10")
    write_classes(tmp_path / "train", wnids, 1)
    assert f"10 class folders such as val/{wnids[0]}" in refusal("imagenet-10", tmp_path, "split")
    (tmp_path / "train" / wnids[4] / f"{wnids[4]}_0.JPEG").unlink()
    assert f"no image in train/{wnids[4]}" in refusal("imagenet-10", tmp_path)


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("split", ["whole", "split"])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_files_is_refused_with_what_must_be_in_it(name: str, split: str, tmp_path: Path):
    for folder in (tmp_path, tmp_path / "not\nthere"):
        message = refusal(name, folder, split)
        assert name in message
        assert re.search(r"train|cifar-10-batches-py/", message)


def test_another_name_or_split_is_refused_with_those_there_are(tmp_path: Path):
    assert "fashion-mnist" in refusal("mnist", tmp_path)
    assert "'whole'" in refusal("cifar10", tmp_path, "half")


def test_ingest_packs_a_named_set_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = noise(12, 32, 32, 3)
    write_cifar10(tmp_path / "in", images, monkeypatch)
    result = ingest(named_source("cifar10", tmp_path / "in", "split"), tmp_path / "out", size=32, format="raw")
    assert (result.n, result.clustered, result.held_out) == (12, 10, 2)
    info = beton.verify(tmp_path / "out" / "dataset.beton")
    with closing(beton.Samples(info)) as samples:
        assert np.array_equal(samples.raw(np.arange(12)), images)
