"""The loaders: whatever serves them, batches are the source's pixels in the order asked for."""

import io
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from spice_dist.data import ffcv_decoder, loaders
from spice_dist.data import packed as packed_module
from spice_dist.data.augment import view_batches
from spice_dist.data.beton import verify
from spice_dist.data.crops import Crop, boxes, central_squares
from spice_dist.data.ffcv_decoder import FFCVDecoder
from spice_dist.data.handover import Handover
from spice_dist.data.images import Images, to_grey
from spice_dist.data.ingest import ingest
from spice_dist.data.loaders import open_images
from spice_dist.data.packed import PackedImages
from spice_dist.data.pillow_decoder import PillowDecoder
from spice_dist.data.resident import ResidentImages, load_resident
from spice_dist.data.sources import Source, from_array
from spice_dist.data.torchvision_decoder import TorchvisionDecoder
from spice_dist.data.views import MOCO_V2, View
from spice_dist.errors import DamagedFile, UserError
from tests.pretend_gpu import DEVICE, OnDevice, pretend_gpu

CPU = torch.device("cpu")
ORDERS = {
    "sequential": np.arange(2600),
    "permuted": np.random.default_rng(0).permutation(2600),
    "repeats, longer than the set": np.random.default_rng(1).integers(0, 2600, 6000),
    "one image": np.array([2599]),
    "int32": np.array([3, 3, 3, 0], np.int32),
}


@pytest.fixture(params=["ffcv", "torch", "resident"])
def served(request: pytest.FixtureRequest, packed: Path) -> Iterator[Images]:
    """The same images through each loader."""
    if request.param == "resident":
        opened = open_images(packed, device=CPU, size=24, loader="torch")
        assert isinstance(opened, ResidentImages)
    else:
        opened = open_images(packed, device=CPU, size=24, loader=request.param, resident_bytes=0)
        assert isinstance(opened, PackedImages)
    assert not opened.decodes
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


