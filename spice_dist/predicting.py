"""What a trained model says about other images, in the order in which they were given."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from spice_dist import artifacts
from spice_dist.data.dataset import DataConfig, is_ours
from spice_dist.data.files import Progress
from spice_dist.data.images import chunk_of
from spice_dist.data.ingest import require_fit
from spice_dist.data.left_out import left_out
from spice_dist.data.loaders import open_images
from spice_dist.data.packed_files import adopt
from spice_dist.data.sources import Source
from spice_dist.data.stream import Batch, Stream
from spice_dist.data.views import Statistics
from spice_dist.distributed.worker import usable_cores
from spice_dist.errors import UserError
from spice_dist.inference import outputs_of
from spice_dist.model_folder import load_model
from spice_dist.models.heads import Network
from spice_dist.task import Task

NO_CLUSTER = -1  # of an image that cannot be used
Unreadable = Literal["skip", "keep", "error"]
Read = Callable[[Source, int, dict[int, str]], Iterator[Batch]]
"""Called with a part of a source, the number of its first image in that, and what takes the reason for each image of
the part that cannot be used. Yields (images, their numbers in the part) as `Stream.batches` does.
"""
Row = tuple[int, str, int, float | None, str | None]
"""Number, path, cluster, confidence and name of the cluster of an image; None where there is none."""


@dataclass(frozen=True)
class Predictions:
    """The clusters of the N images of a source."""

    source: Source
    cluster: Int64[np.ndarray, " N"]  # NO_CLUSTER where an image cannot be used
    confidence: Float[np.ndarray, " N"]  # the probability of its cluster, NaN without one
    reasons: dict[int, str]  # why an image cannot be used, by its number
    names: dict[int, str]  # of clusters
    keep: bool  # whether unusable images have rows

    @property
    def shown(self) -> Bool[np.ndarray, " N"]:
        """Return which images have a row."""
        return np.full(len(self.cluster), True) if self.keep else self.cluster != NO_CLUSTER

    def rows(self) -> Iterator[Row]:
        """Yield the rows, in the order in which the images were given."""
        shown = self.shown
        for i, path in enumerate(self.source.paths):
            if shown[i]:
                cluster = int(self.cluster[i])
                confidence = None if cluster == NO_CLUSTER else float(self.confidence[i])
                yield i, path, cluster, confidence, self.names.get(cluster)

    def left_out(self) -> dict[str, int]:
        """Count the files without a row by reason."""
        return left_out(self.source.ignored, len(self.source.refused), 0 if self.keep else len(self.reasons))

    def given(self) -> int:
        """Return how many files and images there are, with a row or without."""
        return int(self.shown.sum()) + sum(self.left_out().values())


def predict(
    folder: Path,
    source: Source,
    unreadable: Unreadable = "skip",
    progress: Progress = lambda done, total: None,
    max_megapixels: int | None = None,
) -> Predictions:
    """Assign every image of `source` to a cluster of the model in `folder`.

    Args:
        max_megapixels: largest image that is read, in millions of pixels; None: as for the images of the run.

    Raises:
        UserError: no image can be used, or one cannot and `unreadable` is "error".
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = artifacts.model_names(folder)
    torch.set_num_threads(torch.get_num_threads())  # MKL takes exactly these then, as in the workers of a cluster
    net, task = load_for_images(folder, device, max_megapixels)
    best, reasons = apply(net, best_cluster, 2, task, source, device, unreadable == "error", progress)
    return predictions_of(source, best, reasons, unreadable, names)


def load_for_images(folder: Path, device: torch.device, max_megapixels: int | None) -> tuple[Network, Task]:
    """As `load_model`, with another limit of what is read, unless it is None."""
    net, task = load_model(folder, device)
    if max_megapixels is not None:
        task = replace(task, data=replace(task.data, max_megapixels=max_megapixels))
    return net, task


def best_cluster(logits: Tensor) -> Float[Tensor, "B 2"]:
    """Return the largest probability of each image and its cluster."""
    return torch.stack([values.float() for values in logits.softmax(1).max(1)], 1)


