"""Where a group is seen in its typical images: cosines of their places with its prototype, as in SPICE's Fig. 5."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from spice_dist import artifacts
from spice_dist.errors import UserError
from spice_dist.report.gallery import Gallery, encode

SHOWN = 6  # typical images of a group
MAX_GROUPS = 60  # of more groups none are shown: each costs a forward pass
DARK = 0.25  # brightness of the places that are least like the group
EDGE = 96  # px


def spotlights(run: Path, galleries: Sequence[Gallery]) -> dict[int, list[tuple[str, str]]]:
    """Return for each group its typical images, (data URI, path), bright where they are like the group's prototype.

    It is empty where the network has no map of places, as a transformer, or where images or model are gone.
    """
    chosen = {gallery.cluster: gallery.nearest[:SHOWN] for gallery in galleries if gallery.nearest}
    if not chosen or len(galleries) > MAX_GROUPS:
        return {}
    index = np.array([thumbnail.index for shown in chosen.values() for thumbnail in shown])
    groups = np.concatenate([np.full(len(shown), cluster) for cluster, shown in chosen.items()])
    try:
        seen = last_maps(run, index)
    except (UserError, OSError):
        return {}
    if seen is None:
        return {}
    pictures = [_lit(*pair) for pair in zip(seen[0], likeness(seen[1], groups), strict=True)]
    uris = iter([encode(picture, EDGE)[0] for picture in pictures])
    return {cluster: [(next(uris), thumbnail.path) for thumbnail in shown] for cluster, shown in chosen.items()}


def last_maps(
    run: Path, index: Int[np.ndarray, " M"]
) -> tuple[UInt8[np.ndarray, "M H W 3"], Float[np.ndarray, "M D h w"]] | None:
    """Return these images of the run and the last maps of its network; None if it has none of two places or more."""
    import torch
    from torch import nn

    from spice_dist.data.loaders import open_images
    from spice_dist.inference import outputs
    from spice_dist.model_folder import load_model

    class LastMap(nn.Module):
        def __init__(self, body: Any):
            super().__init__()
            self.body = body

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.body.forward_features(images)

    cpu = torch.device("cpu")
    net, task = load_model(artifacts.model(run), cpu)
    body = net.backbone.body
    if not hasattr(body, "forward_features"):
        return None
    data, statistics = task.data, task.backbone.statistics
    opened = open_images(artifacts.data(run), device=cpu, size=data.size, channels=data.channels, loader="torch")
    with closing(opened) as images:
        maps = torch.cat(list(outputs(LastMap(body), images, index, statistics))).numpy()
        if maps.ndim != 4 or maps[0, 0].size < 2:
            return None
        pixels = torch.cat([batch for batch, _ in images.batches(index, 64)]).permute(0, 2, 3, 1).numpy()
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3)), maps


def likeness(maps: Float[np.ndarray, "M D h w"], groups: Int[np.ndarray, " M"]) -> Float[np.ndarray, "M h w"]:
    """Compute the cosine of every place with its group's prototype: the mean over all places of the group's images."""
    result = np.empty((len(maps), *maps.shape[2:]))
    for group in np.unique(groups):
        of_group = maps[groups == group].astype(np.float64)
        prototype = of_group.mean((0, 2, 3))
        lengths = np.linalg.norm(of_group, axis=1) * np.linalg.norm(prototype)
        result[groups == group] = np.einsum("mdhw,d->mhw", of_group, prototype) / np.maximum(lengths, 1e-12)
    return result


def _lit(image: UInt8[np.ndarray, "H W 3"], likeness: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "H W 3"]:
    """Darken the places that are less like the group than others of the image."""
    from PIL import Image

    scaled = (likeness - likeness.min()) / max(float(np.ptp(likeness)), 1e-12)
    height, width = image.shape[:2]
    light = Image.fromarray(scaled.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    brightness = DARK + (1 - DARK) * np.clip(np.asarray(light), 0, 1)
    return (image * brightness[:, :, None]).round().astype(np.uint8)
