"""Metrics reach MLflow and Weights & Biases through their own libraries, and neither of them can cost a run."""

import json
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spice_dist.distributed import trackers
from spice_dist.distributed.metric_log import MetricLog
from spice_dist.distributed.trackers import Tracker
from spice_dist.distributed.worker import LocalWorker, StageCall, Worker
from spice_dist.errors import Interrupted, UserError
from spice_dist.task import Task

CPU = torch.device("cpu")
GONE = "http://127.0.0.1:1"


def is_ours(name: str) -> bool:
    return name.startswith(("MLFLOW_", "WANDB_", "SPICE_DIST_"))


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path) -> Iterator[None]:
    """Nothing of the caller's accounts, and nothing left behind for the next test; what Ray sets, it needs again."""
    for name in filter(is_ours, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    for name in filter(is_ours, list(os.environ)):
        del os.environ[name]


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    """A client of a new file store, which mlflow-skinny can write without a database."""
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return MlflowClient()


def train(run: Path, stop_after: int = 10**9, total: int = 4) -> None:
    """A stage whose loss is its step, saved at its end or where it is stopped."""
    steps = []
    worker = LocalWorker(run, "moco", CPU, stop_requested=lambda: len(steps) >= stop_after)
    saved = worker.resume()
    for step in range(saved.step if saved else 0, total):
        steps.append(step)
        loss = torch.tensor(float(step + 1))
        worker.report(step + 1, total, loss, lambda: {"state": {"x": torch.zeros(1)}})


def mlflow_runs(client) -> list:
    experiment = client.get_experiment_by_name("spice_dist")
    return client.search_runs([experiment.experiment_id])


def history(client, run) -> list[tuple[int, float]]:
    return [(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, "loss")]


def test_mlflow_gives_back_the_numbers_of_a_stage(mlflow, tmp_path):
    trackers.request(["mlflow"])
    train(tmp_path / "cats")
    (found,) = mlflow_runs(mlflow)
    assert found.info.run_name == "cats/moco"
    assert found.info.status == "FINISHED"
    assert history(mlflow, found) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_a_stage_that_resumes_goes_on_with_its_mlflow_run(mlflow, tmp_path):
    trackers.request(["mlflow"])
    with pytest.raises(Interrupted):
        train(tmp_path / "cats", stop_after=2)
    (stopped,) = mlflow_runs(mlflow)
    assert stopped.info.status == "FINISHED"
    train(tmp_path / "cats")
    (found,) = mlflow_runs(mlflow)
    assert found.info.run_id == stopped.info.run_id
    assert history(mlflow, found) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_a_running_stage_is_running_in_mlflow_also_after_it_resumed(mlflow, tmp_path):
    for _ in range(2):
        (tracker,) = trackers.open_trackers(["mlflow"], tmp_path / "cats", "moco")
        assert [run.info.status for run in mlflow_runs(mlflow)] == ["RUNNING"]
        tracker.close()


def test_other_stages_other_folders_and_a_folder_made_anew_are_other_runs(mlflow, tmp_path):
    places = [("cats", "moco"), ("cats", "spice_semi"), ("dogs", "moco")]
    for name, stage in places:
        trackers.open_trackers(["mlflow"], tmp_path / name, stage)
    (tmp_path / "cats/moco/tracking_id").unlink()
    trackers.open_trackers(["mlflow"], tmp_path / "cats", "moco")
    assert sorted(run.info.run_name for run in mlflow_runs(mlflow)) == [
        *("cats/moco", "cats/moco", "cats/spice_semi", "dogs/moco")
    ]


def offline_records(folder: Path) -> list:
    """The (step, loss) that Weights & Biases has written for a later `wandb sync`: a LevelDB log of one short block."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, at, found = path.read_bytes(), 7, []
    assert len(content) < 2**15, "else a record may be in parts"
    while at < len(content):
        _, length, kind = struct.unpack_from("<IHB", content, at)
        assert kind == 1, "a whole record"
        record = Record.FromString(content[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found.append((items["_step"], items["loss"]))
    return found


def test_wandb_writes_the_numbers_of_a_stage_for_its_sync(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.request(["wandb"])
    train(tmp_path / "cats")
    assert offline_records(tmp_path / "cats") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    identity = (tmp_path / "cats/moco/tracking_id").read_text()
    assert [path.name for path in tmp_path.glob("cats/wandb/offline-run-*/*.wandb")] == [f"run-{identity}.wandb"]


def test_each_tracker_is_asked_once_and_only_if_it_can_be_reached(mlflow, monkeypatch):
    trackers.request(["mlflow", "mlflow"])
    assert trackers.requested() == ["mlflow"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", GONE)
    trackers.request([])
    with pytest.raises(UserError):
        trackers.request(["mlflow"])
    assert trackers.requested() == []


def test_nobody_is_told_unless_asked(tmp_path):
    trackers.request([])
    train(tmp_path / "cats")
    assert not (tmp_path / "cats/moco/tracking_id").exists()
    assert trackers.requested() == []


class Failing:
    """A tracker whose server goes away after the first line."""

    name = "failing"

    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("connection refused\nand a long story")

    def close(self) -> None:
        raise ConnectionError


def test_a_tracker_that_fails_is_warned_about_once_and_dropped(tmp_path):
    failing = Failing()
    assert isinstance(failing, Tracker)
    log = MetricLog(tmp_path, 0, [failing])
    log.write(1, {"loss": 1.0})
    with pytest.warns(UserWarning, match=r"failing takes no more metrics, from step 2 on \(connection refused\)"):
        log.write(2, {"loss": 2.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.write(3, {"loss": 3.0})
    assert failing.calls == 2
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_does_not_close_harms_nothing(tmp_path):
    MetricLog(tmp_path, 0, [Failing()]).close()


def test_a_server_that_is_gone_when_a_stage_begins_costs_a_warning(monkeypatch, tmp_path):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", GONE)
    monkeypatch.setenv(trackers.TRACK, "mlflow")
    with pytest.warns(UserWarning, match="mlflow does not take metrics"):
        train(tmp_path / "cats")
    assert len((tmp_path / "cats/moco/metrics.jsonl").read_text().splitlines()) == 4


def test_a_server_that_is_gone_before_training_is_one_line(monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", GONE)
    with pytest.raises(UserError, match=f"MLflow does not answer at {GONE}") as told:
        trackers.request(["mlflow"])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("uri", [None, "mlruns", "./mlruns", "sqlite:///mlflow.db", "file:mlruns"])
def test_mlflow_needs_a_place_that_every_worker_finds(monkeypatch, uri):
    pytest.importorskip("mlflow")
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match="set it to a server"):
        trackers.request(["mlflow"])


@pytest.mark.parametrize(
    "uri", ["http://host:5000", "file:///a/b", "/a/b", "sqlite:////a/b.db", "postgresql://h/d", "databricks"]
)
def test_servers_and_whole_paths_are_places(uri):
    assert not trackers._is_relative(uri)


def test_wandb_without_an_account_is_one_line():
    pytest.importorskip("wandb")
    with pytest.raises(UserError, match="wandb login"):
        trackers.request(["wandb"])


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_library_is_one_line_that_says_how_to_get_it(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: trackers.request([name]), lambda: trackers.open_trackers([name], tmp_path, "moco")):
        with pytest.raises(UserError, match=f"pip install {name}"):
            call()
    assert trackers.requested() == []


def test_an_unknown_tracker_is_told_with_the_known_ones():
    with pytest.raises(UserError, match="no tracker 'excel'; there are mlflow, wandb"):
        trackers.request(["excel"])


def test_workers_elsewhere_learn_the_places_and_no_secret(monkeypatch, mlflow):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    trackers.request(["mlflow"])
    assert trackers.environment() == {
        "SPICE_DIST_TRACK": "mlflow",
        "MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"],
    }


def train_one_step(task: Task, config: None, worker: Worker) -> None:
    worker.resume()
    worker.report(1, 1, torch.tensor(7.0), lambda: {"state": {"x": torch.zeros(1)}})


@pytest.mark.slow
def test_the_first_of_two_ray_workers_reports(mlflow, tmp_path):
    from spice_dist.distributed import ray_elastic
    from spice_dist.distributed.ray_train import Job, session

    with session(None, num_cpus=2):
        trackers.request(["mlflow"])  # after Ray has started, so that its workers do not just inherit it
        job = Job((StageCall("moco", train_one_step, Task(), None),), tmp_path / "cats", 1, lambda: False, print, print)
        ray_elastic.train(job, (2,))
    (found,) = mlflow_runs(mlflow)
    assert found.info.status == "FINISHED"
    assert history(mlflow, found) == [(1, 7.0)]
