"""Groupings of the same features: k-means, UMAP and k-means, spectral clustering, and stage 2 on the neighbour graph.

    python -m tests.bench.bench_graph RUN ... [--seeds 0 1 2]

RUN is a run of `fit FOLDER --labels folder` whose features are there, such as one that `bench_photos` left. K is the
number of classes. UMAP is left out where umap-learn is not installed. Labels only score.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans, SpectralClustering

from spice_dist import artifacts, metrics
from spice_dist.distributed.worker import LocalWorker
from spice_dist.methods import spice_graph
from spice_dist.task import Task

Grouping = Callable[[Path, np.ndarray, int, int], np.ndarray]  # of (run, features, K, seed)


def kmeans(run: Path, features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    return KMeans(clusters, n_init=10, random_state=seed).fit_predict(features)  # pyright: ignore[reportArgumentType]


def umap_kmeans(run: Path, features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    import umap  # pyright: ignore[reportMissingImports]

    points = umap.UMAP(n_neighbors=10, n_components=10, random_state=seed).fit_transform(features)
    return kmeans(run, np.asarray(points), clusters, seed)


def spectral(run: Path, features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    return SpectralClustering(clusters, affinity="nearest_neighbors", random_state=seed).fit_predict(features)


def ours(run: Path, features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Stage 2 as the run would do it, in a copy of what it needs."""
    task = Task(clusters=clusters, seed=seed, stage2="spice_graph")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("features", "graph"):
            shutil.copytree(run / name, Path(folder) / name)
        worker = LocalWorker(Path(folder), "spice_graph", torch.device("cpu"))
        spice_graph.train(task, spice_graph.SpiceGraphConfig(), worker)
        return np.load(Path(folder) / "spice_graph/posterior.npy").argmax(1)


def table(run: Path, seeds: Sequence[int]) -> str:
    labels = np.load(run / "data/labels.npy")
    features = artifacts.features(run, len(labels))
    clusters = len(np.unique(labels))
    groupings: dict[str, Grouping] = {"k-means": kmeans, "UMAP + k-means": umap_kmeans, "spectral": spectral}
    if not find_spec("umap"):
        del groupings["UMAP + k-means"]
    rows = [f"{run}: {len(labels):,} images, {clusters} classes, seeds {list(seeds)}"]
    rows.append(f"{'':<16}{'ACC':>14}{'NMI':>14}{'seconds':>9}")
    for name, group in {**groupings, "SPICE-Graph": ours}.items():
        started = time.perf_counter()
        found = [metrics.scores(labels, group(run, features, clusters, seed)) for seed in seeds]
        seconds = (time.perf_counter() - started) / len(seeds)
        cells = (100 * np.array([scores[score] for scores in found]) for score in ("acc", "nmi"))
        shown = "".join(f"{f'{cell.mean():.1f} ± {cell.std():.1f}':>14}" for cell in cells)
        rows.append(f"{name:<16}{shown}{seconds:>9.1f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    for run in options.runs:
        print(table(run, options.seeds), flush=True)


if __name__ == "__main__":
    main()
