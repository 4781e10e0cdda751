"""Thumbnails of each cluster as data URIs: the images nearest its center and those of lowest confidence."""

import base64
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spice_dist import artifacts
from spice_dist.assignments import read_names
from spice_dist.errors import DamagedFile, UserError
from spice_dist.report.reading import Run

ReadImages = Callable[[Path, np.ndarray, int], np.ndarray]  # run folder, indices (n,), px -> uint8 (n, H, W, 3)

PAGE_BUDGET = 12_000_000  # bytes of thumbnails with their captions; the rest of the page takes one or two million
PIXELATED_BELOW = 48  # px; smaller images are kept as they are and shown with hard pixels
CHUNK = 8192  # rows of features in memory at a time
MAP_IMAGES = 3000  # most images on the map of features


@dataclass
class Thumbnail:
    index: int
    uri: str
    path: str
    confidence: float
    pixelated: bool

    @property
    def bytes(self) -> int:
        return len(self.uri) + 2 * len(self.path.encode("utf-8", "replace")) + 120


@dataclass
class Gallery:
    cluster: int
    size: int
    mean_confidence: float | None  # None for an empty cluster, as is the next field
    reliable_fraction: float | None
    nearest: list[Thumbnail] = field(default_factory=list)
    uncertain: list[Thumbnail] = field(default_factory=list)


def read_images(run: Path, indices: np.ndarray, edge: int) -> np.ndarray:
    """Read images of the run in the order of `indices`, of at most `edge` pixels a side: uint8 (n, H, W, 3)."""
    import torch

    from spice_dist.data.loaders import open_images

    order = np.asarray(indices, dtype=np.int64)
    size = min(artifacts.manifest(run).size, edge)
    images = open_images(artifacts.data(run), device=torch.device("cpu"), size=size, loader="torch", resident_bytes=0)
    try:
        batches = images.batches(order, 256)  # in exactly this order
        return np.stack([_reduce(image, edge) for batch, _ in batches for image in batch.permute(0, 2, 3, 1).numpy()])
    finally:
        images.close()


def counts(num_clusters: int) -> tuple[int, int, int]:
    """Return how many nearest and least certain thumbnails a cluster gets, and their longer edge in px."""
    if num_clusters <= 60:
        return 24, 12, 96
    if num_clusters <= 200:
        return 12, 6, 64
    return 6, 3, 64


def cluster_centers(features: np.ndarray, labels: np.ndarray, num_clusters: int) -> np.ndarray:
    """Return center[k] = normalize(mean of features with label k), float64 (K, D); DamagedFile if one is not finite."""
    centers = np.zeros((num_clusters, features.shape[1]))
    for block in blocks(len(labels)):
        rows = np.asarray(features[block], dtype=np.float64)
        if not np.isfinite(rows).all():
            raise DamagedFile("features.npy holds values that are not finite")
        order = np.argsort(labels[block], kind="stable")
        present, starts = np.unique(labels[block][order], return_index=True)
        centers[present] += np.add.reduceat(rows[order], starts, axis=0)
    return centers / np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), 1e-12)


