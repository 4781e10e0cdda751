"""Cluster the graph of nearest neighbours, and average several clusterings. Arrays in, arrays out.

Images that a chain of close neighbours joins belong together, even where no center is near both: a random walk over the
graph stays inside a group for long. N = images, K = clusters, k = neighbours of each, S = neighbours known of each.

Memory in bytes: the graph 24 N k, the map 8 N (m + 20) for m = DIMENSIONS K coordinates. Time: N k (m + 20) operations
a round of the eigensolver, some tens of rounds; k-means N K m a round. If there are more images than `landmarks`, the
map is computed of a random sample of that size, and the others take the mean of their nearest landmarks.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse import linalg

LANDMARKS, LANDMARKS_OF_CLUSTER = 20_000, 50  # at least; see `landmarks`
DIMENSIONS = 3  # coordinates of the map for each cluster
DENSE = 400  # images up to which all eigenvectors are computed: the iterative solver needs spare ones


def landmarks(clusters: int) -> int:
    """Return the largest number of images that are clustered themselves; of more images a sample of it is."""
    return max(LANDMARKS, LANDMARKS_OF_CLUSTER * clusters)


def neighbor_graph(neighbors: Int[np.ndarray, "N S"], count: int) -> sparse.csr_array:
    """Weigh edges, (N, N): 1 between images among each other's `count` nearest, 1/2 if one is among the other's."""
    images, count = len(neighbors), min(count, neighbors.shape[1])
    rows = np.repeat(np.arange(images, dtype=np.int32), count)
    columns = neighbors[:, :count].ravel()
    directed = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(images, images))
    return sparse.csr_array((directed + directed.T) / 2)


def diffusion_map(
    graph: sparse.csr_array, dimensions: int, seed: int = 0
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, "N m"]]:
    """Compute (eigenvalues, coordinates) of the random walk P = D^-1 W, largest first, without the constant one.

    Coifman and Lafon 2006: after t steps two images are as far apart as the rows of coordinates times eigenvalues^t.
    A graph in pieces has several eigenvalues 1, whose coordinates tell the pieces apart.
    """
    degree = np.maximum(np.asarray(graph.sum(1)).ravel(), 1e-12)
    scale = sparse.diags_array(1 / np.sqrt(degree))
    walk = sparse.csr_array(scale @ graph @ scale)
    # the constant vector's eigenvalue 1 becomes -1, the least: a graph in pieces has other vectors of eigenvalue 1
    constant = np.sqrt(degree / degree.sum())
    wanted = min(dimensions, len(degree) - 1)
    if len(degree) <= max(DENSE, 3 * wanted):
        values, vectors = np.linalg.eigh(walk.toarray() - 2 * np.outer(constant, constant))
    else:
        without = linalg.aslinearoperator(walk) + linalg.aslinearoperator(
            -2 * constant[:, None]
        ) * linalg.aslinearoperator(constant[None])
        start = np.random.default_rng(seed).random(len(degree))
        pairs = linalg.eigsh(without, wanted, which="LA", v0=start, tol=1e-4)  # pyright: ignore[reportArgumentType]
        assert isinstance(pairs, tuple), "scipy gives both where it is not asked for values alone"
        values, vectors = pairs
    order = np.argsort(-values)[:wanted]
    return values[order], vectors[:, order] / np.sqrt(degree)[:, None]


def modularity(neighbors: Int[np.ndarray, "N k"], labels: Int[np.ndarray, " N"]) -> tuple[float, float]:
    """Compute agreement e and modularity Q = e - sum_c a_c^2 of clusters in the graph of nearest neighbours.

    e is the share of edges within clusters, a_c the share of all ends of edges that lie in cluster c (Newman and Girvan
    2004). Each image has an edge to each of its k neighbours; an edge that both its ends have counts twice.
    """
    count = int(labels.max()) + 1
    others = labels[neighbors]
    agreement = float(np.mean(others == labels[:, None]))
    ends = np.bincount(labels, minlength=count) * neighbors.shape[1] + np.bincount(others.ravel(), minlength=count)
    return agreement, agreement - float(np.square(ends / ends.sum()).sum())


def walked(
    values: Float[np.ndarray, " m"], coordinates: Float[np.ndarray, "N m"], steps: int
) -> Float[np.ndarray, "N m"]:
    """Return unit rows of the map after `steps`: directions tell groups apart, lengths how central an image is."""
    moved = coordinates * np.maximum(values, 0) ** steps
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)


def kmeans(points: Float[np.ndarray, "N D"], clusters: int, seed: int, starts: int = 2) -> Int[np.ndarray, " N"]:
    """Return the labels of the best of several starts of k-means; fewer clusters where fewer points differ.

    A consensus gains from members that differ: two starts gave half a point of NMI more than ten.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # raised for fewer distinct points than clusters
        return KMeans(clusters, n_init=starts, random_state=seed).fit_predict(points)  # pyright: ignore


