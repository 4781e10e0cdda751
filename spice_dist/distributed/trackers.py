"""Metrics of training for MLflow and Weights & Biases, through their own libraries, where a user asks for them.

The names travel in an environment variable, with the variables that say where the servers are, from the command to the
first worker, wherever that runs. Secrets do not: what a server asks for must be known on the machine of that worker.
"""

import contextlib
import importlib
import os
import secrets
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from spice_dist.data.files import publish
from spice_dist.errors import UserError

TRACK = "SPICE_DIST_TRACK"  # such as "mlflow,wandb"
PLACES = ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY")
DEFAULTS = {  # a server that is gone must not hold training up for minutes, and nobody else is told of it
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
PROJECT = "spice_dist"
WANDB_SECONDS = 60.0  # to start a run, and to send the rest of one that ends
WITHOUT_SERVER = ("offline", "dryrun", "disabled")


@runtime_checkable
class Tracker(Protocol):
    """One stage of one run, as a run of a tracking library. Both methods may raise whatever that library raises."""

    name: str

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Mlflow:
    """A run of the experiment "spice_dist" at MLFLOW_TRACKING_URI."""

    name = "mlflow"

    def __init__(self, run: Path, stage: str, identity: str):
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self.metric, self.client = Metric, MlflowClient()
        experiment = _experiment(self.client)
        found = self.client.search_runs([experiment], f"tags.spice_dist_id = '{identity}'", max_results=1)
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {"spice_dist_id": identity}
            self.id = self.client.create_run(experiment, tags=tags, run_name=f"{run.name}/{stage}").info.run_id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [self.metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Wandb:
    """A run of the project "spice_dist"; what is sent waits in RUN/wandb, in offline mode for `wandb sync`."""

    name = "wandb"

    def __init__(self, run: Path, stage: str, identity: str):
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",  # the progress bar is no log
            disable_git=True,
            disable_code=True,
            init_timeout=WANDB_SECONDS,
            finish_timeout=WANDB_SECONDS,
        )
        self.run = wandb.init(
            project=PROJECT,
            name=f"{run.name}/{stage}",
            dir=run,
            id=identity,
            resume="allow",
            reinit="create_new",  # not the run of another stage that this process left open
            settings=settings,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[Mlflow] | type[Wandb]] = {"mlflow": Mlflow, "wandb": Wandb}


def request(names: Sequence[str]) -> None:
    """Have this process, and the workers that it starts from now on, report to these trackers, and to no other.

    Raises:
        UserError: no such tracker, its library is missing, or it cannot be reached now.
    """
    check(names)
    if "mlflow" in names:
        _reach_mlflow()
    if "wandb" in names:
        _reach_wandb()
    os.environ[TRACK] = ",".join(dict.fromkeys(names))


def requested() -> list[str]:
    """The names of the trackers that were asked for, in this process or in the one that started it."""
    return [name for name in os.environ.get(TRACK, "").split(",") if name]


def environment() -> dict[str, str]:
    """What a worker on another machine has to know to report to the same place; no secrets."""
    return {name: os.environ[name] for name in (TRACK, *PLACES) if name in os.environ}


def check(names: Sequence[str]) -> None:
    """UserError if there is no such tracker or its library is missing; sets the defaults of those that are there."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"there is no tracker {name!r}; there are {', '.join(TRACKERS)}")
    if names:
        os.environ.update({name: value for name, value in DEFAULTS.items() if name not in os.environ})
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"to track with {name} its library is needed: pip install {name}") from error


def open_trackers(names: Sequence[str], run: Path, stage: str) -> list[Tracker]:
    """A tracker for each name; one that does not open is warned about and left out, for it must not cost a run.

    A stage that resumes goes on with its run of before: RUN/STAGE/tracking_id names it.

    Raises:
        UserError: no such tracker, or its library is missing.
    """
    check(names)
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(TRACKERS[name](run, stage, _identity(run / stage / "tracking_id")))
        except Exception as error:  # of any kind: libraries, networks and servers fail in their own ways
            warnings.warn(f"{name} does not take metrics ({_brief(error)}); {stage} goes on without", stacklevel=2)
    return opened


def log_to(trackers: list[Tracker], step: int, metrics: dict[str, float]) -> list[Tracker]:
    """Log to each; returns those that took it. One that did not is warned about, once, as it is dropped."""
    kept = []
    for tracker in trackers:
        try:
            tracker.log(step, metrics)
            kept.append(tracker)
        except Exception as error:  # of any kind, as above
            warnings.warn(
                f"{tracker.name} takes no more metrics, from step {step} on ({_brief(error)}); training goes on",
                stacklevel=2,
            )
    return kept


def close(trackers: list[Tracker]) -> None:
    """Close each; what does not close is given up."""
    for tracker in trackers:
        with contextlib.suppress(Exception):  # the metrics themselves were taken
            tracker.close()


def _identity(path: Path) -> str:
    """A random name that is kept in the file: it goes where the folder goes, and away with it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with publish(path) as file:
            file.write(secrets.token_hex(8).encode())
    return path.read_text()


def _experiment(client: Any) -> str:
    """The id of our experiment, made if it is not there."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(PROJECT)
    if found is None:
        with contextlib.suppress(MlflowException):  # another run was faster
            return client.create_experiment(PROJECT)
        found = client.get_experiment_by_name(PROJECT)
    if found is None:
        raise UserError(f"MLflow neither has nor makes an experiment {PROJECT!r}")
    return found.experiment_id


def _reach_mlflow() -> None:
    from mlflow.tracking import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri or _is_relative(uri):
        raise UserError(
            f"MLFLOW_TRACKING_URI is {uri!r}, but workers run in folders of their own: "
            "set it to a server, such as http://host:5000, or to a whole path"
        )
    try:
        MlflowClient().get_experiment_by_name(PROJECT)
    except Exception as error:  # of any kind, as above
        raise UserError(f"MLflow does not answer at {uri}: {_brief(error)}") from error


def _reach_wandb() -> None:
    import wandb

    if os.environ.get("WANDB_MODE") in WITHOUT_SERVER:
        return
    try:
        known = wandb.login(prompt=False)
    except Exception as error:  # of any kind, as above
        raise UserError(f"Weights & Biases does not let us in: {_brief(error)}") from error
    if not known:
        raise UserError("Weights & Biases does not know you: run `wandb login`, or set WANDB_MODE=offline")


def _is_relative(uri: str) -> bool:
    path = uri.removeprefix("sqlite:///").removeprefix("file:")
    return not path.startswith(("/", "databricks")) and ":" not in path


def _brief(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
