import csv
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spice_dist.data import ingest as ingest_module
from spice_dist.data.files import csv_cell, publish
from spice_dist.data.ingest import check_fingerprint, ingest, read_manifest, read_paths, to_pixels
from spice_dist.data.sources import BadImage, Source, open_source
from spice_dist.errors import DamagedFile, UserError

RED = np.array([[[200, 10, 30]] * 4] * 4, np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def random_image(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def source_of(*data: np.ndarray | bytes, names: list[str] | None = None, **options: object) -> Source:
    return Source("test", names or [f"{i}.png" for i in range(len(data))], list(data).__getitem__, **options)  # type: ignore


def rows_of(folder: Path) -> list[list[str]]:
    return list(csv.reader((folder / "quarantine.csv").read_text("utf-8").splitlines()))


def big_png(width: int, height: int) -> bytes:
    """A PNG header that claims width x height pixels, with hardly any data behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_bad_images_are_quarantined_with_a_reason_and_the_others_kept_in_order(tmp_path: Path):
    good = [encoded(random_image(i)) for i in range(4)]
    jpeg = encoded(random_image(9, 64, 64), "JPEG")
    bad = {
        "text.jpg": b"this is text",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "bomb.png": big_png(20_000, 20_000),
        "wide.png": big_png(70_000, 100),
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        "dot.png": encoded(Image.new("RGB", (1, 1))),
    }
    data = [good[0], *bad.values(), *good[1:]]
    names = ["g0", *bad, "g1", "g2", "g3"]
    result = ingest(
        source_of(*data, names=names, labels=np.arange(10), label_names=list("abcdefghij")), 8, tmp_path, 0.6
    )
    assert (result.n, result.bad) == (4, 6)
    rows = rows_of(tmp_path)
    assert rows[0] == ["path", "reason"]
    assert [row[0] for row in rows[1:]] == list(bad)
    reasons = dict(rows[1:])
    assert "formats" in reasons["text.jpg"]
    assert "formats" in reasons["eps.png"]
    assert "truncated" in reasons["cut.jpg"]
    assert "million" in reasons["bomb.png"]
    assert "sides" in reasons["wide.png"]
    images = np.load(tmp_path / "images.npy")
    assert np.array_equal(images, np.stack([np.asarray(random_image(i)) for i in range(4)]))
    assert np.load(tmp_path / "labels.npy").tolist() == [0, 7, 8, 9]
    assert read_paths(tmp_path) == ["g0", "g1", "g2", "g3"]
    assert read_manifest(tmp_path) == result
    check_fingerprint(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_too_many_bad_images_stop_the_run_and_name_count_file_and_option(tmp_path: Path):
    data = [encoded(random_image(0)), b"bad", b"worse"]
    with pytest.raises(UserError, match=r"2 of 3 .*quarantine\.csv.*--max-bad"):
        ingest(source_of(*data), 8, tmp_path, 0.5)
    assert len(rows_of(tmp_path)) == 3
    assert not (tmp_path / "images.npy").exists()
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(UserError, match="none of the 1 images"):
        ingest(source_of(b"bad"), 8, tmp_path, 1.0)


def test_a_bomb_is_refused_by_its_header_and_only_by_that(monkeypatch: pytest.MonkeyPatch):
    bomb = encoded(Image.new("1", (8_000, 7_000)))  # 56 million pixels in a few kilobytes
    assert len(bomb) < 50_000
    with pytest.raises(BadImage, match="million"):
        to_pixels(bomb, 8)
    monkeypatch.setattr(ingest_module, "MAX_PIXELS", 1 << 40)
    assert to_pixels(bomb, 8).shape == (8, 8, 3)  # without the limit it is decoded


def test_all_eight_exif_orientations_give_the_same_pixels():
    upright = np.asarray(random_image(3))
    stored = {  # what a camera stores so that the tag turns it upright
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "TIFF"):
            data = encoded(Image.fromarray(np.ascontiguousarray(pixels)), kind, exif=exif)
            assert np.array_equal(to_pixels(data, 8), upright), (kind, orientation)


def flat(mode: str, value: object) -> Image.Image:
    return Image.new(mode, (4, 4), value)  # type: ignore


def palette() -> Image.Image:
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 200, 10, 30])
    return image


GOLDEN: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "RGB": (encoded(flat("RGB", (200, 10, 30))), (200, 10, 30)),
    "1": (encoded(flat("1", 1)), (255, 255, 255)),
    "L": (encoded(flat("L", 77)), (77, 77, 77)),
    "P": (encoded(palette()), (200, 10, 30)),
    "P, transparent": (encoded(palette(), transparency=1), (255, 255, 255)),
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


def test_pixels_that_do_not_say_what_is_white_are_refused():
    for data in (np.full((4, 4), 70_000, np.int32), np.zeros((4, 4), np.float32)):
        with pytest.raises(BadImage, match="white"):
            to_pixels(encoded(Image.fromarray(data), "TIFF"), 4)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert to_pixels(data, 4)[0, 0].tolist() == [255, 0, 0], kind


def test_an_image_of_the_right_size_is_untouched_and_others_keep_their_centre():
    exact = np.asarray(random_image(1))
    assert np.array_equal(to_pixels(exact, 8), exact)
    wide = np.asarray(random_image(2, width=13, height=8))
    assert np.array_equal(to_pixels(wide, 8), wide[:, 2:10])
    large = random_image(3, width=120, height=40)
    shrunk = np.asarray(large.resize((30, 10), Image.Resampling.BICUBIC))  # shorter side to 10, then the centre
    assert np.abs(to_pixels(np.asarray(large), 10).astype(int) - shrunk[:, 10:20]).max() <= 1
    assert to_pixels(RED[:2, :2], 8).reshape(-1, 3).tolist() == [[200, 10, 30]] * 64  # enlarged
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(to_pixels(grey, 8), np.stack([grey] * 3, axis=2))
    assert np.array_equal(to_pixels(grey[:, :, None], 8), np.stack([grey] * 3, axis=2))


def test_shrinking_averages_instead_of_skipping():
    checker = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
    assert np.abs(to_pixels(checker, 8).astype(int) - 128).max() < 10


def test_the_fingerprint_follows_names_pixels_and_order_and_nothing_else(tmp_path: Path):
    a, b = np.asarray(random_image(1)), np.asarray(random_image(2))

    def fingerprint(source: Source) -> str:
        return ingest(source, 8, tmp_path).fingerprint

    base = fingerprint(source_of(a, b))
    assert fingerprint(source_of(encoded(Image.fromarray(a)), b)) == base
    changed = a.copy()
    changed[0, 0, 0] ^= 1
    others = [source_of(b, a), source_of(changed, b), source_of(a, b, names=["0.png", "x.png"]), source_of(a)]
    assert len({fingerprint(s) for s in others} | {base}) == 5


def test_exact_duplicates_are_counted(tmp_path: Path):
    a, b = np.asarray(random_image(1)), np.asarray(random_image(2))
    assert ingest(source_of(a, b, a, encoded(Image.fromarray(a)), b), 8, tmp_path).duplicates == 3


def test_altered_pixels_or_names_are_found_against_the_manifest(tmp_path: Path):
    ingest(source_of(RED, RED[::-1]), 4, tmp_path)
    for name in ("images.npy", "paths.jsonl"):
        content = bytearray((tmp_path / name).read_bytes())
        content[-4] ^= 1
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DamagedFile):
            check_fingerprint(tmp_path)
        (tmp_path / name).write_bytes(good)
    for content in (b"", b"{}", b"[1]", b'{"version": 1}'):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(DamagedFile):
            read_manifest(tmp_path)


def test_hostile_names_survive_to_paths_and_cannot_break_the_quarantine(tmp_path: Path):
    names = ["=1+1", "@x", "-2", "+3", "a\nb", 'c,d"e', "\udcff\x1b[31m", "日本", "tab\t", "\u202egnp.exe"]
    ingest(source_of(*[RED] * 10, names=names), 4, tmp_path / "good")
    assert read_paths(tmp_path / "good") == names
    assert (tmp_path / "good" / "paths.jsonl").read_bytes().isascii()
    ingest(source_of(*[b"bad"] * 10, RED, names=[*names, "ok"]), 4, tmp_path / "bad", 1.0)
    cells = [row[0] for row in rows_of(tmp_path / "bad")[1:]]
    assert len(cells) == 10
    assert all(cell.isprintable() and cell[0] not in "=+-@" for cell in cells)
    assert csv_cell("日本 a,b") == "日本 a,b"


def test_progress_ends_at_the_total(tmp_path: Path):
    seen: list[tuple[int, int]] = []
    ingest(source_of(RED, RED, RED), 4, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_run_that_is_cut_short_leaves_no_seal_and_no_partial_file(tmp_path: Path):
    ingest(source_of(RED), 4, tmp_path)

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(source_of(RED, RED), 4, tmp_path, progress=stop)
    assert not (tmp_path / "manifest.json").exists()
    assert not list(tmp_path.glob(".*"))


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


def test_a_folder_of_real_files_goes_from_disk_to_pixels(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        random_image(i).save(tmp_path / "in" / f"{i}.png")
    result = ingest(open_source(str(tmp_path / "in")), 8, tmp_path / "out")
    assert np.load(tmp_path / "out" / "images.npy").shape == (3, 8, 8, 3)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["n"] == result.n == 3
    with pytest.raises(UserError, match="size"):
        ingest(open_source(str(tmp_path / "in")), 1, tmp_path / "out")
