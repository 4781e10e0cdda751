"""The stage that embeds: it writes `features/features.npy`, unit-norm features of all images by stage 1's network."""

import hashlib
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from tqdm import tqdm

from spice_dist import artifacts, verdict
from spice_dist.data.files import commit, publish, publish_json
from spice_dist.data.images import CHUNK
from spice_dist.distributed import collectives
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.inference import outputs
from spice_dist.methods.plumbing import load_backbone, open_dataset, place
from spice_dist.mixing import COMPARED, choose_weight
from spice_dist.models.backbone import Backbone, unit
from spice_dist.models.folding import folded
from spice_dist.objectives import mean_cosine
from spice_dist.task import Task

FLOAT16 = 65_504.0  # its largest value


def embed(task: Task, config: None, worker: Worker) -> None:
    """Write `features/features.npy`, (N, D) float16: unit-norm features of all images, in image order.

    Every worker writes the rows of a consecutive share of the images. The file appears when all rows are written. Rows
    of an interrupted call, with any number of workers, are not computed again: the final features of a finished row
    have unit norm. If a middle stage's features are mixed in, `mixture.json` holds their weight. A run that goes on
    from one with the same network takes its features and its weight, and encodes other images alone.
    """
    images, manifest = open_dataset(task, worker)
    backbone, earlier = load_backbone(task, worker.run), artifacts.earlier_features(worker.run)
    if earlier and backbone.mixture is not None:
        backbone.mixture.set(**artifacts.earlier_mixture(worker.run))
    mixes = backbone.mixture is not None and not earlier  # its weight is chosen by these images
    folder = worker.run / "features"
    partial = folder / f"features.{_fingerprint(task, backbone)}.partial.npy"
    place(backbone, worker.device)
    if task.pretext == "none":  # not for stage 1's networks: folding would change their features' last bits
        size = task.data.size
        backbone = folded(backbone, torch.rand(2, task.data.channels, size, size, device=worker.device))
    model = BesideEachOther(backbone) if mixes else backbone
    final = backbone.dim - len(backbone.mixture.center) if mixes and backbone.mixture is not None else backbone.dim
    _allocate_by_first_worker(partial, (images.n, backbone.dim), worker)
    rows = open_memmap(partial, mode="r+")
    share = np.array_split(np.arange(images.n), worker.world)[worker.rank]
    if earlier:
        _fill_in(rows, share, *earlier)
    missing = share[~_finished_rows(rows[:, :final], share)]
    before, written = len(share) - len(missing), 0

    def progress(done: int, total: int) -> None:
        worker.progress(before + done, before + total, None)

    statistics = task.backbone.statistics
    chunks = outputs(model, images, missing, statistics, progress, task.precision) if len(missing) else ()
    for features in chunks:
        features[:, :final] = unit(features[:, :final])
        index = missing[written : written + len(features)]
        stored = features.clamp(-FLOAT16, FLOAT16).half().cpu()
        if not torch.isfinite(stored).all():
            weights = f", {task.backbone.weights}," * bool(task.backbone.weights)
            raise UserError(f"the network gives features that are no numbers; its weights{weights} are damaged")
        rows[index] = stored.numpy()
        written += len(features)
    rows.flush()
    images.close()
    collectives.barrier()
    if worker.rank == 0:
        tell_if_alike(rows[:, :final], manifest.clustered)
    if worker.rank == 0 and not mixes:
        if backbone.mixture is not None:
            publish_json(artifacts.mixture_file(worker.run), artifacts.earlier_mixture(worker.run))
        commit(partial, artifacts.features_file(worker.run))
    elif worker.rank == 0:
        mix(rows, final, manifest.clustered, worker)
        partial.unlink()


def _fill_in(
    rows: Float16[np.ndarray, "N D"], share: Int[np.ndarray, " S"], known: Int[np.ndarray, " M"],
    features: Float16[np.ndarray, "M D"],
) -> None:  # fmt: skip
    """Copy features that are known into the rows of a share, in chunks."""
    own = np.flatnonzero(np.isin(known, share))
    for chunk in np.array_split(own, -(-len(own) // CHUNK) or 1):
        rows[known[chunk]] = features[chunk]


def tell_if_alike(rows: Float16[np.ndarray, "N D"], clustered: int) -> None:
    """Print a line if a sample of unit features has a mean cosine above ALIKE: constant images, or a collapse."""
    sample = np.random.default_rng(0).permutation(clustered)[:COMPARED]
    cosine = mean_cosine(rows[np.sort(sample)].astype(np.float32))
    if cosine > verdict.ALIKE:
        tqdm.write(
            f"the features of the images are nearly all alike (mean cosine {cosine:.4f}): look whether the images are "
            "constant, or take another --backbone",
            sys.stderr,
        )


class BesideEachOther(nn.Module):
    """Maps images to the two inputs of a backbone's mixture, (B, D1 + D2), whose weight is not yet known."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        return torch.cat(self.backbone.parts(images), 1)


def mix(rows: Float16[np.ndarray, "N D"], final: int, clustered: int, worker: Worker) -> None:
    """Write `features.npy` and `mixture.json`; the first `final` numbers of a row are its final features."""
    # seed 0: the same sample for every seed of a run
    sample = np.sort(np.random.default_rng(0).permutation(clustered)[:COMPARED])
    compared = torch.from_numpy(rows[sample]).to(worker.device).float()
    mixture = choose_weight(compared[:, :final], compared[:, final:])
    with publish(artifacts.features_file(worker.run)) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": rows.shape})
        for start in range(0, len(rows), CHUNK):
            row = torch.from_numpy(rows[start : start + CHUNK]).to(worker.device).float()
            file.write(mixture(row[:, :final], row[:, final:]).half().cpu().numpy().tobytes())
    about = {"weight": mixture.weight.item(), "center": mixture.center.tolist()}
    publish_json(artifacts.mixture_file(worker.run), about)


def _fingerprint(task: Task, backbone: Backbone) -> str:
    """Return 16 hexadecimal digits, equal for calls that give the same features."""
    digest = hashlib.sha256(repr((task.precision, task.data, task.backbone.statistics)).encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _allocate_by_first_worker(path: Path, shape: tuple[int, int], worker: Worker) -> None:
    """Call `_allocate` in the first worker; if it fails, raise a UserError in every worker, so that none waits."""
    error = None
    if worker.rank == 0:
        try:
            _allocate(path, shape)
        except UserError as failure:
            error = failure
    if collectives.largest_int(int(error is not None), worker.device):
        raise error or UserError(f"the first worker cannot write {path.parent}")


def _allocate(path: Path, shape: tuple[int, int]) -> None:
    """Create a file with an array of zeros, unless it exists; remove the partial files of other calls.

    Its space on the disk is reserved now: a write through a memory map to a full disk would kill the process.
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


def _finished_rows(rows: Float16[np.ndarray, "N D"], index: Int[np.ndarray, " M"]) -> Bool[np.ndarray, " M"]:
    """Mark the rows of unit norm in a consecutive range, read in chunks."""
    chunks = [chunk for chunk in np.array_split(index, -(-len(index) // CHUNK)) if len(chunk)]
    norms = [np.linalg.norm(rows[chunk[0] : chunk[-1] + 1].astype(np.float32), axis=1) for chunk in chunks]
    return np.abs(np.concatenate([np.empty(0, np.float32), *norms]) - 1) < 0.01
