"""What every run is compared with: k-means of pixels, and k-means, spectral clustering and UMAP of its features."""

import importlib.util
import sys
import warnings
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse.linalg import ArpackError
from torch import Tensor
from tqdm import tqdm

from spice_dist import graph
from spice_dist.data.files import Progress
from spice_dist.data.images import CHUNK, Images
from spice_dist.data.manifest import Ingested
from spice_dist.distributed import helpers
from spice_dist.methods import spice_graph
from spice_dist.methods.plumbing import open_run_dataset
from spice_dist.methods.spice_graph import SpiceGraphConfig
from spice_dist.neighbors import nearest, search, without_itself
from spice_dist.task import Task

FITTED_BYTES = 256 << 20  # k-means is fitted on a random sample of this size
STARTS = 10  # of k-means; the best is taken
SPECTRAL_NEIGHBORS = 15  # of the graph of spectral clustering
UMAP_NEIGHBORS, UMAP_DIMENSIONS = 10, 10
UMAP_IMAGES = 10_000  # that UMAP sees, a minute or two; the others get the label that most of their nearest ones have
VOTES = 5  # of these
MOST = 500_000  # images up to which the features are kept in memory for spectral clustering and UMAP


def kmeans(
    manifest: Ingested, task: Task, read: Callable[[np.ndarray], Float[np.ndarray, "M D"]]
) -> Int[np.ndarray, " N"]:
    """Label all images by k-means, fitted on the clustered ones; `read(index)` gives the float32 rows of images."""
    model = _fitted(task, manifest.clustered, read)
    return np.concatenate([model.predict(read(chunk)) for chunk in _chunks(manifest.n)])


def of_pixels(task: Task, run: Path, device: torch.device) -> Int[np.ndarray, " N"]:
    """Label all images of a run by k-means of their pixels, fitted on the clustered ones; helpers take their shares."""
    images, manifest = open_run_dataset(task, run, device)
    with closing(images):
        model = _fitted(task, manifest.clustered, lambda index: pixels(images, index))
    count = len(_chunks(manifest.n))
    return helpers.shared(_nearest_centers, count, device, lambda done, total: None, model, task, run)[0]


def _nearest_centers(
    parts: range, device: torch.device, progress: Progress, model: Any, task: Task, run: Path
) -> helpers.Rows:
    images, _ = open_run_dataset(task, run, device)
    with closing(images):
        chunks = _chunks(images.n)[parts.start : parts.stop]
        return (np.concatenate([model.predict(pixels(images, chunk)) for chunk in chunks]),)


