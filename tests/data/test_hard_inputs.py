"""Images as people have them: folders of phones and NAS, 12-bit detectors, names, lists from Windows, copies elsewhere.

What is right is known from how each file was made. Tests `without` something switch a defence off: it is wrong then.
"""

import csv
import io
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spice_dist.assignments import read_names, write_assignments
from spice_dist.data import beton, decode
from spice_dist.data.dataset import open_data
from spice_dist.data.decode import Packing, pack_image
from spice_dist.data.files import csv_line, path_cell, path_of_cell, text_cell, text_of_cell
from spice_dist.data.ingest import ingest
from spice_dist.data.left_out import left_out, left_out_line
from spice_dist.data.manifest import Ingested, read_manifest, read_paths
from spice_dist.data.packed_files import adopt, pack, packed_source
from spice_dist.data.sources import Source, content_of, encode_labels, from_files, listing, open_source
from spice_dist.errors import UserError

HEIC = "HEIC is read with pillow-heif: pip install 'spice_dist[heic]'"
RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


def picture(i: int, side: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8))


def folder_of(folder: Path, count: int, suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i:02d}.{suffix}", {"jfif": "JPEG"}.get(suffix))
    return folder


def means(out: Path) -> dict[str, float]:
    """Name -> mean of the stored pixels."""
    info = beton.verify(out / "dataset.beton")
    pixels = beton.Samples(info).raw(np.arange(info.n))
    return dict(zip(read_paths(out), pixels.mean((1, 2, 3)).tolist(), strict=True))


def stored(source: Source, out: Path, **options: object) -> Ingested:
    return ingest(source, out, size=64, format="raw", workers=1, **options)  # type: ignore


# ---------------------------------------------------------------- the same bytes elsewhere


