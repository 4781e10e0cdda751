"""Suggest the number of groups without labels: K, a range, two other levels, or "no groups found".

For every K, k-means clusters subsamples of the leading principal components, and two scores are computed. The Composite
Silhouette S(K) measures whether clusters are tight and apart; it favours few groups. The modularity Q(K) of the graph
of nearest neighbours measures whether neighbours stay together; it favours many. The score is their weighted geometric
mean, (S Q^2)^(1/3). It is compared with the score of data of the same covariance without groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from spice_dist.errors import UserError
from spice_dist.graph import modularity

DIMENSIONS = 20  # principal components; with 50, distances are mostly noise and the score chose worse
NEIGHBORS = 15  # of an image in the graph
POOL = 20_000  # distinct images that are used, at most
SAMPLE = 2_000  # images of a subsample, at most, unless K asks for more
WARD = 4_000  # images of the tree that k-means starts from, at most
PER_CLUSTER = 20  # images of a subsample for each of the largest K clusters
SUBSAMPLES = 6
NULLS = 8  # draws of structureless data
FIRST = 100  # the largest K of the first scan; it goes on only if the best K is in its upper half
LARGEST = 1_000
GRID = 16  # K's of a scan, evenly spaced on a logarithmic scale
FEWEST = 20  # distinct images
LIFT = 0.3  # noise reaches 0.2, the weakest groups of real images 0.4
PLATEAU = 0.92  # of the best score: a K above it is plausible
STABILITY_IMAGES = 2_000
STABILITY_DRAWS = 20
STABLE = ((0.85, "very stable"), (0.75, "stable"), (0.6, "a pattern"), (0.0, "do not trust"))  # Hennig's words
FEW_PER_CLUSTER = 15
SAME = 4  # decimals of a projection of unit features that copies share


@dataclass(frozen=True)
class Suggestion:
    """The result of `suggest`. Without groups clusters, coarse, fine, low and high are 1 and `stability` is empty.

    `scores`, `errors`, `null`, `silhouettes`, `modularities` and `lifts` have one entry for each of `candidates`.
    """

    found: bool  # False: no groups, by comparison with structureless data, or too few distinct images
    clusters: int  # the suggested K
    coarse: int  # where the silhouette is best, among K of at most two thirds of `clusters`; else `clusters`
    fine: int  # where the modularity is best, among K of at least one and a half times `clusters`; else `clusters`
    low: int  # the range of plausible K: scores of at least PLATEAU times the best
    high: int
    candidates: list[int]  # the K's that were scored, ascending
    scores: list[float]  # (S Q^2)^(1/3), mean over subsamples, 0 to 1
    errors: list[float]  # its standard error
    null: list[float]  # upper 95 % of the score of structureless data
    silhouettes: list[float]  # S, Composite Silhouette, -1 to 1
    modularities: list[float]  # Q, -0.5 to 1
    lifts: list[float]  # 1 - pairs of neighbours that clusters part / pairs parted in structureless data, at most 1
    stability: list[float]  # of each cluster, largest first: mean Jaccard coefficient over subsamples, 0 to 1
    images_per_cluster: float
    notes: list[str] = field(default_factory=list)


def silhouettes(points: Float[np.ndarray, "N D"], labels: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Compute s(i) = (b - a) / max(a, b) by squared Euclidean distance, in float64; 0 for an image alone in a cluster.

    The mean squared distance of x to cluster c is |x - mean_c|^2 + variance_c, so that N K products suffice, without a
    matrix of N x N. Between unit vectors it is twice the cosine distance. There must be two clusters or more.
    """
    _, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    x = points.astype(np.float64)
    x = x - x.mean(0)  # else the difference of large squares is lost to rounding
    squares = np.square(x).sum(1)
    one_hot = np.eye(len(sizes))[labels]
    means = one_hot.T @ x / sizes[:, None]
    mean_squares = one_hot.T @ squares / sizes
    distances = np.maximum(squares[:, None] - 2 * x @ means.T + mean_squares, 0)
    rows = np.arange(len(x))
    own_size = sizes[labels]
    # without the distance to itself
    a = distances[rows, labels] * own_size / np.maximum(own_size - 1, 1)
    distances[rows, labels] = np.inf
    b = distances.min(1)
    return np.where(own_size > 1, (b - a) / np.maximum(np.maximum(a, b), np.finfo(float).tiny), 0.0)


