"""Parameter groups, and schedules as functions of the step: nothing to save, nothing to restore."""

import math

import torch
from torch import Tensor, nn


def cosine(progress: float) -> float:
    """MoCo's factor on the learning rate: 1 at progress 0, 0 at progress 1, (1 + cos(pi p)) / 2."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def fixmatch_cosine(progress: float) -> float:
    """FixMatch's factor, cos(7 pi p / 16): 1 at progress 0, about 0.2 at progress 1."""
    return math.cos(7 * math.pi * progress / 16)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def decay_kernels_only(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: kernels (two axes or more, biases of stacked heads excepted) decay, the rest does not."""
    named = list(module.named_parameters())
    kernels = [p for name, p in named if p.ndim >= 2 and not name.endswith("bias")]
    rest = [p for name, p in named if p.ndim < 2 or name.endswith("bias")]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of the optimizer as named tensors, for a checkpoint without pickle; names are parameter.key."""
    state = optimizer.state_dict()["state"]
    return {
        f"{parameter}.{key}": value
        for parameter, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, key = name.split(".", 1)
        state.setdefault(int(parameter), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
