"""Feature models: any timm backbone or a wide ResNet, with the small-image stem and the split BatchNorm of MoCo.

Initial weights are random, or are published by timm, shipped by a package or read from a file. The unit features of
several networks are concatenated.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spice_dist.data.views import IMAGENET_MEAN, IMAGENET_STD, Statistics
from spice_dist.errors import UserError
from spice_dist.models.intermediate import Mixture, middle_stage, peaks, stages
from spice_dist.models.pretrained import (
    MISFITS,
    PACKAGE,
    TIMM,
    check_name,
    check_published,
    fingerprint,
    load_packaged,
    load_weights,
    published_data_config,
    published_file,
)
from spice_dist.models.split_batch_norm import split_batch_norm
from spice_dist.models.wide_resnet import SHAPES, WideResNet
from spice_dist.settings import setting

POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "small": nn.Identity,  # as for CIFAR: 32 pixels and below
    "pooled": partial(nn.MaxPool2d, 2, padding=1),  # SPICE's ClusterResNet, for 32 to 96 pixels
    "halved": partial(nn.MaxPool2d, 2),  # IMC-SwAV's for 64 and 96 pixels
}


@dataclass(frozen=True)
class BackboneConfig:
    name: str = setting(
        "resnet18",
        f"any timm model, with or without the tag of its weights, or one of {', '.join(SHAPES)}",
    )
    stem: str = setting(
        "small",
        "small: a 3x3 stride-1 first convolution; pooled, halved: 2x2 pooling after it; native: timm's",
        choices=(*POOLINGS, "native"),
    )
    widths: tuple[int, ...] = setting((), "channels of the four stages of a timm ResNet; empty: the model's own")
    depths: tuple[int, ...] = setting((), "blocks of the four stages; empty: the model's own")
    mean: tuple[float, ...] = setting(IMAGENET_MEAN, "of the images it is made for, on values in [0, 1]")
    std: tuple[float, ...] = setting(IMAGENET_STD, "standard deviation of these images")
    weights: str = setting(
        "",
        "to start from; empty: random ones; timm: those that timm publishes; package: those of an installed package; "
        "otherwise a file of tensors",
    )
    others: tuple[str, ...] = setting((), "further timm models, whose features stand beside those of the first")
    other_weights: tuple[str, ...] = setting((), "as weights, for each of the others; empty: as the first")
    intermediate: bool = setting(
        False,
        "a middle stage's features beside the final ones, of networks that have stages; the images' neighbours say "
        "how much they count",
    )

    @property
    def statistics(self) -> Statistics:
        return self.mean, self.std

    @property
    def networks(self) -> tuple[tuple[str, str], ...]:
        """Name and initial weights of every network; a UserError if `others` and `other_weights` differ in length."""
        weights = self.other_weights or (self.weights,) * len(self.others)
        if len(weights) != len(self.others):
            raise UserError(f"backbone.other_weights names {len(weights)} weights for {len(self.others)} networks")
        return ((self.name, self.weights), *zip(self.others, weights, strict=True))


class Backbone(nn.Module):
    """Images (B, C, H, W) to pooled features (B, dim).

    With `config.others`, dim is the sum over all networks, which have equal weight, and the features have unit norm.
    With `config.intermediate` a `Mixture` adds the features of a middle stage of the first network, if it has one. The
    weights are random, for a checkpoint to replace, or those of `config.weights` if `pretrained`.
    """

    def __init__(self, config: BackboneConfig, channels: int, size: int, pretrained: bool = False):
        super().__init__()
        _, *others = config.networks
        self.body = _create(config, channels, size)
        if config.stem in POOLINGS:
            _shrink_stem(self.body, config.stem)
        elif config.stem != "native":
            raise UserError(f'backbone.stem is "{config.stem}"; it can be {", ".join(POOLINGS)} or native')
        self.dim: int = _feature_width(self.body, channels, size)
        self.middle = middle_stage(self.body) if config.intermediate else None
        if pretrained:
            self.body = _trained(self.body, config, channels, size)
        split_batch_norm(self.body)  # last: it renames tensors
        other_networks = [OtherNetwork(config, other, channels, size, pretrained) for other in others]
        self.others = nn.ModuleList(other_networks)  # an empty list changes no name of a tensor
        self.dim += sum(other.dim for other in other_networks)
        self.mixture = None
        if self.middle is not None:
            self.mixture = Mixture(stages(self.body)[self.middle]["num_chs"])
            self.dim += len(self.mixture.center)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        if self.mixture is not None:
            return self.mixture(*self.parts(images))
        return self._beside_others(self.body(images), images) if self.others else self.body(images)

    def parts(self, images: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B D1"], Float[Tensor, "B D2"]]:
        """Compute the final features, of unit norm, and those of the middle stage, as the mixture takes them."""
        body: Any = self.body
        last, (middle,) = body.forward_intermediates(images, indices=[self.middle])
        features = body.forward_head(last)
        return self._beside_others(features, images) if self.others else unit(features.float()), peaks(middle)

    def _beside_others(self, features: Float[Tensor, "B D"], images: Tensor) -> Float[Tensor, "B D1"]:
        units = [unit(features.float()), *(unit(network(images).float()) for network in self.others)]
        return torch.cat(units, 1) / len(units) ** 0.5


class OtherNetwork(nn.Module):
    """Maps images (B, C, H, W), normalised for the first network, to features (B, dim) of a further network.

    The images are normalised anew, as this network was trained. A network of a single size, such as a transformer, is
    built for the images' size if possible, otherwise for the nearest size of whole patches, or for its published size.
    The images are then resized to it.
    """

    def __init__(self, first: BackboneConfig, own: tuple[str, str], channels: int, size: int, pretrained: bool):
        super().__init__()
        name, weights = own
        own_size, mean, std = published_data_config(name)
        config = BackboneConfig(name, "native", mean=mean, std=std, weights=weights)
        body, fits = _fitting(config, channels, size, own_size)
        self.dim: int = _feature_width(body, channels, fits)
        self.body = _trained(body, config, channels, fits) if pretrained else body
        split_batch_norm(self.body)
        self.size = fits if fits != size or _takes_one_size(body) else None
        self.scale: Tensor
        self.shift: Tensor
        scale, shift = _renormalisation(first.statistics, config.statistics, channels)
        self.register_buffer("scale", scale, persistent=False)  # not saved: it follows from the two configurations
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        images = images * self.scale + self.shift
        if self.size and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.body(images)


def _renormalisation(one: Statistics, other: Statistics, channels: int) -> tuple[Tensor, Tensor]:
    """Compute scale and shift, (C, 1, 1) each, that change the normalisation of images from `one` to `other`."""
    means, stds = (torch.tensor([one[i], other[i]], dtype=torch.float64) for i in range(2))
    if channels == 1:  # grey images take the mean over the three channels
        means, stds = means.mean(1, keepdim=True), stds.mean(1, keepdim=True)
    scale, shift = stds[0] / stds[1], (means[0] - means[1]) / stds[1]
    return scale.float()[:, None, None], shift.float()[:, None, None]


def _fitting(config: BackboneConfig, channels: int, size: int, own_size: int) -> tuple[nn.Module, int]:
    """Build the network with random weights for a size near `size`; return it with that size."""
    with suppress(UserError):
        body = _create(config, channels, size)
        _feature_width(body, channels, size)
        return body, size
    body = _create(config, channels, own_size)
    patch = _patch(body)
    nearest = max(1, round(size / patch)) * patch
    if patch > 1:
        with suppress(UserError):
            body = _create(config, channels, nearest)
            _feature_width(body, channels, nearest)
            return body, nearest
        body = _create(config, channels, own_size)
    return body, own_size


def _takes_one_size(body: nn.Module) -> bool:
    return bool(getattr(body, "pretrained_cfg", {}).get("fixed_input_size"))


def check_crop(backbone: Backbone, channels: int, crop: int, size: int) -> None:
    """Raise a UserError if the network cannot learn from crops of `crop` pixels of images of `size`.

    It must take images of this size. If its last map of a crop is a single position, that of the whole image must be
    one too: otherwise training and prediction would differ.
    """
    _feature_width(backbone.body, channels, crop)
    for other in backbone.others:
        assert isinstance(other, OtherNetwork)
        _feature_width(other.body, channels, other.size or crop)
    of_crop, of_image = (_positions(backbone.body, channels, side) for side in (crop, size))
    if of_crop == 1 < of_image:
        raise UserError(
            f"the last map of a crop of {crop} pixels has 1 position, that of the whole image of {size} pixels has "
            f"{of_image}; take larger crops, or backbone.stem=small"
        )


def unit(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return F.normalize(x, dim=-1)


def pretrained_backbone(config: BackboneConfig, channels: int, size: int) -> Backbone:
    """Build the backbone with which training starts, for images of `size` pixels.

    Raises:
        UserError: there is no such network, it cannot take such images, or its weights are not available or do not fit.
    """
    return Backbone(config, channels, size, pretrained=True)


def is_resnet(name: str) -> bool:
    """Tell whether timm builds the network as a ResNet: its stem can be shrunk, and `zero_init_last` is an option."""
    import timm

    return name.partition(".")[0] in timm.list_models(module="resnet")


def weights_fingerprint(config: BackboneConfig) -> str:
    """Identify initial weights: SHA-256 of a file, timm's tag, or "" if random; "+" between networks."""
    return "+".join(fingerprint(name, weights) for name, weights in config.networks)


