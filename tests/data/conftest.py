"""Small data sets as ingest packs them, shared by the tests of the file format and of the loaders."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from spice_dist.data.ingest import ingest
from spice_dist.data.sources import Source

N, SIDE = 2_600, 24  # 4.5 MB: three pages of 2 MiB


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (N, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="session")
def small_pixels() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (70, 11, 11, 3), np.uint8)


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """Crops of a real photo, of several sizes."""
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("china.jpg")
    rng = np.random.default_rng(3)
    crops = []
    for _ in range(24):
        height, width = rng.integers(40, 140, 2)
        top, left = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
        crops.append(np.ascontiguousarray(photo[top : top + height, left : left + width]))
    return crops


@pytest.fixture(scope="session")
def packed_folders(
    tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray, small_pixels: np.ndarray, photos: list[np.ndarray]
) -> dict[str, Path]:
    """Folders as ingest leaves them, read only: "main", "again" with the same images, "small", and "jpg" of photos."""
    contents = {"main": pixels, "again": pixels, "small": small_pixels, "jpg": photos}
    folders = {name: tmp_path_factory.mktemp(name) for name in contents}
    for name, images in contents.items():
        source = Source("random", [f"{i}" for i in range(len(images))], images.__getitem__)
        kind, size = ("jpg", 64) if name == "jpg" else ("raw", images[0].shape[0])
        ingest(source, folders[name], size=size, format=kind)
    return folders


@pytest.fixture(scope="session")
def packed(packed_folders: dict[str, Path]) -> Path:
    return packed_folders["main"]


@pytest.fixture
def beton_copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of the packed file and its sidecar, to be damaged."""
    shutil.copy(packed / "dataset.beton", tmp_path / "dataset.beton")
    shutil.copy(packed / "dataset.beton.json", tmp_path / "dataset.beton.json")
    return tmp_path / "dataset.beton"