@pytest.mark.parametrize("how", ["touch", "copy", "tar"])
def test_the_same_files_staged_anew_have_the_same_content_and_others_have_not(tmp_path: Path, how: str):
    folder = folder_of(tmp_path / "in", 5)
    (folder / "bad.png").write_bytes(b"no image")
    manifest = stored(open_source(str(folder)), tmp_path / "out", max_bad=0.5)
    before = listing(open_source(str(folder)))
    if how == "touch":
        for file in folder.iterdir():
            os.utime(file, (1, 1))
    elif how == "copy":
        folder = Path(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    else:
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            archive.add(folder, "again")
        with tarfile.open(tmp_path / "x.tar") as archive:
            archive.extractall(tmp_path, filter="data")
        folder = tmp_path / "again"
        os.utime(folder / "00.png", (2, 2))
    again = open_source(str(folder))
    assert listing(again) != before, "by their times they are others"
    assert content_of(again) == manifest.content
    data = bytearray((folder / "03.png").read_bytes())
    data[-20] ^= 1
    (folder / "03.png").write_bytes(bytes(data))
    assert content_of(again) != manifest.content
    os.rename(folder / "03.png", folder / "33.png")
    assert content_of(open_source(str(folder))) != manifest.content


def test_a_resumed_ingest_notes_the_content_of_all_files(tmp_path: Path):
    source = open_source(str(folder_of(tmp_path / "in", 40)))

    def stop(done: int, _total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored(source, tmp_path / "out", progress=stop)
    assert stored(source, tmp_path / "out").content == content_of(source)


def test_a_packed_file_and_its_run_are_moved_together(tmp_path: Path):
    place = tmp_path / "here"
    pack(open_source(str(folder_of(place / "in", 4))), place / "x.beton", size=8, format="raw")
    adopt(place / "x.beton", place / "runs" / "a" / "data")
    before = means(place / "runs/a/data")
    place.rename(tmp_path / "there")
    assert means(tmp_path / "there/runs/a/data") == before


# ---------------------------------------------------------------- nothing is left out in silence


def of_a_phone(folder: Path) -> Path:
    """As a phone and a NAS leave a folder: 10 jpg, 3 jfif and 2 avif are images; each other thing has its reason."""
    folder_of(folder, 10, "jpg")
    for i in range(3):
        picture(20 + i).save(folder / f"save{i}.jfif", "JPEG")
    for i in range(2):
        picture(30 + i).save(folder / f"web{i}.avif")
    for i in range(4):
        (folder / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
        (folder / f"link{i}.jpg").symlink_to(f"0{i}.jpg")
    for i in range(6):
        folder_of(folder / "@eaDir" / f"{i}", 1, "jpg")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX/x.jpg").write_bytes(b"\0\5\x16\7")
    (folder / "._00.jpg").write_bytes(b"\0\5\x16\7")
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "loop").symlink_to(".")
    os.mkfifo(folder / "pipe.jpg")
    socket.socket(socket.AF_UNIX).bind(str(folder / "s.jpg"))
    frames = [picture(i) for i in range(3)]
    frames[0].save(folder / "pages.tif", save_all=True, append_images=frames[1:])
    (folder / "broken.jpg").write_bytes(b"nothing")
    return folder


def test_what_is_left_out_of_a_phones_folder_is_counted_in_one_sentence(tmp_path: Path):
    manifest = stored(open_source(str(of_a_phone(tmp_path / "in"))), tmp_path / "out", max_bad=0.5)
    assert manifest.n == 16
    heic = "" if decode.formats() != decode.FORMATS else f"; {HEIC}"
    assert manifest.notes()[0] == (
        "18 of 34 left out: 5 links, 4 .heic, 2 special files, 2 system folders, 1 .db, 1 hidden image, 1 unreadable, "
        f"2 further pages{heic}"
    )
    assert manifest.animated == 0, "pages are no animation"
    assert read_manifest(tmp_path / "out") == manifest


def test_heic_without_its_library_names_the_library(tmp_path: Path):
    if decode.formats() != decode.FORMATS:
        pytest.skip("pillow-heif is installed")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(UserError, match=r"found 1 \.heic.*pip install 'spice_dist\[heic\]'"):
        open_source(str(tmp_path))
    reason = pack_image((tmp_path / "a.heic").read_bytes(), Packing("raw", 8))
    assert reason == HEIC


def test_a_sentence_about_nothing_is_none():
    assert left_out_line(left_out({}, 0, 0), 5) == ""


def test_a_path_that_is_empty_or_holds_a_nul_is_a_row_of_its_own(tmp_path: Path):
    picture(0).save(tmp_path / "a.png")
    source = from_files([str(tmp_path / "a.png"), "", "a\0b", str(tmp_path / "a.png")])
    manifest = stored(source, tmp_path / "out", max_bad=0.5)
    assert (manifest.n, manifest.bad) == (2, 2)


# ---------------------------------------------------------------- 16-bit greys


def grey_tiff(values: np.ndarray, order: str, photometric: int) -> bytes:
    """A 16-bit TIFF by hand: Pillow writes neither big-endian ones nor those whose white is 0."""
    height, width = values.shape
    data = values.astype(f"{order}u2").tobytes()
    entries = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, photometric)]
    entries += [(273, 4, 8 + 2 + 12 * 9 + 4), (277, 3, 1), (278, 3, height), (279, 4, len(data))]
    body = struct.pack(f"{order}H", len(entries))
    for tag, kind, value in entries:
        packed = struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
        body += struct.pack(f"{order}HHI", tag, kind, 1) + packed
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    return start + body + struct.pack(f"{order}I", 0) + data


def detector(folder: Path, bits: int, count: int = 20) -> Path:
    """Ramps from black up to a share of white that differs, as 16-bit files of which the values use `bits`."""
    folder.mkdir()
    for i in range(count):
        Image.fromarray((RAMP * top_of(i, bits, count)).astype(np.uint16)).save(folder / f"{i:02d}.png")
    return folder


def top_of(i: int, bits: int, count: int) -> float:
    """The last one alone is as bright as the detector can be."""
    return (1 << bits) - 1 if i == count - 1 else (1 << bits) * (0.1 + 0.3 * i / count)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_greys_of_few_bits_fill_the_scale_by_one_rule_for_the_set(tmp_path: Path, bits: int):
    """Only the last image reaches white: the scale of the first ones must not be their own."""
    manifest = stored(open_source(str(detector(tmp_path / "in", bits))), tmp_path / "out")
    assert manifest.grey_bits == bits
    mean = means(tmp_path / "out")
    white = (1 << bits) - 1
    for i, name in enumerate(sorted(mean)):
        exact = np.floor(RAMP * top_of(i, bits, 20)).mean() / white * 255
        assert mean[name] == pytest.approx(exact, abs=0.6), name
    scaled = [note for note in manifest.notes() if "16-bit greys" in note]
    assert bool(scaled) == (bits < 16)


