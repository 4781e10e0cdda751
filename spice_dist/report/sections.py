"""The contents of each section of a run's page: text, numbers and charts."""

import math
import shlex
from pathlib import Path

import numpy as np
from markupsafe import Markup

from spice_dist import artifacts, catalog
from spice_dist.assignments import read_names
from spice_dist.report import charts
from spice_dist.report.evidence import Evidence
from spice_dist.report.gallery import principal_axes
from spice_dist.report.published import published
from spice_dist.report.reading import LEARN_FROM_LABELS, RESULT, SCORES, Run, mapping, number
from spice_dist.report.text import duration, percent

MAX_SMALL_CHARTS = 12  # per stage
SCORE_TITLES = {
    "acc": ("ACC", "share of images in the group matched to their class, under the best one-to-one matching"),
    "nmi": ("NMI", "mutual information of groups and classes, over the arithmetic mean of their entropies"),
    "ari": ("ARI", "agreement on pairs of images, corrected for chance: 0 is chance"),
    "nmi_geometric": ("NMI geom.", "the same over the geometric mean, as in the SPICE paper; never lower"),
    "ami": ("AMI", "mutual information corrected for chance"),
}
# of the label-free numbers by name; other names are shown with a general remark
EXPLANATIONS = {
    "generalization": "share of held-out images whose group a linear classifier recognises; higher is better",
    "consensus": "mean agreement (ARI) with the other groupings of these features; higher is better",
    "silhouette": "how much closer an image is to its own group than to the next; −1 to 1, higher is better",
    "size_entropy": "how even the group sizes are; 1 is all equal, 0 is everything in one group",
    "agreement": "mean agreement (ARI) between the heads; 1 means that all find the same groups",
    "select_loss": "loss of the chosen head, the one by which it was chosen; lower is better",
    "mean_confidence": "mean probability of the chosen group; 1 is certain",
}


def title(run: Run) -> str:
    source = run.manifest.get("source") or mapping(run.config.get("data")).get("source")
    return Path(str(source)).name if source else run.folder.resolve().name


def total_seconds(run: Run) -> float:
    seconds = map(number, mapping(run.metrics.get("seconds")).values())
    return math.fsum(value for value in seconds if value is not None)


def reliable_images(run: Run) -> tuple[int, float]:
    """Return the number of reliable labels and their share of all images, as the run recorded or else counted here."""
    recorded = mapping(run.metrics.get("reliable"))
    count, fraction = number(recorded.get("count")), number(recorded.get("fraction"))
    if count is None or fraction is None:
        return int(run.reliable.sum()), float(run.reliable.mean())
    return int(count), fraction


def final_scores(run: Run) -> tuple[str, dict[str, float]] | None:
    """Return the last row of the table that has scores, unless it is a baseline."""
    rows = [(name, row) for name, row in run.scores.items() if row and ("k-means" not in name or name.endswith(RESULT))]
    return rows[-1] if rows else None


def summary(run: Run) -> str:
    """Sum the run up in one sentence, for readers who do not know the paper."""
    filled = int((np.bincount(run.labels, minlength=run.num_clusters) > 0).sum())
    groups = f"{filled} group{'s' if filled != 1 else ''}"
    if filled < run.num_clusters:
        groups += f" (of {run.num_clusters} asked for)"
    images = "1 image was" if len(run.labels) == 1 else f"{len(run.labels):,} images were"
    text = f"{images} sorted into {groups}"
    if total_seconds(run) > 0:
        text += " in " + duration(total_seconds(run)).replace(" ", "\u00a0")
    final = final_scores(run)
    if final is None or "acc" not in final[1]:
        return text + (
            "; true labels were not given for the result."
            if run.has_labels
            else "; there are no true labels, so only label-free numbers can be shown."
        )
    scores = final[1]
    text += f"; compared with the true labels afterwards, {percent(scores['acc'])}\u00a0% of them are in the group "
    text += "that matches their class"
    baseline = run.scores.get("Features + k-means") or run.scores.get("Pixels + k-means")
    kind = "the same features" if run.scores.get("Features + k-means") else "the pixels"
    if baseline and "acc" in baseline:
        text += f", where k\u2011means on {kind} reaches {percent(baseline['acc'])}\u00a0%"
    return text + "."


