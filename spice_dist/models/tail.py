"""Split a network in two: a trunk that runs once for each view, and a tail of the last blocks that is trained.

Training from stored activations in front of the tail saves the trunk's forward and backward passes. In
EfficientNet-lite0 the tail has 13 % of the multiplications, and an activation at 224 pixels takes 19 kB in float16.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16
from torch import Tensor, nn

from spice_dist.errors import UserError
from spice_dist.models.backbone import Backbone
from spice_dist.models.intermediate import Mixture, peaks, stages

TAIL_SHARE = 0.15  # of the multiplications at most, unless the last block alone has more
TOLERANCE = 2e-2  # of the norm of a feature, for the rounding of activations to float16


@dataclass(frozen=True)
class _Parts:
    """A timm network in the order of its `forward`: `before`, every unit, `after`, then the pooled features."""

    before: Sequence[Callable[[Tensor], Tensor]]
    units: Sequence[nn.Module]
    after: Sequence[nn.Module]
    pooled: Callable[[Tensor], Tensor]
    head: Sequence[nn.Module]  # the modules of `pooled`
    middle: int = 0  # units up to the end of the middle stage, which a mixture takes


class Trunk(nn.Module):
    """Maps images (B, C, H, W) to the activations (B, ...) in front of the tail, float16, in eval mode.

    If the backbone mixes in a middle stage of the trunk, the stage's peaks follow the flattened activations. Values are
    clamped at 65,504, the largest of float16.
    """

    def __init__(
        self, before: Sequence[Callable[[Tensor], Tensor]], units: Iterable[nn.Module], middle: int | None = None
    ):
        super().__init__()
        self.before, self.units = tuple(before), nn.ModuleList(units)
        self.middle = middle  # units up to the middle stage's end

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"]) -> Float16[Tensor, "B ..."]:
        x, beside = images, None
        for step in self.before:
            x = step(x)
        for number, unit in enumerate(self.units, 1):
            x = unit(x)
            beside = peaks(x) if number == self.middle else beside
        if beside is not None:
            x = torch.cat([x.flatten(1), beside], 1)
        return x.clamp(-65_504, 65_504).half()


class Tail(nn.Module):
    """Maps activations (B, ...) of the trunk to features (B, D). It shares the modules of the backbone."""

    def __init__(self, parts: _Parts, cut: int, mixture: Mixture | None, shape: Sequence[int]):
        super().__init__()
        self.units, self.after = nn.ModuleList(parts.units[cut:]), nn.ModuleList(parts.after)
        self.head = nn.ModuleList(parts.head)  # registers its parameters, such as a last norm's, for training
        self.pooled = parts.pooled
        self.mixture, self.shape = mixture, tuple(shape)
        self.middle = None if mixture is None else parts.middle - cut  # units of the tail up to the middle stage's end

    @property
    def layers(self) -> list[nn.Module]:
        """All layers, first to last, for learning rates by layer; each parameter is in one of them."""
        return [*self.units, nn.ModuleList([*self.after, *self.head])]

    def forward(self, activations: Float[Tensor, "B ..."]) -> Float[Tensor, "B D"]:
        x, beside = activations, None
        if self.middle is not None and self.middle <= 0:  # the middle stage is in the trunk
            size = math.prod(self.shape)
            x, beside = activations[:, :size].unflatten(1, self.shape), activations[:, size:]
        for number, unit in enumerate(self.units, 1):
            x = unit(x)
            beside = peaks(x) if number == self.middle else beside
        for module in self.after:
            x = module(x)
        features = self.pooled(x)
        if self.mixture is None:
            return features
        assert beside is not None
        return self.mixture(F.normalize(features.float(), dim=1), beside)


@dataclass(frozen=True)
class SplitNetwork:
    """A backbone in two parts; training `tail` trains the backbone.

    Attributes:
        trunk: encodes each view once.
        tail: is trained.
        blocks: number of blocks of the tail.
        activation_bytes: of one view of one image.
        share: the tail's share of the network's multiplications, in (0, 1); attention's products are not counted.
    """

    trunk: Trunk
    tail: Tail
    blocks: int
    activation_bytes: int
    share: float


@torch.no_grad()
def split(backbone: Backbone, channels: int, size: int, blocks: int = 0) -> SplitNetwork:
    """Cut a backbone in front of its last blocks, so that tail(trunk(x)) is backbone(x) in eval mode, up to rounding.

    Args:
        channels: of the images.
        size: of the images, pixels.
        blocks: of the tail; 0: as many as have TAIL_SHARE of the multiplications together, but at least one.

    Raises:
        UserError: this kind of network cannot be cut, or the network has fewer blocks.
    """
    parts = _parts(backbone)
    image = torch.randn((1, channels, size, size), generator=torch.Generator().manual_seed(0))
    image = image.to(next(backbone.parameters()).device)
    training = backbone.training
    try:
        backbone.eval()
        costs = _multiplications(backbone, [*parts.units, *parts.after, *parts.head], image)
        whole, (*unit_costs, end_cost) = costs[0], [*costs[1][: len(parts.units)], sum(costs[1][len(parts.units) :])]
        blocks = blocks or _affordable(unit_costs, end_cost, whole)
        if not 0 < blocks <= len(parts.units):
            raise UserError(f"the last {blocks} blocks are to be tuned; this network has {len(parts.units)}")
        cut = len(parts.units) - blocks
        mixture = backbone.mixture
        trunk = Trunk(parts.before, parts.units[:cut], parts.middle if mixture is not None else None)
        shape = Trunk(parts.before, parts.units[:cut])(image).shape[1:]
        tail = Tail(parts, cut, mixture, shape)
        activation, features = trunk(image), backbone(image)
        if not (tail(activation.float()) - features).norm() <= TOLERANCE * features.norm():
            raise _unknown(backbone)
    finally:
        backbone.train(training)
    return SplitNetwork(trunk, tail, blocks, 2 * activation.numel(), (end_cost + sum(unit_costs[cut:])) / whole)


def _affordable(units: Sequence[float], end: float, whole: float) -> int:
    """Count the last units that cost TAIL_SHARE of the whole at most, together with the end; at least one."""
    count, cost = 1, end + units[-1]
    while count < len(units) and cost + units[-count - 1] <= TAIL_SHARE * whole:
        count += 1
        cost += units[-count]
    return count


def _parts(backbone: Backbone) -> _Parts:
    parts = _units(backbone)
    if backbone.middle is None:
        return parts
    inside = set(backbone.body.get_submodule(stages(backbone.body)[backbone.middle]["module"]).modules())
    return replace(parts, middle=1 + max(place for place, unit in enumerate(parts.units) if unit in inside))


def _units(backbone: Backbone) -> _Parts:
    from timm.models.convnext import ConvNeXt
    from timm.models.efficientnet import EfficientNet
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    body = backbone.body
    if len(backbone.others):
        raise UserError("the last blocks of several networks side by side cannot be tuned; give one --backbone")
    if isinstance(body, EfficientNet):
        units = [block for stage in _children(body.blocks) for block in _children(stage)]
        after: list[Any] = [body.conv_head, body.bn2]
        return _Parts([body.conv_stem, body.bn1], units, after, body.forward_head, [body.global_pool])
    if isinstance(body, ResNet):
        stages = [body.layer1, body.layer2, body.layer3, body.layer4]
        before = [body.conv1, body.bn1, body.act1, body.maxpool]
        units = [block for stage in stages for block in _children(stage)]
        return _Parts(before, units, [], body.forward_head, [body.global_pool])
    if isinstance(body, ConvNeXt):
        units = [unit for stage in _children(body.stages) for unit in (stage.downsample, *_children(stage.blocks))]
        after = [body.norm_pre]
        return _Parts([body.stem], units, after, body.forward_head, [body.head])
    if isinstance(body, VisionTransformer):
        before = [body.patch_embed, body._pos_embed, body.patch_drop, body.norm_pre]
        # the modules of `forward_head` that have parameters
        head = [module for module in (body.attn_pool, body.fc_norm) if module is not None]
        return _Parts(before, _children(body.blocks), [body.norm], body.forward_head, head)
    raise _unknown(backbone)


def _children(module: Any) -> list:
    return list(module.children())


def _unknown(backbone: Backbone) -> UserError:
    name = type(backbone.body).__name__
    return UserError(
        f"the last blocks of a {name} cannot be tuned; those of EfficientNet, ResNet, ConvNeXt and VisionTransformer "
        f"(DINOv2 too) can"
    )


def _multiplications(net: nn.Module, parts: Sequence[nn.Module], image: Tensor) -> tuple[float, list[float]]:
    """Count multiplications of convolutions and linear layers for one image: (whole network, each of its parts)."""
    costs: dict[nn.Module, float] = {}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        costs[module] = costs.get(module, 0.0) + output.numel() * weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        net(image)
    finally:
        for hook in hooks:
            hook.remove()
    per_part = [sum(costs.get(module, 0.0) for module in part.modules()) for part in parts]
    return sum(costs.values()), per_part
