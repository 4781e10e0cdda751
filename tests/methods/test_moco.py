"""Stage 1 against a float64 reference written from the formulas, and what its options promise."""

import copy
import json
import math
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spice_dist.config import override
from spice_dist.data.loaders import open_images
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import Interrupted, NotFinite, UserError
from spice_dist.methods import byol, features, moco, plumbing
from spice_dist.methods.plumbing import finished, load_backbone, new_backbone, view_pairs
from spice_dist.models.heads import MLP, Projection
from spice_dist.models.momentum import Queue
from spice_dist.models.split_batch_norm import SplitBatchNorm2d
from tests.methods.conftest import CPU, SMALL, TRAIN
from tests.methods.test_methods import assert_same_bits, weights
from tests.methods.workers import on_workers


def grouped(net: nn.Module, view: Tensor, groups: int) -> Tensor:
    """Unit outputs, each of the groups normalised by itself."""
    return torch.cat([nn.functional.normalize(net(part), dim=1) for part in view.chunk(groups)])


def sgd_step(net: nn.Module, velocity: list[Tensor], lr: float, decay: float) -> None:
    with torch.no_grad():
        for parameter, speed in zip(net.parameters(), velocity, strict=True):
            assert parameter.grad is not None
            speed.mul_(0.9).add_(parameter.grad + decay * parameter)
            parameter.sub_(lr * speed)
            parameter.grad = None


def views_of(run, config, batch: int, epochs: int, view):
    images = open_images(run / "data", device=CPU, size=8, channels=1)
    worker = LocalWorker(run, "none", CPU)
    for one, other in view_pairs(config, images, 200, batch, epochs, view, 0, worker):
        yield one.double(), other.double()
    images.close()


