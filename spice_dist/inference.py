"""Trained networks over many images: features, probabilities, and the model folder that outlives a run."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from spice_dist.allocator import keep_freed_memory
from spice_dist.data import augment
from spice_dist.data.dataset import DataConfig, open_data, prepare
from spice_dist.data.files import Progress, publish, publish_json, temporary_path
from spice_dist.data.images import Images
from spice_dist.data.loaders import open_images
from spice_dist.data.manifest import read_paths
from spice_dist.data.sources import Source
from spice_dist.data.views import PLAIN, Statistics
from spice_dist.distributed import collectives
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.methods.plumbing import MIXTURE, autocast, load_backbone, open_dataset, place
from spice_dist.mixing import COMPARED, choose_weight
from spice_dist.models.backbone import Backbone, BackboneConfig, unit
from spice_dist.models.folding import folded
from spice_dist.models.heads import ClassifierNet, Classifiers, ClusterHeads, ClusterNet
from spice_dist.task import Task

TUPLES = ("widths", "depths", "mean", "std", "others", "other_weights")  # lists in JSON
FLOAT16 = 65_504.0  # the largest
CHUNK = 512  # images of 64 pixels and below in a forward pass; fewer of larger ones, see `chunk_of`


def outputs(
    model: nn.Module,
    images: Images,
    index: np.ndarray,
    statistics: Statistics,
    progress: Progress,
    precision: str = "auto",
) -> Iterator[Float[Tensor, "B D"]]:
    """The model's outputs on the un-augmented images `index`, in order, in chunks; `progress` gets (done, all)."""
    model.eval()
    keep_freed_memory()
    done = 0
    for image, number in images.batches(index, chunk_of(images.size)):
        with torch.no_grad(), autocast(image.device, precision):
            out = model(augment.apply(PLAIN, image, number, (), statistics))
        done += len(image)
        progress(done, len(index))
        yield out.float()


