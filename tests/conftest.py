"""Small real data and settings that the tests of the pipeline share."""

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # the machines that run this have two cores, and equal threads give equal bits
_home = tempfile.TemporaryDirectory(prefix="spice-home-")
os.environ["XDG_DATA_HOME"] = _home.name  # the key that seals packed files, in place of the user's own
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
# what processes of a group are forked from: importing torch and the package takes each of them seconds otherwise
multiprocessing.set_forkserver_preload(["tests.methods.workers"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where processes share the tests, let one take a whole folder, or a file outside of them, with its fixtures.

    The places whose tests start Ray are one, so that one Ray runs at a time.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByPlace(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            place = Path(nodeid.split("::")[0]).relative_to("tests").parts[0]
            return "sweep" if place in ("test_ray.py", "test_predict_cluster.py") else place

    return ByPlace(config, log)


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the first 200 digits packed: read only."""
    from dataclasses import replace

    from spice_dist.data.ingest import ingest
    from spice_dist.data.sources import open_source

    run = tmp_path_factory.mktemp("digits")
    source = open_source("digits")
    assert source.labels is not None
    few = replace(source, paths=source.paths[:200], labels=source.labels[:200])
    ingest(few, run / "data", size=8)
    return run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The assignments that one process, without Ray and never stopped, makes of the settings LONGER."""
    from tests.test_cli import LONGER, run

    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run("fit", "digits", "--out", out, *LONGER) == 0
    return (out / "assignments.csv").read_bytes()
