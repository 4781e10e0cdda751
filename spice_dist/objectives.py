"""How good a clustering is, without labels, so that clusterings of one sweep can be compared. Arrays in, numbers out.

Every score is computed in one reference feature space that all of them share: indices in different spaces cannot be
compared, since a space that crowds its points flatters whatever is made of it (Schwarz et al. 2024, ACE).
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
SHOWN = ("silhouette", "select_loss")  # beside the others, for comparison: they chose worse, so they may not
COMBINED = "combined"  # the mean place by the scores of RANKED_BY
RANKED_BY = ("generalization", "consensus")  # whose places together choose best, see the README's table
FOLDS = 5
COMPARED = 5_000  # images by which clusterings are compared
SAMPLE = 20_000  # images that a linear classifier is fitted and asked on, at most
RIDGE = 1e-3  # of the mean square of a feature


def generalization(
    reference: Float[np.ndarray, "N D"], clusters: Int[np.ndarray, " N"], num_clusters: int, seed: int = 0
) -> float:
    """How well a linear classifier in the reference space predicts the clusters of images it was not fitted on.

    The share of a cluster's held-out images that are recognised, mean over all K clusters; an empty one counts 0, so
    that putting everything into one cluster gives 1 / K. Gadetsky et al. (2024, TURTLE) choose hyper-parameters by the
    accuracy of such a classifier; theirs is fitted by gradient steps, this one by ridge regression to one-hot labels,
    in closed form, over FOLDS parts of SAMPLE images at most.
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


def consensus(clusterings: Int[np.ndarray, "T N"], seed: int = 0) -> Float[np.ndarray, " T"]:
    """The mean ARI of each clustering with all others: what many settings find is more often there than what one finds.

    On COMPARED images at most. It takes no space of features at all; it is worth little if the trials are all alike.
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
    """Places 1 .. T of T trials, 1 the best; equal ones share the mean of theirs, one without a value is last."""
    from scipy.stats import rankdata

    known = [-np.inf if value is None or not np.isfinite(value) else direction * value for value in values]
    return rankdata(-np.array(known), method="average")


def combined(scores: Sequence[Mapping[str, Any]], names: Sequence[str] = RANKED_BY) -> Float[np.ndarray, " T"]:
    """Minus the mean place of each trial over several objectives: they have no common unit, but places have."""
    places = [ranks([score.get(name) for score in scores], OBJECTIVES[name]) for name in names]
    return -np.mean(places, axis=0)


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Rank correlation of two lists, -1 to 1; None where one of them does not vary, or with fewer than three pairs."""
    from scipy.stats import spearmanr

    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(np.asarray(spearmanr(one, other))[0])


def importance(settings: Sequence[float | str | bool | None], scores: Sequence[float], groups: int = 4) -> float:
    """Share of the scores' variance that one setting explains, 0 to 1: between groups of trials of about equal value.

    Numbers are cut into `groups` of equal size by rank, others are a group for each value. Corrected for chance, as
    groups of random trials differ too: epsilon^2 = 1 - (N - 1) / (N - G) (1 - eta^2), not below 0.
    """
    if not len(scores):
        return 0.0
    y = np.asarray(scores, np.float64)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in settings)
    if numbers and len(set(settings)) > groups:
        place = ranks([float(value) for value in settings if value is not None], -1) - 1
        group = np.minimum((place * groups / len(y)).astype(int), groups - 1)
    else:
        group = np.unique([str(value) for value in settings], return_inverse=True)[1]
    count = len(np.unique(group))
    total = np.square(y - y.mean()).sum()
    if count < 2 or len(y) <= count or total == 0:
        return 0.0
    within = sum(np.square(y[group == g] - y[group == g].mean()).sum() for g in np.unique(group))
    return float(max(0.0, 1 - (len(y) - 1) / (len(y) - count) * within / total))
