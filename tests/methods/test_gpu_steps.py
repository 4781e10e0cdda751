"""What a step does on a GPU: no method waits for it, and the trial of its memory holds what a step holds.

Counted on a pretended GPU; with the marker `gpu` CUDA looks for waits itself.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spice_dist.config import override
from spice_dist.data import augment, views
from spice_dist.distributed.worker import LocalWorker, Worker
from spice_dist.methods import plumbing, spice_graph, spice_tune
from spice_dist.methods.known_images import Bank
from spice_dist.methods.spice_tune import SpiceTuneConfig
from spice_dist.models.backbone import Backbone
from spice_dist.models.heads import ClusterHeads
from spice_dist.transfer import constant, send
from tests.methods.conftest import CPU, SMALL, TRAIN
from tests.pretend_gpu import DEVICE, OnDevice, PretendGPU, pretend_gpu

STEPS = 2  # the first fills caches, the last must not wait
LONG = 10_000  # steps of a run, for a worker: no line of metrics is due
MOST = 200 * 1024  # bytes that may cross in a step, 1 KiB for each image: rows and parameters of views
TUNE = SpiceTuneConfig(epochs=2, labelled=16, neighbors=0, head_steps=2, regroup=False)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "moco": ("moco", {}),
    "moco, symmetric": ("moco", {"moco.symmetric": True}),
    "byol": ("byol", {}),
    "imc_swav": ("imc_swav", {}),
    "imc_swav, queue": ("imc_swav", {"imc_swav.queue": 64, "imc_swav.queue_start": 0}),
    "spice_self": ("spice_self", {"spice_self.samples_per_cluster": 10}),
    "spice_self, disjoint": ("spice_self", {"spice_self.assignment": "disjoint"}),
    "spice_self, prior": ("spice_self", {"spice_self.prior": (1, 1, 1, 1, 1, 1, 1, 1, 1, 9)}),
    "spice_self, joint": ("spice_self", {"spice_self.joint": True}),
    "scan": ("scan", {}),
    "self_label": ("self_label", {}),
    "spice_semi": ("spice_semi", {}),
    "spice_semi, adaptive": (
        "spice_semi",
        {"spice_semi.threshold_rule": "adaptive", "spice_semi.weak_apart": True, "spice_semi.init": "stage2"},
    ),
    "spice_tune": ("spice_tune", {}),
}


VARIANTS = {"moco, symmetric", "imc_swav, queue", "spice_self, disjoint", "spice_self, prior", "spice_semi, adaptive"}
EVERY = [pytest.param(name, marks=[pytest.mark.slow] * (name in VARIANTS)) for name in METHODS]
TRIED = [param for param in EVERY if METHODS[str(param.values[0])][0] not in ("spice_self", "spice_tune")]


class Enough(Exception):
    """So many steps are done."""


class WatchedWorker(LocalWorker):
    """Calls `watch` with the number of each step that is done, and stops after STEPS."""

    def __init__(self, run: Path, stage: str, device: torch.device, watch: Callable[[int, Tensor], None]):
        super().__init__(run, stage, device)
        self.watch, self.shown_at = watch, math.inf

    def report(self, step: int, total: int, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().report(step, LONG, loss, *args, **kwargs)
        self.watch(step, loss)
        if step == STEPS:
            raise Enough


def train(method: str, worker: Worker) -> None:
    stage, changes = METHODS[method]
    loops = {**TRAIN, "spice_tune": lambda config, worker: spice_tune.train(config, TUNE, worker)}
    with pytest.raises(Enough):
        loops[stage](override(SMALL, changes), worker)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    constant.cache_clear()
    with pretend_gpu(monkeypatch) as watch:
        yield watch
    constant.cache_clear()


def without(small_run: Path, method: str, run: Path) -> Path:
    """A copy of the run in which the stage of a method has not begun."""
    stage = METHODS[method][0]
    shutil.copytree(small_run, run, ignore=lambda folder, names: {stage} & set(names))
    return run


@dataclass
class Record:
    """What the steps of a method did on the pretended GPU."""

    first_loss: float
    waits: list[str]  # of the last step, as the two that follow
    sent: int
    launches: int
    images: Counter[str]  # that a backward pass follows: in the "trial" of memory, in the first "step"


@pytest.fixture(scope="module")
def recorded(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Record]:
    @cache
    def record(method: str) -> Record:
        record = Record(math.nan, [], 0, 0, Counter())
        when = "before"
        forward, exhausts = Backbone.forward, plumbing._exhausts_memory

        def counted(self: Backbone, batch: Tensor) -> Tensor:
            record.images[when] += len(batch) * torch.is_grad_enabled()
            return forward(self, batch)

        def trial(*args: Any) -> int:
            nonlocal when
            when = "trial"
            exhausted = exhausts(*args)
            when = "step"
            return exhausted

        def watch(step: int, loss: Tensor) -> None:
            nonlocal when
            when = "after"
            if step == 1:
                assert isinstance(loss, OnDevice)
                record.first_loss = float(loss.values)
            record.waits, record.sent, record.launches = list(gpu.waits), gpu.sent, gpu.launches
            gpu.reset()

        run = without(small_run, method, tmp_path_factory.mktemp("run") / "run")
        constant.cache_clear()
        with pytest.MonkeyPatch.context() as patch, pretend_gpu(patch) as gpu:
            patch.setattr(Backbone, "forward", counted)
            patch.setattr(plumbing, "_exhausts_memory", trial)
            train(method, WatchedWorker(run, METHODS[method][0], DEVICE, watch))
        constant.cache_clear()
        return record

    return record


@pytest.mark.parametrize("method", EVERY)
def test_no_step_waits_and_little_crosses_to_the_device(method, recorded):
    record = recorded(method)
    assert record.waits == []
    assert record.sent < MOST
    assert record.launches > 50, "the step ran on this device"


@pytest.mark.parametrize("stage", sorted(TRAIN.keys() - {"spice_self"}))  # which has other settings here
def test_the_first_loss_is_that_of_a_cpu(stage, recorded, small_run):
    line = json.loads((small_run / stage / "metrics.jsonl").read_text().splitlines()[0])
    assert recorded(stage).first_loss == pytest.approx(line["loss"], rel=1e-3)


@pytest.mark.parametrize("method", TRIED)
def test_the_trial_of_memory_learns_from_as_many_images_as_a_pass(method, recorded):
    """A GPU takes all images of a step in one pass."""
    images = recorded(method).images
    assert images["trial"] == images["step"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_cuda_finds_no_synchronisation_in_a_step(method, small_run, tmp_path):
    def watch(step: int, loss: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error" if step < STEPS else "default")

    try:
        train(
            method,
            WatchedWorker(
                without(small_run, method, tmp_path / "run"), METHODS[method][0], torch.device("cuda"), watch
            ),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_heads_on_the_neighbour_graph_do_not_wait_for_their_minibatches(gpu):
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(300, 8)).astype(np.float32)).to(DEVICE)
    targets = rng.dirichlet(np.ones(10), (2, 300)).astype(np.float32)
    heads = ClusterHeads(2, 8, 10, layers=1).to(DEVICE)
    optimizer = torch.optim.AdamW(heads.parameters(), 0.01, fused=True)
    config = spice_graph.SpiceGraphConfig(epochs=1, steps=2, minibatch=150)
    gpu.reset()
    loss = spice_graph.m_step(SMALL, config, heads, optimizer, features, targets, 0)
    assert [wait for wait in gpu.waits if "_to_copy from the host" not in wait] == []
    assert len(gpu.waits) == 1, "the targets of the round"
    assert isinstance(loss, OnDevice)


def test_the_bank_of_imc_swav_takes_its_rows_on_the_device(gpu, tmp_path):
    rows, positions = torch.randn(6, 16, 5), np.array([1, 4, 9, 15])
    full = []
    for device in (CPU, DEVICE):
        worker = LocalWorker(tmp_path, "none", device)
        bank, here = Bank(6, 6, 5).to(device), rows.to(device)
        gpu.reset()
        assert bank.push(here, positions, 0, worker) is None
        full.append(bank.push(here, positions, 4, worker))
        assert gpu.waits == []
    assert isinstance(full[1], OnDevice)
    assert torch.equal(full[0], full[1].values)


NAMES = ("MOCO_V2", "SCAN_WEAK", "SCAN_STRONG", "FIXMATCH_WEAK", "FIXMATCH_STRONG", "IMC_GLOBAL", "IMC_LOCAL")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*NAMES, "every"])
def test_a_view_is_the_same_on_a_device_which_it_does_not_wait_for(name, channels, gpu):
    every = views.View(noise=0.1, rotate=10.0, shift=0.1, zoom=0.1, shear=0.1, cutout=0.3, blur=0.5, erase=0.5)
    view = every if name == "every" else getattr(views, name)
    images = torch.randint(0, 256, (16, channels, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(0))
    index, there = torch.arange(16), send(images, DEVICE)
    augment.apply(view, there, index, (5, 0, 0))  # what is made once for all calls
    gpu.reset()
    drawn = augment.apply(view, there, index, (5, 1, 0))
    assert gpu.waits == []
    assert isinstance(drawn, OnDevice)
    assert drawn.values.sub(augment.apply(view, images, index, (5, 1, 0))).abs().max() < 1e-5


@pytest.mark.parametrize(
    "wait",
    [
        lambda x, host: x.sum().item(),
        lambda x, host: bool((x > 0).any()),
        lambda x, host: x.nonzero(),
        lambda x, host: x[x > 0],
        lambda x, host: x.masked_fill_(x > 0, 1).index_put_((x > 0,), x[0]),
        lambda x, host: x.cpu(),
        lambda x, host: host.to(DEVICE),
        lambda x, host: torch.tensor([1.0, 2.0], device=DEVICE),
        lambda x, host: x[torch.tensor([0, 1])],
        lambda x, host: x.copy_(host),
        lambda x, host: torch.empty_like(host).copy_(x),
        lambda x, host: torch.linalg.svdvals(x[None]),
        lambda x, host: x.unique(),
    ],
)
def test_the_pretended_gpu_sees_what_a_gpu_waits_for(wait, gpu):
    host = torch.arange(-3.0, 5.0)
    there = send(host, DEVICE)
    gpu.reset()
    torch.where(there > 0, there, 0.0).index_select(0, send(torch.tensor([1, 2]), DEVICE)).sum().square()
    assert gpu.waits == []
    assert gpu.sent == 16
    wait(there, host)
    assert gpu.waits
