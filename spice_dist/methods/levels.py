"""Write coarser and finer groups than the result's clusters, `levels.csv`: joined clusters, and divided ones."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from spice_dist import artifacts, graph
from spice_dist.data.files import publish
from spice_dist.suggest import FEW_PER_CLUSTER, Suggestion, cut, merge_tree
from spice_dist.task import Task

STEPS = 8  # of the random walk on the graph


def write_levels(
    task: Task, run: Path, features: Float[np.ndarray, "M D"], labels: Int[np.ndarray, " M"],
    suggestion: Suggestion | None, num_neighbors: int,
) -> dict[str, Any] | None:  # fmt: skip
    """Write `levels.csv`: the coarse group, the cluster and the fine group of every clustered image.

    Coarse groups join clusters (Ward on their means). Fine groups divide clusters by a finer graph clustering, see
    `divided`. Return the numbers of groups and the tree. If the features suggest no groups, return None and write no
    file.
    """
    path = artifacts.levels_file(run)
    path.unlink(missing_ok=True)
    if suggestion is None or not suggestion.found or task.clusters < 3:
        return None
    tree = merge_tree(features, labels)
    # the suggestion may be another number of clusters than the task's
    coarse = cut(tree, min(suggestion.coarse, 2 * task.clusters // 3))[labels]
    finer = -(-3 * task.clusters // 2)
    count = max(suggestion.fine, finer if FEW_PER_CLUSTER * finer <= len(labels) else 0)
    fine = divided(artifacts.neighbors(run), labels, task.clusters, count, num_neighbors, task.seed)
    rows = [f"{index},{a},{b},{c}" for index, (a, b, c) in enumerate(zip(coarse, labels, fine, strict=True))]
    with publish(path) as file:
        file.write("\n".join(["index,coarse,cluster,fine", *rows, ""]).encode())
    return {
        "coarse": int(coarse.max()) + 1,
        "clusters": task.clusters,
        "fine": int(fine.max()) + 1,
        "tree": tree.tolist(),
    }


def divided(
    neighbors: Int[np.ndarray, "M S"], labels: Int[np.ndarray, " M"], clusters: int, count: int, num_neighbors: int,
    seed: int,
) -> Int[np.ndarray, " M"]:  # fmt: skip
    """Divide clusters by a graph clustering into `count` groups; return the labels unchanged where that is impossible.

    A pair (cluster, finer group) stays if it holds half of the finer group. The others join the largest pair of their
    cluster.
    """
    if count <= clusters or len(neighbors) > graph.landmarks(count):
        return labels
    finer = graph.graph_clusterings(neighbors, count, (num_neighbors,), (STEPS,), seed)[0]
    pairs, index, sizes = np.unique(labels * count + finer, return_inverse=True, return_counts=True)
    stays = sizes >= np.bincount(finer, minlength=count)[pairs % count] / 2
    of_cluster = pairs // count
    order = np.argsort(sizes, kind="stable")
    largest = np.zeros(clusters, np.int64)
    largest[of_cluster[order]] = order  # the last pair of a cluster in this order is its largest
    target = np.where(stays, np.arange(len(pairs)), largest[of_cluster])
    return np.unique(target, return_inverse=True)[1][index]
