"""Images on a node's own disk are the ones of the run, whoever copied them, or none."""

import json
import multiprocessing
import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from spice_dist.data import scratch
from spice_dist.data.loaders import open_images
from spice_dist.data.scratch import staged
from spice_dist.errors import DamagedFile
from tests.folders import unrecorded

CPU = torch.device("cpu")


@pytest.fixture
def data(digits_folder, tmp_path) -> Path:
    """A copy of 200 packed digits that a test may damage."""
    return Path(shutil.copytree(digits_folder / "data", tmp_path / "data"))


def pixels(folder: Path) -> torch.Tensor:
    with closing(open_images(folder, device=CPU, size=8)) as images:
        ((batch, _),) = images.batches(np.arange(200), 200)
        return batch.clone()


def test_the_copy_is_read_when_the_original_is_gone(data, tmp_path):
    expected = pixels(data)
    copy = staged(data, tmp_path / "disk")
    shutil.rmtree(data)
    assert torch.equal(pixels(copy), expected)
    assert copy.is_relative_to(tmp_path / "disk")


def test_the_copy_is_made_once_also_by_processes_at_once(data, tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        places = pool.starmap(staged, [(data, tmp_path / "disk")] * 8)
    (place,) = set(places)
    file = (place / "dataset.beton").stat()
    assert staged(data, tmp_path / "disk") == place
    assert (place / "dataset.beton").stat().st_ino == file.st_ino
    assert [path.name for path in place.parent.iterdir() if path.is_dir()] == [place.name]


def test_a_run_on_a_packed_file_stages_the_file_and_not_the_link(data, tmp_path):
    (data / "dataset.beton").rename(tmp_path / "packed.beton")
    (data / "dataset.beton").symlink_to(tmp_path / "packed.beton")
    copy = staged(data, tmp_path / "disk")
    assert not (copy / "dataset.beton").is_symlink()


def test_damaged_pixels_are_not_staged(data, tmp_path):
    with open(data / "dataset.beton", "r+b") as file:
        file.seek((2 << 20) + 5)  # in the first page: the structure stays whole
        byte = file.read(1)
        file.seek((2 << 20) + 5)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DamagedFile, match="does not match its sidecar"):
        staged(data, tmp_path / "disk")
    (folder,) = (tmp_path / "disk").iterdir()
    assert [path for path in folder.iterdir() if path.is_dir()] == []


def test_another_manifest_is_another_copy(data, tmp_path):
    first = staged(data, tmp_path / "disk")
    manifest = json.loads((unrecorded(data.parent) / "data/manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**manifest, "bad": manifest["bad"] + 1}))
    assert staged(data, tmp_path / "disk") != first


def test_a_killed_copy_leaves_nothing_for_the_next(data, tmp_path):
    place = staged(data, tmp_path / "disk")
    place.rename(place.with_name(f".{place.name}.0123abcd"))
    assert staged(data, tmp_path / "disk") == place
    assert not place.with_name(f".{place.name}.0123abcd").exists()


@pytest.mark.parametrize("lost", scratch.NAMES)
def test_a_copy_of_which_a_cleaner_took_a_file_is_made_again(data, tmp_path, lost):
    place = staged(data, tmp_path / "disk")
    (place / lost).unlink()
    assert staged(data, tmp_path / "disk") == place
    assert (place / lost).read_bytes() == (data / lost).read_bytes()


def test_without_room_the_images_are_read_where_they_are(data, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert staged(data, tmp_path / "disk") == data
    assert [path for path in (tmp_path / "disk").rglob("*") if path.name == "dataset.beton"] == []


def test_a_folder_that_others_can_write_is_not_used(data, tmp_path):
    folder = tmp_path / "disk" / f"spice-dist-{os.getuid()}"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="can be written by others"):
        assert staged(data, tmp_path / "disk") == data