def test_the_number_of_torch_threads_is_left_alone(jpg_folder: Path):
    """Importing FFCV sets it to one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ffcv_decoder._native.cache_clear()
        loaders._decoder.cache_clear()
        with closing(open_images(jpg_folder, device=CPU, size=24, loader="ffcv")) as opened:
            list(opened.batches(np.arange(10), 5))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- decoding and cropping


def photographs(count: int = 24) -> np.ndarray:
    """Parts of a photograph, (N, 120, 150, 3)."""
    photo = load_sample_image("china.jpg")
    rng = np.random.default_rng(0)
    starts = zip(rng.integers(0, 300, count), rng.integers(0, 480, count), strict=True)
    return np.stack([photo[top : top + 120, left : left + 150] for top, left in starts])


@pytest.fixture(scope="module")
def jpg_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    ingest(from_array(photographs()), folder, size=100, format="jpg")
    return folder


@pytest.fixture(params=["ffcv", "torch"])
def jpg(request: pytest.FixtureRequest, jpg_folder: Path) -> Iterator[Images]:
    with closing(open_images(jpg_folder, device=CPU, size=48, loader=request.param, threads=2)) as opened:
        assert opened.decodes
        yield opened


def pillow(folder: Path, i: int) -> Any:
    """The stored JPEG of image i, decoded by Pillow."""
    from spice_dist.data.beton import Samples

    with closing(Samples(verify(folder / "dataset.beton"))) as samples:
        return Image.open(io.BytesIO(samples.encoded(i))).convert("RGB")


def check_part(view: np.ndarray, whole: Any, box: tuple[int, int, int, int]) -> None:
    """By a third filter: close to this part, and closer than to one that lies two pixels beside it."""

    def distance(shift: int) -> float:
        moved = tuple(min(max(side + shift, 0), limit) for side, limit in zip(box, whole.size * 2, strict=True))
        part = whole.resize(view.shape[:2], Image.Resampling.BILINEAR, box=moved)
        return float(np.abs(view.astype(int) - np.asarray(part)).mean())

    assert distance(0) < 8
    assert distance(0) < min(distance(-2), distance(2))


def test_the_plain_image_is_the_central_square_resized(jpg: Images, jpg_folder: Path):
    order = np.array([12, 0, 20, 12])  # not of the sky, which looks the same two pixels on
    ((batch, index),) = jpg.batches(order, 10)
    assert index.tolist() == order.tolist()
    for view, i in zip(batch.permute(0, 2, 3, 1).numpy(), order, strict=True):
        whole = pillow(jpg_folder, int(i))
        assert min(whole.size) == 100
        (left, top, side, _), *_ = central_squares(np.array([whole.height]), np.array([whole.width])).tolist()
        check_part(view, whole, (left, top, left + side, top + side))


def test_both_decoders_agree_within_the_stated_bound(jpg_folder: Path):
    """FFCV takes short cuts in the inverse cosine transform; Pillow weighs the pixels of a box a little differently."""
    crops = [(Crop((0.2, 1.0), 48), (0, 0, stream)) for stream in (0, 1)]
    served = []
    for loader in ("ffcv", "torch"):
        with closing(open_images(jpg_folder, device=CPU, size=48, loader=loader)) as opened:
            served.append([torch.stack(parts).int() for parts, _ in opened.crops(np.arange(24), 10, crops)])
    difference = torch.cat([(a - b).abs().flatten() for a, b in zip(*served, strict=True)]).float()
    assert difference.mean() < 2
    assert difference.max() <= 40


def test_crops_are_the_drawn_boxes_whatever_the_batch_and_the_threads(jpg_folder: Path, jpg: Images):
    key = (3, 1, 0)
    crop = Crop((0.2, 0.6), 32)
    order = np.random.default_rng(0).permutation(24)
    (((whole,), _),) = jpg.crops(order, 24, [(crop, key)])
    loader = "ffcv" if isinstance(jpg._decoder, FFCVDecoder) else "torch"  # type: ignore
    with closing(open_images(jpg_folder, device=CPU, size=48, loader=loader, threads=1)) as other:
        batches = list(other.crops(np.arange(24), 7, [(crop, key)]))
    parts = torch.cat([part for (part,), _ in batches])
    assert torch.equal(whole, parts[torch.from_numpy(order)])
    box = boxes(crop, key, order, np.full(24, 100), np.full(24, 125))
    for view, i, (left, top, width, height) in zip(whole, order, box.tolist(), strict=True):
        place = (left, top, left + width, top + height)
        check_part(view.permute(1, 2, 0).numpy(), pillow(jpg_folder, int(i)), place)


def test_every_image_is_decoded_once_for_all_crops(jpg: Images, monkeypatch: pytest.MonkeyPatch):
    count = [0]
    good = PackedImages._pixels

    def counted(self: PackedImages, i: int) -> np.ndarray:
        count[0] += 1
        return good(self, i)

    monkeypatch.setattr(PackedImages, "_pixels", counted)
    crops = [(Crop((0.2, 1.0), 28), (0, 0, stream)) for stream in range(2)]
    crops += [(Crop((0.08, 0.4), 18), (0, 0, stream)) for stream in range(2, 6)]
    shapes = [[tuple(part.shape) for part in parts] for parts, _ in jpg.crops(np.arange(24), 12, crops)]
    assert shapes == [[(12, 3, 28, 28)] * 2 + [(12, 3, 18, 18)] * 4] * 2
    assert count[0] == 24


def test_views_of_whole_images_and_of_squares_draw_the_same_boxes(tmp_path: Path):
    """Images that are square already: cut by the loader from the JPEG, or by the device from the raw pixels."""
    squares = photographs()[:, :96, :96]
    ingest(from_array(squares), tmp_path / "jpg", size=96, format="jpg", quality=100)
    ingest(from_array(squares), tmp_path / "raw", size=96, format="raw")
    view = View(crop_scale=(0.3, 0.9), size=48)
    found = []
    for kind in ("jpg", "raw"):
        with closing(
            open_images(tmp_path / kind, device=CPU, size=48 if kind == "jpg" else 96, loader="torch")
        ) as opened:
            found.append(
                torch.cat([views[0] for views, _ in view_batches(opened, np.arange(24), 8, [(view, (0, 2, 1))])])
            )
    assert (found[0] - found[1]).abs().mean() < 0.15  # of values with deviation 1: other filters, the same places
    shifted = torch.roll(found[1], 6, dims=3)
    assert (found[0] - shifted).abs().mean() > 0.3


def test_raw_squares_of_another_size_are_resized(packed: Path, pixels: np.ndarray):
    for loader in ("ffcv", "torch"):
        with closing(open_images(packed, device=CPU, size=12, loader=loader)) as opened:
            assert opened.decodes
            ((batch, _),) = opened.batches(np.arange(5), 5)
            expected = pixels[:5].reshape(5, 12, 2, 12, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
            tolerance = 1 if loader == "ffcv" else 40  # of noise, which Pillow's filter weighs differently
            assert np.abs(batch.numpy() - expected).max() <= tolerance


def test_two_views_of_an_epoch_come_from_one_read_and_differ(jpg: Images):
    views = [(MOCO_V2, (0, 0, stream)) for stream in (0, 1)]
    (query, key), index = next(iter(view_batches(jpg, np.arange(24), 24, views)))
    assert query.shape == key.shape == (24, 3, 48, 48)
    assert index.tolist() == list(range(24))
    assert ((query - key).abs().amax((1, 2, 3)) > 0.02).all()


# ---------------------------------------------------------------- faults


def test_damaged_bytes_never_reach_the_decoder_where_stock_ffcv_shows_another_image(
    jpg_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Damage after the file was opened: FFCV's decoder reports nothing that stock FFCV would look at."""
    shutil.copytree(jpg_folder, tmp_path / "set")
    path = tmp_path / "set/dataset.beton"
    for loader in ("ffcv", "torch"):
        with closing(open_images(tmp_path / "set", device=CPU, size=48, loader=loader)) as opened:
            info = verify(path)
            with open(path, "r+b") as file:
                file.seek(int(info.offsets[3]))
                good = file.read(300)
                file.seek(int(info.offsets[3]))
                file.write(bytes(300))
            with pytest.raises(RuntimeError, match="image 3 has changed"):
                list(opened.batches(np.arange(24), 8))
            opened._samples.info = replace(opened._samples.info, crc32=None)  # type: ignore
            with pytest.raises(RuntimeError, match="is not a JPEG of 125x100"):  # without the checksum: the header
                list(opened.batches(np.arange(24), 8))
            with monkeypatch.context() as patch:
                patch.setattr(packed_module, "jpeg_size", lambda data: (100, 125))
                with pytest.raises(RuntimeError, match="cannot be decoded"):  # without both: the return code
                    list(opened.batches(np.arange(24), 8))
            with open(path, "r+b") as file:
                file.seek(int(info.offsets[3]))
                file.write(good)
    from ffcv.libffcv import imdecode

    stale = np.full((100, 125, 3), 77, np.uint8)
    imdecode(np.zeros(300, np.uint8), stale, 100, 125, 100, 125)
    assert (stale == 77).all()  # what stock FFCV, which looks at no return code, would serve


