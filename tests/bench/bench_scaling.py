"""Ray's cost beside plain torch.distributed, and that of more workers: measured here, reckoned for 8 to 1,024 GPUs.

    python -m tests.bench.bench_scaling [--repeats 3] [--steps 40]

Measured: `moco.train` as it is on 1, 2 and 4 workers with the same total of threads, started once by
`torch.multiprocessing` and once by Ray Train, in turn; the median step of each run, of these the least over the
repeats (other work on the machine only ever adds); the seconds to the first step; and the CPU time that Ray's own
processes (raylet, GCS, controller) take during a step beside that of the workers, which other work hardly touches:
where all cores are busy, that share is what Ray costs.

Reckoned: the time of a step is its arithmetic, divided among the workers, plus what cannot hide behind it:

    step = max(arithmetic, reading) + exchange + all-gather + max(0, all-reduce - HIDDEN * backward)
    all-reduce of n bytes on W workers    = 2 (W - 1) / W * n / bandwidth + 2 log2(W) * latency
    all-gather of n bytes in all          =   (W - 1) / W * n / bandwidth +   log2(W) * latency
    exchange of n bytes in all, m a message = (W - 1) / W * n / W / bandwidth + min(W - 1, n / W / m) * latency

The same formulas are held against the measured steps, with the bandwidth and latency that gloo has here.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from spice_dist.config import Config
from spice_dist.cost import PEAK, USED
from spice_dist.counting import counted
from spice_dist.data.dataset import DataConfig
from spice_dist.data.ingest import ingest
from spice_dist.data.sources import from_array
from spice_dist.distributed import ray_elastic, ray_train
from spice_dist.distributed.worker import LocalWorker, StageCall, Worker, usable_cores
from spice_dist.methods import moco
from spice_dist.models.backbone import BackboneConfig
from spice_dist.task import Task

WORKERS = (1, 2, 4)
SIDE, BATCH, GROUPS = 32, 64, 4
DROPPED = 5  # first steps, which allocate
HIDDEN = 0.7  # share of the backward pass behind which DDP's buckets travel
FLOAT = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    threads = max(WORKERS)
    os.environ["GOMP_SPINCOUNT"] = "0"  # more threads than cores must not spin while they wait for each other
    print(f"{usable_cores()} cores, {threads} threads in all, load {os.getloadavg()[0]:.1f} before the start")
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), threads, options.repeats, options.steps)
    show_measured(measured)
    check_model(measured)
    show_model()


def config(steps: int) -> Config:
    """MoCo-v2 with a ResNet-18 of half width: the step takes a fraction of a second here."""
    return Config(
        bn_groups=GROUPS,
        precision="fp32",
        data=DataConfig(size=SIDE),
        backbone=BackboneConfig(name="resnet18", stem="small", widths=(32, 64, 128, 256)),
        moco=moco.MoCoConfig(epochs=1, batch=BATCH, queue=BATCH * 4),
    )


# ---------------------------------------------------------------- measured


@dataclass(frozen=True)
class Timing:
    step: float  # seconds, the median
    cpu: float  # CPU seconds of a step, of the workers together
    rest: float  # CPU seconds during a step, of Ray's own processes
    first: float  # seconds from the start to the end of the first step


def measure(folder: Path, threads: int, repeats: int, steps: int) -> dict[tuple[str, int], list[Timing]]:
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH * steps, SIDE, SIDE, 3), dtype=np.uint8)
    found: dict[tuple[str, int], list[Timing]] = {}
    with_ray = partial(ray_train.session, None, num_cpus=max(WORKERS))
    ways = (("plain", plainly, contextlib.nullcontext), ("ray", by_ray, with_ray))  # no Ray runs beside the plain one
    for repeat in range(repeats):
        for workers in WORKERS:
            for name, start, session in ways:
                run = folder / f"{name}-{workers}-{repeat}"
                ingest(from_array(pixels), run / "data", size=SIDE)
                with session(), Meter() as meter:
                    began = time.time()
                    start(run, workers, threads // workers, steps)
                found.setdefault((name, workers), []).append(read_timing(run, began, meter))
                print(f"{name:<6}{workers} workers: {found[name, workers][-1]}", flush=True)
    return found


class Meter:
    """The CPU time of the processes that this one started, looked at twice a second within the block."""

    def __enter__(self) -> "Meter":
        self.rows: list[tuple[float, float, float]] = []  # time; CPU seconds of those that train, and of the others
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def between(self, start: float, end: float) -> tuple[float, float]:
        """CPU seconds of training and of all else, from one moment to another, at which the same processes live."""
        times, *used = zip(*self.rows, strict=True)
        training, rest = (float(np.diff(np.interp([start, end], times, column))[0]) for column in used)
        return training, rest

    def _look(self) -> None:
        while not self.done.wait(0.5):
            used = [0.0, 0.0]
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    title = " ".join(process.cmdline())
                    used["TrainWorker" not in title and "spawn_main" not in title] += sum(process.cpu_times()[:2])
            self.rows.append((time.time(), used[0], used[1]))


def read_timing(run: Path, began: float, meter: Meter) -> Timing:
    ends = json.loads((run / "times.json").read_text())
    steps = len(ends) - DROPPED - 2  # the last one saves a checkpoint, and processes begin to end
    training, rest = (used / steps for used in meter.between(ends[DROPPED], ends[-2]))
    return Timing(statistics.median(np.diff(ends[DROPPED:])), training, rest, ends[0] - began)


def timed_moco(task: Task, settings: moco.MoCoConfig, worker: Any) -> None:
    """`moco.train`, which leaves the end of every step in times.json."""
    ends: list[float] = []
    worker.on_report = lambda *_: ends.append(time.time())
    moco.train(task, settings, worker)
    if worker.rank == 0:
        (worker.run / "times.json").write_text(json.dumps(ends))


def by_ray(run: Path, workers: int, threads: int, steps: int) -> None:
    task = config(steps)
    stages = (StageCall("moco", timed_moco, task, task.moco),)
    quiet = lambda _told: None  # noqa: E731
    job = ray_train.Job(stages, run, threads, lambda: False, quiet, quiet)
    ray_elastic.train(job, (workers,))


class PlainWorker(LocalWorker):
    """A worker of torch.distributed alone."""

    def __init__(self, run: Path):
        super().__init__(run, "moco", torch.device("cpu"))

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.world == 1:
            return module
        return ray_train.data_parallel(module)


def plainly(run: Path, workers: int, threads: int, steps: int) -> None:
    spawn(train_plainly, (workers, run, threads, steps), nprocs=workers)


def train_plainly(rank: int, workers: int, run: Path, threads: int, steps: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", f"file://{run}/meeting", rank=rank, world_size=workers)
    task = config(steps)
    worker: Worker = PlainWorker(run)
    timed_moco(task, task.moco, worker)
    dist.destroy_process_group()


def show_measured(measured: dict[tuple[str, int], list[Timing]]) -> None:
    heading = ("plain ms", "Ray ms", "ratio", "workers CPU ms", "Ray CPU ms", "share", "plain first s", "Ray first s")
    print(f"\n{'workers':<10}" + "".join(f"{name:>15}" for name in heading))
    for workers in WORKERS:
        plain, ray = (measured[name, workers] for name in ("plain", "ray"))
        steps = [min(timing.step for timing in timings) for timings in (plain, ray)]
        row = "".join(f"{1000 * step:>15.1f}" for step in steps) + f"{steps[1] / steps[0]:>15.3f}"
        cpu, rest = (statistics.median(getattr(timing, name) for timing in ray) for name in ("cpu", "rest"))
        row += f"{1000 * cpu:>15.1f}{1000 * rest:>15.1f}{rest / cpu:>15.2%}"
        first = "".join(f"{min(timing.first for timing in timings):>15.1f}" for timings in (plain, ray))
        print(f"{workers:<10}{row}{first}")


# ---------------------------------------------------------------- reckoned


@dataclass(frozen=True)
class Link:
    """What connects the workers: bytes per second of each, and seconds for a message to get through."""

    bandwidth: float
    latency: float

    def all_reduce(self, size: float, workers: int) -> float:
        """Seconds for a sum of `size` bytes that all workers get."""
        if workers == 1:
            return 0.0
        return 2 * (workers - 1) / workers * size / self.bandwidth + 2 * math.log2(workers) * self.latency

    def all_gather(self, size: float, workers: int) -> float:
        """Seconds until all workers have `size` bytes, of which each had its share."""
        return self.all_reduce(size, workers) / 2

    def exchange(self, size: float, smallest: float, workers: int) -> float:
        """Seconds until each worker has its share of `size` bytes from the others, one message after another."""
        if workers == 1:
            return 0.0
        own = size / workers
        return (workers - 1) / workers * own / self.bandwidth + min(workers - 1, own / smallest) * self.latency


@dataclass(frozen=True)
class Step:
    """One step of MoCo-v2: what it computes, sends and reads, of all workers together."""

    forward: float  # seconds of one worker alone for the four passes: query, its backward (two), key
    gradients: float  # bytes
    views: float  # bytes of one view of all images, which Shuffle-BN exchanges
    keys: float  # bytes of all keys, which all workers get
    images: float

    def seconds(self, workers: int, link: Link, images_per_second: float = math.inf, hidden: float = HIDDEN) -> float:
        """`images_per_second` is what one worker can read and augment."""
        arithmetic = self.forward / workers
        reading = self.images / workers / images_per_second
        shown = max(0.0, link.all_reduce(self.gradients, workers) - hidden * arithmetic / 2)  # two passes of four
        return max(arithmetic, reading) + self.shuffling(workers, link) + shown

    def shuffling(self, workers: int, link: Link) -> float:
        """Seconds that Shuffle-BN waits: no arithmetic goes on beside it."""
        view = self.views / self.images
        return link.exchange(self.views, view, workers) + link.all_gather(self.keys, workers)


def step_of(task: Config, flops: float) -> Step:
    """For workers that compute `flops` operations per second; views are sent as float32."""
    size = task.moco.view.size or task.data.size
    network = counted(task.backbone, size, task.data.channels)
    images = task.moco.batch
    views = images * task.data.channels * size * size * FLOAT
    keys = images * task.moco.dim * FLOAT
    return Step(4 * images * network.forward / flops, network.weights, views, keys, images)


def check_model(measured: dict[tuple[str, int], list[Timing]]) -> None:
    """The formulas with this machine's numbers: all cores are shared and busy, so nothing hides behind arithmetic."""
    step = step_of(config(1), 1.0)
    names = ("arithmetic ms", "all-reduce ms", "shuffling ms", "sum", "measured ms")
    print(f"\n{'workers':<10}" + "".join(f"{name:>15}" for name in names))
    for workers in WORKERS[1:]:
        timings = measured["plain", workers]
        link = gloo_here(workers, int(step.gradients))
        parts = [statistics.median(timing.cpu for timing in timings) / usable_cores()]
        parts += [link.all_reduce(step.gradients, workers), step.shuffling(workers, link)]
        found = min(timing.step for timing in timings)
        print(f"{workers:<10}" + "".join(f"{1000 * value:>15.1f}" for value in (*parts, sum(parts), found)))


