"""Features of random views that are used again after some epochs: in memory, or in files that runs share.

A sweep's trials train heads on the same features: `store` encodes their views once, and `RepeatedViews` reads them.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spice_dist.data.checksums import require_whole
from spice_dist.data.crops import Key
from spice_dist.data.files import publish
from spice_dist.data.images import Images
from spice_dist.data.views import View
from spice_dist.methods.plumbing import view_features
from spice_dist.task import Task

Encode = Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B D"]]


class RepeatedViews:
    """Gives the features of the views of `epochs` epochs; `draw` gives the kinds and keys of an epoch's views.

    A view that `store` wrote is read from its file. Any other is encoded once and kept in memory.
    """

    def __init__(
        self,
        task: Task,
        images: Images,
        run: Path,
        draw: Callable[[int], Sequence[tuple[View, Key]]],
        epochs: int,
        encode: Encode,
        kind: str,
    ):
        self.kind = kind
        self.task, self.images, self.run, self.draw, self.encode = task, images, run, draw, encode
        self.all_stored = all(stored(run, view, kind).exists() for epoch in range(epochs) for view in draw(epoch))
        self.in_memory: dict[int, list[Tensor]] = {}

    def features(self, number: int, epoch: int, index: Int[np.ndarray, " M"]) -> list[Float[Tensor, "M D"]]:
        """Return the features of these images in each of the epoch's views, half precision on the host.

        Args:
            number: of the E-step; it determines the epoch and the images.
        """
        if number in self.in_memory:
            return self.in_memory[number]
        features = self._read_or_encode(self.draw(epoch), index)
        if not self.all_stored:
            self.in_memory[number] = features
        return features

    def _read_or_encode(self, views: Sequence[tuple[View, Key]], index: Int[np.ndarray, " M"]) -> list[Tensor]:
        paths = [stored(self.run, view, self.kind) for view in views]
        on_disk = [path.exists() for path in paths]
        missing = [view for view, there in zip(views, on_disk, strict=True) if not there]
        encoded = iter(encode_all(self.task, self.images, index, missing, self.encode))
        return [
            torch.from_numpy(np.load(path, mmap_mode="r")[index]) if there else next(encoded).half().cpu()
            for path, there in zip(map(require_whole, paths), on_disk, strict=True)
        ]


def store(
    task: Task,
    images: Images,
    index: Int[np.ndarray, " N"],
    views: Sequence[tuple[View, Key]],
    encode: Encode,
    run: Path,
    kind: str,
) -> None:
    """Write a file in `views/` for each view: its features (N, D), float16. Existing files stay."""
    (run / "views").mkdir(exist_ok=True)
    missing = [view for view in views if not stored(run, view, kind).exists()]
    for features, view in zip(encode_all(task, images, index, missing, encode), missing, strict=True):
        with publish(stored(run, view, kind)) as file:
            np.save(file, features.half().cpu().numpy())


def stored(run: Path, view: tuple[View, Key], kind: str) -> Path:
    """Return the file of this view, named by everything that it depends on beside images and backbone.

    Args:
        kind: of features, "unit" or "raw".
    """
    return run / f"views/{kind}-{sha256(repr(view).encode()).hexdigest()[:16]}.npy"


def encode_all(
    task: Task, images: Images, index: Int[np.ndarray, " M"], views: Sequence[tuple[View, Key]], encode: Encode
) -> list[Float[Tensor, "M D"]]:
    """Compute the features of these images in each of these views; no image is read if there is no view."""
    return view_features(task, images, index, views, [encode] * len(views)) if views else []
