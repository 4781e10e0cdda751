"""k-means of pixels and of features, the baseline of every run."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from spice_dist.data.files import Progress
from spice_dist.data.images import Images
from spice_dist.data.manifest import Ingested
from spice_dist.inference import CHUNK
from spice_dist.task import Task

FITTED_BYTES = 256 << 20  # k-means is fitted on a random sample of this size
STARTS = 10  # of k-means; the best is taken


def kmeans(
    manifest: Ingested, task: Task, read: Callable[[np.ndarray], Float[np.ndarray, "M D"]]
) -> Int[np.ndarray, " N"]:
    """Label all images by k-means, fitted on the clustered ones; `read(index)` gives the float32 rows of images."""
    from sklearn.cluster import KMeans

    width = read(np.arange(1)).nbytes
    order = np.random.default_rng(task.seed).permutation(manifest.clustered)
    fitted = order[: max(FITTED_BYTES // width, 10 * task.clusters)]
    model = KMeans(task.clusters, n_init=STARTS, random_state=task.seed)  # pyright: ignore[reportArgumentType]
    model.fit(read(np.sort(fitted)))
    chunks = np.array_split(np.arange(manifest.n), -(-manifest.n // CHUNK))
    return np.concatenate([model.predict(read(chunk)) for chunk in chunks])


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


def pixels(images: Images, index: np.ndarray) -> Float[np.ndarray, "M P"]:
    """Return the images as rows of C * H * W numbers in [0, 1]."""
    rows = [image.flatten(1).cpu().numpy() for image, _ in images.batches(index, CHUNK)]
    return np.concatenate(rows) / np.float32(255)
