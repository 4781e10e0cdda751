"""One small data set, packed once by the real FFCV, shared by the tests of the file format and of the loaders."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from spice_dist.data.ffcv_writer import write_beton
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
def packed_folders(
    tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray, small_pixels: np.ndarray
) -> dict[str, Path]:
    """Folders as ingest and write_beton leave them, read only: "main", "again" with the same images, and "small"."""
    contents = {"main": pixels, "again": pixels, "small": small_pixels}
    folders = {name: tmp_path_factory.mktemp(name) for name in contents}
    for name, images in contents.items():
        source = Source("random", [f"{i}" for i in range(len(images))], images.__getitem__)
        ingest(source, images.shape[1], folders[name])
    with ThreadPoolExecutor() as pool:  # each writer spends seconds on importing FFCV
        list(pool.map(lambda folder: write_beton(folder / "images.npy", folder / "dataset.beton"), folders.values()))
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