@pytest.mark.parametrize("quality", [20, 95])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_torchvision_decodes_the_pixels_of_pillow_bit_for_bit(subsampling: str, quality: int):
    for name, box in (("china.jpg", (0, 0, 341, 256)), ("flower.jpg", (3, 5, 130, 104))):
        file = io.BytesIO()
        photograph = Image.fromarray(load_sample_image(name)).crop(box)
        photograph.save(file, "JPEG", quality=quality, subsampling=subsampling)
        pixels = [np.zeros((photograph.height, photograph.width, 3), np.uint8) for _ in range(2)]
        PillowDecoder().decode(bytearray(file.getvalue()), pixels[0])
        TorchvisionDecoder().decode(bytearray(file.getvalue()), pixels[1])
        assert pixels[0].std() > 20
        assert np.array_equal(pixels[0], pixels[1])


@pytest.mark.parametrize("decoder", [PillowDecoder, TorchvisionDecoder])
def test_a_stored_image_that_is_cut_off_is_a_damaged_file(decoder: type):
    file = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).save(file, "JPEG")
    with pytest.raises(DamagedFile, match="cannot be decoded"):
        decoder().decode(bytearray(file.getvalue()[:3000]), np.zeros((427, 640, 3), np.uint8))


class Stuck(PillowDecoder):
    """Stands for a decoder that meets a file system which does not answer."""

    def decode(self, data: bytearray, out: np.ndarray) -> None:
        time.sleep(3)


