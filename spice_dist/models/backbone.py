"""Feature models: any timm backbone or a wide ResNet, with the small-image stem and the split BatchNorm of MoCo.

The network starts from random weights, from those that timm publishes, or from those of a file.
"""

import difflib
import hashlib
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spice_dist.data.augment import IMAGENET_MEAN, IMAGENET_STD, Statistics
from spice_dist.errors import UserError
from spice_dist.models.split_batch_norm import split_batch_norm
from spice_dist.models.wide_resnet import SHAPES, WideResNet

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

TIMM = "timm"  # the word for timm's own pretrained weights
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
COUNTER = "num_batches_tracked"  # of a BatchNorm: nothing reads it, and some files lack it
POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "small": nn.Identity,  # as for CIFAR: 32 pixels and below
    "pooled": partial(nn.MaxPool2d, 2, padding=1),  # SPICE's ClusterResNet, for 32 to 96 pixels
    "halved": partial(nn.MaxPool2d, 2),  # IMC-SwAV's for 64 and 96 pixels
}
NAMED = 3  # tensors of each kind that an error lists
MISFITS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, ValueError)  # of timm, told a wrong size


@dataclass(frozen=True)
class BackboneConfig:
    name: str = "resnet18"  # any timm model, with or without the tag of its weights, or one of wide_resnet.SHAPES
    stem: str = (
        "small"  # "small": a 3x3 stride-1 first convolution; "pooled", "halved": 2x2 pooling after it; "native": timm's
    )
    widths: tuple[int, ...] = ()  # channels of the four stages of a timm ResNet; empty keeps the model's own
    depths: tuple[int, ...] = ()  # blocks of the four stages; empty keeps the model's own
    mean: tuple[float, ...] = IMAGENET_MEAN  # of the images it is made for, on values in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD
    weights: str = ""  # to start from: "" random ones, "timm" those timm publishes, otherwise a file of tensors

    @property
    def statistics(self) -> Statistics:
        return self.mean, self.std


class Backbone(nn.Module):
    """Images (B, C, H, W) to pooled features (B, dim).

    The weights are random, for a checkpoint to replace, unless `pretrained`; then they are what `config.weights` says.
    """

    def __init__(self, config: BackboneConfig, channels: int, size: int, pretrained: bool = False):
        super().__init__()
        self.body = _create(config, channels, size)
        if config.stem in POOLINGS:
            _shrink_stem(self.body, config.stem)
        elif config.stem != "native":
            raise UserError(f'backbone.stem is "{config.stem}"; it can be {", ".join(POOLINGS)} or native')
        self.dim: int = _feature_width(self.body, channels, size)
        if pretrained and config.weights == TIMM:
            self.body = _published(config, channels, size)
        elif pretrained and config.weights:
            load_weights(self.body, Path(config.weights))
        split_batch_norm(self.body)  # last: it renames tensors

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        return self.body(images)


def check_size(backbone: Backbone, channels: int, size: int) -> None:
    """UserError if the network cannot take images of this size, such as crops that are smaller than the images."""
    _feature_width(backbone.body, channels, size)