def predictions_of(
    source: Source,
    best: Float[np.ndarray, "N 2"],
    reasons: dict[int, str],
    unreadable: Unreadable,
    names: dict[int, str],
) -> Predictions:
    """Make rows of what `best_cluster` says of each image; UserError if no image can be used and none has a row."""
    cluster = np.full(len(best), NO_CLUSTER)
    usable = usable_images(len(best), reasons)
    cluster[usable] = best[usable, 1]
    if unreadable == "skip" and not usable.any():
        raise UserError(f"none of the {len(best)} images can be used, e.g. {_example(source, reasons)}")
    return Predictions(source, cluster, best[:, 0], reasons, names, unreadable == "keep")


def apply(
    model: nn.Module,
    reduce: Callable[[Tensor], Tensor],
    width: int,
    task: Task,
    source: Source,
    device: torch.device,
    strict: bool,
    progress: Progress = lambda done, total: None,
) -> tuple[Float[np.ndarray, "N D"], dict[int, str]]:
    """Compute reduce(model(images)), `width` numbers for each image, and the reasons why some have none.

    An image that cannot be used is a row of NaN; UserError if `strict`. Memory: the result.
    """
    result = np.full((len(source.paths), width), np.nan, np.float32)
    reasons: dict[int, str] = {}
    with reading(source, is_ours(source.name), task.data, device, usable_cores()) as read:
        for done in fill(result, model, reduce, read(source, 0, reasons), task.backbone.statistics):
            if strict:
                require_all(source, reasons)
            progress(done, len(source.paths))
    if strict:
        require_all(source, reasons)
    require_finite(result, reasons)
    progress(len(source.paths), len(source.paths))
    return result, reasons


def fill(
    result: Float[np.ndarray, "N D"],
    model: nn.Module,
    reduce: Callable[[Tensor], Tensor],
    batches: Iterator[Batch],
    statistics: Statistics,
) -> Iterator[int]:
    """Write reduce(model(images)) into the rows of the images, batch by batch; yield how many rows are passed."""
    for number, out in outputs_of(model, batches, statistics):
        with torch.no_grad():
            result[number.numpy()] = reduce(out).cpu().numpy()
        yield int(number[-1]) + 1


def usable_images(count: int, reasons: dict[int, str]) -> Bool[np.ndarray, " N"]:
    """Return which of `count` images are none of those that `reasons` names."""
    usable = np.full(count, True)
    usable[list(reasons)] = False
    return usable


@contextmanager
def reading(source: Source, packed: bool, config: DataConfig, device: torch.device, cores: int) -> Iterator[Read]:
    """Open the images of a source, or parts of it, for a model: where they are packed already, else decoded on the way.

    Args:
        packed: whether this program packed them for this user.
        cores: processes that decode.
    """
    chunk = chunk_of(config.size)
    if not packed:
        with closing(Stream(config, device, cores)) as decoding:
            yield lambda images, first, reasons: decoding.batches(images, chunk, reasons)
        return
    require_fit(source, config.fit, source.name)
    with tempfile.TemporaryDirectory(prefix="spice-") as folder:
        adopt(Path(source.name), Path(folder))
        stored = open_images(Path(folder), device=device, size=config.size, channels=config.channels, loader="torch")
        with closing(stored):
            yield lambda images, first, reasons: (
                (pixels, number - first)
                for pixels, number in stored.batches(np.arange(first, first + len(images.paths)), chunk)
            )


def require_all(source: Source, reasons: dict[int, str]) -> None:
    """Raise UserError if an image of the source cannot be used."""
    if reasons:
        raise UserError(f"an image cannot be used: {_example(source, reasons)}; repair it or leave it out")


def require_finite(result: Float[np.ndarray, "N D"], reasons: dict[int, str]) -> None:
    """Raise UserError if a number of a usable image is not finite."""
    if not np.isfinite(result[usable_images(len(result), reasons)]).all():
        raise UserError(
            "the model gives what is no number for some images; its weights are damaged: make it again with fit"
        )


def _example(source: Source, reasons: dict[int, str]) -> str:
    number, reason = next(iter(reasons.items()))
    return f"{source.paths[number]!r}: {reason}"
