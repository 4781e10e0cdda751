"""Wide ResNets (Zagoruyko and Komodakis 2016) as in FixMatch, which SPICE trains in stage 3.

BatchNorm and LeakyReLU come before each convolution, and once more before the pooling. The first block of a group
activates before it branches, so that branch and shortcut have the same input. A 3x3 stem of 16 channels keeps the
resolution. A group's stride is that of its first block.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

STEM = 16  # channels
BLOCKS = 4  # of a group
SLOPE = 0.1  # of LeakyReLU below zero
MOMENTUM = 0.001  # of the running statistics, 1 - 0.999, as for the averaged network


@dataclass(frozen=True)
class Shape:
    widths: tuple[int, ...]  # of the groups
    strides: tuple[int, ...]


SHAPES = {
    "wrn_28_2": Shape((32, 64, 128), (1, 2, 2)),  # CIFAR-10
    "wrn_28_8": Shape((128, 256, 512), (1, 2, 2)),  # CIFAR-100
    "wrn_37_2": Shape((32, 64, 128, 256), (2, 2, 2, 2)),  # STL-10
}

norm = partial(nn.BatchNorm2d, momentum=MOMENTUM)


class WideResNet(nn.Module):
    """Images (B, C, H, W) of any size to the pooled activations (B, last width), before any classifier."""

    def __init__(self, name: str, channels: int = 3):
        super().__init__()
        shape = SHAPES[name]
        self.pretrained_cfg = {"architecture": name, "first_conv": "stem"}  # as timm's models have it
        self.stem = _conv(channels, STEM, 3, 1)
        before, blocks = STEM, []
        for width, stride in zip(shape.widths, shape.strides, strict=True):
            for place in range(BLOCKS):
                blocks.append(Block(before, width, stride if place == 0 else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm(before)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        x = activate(self.norm(self.blocks(self.stem(images))))
        return x.mean((2, 3))


class Block(nn.Module):
    """Norm-activation-conv3x3(stride)-norm-activation-conv3x3, added to the input or its 1x1 convolution (stride)."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = norm(before), _conv(before, width, 3, stride)
        self.norm2, self.conv2 = norm(width), _conv(width, width, 3, 1)
        changes = before != width or stride != 1
        self.shortcut = _conv(before, width, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = activate(self.norm1(x))
        branch = self.conv2(activate(self.norm2(self.conv1(active))))
        return branch + (x if self.shortcut is None else self.shortcut(active))


def activate(x: Tensor) -> Tensor:
    """Apply LeakyReLU in place: nothing else reads a BatchNorm's output, and its backward pass needs only its input."""
    return F.leaky_relu_(x, SLOPE)


def _conv(before: int, after: int, kernel: int, stride: int) -> nn.Conv2d:
    """Make a convolution with same padding, no bias and weights from N(0, 2 / (kernel^2 after))."""
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    with torch.no_grad():
        conv.weight.normal_(0, (2 / (kernel**2 * after)) ** 0.5)
    return conv
