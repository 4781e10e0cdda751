"""The model card, `model/README.md`: what the model is, what it was made of, how far to trust it, how to use it.

It names no path of this machine. Its front matter is what the Hugging Face hub reads.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist import artifacts
from spice_dist.assignments import read_assignments
from spice_dist.data.decode import FITS
from spice_dist.data.files import publish
from spice_dist.data.manifest import Ingested
from spice_dist.errors import UserError
from spice_dist.group_names import labels_of, plain
from spice_dist.models.pretrained import PACKAGE, PACKAGED, TIMM, published
from spice_dist.report.reading import mapping, number, read_json

GROUPS_SHOWN = 200
SCORES = {"acc": "ACC", "nmi": "NMI", "ari": "ARI"}
COMPARED = {"kmeans_pixels": "k-means of pixels", "kmeans_features": "k-means of features"}
COMPARED |= {"spectral": "spectral clustering of features", "umap_kmeans": "UMAP and k-means of features"}
LITERAL = re.compile(r"[!-+/:-@\[-`{-~]|\.(?!\d)")  # what Markdown or HTML could read; a comma or minus is none


def write_card(run: Path) -> None:
    """Write the card of a run's model; UserError if the run has not finished or the file cannot be written."""
    metrics = read_json(artifacts.metrics_file(run))
    about = read_json(artifacts.model(run) / "model.json")
    if metrics is None or about is None:
        raise UserError(f"{run} holds no finished run; give the folder that fit wrote")
    backbone = _started_from(run, about)
    parts = [
        _front_matter(licence(backbone)),
        _head(metrics),
        _data(artifacts.manifest(run), about),
        _groups(run, metrics),
        _network(about, backbone),
        _scores(metrics),
        LIMITS,
        USE,
    ]
    with publish(artifacts.card_file(run)) as file:
        file.write("\n".join(parts).encode())


def literal(text: str) -> str:
    """Return text that Markdown and HTML show as it is: punctuation as numbered entities, one printable line."""
    return LITERAL.sub(lambda match: f"&#{ord(match[0])};", plain(text))


def licence(backbone: dict[str, Any] | None) -> str:
    """Return the licence of the weights that the network started from as SPDX writes it in small letters.

    It is "other" for several networks of different ones, and "" if it is not known or the weights were random.
    """
    if backbone is None:
        return ""
    others = list(backbone.get("others") or ())
    weights = list(backbone.get("other_weights") or [backbone.get("weights")] * len(others))
    pairs = zip([backbone.get("name"), *others], [backbone.get("weights"), *weights], strict=False)
    licences = {_licence_of(str(name), str(source or "")) for name, source in pairs}
    return licences.pop() if len(licences) == 1 else "other"


def _licence_of(name: str, weights: str) -> str:
    if weights == PACKAGE and (entry := PACKAGED.get(name.removesuffix(".in1k"))):
        return entry.licence.lower()
    if weights != TIMM:
        return ""
    try:
        found = (published(name).license or "").lower()
    except UserError:
        return ""
    return found if re.fullmatch("[a-z0-9.-]+", found) else ""


