"""`spice-dist predict`: every kind of DATA, rows in the order given, and why a file has none."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from spice_dist import cli, inference, predicting
from spice_dist.data.dataset import DataConfig, open_given, prepare
from spice_dist.data.loaders import open_images
from spice_dist.data.manifest import read_paths
from spice_dist.data.sources import Source, from_arrays, from_files, open_source
from spice_dist.model_folder import load_model, save_model
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.task import Task

CPU = torch.device("cpu")
HOSTILE = "=cmd()\x1b[31m"


def saved_model(folder: Path, data: DataConfig, photos: Path) -> Path:
    """A run folder with an untrained network, whose four clusters are around the features of four of the photos."""
    torch.manual_seed(0)
    task = Task(clusters=4, data=data, backbone=BackboneConfig(widths=(8, 8, 8, 16)))
    backbone, heads = Backbone(task.backbone, data.channels, data.size), ClusterHeads(1, 16, 4, layers=1)
    prepare(open_source(str(photos)), data, folder / "data")
    with closing(open_images(folder / "data", device=CPU, size=data.size, channels=data.channels)) as images:
        features = torch.cat(list(inference.outputs(backbone, images, np.arange(images.n), task.backbone.statistics)))
    features = torch.nn.functional.normalize(features)
    mean, centers = features.mean(0), features[[0, 3, 6, 9]]
    with torch.no_grad():
        heads.weights[0][0] = 1e3 * (centers - mean).T
        heads.biases[0][0] = -1e3 * (centers - mean) @ mean
    save_model(ClusterNet(backbone, heads), task, folder / "model")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    return saved_model(tmp_path_factory.mktemp("run"), DataConfig(size=16), photos)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve crops of a photograph, of several sizes, as PNG and JPEG, colour and grey."""
    folder = tmp_path_factory.mktemp("photos")
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    for i in range(12):
        crop = photograph.crop((40 * i, 20 * i, 40 * i + 60 + 9 * i, 20 * i + 90 - i))
        crop = crop.convert("L") if i % 5 == 0 else crop
        crop.save(folder / f"{i:02d}{'.png' if i % 2 else '.jpg'}")
    return folder


