"""Score the clusterings of a sweep without labels. Arrays in, numbers out.

All scores are computed in one reference feature space. Indices of different spaces cannot be compared, since a space of
crowded points raises the scores of any clustering of it (Schwarz et al. 2024, ACE).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

OBJECTIVES = {  # name: +1 if higher is better, -1 if lower
    "generalization": +1,
    "consensus": +1,
    "agreement": +1,
    "silhouette": +1,
    "select_loss": -1,
}
SHOWN = ("silhouette", "select_loss")  # for comparison only: they chose worse
COMBINED = "combined"  # the mean place by the scores of RANKED_BY
RANKED_BY = ("generalization", "consensus")  # their places together choose best, see the README's table
FOLDS = 5
COMPARED = 5_000  # images by which clusterings are compared
SAMPLE = 20_000  # images, at most, that a linear classifier is fitted to and predicts
GROUPS = 4  # of trials, by the value of a setting
RIDGE = 1e-3  # of the mean square of a feature


def generalization(
    reference: Float[np.ndarray, "N D"], clusters: Int[np.ndarray, " N"], num_clusters: int, seed: int = 0
) -> float:
    """Measure how well a linear classifier in the reference space predicts the clusters of held-out images.

    It is the share of a cluster's images that are predicted right, averaged over all K clusters. An empty cluster
    counts 0, so a single cluster of all images gives 1 / K. Gadetsky et al. (2024, TURTLE) choose hyper-parameters by
    the accuracy of such a classifier, fitted by gradient steps. This one is a ridge regression to one-hot labels in
    closed form, cross-validated in FOLDS parts of SAMPLE images at most.
    """
    order = np.random.default_rng(seed).permutation(len(clusters))[:SAMPLE]
    x = np.column_stack([reference[order].astype(np.float64), np.ones(len(order))])
    labels = clusters[order]
    y = np.eye(num_clusters)[labels]
    folds = np.array_split(np.arange(len(order)), FOLDS)
    squares = np.stack([x[fold].T @ x[fold] for fold in folds])
    products = np.stack([x[fold].T @ y[fold] for fold in folds])
    damping = RIDGE * np.trace(squares.sum(0)) / x.shape[1] * np.eye(x.shape[1])
    predicted = np.empty(len(order), np.int64)
    for number, fold in enumerate(folds):
        others = np.arange(FOLDS) != number
        weights = np.linalg.solve(squares[others].sum(0) + damping, products[others].sum(0))
        predicted[fold] = (x[fold] @ weights).argmax(1)
    sizes = np.bincount(labels, minlength=num_clusters)
    recognised = np.bincount(labels[predicted == labels], minlength=num_clusters)
    return float(np.mean(recognised / np.maximum(sizes, 1)))


def mean_cosine(features: Float[np.ndarray, "N D"]) -> float:
    """Compute the mean cosine of all pairs of rows of unit norm, each with itself among them; 1 where all are equal."""
    return float((features.mean(0, dtype=np.float64) ** 2).sum())


def consensus(clusterings: Int[np.ndarray, "T N"], seed: int = 0) -> Float[np.ndarray, " T"]:
    """Average the ARI of each clustering with all others, on COMPARED images at most.

    Groups that many settings find are more often real than those of one. No features are needed. The score says little
    if all trials are alike.
    """
    from sklearn.metrics import adjusted_rand_score

    chosen = np.random.default_rng(seed).permutation(clusterings.shape[1])[:COMPARED]
    rows = clusterings[:, chosen]
    pairs = np.zeros((len(rows), len(rows)))
    for i in range(len(rows)):
        for j in range(i):
            pairs[i, j] = pairs[j, i] = adjusted_rand_score(rows[i], rows[j])
    return pairs.sum(1) / max(1, len(rows) - 1)


def ranks(values: Sequence[float | None], direction: int) -> Float[np.ndarray, " T"]:
    """Rank T trials 1 .. T, 1 the best; equal trials share their mean place, those without a value are last."""
    from scipy.stats import rankdata

    known = [-np.inf if value is None or not np.isfinite(value) else direction * value for value in values]
    return rankdata(-np.array(known), method="average")


def combined(scores: Sequence[Mapping[str, Any]], names: Sequence[str] = RANKED_BY) -> Float[np.ndarray, " T"]:
    """Return minus the mean place of each trial over several objectives, which have no common unit."""
    places = [ranks([score.get(name) for score in scores], OBJECTIVES[name]) for name in names]
    return -np.mean(places, axis=0)


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Compute the rank correlation of two lists, -1 to 1; None if one is constant or has fewer than three values."""
    from scipy.stats import spearmanr

    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(np.asarray(spearmanr(one, other))[0])


def importance(settings: Sequence[float | str | bool | None], scores: Sequence[float]) -> float:
    """Compute the share of the scores' variance, 0 to 1, between groups of trials with about equal values of a setting.

    Numbers are cut by rank into GROUPS of equal size; other values are a group each. Groups of random trials differ
    too, so the share is corrected for chance: epsilon^2 = 1 - (N - 1) / (N - G) (1 - eta^2), not below 0.
    """
    if not len(scores):
        return 0.0
    y = np.asarray(scores, np.float64)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in settings)
    if numbers and len(set(settings)) > GROUPS:
        place = ranks([float(value) for value in settings if value is not None], -1) - 1
        group = np.minimum((place * GROUPS / len(y)).astype(int), GROUPS - 1)
    else:
        group = np.unique([str(value) for value in settings], return_inverse=True)[1]
    count = len(np.unique(group))
    total = np.square(y - y.mean()).sum()
    if count < 2 or len(y) <= count or total == 0:
        return 0.0
    within = sum(np.square(y[group == g] - y[group == g].mean()).sum() for g in np.unique(group))
    return float(max(0.0, 1 - (len(y) - 1) / (len(y) - count) * within / total))
