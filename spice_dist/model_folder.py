"""The model folder, which outlives its run: written, loaded, and asked about other images."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from spice_dist import artifacts
from spice_dist.assignments import write_assignments
from spice_dist.data.dataset import DataConfig, open_data, prepare
from spice_dist.data.files import publish_json, temporary_path
from spice_dist.data.images import Images
from spice_dist.data.loaders import open_images
from spice_dist.data.manifest import read_paths
from spice_dist.data.sources import Source
from spice_dist.errors import UserError
from spice_dist.inference import probabilities
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
        data=DataConfig(**about["data"]),
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


def predict(model: Path, data: str, out: Path) -> None:
    """Writes the clusters of the images of `data` by the model of a run: CSV, index,path,cluster,confidence.

    Unreadable images are left out; `OUT.quarantine.csv` then says which and why.
    """
    folder = artifacts.model(model) if artifacts.model(model).is_dir() else model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, task = load_model(folder, device)
    with temporary_images(open_data(data), task.data, device) as (images, names, quarantine):
        probs = probabilities(net, images, task.backbone.statistics)
        write_assignments(out, names, probs.argmax(1), probs.max(1), None)
        if quarantine:
            shutil.copyfile(quarantine, out.with_name(out.name + ".quarantine.csv"))


@contextmanager
def temporary_images(
    source: Source, config: DataConfig, device: torch.device
) -> Iterator[tuple[Images, list[str], Path | None]]:
    """Ingests images for a model: yields them, their names, and the list of unreadable images if there are any."""
    with tempfile.TemporaryDirectory(prefix="spice-") as temporary:
        folder = Path(temporary)
        every_readable = replace(config, max_bad=1.0, drop_duplicates=False)
        manifest = prepare(source, every_readable, folder)
        loader = open_images(folder, device=device, size=config.size, channels=config.channels, loader="torch")
        with closing(loader) as images:
            yield images, read_paths(folder), folder / "quarantine.csv" if manifest.bad else None
