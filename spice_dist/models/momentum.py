"""Slow copies and memory: the momentum encoder, the EMA network, MoCo's queue of keys, FreeMatch's thresholds."""

import copy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def slow_copy(module: M) -> M:
    """A copy that no gradient reaches, to be moved by `follow`."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """slow <- momentum * slow + (1 - momentum) * fast, parameters only, as one fused operation."""
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        list(slow.parameters()), list(fast.parameters()), 1 - momentum
    )


@torch.no_grad()
def copy_buffers(slow: nn.Module, fast: nn.Module) -> None:
    for target, source in zip(slow.buffers(), fast.buffers(), strict=True):
        target.copy_(source)


class Queue(nn.Module):
    """A ring of the last `size` keys, any number; starts as random unit vectors.

    Where the next keys go is a function of the step: there is nothing to save and the device is never asked.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.keys: Tensor
        self.register_buffer("keys", nn.functional.normalize(torch.randn(size, dim), dim=1))

    @torch.no_grad()
    def push(self, keys: Float[Tensor, "B D"], step: int) -> None:
        """Overwrite the oldest keys by those of `step`; B is the same in all steps and at most the size."""
        start = step * len(keys) % len(self.keys)
        before_end = min(len(keys), len(self.keys) - start)
        self.keys[start : start + before_end] = keys[:before_end]
        self.keys[: len(keys) - before_end] = keys[before_end:]


class AdaptiveThreshold(nn.Module):
    """FreeMatch's self-adaptive thresholds (Wang et al. 2023), from the predictions q_b of a step's weak views:

        tau_t = lambda tau_{t-1} + (1 - lambda) mean_b max_k q_b(k)        starts at 1 / K
        p_t(k) = lambda p_{t-1}(k) + (1 - lambda) mean_b q_b(k)            starts at 1 / K
        tau_t(k) = tau_t p_t(k) / max_j p_t(j)

    A network that is unsure has low thresholds, a class that is rarely predicted a lower one than the others.
    """

    def __init__(self, clusters: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.confidence: Tensor
        self.register_buffer("confidence", torch.tensor(1 / clusters))
        self.shares: Tensor
        self.register_buffer("shares", torch.full((clusters,), 1 / clusters))

    def of_classes(self) -> Float[Tensor, " K"]:
        """tau_t(k), in (0, 1]."""
        return self.confidence * self.shares / self.shares.max()

    @staticmethod
    def summary(logits: Float[Tensor, "B K"]) -> Float[Tensor, " L"]:
        """What `update` has to know of these predictions, L = K + 1: the mean of max_k q(k), then those of q(k)."""
        probs = logits.detach().float().softmax(1)
        return torch.cat([probs.amax(1).mean()[None], probs.mean(0)])

    def update(self, summary: Float[Tensor, " L"]) -> None:
        """`summary` of a step's global batch, or the mean over its equal parts."""
        self.confidence.lerp_(summary[0], 1 - self.momentum)
        self.shares.lerp_(summary[1:], 1 - self.momentum)
