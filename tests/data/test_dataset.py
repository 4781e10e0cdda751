"""DATA in all its kinds reaches the same pixels."""

import csv
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spice_dist.data.dataset import DataConfig, open_data, prepare
from spice_dist.data.ingest import ingest
from spice_dist.data.loaders import open_images
from spice_dist.data.manifest import read_manifest, read_paths
from spice_dist.data.packed_files import pack
from spice_dist.data.sources import BadImage, Source, listing
from spice_dist.errors import UserError

CPU = torch.device("cpu")
NAMES = ["a.png", "b b.png", "ü/日本.png", "-rf.png", "sub/=1.png"]


def pixels_of(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for i, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(i)).save(root / name)
    return root


def stored(source: Source, out: Path) -> dict[str, np.ndarray]:
    """Name -> pixels, as ingested."""
    ingest(source, out, size=8)
    with closing(open_images(out, device=CPU, size=8)) as images:
        ((batch, _),) = images.batches(np.arange(images.n), images.n)
    return dict(zip(read_paths(out), batch.permute(0, 2, 3, 1).numpy(), strict=True))


def check(source: Source, out: Path, names: list[str], order: list[int]) -> None:
    assert source.paths == names
    found = stored(source, out)
    for name, i in zip(names, order, strict=True):
        assert np.array_equal(found[name], pixels_of(i)), name


def test_a_text_list_names_files_relative_to_itself_or_absolutely_byte_for_byte(folder: Path, tmp_path: Path):
    hostile = os.fsencode(folder) + b"/\xff.png"
    Image.fromarray(pixels_of(9)).save(folder / "plain.png")
    os.rename(os.fsencode(folder / "plain.png"), hostile)
    lines = [os.fsencode(name) for name in NAMES[::-1]] + [b"", hostile]
    (folder / "list.txt").write_bytes(b"\r\n".join(lines) + b"\n")
    source = open_data(str(folder / "list.txt"))
    check(source, tmp_path / "out", [*NAMES[::-1], os.fsdecode(hostile)], [4, 3, 2, 1, 0, 9])


def test_a_csv_list_has_its_labels_only_when_asked(folder: Path, tmp_path: Path):
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("label", "path"), *zip("xyxyx", NAMES, strict=True)])
    assert open_data(str(folder / "list.csv")).labels is None
    source = open_data(str(folder / "list.csv"), "list")
    assert source.labels is not None
    assert (source.labels.tolist(), source.label_names) == ([0, 1, 0, 1, 0], ["x", "y"])
    check(source, tmp_path / "out", NAMES, list(range(5)))


def test_parquet_lists_hold_paths_or_the_images_themselves(folder: Path, tmp_path: Path):
    import pyarrow
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"path": NAMES, "label": [3, 1, 3, 1, 3]}), folder / "paths.parquet")
    source = open_data(str(folder / "paths.parquet"), "list")
    assert source.label_names == ["1", "3"]
    check(source, tmp_path / "paths", NAMES, list(range(5)))
    cells = [(folder / name).read_bytes() for name in NAMES]
    for kind, column in (("bytes", cells), ("struct", [{"bytes": cell, "path": None} for cell in cells])):
        path = folder / f"{kind}.parquet"
        parquet.write_table(pyarrow.table({"image": column}), path, row_group_size=2)
        check(open_data(str(path)), tmp_path / kind, [f"{kind}.parquet/{i:07d}" for i in range(5)], list(range(5)))


