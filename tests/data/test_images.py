"""The loaders: whatever serves them, batches are the source's pixels in the order asked for."""

import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spice_dist.data import ffcv_loader, images
from spice_dist.data.beton import verify
from spice_dist.data.ffcv_loader import FFCVImages
from spice_dist.data.images import Handover, Images, open_images, to_grey
from spice_dist.data.ingest import ingest
from spice_dist.data.resident import ResidentImages
from spice_dist.data.sources import Source
from spice_dist.data.torch_loader import TorchImages
from spice_dist.errors import DamagedFile, UserError

CPU = torch.device("cpu")
ORDERS = {
    "sequential": np.arange(2600),
    "permuted": np.random.default_rng(0).permutation(2600),
    "repeats, longer than the set": np.random.default_rng(1).integers(0, 2600, 6000),
    "one image": np.array([2599]),
    "int32": np.array([3, 3, 3, 0], np.int32),
}


@pytest.fixture(params=["ffcv", "torch", "npy", "resident"])
def served(request: pytest.FixtureRequest, packed: Path, tmp_path: Path) -> Iterator[Images]:
    """The same images through each loader."""
    if request.param == "npy":
        for name in ("images.npy", "paths.jsonl", "manifest.json"):
            shutil.copy(packed / name, tmp_path / name)
        opened = open_images(tmp_path, device=CPU, resident_bytes=0)
    elif request.param == "resident":
        opened = open_images(packed, device=CPU, loader="torch")
        assert isinstance(opened, ResidentImages)
    else:
        opened = open_images(packed, device=CPU, loader=request.param, resident_bytes=0)
        assert isinstance(opened, FFCVImages if request.param == "ffcv" else TorchImages)
    yield opened
    opened.close()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch_size", [1, 100, 4096])
def test_batches_are_the_sources_pixels_bit_for_bit_in_the_order_asked_for(
    served: Images, pixels: np.ndarray, order: str, batch_size: int
):
    wanted = ORDERS[order][: 300 if batch_size == 1 else None]
    position = 0
    for batch, index in served.batches(wanted, batch_size):
        expected = wanted[position : position + batch_size]
        assert index.dtype == torch.int64
        assert np.array_equal(index.numpy(), expected)
        assert batch.dtype == torch.uint8
        assert batch.is_contiguous()
        assert np.array_equal(batch.numpy(), pixels[expected].transpose(0, 3, 1, 2))
        position += len(expected)
    assert position == len(wanted)


def test_wrong_orders_are_refused_at_once_by_every_loader(served: Images):
    assert isinstance(served, Images)
    for order, batch_size, error in [
        (np.array([], int), 4, ValueError),
        (np.array([0, 2600]), 4, IndexError),
        (np.array([-1]), 4, IndexError),
        (np.arange(4), 0, ValueError),
    ]:
        with pytest.raises(error):
            served.batches(order, batch_size)


def test_batches_stay_what_they_were_while_later_ones_are_read(served: Images, pixels: np.ndarray):
    kept = [batch for batch, _ in served.batches(np.arange(2600), 64)]
    assert np.array_equal(torch.cat(kept).numpy(), pixels.transpose(0, 3, 1, 2))


def test_sixty_early_breaks_leave_no_thread_behind(served: Images):
    next(iter(served.batches(np.arange(2600), 16)))
    before = threading.active_count()
    for i in range(60):
        for _ in served.batches(np.arange(2600), 16):
            if i % 2:
                time.sleep(0.002)  # the reader is ahead and waits for room
            break
    assert threading.active_count() <= before


def test_two_passes_at_once_do_not_disturb_each_other(served: Images, pixels: np.ndarray):
    there, back = np.arange(500), np.arange(2599, 2099, -1)
    for (a, _), (b, _) in zip(served.batches(there, 50), served.batches(back, 70), strict=False):
        assert a.shape[0] == 50
        assert b.shape[0] in (70, 500 % 70)
    first = [a for (a, _), _ in zip(served.batches(there, 50), served.batches(back, 50), strict=True)]
    assert np.array_equal(torch.cat(first).numpy(), pixels[there].transpose(0, 3, 1, 2))


