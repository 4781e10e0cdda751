"""BatchNorm folded into the convolution before it: the same network in evaluation, in two thirds of a CPU's time."""

from copy import deepcopy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spice_dist.models.split_batch_norm import SplitBatchNorm2d

M = TypeVar("M", bound=nn.Module)
TOLERANCE = 1e-3  # of the largest output


@torch.no_grad()
def folded(module: M, example: Float[Tensor, "B C H W"]) -> M:
    """A copy in eval mode without those BatchNorms that follow a convolution; the module itself if that changes it.

    Which BatchNorm follows which convolution is read from the order in which a block registers them. Networks may use
    another order, so the copy is tried on `example`: it must give the same outputs within TOLERANCE of the largest.
    """
    module.eval()
    copy = deepcopy(module)
    _fold(copy)
    before, after = module(example), copy(example)
    same = torch.isfinite(after).all() and (after - before).abs().max() <= TOLERANCE * before.abs().max()
    return copy if same else module


def _fold(module: nn.Module) -> None:
    before: tuple[str, nn.Conv2d] | None = None
    for name, child in list(module.named_children()):
        rest = list(child)[1:] if isinstance(child, nn.Sequential) else []  # timm's fused activation
        norm = list(child)[0] if isinstance(child, nn.Sequential) and len(child) else child
        if isinstance(norm, SplitBatchNorm2d) and before is not None and before[1].out_channels == norm.num_features:
            setattr(module, before[0], fuse_conv_bn_eval(before[1], norm))
            setattr(module, name, nn.Sequential(*rest))
        else:
            _fold(child)
        before = (name, child) if isinstance(child, nn.Conv2d) else None