@pytest.mark.parametrize("symmetric", [False, True])
def test_six_steps_are_those_of_a_float64_reference(small_run, without_stage, smooth, symmetric):
    """Loss, gradients, momentum, shuffle and a queue that is no multiple of the batch: all show in the weights."""
    config = override(SMALL, {"moco.epochs": 2, "moco.queue": 150, "moco.symmetric": symmetric, "moco.lr": 0.003})
    own, run = config.moco, without_stage("moco")
    TRAIN["moco"](config, LocalWorker(run, "moco", CPU))
    saved = finished(run / "moco")

    torch.manual_seed(0)
    backbone = new_backbone(config)
    query_net = nn.Sequential(backbone, Projection(backbone.dim, own.dim))
    key_net = copy.deepcopy(query_net).double()
    ring = Queue(150, own.dim).keys.double()
    query_net.double().train()
    velocity = [torch.zeros_like(parameter) for parameter in query_net.parameters()]
    place, losses = 0, []
    for step, pair in enumerate(views_of(run, config, 64, 2, own.view)):
        with torch.no_grad():
            for slow, fast in zip(key_net.parameters(), query_net.parameters(), strict=True):
                slow.mul_(own.momentum).add_((1 - own.momentum) * fast)
        loss, new = torch.zeros((), dtype=torch.float64), []
        for stream, (query_view, key_view) in ((2, pair), (3, pair[::-1]))[: 1 + symmetric]:
            order = np.random.default_rng((0, step, stream)).permutation(64)
            with torch.no_grad():
                keys = torch.empty(64, own.dim, dtype=torch.float64)
                keys[order] = grouped(key_net, key_view[order], 2)
            for query, key in zip(grouped(query_net, query_view, 2), keys, strict=True):
                logits = torch.cat([(query @ key)[None], ring.clone() @ query]) / own.temperature
                loss = loss + (logits.logsumexp(0) - logits[0]) / 64
            new.append(keys)
        loss.backward()
        losses.append(loss.item())
        sgd_step(query_net, velocity, own.lr * (1 + math.cos(math.pi * (step // 3) / 2)) / 2, own.weight_decay)
        for key in torch.cat(new):
            ring[place % 150] = key
            place += 1

    found = saved.tensors("queue")["keys"].double()
    torch.testing.assert_close(found, ring, atol=2e-4, rtol=0)
    for name, parts in (("backbone", backbone), ("projection", query_net[1])):
        for key, value in saved.tensors(name).items():
            if "running" not in key and "num_batches" not in key:
                torch.testing.assert_close(value.double(), parts.state_dict()[key], atol=2e-4, rtol=2e-3)
    written = [json.loads(line)["loss"] for line in (run / "moco/metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(written, losses, rtol=1e-4)


def test_byol_steps_are_those_of_a_float64_reference(small_run, without_stage, smooth):
    config = override(SMALL, {"byol.epochs": 2, "byol.lr": 0.003})
    own, run = config.byol, without_stage("byol")
    TRAIN["byol"](config, LocalWorker(run, "byol", CPU))
    saved = finished(run / "byol")

    torch.manual_seed(0)
    backbone = new_backbone(config)
    parts = [backbone, MLP(backbone.dim, own.hidden, own.dim), MLP(own.dim, own.hidden, own.dim)]
    online = nn.Sequential(*parts).double().train()
    target = copy.deepcopy(online[:2])
    velocity = [torch.zeros_like(parameter) for parameter in online.parameters()]
    losses = []
    for step, pair in enumerate(views_of(run, config, 64, 2, own.view)):
        loss = torch.zeros((), dtype=torch.float64)
        for view, other in (pair, pair[::-1]):
            with torch.no_grad():
                wanted = grouped(target, other, 2)
            loss = loss + (grouped(online, view, 2) - wanted).square().sum(1).mean()
        loss.backward()
        losses.append(loss.item())
        lr = own.lr * min(1, step / 3) * (1 + math.cos(math.pi * step / 6)) / 2
        sgd_step(online, velocity, lr, own.weight_decay)
        momentum = 1 - (1 - own.momentum) * (1 + math.cos(math.pi * step / 6)) / 2
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), online[:2].parameters(), strict=True):
                slow.mul_(momentum).add_((1 - momentum) * fast)

    for name, value in saved.tensors("backbone").items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value.double(), backbone.state_dict()[name], atol=5e-4, rtol=2e-3)
    written = [json.loads(line)["loss"] for line in (run / "byol/metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(written, losses, rtol=1e-3)


def test_with_all_options_two_workers_equal_one_and_a_resumed_run_an_uninterrupted_one(without_stage):
    """Symmetric, a queue that is no multiple of the batch, LARS with warm-up; cut in the middle of an epoch."""
    run = without_stage("moco")
    options = {"moco.symmetric": True, "moco.queue": 150, "moco.optimizer": "lars", "moco.warmup": 1}
    config = override(SMALL, options)
    TRAIN["moco"](config, LocalWorker(run, "moco", CPU))
    whole = weights(run, "moco")
    shutil.rmtree(run / "moco")
    on_workers(2, config, run, "moco")
    assert_same_bits(weights(run, "moco"), whole)
    shutil.rmtree(run / "moco")
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        TRAIN["moco"](config, LocalWorker(run, "moco", CPU, stop_requested=lambda: next(calls) == 4))
    TRAIN["moco"](config, LocalWorker(run, "moco", CPU))
    assert_same_bits(weights(run, "moco"), whole)


@pytest.mark.parametrize("size", [7, 12, 13])
def test_the_queue_holds_the_last_keys_whatever_its_size(size: int):
    queue = Queue(size, 1)
    pushed = torch.arange(40.0)[:, None]
    for step in range(10):
        queue.push(pushed[4 * step : 4 * step + 4], step)
    assert sorted(queue.keys[:, 0].tolist()) == list(range(40 - size, 40))


def test_staleness_is_nothing_for_a_key_network_that_stands_still_and_grows_with_its_pace(without_stage):
    found = {}
    for momentum in (1.0, 0.5):
        run = without_stage("moco")
        config = override(SMALL, {"moco.epochs": 4, "moco.momentum": momentum})
        TRAIN["moco"](config, LocalWorker(run, "moco", CPU))
        lines = [json.loads(line) for line in (run / "moco/metrics.jsonl").read_text().splitlines()]
        assert "staleness" not in lines[0]
        found[momentum] = lines[-1]["staleness"]
        assert -8.01 <= lines[-1]["uniformity"] <= 0
        assert 1 <= lines[-1]["effective_rank"] <= 128
        shutil.rmtree(run)
    assert abs(found[1.0]) < 1e-5
    assert found[0.5] > 1e-3


def test_lars_trains_and_decays_kernels_only(without_stage):
    run = without_stage("moco")
    config = override(SMALL, {"moco.epochs": 40, "moco.optimizer": "lars", "moco.lr": 1.0, "moco.warmup": 2})
    TRAIN["moco"](config, LocalWorker(run, "moco", CPU))
    lines = [json.loads(line)["loss"] for line in (run / "moco/metrics.jsonl").read_text().splitlines()]
    assert np.mean(lines[-10:]) < math.log(129) - 0.05


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moco.optimizer": "adam"}, "sgd or lars"),
        ({"moco.warmup": 3}, "fewer than moco.epochs"),
        ({"moco.queue": 100, "moco.symmetric": True}, "must hold the 128 keys"),
        ({"moco.lr": -1}, "moco.lr is -1"),
        ({"moco.dim": 0}, "moco.dim is 0"),
        ({"moco.momentum": 2}, "give 0 to 1"),
        ({"moco.weight_decay": -1}, "0 or more"),
        ({"moco.batch": 2}, "two images or more"),
        ({"moco.optimizer": "lars", "moco.weight_decay": 0}, "moco.weight_decay above 0"),
    ],
)
def test_options_out_of_range_are_one_line(changes, words):
    config = override(SMALL, changes)
    with pytest.raises(UserError, match=words):
        moco.check(config, config.moco, 200)


def test_byol_options_out_of_range_are_one_line():
    for changes, words in (({"byol.momentum": 1}, "less than 1"), ({"byol.batch": 201}, "more than the 200 images")):
        config = override(SMALL, changes)
        with pytest.raises(UserError, match=words):
            byol.check(config, config.byol, 200)


def test_a_batch_that_exhausts_memory_is_halved_once_and_then_told(monkeypatch, tmp_path):
    config = override(SMALL, {"bn_groups": 4})
    net = nn.Sequential(nn.Conv2d(1, 2, 3), SplitBatchNorm2d(2)).to("meta")  # all of a GPU but the computing
    optimizer = torch.optim.Adam(net.parameters())
    worker = LocalWorker(tmp_path, "none", torch.device("meta"))
    seen: list[int] = []

    def limited(images: int):
        def forward(self, x):
            seen.append(len(x))
            if len(x) > images:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return nn.functional.conv2d(x, self.weight)

        return forward

    def trial(passes: int) -> Tensor:
        return net(plumbing.black_images(config, 64 // passes, config.moco.view.size, worker)).sum()

    monkeypatch.setattr(nn.Conv2d, "forward", limited(32))
    assert plumbing.passes_that_fit(config, [net], 64, trial, optimizer, worker) == 2
    assert seen == [64, 32]
    norm = net[1]
    assert isinstance(norm, SplitBatchNorm2d)
    assert (norm.groups, norm.pending) == (2, [])
    assert net[0].weight.grad is None
    monkeypatch.setattr(nn.Conv2d, "forward", limited(16))
    with pytest.raises(UserError, match="out of memory with 64 images of 8 pixels in one pass, and half of them"):
        plumbing.passes_that_fit(config, [net], 64, trial, optimizer, worker)


def test_bf16_is_for_gpus_that_have_it(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    for device in (cuda, CPU):  # an older GPU only imitates it
        with plumbing.autocast(device) as entered:
            assert entered is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: nullcontext((kind, dtype)))
    with plumbing.autocast(cuda) as entered:
        assert entered == ("cuda", torch.bfloat16)


def test_a_loss_that_is_not_finite_stops_in_one_line_and_is_never_saved(without_stage):
    run = without_stage("moco")
    with pytest.raises(NotFinite, match="the loss of moco is not finite at step"):
        TRAIN["moco"](override(SMALL, {"moco.lr": 1e30}), LocalWorker(run, "moco", CPU))
    assert not list((run / "moco/checkpoints").glob("*"))


def test_features_are_embedded_only_where_an_earlier_call_left_none(small_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    whole = np.load(run / "features/features.npy")
    torn = whole.copy()
    torn[57:123] = 0
    torn[9, 16:] = 0  # half a row
    (run / "features/features.npy").unlink()
    partial = run / f"features/features.{features._fingerprint(SMALL, load_backbone(SMALL, run))}.partial.npy"
    np.save(partial, torn)
    np.save(run / "features/features.0123456789abcdef.partial.npy", np.ones_like(whole))  # of another network
    asked: list[np.ndarray] = []
    real = features.outputs
    monkeypatch.setattr(features, "outputs", lambda *a, **k: (asked.append(a[2]), real(*a, **k))[1])
    features.embed(SMALL, None, LocalWorker(run, "features", CPU))
    assert asked[0].tolist() == [9, *range(57, 123)]
    np.testing.assert_allclose(np.load(run / "features/features.npy"), whole, atol=1e-3)
    assert [path.name for path in (run / "features").glob("*.npy")] == ["features.npy"]


def test_features_that_find_no_room_on_the_disk_are_one_line(small_run, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    (run / "features/features.npy").unlink()
    monkeypatch.setattr(features.os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device"):
        features.embed(SMALL, None, LocalWorker(run, "features", CPU))
    assert not list((run / "features").glob("*.npy"))


def test_training_in_bfloat16_on_a_cpu_is_near_to_float32(without_stage):
    run = without_stage("moco")
    config = override(SMALL, {"precision": "bf16"})
    TRAIN["moco"](config, LocalWorker(run, "moco", CPU))
    low = [json.loads(line)["loss"] for line in (run / "moco/metrics.jsonl").read_text().splitlines()]
    full = without_stage("byol") / "moco/metrics.jsonl"
    high = [json.loads(line)["loss"] for line in full.read_text().splitlines()]
    assert low != high
    np.testing.assert_allclose(low[:3], high[:3], rtol=0.02)  # later ones amplify what differs
