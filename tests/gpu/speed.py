"""Part 2: a training step beside its bare passes, and what it makes the device wait for.

The bare passes are the forward and backward passes of the same networks over as many images of the same size, in the
same precision, without views, optimizer or anything else. A step's synchronisations are those that PyTorch warns of
(`torch.cuda.set_sync_debug_mode`), by the line that asks for them; its kernel launches are read from the profiler.
"""

import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from spice_dist import artifacts
from spice_dist.config import Config, override
from spice_dist.data.dataset import prepare
from spice_dist.data.manifest import Ingested
from spice_dist.distributed.worker import LocalWorker, Storage
from spice_dist.methods import imc_swav, spice_semi
from spice_dist.methods.plumbing import autocast, new_backbone, place
from spice_dist.models.heads import Projection
from spice_dist.models.momentum import slow_copy
from spice_dist.models.split_batch_norm import forget_statistics, set_groups
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.recipes import cifar10_short
from spice_dist.stages import TABLE
from tests.gpu.context import OUT_OF_TIME, Context, apart
from tests.gpu.results import Numbers, OutOfTime
from tests.methods.conftest import SMALL

NAME = "speed"
TRAIN = {row.name: row for row in TABLE}
STAGES = ("moco", "spice_semi", "imc_swav")
WARM, TIMED, WATCHED, PROFILED = 10, 40, 5, 3  # steps
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def config_of(context: Context) -> Config:
    """CIFAR-10 on one GPU; the digits on a CPU; grey digits as colour images of 32 pixels where CIFAR-10 is missing."""
    if context.tiny:
        # a thousand steps and more: what is written at every hundredth stays out
        return override(SMALL, {"moco.epochs": 999, "imc_swav.epochs": 999, "spice_semi.steps": 10_000})
    config = cifar10_short()
    return config if context.cifar else override(config, {"moco.queue": 1024})


def run(context: Context) -> None:
    for stage in STAGES:
        if context.results.row(NAME, stage):
            continue
        why = apart(measure_stage, context, stage, deadline=context.deadline)
        context.results.read()
        if why == OUT_OF_TIME:
            raise OutOfTime
        if why:
            context.results.add(NAME, stage, False, error=why)
        context.require_time()


def measure_stage(context: Context, stage: str) -> None:
    context.require_time()
    with context.results.measured(NAME, stage) as numbers:
        numbers |= measured(context, stage)


def measured(context: Context, stage: str) -> Numbers:
    """Time the step of a stage on all its images; return what was found, such as `step_ms`."""
    config, folder = config_of(context), context.folder / "runs" / NAME
    steps = (1, 2, 1, 1) if context.tiny else (WARM, TIMED, WATCHED, PROFILED)
    manifest = prepare(context.source(), config.data, artifacts.data(folder))
    write_some_labels(folder, manifest, config.clusters)
    shutil.rmtree(folder / stage, ignore_errors=True)
    worker = TimedWorker(folder, stage, context, steps)
    with suppress(EnoughSteps):
        TRAIN[stage].train(config, TRAIN[stage].settings_in(config), worker)
    bare = bare_seconds(context, stage, config, steps)
    found = worker.found
    step = found.pop("step_seconds")
    images = images_of_step(stage, config)
    return {
        "step_ms": 1e3 * step,
        "bare_ms": 1e3 * bare,
        "ratio": step / bare,
        "images_per_second": images / step,
        **found,
    }


def write_some_labels(folder: Path, manifest: Ingested, clusters: int) -> None:
    """Give every fifth image a label: the time of a step does not depend on which."""
    labels = np.full(manifest.n, UNRELIABLE)
    labels[::5] = np.arange(len(labels[::5])) % clusters
    artifacts.reliable_labels_file(folder).parent.mkdir(exist_ok=True)
    np.save(artifacts.reliable_labels_file(folder), labels)


def images_of_step(stage: str, config: Config) -> int:
    semi = config.spice_semi
    return semi.labelled * (1 + semi.ratio) if stage == "spice_semi" else getattr(config, stage).batch


class EnoughSteps(Exception):
    """All steps are measured."""