def test_the_number_of_torch_threads_is_left_alone(packed: Path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        opened = open_images(packed, device=CPU, loader="ffcv", resident_bytes=0)
        list(opened.batches(np.arange(100), 10))
        assert torch.get_num_threads() == 2
        opened.close()
        with pytest.raises(ValueError, match="closed"):
            opened.batches(np.arange(2), 1)
    finally:
        torch.set_num_threads(before)


def test_one_compiled_loader_serves_files_of_other_sizes(
    packed_folders: dict[str, Path], pixels: np.ndarray, small_pixels: np.ndarray
):
    small = open_images(packed_folders["small"], device=CPU, loader="ffcv", resident_bytes=0)
    large = open_images(packed_folders["main"], device=CPU, loader="ffcv", resident_bytes=0)
    list(large.batches(np.arange(10), 5))
    compiled = ffcv_loader._shared["loader"]
    started = time.monotonic()
    for (a, i), (b, j) in zip(small.batches(np.arange(70), 7), large.batches(np.arange(70), 7), strict=True):
        assert np.array_equal(a.numpy(), small_pixels[i.numpy()].transpose(0, 3, 1, 2))
        assert np.array_equal(b.numpy(), pixels[j.numpy()].transpose(0, 3, 1, 2))
    assert ffcv_loader._shared["loader"] is compiled
    assert time.monotonic() - started < 2


# ---------------------------------------------------------------- faults


def stock_pass(opened: FFCVImages) -> Any:
    """FFCV's own iterator over the same file."""
    from ffcv.loader.epoch_iterator import EpochIterator

    list(opened.batches(np.arange(4), 2))
    loader = ffcv_loader._shared["loader"]
    loader.batch_size = 16
    threads = torch.get_num_threads()
    stock = EpochIterator(loader, np.arange(2600))  # type: ignore
    torch.set_num_threads(threads)
    return stock


def test_an_error_in_ffcvs_thread_reaches_the_consumer_where_stock_ffcv_hangs(
    packed: Path, monkeypatch: pytest.MonkeyPatch
):
    from ffcv.loader.epoch_iterator import EpochIterator

    opened = open_images(packed, device=CPU, loader="ffcv", resident_bytes=0)
    assert isinstance(opened, FFCVImages)
    stock = stock_pass(opened)
    good = EpochIterator.run_pipeline

    def fail_at_three(self: Any, number: int, *args: Any) -> Any:
        if number >= 3:
            raise OSError("the disk went away")
        return good(self, number, *args)

    stock.close()
    monkeypatch.setattr(EpochIterator, "run_pipeline", fail_at_three)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="the disk went away"):
        list(opened.batches(np.arange(2600), 100))
    assert time.monotonic() - started < 5

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    stock = stock_pass_only(ffcv_loader._shared["loader"])
    consumer = threading.Thread(target=lambda: [None for _ in stock], daemon=True)
    consumer.start()
    consumer.join(2)
    assert consumer.is_alive()  # without the defence it waits for ever
    stock.output_queue.put(None)
    consumer.join(5)


def stock_pass_only(loader: Any) -> Any:
    from ffcv.loader.epoch_iterator import EpochIterator

    threads = torch.get_num_threads()
    try:
        return EpochIterator(loader, np.arange(2600))  # type: ignore
    finally:
        torch.set_num_threads(threads)


def test_stock_ffcv_leaks_the_thread_that_ours_joins(packed: Path):
    opened = open_images(packed, device=CPU, loader="ffcv", resident_bytes=0)
    assert isinstance(opened, FFCVImages)
    before = threading.active_count()
    stock = stock_pass(opened)
    next(stock)
    time.sleep(0.5)
    assert threading.active_count() == before + 1
    stock.terminate_event.set()
    stock.join(5)


def test_an_error_in_the_torch_loaders_thread_reaches_the_consumer(packed: Path, tmp_path: Path):
    for name in ("dataset.beton", "dataset.beton.json"):
        shutil.copy(packed / name, tmp_path / name)
    opened = open_images(tmp_path, device=CPU, loader="torch", resident_bytes=0)
    batches = opened.batches(np.arange(2600), 100)
    next(batches)
    with open(tmp_path / "dataset.beton", "r+b") as file:
        file.truncate(3 << 20)
    with pytest.raises(RuntimeError, match="cut short"):
        list(batches)


def test_a_reader_that_stalls_or_dies_silently_is_an_error_in_bounded_time():
    sleeper = threading.Thread(target=time.sleep, args=(5,), daemon=True)
    sleeper.start()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no batch for 0.5 s; its thread is at .*:\d+"):
        Handover(2, stall_s=0.5).get(sleeper)
    dead = threading.Thread(target=lambda: None)
    dead.start()
    dead.join()
    with pytest.raises(RuntimeError, match="without a word"):
        Handover(2).get(dead)
    assert time.monotonic() - started < 3


