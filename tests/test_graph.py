"""Clusterings of the neighbour graph, their consensus, and the spreading and scaling of probabilities."""

import networkx as nx
import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from spice_dist import graph
from spice_dist.methods import spice_graph
from spice_dist.methods.spice_graph import SpiceGraphConfig
from spice_dist.task import Task


def rings(count: int = 150, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two circles in each other, which no pair of centers divides: (points (2 count, 2), which circle)."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, 2 * count)
    which = np.repeat([0, 1], count)
    radius = 1 + 2 * which + rng.normal(0, 0.05, 2 * count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), which


def neighbors_of(points: np.ndarray, count: int) -> np.ndarray:
    distances = np.square(points[:, None] - points[None]).sum(2)
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, 1)[:, :count].astype(np.int32)


def test_the_graph_weighs_mutual_neighbours_twice():
    neighbors = np.array([[1, 2], [0, 2], [3, 0], [2, 1]], np.int32)
    dense = np.zeros((4, 4))
    for image, row in enumerate(neighbors):
        dense[image, row] += 0.5
        dense[row, image] += 0.5
    np.testing.assert_array_equal(graph.neighbor_graph(neighbors, 2).toarray(), dense)
    np.testing.assert_array_equal(
        graph.neighbor_graph(neighbors, 1).toarray(), graph.neighbor_graph(neighbors[:, :1], 5).toarray()
    )


@pytest.mark.parametrize("images", [60, 500])  # all eigenvectors, and the iterative solver
def test_coordinates_are_eigenvectors_of_the_random_walk(images):
    points = np.random.default_rng(0).normal(size=(images, 3))
    weights = graph.neighbor_graph(neighbors_of(points, 8), 8)
    values, coordinates = graph.diffusion_map(weights, 6)
    walk = weights.toarray() / weights.sum(1)[:, None]
    np.testing.assert_allclose(walk @ coordinates, coordinates * values, atol=1e-3 * np.abs(coordinates).max())
    dense = np.sort(np.linalg.eigvals(walk).real)[::-1]
    np.testing.assert_allclose(values, dense[1:7], atol=1e-4)


def test_a_walk_is_the_map_of_so_many_steps():
    """Distances of the map after t steps are those of the rows of P^t, in the metric of the stationary distribution."""
    points = np.random.default_rng(1).normal(size=(40, 2))
    weights = graph.neighbor_graph(neighbors_of(points, 6), 6)
    degree = weights.sum(1)
    values, coordinates = graph.diffusion_map(weights, 39)
    walk = np.linalg.matrix_power(weights.toarray() / degree[:, None], 4)
    wanted = np.square((walk[:, None] - walk[None]) / np.sqrt(degree)).sum(2)
    moved = coordinates * values**4
    np.testing.assert_allclose(np.square(moved[:, None] - moved[None]).sum(2), wanted, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(graph.walked(values, coordinates, 3), axis=1), 1)


def test_the_graph_divides_what_no_center_does():
    points, which = rings()
    labels = graph.graph_clusterings(neighbors_of(points, 15), 2, (8, 12), (0, 200))
    assert labels.shape == (4, 300)
    assert all(adjusted_rand_score(which, row) == 1 for row in labels)
    assert adjusted_rand_score(which, graph.kmeans(points, 2, 0)) < 0.1


def test_of_several_attempts_the_one_of_largest_modularity_is_kept():
    """Thirty clumps in a row, on which k-means often ends with one divided and two together."""
    points = np.concatenate([np.random.default_rng(9).normal(4 * c, 1, (30, 2)) for c in range(30)])
    neighbors, which = neighbors_of(points, 8), np.repeat(range(30), 30)

    def scores(labels: np.ndarray, seed: int) -> tuple[float, float]:
        one_hot = np.eye(30)
        consensus, _ = graph.consensus(np.stack([graph.spread(one_hot[row], neighbors) for row in labels]), seed=seed)
        networks = [graph.modularity(neighbors[:, :count], consensus.argmax(1))[1] for count in (5, 8)]
        return float(np.mean(networks)), adjusted_rand_score(which, consensus.argmax(1))

    once = [scores(graph.graph_clusterings(neighbors, 30, (5, 8), (6,), seed), seed) for seed in range(4)]
    best = [scores(graph.best_clusterings(neighbors, points, 30, (5, 8), (6,), 4, seed), seed) for seed in range(4)]
    assert all(kept[0] >= first[0] for first, kept in zip(once, best, strict=True))
    assert np.mean(best, 0)[0] > np.mean(once, 0)[0] + 0.001
    assert np.mean(best, 0)[1] > np.mean(once, 0)[1]


