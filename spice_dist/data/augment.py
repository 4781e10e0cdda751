"""Random views of image batches, on the device the batch is on.

A `View` (views.py) says which operations are drawn and how strongly. `apply` draws every parameter from (seed, time,
stream, image index), so a view does not depend on the batch, the worker or the number of workers.
A resized crop is antialiased, an affine map bilinear and black outside, the 14 operations (operations.py) take the
nearest pixel as Pillow does. The rest works on values in [0, 1].

Why not kornia: CPU time of a MoCo view in ms, ours / kornia 0.9.0 / torchvision v2 on Pillow images, one thread:
0.10 / 0.17 / 0.60 at 32 pixels, 2.0 / 13.2 / 9.0 at 224; and it draws from torch's generator, batch by batch.
"""

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor

from spice_dist.data.counter_rng import uniform
from spice_dist.data.crops import Crop, Key, boxes, cut, cut_bytes
from spice_dist.data.images import Images
from spice_dist.data.operations import (
    OPERATIONS,
    brighten,
    change_contrast,
    column,
    identity,
    luma,
    matrix,
    resample,
    rotation,
    saturate,
    turn_hue,
)
from spice_dist.data.views import IMAGENET, Statistics, View
from spice_dist.transfer import constant, send

GREY = (125 / 255, 123 / 255, 114 / 255)  # what `erase` paints
BLOCK = 64  # random numbers made at once for each image; a view takes about 40
LARGE = 64  # pixels, side from which a CPU cuts image by image
CHUNK = 1 << 21  # numbers that a CPU thread works on at once: with fewer, calls cost more than a cache saves

log = logging.getLogger("spice_dist.data")


def view_batches(
    images: Images,
    order: np.ndarray,
    batch_size: int,
    views: Sequence[tuple[View, Key]],
    statistics: Statistics = IMAGENET,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield ([a batch of normalised views for each of `views`], index); every image is read once for all views.

    Where images are larger than what the network sees, the loader cuts the crops of whole images, by the same numbers.
    """
    crops = [(Crop(view.crop_scale, view.size or images.size), _crop_key(key)) for view, key in views]
    if images.decodes and all(view.crop_scale != (1.0, 1.0) for view, _ in views):
        for cut, index in images.crops(order, batch_size, crops):
            pairs = zip(views, cut, strict=True)
            yield [apply(view, batch, index, key, statistics, cropped=True) for (view, key), batch in pairs], index
    else:
        for batch, index in images.batches(order, batch_size):
            yield [apply(view, batch, index, key, statistics) for view, key in views], index


def apply(
    view: View,
    images: UInt8[Tensor, "B C H W"],
    index: Int[Tensor, " B"],
    key: Key,
    statistics: Statistics = IMAGENET,
    cropped: bool = False,
) -> Float[Tensor, "B C S T"]:
    """Draw normalised random views. `key` is (seed, time, stream): streams tell the views of one image apart.

    With `cropped` the images are the view's crops already.
    """
    size = view.size or images.shape[2], view.size or images.shape[3]
    out = torch.empty((*images.shape[:2], *(images.shape[2:] if cropped else size)), device=images.device)

    inference = torch.is_inference_mode_enabled()

    def draw(rows: slice) -> None:  # modes belong to a thread; bfloat16 positions are off by up to half a pixel
        with torch.inference_mode(inference), torch.autocast(images.device.type, enabled=False):
            _draw(view, images[rows], index[rows], key, cropped, statistics, out[rows])

    if images.device.type != "cpu":
        draw(slice(None))
    else:
        threads = torch.get_num_threads()
        step = max(1, min(CHUNK // out[0].numel(), -(-len(out) // threads)))
        deque(_threads(threads).map(draw, [slice(i, i + step) for i in range(0, len(out), step)]), 0)
    return out


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Return threads that compute a chunk each: splitting every single operation costs more than it saves."""
    started = Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # the first call in a thread takes the common number and would undo the next line
        torch.set_num_threads(1)
        started.wait(60)

    pool = ThreadPoolExecutor(count, "augment", start)
    for _ in range(count):
        pool.submit(int)
    started.wait(60)
    torch.set_num_threads(count)  # for threads that start later, torch goes by the last call
    return pool


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked child has none of them


def _draw(
    view: View, images: Tensor, index: Tensor, key: Key, cropped: bool, statistics: Statistics, out: Tensor
) -> None:
    """Write the views into `out`, which also holds the intermediate values: most steps work in place."""
    draws = _Draws(key, index, images.device)
    if view.crop_scale != (1.0, 1.0) and not cropped:
        sides = (np.full(len(images), side) for side in images.shape[2:])
        box = boxes(Crop(view.crop_scale, 0), _crop_key(key), draws.index.numpy(), *sides)
        if _by_image(out):
            x = torch.mul(cut_bytes(images, box, *out.shape[2:]), 1 / 255, out=out)
        else:
            x = cut(images * (1 / 255), box, *out.shape[2:])
    else:
        x = torch.mul(images, 1 / 255, out=out)
    if view.operations_first:
        x = _operations(view, x, draws)
    x = _geometry(view, x, draws)
    if not view.operations_first:
        x = _operations(view, x, draws)
    if view.jitter:
        _color_jitter(view, x, draws)
    if view.grey:
        _change(x, draws.rows(view.grey), _drop_colour)
    if view.blur:
        _blur(view, x, draws)
    if view.noise:
        x = _noise(view, x, draws)
    normalize(x, statistics, out)
    if view.cutout:
        _cutout(view, out, draws)


_compiles = False


def set_compiled(on: bool) -> None:
    """Choose whether a GPU runs the operations of views fused by torch.compile: fewer kernels, other rounding."""
    global _compiles
    _compiles = on


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)  # the number of images that an operation is drawn for varies