def test_other_images_than_asked_for_are_an_error(packed: Path, monkeypatch: pytest.MonkeyPatch):
    opened = open_images(packed, device=CPU, loader="ffcv", resident_bytes=0)
    start = ffcv_loader._start_pass
    monkeypatch.setattr(ffcv_loader, "_start_pass", lambda r, m, order, b: start(r, m, order[::-1].copy(), b))
    with pytest.raises(RuntimeError, match="other images"):
        list(opened.batches(np.arange(50), 10))


def test_a_file_replaced_between_verification_and_opening_is_refused(beton_copy: Path):
    info = verify(beton_copy)
    shutil.copy(beton_copy, beton_copy.parent / "new")
    (beton_copy.parent / "new").replace(beton_copy)
    with pytest.raises(DamagedFile, match="replaced"):
        FFCVImages(info, CPU, 3)


# ---------------------------------------------------------------- opening


def test_damage_is_found_before_any_loader_opens_the_file(beton_copy: Path):
    offset = int(verify(beton_copy).offsets[77])
    with open(beton_copy, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    for loader in ("ffcv", "torch"):
        with pytest.raises(DamagedFile, match="image 77 "):
            open_images(beton_copy.parent, device=CPU, loader=loader)


def test_a_file_written_from_other_images_than_the_manifests_is_refused(packed: Path, beton_copy: Path):
    other = np.zeros((2600, 24, 24, 3), np.uint8)
    ingest(Source("zeros", [str(i) for i in range(2600)], other.__getitem__), 24, beton_copy.parent)
    with pytest.raises(DamagedFile, match="other images"):
        open_images(beton_copy.parent, device=CPU)


def test_altered_npy_pixels_are_refused(packed: Path, tmp_path: Path):
    for name in ("images.npy", "paths.jsonl", "manifest.json"):
        shutil.copy(packed / name, tmp_path / name)
    content = bytearray((tmp_path / "images.npy").read_bytes())
    content[5000] ^= 1
    (tmp_path / "images.npy").write_bytes(content)
    with pytest.raises(DamagedFile, match="other pixels"):
        open_images(tmp_path, device=CPU)
    (tmp_path / "images.npy").write_bytes(content[:-1])
    with pytest.raises(DamagedFile, match="cut short"):
        open_images(tmp_path, device=CPU)


def test_mistakes_in_opening_are_one_line_that_helps(packed: Path, tmp_path: Path):
    shutil.copy(packed / "images.npy", tmp_path / "images.npy")
    shutil.copy(packed / "manifest.json", tmp_path / "manifest.json")
    for options, words in [({"loader": "dali"}, "ffcv"), ({"channels": 4}, "1"), ({"loader": "ffcv"}, "dataset.beton")]:
        with pytest.raises(UserError, match=words):
            open_images(tmp_path, device=CPU, **options)
    with pytest.raises(UserError, match="pack"):
        open_images(tmp_path / "nowhere", device=CPU)


def test_without_ffcv_the_torch_loader_takes_over_and_says_so_once(
    packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setattr(images, "_told", set())
    with caplog.at_level(logging.WARNING, "spice_dist.data"):
        for _ in range(2):
            assert isinstance(open_images(packed, device=CPU, resident_bytes=0), TorchImages)
    assert [("pip install" in record.message) for record in caplog.records] == [True]
    with pytest.raises(UserError, match="pip install"):
        open_images(packed, device=CPU, loader="ffcv")


def test_grey_is_itu_601_and_exact_where_the_channels_agree(packed: Path, pixels: np.ndarray):
    from PIL import Image

    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_grey(every), every[:, :1])
    expected = np.stack([np.asarray(Image.fromarray(p).convert("L")) for p in pixels[:200]])[:, None]
    for resident_bytes in (0, 1 << 30):
        for loader in ("ffcv", "torch"):
            opened = open_images(packed, device=CPU, channels=1, loader=loader, resident_bytes=resident_bytes)
            assert opened.channels == 1
            batch, _ = next(iter(opened.batches(np.arange(200), 200)))
            assert np.array_equal(batch.numpy(), expected)
            opened.close()


def test_a_set_is_kept_on_the_device_exactly_when_it_fits(packed: Path):
    size = 2600 * 24 * 24 * 3
    for resident_bytes, kind in ((size, ResidentImages), (size - 1, TorchImages)):
        opened = open_images(packed, device=CPU, loader="torch", resident_bytes=resident_bytes)
        assert type(opened) is kind
        opened.close()