def test_a_saved_hugging_face_data_set_is_its_images(folder: Path, tmp_path: Path):
    import datasets

    files = [str(folder / name) for name in NAMES]
    data = datasets.Dataset.from_dict({"picture": files, "label": list("xyxyx")})
    data.cast_column("picture", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    source = open_data(str(tmp_path / "saved"), "list")
    assert source.label_names == ["x", "y"]
    check(source, tmp_path / "out", [f"saved/{i:07d}" for i in range(5)], list(range(5)))


def test_a_file_that_a_list_names_and_that_is_not_there_is_quarantined(folder: Path, tmp_path: Path):
    (folder / "list.txt").write_text("a.png\nnowhere.png\n")
    assert ingest(open_data(str(folder / "list.txt")), tmp_path / "out", size=8, max_bad=0.5).bad == 1
    assert "nowhere.png,cannot read: No such file" in (tmp_path / "out/quarantine.csv").read_text()


def test_addresses_are_read_like_folders(folder: Path, tmp_path: Path):
    """`local://` is fsspec's name for this machine's files: the same code as for s3:// with another transport."""
    expected = stored(open_data(str(folder)), tmp_path / "folder")
    for scheme in ("local", "file"):
        found = stored(open_data(f"{scheme}://{folder}"), tmp_path / scheme)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    labelled = open_data(f"local://{folder}/sub/..", None)
    before = listing(labelled)
    Image.fromarray(pixels_of(77)).save(folder / "a.png")
    os.utime(folder / "a.png", (1, 1))
    assert listing(open_data(f"local://{folder}/sub/..", None)) != before


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("memory://x", "memory"),
        ("nosuch://x", "nosuch"),
        ("local:///nowhere/at/all", "check the address"),
        ("cifar10:/nowhere", "cifar"),
        ("nowhere/", "there is no"),
    ],
)
def test_what_is_not_there_is_one_line(data: str, words: str):
    with pytest.raises(UserError, match=words) as caught:
        open_data(data)
    assert "\n" not in str(caught.value)


def test_a_password_in_an_address_is_never_shown():
    with pytest.raises(UserError) as caught:
        open_data("nosuch://user:secret@host/x")
    assert "secret" not in str(caught.value)


def test_labels_and_splits_that_do_not_fit_the_data_are_refused(folder: Path):
    (folder / "list.txt").write_text("a.png\n")
    for data, labels, words in [
        (folder / "list.txt", "folder", "'list'"),
        (folder, "list", "do not belong"),
        (folder / "list.txt", "list", "no column 'label'"),
    ]:
        with pytest.raises(UserError, match=words):
            open_data(str(data), labels)
    with pytest.raises(UserError, match="test part"):
        open_data(str(folder), split="split")


def test_a_packed_file_is_data_again_with_its_names_and_nothing_is_copied(folder: Path, tmp_path: Path):
    packed = tmp_path / "x.beton"
    first = pack(open_data(str(folder)), packed, size=8)
    again = prepare(open_data(str(packed)), DataConfig(size=8), tmp_path / "run")
    assert again == first == read_manifest(tmp_path / "run")
    assert read_paths(tmp_path / "run") == sorted(NAMES, key=os.fsencode)
    assert (tmp_path / "run/dataset.beton").is_symlink()
    with closing(open_images(tmp_path / "run", device=CPU, size=8)) as images:
        ((batch, _),) = images.batches(np.array([1]), 1)
    name = sorted(NAMES, key=os.fsencode)[1]
    assert np.array_equal(batch[0].permute(1, 2, 0).numpy(), pixels_of(NAMES.index(name)))


def test_a_packed_file_can_be_packed_again_in_another_size_or_format(folder: Path, tmp_path: Path):
    first = tmp_path / "x.beton"
    pack(open_data(str(folder)), first, size=8)
    for kind, size in (("raw", 4), ("jpg", 8)):
        again = pack(open_data(str(first)), tmp_path / f"{kind}.beton", size=size, format=kind)
        assert (again.n, again.bad, again.format) == (5, 0, kind)
    back = pack(open_data(str(tmp_path / "jpg.beton")), tmp_path / "back.beton", size=8, format="raw")
    assert (back.n, back.bad) == (5, 0)