def _trained(body: nn.Module, config: BackboneConfig, channels: int, size: int) -> nn.Module:
    """Return the network `body`, of random weights, with its initial weights, or a new one in its place."""
    if config.weights in (TIMM, PACKAGE) and (config.stem != "native" or config.widths or config.depths):
        raise UserError(
            f'backbone.weights "{config.weights}" needs backbone.stem="native", and no backbone.widths or depths'
        )
    if config.weights == TIMM:
        return _published(config, channels, size)
    if config.weights == PACKAGE:
        load_packaged(body, config.name)
    elif config.weights:
        load_weights(body, Path(config.weights))
    return body


def _published(config: BackboneConfig, channels: int, size: int) -> nn.Module:
    """Build timm's model with timm's weights, from the cache or the internet."""
    try:
        path = published_file(config.name)
        body = _create(config, channels, size, pretrained=True, file=path)
    except UserError:
        raise
    except Exception as error:  # the hub, the internet and the disk each raise errors of their own
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"the weights of {config.name} cannot be had from timm ({reason}); download them elsewhere and give "
            "the file: --weights FILE.safetensors"
        ) from error
    if path is not None:
        check_published(body, path)
    return body


def _create(
    config: BackboneConfig, channels: int, size: int, pretrained: bool = False, file: Path | None = None
) -> nn.Module:
    """Build a network of timm or a wide ResNet; if `pretrained`, with the weights in `file`, or those timm finds."""
    import timm

    check_name(config.name)
    if config.name in SHAPES:
        return _wide_resnet(config, channels)
    options: dict = {"num_classes": 0, "in_chans": channels, "pretrained": pretrained}
    if file is not None:
        options["pretrained_cfg_overlay"] = {"file": str(file)}
    if config.widths:
        options["channels"] = config.widths
    if config.depths:
        options["layers"] = config.depths
    if is_resnet(config.name):
        options["zero_init_last"] = False  # as in MoCo and SPICE: no block starts as the identity
    try:
        try:
            return timm.create_model(config.name, img_size=size, **options)  # transformers are built for one size
        except TypeError:
            return timm.create_model(config.name, **options)
    except TypeError as error:
        raise UserError(f"backbone {config.name} takes no widths or depths ({error}); leave both empty") from error
    except MISFITS as error:
        raise _unfit(size, published_data_config(config.name)[0], error) from error


