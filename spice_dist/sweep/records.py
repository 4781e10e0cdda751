"""The plan that the trials of a sweep share, and the folder and record of each trial."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from spice_dist.config import Config
from spice_dist.data import checksums
from spice_dist.data.checksums import publish_sealed, read_sealed
from spice_dist.errors import DamagedFile
from spice_dist.sweep.spaces import Start

# RUNNING is also the state of a trial that was cut off and resumes in a later call
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
Settings = Mapping[str, Any]
"""Values of the searched settings by their dotted names."""
Scores = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """What the trials of a sweep share."""

    folder: Path  # the sweep's: `base` is the run that they share, `trials` holds theirs
    config: Config  # whose searched settings a trial changes
    start: Start
    reliable: bool  # whether a trial goes on to the reliable labels
    threads: int = 1
    workers: int = 0  # training processes of stage 1; 0: the trial's own process

    @property
    def base(self) -> Path:
        return self.folder / "base"


@dataclass(frozen=True)
class Record:
    """The contents of trial.json, in this order."""

    state: str  # RUNNING, FINISHED, STOPPED or FAILED
    reason: str  # why the trial has no result; empty if it has one
    started: float  # when its first attempt began, in seconds since 1970
    seconds: float  # of work, in all attempts
    settings: dict[str, Any]
    scores: Scores


def trial_folder(plan: Plan, settings: Settings) -> Path:
    """Return the folder of these settings, in which an unfinished trial of them resumes."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return plan.folder / "trials" / sha256(text.encode()).hexdigest()[:12]


def write_record(folder: Path, record: Record) -> None:
    """Write trial.json, with the SHA-256 of the clustering of a finished trial."""
    folder.mkdir(parents=True, exist_ok=True)
    clusters = folder / "clusters.npy"
    sums = {clusters.name: checksums.sha256(clusters)} if record.state == FINISHED and clusters.exists() else {}
    publish_sealed(folder / "trial.json", asdict(record) | {"seconds": round(record.seconds, 3), "sha256": sums})


def read_record(folder: Path) -> Record | None:
    """Return the record of the trial in this folder; None if it has not begun.

    Raises:
        DamagedFile: the record was altered, and what the trial has found may be wrong.
    """
    path = folder / "trial.json"
    try:
        values = read_sealed(path)
        return Record(**{field.name: values[field.name] for field in fields(Record)})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged ({error}); remove {folder} to run this trial again") from error


def complete_record(folder: Path, settings: Settings, state: str, reason: str, scores: Scores) -> Record | None:
    """Write the end of a trial whose own process wrote none; one that ended as RUNNING stays as it is.

    Returns the trial's record, as `read_record` does.
    """
    record = read_record(folder)
    if state != RUNNING and (record is None or record.state == RUNNING):
        now = time.time()
        started = record.started if record else now
        record = Record(state, reason, started, now - started, dict(settings), scores)
        write_record(folder, record)
    return record
