import csv
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import closing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spice_dist.data import beton, decode, decode_pool
from spice_dist.data import ingest as ingest_module
from spice_dist.data.decode import Packing, pack_image
from spice_dist.data.decode_pool import packed_in_order
from spice_dist.data.files import path_of_cell, publish
from spice_dist.data.ingest import ingest
from spice_dist.data.journal import RECORD
from spice_dist.data.manifest import Ingested, read_manifest, read_paths
from spice_dist.data.packed_files import adopt, pack, packed_source
from spice_dist.data.sources import Source, from_array, open_source
from spice_dist.errors import DamagedFile, UserError

RED = np.array([[[200, 10, 30]] * 4] * 4, np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def random_image(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def source_of(*data: np.ndarray | bytes, names: list[str] | None = None, **options: object) -> Source:
    """Files where they are bytes, decoded in children; arrays otherwise."""
    options.setdefault("encoded", all(isinstance(item, bytes) for item in data))
    options.setdefault("stamps", lambda i: hashlib.sha256(bytes(data[i])).hexdigest())  # type: ignore
    return Source("test", names or [f"{i}.png" for i in range(len(data))], list(data).__getitem__, **options)  # type: ignore


def rows_of(folder: Path) -> list[list[str]]:
    return list(csv.reader((folder / "quarantine.csv").read_text("utf-8").splitlines()))


def stored(folder: Path) -> list[np.ndarray]:
    """The images of a packed folder, as pixels."""
    info = beton.verify(folder / "dataset.beton")
    beton.check_pixels(info)
    with closing(beton.Samples(info)) as samples:
        if info.format == "raw":
            return list(samples.raw(np.arange(info.n)))
        return [np.asarray(Image.open(io.BytesIO(samples.encoded(i)))) for i in range(info.n)]


def to_pixels(data: np.ndarray | bytes, size: int) -> np.ndarray:
    """The stored raw square; AssertionError with the reason if there is none."""
    with decode.strict_pillow():
        result = pack_image(data, Packing("raw", size))
    assert not isinstance(result, str), result
    return np.frombuffer(result[1], np.uint8).reshape(size, size, 3)


def reason(data: np.ndarray | bytes) -> str:
    with decode.strict_pillow():
        result = pack_image(data, Packing("raw", 8))
    assert isinstance(result, str)
    return result


def big_png(width: int, height: int) -> bytes:
    """A PNG header that claims width x height pixels, with hardly any data behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------- bad images


def corpus() -> dict[str, tuple[bytes, str]]:
    """Name -> (file, what its row in the quarantine says; "" for a file that is good)."""
    jpeg, png = encoded(random_image(9, 64, 64), "JPEG"), encoded(random_image(9, 64, 64))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    return {
        "good.jpg": (jpeg, ""),
        "good.png": (png, ""),
        "good.gif": (encoded(random_image(1, 64, 64).convert("P"), "GIF"), ""),
        "good.bmp": (encoded(random_image(1, 64, 64), "BMP"), ""),
        "good.tif": (encoded(random_image(1, 64, 64), "TIFF"), ""),
        "good.webp": (encoded(random_image(1, 64, 64), "WEBP"), ""),
        "grey.jpg": (encoded(random_image(1, 64, 64).convert("L"), "JPEG"), ""),
        "progressive.jpg": (encoded(random_image(1, 64, 64), "JPEG", progressive=True), ""),
        "cmyk.jpg": (encoded(random_image(1, 64, 64).convert("CMYK"), "JPEG"), ""),
        "png named.jpg": (png, ""),
        "2x2.png": (encoded(Image.new("RGB", (2, 2))), ""),
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"this is text", "formats"),
        "zeros.jpg": (bytes(4096), "formats"),
        "header only.jpg": (jpeg[:100], "truncated|formats|cannot decode"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half.png": (png[: len(png) // 2], "truncated"),
        "flipped.png": (bytes(flipped), "cannot decode"),
        "bomb.png": (big_png(20_000, 20_000), "million"),
        "wide.png": (big_png(70_000, 100), "sides"),
        "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "formats"),
        "1x1.png": (encoded(Image.new("RGB", (1, 1))), "sides"),
    }


@pytest.mark.parametrize("kind", ["raw", "jpg"])
def test_each_of_22_files_is_kept_or_quarantined_with_its_reason(tmp_path: Path, kind: str):
    import re

    files = corpus()
    assert len(files) == 22
    (tmp_path / "in").mkdir()
    for name, (data, _) in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    result = ingest(open_source(str(tmp_path / "in")), tmp_path / "out", size=32, format=kind, max_bad=0.6)
    good = sorted(name for name, (_, expected) in files.items() if not expected)
    assert (result.n, result.bad) == (len(good), 22 - len(good))
    assert read_paths(tmp_path / "out") == good
    header, *rows = rows_of(tmp_path / "out")
    assert header == ["path", "reason", "bytes"]
    assert [row[0] for row in rows] == sorted(files.keys() - set(good))
    for name, why, size in rows:
        assert re.search(files[name][1], why), (name, why)
        assert int(size) == len(files[name][0])
    images = stored(tmp_path / "out")
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images)


def test_labels_names_and_order_follow_the_images_that_are_kept(tmp_path: Path):
    good = [encoded(random_image(i)) for i in range(4)]
    data = [good[0], b"bad", b"worse", *good[1:]]
    names = ["g0", "b0", "b1", "g1", "g2", "g3"]
    result = ingest(source_of(*data, names=names, labels=np.arange(6)), tmp_path, size=8, format="raw", max_bad=0.6)
    assert np.array_equal(stored(tmp_path), np.stack([np.asarray(random_image(i)) for i in range(4)]))
    assert np.load(tmp_path / "labels.npy").tolist() == [0, 3, 4, 5]
    assert read_paths(tmp_path) == ["g0", "g1", "g2", "g3"]
    assert read_manifest(tmp_path) == result
    assert not list(tmp_path.glob(".*"))


def test_the_parts_are_counted_after_bad_images_and_copies_are_gone(tmp_path: Path):
    images = [random_image(i) for i in range(8)]
    data = [encoded(image) for image in images]
    data[1] = b"bad"  # of 4 clustered ones
    data[4], data[5] = b"bad", data[0]  # of 2 extra ones: one bad, one a copy
    data[7] = data[0]  # of 2 held out: equals a training image
    source = source_of(*data, extra=2, held_out=2)
    kept = ingest(source, tmp_path / "a", size=8, format="raw", max_bad=0.5)
    assert (kept.n, kept.clustered, kept.extra, kept.held_out) == (6, 3, 1, 2)
    assert (kept.duplicates, kept.dropped) == (2, 0)
    dropped = ingest(source, tmp_path / "b", size=8, format="raw", max_bad=0.5, drop_duplicates=True)
    assert (dropped.n, dropped.clustered, dropped.extra, dropped.held_out) == (5, 3, 0, 2)
    assert (dropped.bad, dropped.duplicates, dropped.dropped) == (2, 2, 1)
    assert rows_of(tmp_path / "b")[1:][-1][:2] == ["5.png", "duplicate of 0.png"]
    assert read_paths(tmp_path / "b") == ["0.png", "2.png", "3.png", "6.png", "7.png"]


def test_flat_images_of_other_shapes_are_no_duplicates(tmp_path: Path):
    flat = [np.zeros(shape, np.uint8) for shape in ((10, 20, 3), (20, 10, 3), (10, 20, 3))]
    assert ingest(source_of(*flat), tmp_path, size=32, format="jpg").duplicates == 1


def test_too_many_bad_images_stop_the_run_and_name_count_file_and_option(tmp_path: Path):
    data = [encoded(random_image(0)), b"bad", b"worse"]
    with pytest.raises(UserError, match=r"2 of 3 .*quarantine\.csv.*--max-bad"):
        ingest(source_of(*data), tmp_path, size=8, max_bad=0.5)
    assert len(rows_of(tmp_path)) == 3
    assert not (tmp_path / "dataset.beton").exists()
    assert not (tmp_path / "manifest.json").exists()
    assert ingest(source_of(*data), tmp_path, size=8, max_bad=0.7).n == 1  # the limit alone stood in the way
    with pytest.raises(UserError, match="2 of 3"):
        ingest(source_of(*data), tmp_path, size=8, max_bad=0.5)  # and does again, with nothing decoded
    with pytest.raises(UserError, match="none of the 1 images"):
        ingest(source_of(b"bad"), tmp_path / "none", size=8, max_bad=1.0)


def test_without_the_check_a_folder_without_a_good_image_fails_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ingest_module, "_check_share", lambda *_: None)
    with pytest.raises(DamagedFile):
        ingest(source_of(b"bad"), tmp_path, size=8)


def test_a_file_that_may_not_be_read_is_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refusing(path: Path, *_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("spice_dist.data.sources.os.open", refusing)
    result = decode._pack_item(tmp_path / "x.png", Packing("raw", 8))
    assert result == "cannot read: Permission denied"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who is not")
def test_permissions_count_for_a_user_who_is_not_root(tmp_path: Path):
    tmp_path.chmod(0o755)
    for name, mode in (("open", 0o644), ("closed", 0)):
        (tmp_path / name).write_bytes(encoded(random_image(0)))
        (tmp_path / name).chmod(mode)
    program = """
import os
from pathlib import Path
from spice_dist.data import decode
pack = decode.pack_image(b"", decode.Packing("raw", 8))  # imports all that is needed
os.setgid(65_534)
os.setuid(65_534)
try:
    Path("closed").read_bytes()
except PermissionError:
    print("an error without the defence")
for name in ("open", "closed"):
    print(decode._pack_item(Path(name), decode.Packing("raw", 8)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("an error"), done.stderr
    assert "(Packed(" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "cannot read: Permission denied"
    assert not isinstance(decode._pack_item(tmp_path / "closed", Packing("raw", 8)), str)  # root may


# ---------------------------------------------------------------- bombs, children that die, hang or grow


def test_a_bomb_is_refused_by_its_header_and_only_by_that():
    bomb = encoded(Image.new("1", (8_000, 7_000)))  # 56 million pixels in a few kilobytes
    assert len(bomb) < 50_000
    assert "at most 50 million are read of this format: raise --max-megapixels" in reason(bomb)
    with decode.strict_pillow():
        assert not isinstance(pack_image(bomb, Packing("raw", 8, max_megapixels=56)), str)  # without the limit


def test_bombs_cost_a_child_less_than_400_mb_and_only_by_the_limit():
    bombs = {side: encoded(Image.new("1", (side, side))) for side in (20_000, 12_000, 9_000)}  # 400, 144, 81 million
    program = """
import sys
from pathlib import Path
from spice_dist.data import decode
limit, *lengths = map(int, sys.argv[1:])
decode._limit_memory(limit)
with decode.strict_pillow(limit):
    for length in lengths:
        print(decode.pack_image(sys.stdin.buffer.read(length), decode.Packing("raw", 32, max_megapixels=limit)))
status = Path("/proc/self/status").read_text().split()
print(status[status.index("VmHWM:") + 1])
"""

    def said(limit: int, files: list[bytes]) -> tuple[list[str], int]:
        command = [sys.executable, "-c", program, str(limit), *(str(len(data)) for data in files)]
        done = subprocess.run(command, input=b"".join(files), capture_output=True, timeout=60)
        *lines, kilobytes = done.stdout.decode("latin-1").splitlines()
        return lines, int(kilobytes)

    reasons, kilobytes = said(50, list(bombs.values()))
    assert len(reasons) == 3
    assert all("million" in line for line in reasons)
    assert kilobytes < 400_000
    _, kilobytes = said(150, [bombs[12_000]])
    assert kilobytes > 400_000


def test_an_image_that_wants_more_memory_than_a_child_may_have_is_refused_and_only_by_the_limit():
    program = """
import sys
from spice_dist.data import decode
decode.CHILD_BYTES = int(sys.argv[1])
decode._limit_memory()
with decode.strict_pillow():
    print(decode.pack_image(sys.stdin.buffer.read(), decode.Packing("raw", 32)))
"""
    large = encoded(Image.new("RGB", (6_000, 6_000)))  # 108 MB decoded

    def said(limit: int) -> str:
        command = [sys.executable, "-c", program, str(limit)]
        return subprocess.run(command, input=large, capture_output=True, timeout=60).stdout.decode("latin-1")

    assert "more memory" in said(64 << 20)
    assert said(decode.CHILD_BYTES).startswith("(Packed(")


FAULTY_CHILD = """
import os, sys, time
from spice_dist.data import decode
good = decode.pack_image
def faulty(data, packing):
    if data == b"kill":
        os.kill(os.getpid(), 9)
    if data == b"abort":
        os.abort()
    if data == b"exit":
        os._exit(3)
    if data == b"hang":
        time.sleep(1000)
    return good(data, packing)
decode.pack_image = faulty
decode._main(*sys.argv[1:])
"""


def test_a_child_that_dies_or_hangs_costs_the_image_it_was_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_pool, "CHILD", (sys.executable, "-c", FAULTY_CHILD))
    good = encoded(random_image(0))
    data = [good] * 40
    data[3], data[17], data[20], data[39] = b"kill", b"abort", b"exit", b"hang"
    started = time.monotonic()
    monkeypatch.setattr(decode_pool, "TIMEOUT_S", 2.0)
    results = list(packed_in_order(source_of(*data), Packing("raw", 8), 2))
    assert time.monotonic() - started < 30
    assert {i: result for i, result in enumerate(results) if isinstance(result, str)} == {
        3: "the decoder was killed by signal 9",
        17: "the decoder was killed by signal 6",
        20: "the decoder ended with exit code 3",
        39: "decoding took more than 2 s",
    }
    pixels = np.asarray(random_image(0)).tobytes()
    assert all(result[1] == pixels for result in results if not isinstance(result, str))


def test_without_the_second_try_a_child_that_dies_would_cost_its_whole_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_pool, "CHILD", (sys.executable, "-c", FAULTY_CHILD))
    monkeypatch.setattr(decode_pool, "TIMEOUT_S", 9.0)
    children = decode_pool._Children(Packing("raw", 8))
    good = encoded(random_image(0))
    with closing(children), pytest.raises(decode_pool.ChildEnded):
        children._ask([good, b"kill", good])


def test_a_child_killed_from_outside_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    class Watched(popen):
        def __init__(self, *args: object, **options: object):
            super().__init__(*args, **options)  # type: ignore
            started.append(self)

    monkeypatch.setattr(decode_pool.subprocess, "Popen", Watched)
    data = [encoded(random_image(i)) for i in range(200)]

    killed: set[int] = set()

    def progress(done: int, _total: int) -> None:
        if done in (1, 100) and done not in killed:  # it may be told a number more than once
            killed.add(done)
            started[-1].kill()

    result = ingest(source_of(*data), tmp_path, size=8, format="raw", workers=2, progress=progress)
    assert len(started) > 2
    assert (result.n, result.bad) == (200, 0)
    assert np.array_equal(stored(tmp_path), np.stack([np.asarray(random_image(i)) for i in range(200)]))


def test_no_child_and_no_thread_outlives_an_ingest_that_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And each connection is closed once, however slowly: its number may be another file's by the second time."""
    closed: list[Connection] = []

    def slow_close(connection: Connection) -> None:
        closed.append(connection)
        time.sleep(0.1)
        os.close(connection.fileno())

    monkeypatch.setattr(Connection, "_close", slow_close)

    def children() -> set[str]:
        tasks = Path(f"/proc/{os.getpid()}/task")
        return {pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()}

    before, threads = children(), set(threading.enumerate())

    def stop(done: int, _total: int) -> None:
        if done == 20:
            assert children() - before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(source_of(*[encoded(random_image(0))] * 300), tmp_path, size=8, workers=2, progress=stop)
    deadline = time.monotonic() + 5  # /proc may lag behind
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children() - before  # what other tests left may end meanwhile
    assert not set(threading.enumerate()) - threads
    assert len(closed) == len(set(map(id, closed))) > 0


def test_children_import_neither_torch_nor_ray():
    program = "import sys, spice_dist.data.decode; print([m for m in ('torch', 'ray', 'ffcv') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], timeout=60).strip() == b"[]"


# ---------------------------------------------------------------- how pixels become RGB


def test_all_eight_exif_orientations_give_the_same_pixels(monkeypatch: pytest.MonkeyPatch):
    upright = np.asarray(random_image(3))
    as_a_camera_stores_them = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    files = {}
    for orientation, pixels in as_a_camera_stores_them.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "TIFF"):
            image = Image.fromarray(np.ascontiguousarray(pixels))
            files[kind, orientation] = encoded(image, kind, exif=exif)
    for name, data in files.items():
        assert np.array_equal(to_pixels(data, 8), upright), name
    monkeypatch.setattr(decode, "ORIENTATION", 0xFFFF)  # without looking at the tag
    assert not np.array_equal(to_pixels(files["PNG", 6], 8), upright)


def flat(mode: str, value: object) -> Image.Image:
    return Image.new(mode, (4, 4), value)  # type: ignore


def palette(colours: bytes = bytes([0, 0, 0, 200, 10, 30]), kind: str = "RGB") -> Image.Image:
    image = flat("P", 1)
    image.putpalette(colours, kind)
    return image


GOLDEN: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "RGB": (encoded(flat("RGB", (200, 10, 30))), (200, 10, 30)),
    "1": (encoded(flat("1", 1)), (255, 255, 255)),
    "L": (encoded(flat("L", 77)), (77, 77, 77)),
    "P": (encoded(palette()), (200, 10, 30)),
    "P, transparent": (encoded(palette(), transparency=1), (255, 255, 255)),
    "P, partly transparent": (encoded(palette(), transparency=bytes([255, 51])), (244, 206, 210)),
    "RGB, transparent colour": (encoded(flat("RGB", (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
    "LA": (encoded(flat("LA", (77, 255))), (77, 77, 77)),
    "LA, clear": (encoded(flat("LA", (77, 0))), (255, 255, 255)),
    "RGBA": (encoded(flat("RGBA", (0, 100, 200, 51))), (204, 224, 244)),
    "I;16": (encoded(Image.fromarray(np.full((4, 4), 77 * 257 + 128, np.uint16))), (77, 77, 77)),
    "I;16, rounded": (encoded(Image.fromarray(np.full((4, 4), 77 * 257 + 129, np.uint16))), (78, 78, 78)),
    "I;16, white": (encoded(Image.fromarray(np.full((4, 4), 65535, np.uint16))), (255, 255, 255)),
    "CMYK": (encoded(flat("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "I": (encoded(Image.fromarray(np.full((4, 4), 257 * 9, np.int32)), "TIFF"), (9, 9, 9)),
}


@pytest.mark.parametrize("mode", GOLDEN)
def test_every_mode_becomes_the_rgb_that_the_rule_says(mode: str):
    data, colour = GOLDEN[mode]
    assert to_pixels(data, 4).reshape(-1, 3).tolist() == [list(colour)] * 16


def test_without_the_rules_pillows_own_conversion_gives_other_colours(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "_to_rgb", lambda image: image.convert("RGB"))
    other = {
        mode
        for mode, (data, colour) in GOLDEN.items()
        if to_pixels(data, 4).reshape(-1, 3).tolist() != [list(colour)] * 16
    }
    transparent = {mode for mode in GOLDEN if "transparent" in mode or mode in ("LA, clear", "RGBA")}
    assert transparent <= other


def test_pixels_that_do_not_say_what_is_white_are_refused():
    for data in (np.full((4, 4), 70_000, np.int32), np.zeros((4, 4), np.float32)):
        assert "white" in reason(encoded(Image.fromarray(data), "TIFF"))


def test_an_animation_gives_its_first_frame_and_is_counted(tmp_path: Path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = []
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data.append(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    result = ingest(source_of(*data, encoded(frames[1])), tmp_path, size=4, format="raw")
    assert result.animated == 3
    assert [image[0, 0].tolist() for image in stored(tmp_path)] == [[255, 0, 0]] * 3 + [[0, 255, 0]]


def test_nothing_but_the_look_at_further_frames_counts_an_animation(monkeypatch: pytest.MonkeyPatch):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    moving = [encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("GIF", "PNG", "WEBP")]

    def counted() -> int:
        with decode.strict_pillow():
            results = [pack_image(data, Packing("raw", 4)) for data in moving]
        return sum(not isinstance(result, str) and result[0].animated for result in results)

    assert counted() == 3
    monkeypatch.setattr(decode, "_frames", lambda _: 1)
    assert counted() == 0


def test_a_photo_with_a_preview_behind_it_is_no_animation(tmp_path: Path):
    """Cameras and phones store a second picture (MPO) in a JPEG."""
    two = encoded(random_image(0), "MPO", save_all=True, append_images=[random_image(1)])
    result = ingest(source_of(two), tmp_path, size=8, format="raw")
    assert (result.n, result.animated) == (1, 0)


def test_an_image_of_the_right_size_is_untouched_and_others_keep_their_centre():
    exact = np.asarray(random_image(1))
    assert np.array_equal(to_pixels(exact, 8), exact)
    wide = np.asarray(random_image(2, width=13, height=8))
    assert np.array_equal(to_pixels(wide, 8), wide[:, 2:10])
    large = random_image(3, width=120, height=40)
    shrunk = np.asarray(large.resize((30, 10), Image.Resampling.BILINEAR))  # shorter side to 10, then the centre
    assert np.abs(to_pixels(np.asarray(large), 10).astype(int) - shrunk[:, 10:20]).max() <= 1
    assert to_pixels(RED[:2, :2], 8).reshape(-1, 3).tolist() == [[200, 10, 30]] * 64  # enlarged
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(to_pixels(grey, 8), np.stack([grey] * 3, axis=2))
    assert np.array_equal(to_pixels(grey[:, :, None], 8), np.stack([grey] * 3, axis=2))


def test_shrinking_averages_instead_of_skipping():
    checker = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
    assert np.abs(to_pixels(checker, 8).astype(int) - 128).max() < 10


# ---------------------------------------------------------------- JPEG


def test_a_jpeg_that_is_fit_already_is_kept_byte_for_byte_and_any_other_is_not(photos: list[np.ndarray]):
    image = Image.fromarray(photos[0])
    side = min(image.size)
    turned = Image.Exif()
    turned[0x0112] = 6
    fit = encoded(image, "JPEG", quality=97)
    others = {
        "too large": (fit, side - 1),
        "turned": (encoded(image, "JPEG", exif=turned), side),
        "grey": (encoded(image.convert("L"), "JPEG"), side),
        "four colours": (encoded(image.convert("CMYK"), "JPEG"), side),
        "with data behind it": (fit + b"<?php", side),
        "PNG": (encoded(image), side),
    }
    with decode.strict_pillow():
        result = pack_image(fit, Packing("jpg", side))
        assert not isinstance(result, str)
        assert result[1] == fit
        for name, (data, size) in others.items():
            result = pack_image(data, Packing("jpg", size))
            assert not isinstance(result, str), name
            assert result[1] != data, name
            about, pixels = result[0], np.asarray(Image.open(io.BytesIO(result[1])))
            assert pixels.shape == (about.height, about.width, 3), name
            assert min(pixels.shape[:2]) == size, name


def kept_jpegs() -> list[bytes]:
    image = random_image(4, 61, 43)
    kinds = [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"restart_marker_rows": 1},
        {"keep_rgb": True},
        {"optimize": True, "comment": b"with tables of its own"},
    ]
    return [
        encoded(image.resize(size), "JPEG", quality=q, **o) for o in kinds for size, q in (((61, 43), 90), ((9, 8), 50))
    ]


def test_a_damaged_jpeg_that_would_be_kept_is_judged_as_if_it_were_decoded_whole(monkeypatch: pytest.MonkeyPatch):
    """Only an eighth of its pixels is made, but all of its compressed data is read."""
    from PIL.JpegImagePlugin import JpegImageFile

    rng = np.random.default_rng(3)
    damaged = []
    for data in kept_jpegs():
        for how in range(40):
            at = int(rng.integers(2, len(data) - 2))
            new = [
                data[:at],
                data[:at] + b"\xff\xd9",
                data[: at - 9] + data[at:],
                data[: at - 1] + rng.bytes(2) + data[at + 1 :],
            ]
            damaged.append(new[how % 4])

    def judged() -> list[str | bytes]:
        with decode.strict_pillow():
            results = [pack_image(data, Packing("jpg", 64)) for data in damaged]
        return [result if isinstance(result, str) else result[1] for result in results]

    def refused(results: list[str | bytes]) -> int:
        return sum(isinstance(result, str) for result in results)

    quick = judged()
    kept = [result == data for result, data in zip(quick, damaged, strict=True)]
    with monkeypatch.context() as patch:
        patch.setattr(JpegImageFile, "draft", lambda *_: None)
        assert judged() == quick
    assert refused(quick) > 100
    assert sum(kept) > 100
    with monkeypatch.context() as patch:
        patch.setattr(decode, "_is_fit", lambda *_: False)
        whole = judged()
    assert [isinstance(result, str) for result in whole] == [isinstance(result, str) for result in quick]
    monkeypatch.setattr(JpegImageFile, "load", lambda *_: None)  # by the header alone
    monkeypatch.setattr(decode, "_is_faint", lambda _: False)
    unread = [
        pack_image(data, Packing("jpg", 64))
        for data, result in zip(damaged, quick, strict=True)
        if isinstance(result, str) and beton.jpeg_size(data)
    ]
    assert unread
    assert any(not isinstance(result, str) for result in unread)


def test_kept_jpegs_that_differ_in_metadata_alone_are_duplicates_and_others_are_not():
    image, exif = random_image(4, 61, 43), Image.Exif()
    exif[0x010F] = "a camera"
    plain = encoded(image, "JPEG")

    def digest(data: bytes) -> str:
        result = pack_image(data, Packing("jpg", 64))
        assert not isinstance(result, str)
        assert result[1] == data
        return result[0].digest

    options = [{"exif": exif}, {"comment": b"x"}, {"icc_profile": b"x" * 100}, {"dpi": (300, 300)}]
    same = [plain, *(encoded(image, "JPEG", **option) for option in options)]
    assert len(set(same)) == 5
    assert len({digest(data) for data in same}) == 1
    other = [encoded(random_image(5, 61, 43), "JPEG"), encoded(random_image(4, 61, 43), "JPEG", quality=76)]
    frame = plain.index(b"\xff\xe0")
    without_jfif = plain[:frame] + plain[frame + 18 :]
    as_rgb = plain[:frame] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0" + plain[frame + 18 :]  # other colours
    assert not np.array_equal(np.asarray(Image.open(io.BytesIO(as_rgb))), np.asarray(Image.open(io.BytesIO(plain))))
    assert len({digest(data) for data in (*same, *other, without_jfif, as_rgb)}) == 5


def test_equal_pixels_are_duplicates_where_they_are_encoded_anew(tmp_path: Path):
    image = random_image(4, 61, 43)
    files = [encoded(image), encoded(image, "TIFF"), encoded(image, "BMP"), encoded(random_image(5, 61, 43))]
    assert ingest(source_of(*files), tmp_path, size=30, format="jpg").duplicates == 2


def test_a_stored_jpeg_looks_like_its_source_at_every_size(tmp_path: Path, photos: list[np.ndarray]):
    ingest(source_of(*map(encoded, map(Image.fromarray, photos))), tmp_path, size=48, format="jpg", quality=95)
    for photo, image in zip(photos, stored(tmp_path), strict=True):
        height, width = photo.shape[:2]
        scale = min(1, 48 / min(height, width))
        assert abs(image.shape[0] - height * scale) <= 1
        assert abs(image.shape[1] - width * scale) <= 1
        wanted = Image.fromarray(photo).resize(image.shape[1::-1], Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(wanted).astype(int) - image).mean() < 8


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(monkeypatch: pytest.MonkeyPatch):
    from sklearn.datasets import load_sample_image

    data = encoded(Image.fromarray(load_sample_image("flower.jpg")), "JPEG", quality=95)
    small = to_pixels(data, 32)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    whole = to_pixels(data, 32)
    assert not np.array_equal(small, whole)
    assert np.abs(small.astype(int) - whole).mean() < 3


def test_the_format_is_raw_up_to_128_pixels_and_8_gib(monkeypatch: pytest.MonkeyPatch):
    source = source_of(RED, RED)

    def chosen(size: int, kind: str = "auto") -> str:
        return ingest_module.checked_packing(source, size=size, format=kind).format

    assert [chosen(size) for size in (32, 128, 129, 224)] == ["raw", "raw", "jpg", "jpg"]
    assert chosen(224, "raw") == "raw"
    monkeypatch.setattr(ingest_module, "RAW_BYTES", 2 * 32 * 32 * 3 - 1)
    assert chosen(32) == "jpg"


# ---------------------------------------------------------------- again, after a stop, after a change


def test_the_fingerprint_follows_names_pixels_and_order_and_nothing_else(tmp_path: Path):
    a, b = np.asarray(random_image(1)), np.asarray(random_image(2))

    def fingerprint(source: Source) -> str:
        return ingest(source, tmp_path, size=8, format="raw").fingerprint

    base = fingerprint(source_of(a, b))
    assert fingerprint(source_of(encoded(Image.fromarray(a)), encoded(Image.fromarray(b)))) == base
    changed = a.copy()
    changed[0, 0, 0] ^= 1
    others = [source_of(b, a), source_of(changed, b), source_of(a, b, names=["0.png", "x.png"]), source_of(a)]
    assert len({fingerprint(s) for s in others} | {base}) == 5


def folder_of(tmp_path: Path, n: int) -> Source:
    (tmp_path / "in").mkdir(exist_ok=True)
    for i in range(n):
        (tmp_path / "in" / f"{i:04d}.png").write_bytes(encoded(random_image(i)) if i % 50 != 7 else b"bad")
    return open_source(str(tmp_path / "in"))


def test_an_equal_call_decodes_nothing_and_a_changed_one_everything(tmp_path: Path):
    source = folder_of(tmp_path, 20)

    def decoded(source: Source, **options: object) -> int:
        seen: list[int] = []
        settings = {"size": 8, "format": "raw", "max_bad": 0.1, **options}
        ingest(source, tmp_path / "out", progress=lambda done, _: seen.append(done), **settings)  # type: ignore
        return len(seen)

    assert decoded(source) == 20
    assert decoded(source) == 0
    assert decoded(source, workers=1) == 0
    assert decoded(source, size=9) == 20
    assert decoded(source, size=9, drop_duplicates=True) == 20
    (tmp_path / "in" / "0003.png").write_bytes(encoded(random_image(99, 9, 9)))
    assert decoded(source, size=9, drop_duplicates=True) == 20
    (tmp_path / "out" / "dataset.beton").unlink()
    assert decoded(source, size=9, drop_duplicates=True) == 20


KILLED = """
import os, sys
from pathlib import Path
from spice_dist.data import ingest, journal
from spice_dist.data.sources import open_source
journal.NOTE_S = 0.0
stop_at, folder = sys.argv[2], Path(sys.argv[1])
def progress(done, total):
    if str(done) == stop_at:
        os.kill(os.getpid(), 9)
if not stop_at.isdecimal():
    module, name = stop_at.split(".")
    target = {"ingest": ingest}[module]
    good = getattr(target, name)
    def dying(*args, **options):
        if name == "publish_sealed":
            os.kill(os.getpid(), 9)
        good(*args, **options)
        os.kill(os.getpid(), 9)
    setattr(target, name, dying)
ingest.ingest(open_source(str(folder / "in")), folder / "out", size=8, format="raw", progress=progress, workers=2)
"""


@pytest.mark.parametrize(
    "stop_at",
    ["1", "40", "64", "ingest.publish_beton", "ingest.publish_sealed", "ingest._write_quarantine"],
)
def test_an_ingest_killed_at_any_point_goes_on_to_the_bytes_of_one_that_was_not(tmp_path: Path, stop_at: str):
    source = folder_of(tmp_path, 64)
    whole = ingest(source, tmp_path / "whole", size=8, format="raw", workers=1)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), stop_at], timeout=60, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    seen: list[int] = []
    again = ingest(source, tmp_path / "out", size=8, format="raw", progress=lambda done, _: seen.append(done))
    assert again == whole
    for name in ("dataset.beton", "dataset.beton.json", "paths.jsonl", "quarantine.csv", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    if stop_at in ("100", "199", "200"):
        assert seen == list(range(int(stop_at), 201))[1:] or seen == list(range(int(stop_at), 201))


def test_after_a_change_of_the_images_a_stopped_ingest_starts_anew(tmp_path: Path):
    source = folder_of(tmp_path, 60)

    def stop(done: int, _total: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(source, tmp_path / "out", size=8, format="raw", progress=stop)
    (tmp_path / "in" / "0003.png").write_bytes(encoded(random_image(99, 9, 9)))
    seen: list[int] = []
    ingest(source, tmp_path / "out", size=8, format="raw", progress=lambda done, _: seen.append(done))
    assert seen == list(range(1, 61))


def test_a_run_that_is_cut_short_leaves_no_seal(tmp_path: Path):
    ingest(source_of(RED), tmp_path, size=4)

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(source_of(RED, RED), tmp_path, size=4, progress=stop)
    assert not (tmp_path / "manifest.json").exists()


def test_a_damaged_manifest_or_list_of_names_is_refused(tmp_path: Path):
    ingest(source_of(RED, RED[::-1]), tmp_path, size=4)
    good = (tmp_path / "manifest.json").read_bytes()
    for content in (b"", b"{}", b"[1]", b'{"version": 1}', good[:-20], good.replace(b'"n": 2', b'"n": 0')):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(DamagedFile):
            read_manifest(tmp_path)
    (tmp_path / "paths.jsonl").write_bytes(b'"a"\n"b')
    with pytest.raises(DamagedFile):
        read_paths(tmp_path)


# ---------------------------------------------------------------- pack and adopt


def test_a_packed_file_has_what_belongs_to_it_beside_it_and_can_be_adopted(tmp_path: Path):
    data = [encoded(random_image(i)) for i in range(5)]
    source = source_of(*data, b"bad", labels=np.arange(6), held_out=2)
    packed = tmp_path / "x.beton"
    result = pack(source, packed, size=8, format="raw", max_bad=0.5)
    beside = ("", ".classes.json", ".json", ".labels.npy", ".manifest.json", ".paths.jsonl", ".quarantine.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"x.beton{suffix}" for suffix in beside]
    assert adopt(packed, tmp_path / "run") == result == read_manifest(tmp_path / "run")
    assert (tmp_path / "run" / "dataset.beton").is_symlink()
    assert os.readlink(tmp_path / "run" / "dataset.beton") == "../x.beton"
    assert np.array_equal(stored(tmp_path / "run"), np.stack([np.asarray(random_image(i)) for i in range(5)]))
    assert read_paths(tmp_path / "run") == [f"{i}.png" for i in range(5)]
    assert np.load(tmp_path / "run" / "labels.npy").tolist() == [0, 1, 2, 3, 4]
    again = packed_source(packed)
    assert (again.paths, again.held_out) == (read_paths(tmp_path / "run"), result.held_out)
    assert adopt(packed, tmp_path / "run") == result  # a second time too
    replaced = ingest(source_of(RED), tmp_path / "run", size=4, format="raw")  # takes the place of the links
    assert replaced.n == 1
    assert beton.verify(packed).n == 5


def test_only_a_whole_file_of_ours_is_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed, other = tmp_path / "x.beton", tmp_path / "y.beton"
    pack(source_of(RED, RED[::-1]), packed, size=4, format="raw")
    pack(source_of(RED, RED + 1), other, size=4, format="raw")
    manifest = tmp_path / "x.beton.manifest.json"
    good = manifest.read_bytes()
    manifest.write_bytes((tmp_path / "y.beton.manifest.json").read_bytes())
    with pytest.raises(DamagedFile, match="does not belong"):
        adopt(packed, tmp_path / "run")
    manifest.unlink()
    with pytest.raises(UserError, match="not packed by this program"):
        adopt(packed, tmp_path / "run")
    manifest.write_bytes(good)
    os.truncate(packed, packed.stat().st_size - 1)
    with pytest.raises(DamagedFile):
        adopt(packed, tmp_path / "run")
    believed = replace(beton.verify(other), fingerprint=json.loads(good)["fingerprint"])
    monkeypatch.setattr(beton, "verify", lambda _: believed)
    adopt(packed, tmp_path / "run")  # nothing but that judgement stands in the way
    with pytest.raises(UserError, match=r"does not end with \.beton"):
        pack(source_of(RED), tmp_path / "x", size=4)


# ---------------------------------------------------------------- names, files, progress


def test_hostile_names_survive_to_paths_and_cannot_break_the_quarantine(tmp_path: Path):
    names = ["=1+1", "@x", "-rf", "+3", "a\nb", 'c,d"e', "\udcff\x1b[31m", "日本", "tab\t", "\u202egnp.exe", " x ", "'"]
    ingest(source_of(*[RED] * 12, names=names), tmp_path / "good", size=4)
    assert read_paths(tmp_path / "good") == names
    with pytest.raises(UnicodeEncodeError):  # what the list of names would meet as plain UTF-8
        "\n".join(names).encode()
    assert (tmp_path / "good" / "paths.jsonl").read_bytes().isascii()
    source = source_of(*[b"bad"] * 12, encoded(random_image(0)), names=[*names, "ok"])
    ingest(source, tmp_path / "bad", size=4, max_bad=1.0)
    with open(tmp_path / "bad/quarantine.csv", newline="", encoding="utf-8") as file:
        cells = [row["path"] for row in csv.DictReader(file)]
    assert [path_of_cell(cell) for cell in cells] == names
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r"]


def test_files_with_hostile_names_are_found_decoded_and_named_exactly(tmp_path: Path):
    names = [b"=1+1.png", b"-rf.png", b"a\nb.png", b"c,d\"e'.png", b"\xff\xfe.png", "日本.png".encode(), b" x .png"]
    (tmp_path / "in").mkdir()
    for i, name in enumerate(names):
        (Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name))).write_bytes(encoded(random_image(i)))
    ingest(open_source(str(tmp_path / "in")), tmp_path / "out", size=8, format="raw")
    found = dict(zip(map(os.fsencode, read_paths(tmp_path / "out")), stored(tmp_path / "out"), strict=True))
    assert found.keys() == set(names)
    assert all(np.array_equal(found[name], np.asarray(random_image(i))) for i, name in enumerate(names))


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_progress_ends_at_the_total(tmp_path: Path, kind: str):
    seen: list[tuple[int, int]] = []
    item = RED if kind == "arrays" else encoded(random_image(0))
    ingest(source_of(item, item, item), tmp_path, size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_published_file_is_whole_or_absent_and_a_dead_writers_leftover_goes(tmp_path: Path):
    import socket

    target = tmp_path / "x"
    target.write_bytes(b"old")
    with pytest.raises(TypeError), publish(target) as file:
        file.writelines([b"half", None])  # type: ignore
    assert target.read_bytes() == b"old"
    leftover = tmp_path / f".x~{socket.gethostname()}~4194305~aa.tmp"  # above the largest process id
    leftover.write_bytes(b"left by a killed process")
    with publish(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_settings_out_of_range_are_one_line_that_helps(tmp_path: Path):
    source = from_array(np.zeros((2, 4, 4), np.uint8))
    for options in ({"size": 1}, {"size": 5000}, {"size": 8, "format": "png"}, {"size": 8, "quality": 0}):
        with pytest.raises(UserError) as caught:
            ingest(source, tmp_path / "out", **options)  # type: ignore
        assert "\n" not in str(caught.value)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write into"):
        ingest(source, tmp_path / "file" / "out", size=8)


def test_memory_for_each_image_is_its_record(tmp_path: Path):
    assert RECORD.itemsize == 80
    manifest = ingest(from_array(np.zeros((50, 4, 4), np.uint8)), tmp_path, size=4)
    assert isinstance(manifest, Ingested)
    assert manifest.duplicates == 49