def test_a_packed_file_of_another_user_is_data_only_when_trusted_and_is_decoded_again(
    folder: Path, tmp_path: Path, monkeypatch
):
    packed = tmp_path / "x.beton"
    pack(open_data(str(folder)), packed, size=8)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another user"))
    with pytest.raises(UserError, match="--trust-foreign-beton"):
        open_data(str(packed))
    source = open_data(str(packed), trust_foreign_beton=True)
    prepare(source, DataConfig(size=8), tmp_path / "run")
    assert not (tmp_path / "run/dataset.beton").is_symlink(), "FFCV must not open the file itself"
    assert read_paths(tmp_path / "run") == sorted(NAMES, key=os.fsencode)
    pack(open_data(str(folder)), packed, size=8)  # as the line says
    assert prepare(open_data(str(packed)), DataConfig(size=8), tmp_path / "ours").n == len(NAMES)
    assert (tmp_path / "ours/dataset.beton").is_symlink()


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet", "cell"])
@pytest.mark.parametrize("way", ["../images/a.png", "/absolute", "link/a.png"])
def test_a_list_names_files_outside_of_its_folder_only_when_trusted(folder: Path, tmp_path: Path, kind: str, way: str):
    import pyarrow as arrow
    from pyarrow import parquet

    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "link").symlink_to(folder)
    name = str(folder / "a.png") if way == "/absolute" else way
    path = lists / f"list.{'parquet' if kind == 'cell' else kind}"
    if kind == "cell":
        parquet.write_table(arrow.table({"image": [{"bytes": None, "path": name}]}), path)
        with pytest.raises(BadImage, match="--trust-list"):
            open_data(str(path)).read(0)
    else:
        if kind == "parquet":
            parquet.write_table(arrow.table({"path": [name]}), path)
        else:
            path.write_text(f"path\n{name}\n" if kind == "csv" else f"{name}\n")
        with pytest.raises(UserError, match=r"names 1 files outside of its folder, such as .*--trust-list"):
            open_data(str(path))
    read = open_data(str(path), trust_list=True).read(0)
    assert read == (folder / "a.png").read_bytes()


# ---------------------------------------------------------------- .beton files of other programs

WRITE = """
import sys
import numpy as np
from ffcv.fields import FloatField, IntField, RGBImageField
from ffcv.writer import DatasetWriter

class Images:
    def __len__(self): return 12
    def __getitem__(self, i):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        return float(i), pixels if mode == "raw" else np.full_like(pixels, pixels[0, 0]), i % 3

for mode in ("raw", "jpg"):
    fields = {"weight": FloatField(), "image": RGBImageField(write_mode=mode, jpeg_quality=100), "label": IntField()}
    writer = DatasetWriter(f"{sys.argv[1]}/{mode}.beton", fields, page_size=1 << 21, num_workers=1)
    writer.from_indexed_dataset(Images())
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that FFCV itself wrote, with other fields than ours."""
    root = tmp_path_factory.mktemp("foreign")
    subprocess.run([sys.executable, "-c", WRITE, str(root)], check=True, timeout=120, capture_output=True)
    return {mode: root / f"{mode}.beton" for mode in ("raw", "jpg")}


def test_a_foreign_file_is_refused_with_the_option_and_read_right_with_it(foreign: dict[str, Path], tmp_path: Path):
    with pytest.raises(UserError, match="--trust-foreign-beton"):
        open_data(str(foreign["raw"]))
    for mode, bound in (("raw", 0), ("jpg", 3)):  # the images of the second are of one colour each
        found = stored(open_data(str(foreign[mode]), trust_foreign_beton=True), tmp_path / mode)
        assert len(found) == 12
        for i, pixels in enumerate(found.values()):
            expected = pixels_of(i) if mode == "raw" else pixels_of(i)[0, 0]
            assert np.abs(pixels.astype(int) - expected).max() <= bound


CASES = """
import json, os, sys, tempfile
from pathlib import Path
import numpy as np
from spice_dist.errors import DamagedFile

good = Path(sys.argv[1]).read_bytes()
record, image, fuzzed = map(int, sys.argv[2:])  # bytes of metadata of a sample, where those of the image begin; cases
rng = np.random.default_rng(0)
size, n, start = len(good), int.from_bytes(good[8:16], "little"), 24 + good[2] * 1041
table = size - n * 24

def put(data, at, value):
    return data[:at] + value + data[at + len(value):]

def cases():
    for cut in (0, 10, 24, size // 2, size * 9 // 10, size - 1000, size - 25 * 24):
        yield good[:max(cut, 0)]
    yield b"hello " * 1000
    yield put(good, 0, b"\\1\\0")
    yield put(good, 2, rng.bytes(2000))
    yield put(good, 2, (60000).to_bytes(2, "little"))
    yield put(good, 4, bytes(4))
    for value in (0, 10**6, 10**12, 2**64 - 1):
        yield put(good, 8, value.to_bytes(8, "little"))
    yield put(good, 16, bytes(8))
    yield put(put(good, 16, bytes(8)), start, bytes(n * record))
    for at, length in ((0, 1), (1, 4), (1, 4), (5, 8), (5, 8)):
        yield put(good, start + record + image + at, b"\\xff" * length)
        yield put(good, start + record + image + at, bytes(length))
    for value in (8 << 30, 1 << 20, 0, 2**63):
        yield put(good, table + 24 + 16, value.to_bytes(8, "little"))
    for _ in range(fuzzed):
        low, high = [(0, 24), (24, start), (start, start + n * record), (table, size)][rng.integers(4)]
        length = int(rng.integers(1, 12))
        yield put(good, int(rng.integers(low, high - length)), rng.bytes(length))
"""

