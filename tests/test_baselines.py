"""What a run is compared with: spectral clustering and UMAP of its features, on samples where images are many."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spice_dist import baselines, graph, metrics
from spice_dist.baselines import of_features, spectral, umap_kmeans
from spice_dist.report.table import _better_baselines
from spice_dist.task import Task

CPU, TASK = torch.device("cpu"), Task(clusters=3)
NAMES = ["Pixels + k-means", "Features + UMAP + k-means", "SPICE-Self", "SPICE"]


def blobs(count: int) -> tuple[Tensor, np.ndarray]:
    """Unit features (count, 8) of three groups of unequal size that are far apart, and the groups."""
    rng = np.random.default_rng(0)
    groups = rng.choice(3, count, p=(0.5, 0.3, 0.2))
    rows = np.eye(8)[groups] + 0.1 * rng.standard_normal((count, 8))
    return torch.nn.functional.normalize(torch.from_numpy(rows).float()), groups


@pytest.mark.parametrize("most", [1_000, 120])
def test_spectral_clustering_finds_groups_apart_also_by_landmarks_and_of_other_images(monkeypatch, most):
    monkeypatch.setattr(graph, "landmarks", lambda clusters: most)
    features, groups = blobs(400)
    labels = spectral(TASK, features, clustered=300)
    assert metrics.accuracy(groups, labels) == 1
    assert np.array_equal(labels, spectral(TASK, features, clustered=300))


def of_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """umap-learn, which takes a minute to begin, replaced by a projection; the calls of it."""
    calls: list[tuple[int, dict[str, Any]]] = []

    class Projection:
        def __init__(self, **settings: Any):
            self.settings = settings

        def fit_transform(self, rows: np.ndarray) -> np.ndarray:
            calls.append((len(rows), self.settings))
            return rows[:, :3]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Projection))
    return calls


def test_umap_sees_a_sample_and_the_others_get_the_label_of_their_nearest_images(monkeypatch):
    calls = of_a_stand_in(monkeypatch)
    monkeypatch.setattr(baselines, "UMAP_IMAGES", 100)
    features, groups = blobs(400)
    labels = umap_kmeans(Task(clusters=3, seed=7), features, clustered=300)
    assert metrics.accuracy(groups, labels) == 1
    assert calls == [(100, {"n_neighbors": 10, "n_components": 10, "random_state": 7})]


def test_umap_is_asked_for_and_what_is_left_out_is_said(monkeypatch, capsys):
    calls = of_a_stand_in(monkeypatch)
    features = blobs(60)[0].numpy()
    with_umap = Task(clusters=3, umap_baseline=True)
    monkeypatch.setattr(baselines, "has_umap", lambda: True)
    assert set(of_features(TASK, features, 60, CPU)) == {"spectral"}
    assert set(of_features(with_umap, features, 60, CPU, known=["spectral"])) == {"umap_kmeans"}
    assert len(calls) == 1
    monkeypatch.setattr(baselines, "has_umap", lambda: False)
    assert set(of_features(with_umap, features, 60, CPU)) == {"spectral"}
    monkeypatch.setattr(baselines, "MOST", 59)
    assert of_features(TASK, features, 60, CPU) == {}
    assert of_features(TASK, features[:9], 9, CPU) == {}
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "UMAP and k-means, a baseline, is left out: pip install 'spice_dist[map]'",
        "spectral clustering and UMAP, baselines of up to 59 images, are left out",
    ]


@pytest.mark.parametrize(
    ("accuracies", "lines"),
    [
        ((0.2, 0.7, 0.6, 0.8), []),
        ((0.2, 0.9, 0.95, 0.8), ["of a higher ACC than the result: Features + UMAP + k-means"]),
        ((0.2, 0.7, 0.6, None), ["of a higher ACC than the result: Features + UMAP + k-means"]),
        ((None, None, None, None), []),
    ],
)
def test_the_table_names_the_baselines_that_win(accuracies, lines):
    rows = (None if accuracy is None else {"acc": accuracy} for accuracy in accuracies)
    assert _better_baselines(dict(zip(NAMES, rows, strict=True))) == lines


@pytest.mark.slow  # numba compiles for a minute or two
@pytest.mark.skipif(find_spec("umap") is None, reason="umap-learn is not installed")
def test_umap_itself_finds_groups_apart_and_gives_the_same_twice():
    features, groups = blobs(400)
    labels = umap_kmeans(TASK, features, clustered=300)
    assert metrics.accuracy(groups, labels) > 0.95
    assert np.array_equal(labels, umap_kmeans(TASK, features, clustered=300))
