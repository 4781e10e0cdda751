"""Format the scores of finished runs for a terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist import artifacts
from spice_dist.data.files import printable
from spice_dist.errors import UserError
from spice_dist.report.reading import SCORES, load, mapping, number

WIDTH = 28  # of the methods' names: "Supervised (250 labels)"
MOST_CLASSES = 12  # of which each is named
HEADINGS = {"acc": "ACC", "nmi": "NMI", "ari": "ARI", "nmi_geometric": "NMI geo", "ami": "AMI"}


def format_scores(run: Path) -> str:
    """Format every method's scores against true labels, where there are any, and the label-free numbers."""
    loaded = load(run)
    lines = [loaded.trust] if loaded.trust else []
    lines += [loaded.labels_note, ""] if loaded.labels_note else []
    if loaded.has_labels:
        lines.append(" " * WIDTH + "".join(f"{HEADINGS[name]:>9}" for name in SCORES))
        for method, scores in loaded.scores.items():
            cells = "".join(f"{(scores or {}).get(name, float('nan')):9.3f}" for name in SCORES)
            lines.append(f"{method:<{WIDTH}}{cells}")
    else:
        lines.append("No true labels, so no ACC, NMI or ARI.")
    metrics = loaded.metrics
    if classes := mapping(metrics.get("classes")):
        lines.append(format_classes(mapping(classes.get("images")), number(classes.get("unlabelled")) or 0))
    lines += ["", f"{metrics['n']} images, {metrics['nonempty']} of {metrics['k']} clusters in use"]
    reliable = metrics["reliable"]
    if reliable["count"]:  # IMC-SwAV has none
        lines.append(f"{reliable['count']} reliable labels ({reliable['fraction']:.0%} of the images)")
    if reliable.get("advice"):
        lines.append(reliable["advice"])
    copies = metrics.get("duplicates") or {}  # runs of earlier versions have none
    if copies.get("copies"):
        where = artifacts.duplicates_file(run)
        lines.append(f"{copies['copies']} images in {copies['groups']} groups of copies: {where}")
    lines.append(
        "without labels: "
        + ", ".join(f"{name} {value:.3f}" for name, value in metrics["select"].items() if value is not None)
    )
    lines.append("time: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in metrics["seconds"].items()))
    lines += ["", f"assignments  {run / 'assignments.csv'}", f"report       {run / 'report.html'}"]
    return "\n".join(lines)


def format_classes(counts: Mapping[str, int], unlabelled: float) -> str:
    """Say in one line how many scored images each class has, of many classes the range, and how many have none."""
    if len(counts) > MOST_CLASSES:
        shown = f"{min(counts.values()):,} to {max(counts.values()):,} images each"
    else:
        shown = ", ".join(f"{printable(name)} {count:,}" for name, count in counts.items())
    without = f"; {unlabelled:,.0f} images without a label are not scored" * (unlabelled > 0)
    return f"{len(counts):,} classes: {shown}{without}"


def format_seeds(runs: Sequence[Path]) -> str:
    """Format the mean ± standard deviation (of a sample) of every score over several runs, as in published tables.

    Raises:
        UserError: the runs are of different methods or images.
    """
    loaded = [load(run) for run in runs]
    methods = sorted({run.metrics["method"] for run in loaded})
    images = {run.manifest.get("fingerprint") for run in loaded}
    if len(images) > 1:
        raise UserError("these are runs of different images, which have no common mean; give runs of the same, or one")
    if len(methods) > 1:
        raise UserError(f"these are runs of {' and '.join(methods)}; give runs of one method, or one run at a time")
    lines = [loaded[0].labels_note, ""] if loaded[0].labels_note else []
    lines.append(f"{len(runs)} runs, mean ± standard deviation")
    labelled = [run.scores for run in loaded if run.has_labels]
    if labelled:
        lines.append(" " * WIDTH + "".join(f"{HEADINGS[name]:>15}" for name in SCORES))
        for method in labelled[0]:
            of_method = [scores.get(method) or {} for scores in labelled]
            cells = "".join(f"{_spread([scores.get(name) for scores in of_method]):>15}" for name in SCORES)
            lines.append(f"{method:<{WIDTH}}{cells}")
    else:
        lines.append("No true labels, so no ACC, NMI or ARI.")
    selected = [run.metrics["select"] for run in loaded]
    spreads = (f"{name} {_spread([values.get(name) for values in selected])}" for name in selected[0])
    return "\n".join([*lines, "", "without labels: " + ", ".join(spreads)])


def as_json(runs: Sequence[Path]) -> str:
    """Return an object with one entry of `runs` for each run; a score or number that a run lacks is null."""
    return json.dumps({"runs": [_numbers(run) for run in runs]}, indent=1)


def _numbers(run: Path) -> dict[str, Any]:
    """Return what `format_scores` shows; scores by method, and where the run keeps its rows and its page."""
    loaded = load(run)
    metrics = loaded.metrics
    return {
        "run": str(run),
        "method": metrics.get("method"),
        "images": metrics.get("n"),
        "clusters": loaded.num_clusters,
        "nonempty": metrics.get("nonempty"),
        "uses_labels": bool(metrics.get("uses_labels")),
        "verdict": mapping(metrics.get("verdict")) or None,
        "scores": loaded.scores,
        "classes": mapping(metrics.get("classes")) or None,
        "reliable": mapping(metrics.get("reliable")).get("count"),
        "without_labels": {name: number(value) for name, value in mapping(metrics.get("select")).items()},
        "seconds": mapping(metrics.get("seconds")),
    }


def _spread(values: Sequence[float | None]) -> str:
    known = np.array([np.nan if value is None else value for value in values])
    return f"{known.mean():.3f} ± {known.std(ddof=1) if len(known) > 1 else 0:.3f}"
