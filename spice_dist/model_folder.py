"""The model folder, which outlives its run: written and loaded."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spice_dist.data.checksums import differing, publish_sealed, read_sealed, require_whole, sha256
from spice_dist.data.dataset import DataConfig
from spice_dist.data.files import commit, let_umask_decide, temporary_path
from spice_dist.errors import DamagedFile, UserError
from spice_dist.methods.plumbing import named, not_finite, place
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.heads import ClassifierNet, Classifiers, ClusterHeads, ClusterNet, LinearNet, Network
from spice_dist.task import Task

TUPLES = ("widths", "depths", "mean", "std", "others", "other_weights")  # lists in JSON


def save_model(net: Network, task: Task, folder: Path) -> None:
    """Write `model.safetensors` and `model.json`: all that `load_model` needs, wherever the folder is moved.

    Raises:
        UserError: a weight is not a finite number, or the files cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    if bad := not_finite(weights):
        raise UserError(f"the trained network is not usable: {bad}; lower the learning rates, or give other weights")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    temporary = temporary_path(path)
    try:
        save_file(weights, temporary)
        let_umask_decide(temporary)
        commit(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    about = {
        "version": 2,
        "clusters": task.clusters,
        "data": asdict(task.data),
        # without the weights that it started from, which are files of one machine
        "backbone": asdict(replace(task.backbone, weights="", other_weights=())),
        "sha256": {path.name: sha256(path)},
    }
    publish_sealed(folder / "model.json", about)


def damaged_model(folder: Path) -> list[str]:
    """Return which files of a model folder are missing or altered, by their names in it."""
    try:
        about = read_sealed(folder / "model.json")
    except (OSError, ValueError):
        return ["model.json"]
    expected = about.get("sha256") or {}
    return differing(folder, expected) if expected or (folder / "model.safetensors").exists() else ["model.safetensors"]


def load_model(folder: Path, device: torch.device) -> tuple[Network, Task]:
    """Return the network in eval mode and its task.

    Raises:
        UserError: the folder holds no model, or one of another version.
        DamagedFile: its files were altered, or a weight is not a finite number.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        about = read_sealed(folder / "model.json")
        weights = load_file(require_whole(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        reason = f"model.json: {reason}" if isinstance(error, ValueError) else reason
        raise UserError(f"{folder} holds no model ({reason}); give the folder of a finished run") from error
    if about.get("version") != 2:
        raise UserError(f"{folder} was written by another version of spice_dist; make the model again with fit")
    if bad := not_finite(weights):
        raise DamagedFile(f"{folder / 'model.safetensors'} is damaged: {bad}; make the model again with fit")
    try:
        return _built(about, weights, device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedFile(
            f"{folder}: model.json and model.safetensors do not fit together ({reason}); make the model again with fit"
        ) from error


def _built(about: dict[str, Any], weights: dict[str, Tensor], device: torch.device) -> tuple[Network, Task]:
    widths = {name: tuple(about["backbone"][name]) for name in TUPLES if name in about["backbone"]}
    task = Task(
        clusters=about["clusters"],
        data=DataConfig(**{"grey_bits": 16, **about["data"]}),  # those of an older model
        backbone=BackboneConfig(**{**about["backbone"], **widths}),
    )
    backbone = Backbone(task.backbone, task.data.channels, task.data.size)
    head = named(weights, "head.")
    if "in_weight" in head:
        net = ClassifierNet(backbone, Classifiers.holding(head))
    elif "weight" in head:
        net = LinearNet(backbone, backbone.dim, task.clusters)
    else:
        net = ClusterNet(backbone, ClusterHeads.holding(head))
    net.load_state_dict(weights)
    place(net, device)
    return net.eval(), task
