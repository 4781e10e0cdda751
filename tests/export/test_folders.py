"""`--to folders`: every image once, in the folder of its group, whatever it is called, and nothing else is touched."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from spice_dist import artifacts
from spice_dist.assignments import read_assignments
from spice_dist.data.manifest import read_paths
from spice_dist.data.sources import from_array, open_source
from spice_dist.errors import Interrupted, UserError
from spice_dist.export import folders, safe_names
from tests.export.conftest import HOSTILE, K, Made, Make, make_run, pictures
from tests.folders import unrecorded


def silent(done: int, total: int) -> None:
    pass


def export(run: Path, out: Path, progress: Callable[[int, int], None] = silent, **options) -> list[str]:
    given = {"link": False, "source": None, "skip_missing": False, "dry_run": False} | options
    return folders.export(run, out, progress=progress, **given)


def digests(folder: Path) -> list[str]:
    """SHA-256 of every file below, hidden ones aside."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)


def test_every_file_is_copied_once_into_the_folder_of_its_group(make: Make, tmp_path: Path):
    run = make(names={"1": "red dresses"})
    export(run, tmp_path / "out")
    cluster, _, _ = read_assignments(artifacts.assignments_file(run))
    for name, group in zip(read_paths(artifacts.data(run)), cluster, strict=True):
        folder = ("group-00", "red dresses", "group-02")[group]
        copy, original = tmp_path / "out" / folder / name, tmp_path / "photos" / name
        assert copy.read_bytes() == original.read_bytes()
        assert copy.stat().st_mtime == pytest.approx(original.stat().st_mtime, abs=1e-3)
    assert digests(tmp_path / "out") == digests(tmp_path / "photos")


def is_safe(name: str) -> bool:
    """What Windows, a terminal and a shell's glob take as a name, written down from their rules."""
    device = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)
    return bool(re.fullmatch(r'[^<>:"/\\|?*\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e]+', name)) and not (
        device or name.startswith(".") or name.endswith((".", " ")) or len(name.encode()) > 255
    )


def test_hostile_names_of_files_and_groups_stay_inside_and_differ(
    hostile_run: Path, hostile_photos: Path, tmp_path: Path
):
    (tmp_path / "below").mkdir()
    out = tmp_path / "below/out"
    lines = export(hostile_run, out)
    assert all(line.isprintable() for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "run"]
    names = [path.relative_to(out) for path in out.rglob("*") if path.name != folders.RECORD]
    assert [str(name) for name in names if not all(is_safe(part) for part in name.parts)] == []
    assert len({str(name).casefold() for name in names}) == len(names)
    assert digests(out) == digests(hostile_photos)
    assert len(digests(out)) == len(HOSTILE)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["_.._escaped [31m", "_CON", "_con-2"]


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("summer 2024.jpg", "summer 2024.jpg"),
        ("Kleid, größer.png", "Kleid, größer.png"),
        ("../../x", "_._x"),
        ("", "_"),
        ("...", "_"),
        ("COM1.tar.gz", "_COM1.tar.gz"),
        ("a" * 500 + ".jpeg", "a" * 195 + ".jpeg"),
        ("ü" * 300, "ü" * 100),
        ("a\0b", "a_b"),
    ],
)
def test_safe_names(text, safe):
    assert safe_names.safe_name(text) == safe


def test_ten_thousand_equal_names_differ_and_take_no_time():
    taken: dict[str, int] = {}
    names = [safe_names.distinct("image.jpg" if i % 2 else "IMAGE.jpg", taken) for i in range(10_000)]
    assert len({name.casefold() for name in names}) == 10_000
    assert names[:3] == ["IMAGE.jpg", "image-2.jpg", "IMAGE-3.jpg"]
    assert safe_names.distinct("image-7.jpg", taken) == "image-7-2.jpg"


def test_a_dry_run_tells_what_is_written_and_writes_nothing(make: Make, tmp_path: Path):
    run = make()
    before = sorted(tmp_path.rglob("*"))
    told = export(run, tmp_path / "out", dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    done = export(run, tmp_path / "out")
    assert told[1:-1] == done[1:]
    assert told[0].replace("would be", "are") == done[0]


def test_links_point_to_the_files_and_stay_when_exported_again(make: Make, tmp_path: Path):
    run = make()
    export(run, tmp_path / "out", link=True)
    links = [path for path in (tmp_path / "out").rglob("*.jpg")]
    assert all(path.is_symlink() and path.resolve().parent == tmp_path / "photos" for path in links)
    assert len(links) == len({path.resolve() for path in links}) == 9
    assert export(run, tmp_path / "out", link=True)[-1] == "9 of them were there already"


def test_an_export_that_was_stopped_goes_on_and_leaves_no_part(make: Make, tmp_path: Path):
    run, out = make(), tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise Interrupted("SIGINT")

    with pytest.raises(Interrupted):
        export(run, out, stop)
    written = {path: path.stat().st_ino for path in out.rglob("*.jpg")}
    assert len(written) == 4
    seen = []
    assert export(run, out, lambda done, total: seen.append((done, total)))[-1] == "4 of them were there already"
    assert seen[-1] == (5, 5)
    assert all(path.stat().st_ino == number for path, number in written.items()), "not written again"
    assert digests(out) == digests(tmp_path / "photos")
    assert {path.name for path in out.iterdir()} == {"group-00", "group-01", "group-02", folders.RECORD}


def test_nothing_is_overwritten(make: Make, tmp_path: Path):
    run, out = make(), tmp_path / "out"
    export(run, out)
    changed = next(out.rglob("*.jpg"))
    changed.write_bytes(b"edited")
    next(path for path in out.rglob("*.jpg") if path != changed).unlink()
    count = len(list(out.rglob("*")))
    with pytest.raises(UserError, match="is not what is exported"):
        export(run, out)
    assert changed.read_bytes() == b"edited"
    assert len(list(out.rglob("*"))) == count

    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="holds other files"):
        export(run, tmp_path / "other")
    with pytest.raises(UserError, match="holds other files"):
        export(run, out, link=True)
    for place in (changed, changed / "below/it"):
        with pytest.raises(UserError, match=f"^{changed} is a file, no folder; give another OUT"):
            export(run, place)