@pytest.mark.parametrize("decoder", [FFCVDecoder, PillowDecoder, TorchvisionDecoder])
def test_a_jpeg_of_another_size_than_the_file_states_is_refused_and_only_by_its_header(
    jpg_folder: Path, monkeypatch: pytest.MonkeyPatch, decoder: type
):
    info = verify(jpg_folder / "dataset.beton")
    larger = replace(info, heights=info.heights + np.uint16(8), widths=info.widths + np.uint16(8))
    with closing(PackedImages(larger, decoder(), CPU, 48, 3, 1)) as opened:
        with pytest.raises(RuntimeError, match="image 3 is not a JPEG of"):
            list(opened.batches(np.array([3]), 1))
        if decoder is FFCVDecoder:  # Pillow's pixels do not fit the buffer; libjpeg-turbo leaves the rest as it was
            monkeypatch.setattr(packed_module, "jpeg_size", lambda data: (larger.heights[3], larger.widths[3]))
            assert len(list(opened.batches(np.array([3]), 1))) == 1


def test_a_decoder_that_stalls_is_an_error_in_bounded_time(jpg_folder: Path, monkeypatch: pytest.MonkeyPatch):
    opened = PackedImages(verify(jpg_folder / "dataset.beton"), Stuck(), CPU, 48, 3, 2)

    def consume() -> list[str]:
        try:
            list(opened.batches(np.arange(24), 24))
        except RuntimeError as error:
            return [str(error)]
        return []

    monkeypatch.setattr(packed_module, "Handover", lambda length: Handover(length, stall_s=0.5))
    started = time.monotonic()
    assert "no batch for 0.5 s" in consume()[0]
    assert time.monotonic() - started < 3

    monkeypatch.setattr(packed_module, "Handover", lambda length: Handover(length, stall_s=1e9))
    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    consumer.join(2)
    assert consumer.is_alive()  # without the bound it waits as long as the decoder


STALL = """
import sys, time
from pathlib import Path
import numpy as np, torch
from spice_dist.data import packed
from spice_dist.data.beton import verify
from spice_dist.data.handover import Handover
from spice_dist.data.pillow_decoder import PillowDecoder

class Stuck(PillowDecoder):
    def decode(self, data, out): time.sleep(1000)

packed.Handover = lambda length: Handover(length, stall_s=0.5)
opened = packed.PackedImages(verify(Path(sys.argv[1])), Stuck(), torch.device("cpu"), 48, 3, 2)
try:
    list(opened.batches(np.arange(24), 24))
except RuntimeError as error:
    print(error)
"""


