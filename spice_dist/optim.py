"""Parameter groups, and schedules that are functions of the step: they have no state to save."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def cosine(progress: float) -> float:
    """Compute MoCo's factor on the learning rate, (1 + cos(pi p)) / 2: 1 at progress 0, 0 at progress 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def warm_up(epoch: float, epochs: float) -> float:
    """Compute Goyal et al.'s factor on the learning rate of large batches: it rises from 0 to 1 over `epochs`."""
    return min(1.0, epoch / epochs) if epochs > 0 else 1.0


def sgd(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.SGD:
    """Make SGD of momentum 0.9 with weight decay on every parameter, in one fused kernel."""
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, fused=True)


def steps_down(progress: float, milestones: Iterable[float], factor: float) -> float:
    """Compute the factor on the learning rate: `factor` to the power of the milestones (0 to 1) up to `progress`."""
    return factor ** sum(progress >= milestone for milestone in milestones)


def adam(
    parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Adam:
    """Make Adam with weight decay in the gradient, in one fused kernel; parameters without a gradient stay."""
    return torch.optim.Adam(parameters, lr, betas, weight_decay=weight_decay, fused=True)


def lars(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Make LARS (You et al. 2017), for batches of thousands: only kernels decay and have steps scaled by their norm."""
    from timm.optim.lars import Lars

    return Lars(decay_kernels_only(module, weight_decay), lr, momentum=0.9)  # pyright: ignore[reportArgumentType]


def fixmatch_cosine(progress: float) -> float:
    """Compute FixMatch's factor, cos(7 pi p / 16): 1 at progress 0, about 0.2 at progress 1."""
    return math.cos(7 * math.pi * progress / 16)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def decay_kernels_only(module: nn.Module, weight_decay: float) -> list[dict]:
    """Make two parameter groups: kernels (two axes or more, no biases of stacked heads) decay, the rest does not."""
    named = list(module.named_parameters())
    kernels = [p for name, p in named if p.ndim >= 2 and "bias" not in name]
    rest = [p for name, p in named if p.ndim < 2 or "bias" in name]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named parameter.key, for a checkpoint without pickle."""
    state = optimizer.state_dict()["state"]
    return {
        f"{parameter}.{key}": value
        for parameter, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state in the memory layout of the parameters, which fused kernels rely on."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        like = parameters[int(number)]
        state.setdefault(int(number), {})[key] = torch.empty_like(like).copy_(value) if value.ndim else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
