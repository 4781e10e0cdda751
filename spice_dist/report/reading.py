"""Read a finished run folder for the report.

Its content is not trusted: names of files, reasons and configuration may hold any character, numbers may be missing or
not finite, and a curve may end in half a line. `DamagedFile` is raised if a file that the report needs is wrong.
"""

import csv
import json
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spice_dist import artifacts, catalog
from spice_dist.assignments import read_assignments
from spice_dist.data.checksums import require_whole
from spice_dist.data.files import path_of_cell, text_of_cell
from spice_dist.errors import DamagedFile, UserError

LEARN_FROM_LABELS = {"fixmatch": "FixMatch", "supervised": "Supervised"}
SCORES = ("acc", "nmi", "ari", "nmi_geometric", "ami")
RESULT = " (result)"  # after the name of the row that is the result
MAX_QUARANTINED = 50  # images that are named
# baselines by the name in metrics.json; runs lack some of them
OF_FEATURES = {
    "kmeans_features": "Features + k-means",
    "spectral": "Features + spectral",
    "umap_kmeans": "Features + UMAP + k-means",
}


@dataclass(frozen=True)
class Curve:
    steps: np.ndarray  # ascending, each once
    values: np.ndarray  # NaN where the loss was not finite


@dataclass(frozen=True)
class Run:
    folder: Path
    config: dict
    metrics: dict
    num_clusters: int
    labels: np.ndarray  # (N,) int64, the cluster of each image
    confidence: np.ndarray  # (N,) float64
    reliable: np.ndarray  # (N,) bool
    features: np.ndarray | None  # (N, D) float16, memory-mapped
    scores: dict[str, dict[str, float] | None]  # row of the score table -> scores
    curves: dict[str, dict[str, Curve]]  # stage -> name -> curve
    head_selection: dict[str, Curve]  # "selected" and "best" accuracy over epochs; empty without labels
    manifest: dict
    quarantine: list[tuple[str, str]]  # (path, reason), the first ones
    num_quarantined: int
    notes: list[str] = field(default_factory=list)  # about the images: what is left out, copies, faint ones

    @property
    def labels_note(self) -> str:
        """Warn that the run learned from true labels; empty if it did not."""
        if self.metrics.get("method") not in LEARN_FROM_LABELS:
            return ""
        given = mapping(self.metrics.get("given_labels"))
        count, scored = (number(given.get(name)) or 0 for name in ("count", "scored"))
        return (
            f"This run USED TRUE LABELS: it learned from {count:,.0f} of them and is no clustering without labels. "
            f"Scores are of the {scored:,.0f} images whose labels were not given."
        )

    @property
    def trust(self) -> str:
        """Tell in one line how far to trust this grouping; empty for runs of earlier versions."""
        verdict = mapping(self.metrics.get("verdict"))
        level, why, remedy = (verdict.get(name) for name in ("level", "why", "remedy"))
        if not isinstance(level, str) or not isinstance(why, str):
            return ""
        return f"How far to trust these groups: {level}: {why}" + (
            f"; {remedy}" if isinstance(remedy, str) and remedy else ""
        )

    @property
    def has_labels(self) -> bool:
        return any(self.scores.values())


