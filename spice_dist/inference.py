"""Run trained networks over many images: outputs, probabilities, features."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor, nn

from spice_dist import artifacts
from spice_dist.allocator import keep_freed_memory
from spice_dist.data import augment
from spice_dist.data.files import Progress
from spice_dist.data.images import Images, chunk_of
from spice_dist.data.views import PLAIN, Statistics
from spice_dist.distributed import helpers
from spice_dist.errors import UserError
from spice_dist.methods.plumbing import autocast, open_run_dataset, place
from spice_dist.models.backbone import Backbone, unit
from spice_dist.task import Task


def outputs(
    model: nn.Module,
    images: Images,
    index: np.ndarray,
    statistics: Statistics,
    progress: Progress = lambda done, total: None,
    precision: str = "auto",
) -> Iterator[Float[Tensor, "B D"]]:
    """Yield the model's outputs on the images `index`, un-augmented, in order; `progress` gets (done, all)."""
    done = 0
    for number, out in outputs_of(model, images.batches(index, chunk_of(images.size)), statistics, precision):
        done += len(number)
        progress(done, len(index))
        yield out


def outputs_of(
    model: nn.Module,
    batches: Iterator[tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]],
    statistics: Statistics,
    precision: str = "auto",
) -> Iterator[tuple[Int64[Tensor, " b"], Float[Tensor, "b d"]]]:
    """Yield, for each batch of (images, their numbers), the numbers and the model's outputs, un-augmented."""
    model.eval()
    keep_freed_memory()
    for image, number in batches:
        with torch.no_grad(), autocast(image.device, precision):
            out = model(augment.apply(PLAIN, image, number, (), statistics))
        yield number, out.float()


Reduce = Callable[[Float[Tensor, "..."]], helpers.Rows]
"""Makes rows, one for each image, of the outputs of a batch; a function of a module."""


def reduced(
    model: nn.Module,
    task: Task,
    run: Path,
    device: torch.device,
    reduce: Reduce,
    progress: Progress = lambda done, total: None,
) -> helpers.Rows:
    """Return the rows of all images of a run, in image order; the model's outputs on them are un-augmented.

    Where other workers help (see `helpers`), each takes whole batches, so that every bit is that of one process.
    """
    count = -(-artifacts.manifest(run).n // chunk_of(task.data.size))
    place(model, torch.device("cpu"))  # from where it can be sent
    return helpers.shared(_reduced, count, device, progress, model, task, run, reduce)


def _reduced(
    chunks: range, device: torch.device, progress: Progress, model: nn.Module, task: Task, run: Path, reduce: Reduce
) -> helpers.Rows:
    images, _ = open_run_dataset(task, run, device)
    with closing(images):
        index = batches_of(chunks, images)
        batches = outputs(place(model, device), images, index, task.backbone.statistics, progress, task.precision)
        rows = [reduce(batch) for batch in batches]
    return tuple(np.concatenate(column) for column in zip(*rows, strict=True))


def batches_of(chunks: range, images: Images) -> Int64[np.ndarray, " M"]:
    """Return the numbers of the images in consecutive batches of `chunk_of` images."""
    size = chunk_of(images.size)
    return np.arange(chunks.start * size, min(chunks.stop * size, images.n))


def predictions(
    model: nn.Module, task: Task, run: Path, device: torch.device, progress: Progress = lambda done, total: None
) -> tuple[Int64[np.ndarray, " N"], Float32[np.ndarray, " N"]]:
    """Return the cluster of every image of a run and its probability, the softmax of the model's logits.

    Raises:
        UserError: a logit is not finite.
    """
    labels, confidence = reduced(model, task, run, device, _most_probable, progress)
    _require_finite(confidence)
    return labels, confidence


def _most_probable(logits: Float[Tensor, "B K"]) -> helpers.Rows:
    probs = logits.softmax(1).cpu().numpy()
    return probs.argmax(1), probs.max(1)


def probabilities(
    model: nn.Module,
    images: Images,
    statistics: Statistics,
    progress: Progress = lambda done, total: None,
    precision: str = "auto",
) -> Float[np.ndarray, "N K"]:
    """Compute the softmax of the model's logits for every image, in image order, float32.

    Raises:
        UserError: a logit is not finite.
    """
    chunks = outputs(model, images, np.arange(images.n), statistics, progress, precision)
    probs = torch.cat([logits.softmax(1).cpu() for logits in chunks]).numpy()
    _require_finite(probs)
    return probs


def _require_finite(probs: np.ndarray) -> None:
    if not np.isfinite(probs).all():
        raise UserError("the network predicts what is no number; its weights are damaged, or its training diverged")


def backbone_features(
    task: Task,
    weights: dict[str, Tensor],
    images: Images,
    device: torch.device,
    progress: Progress = lambda done, total: None,
) -> Float16[np.ndarray, "N D"]:
    """Compute unit-norm features of all images by a backbone with these weights, rounded as in features.npy."""
    backbone = Backbone(task.backbone, task.data.channels, task.data.size)
    backbone.load_state_dict(weights)
    place(backbone, device)
    everything = np.arange(images.n)
    chunks = outputs(backbone, images, everything, task.backbone.statistics, progress, task.precision)
    return np.concatenate([unit(chunk).half().cpu().numpy() for chunk in chunks])