def unit(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return F.normalize(x, dim=-1)


def pretrained_backbone(config: BackboneConfig, channels: int, size: int) -> Backbone:
    """The backbone with which training starts; images are of `size` pixels.

    Raises:
        UserError: there is no such network, it cannot take such images, or its weights cannot be had or do not fit.
    """
    return Backbone(config, channels, size, pretrained=True)


def for_untrained(name: str) -> dict[str, Any]:
    """The settings, by dotted names, with which a recipe's network is replaced by another."""
    _check_name(name)
    own: dict[str, Any] = {"backbone.name": name, "backbone.widths": (), "backbone.depths": ()}
    return own if _is_resnet(name) else {**own, "backbone.stem": "native"}


def for_small_images(name: str, statistics: Statistics) -> BackboneConfig:
    """A whole network by its name, from random weights: a ResNet of timm has the small stem, others their own.

    Raises:
        UserError: there is no such network; it offers near names.
    """
    _check_name(name)
    mean, std = statistics
    return BackboneConfig(name, "small" if _is_resnet(name) else "native", mean=mean, std=std)


def _is_resnet(name: str) -> bool:
    """Whether timm builds it of a stem that can be shrunk and blocks that start with all their branches."""
    import timm

    return name.partition(".")[0] in timm.list_models(module="resnet")


def for_pretrained(name: str, weights: str) -> dict[str, Any]:
    """The settings, by dotted names, that a timm model needs to be used as it was trained, without a stage 1.

    Put what a user asked for on top: another data.size is possible, position embeddings are interpolated to it.
    """
    size, mean, std = published_data_config(name)
    return {
        "pretext": "none",
        "backbone.name": name,
        "backbone.weights": weights if weights == TIMM else str(Path(weights).resolve()),  # workers have other folders
        "backbone.stem": "native",
        "backbone.widths": (),
        "backbone.depths": (),
        "backbone.mean": mean,
        "backbone.std": std,
        "data.size": size,
    }


def published_data_config(name: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Pixels of a side, and the mean and deviation of values in [0, 1], of the images that timm's weights expect."""
    from timm.data.config import resolve_data_config

    published = resolve_data_config(pretrained_cfg=_entry(name).to_dict())
    return max(published["input_size"][1:]), tuple(published["mean"]), tuple(published["std"])


def weights_fingerprint(config: BackboneConfig) -> str:
    """What tells one set of initial weights from another: SHA-256 of the file, timm's tag, or "" if they are random."""
    if config.weights == TIMM:
        return _entry(config.name).tag or ""
    if not config.weights:
        return ""
    try:
        with open(config.weights, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(Path(config.weights), error) from error


def load_weights(body: nn.Module, path: Path) -> None:
    """Read the weights of a timm model without classifier, as timm made it, from a file.

    The names are timm's, or any that timm itself converts for this model; a prefix that all share and a classifier are
    left out. Position embeddings are interpolated to the model's image size, and a first convolution of three channels
    is summed over them for grey images.

    Raises:
        UserError: the file cannot be read, or lacks a tensor, or has one too many or of another shape.
    """
    tensors = _adapt(body, _without_shared_prefix(_read_tensors(path), body))
    wanted = body.state_dict()
    differing = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    missing = [name for name in wanted if name not in tensors and not name.endswith(COUNTER)]
    unexpected = [name for name in tensors if name not in wanted]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
    if told := [f"{kind}: {_first(names)}" for kind, names in problems.items() if names]:
        raise UserError(f"{path} does not fit {_about(body).get('architecture')}; {'; '.join(told)}")
    body.load_state_dict({**wanted, **tensors})


def _first(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _about(body: nn.Module) -> dict[str, Any]:
    """What timm notes about a model's published weights."""
    return getattr(body, "pretrained_cfg", None) or {}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name, in the file as such or under "state_dict" or "model"."""
    from safetensors.torch import load_file

    if path.suffix not in WEIGHT_FILES:
        kinds = ", ".join(WEIGHT_FILES)
        raise UserError(f'backbone.weights is "{path}"; it can be "timm" or the path of a file: {kinds}')
    safe = path.suffix == ".safetensors"
    try:
        held = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # somebody else's file makes its reader raise anything
        reason = "or is no safetensors file" if safe else "or holds objects that are no tensors, which are never read"
        raise UserError(f"{path} is damaged {reason}; save a state dict as .safetensors") from error
    for key in ("state_dict", "model"):
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    named = held.items() if isinstance(held, dict) else ()
    tensors = {name: value for name, value in named if isinstance(value, Tensor) and not name.endswith(COUNTER)}
    if not tensors:
        raise UserError(f"{path} holds no weights; save a state dict as .safetensors")
    return tensors


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror or error}); give the file of the weights")


def _without_shared_prefix(tensors: dict[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
    """Names without the wrappers that a trainer put around the model: "module.", "backbone.", ..."""
    own = _shared_prefix(list(body.state_dict()))
    while (prefix := _shared_prefix(list(tensors))) and prefix != own:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _shared_prefix(names: list[str]) -> str:
    """The first part of the names with its dot, if all have the same."""
    first, dot, _ = names[0].partition(".")
    return first + dot if dot and all(name.startswith(first + dot) for name in names) else ""


def _adapt(body: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by timm's names, without those of a classifier, for the model's image size and channels."""
    from timm.models import adapt_input_conv

    modules = [sys.modules[kind.__module__] for kind in type(body).__mro__]
    filters = [module.checkpoint_filter_fn for module in modules if hasattr(module, "checkpoint_filter_fn")]
    for convert in filters[:1]:
        with suppress(*MISFITS):  # what it cannot convert does not fit, as the caller will find
            tensors = convert(dict(tensors), body)
    wanted = body.state_dict()
    heads = tuple(f"{name.split('.')[0]}." for name in _names(_about(body).get("classifier")))
    tensors = {name: tensor for name, tensor in tensors.items() if name in wanted or not name.startswith(heads)}
    for name in (f"{conv}.weight" for conv in _names(_about(body).get("first_conv"))):
        if name in tensors and name in wanted and tensors[name].ndim == 4 and tensors[name].shape[1] == 3:
            tensors[name] = adapt_input_conv(wanted[name].shape[1], tensors[name])
    return tensors


def _names(value: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    """timm notes one name as text, several as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def _published(config: BackboneConfig, channels: int, size: int) -> nn.Module:
    """timm's model with timm's weights, from its cache or the network."""
    if config.stem != "native" or config.widths or config.depths:
        raise UserError('backbone.weights "timm" needs backbone.stem="native", and no backbone.widths or depths')
    try:
        return _create(config, channels, size, pretrained=True)
    except Exception as error:  # each of timm's sources has its own: the hub, the network, the disk
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"the weights of {config.name} cannot be had from timm ({reason}); download them elsewhere and give "
            "the file: --weights FILE.safetensors"
        ) from error


def _entry(name: str) -> "PretrainedCfg":
    """What timm notes about the weights of this name, or about a model's usual ones if it has no tag."""
    import timm

    _check_name(name)
    if name in SHAPES:
        raise UserError(f"nobody publishes weights of {name}; give a network of timm, or --weights FILE.safetensors")
    entry = timm.get_pretrained_cfg(name)
    assert entry is not None, "a model that timm lists has one"
    return entry


def _check_name(name: str) -> None:
    """UserError with near names if there is no such model, or timm has no such weights of it."""
    import timm

    if name in SHAPES:
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = " or ".join(difflib.get_close_matches(architecture, [*SHAPES, *timm.list_models()], n=3))
        raise UserError(f'backbone.name is "{name}", which timm does not have' + f"; did you mean {near}?" * bool(near))
    if tag and name not in (tags := timm.list_pretrained(f"{architecture}.*")):
        near = difflib.get_close_matches(name, tags, n=3, cutoff=0)
        offer = f"it has {' and '.join(near)}" if near else "it has none"
        raise UserError(f'backbone.name is "{name}", but timm has no weights "{tag}" of {architecture}; {offer}')


def _create(config: BackboneConfig, channels: int, size: int, pretrained: bool = False) -> nn.Module:
    import timm

    _check_name(config.name)
    if config.name in SHAPES:
        return _wide_resnet(config, channels)
    options: dict = {"num_classes": 0, "in_chans": channels, "pretrained": pretrained}
    if config.widths:
        options["channels"] = config.widths
    if config.depths:
        options["layers"] = config.depths
    if _is_resnet(config.name):
        options["zero_init_last"] = False  # as MoCo and SPICE initialise: every block starts with all its branches
    try:
        try:
            return timm.create_model(config.name, img_size=size, **options)  # transformers are built for one size
        except TypeError:
            return timm.create_model(config.name, **options)
    except TypeError as error:
        raise UserError(f"backbone {config.name} takes no widths or depths ({error}); leave both empty") from error
    except MISFITS as error:
        raise _unfit(size, error) from error


def _wide_resnet(config: BackboneConfig, channels: int) -> nn.Module:
    if config.widths or config.depths:
        raise UserError(f"backbone {config.name} takes no widths or depths; leave both empty")
    return WideResNet(config.name, channels)


def _shrink_stem(body: nn.Module, stem: str) -> None:
    """Replace the first convolution by 3x3 stride 1 and the pooling after it by that of POOLINGS.

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
        raise _unfit(size, error) from error
    finally:
        body.train(training)


def _unfit(size: int, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"this backbone cannot take images of {size} pixels ({reason}); set another data.size")


def _check_patches(body: nn.Module, size: int) -> None:
    """UserError if patches do not cover the image: most transformers would leave out the rest without a word."""
    sides = getattr(getattr(body, "patch_embed", None), "patch_size", 1)
    patch = sides if isinstance(sides, int) else max(sides)
    if size % patch:
        below = size // patch * patch
        offers = f"{below} or {below + patch}" if below else f"{patch}"
        raise UserError(f"images of {size} pixels cannot be cut into patches of {patch}; set data.size to {offers}")
