"""Feature models: any timm backbone, with the small-image stem and the split BatchNorm that MoCo needs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spice_dist.data.augment import IMAGENET_MEAN, IMAGENET_STD, Statistics
from spice_dist.errors import UserError
from spice_dist.models.split_batch_norm import split_batch_norm


@dataclass(frozen=True)
class BackboneConfig:
    name: str = "resnet18"  # any timm model
    stem: str = "small"  # "small": a 3x3 stride-1 first convolution and no pooling (32 px and below); "native": timm's
    widths: tuple[int, ...] = ()  # channels of the four stages of a timm ResNet; empty keeps the model's own
    depths: tuple[int, ...] = ()  # blocks of the four stages; empty keeps the model's own
    mean: tuple[float, ...] = IMAGENET_MEAN  # of the images it is made for, on values in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def statistics(self) -> Statistics:
        return self.mean, self.std


class Backbone(nn.Module):
    """Images (B, C, H, W) to pooled features (B, dim)."""

    def __init__(self, config: BackboneConfig, channels: int, size: int):
        super().__init__()
        self.body = _create(config, channels, size)
        if config.stem == "small":
            _shrink_stem(self.body)
        elif config.stem != "native":
            raise UserError(f'backbone.stem is "{config.stem}"; it can be "small" or "native"')
        split_batch_norm(self.body)
        self.dim: int = _feature_width(self.body, channels, size)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        return self.body(images)


def unit(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return F.normalize(x, dim=-1)


def _create(config: BackboneConfig, channels: int, size: int) -> nn.Module:
    import timm

    if config.name not in timm.list_models():
        near = ", ".join(timm.list_models(f"*{config.name.split('_')[0]}*")[:5])
        raise UserError(
            f'backbone.name is "{config.name}", which timm does not have' + (f"; it has {near}" * bool(near))
        )
    options: dict = {"num_classes": 0, "in_chans": channels}
    if config.widths:
        options["channels"] = config.widths
    if config.depths:
        options["layers"] = config.depths
    if config.name in timm.list_models(module="resnet"):
        options["zero_init_last"] = False  # as MoCo and SPICE initialise: every block starts with all its branches
    try:
        try:
            return timm.create_model(config.name, img_size=size, **options)  # transformers are built for one size
        except TypeError:
            return timm.create_model(config.name, **options)
    except TypeError as error:
        raise UserError(f"backbone {config.name} takes no widths or depths ({error}); leave both empty") from error


def _shrink_stem(body: nn.Module) -> None:
    """Replace the first convolution by 3x3 stride 1 and drop the pooling after it, as for CIFAR.

    The width of the stem follows the first stage, so that a narrow network has a narrow stem.
    """
    conv = getattr(body, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(body, "maxpool"):
        raise UserError(
            'backbone.stem "small" needs a ResNet with a single first convolution; use backbone.stem="native"'
        )
    stem_width = conv.out_channels
    body.conv1 = nn.Conv2d(conv.in_channels, stem_width, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")
    body.maxpool = nn.Identity()


@torch.no_grad()
def _feature_width(body: nn.Module, channels: int, size: int) -> int:
    training = body.training
    try:
        return body.eval()(torch.zeros(1, channels, size, size)).shape[1]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"this backbone cannot take images of {size} pixels ({reason}); raise data.size") from error
    finally:
        body.train(training)
