"""A page about two runs of the same images: how their groups meet, and which images moved."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from spice_dist import artifacts
from spice_dist.assignments import read_names
from spice_dist.errors import UserError
from spice_dist.report.confusion import ordered
from spice_dist.report.gallery import ReadImages, Thumbnail, encode, read_images
from spice_dist.report.page import check_out, check_replaced, template, write_page
from spice_dist.report.payload import cluster_names
from spice_dist.report.reading import Run, load
from spice_dist.report.words import group_name

MOST_GROUPS = 100  # of each run, in the table
MOST_GALLERIES = 16
PER_GALLERY = 18
EDGE = 96  # px


@dataclass(frozen=True)
class Moved:
    """Images of a group of the first run that are not in the group of the second run which matches it."""

    first: str
    second: str
    size: int
    thumbnails: list[Thumbnail]


def write_comparison(first: Path, second: Path, out: Path, images: ReadImages = read_images) -> Path:
    """Write a page about two runs to `out`, without scripts, and return its path.

    Raises:
        UserError: a run has not finished, or they are of different images.
    """
    runs = load(Path(first)), load(Path(second))
    check_same_images(*runs)
    out = Path(out)
    check_out(out)
    check_replaced(out)
    names = tuple([group_name(k, cluster_names(run)) for k in range(run.num_clusters)] for run in runs)
    counts = overlap(*runs)
    rows, columns = ordered(counts)
    matched = dict(zip(rows, columns, strict=False))
    moved = _moved(runs, counts, matched, names, images)
    page = template("compare.html").render(
        folders=[str(run.folder) for run in runs],
        sizes=[int((np.bincount(run.labels) > 0).sum()) for run in runs],
        num_images=len(runs[0].labels),
        num_moved=int(sum(matched.get(a) != b for a, b in zip(*(run.labels.tolist() for run in runs), strict=True))),
        ari=adjusted_rand(*runs),
        table=_table(counts, rows, columns, names),
        moved=moved,
    )
    write_page(out, page)
    return out


def check_same_images(first: Run, second: Run) -> None:
    """Raise UserError unless both runs are of the same images in the same order."""
    prints = [run.manifest.get("fingerprint") for run in (first, second)]
    paths = [artifacts.assignments_file(run.folder) for run in (first, second)]
    everything = [np.arange(len(run.labels)) for run in (first, second)]
    same = len(first.labels) == len(second.labels) and (None in prints or prints[0] == prints[1])
    if not same or read_names(paths[0], everything[0]) != read_names(paths[1], everything[1]):
        raise UserError(
            f"{first.folder} and {second.folder} are not of the same images; give two runs of one set, "
            "or write a page of each by `spice-dist report RUN`"
        )


def overlap(first: Run, second: Run) -> Int[np.ndarray, "A B"]:
    """Count the images in each group of the first run and each of the second."""
    counts = np.zeros((first.num_clusters, second.num_clusters), np.int64)
    np.add.at(counts, (first.labels, second.labels), 1)
    return counts


def adjusted_rand(first: Run, second: Run) -> float:
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(first.labels, second.labels))


def _table(counts: Int[np.ndarray, "A B"], rows: list[int], columns: list[int], names: tuple) -> dict | None:
    if max(counts.shape) > MOST_GROUPS:
        return None
    sums = np.maximum(counts.sum(axis=1), 1)
    cells = [[(int(counts[a, b]), float(counts[a, b] / sums[a])) for b in columns] for a in rows]
    return {
        "columns": [names[1][b] for b in columns],
        "rows": [(names[0][a], row) for a, row in zip(rows, cells, strict=True)],
    }


def _moved(
    runs: tuple[Run, Run], counts: Int[np.ndarray, "A B"], matched: dict[int, int], names: tuple, images: ReadImages
) -> list[Moved]:
    """Return the largest sets of images that are in a pair of groups that do not match, with their surest images."""
    apart = [(int(counts[a, b]), a, b) for a, b in np.argwhere(counts).tolist() if matched.get(a) != b]
    largest = sorted(apart, key=lambda cell: (-cell[0], cell[1:]))[:MOST_GALLERIES]
    sure = np.minimum(runs[0].confidence, runs[1].confidence)
    chosen = []
    for _, a, b in largest:
        members = np.flatnonzero((runs[0].labels == a) & (runs[1].labels == b))
        chosen.append(members[np.argsort(-sure[members], kind="stable")][:PER_GALLERY])
    thumbnails = _thumbnails(runs[0], np.unique(np.concatenate(chosen)), sure, images) if chosen else {}
    return [
        Moved(names[0][a], names[1][b], size, [thumbnails[i] for i in members.tolist()])
        for (size, a, b), members in zip(largest, chosen, strict=True)
    ]


def _thumbnails(run: Run, wanted: Int[np.ndarray, " W"], sure: np.ndarray, images: ReadImages) -> dict[int, Thumbnail]:
    paths = read_names(artifacts.assignments_file(run.folder), wanted)
    pixels = zip(wanted.tolist(), images(run.folder, wanted, EDGE), strict=True)
    encoded = ((i, *encode(image, EDGE)) for i, image in pixels)
    return {i: Thumbnail(i, uri, paths[i], float(sure[i]), hard) for i, uri, hard in encoded}