def _started_from(run: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings of the network that the model started from; None if they are not known.

    Stage 3 may train another network than stage 1's, from random weights.
    """
    backbone = mapping(mapping((read_json(artifacts.config_file(run)) or {}).get("config")).get("backbone"))
    same = backbone.get("name") == mapping(about.get("backbone")).get("name")
    return backbone if same and backbone else None


def _front_matter(licence: str) -> str:
    lines = [f"license: {licence}"] if licence else []
    lines += ["library_name: spice_dist", "tags:", "- image-clustering", "- unsupervised", "- spice"]
    return "\n".join(["---", *lines, "---", ""])


def _head(metrics: dict[str, Any]) -> str:
    n, clusters = number(metrics.get("n")) or 0, number(metrics.get("k")) or 0
    labels = "with true labels of some of them" if metrics.get("uses_labels") else "without labels"
    return (
        f"# {clusters:,.0f} groups of {n:,.0f} images\n\n"
        f"This model puts an image into one of {clusters:,.0f} groups, which it learnt from {n:,.0f} images {labels}\n"
        f"(spice_dist, method {literal(str(metrics.get('method')))}). Names of groups, if any, were given afterwards.\n"
        f"{_trust(mapping(metrics.get('verdict')))}"
    )


def _trust(verdict: dict[str, Any]) -> str:
    level, why, remedy = (literal(str(verdict.get(name) or "")) for name in ("level", "why", "remedy"))
    return f"\nHow far to trust the groups: **{level}**: {why}{f'; {remedy}' if remedy else ''}.\n" if level else ""


def _data(manifest: Ingested, about: dict[str, Any]) -> str:
    data = mapping(about.get("data"))
    size, colour = data.get("size"), "grey" if data.get("channels") == 1 else "colour"
    square = FITS[data.get("fit", "crop")]
    rows = {
        "images": f"{manifest.n:,}",
        "as the network sees them": f"{size} x {size} pixels, {colour}: {square}, resized",
        "left out, unreadable": f"{manifest.bad:,}",
        "exact copies of others": f"{manifest.duplicates:,}",
        "held out, not learnt from": f"{manifest.held_out:,}",
        "fingerprint of names and pixels": manifest.fingerprint[:16],
    }
    return "## Data\n\n" + _table(("", ""), list(rows.items()))


def _groups(run: Path, metrics: dict[str, Any]) -> str:
    cluster, confidence, _ = read_assignments(artifacts.assignments_file(run))
    labels = labels_of(artifacts.model(run), int(number(metrics.get("k")) or 0))
    rows = []
    for index, label in enumerate(labels[:GROUPS_SHOWN]):
        members = confidence[cluster == index]
        mean = f"{np.mean(members):.2f}" if len(members) else "-"
        rows.append((str(index), literal(label), f"{len(members):,}", mean))
    table = _table(("number", "name", "images", "mean confidence"), rows)
    more = f"\nand {len(labels) - GROUPS_SHOWN:,} more\n" if len(labels) > GROUPS_SHOWN else ""
    return "## Groups\n\n" + table + more


def _network(about: dict[str, Any], backbone: dict[str, Any] | None) -> str:
    own = mapping(about.get("backbone"))
    names = " + ".join(str(name) for name in [own.get("name"), *(own.get("others") or ())])
    stem = "" if own.get("stem") == "native" else f", stem {literal(str(own.get('stem')))}"
    rows = [
        ("network", literal(names) + stem),
        ("started from", _source(backbone)),
        ("licence of these weights", literal(licence(backbone)) or "not known"),
        ("mean of the input", _numbers(own.get("mean"))),
        ("deviation of the input", _numbers(own.get("std"))),
    ]
    return "## Network\n\n" + _table(("", ""), rows)


def _source(backbone: dict[str, Any] | None) -> str:
    if backbone is None:
        return "not recorded"
    kinds = {"": "random weights", PACKAGE: "weights of a Python package", TIMM: "weights that timm publishes"}
    return kinds.get(str(backbone.get("weights") or ""), "a file of weights")


def _numbers(values: object) -> str:
    return ", ".join(f"{number(value) or 0:g}" for value in values) if isinstance(values, list) else "-"


def _scores(metrics: dict[str, Any]) -> str:
    rows = [("this model's groups", metrics.get("eval"))]
    rows += [(title, mapping(metrics.get("baselines")).get(name)) for name, title in COMPARED.items()]
    known = [
        (title, *(f"{100 * (number(scores.get(score)) or 0):.1f}" for score in SCORES))
        for title, scores in rows
        if isinstance(scores, dict)
    ]
    if known:
        return "## Scores\n\nBy true labels, which only score, in percent.\n\n" + _table(("", *SCORES.values()), known)
    agreement = number(mapping(metrics.get("select")).get("agreement"))
    text = "There are no true labels to score with.\n"
    if agreement is not None:
        text += f"Clusterings of different starts agree by {agreement:.2f} (mean adjusted Rand index).\n"
    return "## Scores\n\n" + text


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


LIMITS = """## Limits

- Groups are by look. One may hold several kinds of thing, and one kind may be in two groups.
- Every image gets a group, also one unlike all that the model has seen; a high confidence is no proof.
- The images that it learnt from decide what it separates; images of another source may be grouped by their source.
- It is not made to decide about people.
"""
USE = """## Use

In a terminal, with this folder or the run that it is from:

```bash
spice-dist predict MODEL_FOLDER new_photos/ --out new.csv
```

In Python:

```python
from pathlib import Path

import torch

from spice_dist.model_folder import load_model

net, task = load_model(Path("MODEL_FOLDER"), torch.device("cpu"))
# net: normalised images (B, C, H, W) -> logits (B, K); task: their size, mean and deviation
```

`spice-dist export RUN --to onnx` and `--to timm` write the network for other programs.
"""
