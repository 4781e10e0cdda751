"""Probes against loops over images, and on the checkpoints that a small training leaves."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spice_dist import cli, metrics, probes
from spice_dist.baselines import kmeans
from spice_dist.config import Config, override
from spice_dist.data.ingest import ingest
from spice_dist.data.manifest import read_manifest
from spice_dist.data.sources import open_source
from spice_dist.distributed import checkpoint
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import UserError
from spice_dist.methods import moco
from spice_dist.methods.features import embed
from spice_dist.models.backbone import Backbone, unit
from spice_dist.recipes import digits
from tests.folders import unrecorded

CPU = torch.device("cpu")
SMALL = override(digits(), {"backbone.widths": (8, 8, 16, 32), "moco.epochs": 3, "moco.batch": 64, "moco.queue": 128})
LAST = 9  # 3 epochs of 200 images in batches of 64


def features(count: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return unit(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


def knn_by_a_loop(train, train_labels, test, test_labels, k: int, temperature: float, skip_own: bool) -> float:
    train, test = train.double().tolist(), test.double().tolist()
    right = 0
    for i, image in enumerate(test):
        cosines = [sum(a * b for a, b in zip(image, other, strict=True)) for other in train]
        allowed = [j for j in range(len(train)) if not (skip_own and i == j)]
        best = sorted(allowed, key=lambda j: -cosines[j])[:k]
        votes: dict[int, float] = {}
        for j in best:
            votes[train_labels[j]] = votes.get(train_labels[j], 0.0) + math.exp(cosines[j] / temperature)
        right += max(votes, key=lambda name: votes[name]) == test_labels[i]
    return right / len(test)


@pytest.mark.parametrize("block", [7, 50, 1000])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.1), (20, 1.0), (500, 0.07)])
def test_knn_is_the_weighted_vote_of_a_loop(k, temperature, block, monkeypatch):
    monkeypatch.setattr(probes, "CHUNK", block)
    rng = np.random.default_rng(0)
    train, test = features(90, seed=1), features(40, seed=2)
    train_labels, test_labels = rng.integers(3, 7, 90) * 10, rng.integers(3, 7, 40) * 10
    options = {"k": k, "temperature": temperature}
    assert probes.knn_accuracy(train, train_labels, test, test_labels, **options) == pytest.approx(
        knn_by_a_loop(train, train_labels, test, test_labels, k, temperature, skip_own=False)
    )
    assert probes.knn_accuracy_leave_one_out(train, train_labels, **options) == pytest.approx(
        knn_by_a_loop(train, train_labels, train, train_labels, k, temperature, skip_own=True)
    )


def test_an_image_does_not_vote_for_itself_though_copies_of_it_may():
    pair = torch.eye(4)[[0, 0, 1, 1]]
    assert probes.knn_accuracy_leave_one_out(pair, np.array([0, 1, 2, 3]), k=1) == 0.0
    assert probes.knn_accuracy_leave_one_out(pair, np.array([0, 0, 2, 2]), k=1) == 1.0
    assert probes.knn_accuracy(pair, np.array([0, 0, 2, 2]), pair, np.array([0, 0, 2, 3]), k=1) == 0.75


def test_a_small_temperature_does_not_overflow():
    x, labels = features(30), np.arange(30) % 3
    sharp = probes.knn_accuracy_leave_one_out(x, labels, k=10, temperature=1e-4)
    assert sharp == probes.knn_accuracy_leave_one_out(x, labels, k=1)


def test_neither_names_of_classes_nor_order_nor_half_precision_of_images_matter():
    x, labels = features(80), np.random.default_rng(0).integers(0, 4, 80)
    score = probes.knn_accuracy_leave_one_out(x, labels, k=9)
    assert probes.knn_accuracy_leave_one_out(x, np.array([70, -5, 3, 10**9])[labels], k=9) == score
    order = np.random.default_rng(1).permutation(80)
    assert probes.knn_accuracy_leave_one_out(x[order], labels[order], k=9) == score
    assert probes.knn_accuracy_leave_one_out(x.half(), labels, k=9) == pytest.approx(score, abs=0.05)


def test_a_class_that_was_not_trained_on_is_missed():
    x = features(10)
    assert probes.knn_accuracy(x, np.zeros(10, int), x, np.ones(10, int), k=3) == 0.0


@pytest.mark.parametrize("options", [{"k": 0}, {"temperature": 0.0}])
def test_no_neighbour_and_no_temperature_are_mistakes(options):
    with pytest.raises(ValueError, match="must be above 0"):
        probes.knn_accuracy_leave_one_out(features(5), np.arange(5), **options)


def blobs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that planes part, by features in a unit a million times that of the noise in another."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    return (np.eye(3, 5)[labels] * 10 + rng.normal(size=(count, 5))) * np.array([1e-3] * 3 + [1e3] * 2), labels


def test_a_linear_probe_parts_what_planes_part():
    assert probes.linear_probe(*blobs(200, 0), *blobs(100, 1)) == 1.0
    assert probes.linear_probe_split(*blobs(200, 0), seed=3) == 1.0


def test_a_linear_probe_of_random_labels_is_at_chance():
    x, labels = features(2000, 8).numpy(), np.random.default_rng(0).integers(0, 4, 2000)
    assert probes.linear_probe_split(x, labels) == pytest.approx(0.25, abs=3 * math.sqrt(0.25 * 0.75 / 400))


def test_the_split_takes_four_fifths_of_every_class_and_follows_the_seed(monkeypatch):
    labels = np.repeat([4, 7, 9], [50, 10, 1])
    x = np.arange(61.0)[:, None]
    seen = []
    monkeypatch.setattr(probes, "linear_probe", lambda *parts: seen.append(parts) or 0.0)
    for seed in (0, 0, 1):
        probes.linear_probe_split(x, labels, seed=seed)
    train, train_labels, test, test_labels = seen[0]
    assert np.unique(train_labels, return_counts=True)[1].tolist() == [40, 8, 1]
    assert np.unique(test_labels, return_counts=True)[1].tolist() == [10, 2]
    assert sorted(np.concatenate([train, test]).ravel()) == list(range(61))
    assert labels[train.ravel().astype(int)].tolist() == train_labels.tolist()
    assert np.array_equal(seen[0][0], seen[1][0])
    assert not np.array_equal(seen[0][0], seen[2][0])


def test_a_split_without_a_test_part_is_a_mistake():
    with pytest.raises(ValueError, match="one image only"):
        probes.linear_probe_split(features(4).numpy(), np.arange(4))


def describe(run: Path, config: Config) -> None:
    (run / "config.json").write_text(json.dumps({"version": 1, "config": asdict(config)}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_folder) -> Path:
    """A run that ends with stage 1, which kept its last two steps: read only."""
    run = tmp_path_factory.mktemp("probed") / "run"
    unrecorded(Path(shutil.copytree(digits_folder, run)))
    describe(run, SMALL)
    worker = LocalWorker(run, "moco", CPU)
    worker.checkpoint_seconds = 0.0  # every step
    worker.on_report = lambda *_: worker.writer.wait()  # pyright: ignore[reportAttributeAccessIssue]
    moco.train(SMALL, SMALL.moco, worker)
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def all_probes(run: Path) -> list[dict]:
    return probes.probe_checkpoints(run, probes.KINDS, CPU)


def test_each_kept_checkpoint_has_a_row_that_its_own_features_explain(run):
    told: list[tuple[int, int]] = []
    rows = probes.probe_checkpoints(run, probes.KINDS, CPU, lambda done, total: told.append((done, total)))
    assert [row["step"] for row in rows] == [LAST - 1, LAST]
    assert told[-1] == (400, 400)
    assert json.loads((run / "probes.json").read_text()) == rows

    labels, manifest = np.load(run / "data/labels.npy"), read_manifest(run / "data")
    embed(SMALL, None, LocalWorker(run, "features", CPU))
    x = np.load(run / "features/features.npy")
    clusters = kmeans(manifest, SMALL, lambda index: x[index].astype(np.float32))
    assert rows[-1] == {
        "step": LAST,
        "knn": pytest.approx(probes.knn_accuracy_leave_one_out(torch.from_numpy(x), labels)),
        "kmeans": pytest.approx(metrics.accuracy(labels, clusters)),
        "linear": pytest.approx(probes.linear_probe_split(x, labels, seed=SMALL.seed)),
    }
    assert rows[0] != {**rows[1], "step": rows[0]["step"]}
    assert min(rows[-1]["kmeans"], rows[-1]["linear"]) > 0.2, "twice chance, after nine steps"


def test_kinds_that_are_not_asked_for_are_none(run):
    rows = probes.probe_checkpoints(run, ["kmeans"], CPU)
    assert [(row["knn"], row["linear"]) for row in rows] == [(None, None)] * 2
    assert all(0.1 < row["kmeans"] <= 1 for row in rows)


def test_images_without_a_label_are_left_out(run):
    labels = np.load(run / "data/labels.npy")
    embed(SMALL, None, LocalWorker(run, "features", CPU))
    x = np.load(run / "features/features.npy")
    hidden = np.arange(0, 200, 3)
    kept = np.setdiff1d(np.arange(200), hidden)
    labels[hidden] = -1
    np.save(run / "data/labels.npy", labels)
    row = all_probes(run)[-1]
    assert row["knn"] == pytest.approx(
        probes.knn_accuracy_leave_one_out(torch.from_numpy(x[kept]), labels[kept]), abs=1e-9
    )
    assert row["linear"] == pytest.approx(probes.linear_probe_split(x[kept], labels[kept], seed=SMALL.seed))
    clusters = kmeans(read_manifest(run / "data"), SMALL, lambda index: x[index].astype(np.float32))
    assert row["kmeans"] == pytest.approx(metrics.accuracy(labels[kept], clusters[kept]))


def test_held_out_images_are_the_test_part_and_extra_ones_are_in_none(trained, tmp_path):
    source = open_source("digits")
    assert source.labels is not None
    labels = source.labels[:200]  # the extra ones have some too, which must not matter
    parts = replace(source, paths=source.paths[:200], labels=labels, extra=30, held_out=50)
    run = tmp_path / "run"
    ingest(parts, run / "data", size=8)
    shutil.copytree(trained / "moco", run / "moco")
    describe(run, SMALL)
    row = all_probes(run)[-1]
    embed(SMALL, None, LocalWorker(run, "features", CPU))
    x, y = np.load(run / "features/features.npy"), labels
    train, test = slice(0, 120), slice(150, 200)
    expected = probes.knn_accuracy(torch.from_numpy(x[train]), y[train], torch.from_numpy(x[test]), y[test])
    assert row["knn"] == pytest.approx(expected)
    assert row["linear"] == pytest.approx(probes.linear_probe(x[train], y[train], x[test], y[test]))
    clusters = kmeans(read_manifest(run / "data"), SMALL, lambda index: x[index].astype(np.float32))
    assert row["kmeans"] == pytest.approx(metrics.accuracy(y[test], clusters[test]))


def test_another_stage_1_is_found_by_its_name(run):
    (run / "moco").rename(run / "byol")
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**content, "config": {**content["config"], "pretext": "byol"}}))
    assert [row["step"] for row in all_probes(run)] == [LAST - 1, LAST]


def test_without_a_stage_1_the_features_are_probed_as_step_0(run):
    embed(SMALL, None, LocalWorker(run, "features", CPU))
    last = all_probes(run)[-1]
    shutil.rmtree(run / "moco")
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**content, "config": {**content["config"], "pretext": "none"}}))
    assert all_probes(run) == [{**last, "step": 0}]
    shutil.rmtree(run / "features")
    with pytest.raises(UserError, match="no features to probe yet"):
        all_probes(run)


def test_a_damaged_checkpoint_is_left_out_and_left_alone(run):
    damaged = run / f"moco/checkpoints/{LAST:09d}"
    (damaged / "backbone.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="left out"):
        rows = probes.probe_checkpoints(run, ["knn"], CPU)
    assert [row["step"] for row in rows] == [LAST - 1]
    assert damaged.is_dir()


def test_a_checkpoint_that_training_drops_meanwhile_is_passed_over(run, monkeypatch):
    real = checkpoint.load

    def load(path: Path) -> checkpoint.Checkpoint:
        if path.name.endswith(str(LAST - 1)):
            shutil.rmtree(path)
        return real(path)

    monkeypatch.setattr(checkpoint, "load", load)
    assert [row["step"] for row in probes.probe_checkpoints(run, ["knn"], CPU)] == [LAST]


def test_random_weights_are_probed_as_they_are(run):
    """The network of the row is the checkpoint's, not one that is made anew."""
    shutil.rmtree(run / "moco")
    torch.manual_seed(5)
    backbone = Backbone(SMALL.backbone, SMALL.data.channels, SMALL.data.size)
    checkpoint.save(run / "moco/checkpoints", 3, {"backbone": backbone.state_dict()}, {"total": 9})
    (one,) = all_probes(run)
    assert all_probes(run) == [one]
    assert one["step"] == 3