def facts(run: Run) -> list[tuple[str, str, str]]:
    """Return the large numbers on top: (value, unit, name)."""
    filled = int((np.bincount(run.labels, minlength=run.num_clusters) > 0).sum())
    rows = [(f"{len(run.labels):,}", "", "images")]
    rows.append((str(filled), f"of {run.num_clusters}" if filled < run.num_clusters else "", "groups"))
    final = final_scores(run)
    if final and "acc" in final[1]:
        rows += [
            (percent(final[1][name]), "%", SCORE_TITLES[name][0]) for name in ("acc", "nmi", "ari") if name in final[1]
        ]
    else:
        rows.append((percent(float(run.confidence.mean())), "%", "mean confidence"))
    if reliable_images(run)[0]:  # IMC-SwAV has none
        rows.append((percent(reliable_images(run)[1]), "%", "reliable images"))
    if total_seconds(run) > 0:
        value, unit, *rest = duration(total_seconds(run)).split()
        rows.append((value, " ".join([unit, *rest]), "total time"))
    return rows


def score_rows(run: Run) -> list[dict]:
    """Return the rows of the table, the best value of every column marked; the paper's rows of this data set last."""
    if not run.has_labels:
        return []
    best = {
        name: max((row[name] for row in run.scores.values() if row and name in row), default=None) for name in SCORES
    }
    rows = []
    for name, row in run.scores.items():
        cells = [
            {"value": (row or {}).get(score), "best": (row or {}).get(score) == best[score]} for score in SCORE_TITLES
        ]
        rows.append({"name": name, "cells": cells, "baseline": name.startswith(("Pixels", "Features"))})
    for name, row in published(run.manifest.get("source")).items():
        cells = [{"value": row.get(score), "best": False} for score in SCORE_TITLES]
        rows.append({"name": name, "cells": cells, "baseline": True})
    return rows


def label_free(run: Run) -> list[tuple[str, str, str]]:
    """Return the numbers that need no labels: (name, value, meaning)."""
    rows = []
    advice = mapping(run.metrics.get("reliable")).get("advice")
    for name, value in mapping(run.metrics.get("select")).items():
        text = number(value)
        key = str(name).rsplit("/", 1)[-1]
        shown = str(name).replace("_", " ")
        rows.append((shown, "–" if text is None else charts.short(text), EXPLANATIONS.get(key, "recorded by the run")))
    rows.append(
        (
            "reliable images",
            f"{reliable_images(run)[0]:,}",
            "images whose group may teach the whole network: nearly all by agreement of their nearest neighbours"
            + (f". Advice: {advice}" if isinstance(advice, str) and advice else ""),
        )
    )
    rows.append(("mean confidence", charts.short(float(run.confidence.mean())), EXPLANATIONS["mean_confidence"]))
    names = [name for name, _, _ in rows]
    return [row for place, row in enumerate(rows) if row[0] not in names[:place]]


def heads(run: Run) -> list[dict]:
    """Return every head's loss and, where there are labels, accuracy; the head of lowest loss is the chosen one."""
    content = run.metrics.get("heads")
    rows = [mapping(head) for head in content] if isinstance(content, list) else []
    losses = [number(head.get("select_loss")) for head in rows]
    lowest = min((loss for loss in losses if loss is not None), default=None)
    chosen = losses.index(lowest) if lowest is not None else None
    return [
        {
            "loss": "–" if loss is None else f"{loss:.4f}",
            "acc": number(head.get("acc")),
            "chosen": place == chosen,
        }
        for place, (head, loss) in enumerate(zip(rows, losses, strict=True))
    ]


def head_selection(run: Run) -> Markup | None:
    """Draw how well the loss selects among heads and epochs; None without labels."""
    accuracy = run.head_selection
    if not {"selected", "best"} <= set(accuracy):
        return None
    return charts.line_chart(accuracy["selected"], "accuracy of the selected head", 560, 220, beside=accuracy["best"])


def sizes(run: Run) -> dict:
    count = np.bincount(run.labels, minlength=run.num_clusters)
    reliable = np.bincount(run.labels[run.reliable], minlength=run.num_clusters)
    by_size = run.num_clusters > 60
    order = np.argsort(-count, kind="stable") if by_size else np.arange(run.num_clusters)
    return {
        "chart": charts.size_chart(count, reliable, order),
        "by_size": by_size,
        "even": charts.short(len(run.labels) / run.num_clusters),
        "empty": np.flatnonzero(count == 0).tolist(),
    }