def test_the_scale_does_not_depend_on_the_order_or_on_a_stop(tmp_path: Path):
    folder = detector(tmp_path / "in", 12, 40)
    whole = stored(open_source(str(folder)), tmp_path / "whole")
    names = sorted(file.name for file in folder.iterdir())
    turned = stored(from_files([str(folder / name) for name in names[::-1]]), tmp_path / "turned")
    assert turned.grey_bits == whole.grey_bits == 12
    assert list(means(tmp_path / "turned").values())[::-1] == list(means(tmp_path / "whole").values())

    def stop(done: int, _total: int) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored(open_source(str(folder)), tmp_path / "stopped", progress=stop)
    again = stored(open_source(str(folder)), tmp_path / "stopped")
    assert again == whole


def test_without_the_rule_of_the_set_12_bits_are_nearly_black_and_that_is_told(tmp_path: Path):
    manifest = stored(open_source(str(detector(tmp_path / "in", 12))), tmp_path / "out", grey_bits=16)
    assert max(means(tmp_path / "out").values()) < 9
    assert "20 of 20 images are nearly black, white or of one colour" in " ".join(manifest.notes())


def test_twelve_bit_colour_which_pillow_cuts_is_told(tmp_path: Path):
    """Pillow keeps the high byte of 16-bit colour, which for 12 bits is 0 .. 15."""
    for i in range(10):
        picture = Image.fromarray((np.stack([RAMP * 15] * 3, 2)).astype(np.uint8))
        picture.putpixel((0, 0), (i, 0, 0))
        picture.save(tmp_path / f"{i}.png")
    notes = stored(open_source(str(tmp_path)), tmp_path / "out").notes()
    assert notes == ["10 of 10 images are nearly black, white or of one colour: look at some of them"]


def test_thirty_times_the_same_picture_is_told(tmp_path: Path):
    for i in range(30):
        picture(0).save(tmp_path / f"{i}.png")
    notes = stored(open_source(str(tmp_path)), tmp_path / "out").notes()
    assert notes == ["29 images are exact copies of others", "nearly all images are alike: there is little to group"]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [0, 1])
def test_white_is_white_in_every_16_bit_tiff(order: str, photometric: int):
    """A squared ramp has a third of white on average; inverted, two thirds."""
    data = grey_tiff((RAMP**2 * 65_535).astype(np.uint16), order, photometric)
    with decode.strict_pillow():
        result = pack_image(data, Packing("raw", 64))
    assert not isinstance(result, str), result
    exact = (RAMP**2).mean() * 255
    assert np.frombuffer(result[1], np.uint8).mean() == pytest.approx(exact if photometric else 255 - exact, abs=0.6)


def test_without_the_look_at_photometric_half_of_these_tiffs_would_be_wrong_or_unreadable(monkeypatch):
    monkeypatch.setattr(decode, "_positive", lambda data: (data, False))
    wrong = 0
    for order in "<>":
        result = pack_image(grey_tiff((RAMP**2 * 65_535).astype(np.uint16), order, 0), Packing("raw", 64))
        wrong += isinstance(result, str) or np.frombuffer(result[1], np.uint8).mean() < 128
    assert wrong == 2


@pytest.mark.parametrize("cut", [4, 9, 10, 12, 60, 100])
def test_a_tiff_that_ends_in_its_header_is_one_bad_image(cut: int):
    data = grey_tiff(np.zeros((8, 8), np.uint16), ">", 0)[:cut]
    assert isinstance(pack_image(data, Packing("raw", 8)), str)
    assert isinstance(pack_image(data[:4] + b"\xff\xff\xff\xff" + data[8:], Packing("raw", 8)), str)


# ---------------------------------------------------------------- labels that are missing


@pytest.mark.parametrize(
    "labels",
    [["a", "", "b"], ["a", "-1", "b"], ["a", "None", "b"], ["a", " nan ", "b"], [0, -1, 1]],
)
def test_a_missing_label_is_no_class(labels: list):
    numbers, names = encode_labels(Path("x"), np.array(labels), 3)
    assert numbers.tolist() == [0, -1, 1]
    assert len(names) == 2


def test_labels_that_are_all_missing_are_refused():
    with pytest.raises(UserError, match="all labels of 'x' are missing: do without labels"):
        encode_labels(Path("x"), np.array(["", "None"]), 2)