def graph_clusterings(
    neighbors: Int[np.ndarray, "N S"],
    clusters: int,
    counts: Sequence[int],
    steps: Sequence[int],
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Int[np.ndarray, "T N"]:
    """Cluster once for each number of neighbours and each length of the walk: k-means of the diffusion map.

    A walk of 0 steps uses the K - 1 leading coordinates alone: the spectral clustering of Ng, Jordan and Weiss.
    """
    clusterings = []
    for count in counts:
        values, coordinates = diffusion_map(neighbor_graph(neighbors, count), DIMENSIONS * clusters, seed)
        for length in steps:
            leading = coordinates if length else coordinates[:, : clusters - 1]
            points = walked(values[: leading.shape[1]], leading, length)
            clusterings.append(kmeans(points, clusters, seed * 1000 + len(clusterings)))
            progress(len(clusterings), len(counts) * len(steps))
    return np.stack(clusterings)


def matched(reference: Int[np.ndarray, " N"], labels: Int[np.ndarray, " N"], clusters: int) -> Int[np.ndarray, " K"]:
    """Match each cluster of `labels` with one of `reference`, one to one, with the most images in common."""
    from scipy.optimize import linear_sum_assignment

    shared = np.zeros((clusters, clusters), np.int64)
    np.add.at(shared, (labels, reference), 1)
    return linear_sum_assignment(-shared)[1]


def numbered_as(earlier: Int[np.ndarray, " N"], labels: Int[np.ndarray, " N"], clusters: int) -> Int[np.ndarray, " K"]:
    """Return a number for each cluster of `labels`: of that of `earlier` with which it has most images in common.

    Args:
        earlier: below 0 where an image has no cluster. Clusters beyond theirs get the next numbers.
    """
    known = earlier >= 0
    return matched(earlier[known], labels[known], clusters)


def consensus(
    probs: Float[np.ndarray, "T N K"], rounds: int = 3, seed: int = 0
) -> tuple[Float[np.ndarray, "N K"], Float[np.ndarray, " N"]]:
    """Average clusterings after matching their clusters: (mean, the share of them that agree with it).

    The first reference is the clustering that agrees best with all others; then the mean itself is the reference.
    """
    from spice_dist.objectives import consensus as mean_agreement

    labels, clusters = probs.argmax(2), probs.shape[2]
    reference = labels[int(mean_agreement(labels, seed).argmax())]
    mean = votes = probs[0]
    for _ in range(rounds):
        mean, votes = np.zeros(probs.shape[1:]), np.zeros(probs.shape[1:])
        for member, member_labels in zip(probs, labels, strict=True):
            to = matched(reference, member_labels, clusters)
            mean[:, to] += member / len(probs)
            votes[np.arange(len(member_labels)), to[member_labels]] += 1 / len(probs)
        reference = mean.argmax(1)
    return mean, votes[np.arange(len(reference)), reference]


def spread(
    probs: Float[np.ndarray, "N K"], neighbors: Int[np.ndarray, "N S"], share: float = 0.5, rounds: int = 3
) -> Float[np.ndarray, "N K"]:
    """Spread labels (Zhou et al. 2004): p <- (1 - share) probs + share (mean of p over the neighbours)."""
    spread_probs = probs
    for _ in range(rounds):
        spread_probs = (1 - share) * probs + share * neighbor_mean(spread_probs, neighbors)
    return spread_probs


def neighbor_mean(probs: Float[np.ndarray, "N K"], neighbors: Int[np.ndarray, "M S"]) -> Float[np.ndarray, "M K"]:
    """Average each image's neighbours, one neighbour at a time: never N x S x K numbers."""
    total = np.zeros((len(neighbors), probs.shape[1]), probs.dtype)
    for column in neighbors.T:
        total += probs[column]
    return total / neighbors.shape[1]


def with_sizes(
    probs: Float[np.ndarray, "N K"], sizes: Float[np.ndarray, " K"], rounds: int = 30
) -> Float[np.ndarray, "N K"]:
    """Find the probabilities nearest to these in relative entropy whose mean over images is `sizes`, by Sinkhorn.

    `sizes` sum to one. Rows of the result sum to one exactly, its columns to `sizes` up to convergence.
    """
    floor = np.maximum(probs, 1e-9)
    columns = np.ones(probs.shape[1])
    for _ in range(rounds):
        rows = 1 / (floor @ columns)
        columns = sizes / np.maximum((floor.T @ rows) / len(floor), 1e-12)
    scaled = floor * columns
    return scaled / scaled.sum(1, keepdims=True)
