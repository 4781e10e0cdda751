import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from spice_dist.data import ffcv_writer
from spice_dist.data.beton import verify
from spice_dist.data.ffcv_writer import page_size_for, write_beton
from spice_dist.errors import DamagedFile, UserError

# Run in the child instead of the plain writer: FFCV's encoding job fails in the way that its folder is named after.
FAULTY_CHILD = """
import os, pathlib, resource, sys
import ffcv.writer
from spice_dist.data import ffcv_writer
fault = pathlib.Path(sys.argv[2]).parent.name
good = ffcv.writer.worker_job_indexed_dataset
def job(*args):
    if fault in ("raises", "fails unheard"):
        raise ValueError("no luck")
    if fault == "is killed":
        os.kill(os.getpid(), 9)
    if fault == "fills the disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
    if fault == "stores other pixels":
        args[-1]._images = 255 - args[-1]._images[:]
    good(*args)
ffcv.writer.worker_job_indexed_dataset = job
if fault == "fails unheard":
    ffcv_writer._end_when_the_job_fails = lambda *_: None
if fault == "dies":
    os.kill(os.getpid(), 9)
ffcv_writer._child(*sys.argv[1:])
"""
OUTCOMES = {
    "raises": (UserError, "ValueError: no luck"),
    "is killed": (UserError, "killed by signal 9"),
    "dies": (UserError, "killed by signal 9"),
    "fills the disk": (UserError, "File too large"),
    "stores other pixels": (DamagedFile, "have changed"),
    "fails unheard": (UserError, "wrote nothing"),  # the child waits for ever, as stock FFCV does: the bound ends it
}


def test_every_fault_of_the_writer_is_an_error_in_bounded_time_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ffcv_writer, "CHILD", (sys.executable, "-c", FAULTY_CHILD))
    images = np.random.default_rng(0).integers(0, 256, (800, 40, 40, 3), np.uint8)

    def outcome(fault: str) -> tuple[BaseException | None, float]:
        folder = tmp_path / fault
        folder.mkdir()
        np.save(folder / "images.npy", images)
        started = time.monotonic()
        try:
            write_beton(
                folder / "images.npy", folder / "dataset.beton", silence_s=10.0 if "unheard" in fault else 100.0
            )
        except UserError as error:
            return error, time.monotonic() - started
        return None, 0

    with ThreadPoolExecutor(len(OUTCOMES)) as pool:
        outcomes = dict(zip(OUTCOMES, pool.map(outcome, OUTCOMES), strict=True))
    for fault, (error, seconds) in outcomes.items():
        kind, message = OUTCOMES[fault]
        assert type(error) is kind, (fault, error)
        assert message in str(error), (fault, error)
        assert seconds < 90, fault
        assert [path.name for path in (tmp_path / fault).iterdir()] == ["images.npy"]
    assert not list(Path("/dev/shm").glob(f"spice_dist_{ffcv_writer.os.getpid()}_*"))


def test_the_same_images_give_the_same_bytes(packed_folders: dict[str, Path]):
    first, again = (packed_folders[name] / "dataset.beton" for name in ("main", "again"))
    assert first.read_bytes() == again.read_bytes()
    assert verify(first).sha256 == verify(again).sha256


def test_progress_grows_to_the_number_of_images(tmp_path: Path):
    class Child(subprocess.Popen):
        """Stands for a process that writes a page between two looks, five in all."""

        def __init__(self, out: Path):
            self.out = out

        def poll(self) -> int | None:
            size = self.out.stat().st_size if self.out.exists() else 0
            if size == 5 << 21:
                return 0
            self.out.write_bytes(bytes(size + (1 << 21)))
            return None

    seen: list[tuple[int, int]] = []
    images = np.zeros((90, 128, 128, 3), np.uint8)
    out = tmp_path / "x"
    watch = ffcv_writer._watch
    watch(Child(out), out, 1 << 21, images, lambda done, total: seen.append((done, total)), 9.0)
    assert seen == [(0, 90), (42, 90), (84, 90), (90, 90), (90, 90), (90, 90)]


@pytest.mark.parametrize("array", [np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 4, 4), np.uint8)])
def test_images_of_another_kind_are_refused_before_a_process_is_started(tmp_path: Path, array: np.ndarray):
    np.save(tmp_path / "images.npy", array)
    with pytest.raises(DamagedFile, match="uint8"):
        write_beton(tmp_path / "images.npy", tmp_path / "x.beton")


def test_pages_are_powers_of_two_that_hold_a_sample():
    for side in (2, 32, 224, 512, 4096):
        page = page_size_for(side * side * 3)
        assert page >= max(1 << 21, side * side * 3)
        assert page & (page - 1) == 0
        assert page < 1 << 32
