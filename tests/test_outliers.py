"""Outliers are the images whose k-th neighbour is far, whatever the network and the number of images."""

import numpy as np
import pytest

from spice_dist import outliers


def unit_rows(count: int, dimensions: int = 12, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dimensions)) * 0.3
    rows[:, 0] += 1
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize("k", [1, 10])
def test_distances_are_those_of_all_pairs_in_float64(k):
    features = unit_rows(80)
    exact = 1 - features.astype(np.float64) @ features.astype(np.float64).T
    np.fill_diagonal(exact, np.inf)
    np.testing.assert_allclose(outliers.kth_distances(features, k), np.sort(exact, 1)[:, k - 1], atol=1e-5)


def test_planted_foreign_images_come_first_and_a_few_copies_do_not_hide_them():
    features = unit_rows(500)
    foreign = -unit_rows(5)
    foreign[1:] = foreign[0]
    distance = outliers.kth_distances(np.concatenate([features, foreign]))
    assert set(outliers.most_unusual(distance)[:5].tolist()) == {500, 501, 502, 503, 504}


def test_of_many_images_the_neighbours_are_those_in_an_even_sample(monkeypatch):
    features = unit_rows(300)
    whole = outliers.kth_distances(features)
    monkeypatch.setattr(outliers, "SAMPLE", 100)
    monkeypatch.setattr(outliers, "CHUNK", 70)
    sample = np.unique(np.linspace(0, 299, 100).astype(np.int64))
    exact = 1 - features.astype(np.float64) @ features[sample].astype(np.float64).T
    exact[sample, np.arange(100)] = np.inf
    distance = outliers.kth_distances(features)
    np.testing.assert_allclose(distance, np.sort(exact, 1)[:, outliers.K - 1], atol=1e-5)
    assert (distance >= whole - 1e-6).all()


def test_one_image_equal_images_and_features_that_are_no_numbers_have_a_distance():
    assert outliers.kth_distances(unit_rows(1)).tolist() == [0]
    assert outliers.scores(outliers.kth_distances(np.repeat(unit_rows(1), 20, axis=0))).tolist() == pytest.approx(
        [1] * 20
    )
    features = unit_rows(60)
    features[7] = np.nan
    distance = outliers.kth_distances(features)
    assert np.isfinite(distance).all()
    assert outliers.most_unusual(distance)[0] == 7


def test_scores_are_1_in_the_median_and_one_of_a_hundred_is_listed():
    distance = np.random.default_rng(0).random(1001).astype(np.float32)
    assert np.median(outliers.scores(distance)) == pytest.approx(1)
    assert np.allclose(outliers.scores(distance), outliers.scores(7 * distance))
    assert [len(outliers.most_unusual(np.zeros(n))) for n in (1, 100, 101, 1001, 50_000)] == [1, 1, 2, 11, 100]