def test_missing_labels_of_tables_are_no_class(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    files, images = [], [picture(i) for i in range(6)]
    for image in images:
        files.append(io.BytesIO())
        image.save(files[-1], "PNG")
    cells = [file.getvalue() for file in files]
    for name, missing in (("null", None), ("minus", -1)):
        labels = pa.array([missing if i % 2 else i % 3 for i in range(6)], pa.int64())
        parquet.write_table(pa.table({"image": cells, "label": labels}), tmp_path / f"{name}.parquet")
    np.savez(
        tmp_path / "a.npz",
        images=np.stack([np.asarray(image) for image in images]),
        labels=[-1 if i % 2 else i % 3 for i in range(6)],
    )
    for data, kind in (("null.parquet", "list"), ("minus.parquet", "list"), ("a.npz", "array")):
        source = open_data(str(tmp_path / data), kind)
        assert source.labels is not None
        assert source.labels.tolist() == [0, -1, 2, -1, 1, -1]
        assert source.label_names == ["0", "1", "2"]


def test_parts_above_the_classes_are_seen_and_said(tmp_path: Path):
    for part in ("train", "val"):
        for kind in ("bar", "disc"):
            folder_of(tmp_path / "in" / part / kind, 2)
    with pytest.warns(UserWarning, match=r"^train/ and val/ of .* the classes are the folders below$"):
        source = open_source(str(tmp_path / "in"), "folder")
    assert source.label_names == ["bar", "disc"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 1] * 2
    (tmp_path / "in/val").rename(tmp_path / "in/vale")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_source(str(tmp_path / "in"), "folder").label_names == ["train", "vale"]


def test_the_names_of_classes_go_with_the_packed_file(tmp_path: Path):
    for kind in ("bar", "disc"):
        folder_of(tmp_path / "in" / kind, 2)
    pack(open_source(str(tmp_path / "in"), "folder"), tmp_path / "x.beton", size=8, format="raw")
    assert packed_source(tmp_path / "x.beton").label_names == ["bar", "disc"]


# ---------------------------------------------------------------- names

NAMES = [
    "Screenshot at 3.04\u202fPM.png", "写真\u3000001.png", "-dash.png", "+plus.png", "=sum.png", "@at.png",
    "back\\slash.png", "new\nline.png", "tab\there.png", "return\rhere.png", "\ttab.png", "\rreturn.png",
    'comma,quote".png', "family \U0001f468\u200d\U0001f469.png", "می\u200cخواهم.png", "<img src=x onerror=a(1)>.png",
    "100%.png", "hash#1?.png", "e\u0301.png", "'quoted'.png", "'=x.png", " leading.png", "trailing .png", "a;b.png",
    "soft\u00adhyphen.png", "two..dots.png", "$HOME.png", "~tilde.png", "*star.png", "esc\x1b[31m.png",
]  # fmt: skip


def table_of(names: list[str], path: Path) -> list[dict[str, str]]:
    """What any program reads in the table of assignments."""
    write_assignments(path, names, np.zeros(len(names), int), np.ones(len(names)), None)
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_path_of_a_table_names_its_file_to_any_reader(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(NAMES):
        with open(tmp_path / "in" / name, "wb") as file:
            picture(i).save(file, "PNG")
    source = open_source(str(tmp_path / "in"))
    rows = table_of(source.paths, tmp_path / "a.csv")
    assert [row["path"] for row in rows if not os.path.exists(tmp_path / "in" / row["path"])] == []
    assert len(rows) == len(NAMES)
    assert [row["path"] for row in rows if re.match(r"[=+\-@\t\r]", row["path"])] == [], "a spreadsheet runs these"
    assert list(read_names(tmp_path / "a.csv", np.arange(len(rows))).values()) == source.paths
    (tmp_path / "a.csv").rename(tmp_path / "in/a.csv")
    assert open_data(str(tmp_path / "in/a.csv")).paths == source.paths, "the table is a list of images too"


def test_without_its_own_line_end_a_return_would_break_the_row():
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["a\rb", 1])
    assert len(list(csv.reader(io.StringIO(text.getvalue(), newline="")))) == 2
    assert list(csv.reader(io.StringIO(csv_line(["a\rb", 1]), newline=""))) == [["a\rb", "1"]]


def test_bytes_that_are_no_utf_8_come_back_and_leave_the_table_readable(tmp_path: Path):
    name = os.fsdecode(b"latin1-\xe9.png")
    (row,) = table_of([name], tmp_path / "a.csv")
    assert row["path"] == "latin1-\\udce9.png"
    assert read_names(tmp_path / "a.csv", np.array([0])) == {0: name}


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_reader_and_writer_of_cells_undo_each_other(text: str):
    for written, back in ((path_cell(text), path_of_cell), (text_cell(text), text_of_cell)):
        assert back(written) == text
        assert written[0] not in "=+-@\t\r"
    assert os.path.normpath("/x/" + path_cell(text)) == os.path.normpath("/x/" + text)


@pytest.mark.parametrize("text", ["=1", "./=1", "././+1", "'=1", "''-1", "'x", "./x"])
def test_guards_of_guarded_cells_are_undone_once(text: str):
    assert path_of_cell(path_cell(text)) == text
    assert text_of_cell(text_cell(text)) == text


# ---------------------------------------------------------------- lists


def listed(folder: Path) -> list[str]:
    folder_of(folder / "img", 8)
    (folder / "links").mkdir()
    for i in range(8):
        (folder / f"links/{i:02d}.png").symlink_to(f"../img/{i:02d}.png")
    return [f"img/{i:02d}.png" for i in range(8)]


def lines(names: list[str], end: str = "\n") -> bytes:
    return "".join(f"{name}{end}" for name in names).encode()


def table(names: list[str], header: str, delimiter: str = ",") -> str:
    return f"{header}\n" + "".join(f"{name}{delimiter}{i % 3}\n" for i, name in enumerate(names))


LISTS: dict[str, Callable[[list[str]], bytes]] = {
    "plain.txt": lines,
    "mark.txt": lambda names: b"\xef\xbb\xbf" + lines(names),
    "utf16.txt": lambda names: lines(names, "\r\n").decode().encode("utf-16"),
    "utf16be.txt": lambda names: b"\xfe\xff" + lines(names, "\r\n").decode().encode("utf-16-be"),
    "return.txt": lambda names: lines(names, "\r"),
    "backslash.txt": lambda names: lines(names).replace(b"/", b"\\"),
    "blanks.txt": lambda names: lines(names, "  \n"),
    "quoted.txt": lambda names: lines([f'"{name}"' for name in names]),
    "semicolon.csv": lambda names: table(names, "path;label", ";").encode(),
    "tab.csv": lambda names: table(names, "path\tlabel", "\t").encode(),
    "utf16.csv": lambda names: table(names, "path,label").encode("utf-16"),
    "case.csv": lambda names: table(names, "Path,Label").encode(),
    "spaces.csv": lambda names: table(names, "path, label").replace(",", ", ").encode(),
    "short.csv": lambda names: table(names, "path,label").replace(",0\n", "\n", 1).encode(),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_as_any_editor_writes_it_is_its_images(tmp_path: Path, name: str):
    names = listed(tmp_path)
    (tmp_path / name).write_bytes(LISTS[name](names))
    source = open_data(str(tmp_path / name), "list" if name.endswith(".csv") else None)
    assert source.paths == names
    assert [source.read(i) for i in range(8)] == [(tmp_path / path).read_bytes() for path in names]
    if source.labels is not None:
        assert source.label_names == ["0", "1", "2"]
        assert source.labels.tolist() == [-1 if name == "short.csv" and not i else i % 3 for i in range(8)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nul.txt", b"img/00.png\nimg/0\0.png\n", "line 2 holds a NUL"),
        ("open.csv", b'path,label\n"img/00.png,0\nimg/01.png,1\n', 'is a quote (") not closed?'),
        ("home.txt", b"~/nowhere/00.png\n", "make the paths absolute"),
        ("elsewhere.txt", b"pictures/00.png\n", "there is no 'pictures/00.png' at '{0}/pictures/00.png'"),
    ],
)
def test_what_is_wrong_with_a_list_is_one_line(tmp_path: Path, name: str, content: bytes, words: str):
    listed(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        open_data(str(tmp_path / name))
    assert words.format(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_name_with_a_backslash_that_exists_is_taken_as_it_is(tmp_path: Path):
    names = listed(tmp_path)
    picture(9).save(tmp_path / "img\\00.png")
    (tmp_path / "list.txt").write_text("img\\00.png\n")
    assert open_data(str(tmp_path / "list.txt")).paths == ["img\\00.png"]
    (tmp_path / "img\\00.png").unlink()
    assert open_data(str(tmp_path / "list.txt")).paths == names[:1]


def test_a_row_without_a_path_keeps_its_place(tmp_path: Path):
    listed(tmp_path)
    (tmp_path / "list.csv").write_text("path,label\nimg/00.png,a\n,b\nimg/01.png,c\n")
    source = open_data(str(tmp_path / "list.csv"))
    assert source.paths == ["img/00.png", "", "img/01.png"]
    assert stored(source, tmp_path / "out", max_bad=0.5).bad == 1


# ---------------------------------------------------------------- links


def test_links_are_followed_when_asked_to_files_within_the_tree(tmp_path: Path):
    """A snapshot of Hugging Face: names that link to files named by their hash."""
    (tmp_path / "cache/blobs").mkdir(parents=True)
    (tmp_path / "cache/snapshot").mkdir()
    picture(50).save(tmp_path / "secret.png")
    for i in range(5):
        picture(i).save(tmp_path / f"cache/blobs/{i}", "PNG")
        (tmp_path / f"cache/snapshot/{i}.png").symlink_to(f"../blobs/{i}")
    (tmp_path / "cache/snapshot/out.png").symlink_to("../../secret.png")
    (tmp_path / "cache/snapshot/loop.png").symlink_to("loop.png")
    (tmp_path / "cache/list.txt").write_bytes(lines([f"snapshot/{i}.png" for i in range(5)] + ["snapshot/out.png"]))
    with pytest.raises(UserError, match="or --follow-links"):
        open_data(str(tmp_path / "cache"))
    source = open_data(str(tmp_path / "cache"), follow_links=True)
    assert source.paths == [f"snapshot/{i}.png" for i in range(5)]
    assert source.ignored["symbolic link"] == 2
    assert stored(source, tmp_path / "a").n == 5
    of_list = open_data(str(tmp_path / "cache/list.txt"), follow_links=True)
    assert stored(of_list, tmp_path / "b", max_bad=0.5).bad == 1
    unasked = open_data(str(tmp_path / "cache/list.txt"))
    with pytest.raises(UserError, match="symbolic link: give the file that it points to, or --follow-links"):
        stored(unasked, tmp_path / "c", max_bad=0.9)


# ---------------------------------------------------------------- large photos


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of 61 megapixels, as a full-frame camera makes it, and one of a phone, with a preview behind it."""
    folder = tmp_path_factory.mktemp("large")
    photo = picture(0, 64).resize((9_504, 6_336))
    photo.save(folder / "61.jpg", quality=60)
    photo.save(folder / "mpo.jpg", "MPO", save_all=True, append_images=[picture(1)], quality=60)
    return folder


def test_photos_of_61_megapixels_are_read_by_a_child_of_bounded_memory(tmp_path: Path, large: Path):
    manifest = ingest(open_source(str(large)), tmp_path, size=224, format="jpg", workers=1)
    assert (manifest.n, manifest.animated) == (2, 0)


def test_the_limit_counts_and_is_named_by_its_message(large: Path):
    data = (large / "61.jpg").read_bytes()
    with decode.strict_pillow():
        reason = pack_image(data, Packing("raw", 32, max_megapixels=12))
        assert reason == (
            "9504x6336 pixels, at most 60 million are read of this format: raise --max-megapixels from 12"
        )
        assert not isinstance(pack_image(data, Packing("raw", 32, max_megapixels=13)), str)


def test_the_address_space_of_a_child_grows_with_the_limit():
    program = "import resource, sys; from spice_dist.data import decode; decode._limit_memory(int(sys.argv[1])); "
    program += "print(resource.getrlimit(resource.RLIMIT_AS)[0])"
    small, big = (int(subprocess.check_output([sys.executable, "-c", program, n], timeout=60)) for n in ("50", "150"))
    assert big - small == pytest.approx(100 * decode.MEGAPIXEL_BYTES, rel=0.05)


def test_an_uncompressed_photo_of_24_megapixels_fits(tmp_path: Path):
    Image.new("RGB", (6_000, 4_000), (9, 9, 9)).save(tmp_path / "a.tif")
    assert (tmp_path / "a.tif").stat().st_size > 64 << 20
    with decode.strict_pillow():
        assert not isinstance(decode._pack_item(tmp_path / "a.tif", Packing("raw", 32)), str)


# ---------------------------------------------------------------- small ones


def test_a_folder_called_digits_is_pointed_to(tmp_path: Path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"for the folder of this name give \./digits"):
        assert len(open_source("digits").paths) == 1797