def curves(run: Run) -> list[dict]:
    """Draw per stage the loss large and the other numbers small, and list the names beyond MAX_SMALL_CHARTS."""
    stages = []
    for stage, named in run.curves.items():
        if not named:
            continue
        others = [name for name in named if name != "loss"]
        name, about = catalog.TITLES[stage]
        if stage == "spice_semi" and run.labels_note:
            name, about = LEARN_FROM_LABELS[run.metrics["method"]], "Trains the whole network, from the labels given."
        steps = max(int(curve.steps[-1]) for curve in named.values())
        stages.append(
            {
                "name": name,
                "about": about,
                "steps": f"{steps:,}",
                "averaged": any(len(curve.steps) > charts.MAX_POINTS for curve in named.values()),
                "loss": charts.line_chart(named["loss"], "loss", 560, 300) if "loss" in named else None,
                "small": [
                    (name, charts.short(float(named[name].values[-1])), charts.line_chart(named[name], name, 270, 132))
                    for name in others[:MAX_SMALL_CHARTS]
                ],
                "left_out": others[MAX_SMALL_CHARTS:],
            }
        )
    return stages


def feature_map(run: Run) -> dict | None:
    if run.features is None or len(run.labels) < 3:
        return None
    indices, points, share = principal_axes(run.features)
    labels = run.labels[indices]
    named = run.num_clusters <= 40
    return {
        "chart": charts.feature_map(points, labels, named),
        "shown": f"{len(indices):,}",
        "all": len(indices) == len(run.labels),
        "share": [percent(float(value), 0) for value in share],
        "named": named,
        "clusters": [(k, f"{n:,}") for k, n in enumerate(np.bincount(run.labels, minlength=run.num_clusters).tolist())],
    }


def durations(run: Run) -> list[tuple[str, str, float]]:
    """Return (stage, time in words, fraction of the longest)."""
    seconds = [(str(stage), number(value)) for stage, value in mapping(run.metrics.get("seconds")).items()]
    known = [(stage, value) for stage, value in seconds if value is not None and value >= 0]
    longest = max((value for _, value in known), default=0.0) or 1.0
    return [(catalog.TITLES.get(stage, (stage,))[0], duration(value), value / longest) for stage, value in known]


def manifest(run: Run) -> list[tuple[str, str]]:
    """Return what was read as (name, value); of a list its length."""
    rows = []
    for name, shown in (
        ("source", "Source"),
        ("size", "Image size"),
        ("n", "Images"),
        ("bad", "Set aside"),
        ("duplicates", "Duplicates"),
    ):
        value = run.manifest.get(name)
        if value is None:
            continue
        if name == "size":
            sides = value if isinstance(value, list) else [value, value]
            value = " × ".join(map(str, sides)) + " px"
        elif isinstance(value, list | dict):
            value = len(value)
        rows.append((shown, f"{value:,}" if isinstance(value, int) else str(value)))
    return rows


def outliers(run: Run, evidence: Evidence) -> list[dict]:
    paths = read_names(artifacts.assignments_file(run.folder), np.array([i for i, _ in evidence.outliers], np.int64))
    return [{"index": i, "path": paths[i], "distance": charts.short(distance)} for i, distance in evidence.outliers]


def copies(run: Run, evidence: Evidence) -> list[list[dict]]:
    """Return the groups of copies, the best of each first; images that the run does not have are left out."""
    wanted = np.array([int(row["index"]) for group in evidence.copies for row in group], np.int64)
    paths = read_names(artifacts.assignments_file(run.folder), wanted)
    groups = [[(int(row["index"]), row["kind"], row["best"] == "1") for row in group] for group in evidence.copies]
    names = ("index", "path", "kind", "best")
    return [
        [dict(zip(names, (i, paths[i], kind, best), strict=True)) for i, kind, best in group if i in paths]
        for group in groups
    ]


def apply_command(run: Run) -> str:
    return shlex.join(["spice-dist", "apply", str(run.folder), "edits.json"])


def command(run: Run) -> str:
    value = run.config.get("command")
    return shlex.join(map(str, value)) if isinstance(value, list) else str(value or "")
