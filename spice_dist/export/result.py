"""The rows of a run that every export of its images writes: name, cluster, confidence, reliable."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from spice_dist import artifacts
from spice_dist.assignments import read_assignments
from spice_dist.data.checksums import require_whole
from spice_dist.errors import DamagedFile, UserError
from spice_dist.group_names import OUTSIDE, labels_of, numbered
from spice_dist.report.reading import read_json


@dataclass(frozen=True)
class Result:
    """The groups of N images, in image order."""

    run: Path
    clusters: int  # K
    cluster: Int[np.ndarray, " N"]  # OUTSIDE where an image belongs to no group
    confidence: Float[np.ndarray, " N"]
    reliable: Bool[np.ndarray, " N"]
    labels: dict[int, str]  # cluster -> the name of its group, printable

    @property
    def n(self) -> int:
        return len(self.cluster)

    def names(self) -> Iterator[str]:
        """Yield the name of every image as the source gave it, a line of paths.jsonl at a time."""
        path = require_whole(artifacts.paths_file(self.run))
        try:
            with path.open("rb") as file:
                for _, line in zip(range(self.n), file, strict=True):  # a ValueError if there are more or fewer
                    yield _text(line)
        except (OSError, ValueError) as error:
            raise DamagedFile(f"{path} is not the names of {self.n:,} images ({error}): make the run again") from error


def read_result(run: Path) -> Result:
    """Read the groups of a finished run; UserError if it has not finished."""
    metrics = read_json(artifacts.metrics_file(run))
    if metrics is None:
        raise UserError(f"{run} holds no finished run (no metrics.json); give the folder that fit wrote")
    cluster, confidence, reliable = read_assignments(artifacts.assignments_file(run))
    clusters = metrics.get("k")
    if not isinstance(clusters, int) or cluster.max() >= clusters or cluster.min() < OUTSIDE:
        raise DamagedFile(f"{run}: assignments.csv has other clusters than metrics.json ({clusters!r})")
    labels = dict(enumerate(labels_of(artifacts.model(run), clusters))) | {OUTSIDE: numbered(OUTSIDE, clusters)}
    return Result(run, clusters, cluster, confidence, reliable, labels)


def utf8(name: str) -> str:
    """Return a name as valid text: bytes that are no UTF-8 become escapes such as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _text(line: bytes) -> str:
    name = json.loads(line)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{line[:80]!r} is no name")
    return name
