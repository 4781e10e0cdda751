"""Crops: boxes in pixels as a function of (key, image), the same for a loader and a device, and cutting on tensors."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from spice_dist.data.counter_rng import uniform
from spice_dist.transfer import send

TRIES = 10  # torchvision draws as often before it falls back to the centre
Key = tuple[int, ...]
"""What random numbers depend on beside the image: (seed, epoch or step, stream)."""


@dataclass(frozen=True)
class Crop:
    """A RandomResizedCrop."""

    scale: tuple[float, float]  # share of the area
    size: int  # pixels, side of the result
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, drawn uniformly in its logarithm


def boxes(
    crop: Crop,
    key: Key,
    index: Int64[np.ndarray, " B"],
    heights: Int64[np.ndarray, " B"],
    widths: Int64[np.ndarray, " B"],
) -> Int64[np.ndarray, "B 4"]:
    """Draw (left, top, width, height) by torchvision's rule: the first of TRIES that fits, else a central box.

    The central box is the largest whose ratio is allowed.
    """
    draws = uniform(key, torch.from_numpy(index), 2 * TRIES + 2).double().numpy()
    share = crop.scale[0] + draws[:, :TRIES] * (crop.scale[1] - crop.scale[0])
    low, high = (math.log(ratio) for ratio in crop.ratio)
    ratio = np.exp(low + draws[:, TRIES : 2 * TRIES] * (high - low))
    area = share * (heights * widths)[:, None]
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width >= 1) & (width <= widths[:, None]) & (height >= 1) & (height <= heights[:, None])
    first = fits.argmax(1)[:, None]
    any_fits = fits.any(1)

    shape = widths / heights
    central_width = np.where(shape > crop.ratio[1], np.rint(heights * crop.ratio[1]), widths)
    central_height = np.where(shape < crop.ratio[0], np.rint(widths / crop.ratio[0]), heights)
    width = np.where(any_fits, np.take_along_axis(width, first, 1)[:, 0], central_width)
    height = np.where(any_fits, np.take_along_axis(height, first, 1)[:, 0], central_height)
    left = np.where(any_fits, np.floor(draws[:, -2] * (widths - width + 1)), (widths - width) // 2)
    top = np.where(any_fits, np.floor(draws[:, -1] * (heights - height + 1)), (heights - height) // 2)
    return np.stack([left, top, width, height], 1).astype(np.int64)


def central_squares(heights: Int64[np.ndarray, " B"], widths: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, "B 4"]:
    """Return (left, top, side, side) of the largest central square."""
    side = np.minimum(heights, widths)
    return np.stack([(widths - side) // 2, (heights - side) // 2, side, side], 1).astype(np.int64)


def cut(x: Float[Tensor, "B C H W"], box: Int64[np.ndarray, "B 4"], height: int, width: int) -> Tensor:
    """Cut boxes (left, top, width, height) and resize them by a triangle filter, as Pillow's bilinear one.

    Resizing is linear and separable: rows @ x @ columns, with a matrix of weights for each image. Pixels
    beyond a box count nothing, as if it had been cut out before.
    """
    left, top, box_width, box_height = send(torch.from_numpy(box).float().T.contiguous(), x.device)
    rows, columns = _weights(top, box_height, x.shape[2], height), _weights(left, box_width, x.shape[3], width)
    return torch.matmul(rows[:, None], torch.matmul(x, columns.mT[:, None]))


def cut_bytes(images: UInt8[Tensor, "B C H W"], box: Int64[np.ndarray, "B 4"], height: int, width: int) -> Tensor:
    """Cut as `cut` does, rounded to bytes as Pillow; the fastest way for a CPU and large images."""
    out = torch.empty((*images.shape[:2], height, width), dtype=torch.uint8)
    for number, (left, top, box_width, box_height) in enumerate(box.tolist()):
        crop = images[number : number + 1, :, top : top + box_height, left : left + box_width]
        out[number] = F.interpolate(crop, size=(height, width), mode="bilinear", antialias=True)[0]
    return out


def _weights(start: Float[Tensor, " B"], length: Float[Tensor, " B"], before: int, after: int) -> Tensor:
    """Return the weight (B, after, before) of each pixel in each pixel of the resized stretch from start.

    They are computed where `start` is: four numbers of an image cross to a GPU, not its matrices.
    """
    scale = (length / after)[:, None, None]
    middle = start[:, None, None] + (torch.arange(after, device=start.device)[:, None] + 0.5) * scale
    position = torch.arange(before, device=start.device) + 0.5
    weights = (1 - (position - middle).abs() / scale.clamp(min=1)).clamp(min=0)
    inside = (position > start[:, None, None]) & (position < (start + length)[:, None, None])
    weights = weights * inside
    return weights / weights.sum(2, keepdim=True)