def lose_config(run: Path) -> None:
    (run / "config.json").unlink()


def spoil_config(run: Path) -> None:
    (run / "config.json").write_text('{"config": {"clusters": 3}}')


def lose_labels(run: Path) -> None:
    (run / "data/labels.npy").unlink()


def hide_labels(run: Path) -> None:
    np.save(run / "data/labels.npy", np.full(200, -1))


def lose_data(run: Path) -> None:
    shutil.rmtree(run / "data")


def lose_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "moco")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_config, "no run folder"),
        (spoil_config, "config.json is damaged or of another version"),
        (lose_labels, "no true labels to probe with; run its fit command again with --labels"),
        (hide_labels, "too few images with a true label"),
        (lose_data, "not packed its images yet"),
        (lose_checkpoints, "no checkpoint to probe yet"),
    ],
)
def test_what_cannot_be_probed_is_told_in_one_line(run, capsys, spoil: Callable[[Path], None], message):
    spoil(run)
    assert cli.main(["evaluate", str(run), "--probe", "knn"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (run / "probes.json").exists()


def test_an_unknown_probe_is_told_with_the_known_ones(run):
    with pytest.raises(UserError, match="no probe 'svm'; there are knn, kmeans, linear"):
        probes.probe_checkpoints(run, ["svm"], CPU)


def test_the_command_prints_one_row_per_checkpoint(run, capsys):
    assert cli.main(["evaluate", str(run), "--probe", "linear", "--probe", "knn"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["step", "knn", "linear"]
    saved = json.loads((run / "probes.json").read_text())
    assert [row.split() for row in rows] == [
        [str(row["step"]), f"{row['knn']:.3f}", f"{row['linear']:.3f}"] for row in saved
    ]
