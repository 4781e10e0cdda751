"""Score a clustering: against true labels (ACC, NMI, AMI, ARI) and without them. Arrays in, numbers out.

Ids are only names: integers or strings, with gaps, -1 included. There may be more or fewer clusters than classes.
scikit-learn and scipy are imported where they are used, so that this module is imported fast.
"""

import numpy as np
from numpy.typing import ArrayLike


def accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Compute the share of images whose cluster is mapped to their class by the best one-to-one map.

    Images of a cluster without a class (more clusters than classes) count as wrong.
    """
    table, _, _ = _contingency(y_true, y_pred)
    clusters, classes = _assign(table)
    return float(table[clusters, classes].sum() / table.sum())


def match(y_true: ArrayLike, y_pred: ArrayLike) -> dict:
    """Return the map cluster -> class of `accuracy`: min(number of clusters, number of classes) pairs."""
    table, cluster_ids, class_ids = _contingency(y_true, y_pred)
    clusters, classes = _assign(table)
    return dict(zip(cluster_ids[clusters].tolist(), class_ids[classes].tolist(), strict=True))


def scores(y_true: ArrayLike, y_pred: ArrayLike) -> dict[str, float]:
    """Compute ACC, NMI with the arithmetic and the geometric mean (the literature uses either), AMI and ARI."""
    from sklearn import metrics

    acc = accuracy(y_true, y_pred)
    true, pred = _encode(np.asarray(y_true)), _encode(np.asarray(y_pred))
    return {
        "acc": acc,
        "nmi": float(metrics.normalized_mutual_info_score(true, pred, average_method="arithmetic")),
        "nmi_geometric": float(metrics.normalized_mutual_info_score(true, pred, average_method="geometric")),
        "ami": float(metrics.adjusted_mutual_info_score(true, pred)),
        "ari": float(metrics.adjusted_rand_score(true, pred)),
    }


def cluster_sizes(labels: ArrayLike, num_clusters: int) -> np.ndarray:
    """Count the images of clusters 0 .. num_clusters - 1, empty ones included."""
    ids = _ids(labels, "labels")
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be at least 1, not {num_clusters}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"cluster numbers must be integers, not {ids.dtype}")
    if ids.min() < 0 or ids.max() >= num_clusters:
        raise ValueError(f"cluster numbers must lie in 0..{num_clusters - 1}, found {ids.min()}..{ids.max()}")
    return np.bincount(ids, minlength=num_clusters)


def size_entropy(labels: ArrayLike, num_clusters: int) -> float:
    """Divide the entropy of the cluster sizes by log(num_clusters): 1 = equal sizes, 0 = all images in one cluster."""
    sizes = cluster_sizes(labels, num_clusters)
    if num_clusters == 1:
        return 0.0
    share = sizes[sizes > 0] / sizes.sum()
    return float(np.clip(-(share * np.log(share)).sum() / np.log(num_clusters), 0.0, 1.0))


def agreement(labelings: ArrayLike) -> float:
    """Average the ARI over all pairs of the H labelings, shape (H, N): 1 = the same groups, 0 = chance."""
    from sklearn.metrics import adjusted_rand_score

    rows = np.asarray(labelings)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"labelings must have shape (H, N) with H of at least 2, not {rows.shape}")
    encoded = [_encode(_ids(row, "labelings")) for row in rows]
    pairs = [adjusted_rand_score(a, b) for i, a in enumerate(encoded) for b in encoded[:i]]
    return float(np.mean(pairs))


def silhouette(features: ArrayLike, labels: ArrayLike, sample: int = 2000, seed: int = 0) -> float:
    """Average the silhouette by cosine distance of `sample` images at most: 1 = far from others, below 0 = misplaced.

    It is 0 where it is not defined, with one cluster or one image in each: a collapsed clustering has a number too.
    """
    from sklearn.metrics import silhouette_score

    rows, ids = np.asanyarray(features), _ids(labels, "labels")
    if rows.ndim != 2:
        raise ValueError(f"features must have shape (N, D), not {rows.shape}")
    if len(rows) != len(ids):
        raise ValueError(f"{len(rows)} features but {len(ids)} labels")
    if sample < 2:
        raise ValueError(f"sample must be at least 2, not {sample}")
    if len(ids) > sample:
        chosen = np.sort(np.random.default_rng(seed).choice(len(ids), sample, replace=False))
        rows, ids = rows[chosen], ids[chosen]
    rows = np.asarray(rows, dtype=np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("features hold values that are not finite")
    num_clusters = len(np.unique(ids))
    if num_clusters < 2 or num_clusters >= len(ids):
        return 0.0
    return float(silhouette_score(rows, ids, metric="cosine"))


def _ids(values: ArrayLike, name: str) -> np.ndarray:
    ids = np.asarray(values)
    if ids.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {ids.shape}")
    if ids.size == 0:
        raise ValueError(f"{name} is empty")
    if ids.dtype.kind not in "biufUS":
        raise ValueError(f"{name} must hold numbers or strings, not {ids.dtype}")
    if ids.dtype.kind == "f" and not np.isfinite(ids).all():
        raise ValueError(f"{name} holds values that are not finite")
    return ids


def _encode(ids: np.ndarray) -> np.ndarray:
    """Number the ids 0 .. number of distinct ids - 1."""
    return np.unique(ids, return_inverse=True)[1]


def _contingency(y_true: ArrayLike, y_pred: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count images per (cluster, class): (table, cluster ids of the rows, class ids of the columns)."""
    true, pred = _ids(y_true, "y_true"), _ids(y_pred, "y_pred")
    if len(true) != len(pred):
        raise ValueError(f"{len(true)} true labels but {len(pred)} predictions")
    class_ids, classes = np.unique(true, return_inverse=True)
    cluster_ids, clusters = np.unique(pred, return_inverse=True)
    if len(class_ids) * len(cluster_ids) > 2**28:
        raise ValueError(f"{len(class_ids)} classes and {len(cluster_ids)} clusters: one id per image is no clustering")
    cells = np.bincount(clusters * len(class_ids) + classes, minlength=len(cluster_ids) * len(class_ids))
    return cells.reshape(len(cluster_ids), len(class_ids)), cluster_ids, class_ids


def _assign(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(table, maximize=True)
