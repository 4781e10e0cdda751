"""What a run's images hold beside groups: copies, series and outliers, in duplicates.csv and outliers.csv."""

import hashlib
import stat
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float16, Int

from spice_dist import artifacts, duplicates, outliers
from spice_dist.data import beton
from spice_dist.data.decode import formats
from spice_dist.data.files import Progress, csv_line, path_cell, publish
from spice_dist.data.images import chunk_of
from spice_dist.data.manifest import read_paths
from spice_dist.distributed import helpers
from spice_dist.inference import batches_of
from spice_dist.methods.plumbing import open_run_dataset
from spice_dist.task import Task


@dataclass(frozen=True)
class Member:
    """An image of a group of copies or of a series: a row of duplicates.csv."""

    group: int
    index: int
    kind: str  # "bytes", "picture" or "series"
    similarity: float  # correlation with the best one, 1 for equal bytes
    best: bool


def inspect(task: Task, run: Path, device: torch.device) -> dict[str, int]:
    """Write duplicates.csv and outliers.csv; return the numbers of images and groups of copies, and of series."""
    names = read_paths(artifacts.data(run))
    features = artifacts.stored_features(run) if artifacts.features_file(run).exists() else None
    has_graph = features is not None and artifacts.neighbors_file(run).exists()
    neighbors = artifacts.neighbors(run) if has_graph else None
    count = -(-len(names) // chunk_of(task.data.size))
    (small,) = helpers.shared(_pictures, count, device, lambda done, total: None, task, run)
    info = beton.verify(artifacts.data(run) / "dataset.beton")
    copies = duplicates.find_copies(same_content(info), small, neighbors, features)
    rows = members(copies, small, best_first(artifacts.manifest(run).source, names, info, copies.scene))
    cells = ([m.group, m.index, path_cell(names[m.index]), m.kind, f"{m.similarity:.4f}", int(m.best)] for m in rows)
    _write(artifacts.duplicates_file(run), ["group", "index", "path", "kind", "similarity", "best"], cells)
    if features is None:
        artifacts.outliers_file(run).unlink(missing_ok=True)
    else:
        _write_outliers(run, names, features, neighbors)
    copied, series = ([m for m in rows if (m.kind == "series") == is_series] for is_series in (False, True))
    return {
        "copies": len(copied),
        "groups": len({m.group for m in copied}),
        "series_images": len(series),
        "series": len({m.group for m in series}),
    }


def _pictures(
    chunks: range, device: torch.device, progress: Progress, task: Task, run: Path
) -> tuple[Float16[np.ndarray, "M s s"]]:
    images, _ = open_run_dataset(task, run, device)
    with closing(images):
        batches = images.batches(batches_of(chunks, images), chunk_of(images.size))
        return (np.concatenate([duplicates.pictures(batch) for batch, _ in batches]),)


def same_content(info: beton.BetonInfo) -> Int[np.ndarray, " N"]:
    """Number the images so that those whose stored bytes are equal have the same number."""
    assert info.crc32 is not None, "verified with the sidecar"
    facts = np.stack([info.crc32, info.sizes, info.heights, info.widths], 1).astype(np.int64)
    _, content = np.unique(facts, axis=0, return_inverse=True)
    # equal checksums are likely equal bytes, of 70,000 images of one size not surely
    with closing(beton.Samples(info)) as samples:
        for group in duplicates.groups(content):
            digests = [hashlib.sha256(samples.encoded(int(i))).digest() for i in group]
            others = np.unique(np.array([digests.index(digest) for digest in digests]), return_inverse=True)[1]
            content[group] = np.where(others == 0, content[group], content.max() + others)
    return content


def best_first(
    source: str, names: Sequence[str], info: beton.BetonInfo, labels: Int[np.ndarray, " N"]
) -> Int[np.ndarray, " N"]:
    """Rank the images of groups: 0 is the copy to keep of all. Larger before smaller, then more bytes, then by name.

    Size and bytes are of the original file, if the images came from a folder that is still there; then what is stored
    decides, which is of one size for raw squares.
    """
    folder, grouped = Path(source), np.concatenate([*duplicates.groups(labels), np.zeros(0, np.int64)])
    known = {int(i): _original(folder / names[int(i)]) for i in grouped} if folder.is_dir() else {}
    stored = zip(info.heights.tolist(), info.widths.tolist(), info.sizes.tolist(), strict=True)
    keys = [(*known.get(i, (0, 0)), height * width, size) for i, (height, width, size) in enumerate(stored)]
    order = sorted(range(len(names)), key=lambda i: (*(-value for value in keys[i]), names[i]))
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    return rank


def _original(path: Path) -> tuple[int, int]:
    """Return (pixels, bytes) of an image file by its header; zeros if there is none that can be read."""
    from PIL import Image

    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
            return 0, 0
        with Image.open(path, formats=formats()) as image:
            return image.width * image.height, status.st_size
    except Exception:  # the file may be another by now, and damaged in any way
        return 0, 0


def members(
    copies: duplicates.Copies, small: Float16[np.ndarray, "N s s"], rank: Int[np.ndarray, " N"]
) -> list[Member]:
    """List groups of copies, then series of the best copies, the best of each first."""
    rows: list[Member] = []
    of_copies = duplicates.groups(copies.picture)
    for number, group in enumerate(of_copies):
        rows += _group(number, group, copies.content, small, rank, "picture")
    best = np.full(int(copies.picture.max()) + 1, -1)
    order = np.argsort(-rank)
    best[copies.picture[order]] = order  # the last one that is written is the best
    pictures = np.sort(best[best >= 0])
    for number, group in enumerate(duplicates.groups(copies.scene[pictures]), len(of_copies)):
        rows += _group(number, pictures[group], copies.content, small, rank, "series")
    return rows


def _group(
    number: int, group: Int[np.ndarray, " G"], content: Int[np.ndarray, " N"], small: Float16[np.ndarray, "N s s"],
    rank: Int[np.ndarray, " N"], kind: str,
) -> list[Member]:  # fmt: skip
    group = group[np.argsort(rank[group])]
    similarity = duplicates.alignment(small, np.repeat(group[:1], len(group)), group)
    similarity[content[group] == content[group[0]]] = 1
    _, which, count = np.unique(content[group], return_inverse=True, return_counts=True)
    kinds = np.where(count[which] > 1, "bytes", kind)
    rows = zip(group.tolist(), kinds.tolist(), similarity.tolist(), strict=True)
    return [Member(number, i, of, value, place == 0) for place, (i, of, value) in enumerate(rows)]


def _write_outliers(
    run: Path, names: Sequence[str], features: Float16[np.ndarray, "N D"], neighbors: Int[np.ndarray, "M S"] | None
) -> None:
    if neighbors is not None and len(neighbors) == len(features):
        far = neighbors[:, min(outliers.K, neighbors.shape[1]) - 1]
        distance = np.maximum(duplicates.cosine_distances(features, np.arange(len(far)), far), 0)
    else:
        distance = outliers.kth_distances(features)
    score = outliers.scores(distance)
    listed = outliers.most_unusual(distance) if len(names) > 1 else []
    cells = ([i, path_cell(names[i]), f"{distance[i]:.4f}", f"{score[i]:.3f}"] for i in map(int, listed))
    _write(artifacts.outliers_file(run), ["index", "path", "distance", "score"], cells)


def _write(path: Path, heading: list[str], rows: Iterable[list[object]]) -> None:
    with publish(path) as file:
        file.writelines(csv_line(row).encode() for row in (heading, *rows))
