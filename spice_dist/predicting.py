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
from spice_dist.data.dataset import DataConfig, is_ours, prepare
from spice_dist.data.files import Progress
from spice_dist.data.images import chunk_of
from spice_dist.data.left_out import left_out
from spice_dist.data.loaders import open_images
from spice_dist.data.sources import Source
from spice_dist.data.stream import stream
from spice_dist.errors import UserError
from spice_dist.inference import outputs_of
from spice_dist.model_folder import load_model
from spice_dist.task import Task

NO_CLUSTER = -1  # of an image that cannot be used
Unreadable = Literal["skip", "keep", "error"]
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
        for i in np.flatnonzero(self.shown).tolist():
            cluster = int(self.cluster[i])
            confidence = None if cluster == NO_CLUSTER else float(self.confidence[i])
            yield i, self.source.paths[i], cluster, confidence, self.names.get(cluster)

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
    net, task = load_model(folder, device)
    if max_megapixels is not None:
        task = replace(task, data=replace(task.data, max_megapixels=max_megapixels))
    best, reasons = apply(net, _best, 2, task, source, device, unreadable == "error", progress)
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
    with _batches(source, task.data, device, reasons) as batches:
        for number, out in outputs_of(model, batches, task.backbone.statistics):
            with torch.no_grad():
                result[number.numpy()] = reduce(out).cpu().numpy()
            if strict:
                _require_all(source, reasons)
            progress(int(number[-1]) + 1, len(source.paths))
    if strict:
        _require_all(source, reasons)
    if not np.isfinite(result[usable_images(len(result), reasons)]).all():
        raise UserError(
            "the model gives what is no number for some images; its weights are damaged: make it again with fit"
        )
    progress(len(source.paths), len(source.paths))
    return result, reasons


def usable_images(count: int, reasons: dict[int, str]) -> Bool[np.ndarray, " N"]:
    """Return which of `count` images are none of those that `reasons` names."""
    usable = np.full(count, True)
    usable[list(reasons)] = False
    return usable


@contextmanager
def _batches(
    source: Source, config: DataConfig, device: torch.device, reasons: dict[int, str]
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Open the images for a model: from the file where they are packed already, else decoded on the way."""
    chunk = chunk_of(config.size)
    if not is_ours(source.name):
        with closing(stream(source, config, chunk, device, reasons)) as batches:
            yield batches
        return
    with tempfile.TemporaryDirectory(prefix="spice-") as folder:
        manifest = prepare(source, config, Path(folder))
        loader = open_images(Path(folder), device=device, size=config.size, channels=config.channels, loader="torch")
        with closing(loader) as images:
            yield images.batches(np.arange(manifest.n), chunk)


def _best(logits: Tensor) -> Tensor:
    """Return the largest probability of each image and its cluster."""
    return torch.stack([values.float() for values in logits.softmax(1).max(1)], 1)


def _require_all(source: Source, reasons: dict[int, str]) -> None:
    if reasons:
        raise UserError(f"an image cannot be used: {_example(source, reasons)}; repair it or leave it out")


def _example(source: Source, reasons: dict[int, str]) -> str:
    number, reason = next(iter(reasons.items()))
    return f"{source.paths[number]!r}: {reason}"
