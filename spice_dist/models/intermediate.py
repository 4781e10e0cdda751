"""What a middle stage of a network saw, beside its final features.

The final features of a classifier tell apart what it was trained for. On other images, such as digits, an earlier stage
tells more. Its part is the largest activation of each channel, of the last stage at a 16th of the image's side.
`spice_dist.mixing` chooses by the images how much it counts.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

REDUCTION = 16  # of the image's side, of the stage that is taken


def stages(body: nn.Module) -> list[dict[str, Any]]:
    """Of a network whose stages timm knows, each one's "module", "num_chs" and "reduction" of the side; else empty."""
    info: Any = getattr(body, "feature_info", ())
    return list(getattr(info, "info", info)) if hasattr(body, "forward_intermediates") else []


def middle_stage(body: nn.Module) -> int | None:
    """The place among the stages of the last one at a 16th of the side, if one of lower resolution follows.

    None for networks without such stages, as transformers of one resolution are.
    """
    reductions = [stage["reduction"] for stage in stages(body)]
    if REDUCTION not in reductions or max(reductions) == REDUCTION:
        return None
    return len(reductions) - 1 - reductions[::-1].index(REDUCTION)


def peaks(activations: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C"]:
    """The largest activation of each channel."""
    return activations.float().amax((2, 3))


class Mixture(nn.Module):
    """Unit final features f (B, D) and peaks p (B, C) as one feature of unit norm, (B, D + C).

    [f, weight u] / sqrt(1 + weight^2), u = (p - center) / |p - center|. `center`, a mean over images, and `weight` are
    tensors of the network's state; until they are set the final features count alone.
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
