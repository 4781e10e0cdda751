import io
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spice_dist.data import beton
from spice_dist.data.beton import sidecar_path, verify
from spice_dist.data.beton_writer import BetonWriter, page_size_for, publish_beton
from spice_dist.errors import DamagedFile, UserError

PAGE = 1 << 21
FFCV_WRITES = """
import sys
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter

pixels = np.load(sys.argv[1])
page = 1 << 21

class Images:
    def __len__(self):
        return len(pixels)
    def __getitem__(self, i):
        return pixels[i], int(i)

for kind in ("raw", "jpg"):
    fields = {"image": RGBImageField(write_mode=kind), "index": IntField()}
    DatasetWriter(sys.argv[2] + kind, fields, page_size=page, num_workers=1).from_indexed_dataset(Images())
"""
FFCV_READS = """
import sys
import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.decoders import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption

for kind in ("raw", "jpg"):
    pipelines = {"image": [SimpleRGBImageDecoder()], "index": [IntDecoder()]}
    loader = Loader(sys.argv[1] + kind, 10, 1, OrderOption.SEQUENTIAL, pipelines=pipelines, drop_last=False)
    batches = [(image.copy(), index.copy()) for image, index in loader]
    image, index = (np.concatenate([batch[part] for batch in batches]) for part in (0, 1))
    np.savez(sys.argv[1] + kind + ".npz", image=image, index=index)
"""
WRITES = """
import sys, zlib
from pathlib import Path
import numpy as np
from spice_dist.data.beton_writer import BetonWriter, publish_beton

folder, n = Path(sys.argv[1]), 2000
writer = BetonWriter(folder / ".pages", n, 1 << 21)
pixels = np.random.default_rng(1).integers(0, 256, (n, 40, 40, 3), np.uint8)
print("ready", flush=True)
offsets = np.array([writer.append(image.tobytes()) for image in pixels])
side = np.full(n, 40, np.uint16)
writer.finish("raw", side, side, offsets, np.full(n, 4800))
crc32 = np.array([zlib.crc32(image.tobytes()) for image in pixels], np.uint32)
publish_beton(folder / ".pages", folder / "x.beton", crc32, "new")
print("done", flush=True)
"""


def run(program: str, *arguments: Path | str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], timeout=100, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def write(path: Path, samples: list[bytes], height: int, width: int, kind: str, capacity: int = 0) -> np.ndarray:
    writer = BetonWriter(path, capacity or len(samples), PAGE)
    offsets = np.array([writer.append(data) for data in samples])
    heights, widths = (np.full(len(samples), side, np.uint16) for side in (height, width))
    writer.finish(kind, heights, widths, offsets, np.array([len(data) for data in samples]))
    return np.array([zlib.crc32(data) for data in samples], np.uint32)


def old_file(folder: Path) -> bytes:
    """A good file x.beton with its sidecar."""
    crc32 = write(folder / ".old", [bytes(12)] * 3, 2, 2, "raw")
    publish_beton(folder / ".old", folder / "x.beton", crc32, "old")
    return (folder / "x.beton").read_bytes()


def whole_or_absent(folder: Path) -> bool:
    """Whether x.beton is absent, or a whole file for which its sidecar vouches."""
    if not (folder / "x.beton").exists():
        return True
    try:
        beton.check_pixels(verify(folder / "x.beton"))
    except DamagedFile:
        return False
    return True


def test_files_are_byte_for_byte_those_of_ffcvs_own_writer(tmp_path: Path, pixels: np.ndarray):
    np.save(tmp_path / "pixels.npy", pixels)
    run(FFCV_WRITES, tmp_path / "pixels.npy", tmp_path / "ffcv")
    info = verify(tmp_path / "ffcvjpg", trusted_sidecar=False)
    assert (info.n, info.format) == (len(pixels), "jpg")
    samples = beton.Samples(info)
    encoded = [bytes(samples.encoded(i)) for i in range(info.n)]
    samples.close()
    for kind, data in (("raw", [image.tobytes() for image in pixels]), ("jpg", encoded)):
        write(tmp_path / "ours", data, 24, 24, kind)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / f"ffcv{kind}").read_bytes(), kind


def test_ffcv_reads_our_files_with_the_same_pixels_even_with_space_reserved(tmp_path: Path):
    smooth = np.random.default_rng(2).integers(0, 256, (25, 6, 4, 3), np.uint8)
    pixels = np.stack([np.asarray(Image.fromarray(image).resize((32, 48))) for image in smooth])
    files = [io.BytesIO() for _ in pixels]
    for image, file in zip(pixels, files, strict=True):
        Image.fromarray(image).save(file, "JPEG", quality=95)
    decoded = np.stack([np.asarray(Image.open(file)) for file in files])
    write(tmp_path / "raw", [image.tobytes() for image in pixels], 48, 32, "raw", capacity=200_000)
    write(tmp_path / "jpg", [file.getvalue() for file in files], 48, 32, "jpg", capacity=200_000)
    assert verify(tmp_path / "jpg", trusted_sidecar=False).offsets[0] > 2 * PAGE
    run(FFCV_READS, f"{tmp_path}/")
    # JPEG: FFCV's decoder and Pillow's differ a little; another image than asked for would differ by 80 on average
    for kind, wanted, most, average in (("raw", pixels, 0, 0), ("jpg", decoded, 16, 4)):
        with np.load(tmp_path / f"{kind}.npz") as read:
            assert read["index"].ravel().tolist() == list(range(25))
            difference = np.abs(read["image"].astype(int) - wanted)
        assert difference.max() <= most, kind
        assert difference.mean() <= average, kind


