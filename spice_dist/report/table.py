"""Format the scores of finished runs for a terminal."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist import artifacts
from spice_dist.data.files import printable
from spice_dist.report.reading import OF_FEATURES, RESULT, SCORES, Run, load, mapping, number

WIDTH = 28  # of the methods' names: "Supervised (250 labels)"
MOST_CLASSES = 12  # of which each is named
BASELINES = ("Pixels + k-means", *OF_FEATURES.values())
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
        lines += _better_baselines(loaded.scores)
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


def _better_baselines(scores: dict[str, dict[str, float] | None]) -> list[str]:
    """Return a line that names the baselines of a higher ACC than the result, the last row, if there are any."""
    accuracy = {method: row["acc"] for method, row in scores.items() if row and "acc" in row}
    result = list(accuracy.values())[-1:]
    better = [name for name in accuracy if name in BASELINES and [accuracy[name]] > result]
    return [f"of a higher ACC than the result: {', '.join(better)}"] if better else []


def format_seeds(runs: Sequence[Path]) -> str:
    """Format the mean ± standard deviation (of a sample) of every score over several runs, as in published tables.

    Runs are averaged that differ in the seed alone. The others stand alone, as corrected runs do.
    """
    alike: dict[str, list[Run]] = {}
    for run in map(load, runs):
        alike.setdefault(_settings(run), []).append(run)
    tables = [_format_alike(of_one) for of_one in alike.values()]
    if len(alike) > 1:
        tables.append("Only runs that differ in the seed alone are averaged.")
    return "\n\n".join(tables)


def _settings(run: Run) -> str:
    """Return what the seeds of one experiment have in common: configuration and images."""
    if "applied" in run.config:
        return str(run.folder.resolve())
    config = {name: value for name, value in mapping(run.config.get("config")).items() if name != "seed"}
    images = _names_of_images(run.folder)
    return json.dumps([config, images, run.metrics.get("method")], sort_keys=True, default=str)


def _format_alike(runs: Sequence[Run]) -> str:
    lines = [runs[0].labels_note, ""] if runs[0].labels_note else []
    lines.append(f"{len(runs)} runs, mean ± standard deviation" if len(runs) > 1 else str(runs[0].folder))
    labelled = _rows([run for run in runs if run.has_labels])
    if labelled:
        lines.append(" " * WIDTH + "".join(f"{HEADINGS[name]:>15}" for name in SCORES))
        for method in labelled[0]:
            of_method = [scores.get(method) or {} for scores in labelled]
            cells = "".join(f"{_spread([scores.get(name) for scores in of_method]):>15}" for name in SCORES)
            lines.append(f"{method:<{WIDTH}}{cells}")
    else:
        lines.append("No true labels, so no ACC, NMI or ARI.")
    selected = [mapping(run.metrics.get("select")) for run in runs]
    names = [name for name in selected[0] if all(name in values for values in selected)]
    spreads = (f"{name} {_spread([number(values[name]) for values in selected])}" for name in names)
    return "\n".join([*lines, "", "without labels: " + ", ".join(spreads)])


def _rows(runs: Sequence[Run]) -> list[dict[str, dict[str, float] | None]]:
    """Return the score rows of each run under equal names, though the result of one may be what another's is not."""
    if len({tuple(run.scores) for run in runs}) <= 1:
        return [run.scores for run in runs]
    plain = [{name.removesuffix(RESULT): scores for name, scores in run.scores.items()} for run in runs]
    common = [name for name in plain[0] if all(name in rows for rows in plain)]
    finals = [[*run.scores.values()][-1] for run in runs]  # the result is the last row
    return [
        {name: rows[name] for name in common} | {"Result": final} for rows, final in zip(plain, finals, strict=True)
    ]


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


def _names_of_images(run: Path) -> str:
    """Hash the names of a run's images."""
    try:
        return hashlib.sha256(artifacts.paths_file(run).read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def _spread(values: Sequence[float | None]) -> str:
    known = np.array([np.nan if value is None else value for value in values])
    return f"{known.mean():.3f}" + (f" ± {known.std(ddof=1):.3f}" if len(known) > 1 else "")
