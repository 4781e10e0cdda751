"""Where the images of a page lie on its map: by UMAP of their features, or on their principal axes."""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from spice_dist import artifacts
from spice_dist.report.gallery import blocks

LEAST_FOR_UMAP = 200  # images
MOST_FOR_UMAP = 5_000  # others are placed beside their nearest ones of these
DIRECTIONS = 50  # principal axes that UMAP sees
BESIDE = 5  # sampled neighbours among which another image is placed
SEED = 0


def place_images(
    run: Path, features: Float[np.ndarray, "N D"], shown: Int[np.ndarray, " S"], take_time: bool
) -> tuple[Float[np.ndarray, "S 2"], str]:
    """Return the places of the images `shown` on the map, and the name of the method.

    Places by UMAP are kept in the run folder, with a hash of the features, and taken again.

    Args:
        take_time: whether UMAP, which takes a minute, may be called where no places are kept.
    """
    order = np.sort(shown)
    rows = np.concatenate([np.asarray(features[order[block]], dtype=np.float32) for block in blocks(len(order))])
    key = hashlib.sha256(rows.tobytes()).hexdigest()
    points, method = _read(artifacts.map_file(run), key, len(order)), "umap"
    if points is None and take_time and len(order) >= LEAST_FOR_UMAP and importlib.util.find_spec("umap"):
        points = umap(rows)
        _keep(artifacts.map_file(run), key, points)
    if points is None:
        points, method = principal(rows), "pca"
    return points[np.searchsorted(order, shown)], method


def principal(rows: Float[np.ndarray, "S D"], directions: int = 2) -> Float[np.ndarray, "S directions"]:
    """Project on the main directions; zeros where there are fewer."""
    from sklearn.decomposition import PCA

    count = min(directions, *rows.shape)
    pca = PCA(count, svd_solver="randomized" if count < min(rows.shape) / 4 else "full", random_state=SEED)
    with np.errstate(invalid="ignore"):  # where all features are equal, shares are 0 / 0
        points = pca.fit_transform(rows)
    return np.pad(points, ((0, 0), (0, directions - count))).astype(np.float32)


def umap(rows: Float[np.ndarray, "S D"]) -> Float[np.ndarray, "S 2"]:
    """Lay the rows out by UMAP of a sample, from their principal axes; the same for the same rows."""
    from sklearn.neighbors import NearestNeighbors

    main = principal(rows, DIRECTIONS)
    sample = np.arange(len(rows))
    if len(rows) > MOST_FOR_UMAP:
        sample = np.sort(np.random.default_rng(SEED).choice(len(rows), MOST_FOR_UMAP, replace=False))
    places = _umap(main[sample])
    if len(sample) == len(rows):
        return places
    distances, near = NearestNeighbors(n_neighbors=BESIDE).fit(main[sample]).kneighbors(main)
    weights = 1 / np.maximum(distances, 1e-9)
    points = np.einsum("nb,nbc->nc", weights / weights.sum(axis=1, keepdims=True), places[near])
    points[sample] = places
    return points.astype(np.float32)


def _umap(main: Float[np.ndarray, "S D"]) -> Float[np.ndarray, "S 2"]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fixed seed takes one thread
        from umap import UMAP

        start: Any = main[:, :2] * (10 / max(float(main[:, :2].std()), 1e-9))  # `init` takes arrays too
        return np.asarray(UMAP(init=start, random_state=SEED).fit_transform(main), dtype=np.float32)


def _read(path: Path, key: str, count: int) -> Float[np.ndarray, "S 2"] | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            points = kept["points"]
            fits = str(kept["key"]) == key and points.shape == (count, 2) and points.dtype == np.float32
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return points if fits and np.isfinite(points).all() else None


def _keep(path: Path, key: str, points: Float[np.ndarray, "S 2"]) -> None:
    """Keep the points; a folder that cannot be written only means that they are found again."""
    try:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        np.savez(temporary, key=np.array(key), points=points)
        os.replace(temporary, path)
    except OSError:
        return
