"""Features of a middle stage of a network, beside its final ones.

A classifier's final features separate the classes that it was trained for. Other images, such as digits, are separated
better by an earlier stage: by the largest activation of each channel in the last stage at a 16th of the image's side.
`spice_dist.mixing` chooses its weight by the images.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

REDUCTION = 16  # of the image's side, in the middle stage


def stages(body: nn.Module) -> list[dict[str, Any]]:
    """List "module", "num_chs" and "reduction" of the side for each stage; empty if timm lists no stages."""
    info: Any = getattr(body, "feature_info", ())
    return list(getattr(info, "info", info)) if hasattr(body, "forward_intermediates") else []


def middle_stage(body: nn.Module) -> int | None:
    """Return the index of the last stage at a 16th of the side, if a stage of lower resolution follows.

    It is None for networks without such stages, such as transformers of one resolution.
    """
    reductions = [stage["reduction"] for stage in stages(body)]
    if REDUCTION not in reductions or max(reductions) == REDUCTION:
        return None
    return len(reductions) - 1 - reductions[::-1].index(REDUCTION)


def peaks(activations: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C"]:
    """Take the largest activation of each channel."""
    return activations.float().amax((2, 3))


class Mixture(nn.Module):
    """Joins unit final features f (B, D) and peaks p (B, C) to one feature of unit norm, (B, D + C).

    It is [f, weight u] / sqrt(1 + weight^2) with u = (p - center) / |p - center|. `center`, a mean over images, and
    `weight` are tensors of the network's state. The weight is 0 until it is set.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.center: Tensor
        self.weight: Tensor
        self.register_buffer("center", torch.zeros(channels))
        self.register_buffer("weight", torch.zeros(()))

    def set(self, weight: float, center: Sequence[float]) -> None:
        self.weight.fill_(weight)
        self.center.copy_(torch.tensor(center))

    def forward(self, features: Float[Tensor, "B D"], middle: Float[Tensor, "B C"]) -> Float[Tensor, "B D+C"]:
        direction = F.normalize(middle.float() - self.center, dim=1)
        return torch.cat([features, self.weight * direction], 1) / (1 + self.weight**2).sqrt()