def center_similarity(features: np.ndarray, labels: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return each image's cosine with its cluster's center."""
    similarity = np.empty(len(labels))
    for block in blocks(len(labels)):
        rows = np.asarray(features[block], dtype=np.float64)
        similarity[block] = np.einsum("nd,nd->n", rows, centers[labels[block]])
    return similarity


def blocks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def principal_axes(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Project at most MAP_IMAGES images on the two main directions of their features.

    Returns their indices (n,), coordinates (n, 2), and each direction's share of the variance (2,). The entry of
    largest size of each direction is positive, so that a map is never mirrored.
    """
    from sklearn.decomposition import PCA

    indices = np.arange(len(features))
    if len(indices) > MAP_IMAGES:
        indices = np.sort(np.random.default_rng(0).choice(len(indices), MAP_IMAGES, replace=False))
    many = len(indices) > features.shape[1]  # then the covariance is smaller: half the time
    pca = PCA(min(2, features.shape[1]), svd_solver="covariance_eigh" if many else "full")
    # where all features are equal, shares are 0 / 0
    with np.errstate(invalid="ignore"):
        points = pca.fit_transform(np.asarray(features[indices], dtype=np.float32))
    missing = (0, 2 - points.shape[1])
    return indices, np.pad(points, ((0, 0), missing)), np.pad(np.nan_to_num(pca.explained_variance_ratio_), missing)


def galleries(run: Run, similarity: np.ndarray | None, images: ReadImages) -> tuple[list[Gallery], list[str]]:
    """Return one gallery per cluster, and notes on omissions; without features confident images are typical."""
    num_nearest, num_uncertain, edge = counts(run.num_clusters)
    typical = run.confidence if similarity is None else similarity
    by_cluster = np.split(
        np.argsort(run.labels, kind="stable"), np.cumsum(np.bincount(run.labels, minlength=run.num_clusters))
    )
    nearest = [members[np.argsort(-typical[members], kind="stable")][:num_nearest] for members in by_cluster[:-1]]
    uncertain = [
        members[np.argsort(run.confidence[members], kind="stable")][:num_uncertain] for members in by_cluster[:-1]
    ]

    wanted = np.unique(np.concatenate([*nearest, *uncertain]))
    paths = read_names(artifacts.assignments_file(run.folder), wanted)
    notes = []
    thumbnails: dict[int, Thumbnail] = {}
    try:
        for chunk in np.array_split(wanted, max(1, -(-len(wanted) // 5000))):
            for index, image in zip(chunk.tolist(), images(run.folder, chunk, 96), strict=True):
                uri, pixelated = encode(image, edge)
                thumbnails[index] = Thumbnail(index, uri, paths[index], float(run.confidence[index]), pixelated)
    except (UserError, OSError) as error:
        notes.append(f"The images could not be read, so no thumbnails are shown: {error}")
        print(notes[-1], file=sys.stderr)
        nearest = uncertain = [np.empty(0, np.int64)] * run.num_clusters

    shown_nearest, shown_uncertain = fit_budget(nearest, uncertain, thumbnails)
    if (shown_nearest, shown_uncertain) != (24, 12) and not notes:
        notes.append(
            f"To keep this page small, each cluster shows at most {shown_nearest} of its most typical images "
            f"and {shown_uncertain} of its least certain ones."
        )
    result = []
    for cluster, members in enumerate(by_cluster[:-1]):
        result.append(
            Gallery(
                cluster=cluster,
                size=len(members),
                mean_confidence=float(run.confidence[members].mean()) if len(members) else None,
                reliable_fraction=float(run.reliable[members].mean()) if len(members) else None,
                nearest=[thumbnails[i] for i in nearest[cluster][:shown_nearest].tolist()],
                uncertain=[thumbnails[i] for i in uncertain[cluster][:shown_uncertain].tolist()],
            )
        )
    return result, notes


def fit_budget(
    nearest: list[np.ndarray], uncertain: list[np.ndarray], thumbnails: dict[int, Thumbnail]
) -> tuple[int, int]:
    """Return how many nearest and uncertain thumbnails per cluster fit PAGE_BUDGET, two nearest for one uncertain."""
    most = max(map(len, nearest), default=0), max(map(len, uncertain), default=0)
    num_nearest, num_uncertain = counts(len(nearest))[:2]
    if not max(most):
        return num_nearest, num_uncertain
    while num_nearest > 1:
        shown = [*(row[:num_nearest] for row in nearest), *(row[:num_uncertain] for row in uncertain)]
        if sum(thumbnails[i].bytes for row in shown for i in row.tolist()) <= PAGE_BUDGET:
            break
        num_nearest, num_uncertain = num_nearest - 1, num_nearest // 2
    return num_nearest, num_uncertain


def encode(image: np.ndarray, edge: int) -> tuple[str, bool]:
    """Encode the pixels, without the file's metadata: PNG if small, else JPEG reduced to `edge`.

    Returns the data URI, and whether the image is small.
    """
    from PIL import Image

    pixelated = max(image.shape[:2]) < PIXELATED_BELOW
    if not pixelated:
        image = _reduce(image, edge)
    grey = bool((image == image[..., :1]).all())
    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image))
    buffer = io.BytesIO()
    if pixelated:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=80, optimize=True)
    kind = "png" if pixelated else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", pixelated


def _reduce(image: np.ndarray, edge: int) -> np.ndarray:
    """Return uint8 (H, W, 3) with its longer edge at most `edge`."""
    from PIL import Image

    if max(image.shape[:2]) <= edge:
        return image
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    return np.asarray(picture)