def gloo_here(workers: int, size: int) -> Link:
    """Gloo on the loopback, from all-reduces of next to nothing and of `size` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(time_all_reduce, (workers, folder, size), nprocs=workers)
        small, large = json.loads(Path(folder, "times.json").read_text())
    bandwidth = 2 * (workers - 1) / workers * size / max(large - small, 1e-9)
    return Link(bandwidth, small / (2 * math.log2(workers)))


def time_all_reduce(rank: int, workers: int, folder: str, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=workers)
    least = []
    for count in (1, size // FLOAT):
        tensor, times = torch.ones(count), []
        for _ in range(30):
            began = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - began)
        least.append(statistics.median(times))
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(least))
    dist.destroy_process_group()


NVLINK, FABRIC = Link(300e9, 10e-6), Link(25e9, 20e-6)  # within a node of 8; between nodes, 200 Gb/s for each GPU
READS = 2_500.0  # images of 224 px that the 16 cores of one GPU read and augment per second, from 155 a core here
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def show_model() -> None:
    """ImageNet, ResNet-50 at 224 px, batch 4,096 with LARS; H100s at the share of their peak that cost.py takes."""
    task = Config(
        bn_groups=1024,
        data=DataConfig(size=224),
        backbone=BackboneConfig(name="resnet50", stem="native"),
        moco=moco.MoCoConfig(epochs=1, batch=4096, queue=65536, optimizer="lars"),
    )
    step = step_of(task, PEAK["H100"] * USED)
    print(f"\n{'GPUs':<8}{'step ms':>10}{'images/s':>12}{'efficiency':>12}{'shuffling ms':>14}{'all-reduce ms':>15}")
    one = step.seconds(1, NVLINK, READS)
    for gpus in GPUS:
        link = NVLINK if gpus <= 8 else FABRIC
        seconds = step.seconds(gpus, link, READS)
        shuffling, reduce = step.shuffling(gpus, link), link.all_reduce(step.gradients, gpus)
        row = f"{1000 * seconds:>10.1f}{step.images / seconds:>12,.0f}{one / seconds / gpus:>12.0%}"
        print(f"{gpus:<8}{row}{1000 * shuffling:>14.1f}{1000 * reduce:>15.1f}")


if __name__ == "__main__":
    main()