def test_samples_never_cross_a_page_whatever_their_sizes(tmp_path: Path):
    rng = np.random.default_rng(4)
    sizes = [*rng.integers(1, PAGE, 12).tolist(), PAGE, 1, PAGE - 1, 1]
    samples = [bytes([i]) * size for i, size in enumerate(sizes)]
    writer = BetonWriter(tmp_path / "x", 16, PAGE)
    offsets = [writer.append(data) for data in samples]
    writer.close()
    assert all(start % PAGE + size <= PAGE for start, size in zip(offsets, sizes, strict=True))
    whole = (tmp_path / "x").read_bytes()
    assert all(whole[start : start + len(data)] == data for start, data in zip(offsets, samples, strict=True))
    with pytest.raises(AssertionError):
        BetonWriter(tmp_path / "y", 1, PAGE).append(bytes(PAGE + 1))


def test_a_writer_that_goes_on_gives_the_bytes_of_one_that_was_never_stopped(tmp_path: Path):
    samples = [bytes([i]) * (1000 + i) for i in range(200)]
    write(tmp_path / "whole", samples, 9, 9, "jpg")
    writer = BetonWriter(tmp_path / "x", 200, PAGE)
    offsets = [writer.append(data) for data in samples[:120]]
    end = writer.position
    writer.append(b"lost")
    writer.close()
    writer = BetonWriter(tmp_path / "x", 200, PAGE, resume_at=end)
    offsets += [writer.append(data) for data in samples[120:]]
    side = np.full(200, 9, np.uint16)
    writer.finish("jpg", side, side, np.array(offsets), np.array([len(data) for data in samples]))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_file_that_was_never_finished_is_refused(tmp_path: Path):
    writer = BetonWriter(tmp_path / "x", 3, PAGE)
    writer.append(bytes(100))
    writer.close()
    with pytest.raises(DamagedFile):
        verify(tmp_path / "x", trusted_sidecar=False)


def test_killed_at_any_moment_no_file_is_left_or_a_whole_one(tmp_path: Path):
    outcomes = set()
    for i, delay in enumerate([0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 5.0]):
        folder = tmp_path / str(i)
        folder.mkdir()
        old_file(folder)
        command = [sys.executable, "-c", WRITES, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            if delay < 1:
                time.sleep(delay)
                child.send_signal(signal.SIGKILL)
            child.wait(60)
        assert whole_or_absent(folder)
        exists = (folder / "x.beton").exists()
        outcomes.add(verify(folder / "x.beton").fingerprint if exists else None)
    assert {"old", "new"} <= outcomes


@pytest.mark.parametrize("step", range(1, 6))
def test_a_failed_fsync_at_any_step_leaves_no_file_or_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    old_file(tmp_path)
    crc32 = write(tmp_path / ".new", [bytes([i]) * 12 for i in range(5)], 2, 2, "raw")
    calls = []
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == step:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    if step < 5:
        with pytest.raises((OSError, UserError)):
            publish_beton(tmp_path / ".new", tmp_path / "x.beton", crc32, "new")
    else:  # there are four
        publish_beton(tmp_path / ".new", tmp_path / "x.beton", crc32, "new")
        assert verify(tmp_path / "x.beton").fingerprint == "new"
    assert whole_or_absent(tmp_path)


def test_the_order_of_publishing_is_what_keeps_a_wrong_sidecar_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    old_file(tmp_path)
    crc32 = write(tmp_path / ".new", [bytes([i]) * 12 for i in range(5)], 2, 2, "raw")
    monkeypatch.setattr(Path, "unlink", lambda *_args, **_options: None)  # the defence: the old file goes first
    monkeypatch.setattr("spice_dist.data.beton_writer.commit", lambda *_: (_ for _ in ()).throw(OSError(5, "x")))
    with pytest.raises(OSError, match="x"):
        publish_beton(tmp_path / ".new", tmp_path / "x.beton", crc32, "new")
    assert not whole_or_absent(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_the_old_file_intact(tmp_path: Path):
    before = old_file(tmp_path)
    limit = 4 << 20

    def bounded() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(tmp_path)], preexec_fn=bounded, capture_output=True, text=True, timeout=60
    )
    assert "File too large" in done.stderr
    assert (tmp_path / "x.beton").read_bytes() == before
    assert whole_or_absent(tmp_path)
    run(WRITES, tmp_path)  # without the limit it is written
    assert verify(tmp_path / "x.beton").fingerprint == "new"


def test_bytes_that_differ_from_what_was_stored_are_found_before_they_are_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    crc32 = write(tmp_path / ".new", [bytes(12)] * 5, 2, 2, "raw")
    crc32[3] ^= 1
    with pytest.raises(DamagedFile, match="image 3 "):
        publish_beton(tmp_path / ".new", tmp_path / "x.beton", crc32, "new")
    assert not (tmp_path / "x.beton").exists()
    assert not sidecar_path(tmp_path / "x.beton").exists()
    monkeypatch.setattr(beton, "check_pixels", lambda _: None)
    publish_beton(tmp_path / ".new", tmp_path / "x.beton", crc32, "new")  # only that comparison finds it
    assert not list(tmp_path.glob(".x*"))


def test_pages_are_powers_of_two_that_hold_a_sample():
    for side in (2, 32, 224, 512, 4096):
        page = page_size_for(side * side * 3)
        assert page >= max(1 << 21, side * side * 3)
        assert page & (page - 1) == 0
        assert page <= 1 << 30
