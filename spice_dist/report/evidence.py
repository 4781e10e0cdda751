"""What speaks for and against each group: second choices, neighbours, and what other groupings of the images say."""

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from spice_dist import artifacts
from spice_dist.data.checksums import require_whole
from spice_dist.report.gallery import blocks
from spice_dist.report.reading import Run

MAX_IMAGES = 20_000  # on a page; of more a sample
CANDIDATES = 5  # most likely clusters kept of an image
REACH = 12  # neighbours kept of an image
MAX_SEARCHED = 10_000  # images among which neighbours are searched where the run kept none: N^2 products
MAX_OUTLIERS = 200
MAX_COPIES = 200  # groups


@dataclass(frozen=True)
class Evidence:
    """Facts about the S images of the page, which are numbered by their place in `shown`, and about all K clusters."""

    shown: Int[np.ndarray, " S"]  # indices in the run: by cluster, the most typical first
    candidates: Int[np.ndarray, "S T"]  # clusters, most likely first
    weights: Float[np.ndarray, "S T"]
    weights_are: str  # what these weights are
    neighbors: Int[np.ndarray, "S R"] | None  # places, nearest first; -1: not on the page
    crossing: Float[np.ndarray, "K K"] | None  # share of the neighbours of cluster a's images that are in cluster b
    stability: Float[np.ndarray, " K"] | None
    outliers: list[tuple[int, float]]  # (index in the run, distance), most unusual first
    outliers_measured: bool  # by distances to neighbours; else by the likeness to the nearest center
    copies: list[list[dict[str, str]]]  # rows of duplicates.csv by group

    @property
    def cohesion(self) -> Float[np.ndarray, " K"] | None:
        """Return the share of neighbours that are in the same cluster."""
        return None if self.crossing is None else np.diag(self.crossing)

    @cached_property
    def next(self) -> list[int | None]:
        """Return the cluster that most images of each cluster would be in else; None where nothing says."""
        num_clusters = 0 if self.crossing is None else len(self.crossing)
        return [self._next(k) for k in range(num_clusters)]

    def _next(self, cluster: int) -> int | None:
        assert self.crossing is not None
        others = self.crossing[cluster].copy()
        others[cluster] = 0
        return int(others.argmax()) if others.any() else None


def gather(
    run: Run,
    typical: Float[np.ndarray, " N"],
    centers: Float[np.ndarray, "K D"] | None,
    wanted: Int[np.ndarray, " W"],
) -> Evidence:
    """Gather the evidence of a run.

    Args:
        typical: how typical each image is of its cluster.
        wanted: indices of images that must be on the page.
    """
    outliers, measured = _outliers(run, typical)
    copies = read_copies(artifacts.duplicates_file(run.folder))
    marked = [index for index, _ in outliers] + [int(row["index"]) for group in copies for row in group]
    wanted = np.concatenate([wanted, np.array([i for i in marked if i < len(run.labels)], dtype=np.int64)])
    shown = choose(run.labels, typical, wanted)
    candidates, weights, meaning = second_choices(run, centers, shown)
    neighbors = find_neighbors(run, shown)
    return Evidence(
        shown=shown,
        candidates=candidates,
        weights=weights,
        weights_are=meaning,
        neighbors=neighbors,
        crossing=None if neighbors is None else crossing(run.labels[shown], neighbors, run.num_clusters),
        stability=stability(run),
        outliers=outliers,
        outliers_measured=measured,
        copies=copies,
    )


def choose(
    labels: Int[np.ndarray, " N"], typical: Float[np.ndarray, " N"], wanted: Int[np.ndarray, " W"]
) -> Int[np.ndarray, " S"]:
    """Choose the images of the page: all, or `wanted` and a random sample; by cluster, the most typical first."""
    shown = np.arange(len(labels))
    if len(labels) > MAX_IMAGES:
        rest = np.setdiff1d(shown, wanted)
        count = max(0, MAX_IMAGES - len(labels) + len(rest))
        shown = np.union1d(wanted, np.random.default_rng(0).choice(rest, min(count, len(rest)), replace=False))
    return shown[np.lexsort((shown, -typical[shown], labels[shown]))]


def second_choices(
    run: Run, centers: Float[np.ndarray, "K D"] | None, shown: Int[np.ndarray, " S"]
) -> tuple[Int[np.ndarray, "S T"], Float[np.ndarray, "S T"], str]:
    """Return the most likely clusters of each image with their weights, and what the weights are.

    The probabilities are taken where they are of these clusters; a run whose result is another grouping has others.
    """
    posterior = _posterior(run)
    if posterior is not None:
        return *_largest(np.asarray(posterior[shown], dtype=np.float32)), "Probabilities"
    if run.features is not None and centers is not None:
        cosines = [np.asarray(run.features[shown[b]], dtype=np.float32) @ centers.T for b in blocks(len(shown))]
        return *_largest(np.concatenate(cosines).clip(0, 1)), "Likeness to the centers of clusters (cosine)"
    return run.labels[shown, None], run.confidence[shown, None].clip(0, 1), "Confidence"


