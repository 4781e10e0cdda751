"""Packing and evaluation on several workers: the bytes of one process, also where others were stopped."""

import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spice_dist.data import decode_pool, journal, pieces
from spice_dist.data.dataset import can_travel, open_data
from spice_dist.data.decode import Packing
from spice_dist.data.decode_pool import Result
from spice_dist.data.ingest import Call, call_with, ingest
from spice_dist.data.pieces import stored_count
from spice_dist.data.sources import Source, from_files, open_source
from spice_dist.errors import DamagedFile
from tests.methods.workers import on_workers

OPTIONS = {"size": 16, "format": "jpg", "max_bad": 0.2, "drop_duplicates": True}
COUNT = 300  # images, in five pieces


def hostile_folder(folder: Path) -> Path:
    """Images of all sizes; some are damaged, some equal earlier ones, and late 16-bit greys need 12 bits."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / f"{i:04d}.png"
        if i % 50 == 7:
            path.write_bytes(b"bad")
        elif i % 60 == 59:
            shutil.copyfile(folder / f"{i - 43:04d}.png", path)
        elif i % 40 == 3:
            most = 4095 if i > COUNT - 40 else 200  # of which the first pieces know nothing
            Image.fromarray(rng.integers(0, most + 1, (20, 20)).astype(np.uint16)).save(path)
        else:
            side = int(rng.integers(2, 40))
            Image.fromarray(rng.integers(0, 256, (side, side + i % 3, 3), np.uint8)).save(path)
    return folder


def slow_folder(folder: Path) -> Path:
    """Links to a few images that take some time to decode, in seven pieces."""
    folder.mkdir()
    for i in range(400):
        image = folder / f"{i:03d}.png"
        if i < 8:
            noise = np.random.default_rng(i).integers(0, 256, (900, 900, 3), np.uint8)
            Image.fromarray(noise).save(image, compress_level=1)
        else:
            os.link(folder / f"{i % 8:03d}.png", image)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(hostile_folder(tmp_path_factory.mktemp("images") / "in")))


@pytest.fixture(scope="module")
def packed(images: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of them."""
    folder = tmp_path_factory.mktemp("packed")
    manifest = ingest(images, folder, **OPTIONS)
    assert (manifest.bad, manifest.dropped > 0, manifest.grey_bits) == (6, True, 12)
    return content(folder)


@pytest.mark.parametrize("format", ["jpg", "raw"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_workers_packs_the_bytes_of_one_process(images, packed, tmp_path, world, format):
    if format == "raw":
        ingest(images, tmp_path / "one", **{**OPTIONS, "format": "raw"})
        packed = content(tmp_path / "one")
    on_workers(world, (images.name, {**OPTIONS, "format": format}), tmp_path / "run", "data")
    assert content(tmp_path / "run/data") == packed


def store(call: Call, numbers: Sequence[int], bits: int = 8) -> int:
    packing = replace(call.packing, grey_bits=bits)
    return call.pieces.store(call.source, packing, numbers, 1, False, lambda done: None)


def decoded(monkeypatch: pytest.MonkeyPatch, most: int = COUNT) -> list[int]:
    """The images that are decoded from now on, `most` of each list of them."""
    seen: list[int] = []

    def counted(source: Source, packing: Packing, workers: int, which: Sequence[int]) -> Iterator[Result]:
        for i, result in zip(which, decode_pool.packed_in_order(source, packing, workers, which[:most]), strict=False):
            seen.append(i)
            yield result

    monkeypatch.setattr(pieces, "packed_in_order", counted)
    return seen


def test_a_packing_goes_on_with_what_any_number_of_workers_has_stored(images, packed, tmp_path, monkeypatch):
    data = tmp_path / "run/data"
    call = call_with(images, data, **OPTIONS)
    assert [len(each) for each in call.pieces.ranges] == [64, 64, 64, 64, 44]
    assert store(call, [1, 4]) == 12, "the last piece needs more bits; the first, which has greys, is stored again"
    decoded(monkeypatch, most=20)
    store(call, [0], 12)
    assert stored_count(data) == 64 + 44 + 20
    seen = decoded(monkeypatch)
    ingest(images, data, **OPTIONS)
    assert seen == [7, *range(20, 64), 107, *range(128, 256), 257], "refused ones are tried again, no others"
    assert content(data) == packed


def test_workers_go_on_where_one_process_was_stopped_and_pieces_go_once_they_are_used(
    images, packed, tmp_path, monkeypatch
):
    data = tmp_path / "run/data"
    call = call_with(images, data, **OPTIONS)
    store(call, [0, 1, 2, 3, 4])
    monkeypatch.setattr(journal, "NOTE_S", 0.0)

    def stop(done: int, total: int) -> None:
        if done == 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(images, data, **OPTIONS, progress=stop)
    assert call.done(12) == 200
    assert [path.name for path in sorted(call.pieces.folder.iterdir())] == ["000000192", "000000256"]
    assert call.pieces.unfinished(call.done(12), 12) == []
    on_workers(2, (images.name, OPTIONS), tmp_path / "run", "data")
    assert content(data) == packed


def test_what_one_worker_cannot_read_costs_no_image_if_another_can(images, packed, tmp_path):
    call = call_with(images, tmp_path, **OPTIONS)
    blind = replace(images, file=lambda i: Path("/nowhere"))
    store(replace(call, source=blind), [1], 12)
    store(call, [0, 2, 3, 4], 12)
    with pytest.warns(UserWarning, match="63 images could not be read by another worker"):
        ingest(images, tmp_path, **OPTIONS)
    assert content(tmp_path) == packed


def test_files_and_buckets_can_be_read_in_another_process_and_folder(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes(name.encode())
    (tmp_path / "list.txt").write_text("in/a.png\nin/b.png\n")
    monkeypatch.chdir(tmp_path)
    given = ["in", "list.txt", f"local://{tmp_path}/in"]
    sent = [pickle.dumps(source) for source in (*map(open_data, given), from_files(["in/a.png", "in/b.png"]))]
    monkeypatch.chdir("/")
    for source in map(pickle.loads, sent):
        assert can_travel(source)
        assert source.read(1) == b"b.png"
    assert not can_travel(open_source("digits"))


def test_a_damaged_piece_is_refused(images, tmp_path):
    call = call_with(images, tmp_path, **OPTIONS)
    store(call, [0], 12)
    pages = call.pieces.place(0) / "pages"
    pages.write_bytes(pages.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedFile, match="delete it"):
        ingest(images, tmp_path, **OPTIONS)


def test_a_mistake_that_the_first_worker_finds_ends_all_workers(images, tmp_path):
    with pytest.raises(AssertionError, match="image size 1 is out of range"):
        on_workers(2, (images.name, {"size": 1}), tmp_path / "run", "data")