class TimedWorker(LocalWorker):
    """Times some steps, watches a few for synchronisations, profiles a few more, then ends the training."""

    def __init__(self, run: Path, stage: str, context: Context, steps: tuple[int, int, int, int]):
        super().__init__(run, stage, context.device, storage=Storage(checkpoint_seconds=1e6))
        self.context, self.reports = context, 0
        self.warm, self.timed, self.watched, self.profiled = np.cumsum(steps).tolist()
        self.found: dict[str, Any] = {}
        self.catcher = warnings.catch_warnings(record=True)
        on_gpu = [ProfilerActivity.CUDA] * (context.device.type == "cuda")
        self.profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])

    def report(self, *args: Any, **options: Any) -> None:
        super().report(*args, **options)
        self.reports += 1
        gpu = self.device.type == "cuda"
        if self.reports == self.warm:
            self.context.synchronize()
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            self.started = perf_counter()
        elif self.reports == self.timed:
            self.context.synchronize()
            self.found["step_seconds"] = (perf_counter() - self.started) / (self.timed - self.warm)
            self.found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
            self.seen = self.catcher.__enter__()
            warnings.simplefilter("always")
            if gpu:
                torch.cuda.set_sync_debug_mode("warn")
        elif self.reports == self.watched:
            if gpu:
                torch.cuda.set_sync_debug_mode("default")
            self.catcher.__exit__(None, None, None)
            self.found |= synchronisations(self.seen or [], self.watched - self.timed)
            self.profile.__enter__()
        elif self.reports == self.profiled:
            self.context.synchronize()
            self.profile.__exit__(None, None, None)
            self.found |= launches([event.name for event in self.profile.events() or []], self.profiled - self.watched)
            raise EnoughSteps


def synchronisations(seen: list[warnings.WarningMessage], steps: int) -> Numbers:
    """Count PyTorch's warnings of synchronising operations, by file and line.

    Those of reports, which a bar asks for at most twice a second, are counted by themselves.
    """
    places = Counter(
        f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"
        for warning in seen
        if "synchronizing" in str(warning.message)
    )
    of_reports = sum(count for place, count in places.items() if place.startswith("distributed/worker.py"))
    return {
        "synchronisations_a_step": (sum(places.values()) - of_reports) / steps,
        "of_reports": of_reports / steps,
        "asked_for_by": [f"{place} {count / steps:g}" for place, count in places.most_common(6)],
    }


def launches(events: list[str], steps: int) -> Numbers:
    """Count the kernel launches, waits and copies of the CUDA runtime, and PyTorch's operations, in the profile."""
    count = Counter(events)

    def of(names: tuple[str, ...]) -> float:
        return sum(count[name] for name in names) / steps

    return {
        "launches_a_step": of(LAUNCHES),
        "waits_a_step": of(WAITS),
        "copies_a_step": of(("cudaMemcpyAsync",)),
        "operations_a_step": sum(number for name, number in count.items() if name.startswith("aten::")) / steps,
    }


# ---------------------------------------------------------------- bare passes


def bare_seconds(context: Context, stage: str, config: Config, steps: tuple[int, ...]) -> float:
    """Time the bare passes of a step of the stage, in seconds."""
    once = {"moco": bare_moco, "spice_semi": bare_semi, "imc_swav": bare_imc_swav}[stage](context, config)
    for _ in range(steps[0]):
        once()
    context.synchronize()
    started = perf_counter()
    for _ in range(steps[1]):
        once()
    context.synchronize()
    return (perf_counter() - started) / steps[1]


def bare_moco(context: Context, config: Config) -> Callable[[], None]:
    """Make the function that passes forward and backward through the query network, forward through the key network."""
    backbone = new_backbone(config)
    net = place(nn.Sequential(backbone, Projection(backbone.dim, config.moco.dim)), context.device).train()
    slow = slow_copy(net).train()
    (view,) = random_views(context, config, [(config.moco.batch, config.data.size)])

    def slow_forward() -> None:
        with torch.no_grad(), autocast(context.device, config.precision):
            slow(view)
        forget_statistics(slow)

    return passes_of(context, config, net, [view], slow_forward)


def bare_semi(context: Context, config: Config) -> Callable[[], None]:
    """Make the function that passes the labelled images and both views of the others forward and backward."""
    task = spice_semi.network_task(config, config.spice_semi)
    net = place(spice_semi.new_network(task, config.spice_semi, Path()), context.device).train()
    count = config.spice_semi.labelled * (1 + 2 * config.spice_semi.ratio)
    return passes_of(context, config, net, random_views(context, config, [(count, config.data.size)]))


def bare_imc_swav(context: Context, config: Config) -> Callable[[], None]:
    """Make the function that passes large and small crops forward, each size by itself, and backward together."""
    backbone = new_backbone(config)
    net = place(imc_swav.SwavNet(backbone, config.imc_swav.dim, config.imc_swav.prototypes), context.device).train()
    sizes = Counter(view.size for view in config.imc_swav.views(config.data.size))
    shapes = [(config.imc_swav.batch * count, size) for size, count in sizes.items()]
    return passes_of(context, config, net, random_views(context, config, shapes))


def random_views(context: Context, config: Config, shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    channels = config.data.channels
    return [torch.randn(count, channels, side, side, device=context.device) for count, side in shapes]


def passes_of(
    context: Context,
    config: Config,
    net: nn.Module,
    views: list[torch.Tensor],
    before: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    set_groups(net, config.bn_groups)

    def once() -> None:
        before()
        loss = torch.zeros((), device=context.device)
        for view in views:
            with autocast(context.device, config.precision):
                out = net(view)
            loss = loss + (out[-1] if isinstance(out, tuple) else out).float().sum()
        loss.backward()
        net.zero_grad()
        forget_statistics(net)

    return once