def test_files_that_are_gone_are_refused_or_left_out(make: Make, tmp_path: Path):
    run, out = make(), tmp_path / "out"
    (tmp_path / "photos/03.jpg").unlink()
    (tmp_path / "photos/05.jpg").unlink()
    (tmp_path / "photos/05.jpg").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"2 of 9 images are not in .*03\.jpg, 05\.jpg.*--source DIR.*--skip-missing"):
        export(run, out)
    assert not out.exists()
    assert any(line.startswith("2 images are left out") for line in export(run, out, skip_missing=True))
    assert len(list(out.rglob("*.jpg"))) == 7
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_a_folder_that_has_moved_is_asked_for(make: Make, tmp_path: Path):
    run = make()
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="is not there.*--source DIR"):
        export(run, tmp_path / "out")
    export(run, tmp_path / "out", source=tmp_path / "moved")
    assert digests(tmp_path / "out") == digests(tmp_path / "moved")
    with pytest.raises(UserError, match="is no folder"):
        export(run, tmp_path / "out", source=tmp_path / "nowhere")


def test_names_that_lead_out_of_the_images_folder_are_not_read(make: Make, tmp_path: Path):
    run = unrecorded(make())
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    names = read_paths(artifacts.data(run))
    hostile = ["../secret.jpg", str(tmp_path / "secret.jpg"), *names[2:]]
    artifacts.paths_file(run).write_text("".join(json.dumps(name) + "\n" for name in hostile))
    with pytest.raises(UserError, match="2 of 9 images are not in"):
        export(run, tmp_path / "out")


def test_images_of_an_array_are_written_as_their_packed_pixels(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 8, 8), dtype=np.uint8)
    run = make_run(tmp_path / "run", from_array(pixels), Made(size=8))
    lines = export(run, tmp_path / "out")
    assert "packed pixels, 8 x 8, as PNG" in lines[0]
    for i in range(7):
        with Image.open(tmp_path / "out" / f"group-{i % K:02d}" / f"{i:07d}.png") as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), pixels[i])
    assert export(run, tmp_path / "out")[-1] == "7 of them were there already"
    with pytest.raises(UserError, match="--link needs files"):
        export(run, tmp_path / "links", link=True)


def test_packed_jpegs_without_files_are_written_as_they_are_stored(tmp_path: Path):
    source = open_source(str(pictures(tmp_path / "photos", [b"a.jpg", b"b.jpg", b"c.jpg"])))
    original = digests(tmp_path / "photos")
    run = make_run(tmp_path / "run", source, Made(format="jpg", size=40))
    manifest = json.loads(artifacts.manifest_file(unrecorded(run)).read_text()) | {"source": "s3://bucket/photos"}
    artifacts.manifest_file(run).write_text(json.dumps(manifest))
    export(run, tmp_path / "out")
    assert digests(tmp_path / "out") == original


def test_a_list_of_files_is_followed_from_its_own_folder(tmp_path: Path):
    pictures(tmp_path / "lists/photos", [b"a.jpg", b"b.jpg"])
    pictures(tmp_path / "elsewhere", [b"a.jpg"])
    (tmp_path / "lists/list.txt").write_text("photos/a.jpg\n../elsewhere/a.jpg\nphotos/b.jpg\n")
    from spice_dist.data.lists import list_source

    run = make_run(tmp_path / "run", list_source(tmp_path / "lists/list.txt", with_labels=False, trusted=True), Made())
    export(run, tmp_path / "lists/out")  # beside the list is not inside of a folder of images
    assert digests(tmp_path / "lists/out") == sorted(
        [*digests(tmp_path / "lists/photos"), *digests(tmp_path / "elsewhere")]
    )


def test_no_room_no_permission_and_a_place_among_the_images_are_refused(make: Make, tmp_path: Path, monkeypatch):
    run = make()
    with pytest.raises(UserError, match="inside of the images' folder"):
        export(run, tmp_path / "photos/sorted")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="there is room for 0.0 MB"):
        export(run, tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="no permission"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
