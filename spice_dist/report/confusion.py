"""How groups and true classes meet, as a table, the best matching on the diagonal."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

MOST_CLASSES = 100  # of a table


@dataclass(frozen=True)
class Confusion:
    classes: list[str]  # columns
    rows: list[tuple[int, list[tuple[int, float]]]]  # cluster, then of each class (images, share of the cluster)


def table(
    labels: Int[np.ndarray, " N"], truth: Int[np.ndarray, " N"], num_clusters: int, names: list[str]
) -> Confusion | None:
    """Count images by cluster and class; None if there are too many for a page. Negative classes are left out."""
    if max(num_clusters, len(names)) > MOST_CLASSES:
        return None
    known = truth >= 0
    counts = np.zeros((num_clusters, len(names)), np.int64)
    np.add.at(counts, (labels[known], truth[known]), 1)
    rows, columns = ordered(counts)
    sums = np.maximum(counts.sum(axis=1), 1)
    cells = [[(int(counts[k, c]), float(counts[k, c] / sums[k])) for c in columns] for k in rows]
    return Confusion([names[c] for c in columns], list(zip(rows, cells, strict=True)))


def ordered(counts: Int[np.ndarray, "K C"]) -> tuple[list[int], list[int]]:
    """Order rows and columns so that the best one-to-one matching is the diagonal; what has no partner comes last."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = (side.tolist() for side in linear_sum_assignment(-counts))
    return rows + _others(rows, counts.shape[0]), columns + _others(columns, counts.shape[1])


def _others(used: list[int], size: int) -> list[int]:
    return sorted(set(range(size)) - set(used))