def _fitted(task: Task, clustered: int, read: Callable[[np.ndarray], Float[np.ndarray, "M D"]]) -> Any:
    from sklearn.cluster import KMeans

    width = read(np.arange(1)).nbytes
    order = np.random.default_rng(task.seed).permutation(clustered)
    fitted = order[: max(FITTED_BYTES // width, 10 * task.clusters)]
    model = KMeans(task.clusters, n_init=STARTS, random_state=task.seed)  # pyright: ignore[reportArgumentType]
    return model.fit(read(np.sort(fitted)))


def _chunks(count: int) -> list[Int[np.ndarray, " M"]]:
    return np.array_split(np.arange(count), -(-count // CHUNK))


def kmeans_of_features(
    task: Task, features: Float[np.ndarray, "N D"], clustered: int, progress: Progress
) -> Int[np.ndarray, " N"]:
    """Do as `kmeans` with features in memory, one start after another, so that `progress` can count them."""
    from sklearn.cluster import KMeans

    order = np.random.default_rng(task.seed).permutation(clustered)
    fitted = features[np.sort(order[: max(FITTED_BYTES // features[0].nbytes, 10 * task.clusters)])]
    models = []
    for start in range(STARTS):
        model = KMeans(task.clusters, n_init=1, random_state=task.seed * STARTS + start)  # pyright: ignore
        models.append(model.fit(fitted))
        progress(start + 1, STARTS)
    return min(models, key=lambda model: model.inertia_).predict(features).astype(np.int64)


def of_features(
    task: Task,
    features: Float[np.ndarray, "N D"],
    clustered: int,
    device: torch.device,
    known: Collection[str] = (),
) -> dict[str, Int[np.ndarray, " N"]]:
    """Label all images by spectral clustering and, with `umap_baseline`, by k-means of UMAP's map, of unit features.

    Both are left out of fewer images than spectral clustering can use. One line says what else is left out and why.

    Args:
        known: baselines that there are already, by name.
    """
    wanted = {"spectral", *(["umap_kmeans"] if task.umap_baseline else [])}.difference(known)
    if not wanted or clustered < max(spice_graph.MIN_IMAGES, 2 * task.clusters):
        return {}
    if len(features) > MOST:
        tqdm.write(f"spectral clustering and UMAP, baselines of up to {MOST:,} images, are left out", sys.stderr)
        return {}
    on_device = torch.tensor(features, device=device).float()
    labels: dict[str, Int[np.ndarray, " N"]] = {}
    if "spectral" in wanted:
        try:
            labels["spectral"] = spectral(task, on_device, clustered)
        except ArpackError as error:  # a baseline must not cost the result
            tqdm.write(f"spectral clustering, a baseline, is left out: {error}", sys.stderr)
    if "umap_kmeans" in wanted and has_umap():
        labels["umap_kmeans"] = umap_kmeans(task, on_device, clustered)
    elif "umap_kmeans" in wanted:
        tqdm.write("UMAP and k-means, a baseline, is left out: pip install 'spice_dist[map]'", sys.stderr)
    return labels


def spectral(
    task: Task, features: Float[Tensor, "N D"], clustered: int, neighbors: Int[np.ndarray, "M S"] | None = None
) -> Int[np.ndarray, " N"]:
    """Cluster the neighbour graph of the clustered images as Shi and Malik 2000; others join the nearest center.

    Args:
        neighbors: of each clustered image, nearest first; None: they are searched.
    """
    reference = features[:clustered]
    if neighbors is None:
        neighbors = np.empty((clustered, 0), np.int32)  # of more images those of landmarks are searched
        if clustered <= graph.landmarks(task.clusters):
            found = nearest(reference, min(SPECTRAL_NEIGHBORS + 1, clustered))
            neighbors = without_itself(found.cpu().numpy().astype(np.int32))
    settings = SpiceGraphConfig(counts=(SPECTRAL_NEIGHBORS,), walks=(0,), attempts=0)
    labels = spice_graph.clusterings(task, settings, reference, neighbors)[0]
    others = features[clustered:]
    if not len(others):
        return labels
    one_hot = torch.eye(task.clusters, device=features.device)[torch.from_numpy(labels).to(features.device)]
    centers = one_hot.T @ reference / one_hot.sum(0).clamp(min=1)[:, None]
    return np.concatenate([labels, (others @ centers.T).argmax(1).cpu().numpy()])


def umap_kmeans(task: Task, features: Float[Tensor, "N D"], clustered: int) -> Int[np.ndarray, " N"]:
    """Label all images by k-means of UMAP's map of up to UMAP_IMAGES clustered ones; the same for the same seed."""
    from sklearn.cluster import KMeans

    chosen = np.sort(np.random.default_rng(task.seed).permutation(clustered)[:UMAP_IMAGES])
    sample = features[torch.from_numpy(chosen).to(features.device)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fixed seed takes one thread
        from umap import UMAP as Umap  # pyright: ignore[reportMissingImports]

        mapping = Umap(n_neighbors=UMAP_NEIGHBORS, n_components=UMAP_DIMENSIONS, random_state=task.seed)
        places = np.asarray(mapping.fit_transform(sample.cpu().numpy()))
    model = KMeans(task.clusters, n_init=STARTS, random_state=task.seed)  # pyright: ignore[reportArgumentType]
    labels = model.fit_predict(places)
    near = search(sample, features, min(VOTES, len(chosen)))[1].cpu().numpy()
    of_all = graph.neighbor_mean(np.eye(task.clusters, dtype=np.float32)[labels], near).argmax(1)
    of_all[chosen] = labels
    return of_all


def has_umap() -> bool:
    """Tell whether umap-learn is installed."""
    return importlib.util.find_spec("umap") is not None


def pixels(images: Images, index: np.ndarray) -> Float[np.ndarray, "M P"]:
    """Return the images as rows of C * H * W numbers in [0, 1]."""
    rows = [image.flatten(1).cpu().numpy() for image, _ in images.batches(index, CHUNK)]
    return np.concatenate(rows) / np.float32(255)
