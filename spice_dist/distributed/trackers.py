"""Send metrics of training to MLflow and Weights & Biases, through their own libraries, if a user asks for it.

The command passes the trackers' names and the servers' addresses to the first worker as environment variables. It
passes no secrets: these must be on the machine of that worker.
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
from spice_dist.redaction import hidden, without_secrets

TRACK = "SPICE_DIST_TRACK"  # such as "mlflow,wandb"
PLACES = ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY")
# a lost server must not delay training by minutes, and no telemetry is sent
DEFAULTS = {
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
        runs = self.client.search_runs([experiment], f"tags.spice_dist_id = '{identity}'", max_results=1)
        if runs:
            self.id = runs[0].info.run_id
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
    """A run of the project "spice_dist"; RUN/wandb holds what is not sent yet, in offline mode for `wandb sync`."""

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
    """Let this process, and the workers that it starts later, report to these trackers and no other.

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
    """Return the names of the trackers that were requested, in this process or in the one that started it."""
    return [name for name in os.environ.get(TRACK, "").split(",") if name]


def environment() -> dict[str, str]:
    """Return the variables by which a worker on another machine reports to the same place; no secrets."""
    return {name: os.environ[name] for name in (TRACK, *PLACES) if name in os.environ}


def check(names: Sequence[str]) -> None:
    """Raise UserError if there is no such tracker or its library is missing; set DEFAULTS."""
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
    """Open a tracker for each name; one that fails is left out with a warning, since it must not end a run.

    A stage that resumes goes on with its earlier tracking run, which RUN/STAGE/tracking_id names.

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
    """Log to each tracker; return those that took it. One that fails is dropped with a warning."""
    working = []
    for tracker in trackers:
        try:
            tracker.log(step, metrics)
            working.append(tracker)
        except Exception as error:  # of any kind, as above
            warnings.warn(
                f"{tracker.name} takes no more metrics, from step {step} on ({_brief(error)}); training goes on",
                stacklevel=2,
            )
    return working


def close(trackers: list[Tracker]) -> None:
    """Close each tracker; errors are ignored."""
    for tracker in trackers:
        with contextlib.suppress(Exception):  # the metrics themselves were taken
            tracker.close()


def _identity(path: Path) -> str:
    """Return the random name in the file, which is made if it is missing; it moves with the folder."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with publish(path) as file:
            file.write(secrets.token_hex(8).encode())
    return path.read_text()


def _experiment(client: Any) -> str:
    """Return the id of our experiment, which is made if it is missing."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(PROJECT)
    if experiment is None:
        with contextlib.suppress(MlflowException):  # another run made it first
            return client.create_experiment(PROJECT)
        experiment = client.get_experiment_by_name(PROJECT)
    if experiment is None:
        raise UserError(f"MLflow neither has nor makes an experiment {PROJECT!r}")
    return experiment.experiment_id


def _reach_mlflow() -> None:
    from mlflow.tracking import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri or _is_relative(uri):
        raise UserError(
            f"MLFLOW_TRACKING_URI is {without_secrets(uri)!r}, but workers run in folders of their own: "
            "set it to a server, such as http://host:5000, or to a whole path"
        )
    try:
        MlflowClient().get_experiment_by_name(PROJECT)
    except Exception as error:  # of any kind, as above
        raise UserError(f"MLflow does not answer at {without_secrets(uri)}: {_brief(error)}") from error


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
    text = hidden(lines[0], os.environ.get("MLFLOW_TRACKING_URI", "")) if lines else type(error).__name__
    return text[:200]
