"""What every training loop calls and no paper mentions: devices, precision, and the state of a checkpoint."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from spice_dist.data.images import Images, open_images
from spice_dist.data.ingest import Ingested, read_manifest
from spice_dist.distributed import checkpoint
from spice_dist.distributed.checkpoint import Checkpoint, Tensors
from spice_dist.errors import UserError
from spice_dist.models.split_batch_norm import set_groups
from spice_dist.optim import load_optimizer_tensors, optimizer_tensors
from spice_dist.task import Task

M = TypeVar("M", bound=nn.Module)


def open_dataset(task: Task, run: Path, device: torch.device) -> tuple[Images, Ingested]:
    """The images of a run, and the manifest that says which of them are clustered, only train, or are held out."""
    data = task.data
    images = open_images(run / "data", device=device, size=data.size, channels=data.channels, loader=data.loader)
    return images, read_manifest(run / "data")


def place(module: M, device: torch.device) -> M:
    """Move to the device, on a GPU in the memory layout its convolutions are fastest in."""
    if device.type == "cuda":
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module.to(device)


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def passes_per_step(module: nn.Module, groups: int, device: torch.device) -> int:
    """In how many forward passes a step's `groups` BatchNorm groups are computed; tells the module.

    A GPU takes them all in one. On a CPU one pass per group costs the same, holds less memory, and adds gradients up in
    the order in which two workers would, so that one worker gets the same bits as two.
    """
    passes = groups if device.type == "cpu" else 1
    set_groups(module, groups // passes)
    return passes


def state_of(parts: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> Tensors:
    """Everything a checkpoint needs of these modules and their optimizer."""
    tensors: Tensors = {name: module.state_dict() for name, module in parts.items()}
    return {**tensors, "optimizer": optimizer_tensors(optimizer)}


def load_state(parts: dict[str, nn.Module], optimizer: torch.optim.Optimizer, saved: Checkpoint) -> None:
    for name, module in parts.items():
        module.load_state_dict(saved.tensors(name))
    load_optimizer_tensors(optimizer, saved.tensors("optimizer"))


def finished(stage: Path) -> Checkpoint:
    """The last checkpoint of an earlier stage; never one from before its end, if the last is damaged."""
    saved = checkpoint.newest(stage / "checkpoints")
    if saved is None or saved.step != saved.state["total"]:
        raise UserError(f"{stage} has lost its last checkpoint; remove {stage} and run the same command again")
    return saved
