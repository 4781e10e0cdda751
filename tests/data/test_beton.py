import io
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spice_dist.data import beton
from spice_dist.data.beton import Samples, check_pixels, jpeg_size, sidecar_path, verify
from spice_dist.data.beton_writer import BetonWriter
from spice_dist.data.seal import is_sealed, key_file, seal
from spice_dist.errors import DamagedFile

HEADER_FIELDS = [("version", 0, 2), ("num_fields", 2, 2), ("page_size", 4, 4), ("num_samples", 8, 8), ("table", 16, 8)]
METADATA_START = 24 + 2 * 1041


def patch(path: Path, offset: int, content: bytes) -> bytes:
    """Overwrite and return what was there. Negative offsets count from the end."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        before = file.read(len(content))
        file.seek(-len(before), os.SEEK_CUR)
        file.write(content)
    return before


def refused(path: Path, *, trusted_sidecar: bool = True) -> str:
    with pytest.raises(DamagedFile) as caught:
        verify(path, trusted_sidecar=trusted_sidecar)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_raw_file_passes_and_gives_back_the_pixels(packed: Path, pixels: np.ndarray):
    info = verify(packed / "dataset.beton")
    assert (info.n, info.format, info.heights[0], info.widths[0]) == (2600, "raw", 24, 24)
    check_pixels(info)
    order = np.random.default_rng(1).integers(0, info.n, 500)
    with closing(Samples(info)) as samples:
        assert np.array_equal(samples.raw(order), pixels[order])
        assert bytes(samples.encoded(7)) == pixels[7].tobytes()


def test_a_jpg_file_passes_and_gives_images_of_the_size_it_states(packed_folders: dict[str, Path]):
    info = verify(packed_folders["jpg"] / "dataset.beton")
    assert info.format == "jpg"
    check_pixels(info)
    with closing(Samples(info)) as samples:
        for i in range(info.n):
            data = samples.encoded(i)
            image = Image.open(io.BytesIO(data))
            assert jpeg_size(data) == (image.height, image.width) == (info.heights[i], info.widths[i])
            assert min(image.size) <= 64


def test_a_million_images_are_verified_in_less_than_two_seconds(tmp_path: Path):
    n, page = 1_000_000, 1 << 21
    writer = BetonWriter(tmp_path / "x.beton", n, page)
    per_page = page // 3072
    offsets = writer.position + np.arange(n) // per_page * page + np.arange(n) % per_page * 3072  # a sparse file
    writer.position = int(offsets[-1]) + 3072
    side = np.full(n, 32, np.uint16)
    writer.finish("raw", side, side, offsets, np.full(n, 3072))
    started = time.process_time()  # other work on the machine is not its delay
    assert verify(tmp_path / "x.beton", trusted_sidecar=False).n == n
    assert time.process_time() - started < 2


def test_every_truncation_is_found(beton_copy: Path):
    size = beton_copy.stat().st_size
    for length in [
        size - 1,
        size - 24,
        size - 2600 * 24,
        size * 9 // 10,
        size // 2,
        1 << 21,
        2106,
        2105,
        24,
        23,
        10,
        0,
    ]:
        os.truncate(beton_copy, length)
        refused(beton_copy, trusted_sidecar=False)
    beton_copy.unlink()
    assert "missing" in refused(beton_copy)


@pytest.mark.parametrize(("name", "offset", "length"), HEADER_FIELDS)
def test_every_change_of_a_header_field_is_found_without_the_sidecar(
    beton_copy: Path, name: str, offset: int, length: int
):
    values = [0, 1, 3, 2**16 + 1, 2 ** (8 * length) - 1, 10**6 if length == 8 else 7]
    for value in values:
        before = patch(beton_copy, offset, value.to_bytes(8, "little")[:length])
        refused(beton_copy, trusted_sidecar=False)
        patch(beton_copy, offset, before)
    verify(beton_copy)


def structural_damage() -> dict[str, Callable[[Path], object]]:
    """The cases on which stock FFCV gives garbage, hangs or crashes."""
    sample, table = METADATA_START + 24 * 100, -2600 * 24 + 24 * 100
    return {
        "metadata zeroed": lambda p: patch(p, METADATA_START, bytes(2600 * 24)),
        "table zeroed": lambda p: patch(p, -2600 * 24, bytes(2600 * 24)),
        "descriptors zeroed": lambda p: patch(p, 24, bytes(2 * 1041)),
        "JPEG flag": lambda p: patch(p, sample, b"\0"),
        "height 60000": lambda p: patch(p, sample + 3, (60000).to_bytes(2, "little")),
        "width 5000": lambda p: patch(p, sample + 1, (5000).to_bytes(2, "little")),
        "0x0": lambda p: patch(p, sample + 1, bytes(4)),
        "pointer past the end": lambda p: patch(p, sample + 5, (1 << 40).to_bytes(8, "little")),
        "pointer into the metadata": lambda p: patch(p, sample + 5, (3000).to_bytes(8, "little")),
        "pointer off by one": lambda p: patch(p, sample + 5, bytes([p.read_bytes()[sample + 5] ^ 1])),
        "index": lambda p: patch(p, sample + 16, b"\xff"),
        "allocation of 8 GiB": lambda p: patch(p, table + 16, (8 << 30).to_bytes(8, "little")),
        "allocation of 1 MiB": lambda p: patch(p, table + 16, (1 << 20).to_bytes(8, "little")),
        "allocation pointer": lambda p: patch(p, table + 8, (1 << 22).to_bytes(8, "little")),
        "allocation of another sample": lambda p: patch(p, table, (7).to_bytes(8, "little")),
        "appended": lambda p: p.open("ab").write(b"x"),
        "text": lambda p: p.write_text("hello " * 1000),
        "random after the version": lambda p: patch(p, 2, np.random.default_rng(0).bytes(1 << 20)),
        "overlap": lambda p: overlap(p),
    }


def overlap(path: Path) -> None:
    """Sample 101 at the pixels of sample 100, in metadata and table alike."""
    pointer = path.read_bytes()[METADATA_START + 2405 : METADATA_START + 2413]
    patch(path, METADATA_START + 24 * 101 + 5, pointer)
    patch(path, -2600 * 24 + 24 * 101 + 8, pointer)


@pytest.mark.parametrize("damage", structural_damage())
def test_structural_damage_is_found_without_the_sidecar(beton_copy: Path, damage: str):
    structural_damage()[damage](beton_copy)
    refused(beton_copy, trusted_sidecar=False)


def test_a_jpeg_of_a_longer_side_than_any_that_is_stored_is_refused_without_the_sidecar(
    packed_folders: dict[str, Path], tmp_path: Path
):
    path = Path(shutil.copy(packed_folders["jpg"] / "dataset.beton", tmp_path))
    patch(path, METADATA_START + 1, (beton.MAX_STORED_SIDE + 1).to_bytes(2, "little"))
    assert "more than 4096 pixels a side" in refused(path, trusted_sidecar=False)


def test_a_sidecar_that_is_missing_altered_or_of_another_file_is_refused(beton_copy: Path):
    sidecar = sidecar_path(beton_copy)
    good = sidecar.read_bytes()
    content = json.loads(good)
    for key in content.keys() - {beton.KEYED}:  # which says whose file it is, not whether it is whole
        for value in (None, 1, "x", [], "0" * 64):
            if value != content[key]:
                sidecar.write_text(json.dumps({**content, key: value}))
                refused(beton_copy)
        sidecar.write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        refused(beton_copy)
    for damaged in (
        b"",
        b"[]",
        b"null",
        good[:-100],
        b"[" * 100_000,
        b"\xff" * 9,
        good.replace(b'"n": 2600', b'"n": 2601'),
    ):
        sidecar.write_bytes(damaged)
        refused(beton_copy)
    sidecar.unlink()
    assert "json is missing" in refused(beton_copy)
    assert verify(beton_copy, trusted_sidecar=False).crc32 is None


def test_only_the_key_that_sealed_a_sidecar_makes_its_file_ours(beton_copy: Path, tmp_path: Path, monkeypatch):
    sidecar = sidecar_path(beton_copy)
    good = sidecar.read_bytes()
    assert beton.is_ours(beton_copy)
    content = json.loads(good)
    forged = {key: value for key, value in content.items() if key not in ("seal", beton.KEYED)} | {"n": 2599}
    forged["seal"] = beton._seal(forged)  # as anybody can compute it
    without = {key: value for key, value in content.items() if key != beton.KEYED}
    for other in (without, {**content, beton.KEYED: "0" * 64}, {**forged, beton.KEYED: content[beton.KEYED]}, [], None):
        sidecar.write_text(json.dumps(other))
        assert not beton.is_ours(beton_copy)
    for damaged in (b"", b"[" * 100_000, b"\xff"):
        sidecar.write_bytes(damaged)
        assert not beton.is_ours(beton_copy)
    sidecar.write_bytes(good)
    key_file().chmod(0o644)
    assert not beton.is_ours(beton_copy), "others could have sealed it"
    key_file().chmod(0o600)
    assert beton.is_ours(beton_copy)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another user"))
    assert not beton.is_ours(beton_copy)
    assert seal(b"content") != json.loads(good)[beton.KEYED]
    assert not beton.is_ours(beton_copy)


def test_without_a_place_for_a_key_nothing_is_sealed(monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", "/proc/nowhere")
    assert seal(b"content") is None
    assert not is_sealed(b"content", None)
    assert not is_sealed(b"content", "None")


def test_a_sidecar_larger_than_its_file_is_not_read(beton_copy: Path):
    with sidecar_path(beton_copy).open("r+b") as file:
        file.truncate(1 << 40)  # takes no disk, and no memory is left for it
    assert "larger than its file" in refused(beton_copy)
    assert not beton.is_ours(beton_copy)


def test_two_swapped_images_fit_the_structure_but_not_the_sidecar(beton_copy: Path):
    whole = beton_copy.read_bytes()
    for start, field in ((METADATA_START, 5), (len(whole) - 2600 * 24, 8)):
        first, second = (start + 24 * i + field for i in (3, 4))
        patch(beton_copy, first, whole[second : second + 8])
        patch(beton_copy, second, whole[first : first + 8])
    verify(beton_copy, trusted_sidecar=False)  # without the sidecar nobody could know
    assert "structure" in refused(beton_copy)


@pytest.mark.parametrize("sample", [0, 1, 1300, 2599])
def test_one_flipped_bit_in_the_pixels_is_found_by_its_checksum(beton_copy: Path, sample: int):
    offset = int(verify(beton_copy).offsets[sample]) + 17
    before = patch(beton_copy, offset, b"\0")
    patch(beton_copy, offset, bytes([before[0] ^ 4]))
    info = verify(beton_copy)  # the structure is sound
    with pytest.raises(DamagedFile, match=f"image {sample} "):
        check_pixels(info)


def test_300_fuzzed_headers_and_tables_raise_damaged_file_or_are_unchanged(beton_copy: Path):
    rng = np.random.default_rng(7)
    size = beton_copy.stat().st_size
    regions = [(0, 24), (24, 2106), (METADATA_START, METADATA_START + 2600 * 24), (size - 2600 * 24, size)]
    survived = 0
    for i in range(300):
        low, high = regions[i % 4]
        length = int(rng.integers(1, 12))
        offset = int(rng.integers(low, high - length))
        before = patch(beton_copy, offset, rng.bytes(length))
        for trusted in (False, True):
            try:
                verify(beton_copy, trusted_sidecar=trusted)
                survived += trusted and beton_copy.read_bytes()[offset : offset + length] != before
            except DamagedFile:
                pass
        patch(beton_copy, offset, before)
    assert survived == 0
    verify(beton_copy)


def test_a_file_that_is_replaced_or_cut_after_verification_is_refused(
    beton_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    info = verify(beton_copy)
    samples = Samples(info)
    os.truncate(beton_copy, 3 << 20)
    with pytest.raises(DamagedFile, match="cut short"):
        samples.raw(np.arange(2600))
    with pytest.raises(DamagedFile, match="cut short"):
        samples.encoded(2599)
    with pytest.raises(DamagedFile, match="replaced"):
        Samples(info)
    samples.close()
    monkeypatch.setattr(beton, "identity_of", lambda _: info.identity)
    Samples(info).close()  # nothing else would have seen it


def test_one_sample_is_refused_once_its_bytes_change_and_only_by_its_checksum(beton_copy: Path):
    info = verify(beton_copy)
    with closing(Samples(info)) as samples:
        patch(beton_copy, int(info.offsets[5]), bytes([samples.encoded(5)[0] ^ 1]))
        with pytest.raises(DamagedFile, match="image 5 "):
            samples.encoded(5)
        samples.encoded(4)
    unsealed = replace(info, crc32=None, identity=beton.identity_of(beton_copy))
    with closing(Samples(unsealed)) as samples:
        samples.encoded(5)


def jpeg(mode: str = "RGB", size: tuple[int, int] = (20, 10), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "JPEG", **options)
    return file.getvalue()


def test_the_markers_of_a_jpeg_give_its_size_and_anything_odd_is_refused():
    good = jpeg()
    assert jpeg_size(good) == jpeg_size(jpeg("L")) == jpeg_size(jpeg(progressive=True)) == (10, 20)
    frame = good.index(b"\xff\xc0")
    length = int.from_bytes(good[frame + 2 : frame + 4], "big") + 2
    odd = {
        "four components": jpeg("CMYK"),
        "no start": good[2:],
        "cut": good[:-2],
        "data behind the end": good + b"x",
        "no frame": good[:frame] + good[frame + length :],
        "two frames": good[:frame] + good[frame : frame + length] + good[frame:],
        "lossless": good[: frame + 1] + b"\xc3" + good[frame + 2 :],
        "12 bits": good[: frame + 4] + b"\x0c" + good[frame + 5 :],
        "length past the end": good[:4] + b"\xff\xff" + good[6:],
        "nothing": b"",
        "text": b"text",
    }
    assert [name for name, data in odd.items() if jpeg_size(data) is not None] == []
