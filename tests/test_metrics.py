"""Scores depend on the partition alone, and agree with brute force, closed forms and scikit-learn."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from spice_dist import metrics


def brute_force_accuracy(y_true, y_pred):
    """Try every one-to-one map; None stands for "no class"."""
    clusters = sorted(set(y_pred))
    classes = sorted(set(y_true)) + [None] * len(clusters)
    hits = 0
    for image_of in itertools.permutations(classes, len(clusters)):
        mapping = dict(zip(clusters, image_of, strict=True))
        hits = max(hits, sum(mapping[p] == t for t, p in zip(y_true, y_pred, strict=True)))
    return hits / len(y_true)


@st.composite
def two_labelings(draw, max_id=3):
    n = draw(st.integers(1, 25))
    ids = st.lists(st.integers(0, max_id), min_size=n, max_size=n)
    return draw(ids), draw(ids)


@settings(deadline=None, max_examples=150)
@given(two_labelings())
def test_accuracy_is_the_best_over_all_maps(pair):
    assert metrics.accuracy(*pair) == pytest.approx(brute_force_accuracy(*pair))


@settings(deadline=None, max_examples=150)
@given(two_labelings())
def test_the_match_is_one_to_one_and_explains_the_accuracy(pair):
    y_true, y_pred = pair
    mapping = metrics.match(y_true, y_pred)
    assert len(mapping) == min(len(set(y_true)), len(set(y_pred))) == len(set(mapping.values()))
    hits = np.mean([mapping.get(p) == t for t, p in zip(y_true, y_pred, strict=True)])
    assert metrics.accuracy(y_true, y_pred) == pytest.approx(hits)


@settings(deadline=None, max_examples=60)
@given(two_labelings(max_id=6), st.permutations([-1, 7, 10**9, -(10**12), 0, 41, 5]), st.permutations("abcdefg"))
def test_new_names_for_clusters_and_classes_change_no_score(pair, cluster_names, class_names):
    y_true, y_pred = pair
    renamed = metrics.scores([class_names[t] for t in y_true], [cluster_names[p] for p in y_pred])
    assert renamed == pytest.approx(metrics.scores(y_true, y_pred))


@settings(deadline=None, max_examples=60)
@given(two_labelings(max_id=5))
def test_scores_agree_with_scikit_learn(pair):
    found = metrics.scores(*pair)
    assert found["nmi"] == pytest.approx(sk.normalized_mutual_info_score(*pair))
    assert found["nmi_geometric"] == pytest.approx(sk.normalized_mutual_info_score(*pair, average_method="geometric"))
    assert found["ami"] == pytest.approx(sk.adjusted_mutual_info_score(*pair))
    assert found["ari"] == pytest.approx(sk.adjusted_rand_score(*pair))
    assert all(type(value) is float for value in found.values())


@settings(deadline=None, max_examples=100)
@given(two_labelings(max_id=5))
def test_the_geometric_nmi_is_never_below_the_arithmetic(pair):
    found = metrics.scores(*pair)
    assert found["nmi_geometric"] >= found["nmi"] - 1e-12


def test_a_perfect_prediction_under_other_names_scores_one():
    y_true = np.repeat([3, 8, 1], 5)
    assert metrics.scores(y_true, np.repeat([-1, 0, 99], 5)) == pytest.approx(
        dict.fromkeys(("acc", "nmi", "nmi_geometric", "ami", "ari"), 1.0)
    )
    assert metrics.match(y_true, np.repeat([-1, 0, 99], 5)) == {-1: 3, 0: 8, 99: 1}


def test_a_constant_prediction_scores_the_largest_class_and_no_information():
    found = metrics.scores([0, 0, 0, 1, 2], [4, 4, 4, 4, 4])
    assert found["acc"] == pytest.approx(0.6)
    assert [found[name] for name in ("nmi", "nmi_geometric", "ami", "ari")] == pytest.approx([0, 0, 0, 0], abs=1e-12)


def test_more_clusters_than_classes_leave_the_surplus_wrong():
    assert metrics.accuracy([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 2, 2]) == pytest.approx(5 / 6)
    assert metrics.match([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 2, 2]) == {0: 0, 2: 1}


def test_fewer_clusters_than_classes_leave_the_surplus_wrong():
    assert metrics.accuracy([0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 9, 9]) == pytest.approx(4 / 6)


def test_the_greedy_map_is_not_good_enough():
    y_true = [0] * 10 + [1] * 9 + [0] * 8
    y_pred = [0] * 19 + [1] * 8  # greedy: cluster 0 -> class 0, 10 hits; best: 0 -> 1, 1 -> 0, 17 hits
    assert metrics.accuracy(y_true, y_pred) == pytest.approx(17 / 27)


def test_an_empty_cluster_is_counted_and_lowers_the_entropy():
    labels = [0, 0, 2, 2]
    assert metrics.cluster_sizes(labels, 4).tolist() == [2, 0, 2, 0]
    assert metrics.size_entropy(labels, 4) == pytest.approx(0.5)


def test_size_entropy_at_its_ends():
    assert metrics.size_entropy([0, 1, 2, 3], 4) == pytest.approx(1.0)
    assert metrics.size_entropy([2, 2, 2], 4) == 0.0
    assert metrics.size_entropy([0, 0], 1) == 0.0


def test_agreement_is_the_mean_over_pairs_of_heads():
    rng = np.random.default_rng(0)
    heads = rng.integers(0, 4, size=(5, 60))
    pairs = [sk.adjusted_rand_score(heads[i], heads[j]) for i, j in itertools.combinations(range(5), 2)]
    assert metrics.agreement(heads) == pytest.approx(np.mean(pairs))
    permuted = np.stack([heads[0], (heads[0] + 1) % 4])
    assert metrics.agreement(permuted) == pytest.approx(1.0)


def silhouette_by_the_definition(features, labels):
    """s = (b - a) / max(a, b): a = mean distance inside the own cluster, b = to the next one; 0 for an image alone."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    values = []
    for i, own in enumerate(labels):
        mates = [j for j, other in enumerate(labels) if other == own and j != i]
        if not mates:
            values.append(0.0)
            continue
        a = distance[i, mates].mean()
        b = min(distance[i, labels == other].mean() for other in set(labels.tolist()) - {own})
        values.append((b - a) / max(a, b))
    return np.mean(values)


