"""Tasks for Label Studio whose predictions are the groups: a person corrects them there."""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from spice_dist.data.files import Progress, publish
from spice_dist.errors import UserError
from spice_dist.export.originals import Originals, find_originals
from spice_dist.export.result import Result, read_result
from spice_dist.group_names import plain

STEP = 1_000  # images between two calls of progress
MODEL = "spice_dist"


def export(run: Path, out: Path, source: Path | None, progress: Progress) -> list[str]:
    """Write a task for each image; return lines that say how to serve the files, and the labelling config to paste.

    Raises:
        UserError: the images have no files on this machine, or lie outside of the folder to serve.
    """
    result = read_result(run)
    originals = find_originals(run, source, next(result.names()))
    if originals is None:
        raise UserError(
            "the images of this run have no files that Label Studio could show; write them with --to folders, and give "
            "that folder to fit"
        )
    folder = Path(os.path.abspath(originals.root))
    used = {*range(result.clusters), int(result.cluster.min())}  # OUTSIDE only where an image is
    with publish(out) as file:
        for number, name in enumerate(result.names()):
            task = _task(result, number, _served(originals, folder, name))
            file.write((b",\n" if number else b"[\n") + json.dumps(task).encode("ascii"))
            if number % STEP == 0:
                progress(number, result.n)
        file.write(b"\n]\n")
        progress(result.n, result.n)
    return [
        f"wrote {out}: {result.n:,} tasks with predictions",
        "start Label Studio with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true "
        f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={plain(str(folder.parent))}",
        f"add the local storage {plain(str(folder))} to the project, paste this labelling config, import {out.name}:",
        labelling_config([result.labels[cluster] for cluster in result.labels if cluster in used]),
    ]


def labelling_config(labels: list[str]) -> str:
    """Return the XML that offers every name once."""
    choices = "\n".join(f"    <Choice value={quoteattr(label)}/>" for label in dict.fromkeys(labels))
    return (
        '<View>\n  <Image name="image" value="$image"/>\n'
        f'  <Choices name="cluster" toName="image" choice="single">\n{choices}\n  </Choices>\n</View>'
    )


def _served(originals: Originals, folder: Path, name: str) -> str:
    """Return the URL path of an image: relative to the parent of the folder, which Label Studio serves."""
    path = originals.path(name)
    if not path.is_relative_to(folder):
        raise UserError(
            f"{plain(str(path))} is not in {originals}, which Label Studio would serve; use a run of one folder"
        )
    return "/data/local-files/?d=" + quote(os.fsencode(path.relative_to(folder.parent)))


def _task(result: Result, number: int, url: str) -> dict[str, Any]:
    score = round(float(result.confidence[number]), 4)
    label = result.labels[int(result.cluster[number])]
    choice = {"from_name": "cluster", "to_name": "image", "type": "choices", "value": {"choices": [label]}}
    return {
        "data": {"image": url},
        "predictions": [{"model_version": MODEL, "score": score, "result": [choice]}],
    }