FOREIGN = """
from spice_dist.data.decode import Packing, pack_image, strict_pillow
from spice_dist.data.foreign import foreign_source
from spice_dist.data.sources import BadImage

path = Path(tempfile.mkdtemp()) / "x.beton"
pixels = {np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8).tobytes() for i in range(n)}
counts = {"refused": 0, "bad": 0, "right": 0, "wrong": 0}
total = 0
with strict_pillow():
    for data in cases():
        total += 1
        path.write_bytes(data)
        try:
            source = foreign_source(path)
        except DamagedFile:
            counts["refused"] += 1
            continue
        if len(source.paths) > 10_000:
            counts["wrong"] += 1
            continue
        for i in range(len(source.paths)):
            try:
                result = pack_image(source.read(i), Packing("raw", 8))
            except BadImage:
                counts["bad"] += 1
                continue
            if isinstance(result, str):
                counts["bad"] += 1
            else:
                counts["right" if result[1] in pixels else "wrong"] += 1
print(json.dumps([total, counts]))
"""


FUZZED = pytest.mark.parametrize("fuzzed", [400, pytest.param(2000, marks=pytest.mark.slow)])


@FUZZED
def test_28_damages_and_fuzzed_headers_give_no_crash_no_hang_and_no_foreign_memory(
    foreign: dict[str, Path], fuzzed: int
):
    """In one child. Wrong pixels can only come from a pointer that was moved inside the file, within its bounds."""
    done = subprocess.run(
        [sys.executable, "-c", CASES + FOREIGN, str(foreign["raw"]), "40", "8", str(fuzzed)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    total, counts = json.loads(done.stdout)
    assert total >= 28 + fuzzed
    assert counts["refused"] > fuzzed // 4
    assert counts["right"] > 5 * fuzzed
    assert counts["wrong"] < 0.01 * counts["right"]


OURS = """
import itertools
import shutil
import torch
from contextlib import closing
from spice_dist.data.loaders import open_images

folder = Path(tempfile.mkdtemp()) / "data"
shutil.copytree(Path(sys.argv[1]).parent, folder)
path = folder / "dataset.beton"
order = np.arange(n)

def read(loader):
    with closing(open_images(folder, device=torch.device("cpu"), size=24, loader=loader, resident_bytes=0)) as images:
        return torch.cat([batch for batch, _ in images.batches(order, n)])

right = {loader: read(loader) for loader in ("ffcv", "torch")}
total, counts = 0, {"refused": 0, "right": 0, "wrong": 0}
samples = [i for i, byte in enumerate(good) if start + n * record <= i < table and byte]
flips = (put(good, i, bytes([good[i] ^ 1])) for i in rng.choice(samples, 100).tolist())
for data in itertools.chain(cases(), flips):
    total += 1
    path.write_bytes(data)
    loader = ("ffcv", "torch")[total % 2]
    try:
        found = read(loader)
    except DamagedFile:
        counts["refused"] += 1
    else:
        counts["right" if data == good or torch.equal(found, right[loader]) else "wrong"] += 1
print(json.dumps([total, counts]))
"""


@FUZZED
def test_28_damages_fuzzed_headers_and_100_flipped_bits_of_our_own_files_are_all_refused(
    photos: list[np.ndarray], tmp_path: Path, fuzzed: int
):
    """In one child, each opened and read to the end by both loaders: no crash, no hang, no other pixels."""
    source = Source("photos", [str(i) for i in range(len(photos))], photos.__getitem__)
    ingest(source, tmp_path, size=24, format="jpg")
    done = subprocess.run(
        [sys.executable, "-c", CASES + OURS, str(tmp_path / "dataset.beton"), "24", "0", str(fuzzed)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    total, counts = json.loads(done.stdout.splitlines()[-1])
    assert total >= 128 + fuzzed
    assert counts == {"refused": total - counts["right"], "right": counts["right"], "wrong": 0}
    assert counts["right"] < 20  # bytes that happened to be written over by themselves