def spice(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def packed(run: Path, source: Source, folder: Path) -> tuple[list[str], np.ndarray]:
    """The names and probabilities of the images once they are stored, checked and read as those of a run are."""
    net, task = load_model(run / "model", CPU)
    prepare(source, task.data, folder)
    loader = open_images(folder, device=CPU, size=task.data.size, channels=task.data.channels, loader="torch")
    with closing(loader) as images:
        return read_paths(folder), inference.probabilities(net, images, task.backbone.statistics)


@pytest.mark.parametrize(
    "data", [DataConfig(size=16), DataConfig(size=16, channels=1), DataConfig(size=32, format="jpg")]
)
def test_images_on_the_way_are_those_of_a_packed_file_bit_for_bit(tmp_path, photos, data):
    run = saved_model(tmp_path / "run", data, photos)
    source = open_source(str(photos))
    names, expected = packed(run, source, tmp_path / "data")
    assert len(set(expected.argmax(1))) > 1, "a model that says the same of everything would prove nothing"
    answer = predicting.predict(run / "model", source)
    assert answer.source.paths == names
    assert np.array_equal(answer.cluster, expected.argmax(1))
    assert np.array_equal(answer.confidence, expected.max(1))


def test_a_model_of_squashed_images_squashes_what_it_is_given(tmp_path, photos):
    """It answers as if Pillow had squashed the images before; one that crops answers otherwise."""
    folders = {fit: saved_model(tmp_path / fit, DataConfig(size=32, fit=fit), photos) for fit in ("squash", "crop")}
    (tmp_path / "squares").mkdir()
    for path in photos.iterdir():
        square = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        square.save(tmp_path / f"squares/{path.stem}.png")
    given, by_hand = open_source(str(photos)), open_source(str(tmp_path / "squares"))
    answers = {fit: predicting.predict(run / "model", given) for fit, run in folders.items()}
    expected = predicting.predict(folders["squash"] / "model", by_hand)
    assert np.array_equal(answers["squash"].cluster, expected.cluster)
    assert np.array_equal(answers["squash"].confidence, expected.confidence)
    assert not np.array_equal(answers["crop"].confidence, expected.confidence)


def test_batches_of_any_size_give_the_same(run, photos, monkeypatch):
    whole = predicting.predict(run / "model", open_source(str(photos)))
    monkeypatch.setattr(predicting, "chunk_of", lambda size: 5)
    parts = predicting.predict(run / "model", open_source(str(photos)))
    assert np.array_equal(parts.cluster, whole.cluster)
    np.testing.assert_allclose(parts.confidence, whole.confidence, rtol=1e-5)


def with_broken(photos: Path, folder: Path) -> list[Path]:
    """A list of paths, the second and the last but one of which are no images."""
    files = sorted(photos.iterdir())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    return [files[0], folder / "broken.jpg", *files[1:], folder / "missing.png", files[0]]


@pytest.mark.parametrize("listed", ["\n", "\0"])
def test_a_list_from_standard_input_keeps_its_rows(run, photos, tmp_path, monkeypatch, listed):
    """Each image has the cluster that it has without the unusable ones, which shift nothing."""
    alone = predicting.predict(run / "model", open_source(str(photos)))
    cluster_of = dict(zip(alone.source.paths, alone.cluster.tolist(), strict=True))
    files = with_broken(photos, tmp_path)
    text = "".join(f"{file}{listed}" for file in files).encode()
    for unreadable, out in (("keep", tmp_path / "keep.csv"), ("skip", tmp_path / "skip.csv")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert spice("predict", run, "-", "--unreadable", unreadable, "--out", out) == 0
    keep, skip = rows_of(tmp_path / "keep.csv"), rows_of(tmp_path / "skip.csv")
    assert [row["path"] for row in keep] == [str(file) for file in files]
    for i, row in enumerate(keep):
        if i in (1, len(files) - 2):
            assert (row["cluster"], row["confidence"]) == ("-1", "")
        else:
            assert (row["index"], row["cluster"]) == (str(i), str(cluster_of[files[i].name]))
    assert skip == [row for row in keep if row["cluster"] != "-1"]
    assert [row["path"] for row in rows_of(tmp_path / "skip.csv.quarantine.csv")] == [str(files[1]), str(files[-2])]


def test_an_unreadable_image_ends_the_command_if_asked(run, photos, tmp_path, monkeypatch, capsys):
    listed = "\n".join(map(str, with_broken(photos, tmp_path))).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed)))
    assert spice("predict", run, "-", "--unreadable", "error", "--out", tmp_path / "new.csv") == 1
    assert "broken.jpg': cannot decode" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new.csv").exists()


def test_what_is_left_out_is_counted_on_one_line(run, photos, tmp_path, capsys):
    folder = Path(shutil.copytree(photos, tmp_path / "in"))
    (folder / "broken.jpg").write_bytes(b"nothing")
    for name in ("a.heic", "b.HEIC", "c.heic", "notes.txt"):
        (folder / name).touch()
    for i in range(2):
        (folder / f"link{i}.jpg").symlink_to(photos / "00.jpg")
    assert spice("predict", run, folder, "--out", tmp_path / "new.csv") == 0
    last = capsys.readouterr().err.splitlines()[-1]
    listed, hint = tmp_path / "new.csv.quarantine.csv", "HEIC is read with pillow-heif: pip install 'spice_dist[heic]'"
    assert last == f"7 of 19 left out: 3 .heic, 2 links, 1 .txt, 1 unreadable; {hint}; {listed} says why"
    (folder / "broken.jpg").unlink()
    assert spice("predict", run, folder, "--out", tmp_path / "new.csv") == 0
    assert not listed.exists(), "it would be of the call before"