def chunk_of(size: int) -> int:
    """Images of `size` pixels in a forward pass: as many pixels as CHUNK small ones, for memory and for progress."""
    return max(16, min(CHUNK, CHUNK * 64**2 // size**2))


def embed(task: Task, config: None, worker: Worker) -> None:
    """Unit-norm features of stage 1 for all images, in image order: `features/features.npy`, (N, D) float16.

    Every worker writes the rows of a consecutive share of the images; the file appears when all are there. Rows that an
    earlier call left are kept, whatever the number of workers was: the final features of one that is done have unit
    norm. Where a middle stage's features stand beside them, `mixture.json` says how much they count.
    """
    images, manifest = open_dataset(task, worker.run, worker.device, worker.scratch)
    backbone = load_backbone(task, worker.run)
    folder = worker.run / "features"
    partial = folder / f"features.{_called(task, backbone)}.partial.npy"
    place(backbone, worker.device)
    if task.pretext == "none":  # stages 1 keep the bits that their checkpoints were scored with
        size = task.data.size
        backbone = folded(backbone, torch.rand(2, task.data.channels, size, size, device=worker.device))
    model = backbone if backbone.mixture is None else BesideEachOther(backbone)
    final = backbone.dim if backbone.mixture is None else backbone.dim - len(backbone.mixture.center)
    error = None
    if worker.rank == 0:
        try:
            _make_room(partial, (images.n, backbone.dim))
        except UserError as found:
            error = found
    if collectives.largest_int(int(error is not None), worker.device):  # no worker waits for one that gave up
        raise error or UserError(f"the first worker cannot write {folder}")
    rows = open_memmap(partial, mode="r+")
    share = np.array_split(np.arange(images.n), worker.world)[worker.rank]
    own = share[~_done(rows[:, :final], share)]
    before, written = len(share) - len(own), 0

    def progress(done: int, total: int) -> None:
        worker.progress(before + done, before + total, None)

    chunks = outputs(model, images, own, task.backbone.statistics, progress, task.precision) if len(own) else ()
    for features in chunks:
        features[:, :final] = unit(features[:, :final])
        rows[own[written : written + len(features)]] = features.clamp(-FLOAT16, FLOAT16).half().cpu().numpy()
        written += len(features)
    rows.flush()
    images.close()
    collectives.barrier()
    if worker.rank == 0 and backbone.mixture is None:
        partial.rename(folder / "features.npy")
    elif worker.rank == 0:
        mix(rows, final, manifest.clustered, worker)
        partial.unlink()


class BesideEachOther(nn.Module):
    """Images to the parts of a backbone's mixture, (B, D1 + D2): before it is known how much each counts."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        return torch.cat(self.backbone.parts(images), 1)


def mix(rows: Float16[np.ndarray, "N D"], final: int, clustered: int, worker: Worker) -> None:
    """Leaves `features.npy` and `mixture.json`: of each row the first `final` numbers are its final features."""
    sample = np.sort(np.random.default_rng(0).permutation(clustered)[:COMPARED])  # the same for every seed of a run
    compared = torch.from_numpy(rows[sample]).to(worker.device).float()
    mixture = choose_weight(compared[:, :final], compared[:, final:])
    with publish(worker.run / "features/features.npy") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": rows.shape})
        for start in range(0, len(rows), CHUNK):
            row = torch.from_numpy(rows[start : start + CHUNK]).to(worker.device).float()
            file.write(mixture(row[:, :final], row[:, final:]).half().cpu().numpy().tobytes())
    about = {"weight": mixture.weight.item(), "center": mixture.center.tolist()}
    publish_json(worker.run / MIXTURE, about)


def backbone_features(
    task: Task,
    weights: dict[str, Tensor],
    images: Images,
    device: torch.device,
    progress: Progress = lambda done, total: None,
) -> Float16[np.ndarray, "N D"]:
    """Unit-norm features of all images by a backbone with these weights, rounded as in features.npy."""
    backbone = Backbone(task.backbone, task.data.channels, task.data.size)
    backbone.load_state_dict(weights)
    place(backbone, device)
    everything = np.arange(images.n)
    chunks = outputs(backbone, images, everything, task.backbone.statistics, progress, task.precision)
    return np.concatenate([unit(chunk).half().cpu().numpy() for chunk in chunks])


def _called(task: Task, backbone: Backbone) -> str:
    """The same for calls that give the same features: 16 hexadecimal digits."""
    called = hashlib.sha256(repr((task.precision, task.data, task.backbone.statistics)).encode())
    for name, tensor in backbone.state_dict().items():
        called.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return called.hexdigest()[:16]


def _make_room(path: Path, shape: tuple[int, int]) -> None:
    """A file with an array of zeros, unless it is there; those of other calls go.

    The disk gives all of its room now: a write through a memory map to a full disk would kill the process.
    """
    path.parent.mkdir(exist_ok=True)
    for other in path.parent.glob("*.partial.npy"):
        if other != path:
            other.unlink()
    if path.exists():
        return
    with publish(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        file.flush()
        os.posix_fallocate(file.fileno(), 0, file.tell() + 2 * math.prod(shape))


def _done(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Which rows of a consecutive range have unit norm, (len(index),) bool; read in chunks."""
    chunks = [rows[part[0] : part[-1] + 1] for part in np.array_split(index, -(-len(index) // CHUNK)) if len(part)]
    norms = [np.linalg.norm(chunk.astype(np.float32), axis=1) for chunk in chunks]
    return np.abs(np.concatenate([np.empty(0, np.float32), *norms]) - 1) < 0.01


def probabilities(
    model: nn.Module,
    images: Images,
    statistics: Statistics,
    progress: Progress = lambda done, total: None,
    precision: str = "auto",
) -> Float[np.ndarray, "N K"]:
    """Softmax of the model's logits for every image, in image order, float32."""
    found = outputs(model, images, np.arange(images.n), statistics, progress, precision)
    chunks = [logits.softmax(1).cpu() for logits in found]
    return torch.cat(chunks).numpy()


def save_model(net: ClusterNet | ClassifierNet, task: Task, folder: Path) -> None:
    """`model.safetensors` and `model.json`: all that `load_model` needs, wherever the folder goes."""
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
        "backbone": asdict(
            replace(task.backbone, weights="", other_weights=())
        ),  # what it started from, on some machine
    }
    publish_json(folder / "model.json", about)


def load_model(folder: Path, device: torch.device) -> tuple[ClusterNet | ClassifierNet, Task]:
    """The network in eval mode and what it was made for; UserError if the folder holds none."""
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
    head = {name.removeprefix("head."): weight for name, weight in weights.items() if name.startswith("head.")}
    if "in_weight" in head:
        net = ClassifierNet(backbone, Classifiers.holding(head))
    else:
        net = ClusterNet(backbone, ClusterHeads.holding(head))
    net.load_state_dict(weights)
    place(net, device)
    return net.eval(), task


def predict(model: Path, data: str, out: Path) -> None:
    """Assign the images of `data` with the model of a run, into a CSV file: index,path,cluster,confidence.

    Unreadable images are left out; `OUT.quarantine.csv` then says which and why.
    """
    from spice_dist.evaluate import write_assignments

    folder = model / "model" if (model / "model").is_dir() else model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, task = load_model(folder, device)
    with packed(open_data(data), task.data, device) as (images, names, quarantine):
        probs = probabilities(net, images, task.backbone.statistics)
        write_assignments(out, names, probs.argmax(1), probs.max(1), None)
        if quarantine:
            shutil.copyfile(quarantine, out.with_name(out.name + ".quarantine.csv"))


@contextmanager
def packed(source: Source, config: DataConfig, device: torch.device) -> Iterator[tuple[Images, list[str], Path | None]]:
    """(images, their names, the quarantine list if any image was bad), ingested into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="spice-") as temporary:
        folder = Path(temporary)
        manifest = prepare(source, replace(config, max_bad=1.0, drop_duplicates=False), folder)  # all that can be read
        loader = open_images(folder, device=device, size=config.size, channels=config.channels, loader="torch")
        with closing(loader) as images:
            yield images, read_paths(folder), folder / "quarantine.csv" if manifest.bad else None
