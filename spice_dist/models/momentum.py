"""Moving averages and queues: the momentum encoder, the EMA network, MoCo's queue of keys."""

import copy
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def slow_copy(module: M) -> M:
    """Copy a module without gradients; `follow` moves the copy."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Set slow <- momentum * slow + (1 - momentum) * fast, parameters only, as one fused operation."""
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        list(slow.parameters()), list(fast.parameters()), 1 - momentum
    )


@torch.no_grad()
def copy_buffers(slow: nn.Module, fast: nn.Module) -> None:
    """Set the buffers of one network to those of another, as one fused operation for each type of number."""
    pairs = list(zip(slow.buffers(), fast.buffers(), strict=True))
    for kind in {target.dtype for target, _ in pairs}:
        targets, sources = zip(*(pair for pair in pairs if pair[0].dtype == kind), strict=True)
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def copy_where(better: Bool[Tensor, ""], kept: nn.Module, now: nn.Module) -> None:
    """Copy the state of `now` into `kept` if `better` is true, which no host reads."""
    for target, source in zip(kept.state_dict().values(), now.state_dict().values(), strict=True):
        target.copy_(source.where(better, target))


class Queue(nn.Module):
    """A ring buffer of the last `size` keys, which starts as random unit vectors.

    The position of the next keys is a function of the step: it is not saved, and no call waits for the device.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.keys: Tensor
        self.register_buffer("keys", nn.functional.normalize(torch.randn(size, dim), dim=1))

    @torch.no_grad()
    def push(self, keys: Float[Tensor, "B D"], step: int) -> None:
        """Overwrite the oldest keys by those of `step`; B is the same in all steps, and at most `size`."""
        start = step * len(keys) % len(self.keys)
        before_end = min(len(keys), len(self.keys) - start)
        self.keys[start : start + before_end] = keys[:before_end]
        self.keys[: len(keys) - before_end] = keys[before_end:]
