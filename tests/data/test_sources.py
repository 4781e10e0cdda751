import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from spice_dist.data.sources import BadImage, open_source
from spice_dist.errors import UserError

HOSTILE = [
    "a b.png",
    "new\nline.png",
    'quo"te.png',
    "-rf.png",
    "=1+1.png",
    "日本.png",
    "<img onerror=x>.png",
    "a\\b.png",
]


def touch(path: Path, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def refusal(data: Path | str, labels: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_source(str(data), labels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_are_the_1797_images_of_scikit_learn_scaled_to_bytes():
    from sklearn.datasets import load_digits

    source = open_source("digits")
    flat, target = map(np.asarray, load_digits(return_X_y=True))
    assert len(source.paths) == 1797
    assert source.paths[:2] == ["digits/0000", "digits/0001"]
    assert source.labels is not None
    assert (source.labels == target).all()
    assert len(source.label_names) == 10
    image = source.read(5)
    assert isinstance(image, np.ndarray)
    assert image.dtype == np.uint8
    assert np.abs(image / 255 - flat[5].reshape(8, 8) / 16).max() <= 0.5 / 255
    assert max(np.asarray(source.read(i)).max() for i in range(50)) == 255


def test_a_folder_is_read_flat_and_nested_in_byte_order_without_hidden_files(tmp_path: Path):
    for name in ["b.PNG", "a.jpg", "sub/deep/c.webp", "sub/d.tiff", ".hidden.png", ".git/e.png", "notes.txt", "f"]:
        touch(tmp_path / name, name.encode())
    source = open_source(str(tmp_path))
    assert source.paths == ["a.jpg", "b.PNG", "sub/d.tiff", "sub/deep/c.webp"]
    assert [source.read(i) for i in range(4)] == [p.encode() for p in source.paths]
    assert source.ignored == {"txt": 1, "": 1, "hidden image": 1}
    assert source.labels is None


def test_hostile_names_come_back_unchanged_and_readable(tmp_path: Path):
    names = [os.fsencode(name) for name in HOSTILE] + [b"\xff\xfe.png"]
    for name in names:
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(name)
    source = open_source(str(tmp_path))
    assert sorted(os.fsencode(p) for p in source.paths) == sorted(names)
    assert [source.read(i) for i in range(len(names))] == [os.fsencode(p) for p in source.paths]


def test_25_files_stay_25_in_a_folder_with_symlink_loops(tmp_path: Path):
    for i in range(25):
        touch(tmp_path / f"d{i % 5}" / f"{i}.png")
    (tmp_path / "d0" / "up").symlink_to(tmp_path)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "twice.png").symlink_to(tmp_path / "d0" / "0.png")
    source = open_source(str(tmp_path))
    assert len(source.paths) == 25
    assert source.ignored == {"symbolic link": 3}
    followed = [f for _, _, files in os.walk(tmp_path, followlinks=True) for f in files if f.endswith(".png")]
    assert len(followed) > 500  # what happens without the defence


def test_a_pipe_or_a_giant_in_place_of_an_image_is_a_bad_image_and_never_blocks(tmp_path: Path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        touch(tmp_path / name)
    source = open_source(str(tmp_path))
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    os.truncate(tmp_path / "b.png", 257 << 20)
    os.truncate(tmp_path / "c.png", 0)
    (tmp_path / "d.png").unlink()
    for i, reason in enumerate(["regular", "MiB", "empty", "No such file"]):
        with pytest.raises(BadImage, match=reason):
            source.read(i)


def test_folder_labels_number_the_top_folders_in_order(tmp_path: Path):
    for name in ["zebra/1.png", "ant/x/2.png", "ant/3.png"]:
        touch(tmp_path / name)
    source = open_source(str(tmp_path), "folder")
    assert source.paths == ["ant/3.png", "ant/x/2.png", "zebra/1.png"]
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 1]
    assert source.label_names == ["ant", "zebra"]
    touch(tmp_path / "loose.png")
    assert "loose.png" in refusal(tmp_path, "folder")


def test_every_mistake_about_a_folder_is_one_line_that_helps(tmp_path: Path):
    assert "no" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(tmp_path / "empty")
    for i in range(3):
        touch(tmp_path / "text" / f"{i}.txt")
    touch(tmp_path / "text" / "z.csv")
    assert "3 .txt" in refusal(tmp_path / "text")
    assert "1 .csv" in refusal(tmp_path / "text")
    touch(tmp_path / "links" / "real.txt")
    (tmp_path / "links" / "l.png").symlink_to(tmp_path / "links" / "real.txt")
    assert "links are not followed" in refusal(tmp_path / "links")
    touch(tmp_path / "one.png")
    assert "folder" in refusal(tmp_path / "one.png")
    assert "'digits'" in refusal("cifar10:/data")
    assert "array" in refusal(tmp_path / "text", "array")
    assert "'folder'" in refusal(tmp_path, "maybe")
    refusal("nul\0byte")


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1), (5, 6, 7, 3)])
def test_arrays_are_read_in_all_three_shapes(tmp_path: Path, shape: tuple[int, ...]):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.save(tmp_path / "a.npy", images)
    np.savez_compressed(tmp_path / "a.npz", x=images, y=np.array(list("bacab")))
    for name, labels in (("a.npy", None), ("a.npz", None), ("a.npz", "array")):
        source = open_source(str(tmp_path / name), labels)
        assert all(np.array_equal(source.read(i), images[i]) for i in range(5))
        if labels:
            assert source.labels is not None
            assert source.labels.tolist() == [1, 0, 2, 0, 1]
        else:
            assert source.labels is None


def test_every_mistake_about_an_array_is_one_line_that_helps(tmp_path: Path):
    def saved(array: np.ndarray, **options: bool) -> Path:
        np.save(tmp_path / "bad.npy", array, **options)
        return tmp_path / "bad.npy"

    assert "astype('uint8')" in refusal(saved(np.zeros((2, 4, 4), np.float32)))
    assert "channels come last" in refusal(saved(np.zeros((2, 3, 4, 4), np.uint8)))
    assert "one colour image" in refusal(saved(np.zeros((8, 8, 3), np.uint8)))
    assert "no pixel" in refusal(saved(np.zeros((0, 8, 8), np.uint8)))
    refusal(saved(np.array([{}, {}]), allow_pickle=True))
    (tmp_path / "text.npy").write_text("hello")
    refusal(tmp_path / "text.npy")
    whole = saved(np.zeros((9, 8, 8), np.uint8)).read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-5])
    refusal(tmp_path / "cut.npy")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 no zip")
    refusal(tmp_path / "cut.npz")
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 4, 4), np.uint8), b=np.zeros((2, 4, 4), np.uint8))
    assert "'images'" in refusal(tmp_path / "two.npz")
    np.savez(tmp_path / "none.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(3, int))
    assert "(2,)" in refusal(tmp_path / "none.npz", "array")


def test_an_npz_that_claims_terabytes_is_refused_before_memory_is_taken(tmp_path: Path):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999, 9999, 99), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert "truncated" in refusal(tmp_path / "bomb.npz")