def _run(function: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Call the function, compiled if that is wanted and possible."""
    if _compiles and x.device.type == "cuda":
        try:
            return _compiled(function)(x, *args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler is missing, or fails: before anything is computed
            set_compiled(False)
            log.warning("views are not compiled, which is slower only: %s", str(error).partition("\n")[0])
    return function(x, *args)


def _by_image(x: Float[Tensor, "B C H W"]) -> bool:
    """Return whether images are so large that a CPU is faster on one at a time."""
    return x.device.type == "cpu" and max(x.shape[2:]) >= LARGE


def _change(
    x: Float[Tensor, "B C H W"], rows: Int64[Tensor, " b"], function: Callable[..., Tensor], *args: Tensor
) -> None:
    """Set x[rows] = function(x[rows], *args), where each of `args` has an entry for each row.

    `function` works in place, so that large images are not copied.
    """
    if _by_image(x):
        for i, row in enumerate(rows.tolist()):
            function(x[row : row + 1], *(arg[i : i + 1] for arg in args))
    elif len(rows):
        x[rows] = _run(function, x[rows], *args)


def _crop_key(key: Key) -> Key:
    return (*key, 0)  # the streams of `_Draws` start at 1


def normalize(
    x: Float[Tensor, "B C H W"], statistics: Statistics = IMAGENET, out: Tensor | None = None
) -> Float[Tensor, "B C H W"]:
    """Return (x - mean) / std of each channel; grey images take the mean of the three."""
    shift, scale = _of_channels(statistics, x.shape[1], x.device)
    return torch.sub(x, shift, out=out).mul_(scale)


def _of_channels(statistics: Statistics, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / deviation, (C, 1, 1) each."""
    mean, std = statistics
    if channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    shift, scale = (constant(values, device)[:, None, None] for values in (mean, tuple(1 / value for value in std)))
    return shift, scale


class _Draws:
    """Gives out the random numbers of one call, none twice: columns of blocks, each of a separate stream."""

    def __init__(self, key: tuple[int, ...], index: Tensor, device: torch.device):
        self.key, self.index, self.device = key, index.cpu(), device
        self.streams, self.block = 0, torch.empty(len(index), 0)

    def on_host(self, count: int) -> Float[Tensor, "B count"]:
        if count > self.block.shape[1]:
            self.streams += 1
            self.block = uniform((*self.key, self.streams), self.index, max(count, BLOCK))
        draws, self.block = self.block[:, :count], self.block[:, count:]
        return draws

    def between(self, low: float, high: float) -> Float[Tensor, " B"]:
        return self.on_host(1)[:, 0] * (high - low) + low

    def uniform(self, low: float, high: float, count: int = 1) -> Float[Tensor, "count B"]:
        """Draw on the host and send; `count` above BLOCK, a number for each pixel, on the device."""
        if count <= BLOCK:
            return send((self.on_host(count).T * (high - low) + low).contiguous(), self.device)
        self.streams += 1
        self.block = self.block[:, :0]
        draws = uniform((*self.key, self.streams), send(self.index, self.device), count)
        return (draws.T * (high - low) + low).contiguous()

    def rows(self, probability: float) -> Int64[Tensor, " b"]:
        """Draw rows on the host, where their number is known without a wait for the device."""
        return self.on_device((self.on_host(1)[:, 0] < probability).nonzero()[:, 0])

    def on_device(self, values: Tensor) -> Tensor:
        return send(values, self.device)


def _geometry(view: View, x: Tensor, draws: _Draws) -> Tensor:
    height, width = x.shape[2:]
    if view.flip:
        _change(x, draws.rows(view.flip), _mirror)
    if view.pad:
        x = _padded_crop(view, x, draws.uniform(0, 2 * view.pad + 1, 2).long())
    if view.rotate or view.shift or view.zoom or view.shear:
        x = resample(x, _affine(view, height, width, draws))
    return x


def _mirror(x: Tensor) -> Tensor:
    return x.copy_(x.flip(-1))


def _padded_crop(view: View, x: Tensor, offset: Int64[Tensor, "2 B"]) -> Tensor:
    """Pad images and cut windows of their former size at (left, top) = offset."""
    height, width = x.shape[2:]
    padded = F.pad(x, (view.pad,) * 4, mode="reflect" if view.reflect else "constant")
    rows = (offset[1][:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (offset[0][:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    return padded[image, torch.arange(x.shape[1], device=x.device)[:, None, None], rows, columns]


def _affine(view: View, height: int, width: int, draws: _Draws) -> Float[Tensor, "B 3 3"]:
    angle = draws.uniform(-view.rotate, view.rotate)[0] * (math.pi / 180)
    shift = draws.uniform(-2 * view.shift, 2 * view.shift, 2)
    zoom = draws.uniform(1 - view.zoom, 1 + view.zoom, 2)
    shear = draws.uniform(-view.shear, view.shear)[0] * (height / width)
    turned = matrix(shift_x=shift[0], shift_y=shift[1]) @ rotation(angle, height, width)
    return turned @ matrix(shear_x=shear) @ matrix(scale_x=1 / zoom[0], scale_y=1 / zoom[1])


def _color_jitter(view: View, x: Tensor, draws: _Draws) -> None:
    """Apply torchvision's ColorJitter with a probability: four adjustments, in a random order for each image."""
    applied = (draws.on_host(1)[:, 0] < view.jitter).nonzero()[:, 0]
    order = draws.on_host(4).argsort(dim=1)[applied].T  # 4 b
    strengths = (view.brightness, view.contrast, view.saturation)
    factors = [draws.between(max(0.0, 1 - strength), 1 + strength) for strength in strengths]
    factors.append(draws.between(-view.hue, view.hue))
    colour = x.shape[1] == 3
    active = [view.brightness > 0, view.contrast > 0, view.saturation > 0 and colour, view.hue > 0 and colour]
    adjust = (brighten, change_contrast, saturate, turn_hue)
    counts = (order[:, :, None] == torch.arange(4)).sum(1).flatten().tolist()
    number, place = order.sort(dim=1, stable=True)
    rows = applied[place]
    factor = torch.stack(factors)[number, rows]
    parts = zip(*(draws.on_device(values.flatten()).split(counts) for values in (rows, factor)), strict=True)
    for part, (rows_of_part, factor_of_part) in enumerate(parts):
        if active[part % 4]:
            _change(x, rows_of_part, adjust[part % 4], factor_of_part)


def _drop_colour(x: Tensor) -> Tensor:
    return x.copy_(luma(x).expand_as(x))


def _blur(view: View, x: Tensor, draws: _Draws) -> None:
    """Blur by a separable Gaussian, cut off at 3 sigma, edges repeated; each image has a separate sigma."""
    rows = (draws.on_host(1)[:, 0] < view.blur).nonzero()[:, 0]
    low, high = view.blur_sigma
    sigma = (low + draws.on_host(1)[:, 0] * (high - low))[rows]
    reach = (3 * sigma).ceil()
    for radius in reach.unique().int().tolist() if x.device.type == "cpu" else [math.ceil(3 * high)]:
        same = (reach == radius).nonzero()[:, 0] if x.device.type == "cpu" else torch.arange(len(rows))
        if len(same):
            kernel = draws.on_device(_gaussian(sigma[same], radius))
            _change(x, draws.on_device(rows[same]), _convolve, kernel)


def _gaussian(sigma: Float[Tensor, " b"], radius: int) -> Float[Tensor, "b K"]:
    """Return weights at -radius .. radius that sum to 1; zero beyond the next integer after 3 sigma."""
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2) * (offsets.abs() <= (3 * sigma[:, None]).ceil())
    return weights / weights.sum(1, keepdim=True)


def _convolve(x: Float[Tensor, "b C H W"], kernel: Float[Tensor, "b K"]) -> Tensor:
    """Convolve each image with its kernel along both axes. Changes x.

    A multiply and add for each weight: convolutions with a group for each channel of each image are slower.
    """
    (height, width), radius = x.shape[2:], kernel.shape[1] // 2
    weights = kernel.T[:, :, None, None, None]
    padded = F.pad(x, (0, 0, radius, radius), mode="replicate")
    blurred = padded[:, :, :height] * weights[0]
    for i in range(1, len(weights)):
        blurred.addcmul_(padded[:, :, i : i + height], weights[i])
    padded = F.pad(blurred, (radius, radius, 0, 0), mode="replicate")
    torch.mul(padded[..., :width], weights[0], out=x)
    for i in range(1, len(weights)):
        x.addcmul_(padded[..., i : i + width], weights[i])
    return x


def _noise(view: View, x: Tensor, draws: _Draws) -> Tensor:
    """Add Gaussian noise by Box-Muller; all channels of a pixel share it, so grey stays grey."""
    pixels = x.shape[2] * x.shape[3]
    radius = (-2 * torch.log1p(-draws.uniform(0, 1, pixels))).sqrt()
    normal = radius * torch.cos(2 * math.pi * draws.uniform(0, 1, pixels))
    strength = draws.uniform(0, view.noise)[0]
    return torch.addcmul(x, column(strength), normal.T.reshape(-1, 1, *x.shape[2:]))


def _cutout(view: View, x: Tensor, draws: _Draws) -> None:
    """Set a square of random side and centre, clipped at the border, to the mean: DeVries and Taylor's cutout."""
    height, width = x.shape[2:]
    longest = max(1, round(view.cutout * min(height, width)))
    half = (draws.uniform(1, longest + 1)[0].floor() / 2).floor()
    top, left = draws.uniform(0, height)[0].floor(), draws.uniform(0, width)[0].floor()

    def inside(centre: Tensor, size: int) -> Bool[Tensor, "B S"]:
        position = torch.arange(size, device=x.device)
        return (position >= (centre - half)[:, None]) & (position < (centre + half)[:, None])

    erased = inside(top, height)[:, None, :, None] & inside(left, width)[:, None, None, :]
    x.masked_fill_(erased, 0.0)


def _operations(view: View, x: Tensor, draws: _Draws) -> Tensor:
    for _ in range(view.operations):
        x = _random_operation(x, draws, view.reach)
    return _erase(view, x, draws) if view.erase else x


def _erase(view: View, x: Tensor, draws: _Draws) -> Tensor:
    """Paint a clipped square of side U(0, erase) of the width about a uniform point GREY: FixMatch's cutout."""
    height, width = x.shape[2:]
    side = (draws.uniform(0, view.erase)[0] * width)[:, None]
    middle = draws.uniform(0, 1, 2)[:, :, None]

    def inside(middle: Tensor, size: int) -> Bool[Tensor, "B S"]:
        first = (middle * size - side / 2).clamp(min=0).floor()
        position = torch.arange(size, device=x.device)
        return (position >= first) & (position <= (first + side).clamp(max=size))

    painted = inside(middle[1], height)[:, None, :, None] & inside(middle[0], width)[:, None, None, :]
    paint = constant(GREY, x.device)[:, None, None]
    return torch.where(painted, paint if x.shape[1] == 3 else paint.mean(0, keepdim=True), x)


def _random_operation(x: Tensor, draws: _Draws, reach: float) -> Tensor:
    """Apply one of OPERATIONS to each image, drawn uniformly, with a uniform magnitude and a sign."""
    chosen = (draws.on_host(1)[:, 0] * len(OPERATIONS)).long()
    magnitude = draws.between(0, 1)
    sign = torch.where(draws.on_host(1)[:, 0] < 0.5, 1.0, -1.0)
    rows = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=len(OPERATIONS)).tolist()
    of_rows = (draws.on_device(values).split(counts) for values in (rows, magnitude[rows], sign[rows]))
    for operation, here, magnitude_here, sign_here in zip(OPERATIONS, *of_rows, strict=True):
        if len(here) and operation is not identity:
            x[here] = _run(operation, x[here], magnitude_here, sign_here, reach)
    return x