def test_a_process_whose_decoder_hangs_for_ever_still_ends(jpg_folder: Path):
    command = [sys.executable, "-c", STALL, str(jpg_folder / "dataset.beton")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "no batch for 0.5 s" in done.stdout


def test_memory_and_threads_stay_over_twenty_epochs_with_early_breaks(jpg: Images):
    import psutil

    me = psutil.Process()
    crops = [(Crop((0.2, 1.0), 48), (0, 0, 0))]
    seen = []
    for _ in range(21):
        for _, _ in zip(range(2), jpg.crops(np.arange(24), 6, crops), strict=False):
            pass
        list(jpg.batches(np.arange(24), 5))
        seen.append((me.memory_info().rss, threading.active_count()))
    assert seen[-1][0] - seen[2][0] < 8 << 20
    assert seen[-1][1] <= seen[2][1]


def test_an_error_in_the_torch_loaders_thread_reaches_the_consumer(packed: Path, tmp_path: Path):
    for name in ("dataset.beton", "dataset.beton.json"):
        shutil.copy(packed / name, tmp_path / name)
    opened = open_images(tmp_path, device=CPU, size=24, loader="torch", resident_bytes=0)
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


def test_a_file_replaced_between_verification_and_opening_is_refused(beton_copy: Path):
    info = verify(beton_copy)
    shutil.copy(beton_copy, beton_copy.parent / "new")
    (beton_copy.parent / "new").replace(beton_copy)
    with pytest.raises(DamagedFile, match="replaced"):
        PackedImages(info, FFCVDecoder(), CPU, 24, 3, 1)


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
            open_images(beton_copy.parent, device=CPU, size=24, loader=loader)


def test_a_file_written_from_other_images_than_the_manifests_is_refused(packed: Path, beton_copy: Path):
    other = np.zeros((2600, 24, 24, 3), np.uint8)
    ingest(Source("zeros", [str(i) for i in range(2600)], other.__getitem__), beton_copy.parent / "other", size=24)
    shutil.copy(beton_copy.parent / "other/manifest.json", beton_copy.parent)
    with pytest.raises(DamagedFile, match="other images"):
        open_images(beton_copy.parent, device=CPU, size=24)


def test_mistakes_in_opening_are_one_line_that_helps(packed: Path, tmp_path: Path):
    for options, words in [({"loader": "dali"}, "ffcv"), ({"channels": 4}, "1")]:
        with pytest.raises(UserError, match=words):
            open_images(packed, device=CPU, size=24, **options)
    with pytest.raises(UserError, match="pack"):
        open_images(tmp_path / "nowhere", device=CPU, size=24)


def test_without_ffcv_torchvision_takes_over_and_says_so_once(
    jpg_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    ffcv_decoder._native.cache_clear()
    loaders._decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setitem(sys.modules, "ffcv.libffcv", None)
    try:
        with caplog.at_level(logging.WARNING, "spice_dist.data"):
            for _ in range(2):
                with closing(open_images(jpg_folder, device=CPU, size=48)) as opened:
                    assert isinstance(opened._decoder, TorchvisionDecoder)  # type: ignore
        assert [("pip install" in record.message) for record in caplog.records] == [True]
        with pytest.raises(UserError, match="pip install"):
            open_images(jpg_folder, device=CPU, size=48, loader="ffcv")
    finally:
        ffcv_decoder._native.cache_clear()
        loaders._decoder.cache_clear()


def test_grey_is_itu_601_and_exact_where_the_channels_agree(packed: Path, pixels: np.ndarray):
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_grey(every), every[:, :1])
    expected = np.stack([np.asarray(Image.fromarray(p).convert("L")) for p in pixels[:200]])[:, None]
    for resident_bytes in (0, 1 << 30):
        for loader in ("ffcv", "torch"):
            opened = open_images(packed, device=CPU, size=24, channels=1, loader=loader, resident_bytes=resident_bytes)
            assert opened.channels == 1
            batch, _ = next(iter(opened.batches(np.arange(200), 200)))
            assert np.array_equal(batch.numpy(), expected)
            opened.close()


def test_a_set_is_kept_on_the_device_exactly_when_it_fits(packed: Path):
    size = 2600 * 24 * 24 * 3
    for resident_bytes, kind in ((size, ResidentImages), (size - 1, PackedImages)):
        opened = open_images(packed, device=CPU, size=24, loader="torch", resident_bytes=resident_bytes)
        assert type(opened) is kind
        opened.close()


def test_a_gpu_keeps_what_a_third_of_its_free_memory_holds(monkeypatch: pytest.MonkeyPatch):
    """Free is also what PyTorch has reserved and not given out."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6_000, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    assert loaders.resident_limit(torch.device("cuda")) == 3_000
    assert loaders.resident_limit(CPU) == loaders.RESIDENT_BYTES


def test_photographs_that_are_read_again_and_again_are_decoded_once(jpg: Images, monkeypatch: pytest.MonkeyPatch):
    order = np.random.default_rng(0).integers(0, jpg.n, 30)
    decoded = [batch.clone() for batch, _ in jpg.batches(order, 7)]
    assert loaders.as_squares(jpg, CPU, reads=jpg.n) is jpg, "each is read once at most"
    with monkeypatch.context() as small:
        small.setattr(loaders, "RESIDENT_BYTES", jpg.n * 3 * 48**2 - 1)
        assert loaders.as_squares(jpg, CPU, reads=30) is jpg, "memory does not suffice"
    kept = loaders.as_squares(jpg, CPU, reads=jpg.n + 1)
    assert isinstance(kept, ResidentImages)
    assert not kept.decodes
    for (batch, index), before, wanted in zip(kept.batches(order, 7), decoded, range(0, 30, 7), strict=True):
        assert torch.equal(batch, before)
        assert np.array_equal(index.numpy(), order[wanted : wanted + 7])


def test_squares_that_a_gpu_has_no_room_for_stay_on_its_host(jpg: Images, monkeypatch: pytest.MonkeyPatch):
    """A device that only pretends to be one shows where images are and that nothing waits for it."""
    order = np.random.default_rng(0).integers(0, jpg.n, 30)
    expected = [batch.clone() for batch, _ in jpg.batches(order, 7)]
    with pretend_gpu(monkeypatch) as gpu:
        kept = load_resident(jpg, CPU, DEVICE)
        gpu.reset()
        served = [batch for batch, _ in kept.batches(order, 7)]
        assert gpu.waits == []
        assert gpu.sent == 30 * 3 * 48**2
    for batch, wanted in zip(served, expected, strict=True):
        assert isinstance(batch, OnDevice)
        assert torch.equal(batch.values, wanted)