def test_pieces_of_a_graph_are_clusters():
    points = np.concatenate([np.random.default_rng(2).normal(10 * c, 1, (60, 2)) for c in range(4)])
    labels = graph.graph_clusterings(neighbors_of(points, 10), 4, (5, 10), (0, 100))
    assert all(adjusted_rand_score(np.repeat(range(4), 60), row) == 1 for row in labels)


def test_more_clusters_than_distinct_points_is_no_error():
    points = np.repeat(np.eye(3), 20, 0)
    assert len(np.unique(graph.kmeans(points, 5, 0))) == 3


def test_a_consensus_undoes_permutations_and_outvotes_errors():
    rng = np.random.default_rng(3)
    truth = rng.integers(5, size=400)
    members = []
    for _ in range(7):
        wrong = np.where(rng.random(400) < 0.2, rng.integers(5, size=400), truth)
        members.append(np.eye(5)[rng.permutation(5)[wrong]])
    mean, agreement = graph.consensus(np.stack(members))
    assert adjusted_rand_score(truth, mean.argmax(1)) > 0.97 > adjusted_rand_score(truth, members[0].argmax(1))
    np.testing.assert_allclose(mean.sum(1), 1)
    votes = np.stack([graph.matched(mean.argmax(1), m.argmax(1), 5)[m.argmax(1)] for m in members])
    np.testing.assert_allclose(agreement, (votes == mean.argmax(1)).mean(0))
    again, _ = graph.consensus(np.stack(members)[:, :, [3, 0, 1, 4, 2]])
    assert adjusted_rand_score(mean.argmax(1), again.argmax(1)) == 1


def test_spreading_is_its_series():
    points, _ = rings(30)
    neighbors = neighbors_of(points, 5)
    probs = np.random.default_rng(4).dirichlet(np.ones(3), 60)
    walk = np.zeros((60, 60))
    walk[np.arange(60)[:, None], neighbors] = 1 / 5
    wanted = 0.5 * (probs + 0.5 * walk @ probs) + 0.25 * walk @ walk @ probs
    np.testing.assert_allclose(graph.spread(probs, neighbors, 0.5, rounds=2), wanted)
    np.testing.assert_allclose(graph.neighbor_mean(probs, neighbors), walk @ probs)


def test_beyond_the_landmarks_the_others_follow_their_nearest(monkeypatch):
    rng = np.random.default_rng(6)
    which = rng.integers(4, size=900)
    points = rng.standard_normal((4, 16))[which] * 3 + rng.standard_normal((900, 16))
    points = torch.nn.functional.normalize(torch.from_numpy(points).float(), dim=1)
    monkeypatch.setattr(graph, "LANDMARKS", 300)
    settings = SpiceGraphConfig(counts=(10,), walks=(4, 8), spread=5)
    labels = spice_graph.clusterings(Task(clusters=4), settings, points, neighbors_of(points.numpy(), 10))
    assert labels.shape == (2, 900)
    assert all(adjusted_rand_score(which, row) > 0.95 for row in labels)


def test_scaled_probabilities_have_the_sizes_and_keep_their_odds():
    probs = np.random.default_rng(5).dirichlet(np.ones(4), 300)
    sizes = np.array([0.1, 0.2, 0.3, 0.4])
    scaled = graph.with_sizes(probs, sizes, rounds=200)
    np.testing.assert_allclose(scaled.mean(0), sizes, atol=1e-6)
    np.testing.assert_allclose(scaled.sum(1), 1)
    odds = (scaled[:, 0] / scaled[:, 1]) / (probs[:, 0] / probs[:, 1])
    np.testing.assert_allclose(odds, odds[0])  # one factor for each cluster: the nearest in relative entropy


def test_modularity_is_networkxs():
    rng = np.random.default_rng(0)
    neighbors = np.array([rng.choice(np.delete(np.arange(60), i), 4, replace=False) for i in range(60)])
    labels = rng.integers(0, 5, 60)
    links = nx.MultiGraph([(i, int(j)) for i in range(60) for j in neighbors[i]])
    groups = [set(np.flatnonzero(labels == c).tolist()) for c in range(5)]
    agreement, value = graph.modularity(neighbors, labels)
    assert value == pytest.approx(nx.community.modularity(links, groups), abs=1e-12)
    assert agreement == pytest.approx(np.mean([labels[i] == labels[j] for i in range(60) for j in neighbors[i]]))
