"""Stage 1 against the bare network and against its peer, on the same images and cores. Prints tables of ratios.

    python -m tests.bench.bench_pretrain --cifar DIR       DIR/cifar10.npz: train_images (50000, 32, 32, 3) uint8

The step: `moco.train`, `byol.train` and `imc_swav.train` as they are, fed with the same random views again and again,
against the bare forward and backward passes of the same network over the same numbers of images; for IMC-SwAV each of
its six views by itself, of 28 and 18 pixels, and Adam. The peer: lightly's blocks and
transforms in a plain PyTorch loop, as its MoCo example has them (`pip install lightly`), loader included, each in a
process of its own, so that its memory can be told: the largest sum of PSS over it and its children.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from spice_dist.config import Config
from spice_dist.data.dataset import DataConfig
from spice_dist.data.ingest import ingest
from spice_dist.data.sources import from_array
from spice_dist.distributed.checkpoint import Tensors
from spice_dist.distributed.worker import NO_METRICS, NO_PROBES, LocalWorker, Probes, usable_cores
from spice_dist.methods import byol, imc_swav, moco
from spice_dist.methods.plumbing import autocast, new_backbone, place
from spice_dist.models.backbone import BackboneConfig
from spice_dist.models.heads import MLP, LinearProjection, Projection
from spice_dist.models.momentum import slow_copy
from spice_dist.models.split_batch_norm import forget_statistics

CPU = torch.device("cpu")
SIDE, BATCH, GROUPS = 32, 256, 2
VARIANTS = {  # name -> (who, precision)
    "lightly, fp32": ("lightly", "fp32"),
    "ours, fp32": ("ours", "fp32"),
    "lightly, bf16": ("lightly", "bf16"),
    "ours, bf16": ("ours", "bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="for the peer")
    parser.add_argument("--steps", type=int, default=6, help="counted ones, after one that is not")
    parser.add_argument("--variant", choices=VARIANTS, help="time this one alone, print JSON")
    parser.add_argument("--only", action="append", default=[], help="the step of this method: moco, byol or imc_swav")
    parser.add_argument("--skip-peer", action="store_true", help="only the step against the bare network")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    if options.variant:
        who, precision = VARIANTS[options.variant]
        seconds = {"ours": time_ours, "lightly": time_lightly}[who](options.cifar, precision, options.steps)
        print(json.dumps(BATCH / statistics.median(seconds)))
        return
    print(f"{usable_cores()} cores, ResNet-18, {SIDE} px, batch {BATCH}, {options.steps} steps\n")
    bench_step(options.steps, options.only)
    if not options.skip_peer:
        bench_peer(options.cifar, options.steps)


def config(precision: str = "fp32") -> Config:
    return Config(
        bn_groups=GROUPS,
        precision=precision,
        data=DataConfig(size=SIDE),
        backbone=BackboneConfig(name="resnet18", stem="small"),
        moco=moco.MoCoConfig(epochs=1, batch=BATCH, queue=4096),
        byol=byol.BYOLConfig(epochs=1, batch=BATCH, warmup=0),
        imc_swav=imc_swav.ImcSwavConfig(epochs=1, batch=BATCH),
    )


class Stopwatch(LocalWorker):
    """Takes the time between reports, computes no probe and saves nothing."""

    def __init__(self, run: Path):
        super().__init__(run, "timed", CPU)
        self.times: list[float] = []

    def report(
        self,
        step: int,
        total: int,
        loss: Tensor,
        save: Callable[[], Tensors],
        metrics: Mapping[str, Tensor] = NO_METRICS,
        probes: Probes = NO_PROBES,
        every: int = 10,
    ) -> None:
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return np.diff(self.times).tolist()


# ---------------------------------------------------------------- the step


def bench_step(steps: int, only: list[str]) -> None:
    print(f"{'step against the bare passes':<36}{'bare s':>10}{'ours s':>10}{'ratio':>8}{'wanted':>8}")
    for precision in ("fp32", "bf16"):
        for name, method in (("moco", moco), ("byol", byol), ("imc_swav", imc_swav)):
            if only and name not in only:
                continue
            bare = time_bare_crops(precision, steps) if name == "imc_swav" else time_bare(name, precision, steps)
            ours = time_step(method, name, precision, steps)
            ratio = statistics.median(ours) / statistics.median(bare)
            row = f"{statistics.median(bare):>10.2f}{statistics.median(ours):>10.2f}{ratio:>8.2f}{1.1:>8.2f}"
            print(f"{name + ', ' + precision:<36}{row}", flush=True)


def time_bare_crops(precision: str, steps: int) -> list[float]:
    """Backbone and projection of each of six views by itself, one backward pass, Adam."""
    settings = config(precision)
    torch.manual_seed(0)
    backbone = new_backbone(settings)
    net = place(nn.Sequential(backbone, LinearProjection(backbone.dim, 128)), CPU).train()
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    views = crops(settings)
    times = [time.perf_counter()]
    for _ in range(steps + 2):
        for group in zip(*(view.chunk(GROUPS) for view in views), strict=True):
            with autocast(CPU, precision):
                out = torch.cat([net(view) for view in group])
            out.float().sum().backward()
        optimizer.step()
        net.zero_grad()
        forget_statistics(net)
        times.append(time.perf_counter())
    return np.diff(times).tolist()[2:]


def crops(settings: Config) -> list[Tensor]:
    return [torch.randn(BATCH, 3, view.size, view.size) for view in settings.imc_swav.views(settings.data.size)]


def time_bare(name: str, precision: str, steps: int) -> list[float]:
    """Forward and backward of the trained network, forward of the slow one; each view of BYOL passes through both."""
    settings = config(precision)
    torch.manual_seed(0)
    backbone = new_backbone(settings)
    head = Projection(backbone.dim, 128) if name == "moco" else MLP(backbone.dim, 4096, 256)
    more = [] if name == "moco" else [MLP(256, 4096, 256)]
    net = place(nn.Sequential(backbone, head, *more), CPU).train()
    slow = slow_copy(net[:2])
    views = torch.randn(1 if name == "moco" else 2, GROUPS, BATCH // GROUPS, 3, SIDE, SIDE)
    times = [time.perf_counter()]
    for _ in range(steps + 2):
        for group in views.unbind(1):
            with autocast(CPU, precision):
                with torch.no_grad():
                    for view in group:
                        slow(view)
                out = torch.stack([net(view) for view in group])
            out.float().sum().backward()
        net.zero_grad()
        for module in (net, slow):
            forget_statistics(module)
        times.append(time.perf_counter())
    return np.diff(times).tolist()[2:]


def time_step(method: Any, name: str, precision: str, steps: int) -> list[float]:
    settings = config(precision)
    pair = torch.randn(2, BATCH, 3, SIDE, SIDE)

    def same_views(*_: object) -> Iterator[tuple[Tensor, Tensor]]:
        for _step in range(steps + 2):
            yield pair[0], pair[1]

    def same_crops(*_: object) -> Iterator[list[Tensor]]:
        views = crops(settings)
        for _step in range(steps + 2):
            yield views

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run = Path(folder)
        ingest(from_array(np.zeros((BATCH * 16, SIDE, SIDE, 3), np.uint8)), run / "data", size=SIDE, jpeg_side=SIDE)
        watch = Stopwatch(run)
        if name == "imc_swav":
            feed = mock.patch.object(method, "view_lists", same_crops)
            told = iter([(np.arange(BATCH), 0)] * (steps + 2))
            more = mock.patch.object(method, "known_images", return_value=told)
        else:
            feed, more = mock.patch.object(method, "view_pairs", same_views), nullcontext()
        with feed, more:
            method.train(settings, getattr(settings, name), watch)
        return watch.seconds()[1:]


# ---------------------------------------------------------------- the peer


def bench_peer(cifar: Path, steps: int) -> None:
    print(f"\n{'MoCo-v2, loader included':<36}{'images/s':>10}{'PSS MiB':>10}{'ratio':>8}{'wanted':>8}")
    base = 0.0
    for name, (who, precision) in VARIANTS.items():
        speed, peak = in_a_process(name, cifar, steps)
        base = speed if (who, precision) == ("lightly", "fp32") else base
        wanted = {("ours", "fp32"): "1.00", ("ours", "bf16"): "2.00"}.get((who, precision), "")
        print(f"{name:<36}{speed:>10.1f}{peak:>10.0f}{speed / base:>8.2f}{wanted:>8}", flush=True)


def in_a_process(name: str, cifar: Path, steps: int) -> tuple[float, float]:
    """(images per second, largest sum of PSS in MiB)."""
    command = [sys.executable, "-m", "tests.bench.bench_pretrain", "--cifar", str(cifar), "--steps", str(steps)]
    process = subprocess.Popen([*command, "--variant", name], stdout=subprocess.PIPE, text=True)
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, tree_pss(process.pid) / 2**20)
            time.sleep(0.5)

    thread = threading.Thread(target=watch)
    thread.start()
    out, _ = process.communicate()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{name} ended with exit code {process.returncode}")
    return json.loads(out.splitlines()[-1]), peak


def tree_pss(pid: int) -> int:
    total = 0
    try:
        for each in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            total += each.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def time_ours(cifar: Path, precision: str, steps: int) -> list[float]:
    images = np.load(cifar / "cifar10.npz")["train_images"][: BATCH * (steps + 3)]
    settings = config(precision)
    settings = replace(settings, moco=replace(settings.moco, queue=len(images)))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run = Path(folder)
        ingest(from_array(images), run / "data", size=SIDE, jpeg_side=SIDE)
        watch = Stopwatch(run)
        moco.train(settings, settings.moco, watch)
        return watch.seconds()[2:]


def time_lightly(cifar: Path, precision: str, steps: int) -> list[float]:
    """Its MoCo example: one optimizer step per batch, keys of a shuffled batch, a memory bank in the loss."""
    from lightly.loss import NTXentLoss  # pyright: ignore[reportMissingImports]
    from lightly.models.modules import MoCoProjectionHead  # pyright: ignore[reportMissingImports]
    from lightly.models.utils import (  # pyright: ignore[reportMissingImports]
        batch_shuffle,
        batch_unshuffle,
        update_momentum,
    )
    from lightly.transforms import MoCoV2Transform  # pyright: ignore[reportMissingImports]
    from PIL import Image
    from timm import create_model

    class Pairs(torch.utils.data.Dataset):
        images = np.load(cifar / "cifar10.npz")["train_images"][: BATCH * (steps + 3)]
        transform = MoCoV2Transform(input_size=SIDE)

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> list[Tensor]:
            return self.transform(Image.fromarray(self.images[index]))

    torch.manual_seed(0)
    backbone = create_model("resnet18", num_classes=0)
    backbone.conv1, backbone.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    head = MoCoProjectionHead(512, 512, 128)
    slow_backbone, slow_head = slow_copy(backbone), slow_copy(head)
    criterion = NTXentLoss(memory_bank_size=(BATCH * (steps + 3), 128))
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06)
    loader = torch.utils.data.DataLoader(
        Pairs(), BATCH, shuffle=True, drop_last=True, num_workers=usable_cores(), persistent_workers=True
    )
    times = [time.perf_counter()]
    for query_view, key_view in loader:
        update_momentum(backbone, slow_backbone, m=0.99)
        update_momentum(head, slow_head, m=0.99)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            query = head(backbone(query_view))
            with torch.no_grad():
                shuffled, order = batch_shuffle(key_view)
                key = batch_unshuffle(slow_head(slow_backbone(shuffled)), order)
        loss = criterion(query.float(), key.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    return np.diff(times).tolist()[3:]


if __name__ == "__main__":
    main()
