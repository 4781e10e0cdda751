"""The model folder, which outlives its run: written and loaded."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from spice_dist.data.dataset import DataConfig
from spice_dist.data.files import publish_json, temporary_path
from spice_dist.errors import UserError
from spice_dist.methods.plumbing import named, place
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.heads import ClassifierNet, Classifiers, ClusterHeads, ClusterNet, LinearNet, Network
from spice_dist.task import Task

TUPLES = ("widths", "depths", "mean", "std", "others", "other_weights")  # lists in JSON


def save_model(net: Network, task: Task, folder: Path) -> None:
    """Writes `model.safetensors` and `model.json`: all that `load_model` needs, wherever the folder is moved."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    temporary = temporary_path(folder / "model.safetensors")
    save_file(weights, temporary)
    temporary.rename(folder / "model.safetensors")
    about = {
        "version": 2,
        "clusters": task.clusters,
        "data": asdict(task.data),
        # without the weights that it started from, which are files of one machine
        "backbone": asdict(replace(task.backbone, weights="", other_weights=())),
    }
    publish_json(folder / "model.json", about)


def load_model(folder: Path, device: torch.device) -> tuple[Network, Task]:
    """Returns the network in eval mode and its task. UserError if the folder holds none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        about = json.loads((folder / "model.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{folder} holds no model ({reason}); give the folder of a finished run") from error
    if about["version"] != 2:
        raise UserError(f"{folder} was written by another version of spice_dist; make the model again with fit")
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
