"""Copies from the host to a GPU that neither host nor GPU waits for."""

from functools import cache

import torch
from torch import Tensor


def page_locked(x: Tensor, device: torch.device) -> Tensor:
    """Return `x`, if it is on the host, in memory from which a GPU can copy while the host goes on."""
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x


def send(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on the device, without a wait for the work that a GPU has queued.

    CUDA copies at once only from page-locked memory; from any other it waits. PyTorch keeps the page-locked copy until
    the GPU has read it.
    """
    return page_locked(x, device).to(device, non_blocking=True)


def send_beside(x: Tensor, device: torch.device) -> Tensor:
    """Do as `send` beside the work that a GPU has queued: a batch crosses while the step before it is computed."""
    if device.type != "cuda" or x.device.type != "cpu":
        return send(x, device)
    copying, computing = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        on_device = send(x, device)
    computing.wait_stream(copying)
    on_device.record_stream(computing)
    return on_device


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the numbers on the device, copied once: `torch.tensor(values, device=...)` waits for a GPU each time."""
    return torch.tensor(values, device=device)
