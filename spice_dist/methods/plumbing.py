"""Functions that all training loops call: data, devices, precision, passes of a step, and the state of a checkpoint."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from spice_dist import artifacts
from spice_dist.data import augment
from spice_dist.data.crops import Key
from spice_dist.data.images import Images, chunk_of
from spice_dist.data.loaders import open_images
from spice_dist.data.manifest import Ingested
from spice_dist.data.order import epoch_order, worker_batches
from spice_dist.data.scratch import staged
from spice_dist.data.views import View
from spice_dist.distributed import checkpoint, collectives
from spice_dist.distributed.checkpoint import Checkpoint, Tensors
from spice_dist.distributed.worker import Worker, accumulating
from spice_dist.errors import UserError
from spice_dist.models.backbone import Backbone, pretrained_backbone
from spice_dist.models.split_batch_norm import forget_statistics, set_groups
from spice_dist.optim import load_optimizer_tensors, optimizer_tensors
from spice_dist.task import Task

M = TypeVar("M", bound=nn.Module)
TAKES_ALL = 0.9  # share of the images in one cluster above which it is told


def tell_if_one_takes_all(stage: str, labels: Int[Tensor, " S"], worker: Worker) -> bool:
    """Print a line if one cluster holds more than TAKES_ALL of these images; return whether it does."""
    share = int(torch.bincount(labels.flatten()).max()) / labels.numel()
    if share > TAKES_ALL and worker.rank == 0:
        tqdm.write(
            f"{stage}: one cluster takes {share:.0%} of the images; ask for fewer, or see outliers.csv", sys.stderr
        )
    return share > TAKES_ALL


def open_dataset(task: Task, worker: Worker) -> tuple[Images, Ingested]:
    """Open the images of a worker's run, and the manifest of those that are clustered, only train, or are held out.

    They are read from a copy on the worker's disk if it has a scratch folder.
    """
    return open_run_dataset(task, worker.run, worker.device, worker.scratch)


def open_run_dataset(
    task: Task, run: Path, device: torch.device, scratch: Path | None = None
) -> tuple[Images, Ingested]:
    """Do as `open_dataset` without a worker.

    Args:
        scratch: a folder on this node's disk for a copy of the images, which is read instead.
    """
    data, folder = task.data, artifacts.data(run)
    if scratch is not None:
        folder = staged(folder, scratch)
    images = open_images(folder, device=device, size=data.size, channels=data.channels, loader=data.loader)
    return images, artifacts.manifest(run)


def place(module: M, device: torch.device) -> M:
    """Move to the device, in the memory layout of the fastest convolutions: 1.1 to 1.4 times as fast on a CPU."""
    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module.to(device)


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager:
    """Enter mixed precision; `precision` is that of `Task`."""
    low = _multiplies_bf16(device) if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16) if low else nullcontext()


def _multiplies_bf16(device: torch.device) -> bool:
    """Return whether a GPU has bf16 itself: older ones, such as a T4, imitate it more slowly than they do float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def passes_per_step(module: nn.Module, groups: int, device: torch.device) -> int:
    """Return in how many forward passes a step's `groups` BatchNorm groups are computed; set the module's groups.

    A GPU takes one pass. On a CPU one pass per group takes the same time and less memory, and adds gradients up in the
    same order as two workers, so that one worker gets the same bits as two.
    """
    passes = groups if device.type == "cpu" else 1
    set_groups(module, groups // passes)
    return passes


def passes_that_fit(
    task: Task,
    networks: Sequence[nn.Module],
    images: int,
    trial: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    worker: Worker,
) -> int:
    """Return `passes_per_step`, or twice as many if a GPU's memory does not suffice; set the networks' groups.

    Smaller passes keep the global batch and its BatchNorm groups, so the result is the same up to rounding. The trial
    is a forward and a backward pass over black images, beside the optimizer's moments; its effects are undone.

    Args:
        networks: all that a step runs.
        images: in a step of all workers, for the message.
        trial: runs what one pass of so many holds in memory; returns a scalar for the backward pass.

    Raises:
        UserError: half of the images are still too many for a pass, or there is only one group.
    """
    groups = task.bn_groups // worker.world
    passes = [passes_per_step(network, groups, worker.device) for network in networks][0]
    if worker.device.type == "cpu":
        return passes  # a CPU raises no error when memory is exhausted, and each group is a pass already
    for tried in (passes, 2 * passes):
        if groups % tried == 0:
            for network in networks:
                set_groups(network, groups // tried)
            exhausted = _exhausts_memory(task, networks, partial(trial, tried), optimizer, worker.device)
            if not collectives.largest_int(exhausted, worker.device):
                return tried
    raise UserError(
        f"out of memory with {images // worker.world // passes} images of {task.data.size} pixels in one pass, and "
        f"half of them; set a smaller batch, or more bn_groups (now {task.bn_groups}): a pass holds one at least"
    )


def black_images(task: Task, count: int, size: int, worker: Worker) -> Float[Tensor, "B C H W"]:
    """Make images for a trial; `size` in pixels, 0: the data set's."""
    side = size or task.data.size
    return torch.zeros((count, task.data.channels, side, side), device=worker.device)


def _exhausts_memory(
    task: Task,
    networks: Sequence[nn.Module],
    trial: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> int:
    training = [network.training for network in networks]
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: list[Tensor] = []
    try:
        for _ in range(2 if "betas" in optimizer.defaults else 1):
            moments += [torch.empty_like(parameter) for parameter in learned]
        for network in networks:
            network.train()
        with autocast(device, task.precision):
            loss = trial()
        loss.backward()
    except torch.OutOfMemoryError:
        return 1
    finally:
        for network, before in zip(networks, training, strict=True):
            network.train(before).zero_grad()
            forget_statistics(network)
    return 0


def in_passes(model: nn.Module, *parts: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield the i-th part of each sequence for pass i of a step; only the last pass averages gradients over workers.

    The loop's body enters `autocast` for the forward pass alone: the backward pass must be outside of it.
    """
    passes = list(zip(*parts, strict=True))
    for number, parts_of_pass in enumerate(passes, 1):
        with accumulating(model, last=number == len(passes)):
            yield parts_of_pass


def own_positions(sizes: Sequence[int], worker: Worker) -> Int[Tensor, " b"]:
    """Return the positions of this worker's images in a global batch of parts of these sizes; they key their views."""
    return torch.cat([rows.chunk(worker.world)[worker.rank] for rows in torch.arange(sum(sizes)).split(list(sizes))])


def by_group(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Arrange a batch as (G, V, ...): each BatchNorm group has its share of every part in turn."""
    return torch.cat([images.unflatten(0, (groups, len(images) // groups)) for images in parts], dim=1)


def view_pairs(
    task: Task, images: Images, num_images: int, batch: int, epochs: int, view: View, start: int, worker: Worker
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this worker's two views of every global batch from step `start` on, without incomplete batches."""
    pairs = view_lists(task, images, num_images, batch, epochs, [view, view], start, worker)
    return ((one, other) for one, other in pairs)


def view_lists(
    task: Task,
    images: Images,
    num_images: int,
    batch: int,
    epochs: int,
    views: Sequence[View],
    start: int,
    worker: Worker,
) -> Iterator[list[Tensor]]:
    """Do as `view_pairs` for any number of views of any sizes; an image is read once for all of its views."""
    steps = num_images // batch
    for epoch in range(start // steps, epochs):
        batches = worker_batches(epoch_order(task.seed, epoch, num_images), batch, worker.world, worker.rank)
        batches = batches[max(0, start - epoch * steps) :]
        keyed = [(view, (task.seed, epoch, stream)) for stream, view in enumerate(views)]
        if len(batches):
            drawn = augment.view_batches(images, batches.ravel(), batches.shape[1], keyed, task.backbone.statistics)
            yield from (parts for parts, _ in drawn)


@torch.no_grad()
def view_features(
    task: Task,
    images: Images,
    index: Int[np.ndarray, " M"],
    views: Sequence[tuple[View, Key]],
    functions: Sequence[Callable[[Float[Tensor, "B C H W"]], Tensor]],
) -> list[Tensor]:
    """Apply each function to its random view of these images, (M, ...); an image is read once for all views.

    Every worker computes its share and gets all results.
    """
    share = collectives.share(len(index))
    results: list[list[Tensor]] = [[] for _ in views]
    index_of_share = index[share.start : share.stop]
    for batch, _ in augment.view_batches(
        images, index_of_share, chunk_of(images.size), views, task.backbone.statistics
    ):
        for result, function, view in zip(results, functions, batch, strict=True):
            result.append(function(view))
    return [collectives.gather_shares(torch.cat(result), len(index)) for result in results]


def check_batch(task: Task, stage: str, batch: int, num_images: int) -> None:
    """Raise a UserError if a stage cannot train on batches of this size."""
    if batch > num_images:
        fits = num_images // task.bn_groups * task.bn_groups
        raise UserError(
            f"{stage}.batch is {batch}, more than the {num_images} images; "
            f"set it to {fits} or less (--set {stage}.batch=...)"
        )
    if batch % task.bn_groups or batch < 2 * task.bn_groups:
        raise UserError(
            f"{stage}.batch is {batch}; it must be a multiple of bn_groups, {task.bn_groups}, with two images or more "
            f"for each of these groups"
        )


def new_backbone(task: Task) -> Backbone:
    """Build the backbone of the run with random weights, or those that its configuration names."""
    return pretrained_backbone(task.backbone, task.data.channels, task.data.size)


def first_backbone(task: Task, run: Path) -> Backbone:
    """Build the backbone that stage 1 begins with: of the run that this one goes on from, else `new_backbone`."""
    return begin_with_earlier(new_backbone(task), run, "backbone")


def begin_with_earlier(module: M, run: Path, name: str) -> M:
    """Load the weights of this name of the run that this one goes on from, if there are any of the same shapes."""
    saved = checkpoint.newest(run / "from/checkpoints")
    if saved is None or f"{name}.safetensors" not in saved.sha256:
        return module
    tensors, wanted = saved.tensors(name), module.state_dict()
    if {key: tensor.shape for key, tensor in tensors.items()} == {key: value.shape for key, value in wanted.items()}:
        module.load_state_dict(tensors)
    return module


def load_backbone(task: Task, run: Path) -> Backbone:
    """Load the network of stage 1, with the mixture of the stage `features` if that is done."""
    if task.pretext == "none":
        backbone = new_backbone(task)
        if backbone.mixture is not None and artifacts.mixture_file(run).exists():
            backbone.mixture.set(**artifacts.mixture(run))
        return backbone
    backbone = Backbone(task.backbone, task.data.channels, task.data.size)
    backbone.load_state_dict(finished(run / task.pretext).tensors("backbone"))
    return backbone


def state_of(parts: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> Tensors:
    """Collect the state of these modules and their optimizer for a checkpoint."""
    return {**modules_state(parts), "optimizer": optimizer_tensors(optimizer)}


def modules_state(parts: dict[str, nn.Module]) -> Tensors:
    return {name: module.state_dict() for name, module in parts.items()}


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Name the first tensor with a number that is infinite or none; "" if there is no such tensor."""
    for name, value in tensors.items():
        if bad := int((~torch.isfinite(value)).sum()):
            return f"{bad} of {value.numel()} numbers in {name} are not finite"
    return ""


def named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with the prefix, without it: the state of a submodule."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def resume(worker: Worker, parts: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Load the stage's newest checkpoint into modules and optimizer; return its step, 0 without a checkpoint."""
    saved = worker.resume()
    if saved is None:
        return 0
    load_state(parts, optimizer, saved)
    return saved.step


def load_state(parts: dict[str, nn.Module], optimizer: torch.optim.Optimizer, saved: Checkpoint) -> None:
    load_modules(parts, saved)
    load_optimizer_tensors(optimizer, saved.tensors("optimizer"))


def load_modules(parts: dict[str, nn.Module], saved: Checkpoint) -> None:
    for name, module in parts.items():
        module.load_state_dict(saved.tensors(name))


def finished(stage: Path) -> Checkpoint:
    """Load the last checkpoint of a finished stage; raise a UserError if only older ones are intact."""
    saved = checkpoint.newest(stage / "checkpoints")
    if saved is None or saved.step != saved.state["total"]:
        raise UserError(f"{stage} has lost its last checkpoint; remove {stage} and run the same command again")
    return saved
