"""Each training loop on 200 real digits, as a function of the run folder, small enough for seconds."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_dist.config import Config, override
from spice_dist.distributed.worker import LocalWorker, Worker
from spice_dist.methods import byol, features, imc_swav, moco, reliable, scan, spice_self_joint, spice_semi
from spice_dist.recipes import digits

CPU = torch.device("cpu")
SMALL = override(
    digits(),
    {
        "backbone.widths": (8, 8, 16, 32),
        "moco.epochs": 3,
        "moco.batch": 64,
        "moco.queue": 128,
        "byol.epochs": 3,
        "byol.batch": 64,
        "byol.warmup": 1,
        "byol.hidden": 64,
        "byol.dim": 16,
        "imc_swav.epochs": 3,
        "imc_swav.batch": 64,
        "imc_swav.warmup": 2,
        "imc_swav.dim": 16,
        "imc_swav.prototypes": 24,
        "imc_swav.hidden": 32,
        "imc_swav.classifiers": 2,
        "imc_swav.extra_clusters": (7,),
        "spice_self.epochs": 4,
        "spice_self.heads": 3,
        "spice_semi.steps": 8,
        "spice_semi.labelled": 16,
        "scan.epochs": 2,
        "scan.batch": 64,
        "scan.heads": 3,
        "self_label.epochs": 2,
        "self_label.batch": 64,
        "self_label.threshold": 0.15,
    },
)
TRAIN: dict[str, Callable[[Config, Worker], None]] = {
    "moco": lambda config, worker: moco.train(config, config.moco, worker),
    "byol": lambda config, worker: byol.train(config, config.byol, worker),
    "imc_swav": lambda config, worker: imc_swav.train(config, config.imc_swav, worker),
    "spice_self": lambda config, worker: spice_self_joint.loop_of(config.spice_self)(config, config.spice_self, worker),
    "spice_semi": lambda config, worker: spice_semi.train(config, config.spice_semi, worker),
    "scan": lambda config, worker: scan.train(config, config.scan, worker),
    "self_label": lambda config, worker: scan.self_label(config, config.self_label, worker),
}


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path) -> Path:
    """A run folder with every stage trained on one worker: read only."""
    run = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(digits_folder, run)
    TRAIN["moco"](SMALL, LocalWorker(run, "moco", CPU))
    TRAIN["byol"](SMALL, LocalWorker(run, "byol", CPU))
    TRAIN["imc_swav"](SMALL, LocalWorker(run, "imc_swav", CPU))
    features.embed(SMALL, None, LocalWorker(run, "features", CPU))
    TRAIN["spice_self"](SMALL, LocalWorker(run, "spice_self", CPU))
    reliable.select(SMALL, SMALL.reliable, LocalWorker(run, "reliable", CPU))
    for stage in ("spice_semi", "scan", "self_label"):
        TRAIN[stage](SMALL, LocalWorker(run, stage, CPU))
    return run


@pytest.fixture
def without_stage(small_run: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the run in which one stage has not begun."""

    def copy(stage: str) -> Path:
        run = tmp_path / stage
        shutil.copytree(small_run, run)
        shutil.rmtree(run / stage)
        return run

    return copy


@pytest.fixture
def smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks without ReLU's kink, where float32 and float64 may take different sides: 3 % of a gradient was seen."""
    monkeypatch.setattr(nn.ReLU, "forward", lambda _, x: F.silu(x))
    monkeypatch.setattr(torch, "relu", F.silu)


def kept_above(margin: Tensor, fraction: float) -> Tensor:
    """Which of (n,) margins over a threshold a run kept, by its `fraction`: rounding decides within 1e-4 alone."""
    count = fraction * len(margin)
    assert count == pytest.approx(round(count), abs=1e-3), "a whole number of them"
    kept = margin.argsort(descending=True).argsort() < round(count)
    assert (margin[kept] > -1e-4).all()
    assert (margin[~kept] < 1e-4).all()
    return kept