def _wide_resnet(config: BackboneConfig, channels: int) -> nn.Module:
    if config.widths or config.depths:
        raise UserError(f"backbone {config.name} takes no widths or depths; leave both empty")
    return WideResNet(config.name, channels)


def _shrink_stem(body: nn.Module, stem: str) -> None:
    """Replace the first convolution by one of 3x3 and stride 1, and the pooling after it by POOLINGS[stem].

    The width of the stem follows the first stage, so that a narrow network has a narrow stem.
    """
    conv = getattr(body, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(body, "maxpool"):
        raise UserError(
            f'backbone.stem "{stem}" needs a ResNet with a single first convolution; use backbone.stem="native"'
        )
    stem_width = conv.out_channels
    body.conv1 = nn.Conv2d(conv.in_channels, stem_width, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")
    body.maxpool = POOLINGS[stem]()


@torch.no_grad()
def _feature_width(body: nn.Module, channels: int, size: int) -> int:
    _check_patches(body, size)
    training = body.training
    try:
        return body.eval()(torch.zeros(1, channels, size, size)).shape[1]
    except MISFITS as error:
        raise _unfit(size, getattr(body, "pretrained_cfg", {}).get("input_size", (0,))[-1], error) from error
    finally:
        body.train(training)


@torch.no_grad()
def _positions(body: nn.Module, channels: int, size: int) -> int:
    """Return how many positions the network's last map of an image has; 0 where it has no map, as a transformer."""
    forward = getattr(body, "forward_features", None)
    if forward is None:
        return 0
    training = body.training
    body.eval()
    last = forward(torch.zeros(1, channels, size, size))
    body.train(training)
    return last[0, 0].numel() if last.ndim == 4 else 0


def _unfit(size: int, own_size: int, error: Exception) -> UserError:
    """Return the error for a network that cannot take images of `size` pixels; `own_size` is 0 if not known."""
    if size == own_size:  # something else does not fit
        return UserError(f"this backbone cannot be built: {(str(error).strip() or repr(error)).splitlines()[0]}")
    remedy = f"set data.size to {own_size}, for which it is made" if own_size else "set another data.size"
    return UserError(f"this backbone cannot take images of {size} pixels; {remedy}")


def _check_patches(body: nn.Module, size: int) -> None:
    """Raise a UserError if patches do not cover the image: most transformers would silently leave out the rest."""
    patch = _patch(body)
    if size % patch:
        below = size // patch * patch
        offers = f"{below} or {below + patch}" if below else f"{patch}"
        raise UserError(f"images of {size} pixels cannot be cut into patches of {patch}; set data.size to {offers}")


def _patch(body: nn.Module) -> int:
    """Return the side of a transformer's patches in pixels; 1 for other networks."""
    sides = getattr(getattr(body, "patch_embed", None), "patch_size", 1)
    return sides if isinstance(sides, int) else max(sides)
