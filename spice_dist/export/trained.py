"""What the exports of a network share: the trained model of a run, its images, how images become its input."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from spice_dist import artifacts, inference
from spice_dist.data.decode import FITS
from spice_dist.data.images import Images
from spice_dist.data.loaders import open_images
from spice_dist.errors import UserError
from spice_dist.model_folder import load_model
from spice_dist.models.backbone import Backbone
from spice_dist.models.heads import Network
from spice_dist.task import Task

CPU = torch.device("cpu")
CHECKED = 16  # images of the run on which an exported network is compared with the run's


@dataclass(frozen=True)
class Trained:
    """The trained model of a run, and a few of the images that it was trained on."""

    net: Network
    task: Task
    images: Images
    index: Int[np.ndarray, " M"]  # of the images to compare on

    @property
    def backbone(self) -> Backbone:
        assert isinstance(self.net.backbone, Backbone)
        return self.net.backbone

    def outputs(self, module: nn.Module) -> Float[Tensor, "M D"]:
        """Compute the outputs of a module for these images as a run does."""
        return torch.cat(list(inference.outputs(module, self.images, self.index, self.task.backbone.statistics)))

    def pixels(self) -> UInt8[Tensor, "M C H W"]:
        """Read these images as the network gets them, not normalised."""
        return torch.cat([batch for batch, _ in self.images.batches(self.index, CHECKED)])


@contextmanager
def trained(run: Path) -> Iterator[Trained]:
    """Open the model of a run; UserError if the run has no model or its images are gone."""
    net, task = load_model(artifacts.model(run), CPU)
    data = task.data
    opened = open_images(artifacts.data(run), device=CPU, size=data.size, channels=data.channels, loader="torch")
    with closing(opened) as images:
        index = np.linspace(0, images.n - 1, min(CHECKED, images.n)).astype(np.int64)
        yield Trained(net, task, images, index)


def preprocessing(task: Task) -> dict[str, Any]:
    """Describe how an image becomes the network's input, as timm names the numbers; grey images have one channel."""
    data, (mean, std) = task.data, task.backbone.statistics
    if data.channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return {
        "input_size": (data.channels, data.size, data.size),
        "colour": "RGB" if data.channels == 3 else "grey, ITU-R 601 luma",
        "crop": f"{FITS[data.fit]}, EXIF orientation applied",
        "crop_pct": 1.0,
        "crop_mode": "squash" if data.fit == "squash" else "center",
        "interpolation": "bilinear, antialiased; bicubic where it enlarges",
        "mean": mean,
        "std": std,
    }


def cropping(task: Task) -> str:
    """Say in one line which pixels of an image the network takes."""
    about, size = preprocessing(task), task.data.size
    return f"images: {about['colour']}, {about['crop']}, resized to {size} x {size} ({about['interpolation']})"


def largest_difference(what: str, one: Float[Tensor, "M D"], other: Float[Tensor, "M D"], tolerance: float) -> float:
    """Return max |one - other| / max |other|; UserError if it is above the tolerance or not finite."""
    difference = float((one - other).abs().max() / other.abs().max())
    if not difference <= tolerance:
        raise UserError(
            f"{what} differ by {difference:.1e} of the largest from the run's network, more than {tolerance:.0e}: "
            "nothing was written"
        )
    return difference