def test_silhouette_is_the_cosine_silhouette():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 6)), rng.integers(0, 4, size=40)
    expected = silhouette_by_the_definition(features, labels)
    assert metrics.silhouette(features, labels) == pytest.approx(expected)
    lengths = rng.uniform(0.1, 9.0, size=(40, 1))
    assert metrics.silhouette(features * lengths, labels) == pytest.approx(expected)


def test_silhouette_samples_the_same_images_for_a_seed():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, size=3000)
    features = np.eye(3, 8)[labels] + rng.normal(scale=0.3, size=(3000, 8))
    few = metrics.silhouette(features.astype(np.float16), labels, sample=500, seed=1)
    assert few == metrics.silhouette(features.astype(np.float16), labels, sample=500, seed=1)
    assert few == pytest.approx(metrics.silhouette(features, labels, sample=3000), abs=0.03)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_silhouette_is_zero_where_it_is_not_defined(labels):
    assert metrics.silhouette(np.eye(3), labels) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.accuracy([0, 1], [0]), "2 true labels but 1 predictions"),
        (lambda: metrics.scores([], []), "y_true is empty"),
        (lambda: metrics.match([0.0, np.nan], [0, 1]), "not finite"),
        (lambda: metrics.accuracy([[0], [1]], [0, 1]), "one dimension"),
        (lambda: metrics.accuracy(np.array([None, 1]), [0, 1]), "numbers or strings"),
        (lambda: metrics.accuracy(np.arange(20_000), np.arange(20_000)), "one id per image"),
        (lambda: metrics.cluster_sizes([0, 3], 3), "must lie in 0..2, found 0..3"),
        (lambda: metrics.cluster_sizes([-1, 0], 3), "must lie in 0..2, found -1..0"),
        (lambda: metrics.cluster_sizes([0.5, 1.0], 3), "must be integers"),
        (lambda: metrics.size_entropy([0], 0), "at least 1"),
        (lambda: metrics.agreement([[0, 1, 2]]), "H of at least 2"),
        (lambda: metrics.agreement(np.zeros((2, 0))), "is empty"),
        (lambda: metrics.silhouette(np.eye(3), [0, 1]), "3 features but 2 labels"),
        (lambda: metrics.silhouette(np.ones(3), [0, 1, 1]), "shape"),
        (lambda: metrics.silhouette(np.full((3, 2), np.inf), [0, 1, 1]), "not finite"),
        (lambda: metrics.silhouette(np.eye(3), [0, 1, 1], sample=1), "at least 2"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_metrics_imports_neither_scipy_nor_scikit_learn():
    code = "import sys, spice_dist.metrics; print([m for m in ('scipy', 'sklearn', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