def test_a_single_file_is_answered_with_its_cluster_and_name(run, photos, tmp_path, capsys):
    named = Path(shutil.copytree(run, tmp_path / "run"))
    (answer,) = predicting.predict(run / "model", from_files([photos / "03.png"])).rows()
    _, path, cluster, confidence, _ = answer
    assert confidence is not None
    assert spice("predict", run, path) == 0
    assert capsys.readouterr().out == f"{path}: cluster {cluster}, confidence {confidence:.2f}\n"
    (named / "model/names.json").write_text(json.dumps({str(cluster): HOSTILE}))
    assert spice("predict", named / "model", path) == 0, "a model folder alone brings its names"
    assert "(=cmd()\\x1b[31m)" in capsys.readouterr().out


def test_parquet_csv_and_json_say_the_same(run, photos, tmp_path, capsys, monkeypatch):
    named = Path(shutil.copytree(run, tmp_path / "run"))
    (named / "model/names.json").write_text(json.dumps({"0": HOSTILE, "1": "roofs", "2": "trees", "3": "sky"}))
    files = [*with_broken(photos, tmp_path), tmp_path / "no-utf8-\udcff.png"]
    (tmp_path / "list.txt").write_bytes(b"\n".join(bytes(file) for file in files))
    for out in ("new.csv", "new.parquet"):
        assert (
            spice(
                "predict", named, tmp_path / "list.txt", "--trust-list", "--unreadable", "keep", "--out", tmp_path / out
            )
            == 0
        )
    capsys.readouterr()
    assert spice("predict", named, tmp_path / "list.txt", "--trust-list", "--unreadable", "keep", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    table, lines = parquet.read_table(tmp_path / "new.parquet").to_pylist(), rows_of(tmp_path / "new.csv")
    assert len(table) == len(lines) == len(answer["images"]) == answer["given"] == len(files)
    for row, line, image in zip(table, lines, answer["images"], strict=True):
        assert row["cluster"] == int(line["cluster"]) == image["cluster"]
        assert (row["name"], row["index"]) == (image["name"], image["index"])
        assert line["name"].lstrip("'").encode().decode("unicode_escape") == (row["name"] or "")
        sure = line["confidence"] and float(line["confidence"])
        assert row["confidence"] == (pytest.approx(sure, abs=1e-4) if sure else None)
    assert table[-1]["path"].endswith("no-utf8-\\udcff.png")
    assert [image["index"] for image in answer["unreadable"]] == [1, len(files) - 3, len(files) - 1]


def test_without_out_the_rows_go_to_standard_output(run, photos, tmp_path, capsys):
    assert spice("predict", run, photos, "--out", tmp_path / "new.csv") == 0
    capsys.readouterr()
    assert spice("predict", run, photos) == 0
    printed = capsys.readouterr()
    assert printed.out == (tmp_path / "new.csv").read_text()
    assert "\r" not in printed.err, "a bar is for a terminal"


def test_arrays_files_and_single_images_of_any_size_agree(run, photos, tmp_path):
    images = [np.asarray(Image.open(photos / f"{i:02d}.png")) for i in (1, 3, 7, 9)]
    of_arrays = predicting.predict(run / "model", from_arrays(images)).cluster
    of_files = predicting.predict(run / "model", from_files([photos / f"{i:02d}.png" for i in (1, 3, 7, 9)])).cluster
    assert np.array_equal(of_arrays, of_files)
    assert open_given(str(photos / "01.png")).paths == [str(photos / "01.png")]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (lambda folder: folder / "new.xlsx", "ends with .csv or .parquet"),
        (lambda folder: folder / "new", "ends with .csv or .parquet"),
        (lambda folder: folder / "nowhere/new.csv", "a folder that exists"),
        (lambda folder: folder / "list.csv", "would replace"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_the_work(run, tmp_path, capsys, out: Callable, words):
    (tmp_path / "list.csv").write_text("path\na.png\n")
    assert spice("predict", run, tmp_path / "list.csv", "--out", out(tmp_path)) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert (tmp_path / "list.csv").read_text() == "path\na.png\n"


def test_damaged_names_are_one_line(run, photos, tmp_path, capsys):
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    for content in ("{", "[1]", '{"three": "x"}'):
        (damaged / "model/names.json").write_text(content)
        assert spice("predict", damaged, photos) == 1
        assert "names.json holds no names" in capsys.readouterr().err