def load(folder: Path) -> Run:
    """Read a finished run; UserError if there is none, DamagedFile if a file that the report needs is wrong."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a finished run")
    metrics = read_json(artifacts.metrics_file(folder))
    if metrics is None:
        raise UserError(
            f"{folder} has no metrics.json: the run has not finished; start the same command again to finish it"
        )
    labels, confidence, reliable = read_assignments(artifacts.assignments_file(folder))
    num_clusters = metrics.get("k")
    if not isinstance(num_clusters, int) or num_clusters < 1:
        raise DamagedFile(f"{folder / 'metrics.json'}: k must be a positive integer, not {num_clusters!r}")
    if labels.min() < 0 or labels.max() >= num_clusters:
        raise DamagedFile(
            f"{folder / 'assignments.csv'}: clusters {labels.min()}..{labels.max()}, "
            f"but metrics.json says k = {num_clusters}"
        )
    quarantine, num_quarantined = read_quarantine(artifacts.quarantine_file(folder), MAX_QUARANTINED)
    return Run(
        folder=folder,
        config=read_json(artifacts.config_file(folder)) or {},
        metrics=metrics,
        num_clusters=num_clusters,
        labels=labels,
        confidence=confidence,
        reliable=reliable,
        features=read_features(artifacts.features_file(folder), len(labels)),
        scores=score_rows(folder, metrics),
        curves={stage: read_curves(folder / stage / "metrics.jsonl") for stage in catalog.TITLES},
        head_selection=read_curves(artifacts.head_selection_file(folder)),
        manifest=read_json(artifacts.manifest_file(folder)) or {},
        quarantine=quarantine,
        num_quarantined=num_quarantined,
        notes=read_notes(folder),
    )


def number(value: object) -> float | None:
    """Return a finite number, or None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def read_json(path: Path) -> dict | None:
    """Return the object in the file; None if there is no file or it holds null."""
    try:
        content = json.loads(require_whole(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: not JSON ({error})") from None
    if content is not None and not isinstance(content, dict):
        raise DamagedFile(f"{path}: an object was expected")
    return content


def score_rows(folder: Path, metrics: dict) -> dict[str, dict[str, float] | None]:
    """Return the rows of the score table, weakest method first; `eval` of metrics.json is of the last stage."""
    final = read_scores(metrics.get("eval"))
    baselines = mapping(metrics.get("baselines"))
    if metrics.get("result") == "corrected":
        return {"Before the corrections": read_scores(baselines.get("before")), "Corrected": final}
    rows = {
        "Pixels + k-means": read_scores(baselines.get("kmeans_pixels")),
        **{title: read_scores(baselines[name]) for name, title in OF_FEATURES.items() if name in baselines},
    }
    if metrics.get("method") in LEARN_FROM_LABELS:
        count = number(mapping(metrics.get("given_labels")).get("count")) or 0
        return rows | {f"{LEARN_FROM_LABELS[metrics['method']]} ({count:.0f} labels)": final}
    if metrics.get("method") == "scan":
        alone = read_scores(read_json(artifacts.stage_scores_file(folder, "scan")))
        rows["SCAN, no self-label"] = alone
        return rows | ({"SCAN": final} if "self_label" in mapping(metrics.get("seconds")) else {})
    if (folder / "imc_swav").is_dir() and not (folder / "spice_self").is_dir():  # else it was SPICE's pretext
        return rows | {"IMC-SwAV": final}
    if (method := metrics.get("method")) in catalog.METHODS and method in catalog.TITLES:  # its one stage has its name
        return rows | {catalog.TITLES[method][0]: final}
    if pretext := read_scores(read_json(artifacts.stage_scores_file(folder, "imc_swav"))):
        rows["IMC-SwAV, stage 1"] = pretext
    if isinstance(metrics.get("result"), str):
        return graph_rows(folder, metrics)
    spice_self = read_scores(read_json(artifacts.stage_scores_file(folder, "spice_self")))
    spice = read_scores(read_json(artifacts.stage_scores_file(folder, "spice_semi")))
    # without a reliable label stage 3 has trained nothing
    trained = (folder / "spice_semi").is_dir() and number(mapping(metrics.get("reliable")).get("count")) != 0
    if trained or spice_self is None:
        spice = spice or final
    return rows | {"SPICE-Self": spice_self, "SPICE": spice}


def graph_rows(folder: Path, metrics: dict) -> dict[str, dict[str, float] | None]:
    """Return the rows of a run on the neighbour graph; the result, chosen by label-free scores, is marked."""
    baselines = mapping(metrics.get("baselines"))
    rows = {title: (name, read_scores(baselines[name])) for name, title in OF_FEATURES.items() if name in baselines}
    for name, title in {"spice_graph": "SPICE-Graph", "spice_tune": "SPICE, fine-tuned"}.items():
        if name in mapping(metrics.get("compared")):
            rows[title] = (name, read_scores(read_json(artifacts.stage_scores_file(folder, name))))
    chosen = metrics["result"]
    # the result last, as `final_scores` expects
    ordered = sorted(rows.items(), key=lambda row: row[1][0] == chosen)
    return {title + RESULT * (name == chosen): scores for title, (name, scores) in ordered}


def read_scores(content: object) -> dict[str, float] | None:
    scores = {name: number(mapping(content).get(name)) for name in SCORES}
    return {name: value for name, value in scores.items() if value is not None} or None


def read_notes(folder: Path) -> list[str]:
    """Return what the manifest of the images says of them; nothing if it is damaged."""
    try:
        return artifacts.manifest(folder).notes()
    except (DamagedFile, TypeError, AttributeError, ValueError):
        return []


def read_quarantine(path: Path, limit: int) -> tuple[list[tuple[str, str]], int]:
    """Return the first `limit` rows as (path, reason), and the number of all rows."""
    rows, total = [], 0
    try:
        with require_whole(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            for row in csv.DictReader(file):
                total += 1
                if total <= limit:
                    rows.append((path_of_cell(row.get("path") or ""), text_of_cell(row.get("reason") or "")))
    except FileNotFoundError:
        return [], 0
    except csv.Error as error:
        raise DamagedFile(f"{path}: {error}") from None
    return rows, total


def read_features(path: Path, num_images: int) -> np.ndarray | None:
    try:
        features = np.load(require_whole(path), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (ValueError, OSError, EOFError) as error:
        raise DamagedFile(f"{path}: {error}") from None
    if features.ndim != 2 or len(features) != num_images or features.shape[1] < 1 or features.dtype.kind != "f":
        raise DamagedFile(f"{path}: {features.dtype} {features.shape}, but the run has {num_images} images")
    return features


def read_curves(path: Path) -> dict[str, Curve]:
    """Read every numeric key but step, against step; a step written again after a restart replaces the old one."""
    steps: dict[str, array] = {}
    values: dict[str, array] = {}
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = mapping(json.loads(line))
                except (ValueError, RecursionError):
                    continue  # a line cut off when the run was stopped; the resumed run writes it again
                step = number(record.get("step"))
                if step is None:
                    continue
                for name, value in record.items():
                    if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                        continue
                    finite = number(value)
                    steps.setdefault(name, array("d")).append(step)
                    values.setdefault(name, array("d")).append(math.nan if finite is None else finite)
    except FileNotFoundError:
        return {}
    curves = {}
    for name in steps:
        ascending, last = np.unique(np.array(steps[name])[::-1], return_index=True)
        curves[name] = Curve(ascending, np.array(values[name])[::-1][last])
    return curves