def _posterior(run: Run) -> Float[np.ndarray, "N K"] | None:
    try:
        posterior = artifacts.posterior(run.folder)
    except (OSError, ValueError, EOFError):
        return None
    if posterior.shape != (len(run.labels), run.num_clusters):
        return None
    same = np.concatenate([np.argmax(posterior[b], axis=1) == run.labels[b] for b in blocks(len(run.labels))])
    return posterior if same.mean() > 0.99 else None


def _largest(values: Float[np.ndarray, "S K"]) -> tuple[Int[np.ndarray, "S T"], Float[np.ndarray, "S T"]]:
    order = np.argsort(-values, axis=1, kind="stable")[:, :CANDIDATES]
    return order, np.take_along_axis(values, order, axis=1)


def find_neighbors(run: Run, shown: Int[np.ndarray, " S"]) -> Int[np.ndarray, "S R"] | None:
    """Return the places of each image's nearest neighbours: those that the run kept, else searched on the page."""
    kept = _kept_neighbors(run)
    if kept is None:
        return _searched_neighbors(run, shown)
    place = np.full(len(run.labels), -1)
    place[shown] = np.arange(len(shown))
    known = shown < len(kept)  # images that only train or are held out have none
    found = np.full((len(shown), min(REACH, kept.shape[1])), -1)
    found[known] = place[kept[shown[known], : found.shape[1]]]
    return found


def _kept_neighbors(run: Run) -> Int[np.ndarray, "M R"] | None:
    try:
        kept = artifacts.neighbors(run.folder)
    except (OSError, ValueError, EOFError):
        return None
    fits = kept.ndim == 2 and kept.dtype.kind == "i" and kept.size and len(kept) <= len(run.labels)
    return kept if fits and kept.min() >= 0 and kept.max() < len(run.labels) else None


def _searched_neighbors(run: Run, shown: Int[np.ndarray, " S"]) -> Int[np.ndarray, "S R"] | None:
    if run.features is None or not 2 <= len(shown) <= MAX_SEARCHED:
        return None
    import torch

    from spice_dist.neighbors import search

    features = torch.from_numpy(np.asarray(run.features[shown], dtype=np.float32))
    _, found = search(features, features, min(REACH, len(shown) - 1), skip=torch.arange(len(shown)))
    return found.numpy()


def crossing(
    labels: Int[np.ndarray, " S"], neighbors: Int[np.ndarray, "S R"], num_clusters: int
) -> Float[np.ndarray, "K K"]:
    """Return the share of the known neighbours of cluster a's images that are in cluster b; 0 for an empty cluster."""
    known = neighbors >= 0
    pairs = np.zeros((num_clusters, num_clusters))
    np.add.at(pairs, (np.repeat(labels, known.sum(axis=1)), labels[neighbors[known]]), 1)
    return pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)


def stability(run: Run) -> Float[np.ndarray, " K"] | None:
    """Return how well each cluster is found again in the clusterings that the result was made from.

    It is the mean over these of the largest Jaccard index with any of their clusters; None where there are none.
    """
    try:
        others = artifacts.graph_starts(run.folder)
    except (OSError, ValueError, EOFError):
        return None
    if others.ndim != 2 or others.shape[1] != len(run.labels) or others.dtype.kind != "i" or others.min(initial=0) < 0:
        return None
    return np.mean([best_overlap(run.labels, other, run.num_clusters) for other in others], axis=0)


def best_overlap(
    labels: Int[np.ndarray, " N"], other: Int[np.ndarray, " N"], num_clusters: int
) -> Float[np.ndarray, " K"]:
    """Return each cluster's largest Jaccard index with a cluster of `other`."""
    table = np.zeros((num_clusters, int(other.max()) + 1))
    np.add.at(table, (labels, other), 1)
    union = table.sum(axis=1, keepdims=True) + table.sum(axis=0) - table
    return (table / np.maximum(union, 1)).max(axis=1)


def _outliers(run: Run, typical: Float[np.ndarray, " N"]) -> tuple[list[tuple[int, float]], bool]:
    path = artifacts.outliers_file(run.folder)
    rows = _rows(path, len(run.labels), ("index", "distance"))
    if rows:
        return [(int(row["index"]), _number(row["distance"])) for row in rows[:MAX_OUTLIERS]], True
    if run.features is None:
        return [], False
    least = np.argsort(typical, kind="stable")[: min(24, len(typical) // 20)]
    return [(int(i), 1 - float(typical[i])) for i in least], False


def read_copies(path: Path) -> list[list[dict[str, str]]]:
    """Read the groups of duplicates.csv, the best copy of each first."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in _rows(path, 1 << 62, ("group", "index", "kind", "best")):
        groups.setdefault(row["group"], []).append(row)
    return [sorted(group, key=lambda row: row["best"] != "1") for group in list(groups.values())[:MAX_COPIES]]


def _rows(path: Path, num_images: int, names: tuple[str, ...]) -> list[dict[str, str]]:
    """Read a table that names images by index; rows that do not are left out."""
    try:
        with require_whole(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = [row for row in csv.DictReader(file) if all(isinstance(row.get(name), str) for name in names)]
    except (OSError, csv.Error):
        return []
    return [row for row in rows if row["index"].isdecimal() and int(row["index"]) < num_images]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
