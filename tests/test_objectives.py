"""Scores of clusterings without labels: against closed forms, other libraries, and clusterings whose worth is known."""

import numpy as np
import pytest
from scipy.stats import f_oneway
from sklearn.linear_model import Ridge
from sklearn.metrics import adjusted_rand_score

from spice_dist.objectives import (
    FOLDS,
    OBJECTIVES,
    RIDGE,
    combined,
    consensus,
    generalization,
    importance,
    mean_cosine,
    ranks,
    spearman,
)

RNG = np.random.default_rng(0)
N, D, K = 600, 8, 4


def blobs(noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) around K orthogonal centers, and which of them each is around."""
    truth = RNG.integers(0, K, N)
    return (np.eye(D)[truth] + noise * RNG.standard_normal((N, D))).astype(np.float32), truth


def test_generalization_is_the_accuracy_of_ridge_regression_fitted_fold_by_fold():
    x, clusters = blobs(0.5)
    clusters = np.where(RNG.random(N) < 0.2, RNG.integers(0, K, N), clusters)
    order = np.random.default_rng(3).permutation(N)
    with_one = np.column_stack([x, np.ones(N)]).astype(np.float64)
    alpha = RIDGE * np.square(with_one).sum() / (D + 1)
    predicted = np.empty(N, int)
    for fold in np.array_split(order, FOLDS):
        rest = np.setdiff1d(order, fold)
        model = Ridge(alpha, fit_intercept=False).fit(with_one[rest], np.eye(K)[clusters[rest]])
        predicted[fold] = model.predict(with_one[fold]).argmax(1)
    recall = [np.mean(predicted[clusters == k] == k) for k in range(K)]
    assert generalization(x, clusters, K, seed=3) == pytest.approx(np.mean(recall), abs=1e-12)


def test_generalization_of_the_truth_is_high_of_chance_low_and_of_one_cluster_one_over_k():
    x, truth = blobs(0.2)
    assert generalization(x, truth, K) > 0.98
    assert generalization(x, RNG.integers(0, K, N), K) == pytest.approx(1 / K, abs=0.08)
    assert generalization(x, np.zeros(N, int), K) == pytest.approx(1 / K)
    assert generalization(x, np.minimum(truth, 2), K) <= 3 / K  # a lost cluster costs its share


def test_generalization_does_not_depend_on_the_names_of_the_clusters():
    x, truth = blobs(0.6)
    renamed = np.array([2, 0, 3, 1])[truth]
    assert generalization(x, renamed, K) == pytest.approx(generalization(x, truth, K), abs=1e-12)


def test_ranks_put_the_best_first_ties_between_and_what_is_missing_last():
    assert ranks([0.3, 0.9, 0.3, None], +1).tolist() == [2.5, 1, 2.5, 4]
    assert ranks([0.3, 0.9, float("nan"), 0.1], -1).tolist() == [2, 3, 4, 1]


def test_the_combination_is_the_mean_place_and_knows_which_scores_are_losses():
    scores = [
        {"generalization": 0.9, "select_loss": 1.6},
        {"generalization": 0.8, "select_loss": 1.5},
        {"generalization": 0.7, "select_loss": 1.7},
    ]
    assert OBJECTIVES["select_loss"] == -1
    assert combined(scores, ["generalization", "select_loss"]).tolist() == [-1.5, -1.5, -3]


def test_consensus_is_the_mean_agreement_with_the_others_and_finds_the_one_that_is_alone():
    _, truth = blobs(0.5)
    near = np.where(RNG.random(N) < 0.1, RNG.integers(0, K, N), truth)
    alone = RNG.integers(0, K, N)
    rows = np.stack([truth, (truth + 1) % K, near, alone])  # names do not count
    found = consensus(rows)
    pair = adjusted_rand_score(truth, near)
    with_alone = adjusted_rand_score(truth, alone)
    assert found[0] == pytest.approx((1 + pair + with_alone) / 3)
    assert found[1] == pytest.approx(found[0])
    assert found[3] == min(found) < 0.05


def test_spearman_is_one_for_any_rising_function_and_nothing_for_a_constant():
    values = RNG.random(9).tolist()
    assert spearman(values, np.exp(values).tolist()) == pytest.approx(1)
    assert spearman(values, [-value for value in values]) == pytest.approx(-1)
    assert spearman(values, [1.0] * 9) is None


def test_importance_finds_the_setting_that_matters_and_corrects_for_chance():
    useful, useless = RNG.random(200), RNG.random(200)
    scores = (3 * useful + 0.1 * RNG.standard_normal(200)).tolist()
    assert importance(useful.tolist(), scores) > 0.85  # four groups of equal size: 15/16 at most
    assert importance(useless.tolist(), scores) < 0.05
    mean = np.mean([importance(RNG.random(20).tolist(), RNG.random(20).tolist()) for _ in range(200)])
    assert mean < 0.1  # the share between groups without the correction is 3 / 19


def test_importance_of_categories_is_that_of_the_analysis_of_variance():
    kinds = ["a", "b", "c"] * 20
    scores = RNG.random(60) + np.array([0.0, 0.3, 0.6] * 20)
    f = f_oneway(*(scores[i::3] for i in range(3))).statistic
    between, within = 2, 57
    epsilon = (f - 1) * between / (f * between + within)
    assert importance(kinds, scores.tolist()) == pytest.approx(epsilon)
    assert importance(["a"] * 60, scores.tolist()) == 0


def test_the_mean_cosine_is_that_of_all_pairs():
    x = blobs(0.5)[0][:50]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert mean_cosine(x) == pytest.approx((x @ x.T).mean(), abs=1e-6)
    assert mean_cosine(np.repeat(x[:1], 9, 0)) == pytest.approx(1)