def composite(micro: Float[np.ndarray, " B"], macro: Float[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    """Return the Composite Silhouette of each of B subsamples; S(K) is their mean.

    d_b = micro_b - macro_b, D = max_b |d_b|, w_b = (1 + tanh(d_b / D)) / 2, S_b = w_b micro_b + (1 - w_b) macro_b:
    micro is the mean silhouette of images and macro the mean of the clusters' means.
    """
    difference = micro - macro
    largest = np.abs(difference).max()
    weight = (1 + np.tanh(difference / largest)) / 2 if largest > 0 else 0.5
    return weight * micro + (1 - weight) * macro


def structureless(points: Float[np.ndarray, "N D"], rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
    """Draw data without groups, with the covariance of `points`, whose columns must be uncorrelated.

    Directions are uniform and lengths are those of the whitened points, shuffled: a Gaussian with the tails of the
    data. M3C (John et al. 2020) draws a Gaussian, which heavy tails alone exceed.
    """
    scale = points.std(0)
    lengths = np.linalg.norm((points - points.mean(0)) / np.where(scale > 0, scale, 1), axis=1)
    directions = rng.standard_normal(points.shape)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return (directions * rng.permutation(lengths)[:, None] * scale).astype(points.dtype)


def suggest(
    features: Float[np.ndarray, "N D"],
    seed: int = 0,
    largest: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Suggestion:
    """Suggest the number of groups among N images from their features; these are scaled to unit norm here.

    K goes from 2 to a tenth of the distinct images, at most `largest` or LARGEST. Copies count once. Groups are found
    if the score at the suggested K is above that of structureless data, and clusters part fewer neighbours than there,
    by LIFT or more. `progress` gets subsamples (done, total); total grows if the scan has to go on to larger K.
    UserError if a feature is not finite, or `largest` below 2.
    """
    if largest is not None and largest < 2:
        raise UserError(f"the largest number of clusters is {largest}; it must be at least 2")
    chunks = np.array_split(features, len(features) // 10_000 + 1)
    bad = sum(int((~np.isfinite(chunk).all(1)).sum()) for chunk in chunks)
    if bad:
        raise UserError(f"features of {bad} of {len(features)} images are not finite; leave these images out")
    rng = np.random.default_rng(seed)
    points, distinct = _points(features, rng)
    if len(points) < FEWEST:
        note = f"only {distinct} distinct images: no groups can be told apart below {FEWEST}"
        return Suggestion(False, 1, 1, 1, 1, 1, [], [], [], [], [], [], [], [], float(distinct), [note])
    limit = min(distinct // 10, len(points) // 10, LARGEST if largest is None else largest)
    top, done = min(limit, FIRST), 0

    def after(done: int, left: int) -> Callable[[int], None]:
        return lambda count: progress(done + count, done + left)

    while True:
        size = min(int(0.8 * len(points)), max(SAMPLE, PER_CLUSTER * top))
        views = [points[rng.permutation(len(points))[:size]] for _ in range(SUBSAMPLES)]
        scan = _Scan(views, after(done, 2 * SUBSAMPLES + NULLS))
        scan.add(_grid(top))
        done += SUBSAMPLES
        if scan.best() <= top / 2 or top == limit:
            break
        top = min(limit, 4 * top)
    scan.progress = after(done, SUBSAMPLES + NULLS)
    scan.add(_around(scan.best(), top))
    null = _Scan([structureless(points, rng)[:size] for _ in range(NULLS)], after(done + SUBSAMPLES, NULLS))
    null.add([*_grid(top), scan.best()])
    return _suggestion(scan, null, points, distinct, seed)


def merge_tree(
    features: Float[np.ndarray, "N D"], clusters: Int[np.ndarray, " N"], num_clusters: int | None = None
) -> Float[np.ndarray, "K_minus_1 4"]:
    """Return Ward's tree of K clusters in scipy's format: (one, other, height, number of clusters in both) per merger.

    height^2 = 2 n_a n_b / (n_a + n_b) |mean_a - mean_b|^2, twice what the merger adds to the sum of squares within
    clusters; where each cluster is one image, it is scipy's Ward linkage. An empty cluster is merged first, at height
    0. K is `num_clusters`, or the largest label + 1.
    """
    count = int(clusters.max()) + 1 if num_clusters is None else num_clusters
    mass = np.zeros(2 * count - 1)
    mass[:count] = np.bincount(clusters, minlength=count)
    sums = np.zeros((2 * count - 1, features.shape[1]))
    np.add.at(sums, clusters, features.astype(np.float64))
    means = sums / np.maximum(mass, 1)[:, None]
    leaves = np.ones(2 * count - 1)
    cost = np.full((2 * count - 1, 2 * count - 1), np.inf)
    tree = np.empty((count - 1, 4))
    alive: list[int] = []

    def join(node: int) -> None:
        squares = np.square(means[alive] - means[node]).sum(1)
        weight = mass[alive] * mass[node] / np.maximum(mass[alive] + mass[node], 1)
        cost[alive, node] = cost[node, alive] = 2 * weight * squares
        alive.append(node)

    for leaf in range(count):
        join(leaf)
    for step in range(count - 1):
        costs = cost[np.ix_(alive, alive)]
        i, j = sorted(divmod(int(costs.argmin()), len(alive)))
        one, other, node = alive[i], alive[j], count + step
        tree[step] = one, other, np.sqrt(cost[one, other]), leaves[one] + leaves[other]
        mass[node], leaves[node] = mass[one] + mass[other], leaves[one] + leaves[other]
        means[node] = (mass[one] * means[one] + mass[other] * means[other]) / max(mass[node], 1)
        alive.remove(one)
        alive.remove(other)
        join(node)
    return tree


def cut(tree: Float[np.ndarray, "K_minus_1 4"], num_clusters: int) -> Int[np.ndarray, " K"]:
    """Return the group of each of K clusters when `tree` is cut to `num_clusters`, numbered as they first appear.

    ValueError unless `num_clusters` is in 1 .. K.
    """
    count = len(tree) + 1
    if not 1 <= num_clusters <= count:
        raise ValueError(f"a tree of {count} clusters cannot be cut to {num_clusters}")
    group = np.arange(2 * count - 1)
    for step in range(count - num_clusters):
        members = np.isin(group, group[tree[step, :2].astype(int)])
        members[count + step] = True
        group[members] = count + step
    _, first, inverse = np.unique(group[:count], return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse]


def describe(suggestion: Suggestion) -> str:
    """Format the curve as bars, the suggestion with its range and two other levels, stability and notes."""
    lines = []
    if suggestion.candidates:
        lines.append("    K  score  (+-)   null  # score, | structureless data")
        longest = max(*suggestion.scores, *suggestion.null, 1e-9)
        curve = zip(suggestion.candidates, suggestion.scores, suggestion.errors, suggestion.null, strict=True)
        for k, score, error, null in curve:
            bar = list("#" * round(40 * max(score, 0) / longest)) + [" "] * 41
            bar[round(40 * max(null, 0) / longest)] = "|"
            mark = " <" if suggestion.found and k == suggestion.clusters else ""
            lines.append(f"{k:5d}  {score:.3f} {error:.3f}  {null:.3f}  {''.join(bar[:41]).rstrip()}{mark}")
    if suggestion.found:
        lines.append(
            f"suggested: {suggestion.clusters} groups (plausible: {suggestion.low} to {suggestion.high}; "
            f"coarser: {suggestion.coarse}, finer: {suggestion.fine}), "
            f"about {suggestion.images_per_cluster:.0f} images in each"
        )
        words = [next(word for least, word in STABLE if value >= least) for value in suggestion.stability]
        counts = [f"{words.count(word)} {word}" for _, word in STABLE if word in words]
        lines.append(f"stability of the {suggestion.clusters} groups: {', '.join(counts)}")
    else:
        lines.append("no groups found")
    return "\n".join([*lines, *(f"note: {note}" for note in suggestion.notes)])


class _Scan:
    """Scores of all K on the same subsamples, so that they differ by K and not by images."""

    def __init__(self, views: Sequence[Float[np.ndarray, "M D"]], progress: Callable[[int], None]):
        self.views = views
        self.progress = progress
        self.neighbors = [_neighbors(view) for view in views]
        self.trees = [_ward(view) for view in views]
        self.rows: dict[int, Float[np.ndarray, "B 4"]] = {}  # micro, macro, agreement, modularity

    def add(self, candidates: Sequence[int]) -> None:
        new = [k for k in sorted(set(candidates)) if k not in self.rows]
        values = {k: np.empty((len(self.views), 4)) for k in new}
        for b, (view, neighbors, tree) in enumerate(zip(self.views, self.neighbors, self.trees, strict=True)):
            for k in new:
                labels = _kmeans(view, tree, k)
                s = silhouettes(view, labels)
                sizes = np.bincount(labels)
                macro = (np.bincount(labels, s)[sizes > 0] / sizes[sizes > 0]).mean()
                values[k][b] = s.mean(), macro, *modularity(neighbors, labels)
            self.progress(b + 1)
        self.rows.update(values)

    def silhouette(self, k: int) -> Float[np.ndarray, " B"]:
        return composite(self.rows[k][:, 0], self.rows[k][:, 1])

    def score(self, k: int) -> Float[np.ndarray, " B"]:
        return np.cbrt(np.maximum(self.silhouette(k), 0) * np.square(np.maximum(self.rows[k][:, 3], 0)))

    def best(self) -> int:
        return max(self.rows, key=lambda k: (self.score(k).mean(), -k))


def _suggestion(scan: _Scan, null: _Scan, points: Float[np.ndarray, "N D"], distinct: int, seed: int) -> Suggestion:
    ks, best = sorted(scan.rows), scan.best()
    place = ks.index(best)
    scores = np.array([scan.score(k).mean() for k in ks])
    errors = np.array([scan.score(k).std(ddof=1) for k in ks]) / np.sqrt(SUBSAMPLES)
    known = np.log(sorted(null.rows))
    draws = [null.score(k) for k in sorted(null.rows)]
    upper = np.interp(np.log(ks), known, [draw.mean() + 1.645 * draw.std(ddof=1) for draw in draws])
    parted = np.interp(np.log(ks), known, [1 - null.rows[k][:, 2].mean() for k in sorted(null.rows)])
    lifts = 1 - np.array([1 - scan.rows[k][:, 2].mean() for k in ks]) / np.maximum(parted, 1e-9)
    s = np.array([scan.silhouette(k).mean() for k in ks])
    q = np.array([scan.rows[k][:, 3].mean() for k in ks])
    has_groups = bool(scores[place] > upper[place] and lifts[place] >= LIFT)
    plausible = [k for k, score in zip(ks, scores, strict=True) if score >= PLATEAU * scores[place]]
    coarse = max((k for k in ks if 3 * k <= 2 * best), key=lambda k: s[ks.index(k)], default=best)
    fine = max((k for k in ks if 2 * k >= 3 * best), key=lambda k: q[ks.index(k)], default=best)
    levels = (best, coarse, fine, min(plausible), max(plausible)) if has_groups else (1, 1, 1, 1, 1)
    curves = [curve.tolist() for curve in (scores, errors, upper, s, q, lifts)]
    stability = _stability(points, best, seed) if has_groups else []
    result = Suggestion(has_groups, *levels, ks, *curves, stability=stability, images_per_cluster=distinct / levels[0])
    result.notes.extend(_notes(result))
    return result


def _notes(result: Suggestion) -> list[str]:
    if not result.found:
        return ["neighbours stay together hardly more than in data without groups of the same spread"]
    notes = []
    if result.images_per_cluster < FEW_PER_CLUSTER:
        notes.append(f"only {result.images_per_cluster:.0f} images per cluster: finer groups cannot be told apart")
    weak = sum(value < STABLE[2][0] for value in result.stability)
    if weak:
        notes.append(f"{weak} of {result.clusters} groups change when a fifth of the images is left out")
    if result.high == result.candidates[-1]:
        notes.append(f"the score is still high at {result.high}, the largest K tried: there may be more groups")
    return notes


def _stability(points: Float[np.ndarray, "N D"], k: int, seed: int) -> list[float]:
    """Return each cluster's mean best Jaccard coefficient on 80 % of the images (Hennig 2007), largest first."""
    points = points[: max(STABILITY_IMAGES, PER_CLUSTER * k)]
    whole = _kmeans(points, _ward(points), k)
    rng = np.random.default_rng(seed)
    jaccard = np.zeros(k)
    for _ in range(STABILITY_DRAWS):
        chosen = rng.permutation(len(points))[: int(0.8 * len(points))]
        again = _kmeans(points[chosen], _ward(points[chosen]), k)
        common = np.bincount(whole[chosen] * k + again, minlength=k * k).reshape(k, k)
        union = common.sum(1, keepdims=True) + common.sum(0) - common
        jaccard += (common / np.maximum(union, 1)).max(1)
    return (jaccard[np.argsort(-np.bincount(whole, minlength=k), kind="stable")] / STABILITY_DRAWS).tolist()


def _points(features: Float[np.ndarray, "N D"], rng: np.random.Generator) -> tuple[Float[np.ndarray, "M P"], int]:
    """Return principal components of at most POOL distinct images in random order, and the number of distinct images.

    Rows count as equal if a few rounded random projections are: rounding hides the effect of other batch sizes.
    """
    from sklearn.decomposition import PCA

    order = rng.permutation(len(features))
    directions = _unit(rng.standard_normal((6, features.shape[1]))).T
    chunks = np.array_split(order, len(order) // 10_000 + 1)
    keys = np.concatenate([np.round(_unit(features[rows]) @ directions, SAME) for rows in chunks])
    first = np.sort(np.unique(keys + 0.0, axis=0, return_index=True)[1])  # + 0: -0 is 0
    x = _unit(features[order[first[:POOL]]])
    if len(x) < FEWEST:
        return x, len(first)
    count = min(DIMENSIONS, x.shape[1], len(x) - 1)
    return PCA(count, svd_solver="randomized", random_state=0).fit_transform(x), len(first)


def _unit(rows: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "M D"]:
    x = rows.astype(np.float64)
    x /= np.maximum(np.abs(x).max(1, keepdims=True), np.finfo(float).tiny)  # the square of a large number is inf
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)).astype(np.float32)


def _ward(points: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "W_minus_1 4"]:
    """Return Ward's tree of at most WARD points, from which k-means starts for every K."""
    from scipy.cluster.hierarchy import linkage

    tree = linkage(points[:WARD].astype(np.float64), "ward")
    tree[:, 2] = np.arange(len(tree))  # distinct heights in the order of mergers: a cut takes equal heights at once
    return tree


def _kmeans(points: Float[np.ndarray, "M D"], tree: Float[np.ndarray, "W_minus_1 4"], k: int) -> Int[np.ndarray, " M"]:
    """Run k-means from the means of Ward's k clusters: random starts often miss one of 25 groups, and K is one off."""
    from scipy.cluster.hierarchy import fcluster
    from sklearn.cluster import KMeans

    groups = fcluster(tree, k, "maxclust") - 1
    sums = np.zeros((k, points.shape[1]))
    np.add.at(sums, groups, points[: len(groups)])
    start: Any = (sums / np.bincount(groups, minlength=k)[:, None]).astype(points.dtype)
    return KMeans(k, init=start, max_iter=50).fit_predict(points)


def _neighbors(points: Float[np.ndarray, "M D"]) -> Int[np.ndarray, "M k"]:
    """Return the nearest others of each point: NEIGHBORS, or fewer of few points, whose groups are small."""
    from sklearn.neighbors import NearestNeighbors

    count = min(NEIGHBORS, max(3, len(points) // 20))
    return NearestNeighbors(n_neighbors=count).fit(points).kneighbors(return_distance=False)


def _grid(top: int) -> list[int]:
    return np.unique(np.round(np.geomspace(2, max(top, 2), GRID)).astype(int)).tolist()


def _around(best: int, top: int) -> list[int]:
    """Return the K's within a third of the best: all, or evenly spaced ones, and those next to it."""
    near = np.linspace(best / 1.35, best * 1.35, GRID).round().astype(int).tolist()
    return [k for k in {*near, best - 1, best + 1} if 2 <= k <= top]
