"""A real S3 server on this machine, and what goes wrong with one."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spice_dist.data import remote
from spice_dist.data.dataset import open_data
from spice_dist.data.excerpts import excerpts
from spice_dist.data.ingest import ingest
from spice_dist.data.manifest import read_paths
from spice_dist.errors import UserError

moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """s3://photos with six images of two classes, a text and a hidden file."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import s3fs

    system = s3fs.S3FileSystem()
    system.mkdir("photos")
    folder = tmp_path_factory.mktemp("upload")
    for i in range(6):
        path = folder / f"{i}.png"
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(path)
        system.put_file(str(path), f"photos/set/{'ab'[i % 2]}/{i} ü.png")
    system.pipe_file("photos/set/readme.txt", b"text")
    system.pipe_file("photos/set/.hidden/x.png", b"x")
    system.pipe_file("photos/set/a/broken.png", b"x")
    yield "s3://photos/set"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_parts_of_a_bucket_are_opened_again_without_listing_it(bucket: str, tmp_path: Path, monkeypatch):
    source = open_data(bucket)
    divided = excerpts(source, bucket, False, 3, tmp_path)
    monkeypatch.setattr(remote, "remote_source", None)
    assert source.stamps
    for number in range(divided.parts):
        part, numbers = divided.open(number), divided.numbers(number)
        assert part.stamps
        assert part.paths == [source.paths[i] for i in numbers]
        assert [part.read(i) for i in range(len(numbers))] == [source.read(i) for i in numbers]
        assert [part.stamps(i) for i in range(len(numbers))] == [source.stamps(i) for i in numbers]
    assert divided.parts == 3


def test_a_bucket_is_a_folder_with_names_labels_and_quarantine(bucket: str, tmp_path: Path):
    source = open_data(bucket, "folder")
    assert source.label_names == ["a", "b"]
    manifest = ingest(source, tmp_path, size=8, max_bad=0.2)
    assert (manifest.n, manifest.bad) == (6, 1)
    assert read_paths(tmp_path) == ["a/0 ü.png", "a/2 ü.png", "a/4 ü.png", "b/1 ü.png", "b/3 ü.png", "b/5 ü.png"]
    assert np.load(tmp_path / "labels.npy").tolist() == [0, 0, 0, 1, 1, 1]
    assert "a/broken.png" in (tmp_path / "quarantine.csv").read_text()
    assert ingest(open_data(bucket, "folder"), tmp_path, size=8, max_bad=0.2) == manifest


def test_a_bucket_that_is_not_there_is_one_line(bucket: str):
    with pytest.raises(UserError, match="nowhere") as caught:
        open_data("s3://nowhere/x")
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named_by_its_package(monkeypatch: pytest.MonkeyPatch):
    import fsspec

    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match="pip install s3fs"):
        remote.remote_source("s3://photos/set", with_labels=False)
