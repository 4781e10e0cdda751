"""What the script of a page is given: one JSON text with arrays in base64, and the script itself."""

import base64
import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt16
from markupsafe import Markup

from spice_dist import artifacts
from spice_dist.assignments import read_names
from spice_dist.data.checksums import require_whole
from spice_dist.report.evidence import Evidence
from spice_dist.report.reading import Run, number
from spice_dist.report.sprites import COLUMNS, Sheets
from spice_dist.report.text import printable
from spice_dist.report.words import outside_group

FOLDER = Path(__file__).parent / "tool"
PARTS = ("state.js", "pictures.js", "map.js", "page.js")  # joined in this order
MOST_GROUPS = 10_000  # of a level: the page has a place for each


@cache
def script() -> Markup:
    """Return the script of the page, which holds no value of a run, so that its hash is always the same."""
    return Markup("\n" + "\n".join((FOLDER / part).read_text(encoding="utf-8") for part in PARTS))  # noqa: S704


def script_hash() -> str:
    """Return the SHA-256 of the script as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script().encode()).digest()).decode("ascii")


def fingerprint(run: Path) -> str:
    """Return what edits.json calls the run: the first 16 hex digits of the SHA-256 of assignments.csv."""
    return hashlib.sha256(artifacts.assignments_file(run).read_bytes()).hexdigest()[:16]


def embed(content: dict[str, Any]) -> Markup:
    """Return JSON that no element ends, for a script element that is data."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def build(
    run: Run,
    evidence: Evidence,
    place: Int[np.ndarray, " S"],
    sheets: Sheets | None,
    folder: str,
    points: Float[np.ndarray, "S 2"] | None,
    truth: Int[np.ndarray, " N"] | None,
) -> dict[str, Any]:
    """Return everything that the script needs to know.

    Args:
        folder: where sheets beside the page lie, relative to it.
        truth: true classes, negative where there are none; None if there are no labels.
    """
    shown = evidence.shown
    paths = list(map(read_names(artifacts.assignments_file(run.folder), shown).__getitem__, shown.tolist()))
    levels = read_levels(run)
    arrays: dict[str, np.ndarray] = {
        "index": shown,
        "cluster": run.labels[shown],
        "confidence": run.confidence[shown].astype("<f4"),
        "reliable": run.reliable[shown].astype(np.int64),
        "candidates": evidence.candidates,
        "weights": evidence.weights.astype("<f4"),
        "place": place,
    }
    arrays |= {name: level[shown] for name, level in levels.items()}
    if evidence.neighbors is not None:
        arrays["neighbors"] = evidence.neighbors
    if points is not None:
        arrays["x"], arrays["y"] = quantised(points)
    if truth is not None:
        arrays["truth"] = truth[shown]
    place_of = {index: at for at, index in enumerate(shown.tolist())}
    copies = ([place_of.get(int(row["index"]), -1) for row in group] for group in evidence.copies)
    return {
        "run": fingerprint(run.folder),
        "total": len(run.labels),
        "clusters": run.num_clusters,
        "names": {str(k): printable(name) for k, name in cluster_names(run).items()},
        "paths": [printable(path) for path in paths],
        "by_index": unnamed(paths),
        "arrays": {name: packed(array) for name, array in arrays.items()},
        "top": evidence.candidates.shape[1],
        "reach": 0 if evidence.neighbors is None else evidence.neighbors.shape[1],
        "weights_are": evidence.weights_are,
        "next": [None] * run.num_clusters if evidence.crossing is None else evidence.next,
        "sizes": np.bincount(run.labels[: grouped_images(run)], minlength=run.num_clusters).tolist(),
        "outside": outside_group(run),
        "levels": {name: int(level.max()) + 1 for name, level in levels.items()},
        "classes": None if truth is None else class_names(truth[shown], paths),
        "outliers": [place_of[index] for index, _ in evidence.outliers if index in place_of],
        "duplicates": [[at for at in group if at >= 0] for group in copies],
        "sheets": _sheets(sheets, folder),
    }


def grouped_images(run: Run) -> int:
    """Return how many images are grouped; the others, which only train or are held out, come after."""
    extra, held_out = (number(run.manifest.get(name)) or 0 for name in ("extra", "held_out"))
    return len(run.labels) - int(extra + held_out)


def _sheets(sheets: Sheets | None, folder: str) -> dict[str, Any]:
    if sheets is None:
        return {"count": 0, "inside": 0, "columns": COLUMNS, "tile": 0, "kind": "image/png", "pixelated": False}
    facts = {"count": sheets.count, "inside": len(sheets.inside), "columns": COLUMNS, "tile": sheets.tile}
    return facts | {"kind": sheets.kind, "pixelated": sheets.pixelated, "folder": folder}


def packed(array: np.ndarray) -> dict[str, str]:
    """Return the values in base64, in the smallest of the types that the script reads."""
    kind = {"f": "f4", "u": "u2"}.get(array.dtype.kind, "i4")
    if kind == "i4" and array.size and array.min() >= -(1 << 15) and array.max() < 1 << 15:
        kind = "i2"
    return {"type": kind, "data": encoded(np.ascontiguousarray(array, dtype="<" + kind).tobytes())}


def quantised(points: Float[np.ndarray, "S 2"]) -> UInt16[np.ndarray, "2 S"]:
    """Return x and y on one scale as 0 .. 65535, the longer side filled and the shorter one in the middle."""
    low, high = points.min(axis=0), points.max(axis=0)
    span = max(float((high - low).max()), 1e-9)
    return np.round(((points - (low + high) / 2) / span + 0.5) * 65535).clip(0, 65535).astype(np.uint16).T


def unnamed(paths: list[str]) -> list[int]:
    """Return the places of images that edits.json cannot name by path: it is escaped, or several have it."""
    count = Counter(paths)
    return [at for at, path in enumerate(paths) if count[path] > 1 or printable(path) != path]


def cluster_names(run: Run) -> dict[int, str]:
    """Return the names that the user gave to clusters of this run; names.json is not trusted."""
    try:
        names = artifacts.names(run.folder)
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return {k: name[:200] for k, name in names.items() if 0 <= k < run.num_clusters and isinstance(name, str) and name}


def class_names(truth: Int[np.ndarray, " S"], paths: list[str]) -> list[str]:
    """Name each class after the first folder of its images, where all of them and no others are in it."""
    folders: list[set[str]] = [set() for _ in range(int(truth.max()) + 1)]
    for label, path in zip(truth.tolist(), paths, strict=True):
        if label >= 0:
            folders[label].add(path.rpartition("/")[0])
    used = Counter(name for names in folders for name in names)
    alone = [next(iter(names)) if len(names) == 1 else "" for names in folders]
    return [str(printable(name)) if name and used[name] == 1 else str(k) for k, name in enumerate(alone)]


def read_levels(run: Run) -> dict[str, Int[np.ndarray, " N"]]:
    """Return the coarser and the finer grouping, where levels.csv has them for every image."""
    try:
        path = require_whole(artifacts.levels_file(run.folder))
        table = np.loadtxt(path, np.int64, delimiter=",", skiprows=1, ndmin=2)
    except (OSError, ValueError):
        return {}
    if table.shape != (len(run.labels), 4) or table.min() < 0:
        return {}
    fits = np.array_equal(table[:, 2], run.labels) and table.max() < MOST_GROUPS
    return {"coarse": table[:, 1], "fine": table[:, 3]} if fits else {}
