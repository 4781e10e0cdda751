"""A method is one file and one row: k-means on the features, all of it in this file, runs as published methods do."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spice_dist import catalog, cli, stages
from spice_dist.clustering import Clustering
from spice_dist.config import Config
from spice_dist.counting import FLOAT, Cost, Counting, Work
from spice_dist.data.files import Progress
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.methods.plumbing import finished, load_backbone
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.stages import Stage
from spice_dist.task import Task

STEPS = 12


STARTS: list[int] = []  # the steps after which training began, a call each


def train(task: Task, settings: None, worker: Worker) -> None:
    """Lloyd's algorithm on the features (N, D): leaves `centers` (K, D) in the stage's checkpoint."""
    features = torch.from_numpy(np.load(worker.run / "features/features.npy")).float()
    centers, start = features[: task.clusters].clone(), 0
    if saved := worker.resume():
        centers, start = saved.tensors("kmeans")["centers"], saved.step
    STARTS.append(start)
    for step in range(start + 1, STEPS + 1):
        labels = nearest(features, centers)
        loss = (features - centers[labels]).square().sum(1).mean()
        for cluster in labels.unique():
            centers[cluster] = features[labels == cluster].mean(0)
        worker.report(step, STEPS, loss, lambda: {"kmeans": {"centers": centers}})


def nearest(features: Tensor, centers: Tensor) -> Tensor:
    return torch.cdist(features, centers).argmin(1)


def result(
    task: Task, settings: None, run: Path, device: torch.device, progress: Progress, until: str | None
) -> Clustering:
    """The nearest center as one linear head: |z - c|^2 is smallest where 2 z c - |c|^2 is largest."""
    centers = finished(run / "toy").tensors("kmeans")["centers"]
    weight, bias = 2 * centers.T / centers.shape[1] ** 0.5, -centers.square().sum(1)
    head = ClusterHeads.holding({"weights.0": weight[None], "biases.0": bias[None, None]})
    features = torch.from_numpy(np.load(run / "features/features.npy")).float()
    by_head = nearest(features, centers).numpy()[None]
    loss = (features - centers[by_head[0]]).square().sum(1).mean()
    return Clustering(task, ClusterNet(load_backbone(task, run), head), by_head, loss[None], last="toy")


def cost(counting: Counting, settings: None) -> Cost:
    products = 2.0 * STEPS * counting.clustered * counting.task.clusters * counting.backbone.dim
    memory = counting.clustered * counting.backbone.dim * FLOAT
    return Cost((Work(counting.backbone, 0, 0),), products, memory)


def check(config: Config, images: stages.ImageList) -> None:
    if config.clusters > 50:
        raise UserError(f"--clusters is {config.clusters}; the toy knows 50 at most")


TOY = Stage("toy", train, depends=("clusters",), check=check, cost=cost, clusters=True, result=result)


def enter() -> None:
    """What a new method adds to other files: its row, and its name for the command and the report."""
    stages.TABLE = (*stages.TABLE, TOY)
    catalog.METHODS.append("toy")
    catalog.TITLES = {**catalog.TITLES, "toy": ("Toy", "Moves centers to the mean of the features nearest to them.")}


@pytest.fixture(scope="module", autouse=True)
def entered() -> Iterator[None]:
    before = stages.TABLE, catalog.TITLES
    enter()
    yield
    stages.TABLE, catalog.TITLES = before
    catalog.METHODS.remove("toy")


FIT = (
    *("fit", "digits", "--method", "toy", "--workers", "0", "--threads", "1", "--checkpoint-seconds", "1e-9"),
    *("--set", "moco.epochs=1", "--set", "backbone.widths=(8,8,16,32)", "--set", "data.loader=torch"),
)


@pytest.fixture(scope="module")
def toy_run(entered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: read only."""
    run = tmp_path_factory.mktemp("toy") / "run"
    assert cli.main([*FIT, "--out", str(run)]) == 0
    return run


def test_fit_leaves_its_clusters_scores_and_model(toy_run):
    metrics = json.loads((toy_run / "metrics.json").read_text())
    assert metrics["method"] == "toy"
    assert 0 < metrics["eval"]["acc"] <= 1
    assert (toy_run / "model/model.safetensors").exists()
    assert list(metrics["seconds"]) == ["data", "moco", "features", "toy"]
    centers = finished(toy_run / "toy").tensors("kmeans")["centers"]
    features = torch.from_numpy(np.load(toy_run / "features/features.npy")).float()
    clusters = [int(line.split(",")[2]) for line in (toy_run / "assignments.csv").read_text().splitlines()[1:]]
    assert np.mean(clusters == nearest(features, centers).numpy()) > 0.99  # but for the features' float16
    record = json.loads((toy_run / "toy/stage.json").read_text())
    assert record["done"]
    assert record["settings"]["clusters"] == 10


def test_settings_that_its_check_refuses_cost_nothing(tmp_path, capsys):
    assert cli.main([*FIT, "--clusters", "60", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.endswith("spice-dist: --clusters is 60; the toy knows 50 at most\n")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_it(tmp_path, capsys):
    assert cli.main([*FIT, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows)[:4] == ["moco", "features", "toy", "together"]
    assert float(rows["toy"][1]) == pytest.approx(2 * STEPS * 1797 * 10 * 32, rel=0.05)


KILLED = """
import os, signal, sys
from spice_dist import cli
from tests import test_toy_method as toy

calls, nearest = 0, toy.nearest
def kill(features, centers):
    global calls
    calls += 1
    if calls == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return nearest(features, centers)

toy.nearest = kill
toy.enter()
cli.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(toy_run, tmp_path, capsys):
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", KILLED, *FIT, "--out", str(run)], capture_output=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert finished_steps(run) == 5
    assert cli.main([*FIT, "--out", str(run)]) == 0
    assert "features    finished before" in capsys.readouterr().err
    assert 0 < STARTS[-1] <= 5  # the checkpoint of the last step may have been in flight
    for name in ("assignments.csv", "model/model.safetensors"):
        assert (run / name).read_bytes() == (toy_run / name).read_bytes()


def finished_steps(run: Path) -> int:
    return len((run / "toy/metrics.jsonl").read_text().splitlines())


def test_its_scores_and_report_bear_its_name(toy_run, tmp_path, capsys):
    assert cli.main(["evaluate", str(toy_run)]) == 0
    assert "Toy  " in capsys.readouterr().out
    assert cli.main(["report", str(toy_run), "--map", "pca", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Moves centers to the mean" in page


def test_its_model_assigns_other_images(toy_run, tmp_path):
    assert cli.main(["predict", str(toy_run), "digits", "--out", str(tmp_path / "new.csv")]) == 0
    paths = toy_run / "assignments.csv", tmp_path / "new.csv"
    ours, again = ([line.split(",")[:3] for line in path.read_text().splitlines()] for path in paths)
    assert ours == again
