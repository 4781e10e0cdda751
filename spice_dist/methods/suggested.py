"""Suggest the number of clusters where none is given, and train later stages with it."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spice_dist import artifacts
from spice_dist.data.files import publish_json
from spice_dist.distributed.worker import Worker
from spice_dist.suggest import Suggestion, suggest
from spice_dist.task import AUTO, Task


def suggest_clusters(task: Task, config: None, worker: Worker) -> None:
    """Write `suggest/suggestion.json`, the fields of a `Suggestion` for the clustered images."""
    features = artifacts.features(worker.run, artifacts.manifest(worker.run).clustered)

    def progress(done: int, total: int) -> None:
        worker.progress(done, total, None)

    publish_json(artifacts.suggestion_file(worker.run), asdict(suggest(features, task.seed, progress=progress)))


def read_suggestion(run: Path) -> Suggestion | None:
    """Read the run's suggestion; None if it has none."""
    found = artifacts.suggestion(run)
    return Suggestion(**found) if found is not None else None


def with_suggested_clusters(task: Task, run: Path) -> Task:
    """Return the task with the suggested number of clusters if it names none; 2 if no groups stand out."""
    if task.clusters != AUTO:
        return task
    suggestion = read_suggestion(run)
    return replace(task, clusters=max(2, suggestion.clusters) if suggestion else 2)


def follow(train: Callable[[Task, Any, Worker], None], task: Task, config: Any, worker: Worker) -> None:
    """Call `train` with the suggested number of clusters, if none is given."""
    train(with_suggested_clusters(task, worker.run), config, worker)
