"""Every operation against Pillow, torchvision or SciPy on photographs and digits; every range against its closed form.

Tolerances are on values in [0, 1]. LEVEL is one 8-bit step: Pillow rounds or truncates to it, and we do not.
"""

import itertools
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from scipy import ndimage, stats
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from spice_dist.data import augment, operations
from spice_dist.data.augment import apply
from spice_dist.data.counter_rng import uniform
from spice_dist.data.crops import Crop, boxes
from spice_dist.data.operations import OPERATIONS, turn_hue
from spice_dist.data.views import FIXMATCH_STRONG, IMAGENET_MEAN, IMAGENET_STD, PLAIN, View

LEVEL = 1 / 255
KEY = (11, 3, 1)
MOCO = View(
    crop_scale=(0.2, 1.0),
    flip=0.5,
    jitter=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grey=0.2,
    blur=0.5,
)
WEAK = View(pad=4, flip=0.5)
SCAN = View(flip=0.5, operations=4, cutout=0.5)
AFFINE = View(rotate=14, shift=0.14, zoom=0.175, shear=0.21, jitter=1.0, brightness=0.4, contrast=0.4, noise=0.1)
VIEWS = {"plain": PLAIN, "moco": MOCO, "weak": WEAK, "scan": SCAN, "affine": AFFINE}
BILINEAR, NEAREST = InterpolationMode.BILINEAR, InterpolationMode.NEAREST


@cache
def photos(height: int, width: int, count: int = 8) -> Tensor:
    """Patches of two photographs at half size, (B, 3, H, W) uint8."""
    patches = []
    for name in ("china.jpg", "flower.jpg"):
        photo = load_sample_image(name)[::2, ::2]
        for number in range(count // 2):
            top, left = 19 * number % (213 - height), 83 * number % (320 - width)
            patches.append(photo[top : top + height, left : left + width])
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous()


@cache
def digits(count: int = 8) -> Tensor:
    return torch.from_numpy(load_digits(return_X_y=True)[0][:count] * 15.9375).to(torch.uint8).view(-1, 1, 8, 8)


def many(images: Tensor, count: int) -> Tensor:
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


def pixels(view: View, images: Tensor, key: tuple[int, ...] = KEY) -> Tensor:
    """The view of images 0, 1, ... before it is normalised."""
    x = apply(view, images, torch.arange(len(images)), key)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    if images.shape[1] == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    return x * std[:, None, None] + mean[:, None, None]


def drawn(first: int, batch: int, low: float = 0.0, high: float = 1.0, count: int = 1, block: int = 1) -> Tensor:
    """The view's random numbers from the `first` on, (count, B)."""
    return uniform((*KEY, block), torch.arange(batch), first + count).T[first:] * (high - low) + low


def close(x: Tensor, y: Tensor, tolerance: float) -> None:
    assert x.shape == y.shape
    assert (x - y).abs().max() <= tolerance, f"{(x - y).abs().max():.2g} > {tolerance:.2g}"


def pil(x: Tensor) -> Image.Image:
    array = x.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def tensor(image: Image.Image) -> Tensor:
    array = np.asarray(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1).copy()).permute(2, 0, 1).float() / 255


# views


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("kind", ["photos", "digits"])
def test_a_view_of_an_image_is_the_same_alone_in_another_batch_in_another_order_and_again(name: str, kind: str):
    images = photos(48, 64) if kind == "photos" else digits()
    index = torch.tensor([4, 900, 17, 3, 60_000, 0, 5, 6])
    together = apply(VIEWS[name], images, index, KEY)
    assert torch.equal(apply(VIEWS[name], images, index, KEY), together)
    order = torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])
    close(apply(VIEWS[name], images[order], index[order], KEY), together[order], 2e-5)
    for i in range(8):
        close(apply(VIEWS[name], images[i : i + 1], index[i : i + 1], KEY), together[i : i + 1], 2e-5)
    assert together.isfinite().all()
    assert together.shape == images.shape
    assert together.dtype == torch.float32


@pytest.mark.parametrize("name", ["moco", "weak", "scan", "affine"])
def test_views_differ_between_seeds_epochs_streams_and_indices(name: str):
    images = photos(32, 32)
    keys = [(11, 3, 1), (12, 3, 1), (11, 4, 1), (11, 3, 2)]
    views = [apply(VIEWS[name], images, torch.arange(8), key) for key in keys]
    views.append(apply(VIEWS[name], images, torch.arange(8, 16), KEY))
    for one, other in itertools.combinations(views, 2):
        assert ((one - other).abs().amax((1, 2, 3)) > 0.05).float().mean() > 0.7


@pytest.mark.parametrize("key", [(), KEY])
def test_plain_is_the_normalised_image(key: tuple[int, ...]):
    index = torch.arange(8)
    expected = tv.normalize(photos(48, 64).float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    close(apply(PLAIN, photos(48, 64), index, key), expected, 1e-6)
    mean, std = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3
    close(apply(PLAIN, digits(), index, key), (digits() / 255 - mean) / std, 1e-6)
    cifar = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = tv.normalize(photos(48, 64).float() / 255, list(cifar[0]), list(cifar[1]))
    close(apply(PLAIN, photos(48, 64), index, key, cifar), expected, 1e-6)


@pytest.mark.parametrize("name", ["moco", "scan", "affine"])
def test_images_without_colour_stay_so(name: str):
    grey = photos(32, 32)[:, :1].expand(-1, 3, -1, -1).contiguous()
    channels = pixels(VIEWS[name], grey)
    edges = (channels - channels.mean(1, keepdim=True)).abs()
    if name == "scan":  # the hole has the colour of ImageNet's mean
        edges = edges[(apply(SCAN, grey, torch.arange(8), KEY) != 0).all(1, keepdim=True).expand_as(edges)]
    assert edges.max() < 1e-5


def test_views_made_under_autocast_are_as_precise_as_outside_it():
    images, index = photos(48, 64), torch.arange(8)
    for view in VIEWS.values():
        with torch.autocast("cpu", torch.bfloat16):
            inside = apply(view, images, index, KEY)
        assert torch.equal(inside, apply(view, images, index, KEY))


def test_a_view_leaves_its_input_as_it_is():
    images = photos(32, 32).clone()
    for view in VIEWS.values():
        apply(view, images, torch.arange(8), KEY)
    assert torch.equal(images, photos(32, 32))


def test_threads_work_on_a_chunk_each_and_change_nothing():
    images, index, before = many(photos(64, 64), 300), torch.arange(300), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = apply(MOCO, images, index, KEY)
        torch.set_num_threads(2)
        with torch.inference_mode():
            together = apply(MOCO, images, index, KEY)
        assert together.is_inference()
        close(together, alone, 2e-5)
        assert torch.get_num_threads() == 2
        assert augment._threads(2).submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)


# crop, flip, affine


def drawn_boxes(scale: tuple[float, float], height: int, width: int, batch: int) -> Tensor:
    """(B, 4) top, left, height, width in pixels of the crops that a view draws."""
    sides = np.full(batch, height), np.full(batch, width)
    box = boxes(Crop(scale, 0), augment._crop_key(KEY), np.arange(batch), *sides)
    return torch.from_numpy(box[:, [1, 0, 3, 2]])


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 0.4)])
@pytest.mark.parametrize("size", [(32, 32), (96, 96), (48, 60)])
def test_crops_are_distributed_as_torchvisions(scale: tuple[float, float], size: tuple[int, int]):
    height, width = size
    ours = drawn_boxes(scale, height, width, 20_000).double()
    top, left, crop_height, crop_width = ours.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + crop_height <= height).all()
    assert (left + crop_width <= width).all()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)])
    for statistic in (
        lambda b: b[:, 2] * b[:, 3],  # area
        lambda b: b[:, 3] / b[:, 2],  # aspect ratio
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        test: Any = stats.ks_2samp(statistic(ours), statistic(theirs.double()))
        assert test.pvalue > 1e-3


def test_positions_of_crops_are_uniform_over_all_that_fit():
    top, left, crop_height, crop_width = drawn_boxes((0.2, 1.0), 32, 32, 50_000).T
    for start, side in ((top, crop_height), (left, crop_width)):
        for size in (16, 20, 27):
            counts = np.bincount(start[side == size], minlength=32 - size + 1)
            assert len(counts) == 32 - size + 1
            assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (96, 96)])
@pytest.mark.parametrize("side", [0, 18, 52, 76])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.1)])
def test_a_resized_crop_equals_torchvisions_and_pillows(size: tuple[int, int], side: int, scale: tuple[float, float]):
    images = many(photos(*size), 16)
    found = pixels(View(crop_scale=scale, size=side), images)
    side = side or size[0]
    rounding = 1.01 * LEVEL if side >= augment.LARGE else 0.0  # both passes round to bytes, as Pillow does
    for image, box, view in zip(images, drawn_boxes(scale, *size, 16).tolist(), found, strict=True):
        top, left, height, width = box
        x = image.float() / 255
        theirs = tv.resized_crop(x, top, left, height, width, [side, side], BILINEAR, antialias=True)
        close(view, theirs, rounding + 2e-5)
        part = pil(image).crop((left, top, left + width, top + height))
        close(view, tensor(part.resize((side, side), Image.Resampling.BILINEAR)), 1.6 * LEVEL)


def test_a_crop_does_not_darken_the_border():
    white = torch.full((64, 1, 32, 32), 255, dtype=torch.uint8)
    close(pixels(View(crop_scale=(0.2, 1.0), flip=0.5), white), torch.ones(64, 1, 32, 32), 1e-5)


@pytest.mark.parametrize("probability", [0.5, 0.1])
def test_a_flip_is_exact_and_has_its_probability(probability: float):
    images = many(photos(8, 12), 4000)
    index = torch.arange(4000)
    plain, found = apply(PLAIN, images, index, KEY), apply(View(flip=probability), images, index, KEY)
    flipped = (found == plain.flip(-1)).flatten(1).all(1)
    assert ((found == plain).flatten(1).all(1) ^ flipped).all()
    assert abs(flipped.float().mean() - probability) < 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_a_forked_child_makes_views_too():
    """It has none of the threads that its parent keeps for them."""
    images, index = photos(48, 64), torch.arange(8)
    expected = apply(MOCO, images, index, KEY)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(apply(MOCO, images, index, KEY), expected) else 1)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 0


def test_a_flip_comes_after_the_crop():
    images = photos(32, 32)
    both, crop = pixels(View(crop_scale=(0.2, 1.0), flip=1.0), images), pixels(View(crop_scale=(0.2, 1.0)), images)
    close(both, crop.flip(-1), 1e-6)


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (224, 224)])
def test_a_padded_crop_equals_shifting_the_array(size: tuple[int, int]):
    images = many(photos(*[min(s, 200) for s in size]), 20)
    height, width = images.shape[2:]
    offset = drawn(0, 20, 0, 9, count=2).floor().long()
    found = pixels(View(pad=4), images)
    padded = torch.nn.functional.pad(images.float() / 255, (4,) * 4)
    for i, (x, y) in enumerate(offset.T.tolist()):
        close(found[i], padded[i, :, y : y + height, x : x + width], 1e-4)


def test_a_padded_crop_shifts_by_every_offset_equally_often_and_independently_in_x_and_y():
    row, column = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    image = torch.stack([column, row, row]).to(torch.uint8)[None]  # a pixel holds its own position
    found = (pixels(View(pad=4), many(image, 20_000))[:, :2, 8, 8] * 255 - 8).round().long()
    assert found.abs().max() == 4
    counts = np.bincount((found[:, 0] + 4) * 9 + found[:, 1] + 4, minlength=81)
    assert stats.chisquare(counts).pvalue > 1e-3


def in_pixels(image: Tensor, matrix: np.ndarray, shift: tuple[float, float]) -> Tensor:
    """SciPy's bilinear sampling at centre + shift + matrix (output - centre), all in (x, y) pixels; black outside."""
    rows_first = matrix[::-1, ::-1]
    centre = (np.array(image.shape[1:]) - 1) / 2
    offset = centre + np.array(shift)[::-1] - rows_first @ centre
    affine = np.block([[rows_first, offset[:, None]], [np.zeros((1, 2)), np.ones((1, 1))]])
    channels = [ndimage.affine_transform(c, affine, order=1, mode="grid-constant") for c in image.numpy() / 255]
    return torch.from_numpy(np.stack(channels)).float()


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
def test_the_affine_map_shears_zooms_rotates_and_shifts_in_pixels_about_the_centre(size: tuple[int, int]):
    height, width = size
    images = many(photos(*size), 24)
    view = View(rotate=14, shift=0.14, zoom=0.175, shear=0.21)
    angle = drawn(0, 24, -math.radians(14), math.radians(14))[0].numpy()
    shift_x, shift_y = drawn(1, 24, -0.14, 0.14, count=2).numpy()
    zoom_x, zoom_y = drawn(3, 24, 0.825, 1.175, count=2).numpy()
    shear = drawn(5, 24, -0.21, 0.21)[0].numpy()
    for i, found in enumerate(pixels(view, images)):
        turn = np.array([[np.cos(angle[i]), -np.sin(angle[i])], [np.sin(angle[i]), np.cos(angle[i])]])
        matrix = turn @ np.array([[1, shear[i]], [0, 1]]) @ np.diag([1 / zoom_x[i], 1 / zoom_y[i]])
        close(found, in_pixels(images[i], matrix, (shift_x[i] * width, shift_y[i] * height)), 1e-4)


def test_each_part_of_the_affine_map_equals_torchvisions():
    images = photos(48, 64)
    x = images.float() / 255
    angle = drawn(0, 8, -30, 30)[0].tolist()
    for i, found in enumerate(pixels(View(rotate=30), images)):
        close(found, tv.rotate(x[i], angle[i], BILINEAR), 1e-4)
    shear = drawn(5, 8, -0.3, 0.3)[0].tolist()
    for i, found in enumerate(pixels(View(shear=0.3), images)):
        degrees = math.degrees(math.atan(shear[i]))
        close(found, tv.affine(x[i], 0.0, [0, 0], 1.0, [degrees, 0.0], BILINEAR), 1e-4)


def test_a_quarter_turn_is_anticlockwise_about_the_centre():
    x = photos(32, 32).float() / 255
    turn = operations.rotation(torch.full((8,), math.pi / 2), 32, 32)
    close(operations.resample(x, turn), x.rot90(1, (2, 3)), 1e-4)


def test_a_half_turn_of_an_oblong_image_reverses_both_axes():
    x = photos(48, 64).float() / 255
    turn = operations.rotation(torch.full((8,), math.pi), 48, 64)
    close(operations.resample(x, turn), x.flip(2, 3), 1e-4)


# the 14 operations

MAGNITUDES = [0.0, 0.13, 0.5, 0.77, 1 - 2**-20]


def operated(name: str, images: Tensor, magnitude: float, sign: float = 1.0) -> Tensor:
    batch = len(images)
    operation = getattr(operations, name)
    return operation(images.float() / 255, torch.full((batch,), magnitude), torch.full((batch,), sign), 0.1)


@pytest.mark.parametrize("kind", ["photos", "small photos", "colourless", "flat", "digits"])
@pytest.mark.parametrize(
    ("name", "by_pillow", "tolerance"),
    [
        ("identity", lambda image, v: image, 0.0),
        ("autocontrast", lambda image, v: ImageOps.autocontrast(image), 1.01 * LEVEL),
        ("equalize", lambda image, v: ImageOps.equalize(image), 1e-6),
        ("solarize", lambda image, v: ImageOps.solarize(image, 256 * v), 1e-6),
        ("posterize", lambda image, v: ImageOps.posterize(image, int(4 + 4 * v)), 1e-6),
        ("color", lambda image, v: ImageEnhance.Color(image).enhance(0.05 + 0.9 * v), 1.6 * LEVEL),
        ("contrast", lambda image, v: ImageEnhance.Contrast(image).enhance(0.05 + 0.9 * v), 2.1 * LEVEL),
        ("brightness", lambda image, v: ImageEnhance.Brightness(image).enhance(0.05 + 0.9 * v), 1.01 * LEVEL),
        ("sharpness", lambda image, v: ImageEnhance.Sharpness(image).enhance(0.05 + 0.9 * v), 1.6 * LEVEL),
    ],
)
def test_a_photometric_operation_equals_pillows(name: str, by_pillow, tolerance: float, kind: str):
    images = {
        "photos": photos(48, 64),
        "small photos": photos(20, 20),  # so few pixels that the equalised histogram overflows
        "colourless": photos(32, 32)[:, :1],
        "flat": photos(32, 32)[:, :, :1, :1].expand(-1, -1, 32, 32).contiguous(),
        "digits": digits(),
    }[kind]
    for v in MAGNITUDES:
        expected = torch.stack([tensor(by_pillow(pil(image), v)) for image in images])
        close(operated(name, images, v), expected, tolerance)


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("name", "pillow_matrix", "reach"),
    [
        ("shear_x", lambda v, w, h: (1, v, 0, 0, 1, 0), 0.1),
        ("shear_y", lambda v, w, h: (1, 0, 0, v, 1, 0), 0.1),
        ("translate_x", lambda v, w, h: (1, 0, v * w, 0, 1, 0), 0.1),
        ("translate_y", lambda v, w, h: (1, 0, 0, 0, 1, v * h), 0.1),
    ],
)
def test_a_geometric_operation_equals_pillows_inside_the_image(
    name: str, pillow_matrix, reach: float, sign: float, size: tuple[int, int]
):
    height, width = size
    for v in MAGNITUDES:
        found = operated(name, photos(*size), v, sign)
        matrix = pillow_matrix(sign * v * reach, width, height)
        for image, ours in zip(photos(*size), found, strict=True):
            sampled = pil(image).transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
            x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
            x, y = (matrix[0] * x + matrix[1] * y + matrix[2], matrix[3] * x + matrix[4] * y + matrix[5])
            inside = torch.from_numpy((x > 0.51) & (x < width - 0.51) & (y > 0.51) & (y < height - 0.51))
            outside = torch.from_numpy((x < -0.5) | (x > width + 0.5) | (y < -0.5) | (y > height + 0.5))
            assert inside.float().mean() > 0.75
            assert ((ours - tensor(sampled)) * inside).abs().max() < 1.01 * LEVEL  # between them it fades to black
            assert (ours * outside).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_geometric_operation_equals_torchvisions(size: tuple[int, int], sign: float):
    height, width = size
    x = photos(*size).float() / 255
    for v in MAGNITUDES:
        close(operated("rotate", photos(*size), v, sign), tv.rotate(x, sign * 30 * v, NEAREST), 1e-4)
        slope = math.degrees(math.atan(sign * 0.1 * v))
        for name, shear in (("shear_x", [slope, 0.0]), ("shear_y", [0.0, slope])):
            expected = tv.affine(x, 0.0, [0, 0], 1.0, shear, NEAREST, center=[0, 0])
            close(operated(name, photos(*size), v, sign), expected, 1e-4)


def test_sharpness_leaves_images_without_an_interior_as_they_are():
    x = photos(2, 32)
    close(operated("sharpness", x, 0.5), x.float() / 255, 1e-6)


def test_an_operation_is_drawn_uniformly_with_its_own_magnitude_and_sign():
    batch = 6000
    images = many(photos(8, 12), batch)
    choice = (drawn(0, batch)[0] * 14).long()
    assert stats.chisquare(np.bincount(choice, minlength=14)).pvalue > 1e-3
    magnitude, sign = drawn(1, batch)[0], torch.where(drawn(2, batch)[0] < 0.5, 1.0, -1.0)
    assert abs((sign > 0).float().mean() - 0.5) < 4 * 0.5 / batch**0.5
    assert abs(np.corrcoef(choice, magnitude)[0, 1]) < 4 / batch**0.5
    assert abs(np.corrcoef(sign, magnitude)[0, 1]) < 4 / batch**0.5
    found = pixels(View(operations=1), images)
    for number, operation in enumerate(OPERATIONS):
        rows = choice == number
        close(found[rows], operation(images[rows].float() / 255, magnitude[rows], sign[rows], 0.1), 1e-5)


def test_several_operations_are_applied_one_after_the_other_and_may_repeat():
    batch = 2000
    images = many(photos(8, 12), batch)
    x = images * (1 / 255)
    choices = []
    for turn in range(4):
        choice = (drawn(3 * turn, batch)[0] * 14).long()
        magnitude, sign = drawn(1 + 3 * turn, batch)[0], torch.where(drawn(2 + 3 * turn, batch)[0] < 0.5, 1.0, -1.0)
        choices.append(choice)
        for number, operation in enumerate(OPERATIONS):
            rows = choice == number
            x[rows] = operation(x[rows], magnitude[rows], sign[rows], 0.1)
    found = pixels(View(operations=4), images)
    same = (found - x).abs().amax((1, 2, 3)) < 1e-4
    assert same.float().mean() > 0.999  # rounding may tip a value over the threshold of a solarization
    repeats = (torch.stack(choices).sort(0).values.diff(dim=0) == 0).any(0).float().mean()
    assert abs(repeats - (1 - 13 * 12 * 11 / 14**3)) < 0.05


# colour


def jitter_of(kind: str, strength: float, probability: float = 1.0) -> View:
    return replace(View(jitter=probability), **{kind: strength})


ADJUSTMENTS = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}
JITTER_TOLERANCE = 5e-4  # torchvision's weight of red in grey is 0.2989, Pillow's and ours 0.299


def factors(batch: int, strengths: dict[str, float]) -> dict[str, list[float]]:
    low = {kind: -s if kind == "hue" else max(0.0, 1 - s) for kind, s in strengths.items()}
    high = {kind: s if kind == "hue" else 1 + s for kind, s in strengths.items()}
    return {kind: drawn(5 + i, batch, low[kind], high[kind])[0].tolist() for i, kind in enumerate(strengths)}


@pytest.mark.parametrize("strength", [0.4, 0.9, 1.5])
@pytest.mark.parametrize("kind", ADJUSTMENTS)
def test_a_single_adjustment_equals_torchvisions(kind: str, strength: float):
    if kind == "hue":
        strength /= 3
    images = many(photos(48, 64), 32)
    found = pixels(jitter_of(kind, strength), images)
    used = factors(32, {k: strength if k == kind else 0.0 for k in ADJUSTMENTS})[kind]
    for image, factor, ours in zip(images, used, found, strict=True):
        close(ours, ADJUSTMENTS[kind](image.float() / 255, factor), JITTER_TOLERANCE)


def test_all_four_adjustments_equal_torchvisions_in_one_of_the_24_orders_each_equally_often():
    batch = 720
    images = many(photos(12, 16), batch)
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    found = pixels(replace(View(jitter=1.0), **strengths), images)
    used = factors(batch, strengths)
    order = drawn(1, batch, count=4).argsort(0).T.tolist()
    kinds = list(ADJUSTMENTS)
    for image, places, row in zip(images, order, range(batch), strict=True):
        x = image.float() / 255
        for place in places:
            x = ADJUSTMENTS[kinds[place]](x, used[kinds[place]][row])
        close(found[row], x, 3 * JITTER_TOLERANCE)
    counts = Counter(map(tuple, order))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_a_jitter_of_a_colourless_image_is_torchvisions_without_colour():
    images = photos(32, 32)[:, :1].contiguous()
    found = pixels(View(jitter=1.0, saturation=0.4, hue=0.1), images)
    close(found, images.float() / 255, 1e-6)
    used = factors(8, {"brightness": 0.0, "contrast": 0.4})["contrast"]
    for image, factor, ours in zip(images, used, pixels(jitter_of("contrast", 0.4), images), strict=True):
        close(ours, tv.adjust_contrast(image.float() / 255, factor), 1e-5)


@pytest.mark.parametrize("probability", [0.8, 0.2])
def test_jitter_and_grey_have_their_probability(probability: float):
    images = many(photos(8, 12), 3000)
    for view in (jitter_of("brightness", 0.4, probability), View(grey=probability)):
        changed = (pixels(view, images) - images.float() / 255).abs().amax((1, 2, 3)) > 1e-5
        assert abs(changed.float().mean() - probability) < 4 * (probability * (1 - probability) / 3000) ** 0.5


def test_grey_equals_pillows():
    expected = torch.stack([tensor(pil(image).convert("L").convert("RGB")) for image in photos(48, 64)])
    close(pixels(View(grey=1.0), photos(48, 64)), expected, 0.51 * LEVEL)


# blur, noise, cutout


@pytest.mark.parametrize("sigmas", [(0.1, 2.0), (1.0, 1.5)])
def test_a_blur_equals_torchvisions_with_edges_repeated(sigmas: tuple[float, float]):
    images = many(photos(48, 64), 24)
    found = pixels(View(blur=1.0, blur_sigma=sigmas), images)
    for image, sigma, ours in zip(images, drawn(1, 24, *sigmas)[0].tolist(), found, strict=True):
        radius = math.ceil(3 * sigma)
        padded = tv.pad(image.float() / 255, [radius], padding_mode="edge")
        blurred = tv.gaussian_blur(padded, [2 * radius + 1] * 2, [sigma] * 2)
        close(ours, blurred[:, radius:-radius, radius:-radius], 1e-5)


def test_a_blur_is_close_to_pillows():
    """Pillow approximates the Gaussian by three boxes; what MoCo uses."""
    images = many(photos(48, 64), 16)
    for image, sigma, ours in zip(
        images, drawn(1, 16, 0.1, 2)[0].tolist(), pixels(View(blur=1.0), images), strict=True
    ):
        assert (ours - tensor(pil(image).filter(ImageFilter.GaussianBlur(sigma)))).abs().mean() < 1.5 * LEVEL


def test_a_blur_has_its_probability_and_leaves_the_other_images_alone():
    images = many(photos(8, 12), 3000)
    blurred = drawn(0, 3000)[0] < 0.5
    found = pixels(View(blur=0.5, blur_sigma=(1.0, 2.0)), images)
    assert abs(blurred.float().mean() - 0.5) < 4 * 0.5 / 3000**0.5
    unchanged = (found - images.float() / 255).abs().amax((1, 2, 3)) < 1e-6
    assert torch.equal(unchanged, ~blurred)


def test_noise_is_normal_with_the_drawn_deviation_and_the_same_in_all_channels():
    images = photos(48, 64)
    noise = pixels(View(noise=0.2), images) - images.float() / 255
    close(noise[:, 0], noise[:, 1], 1e-6)
    close(noise[:, 0], noise[:, 2], 1e-6)
    deviation, n = drawn(0, 8, 0, 0.2, block=3)[0], 48 * 64
    for one, expected in zip(noise[:, 0], deviation.tolist(), strict=True):
        assert abs(one.std() / expected - 1) < 4 / (2 * n) ** 0.5
        assert abs(one.mean() / expected) < 4 / n**0.5
        assert stats.kstest(one.flatten() / expected, "norm").pvalue > 1e-3
    standard = (noise[:, 0] / deviation[:, None, None]).flatten(1)
    assert np.abs(np.corrcoef(standard) - np.eye(8)).max() < 4 / n**0.5
    assert abs(np.corrcoef(standard[:, 1:].flatten(), standard[:, :-1].flatten())[0, 1]) < 4 / (8 * n) ** 0.5


@pytest.mark.parametrize(("size", "longest"), [((32, 32), 16), ((96, 96), 32), ((224, 224), 32), ((224, 224), 61)])
def test_cutout_erases_a_square_of_the_published_size_and_place(size: tuple[int, int], longest: int):
    batch = 200 if size[0] > 100 else 2000
    images = torch.zeros(batch, 1, *size, dtype=torch.uint8)  # black is not the mean, so zeros are the hole
    hole = apply(View(cutout=longest / size[0]), images, torch.arange(batch), KEY)[:, 0] == 0
    half = (drawn(0, batch, 1, longest + 1)[0].floor() / 2).long().tolist()
    top, left = (drawn(1, batch, 0, size[0])[0].long().tolist(), drawn(2, batch, 0, size[1])[0].long().tolist())
    for found, h, y, x in zip(hole, half, top, left, strict=True):
        expected = torch.zeros(size, dtype=torch.bool)
        expected[max(0, y - h) : y + h, max(0, x - h) : x + h] = True
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("side", "longest", "mean", "most"), [(32, 16, 0.067, 0.25), (96, 32, 0.033, 0.111)])
def test_cutout_erases_the_measured_share(side: int, longest: int, mean: float, most: float):
    images = torch.zeros(4000, 1, side, side, dtype=torch.uint8)
    share = (apply(View(cutout=longest / side), images, torch.arange(4000), KEY) == 0).float().mean((1, 2, 3))
    assert abs(share.mean() - mean) < 0.003
    assert abs(share.max() - most) < 0.01
    assert abs((share == 0).float().mean() - 1 / longest) < 0.015  # a side of 1 has half-size 0


def test_cutout_clips_its_square_in_an_oblong_image_and_keeps_the_rest():
    images = many(photos(48, 64), 64)
    plain = apply(PLAIN, images, torch.arange(64), KEY)
    found = apply(View(cutout=0.5), images, torch.arange(64), KEY)
    hole = (found == 0).all(1, keepdim=True).expand_as(found)
    assert torch.equal(torch.where(hole, plain, found), plain)
    assert (hole[:, 0, 47].any(1) | hole[:, 0, 0].any(1)).any()
    assert hole[:, 0, :, 50:].any()


# FixMatch


def test_erase_paints_the_square_that_fixmatchs_pillow_cutout_paints():
    images = many(photos(32, 32), 200)
    side, (x, y) = drawn(0, 200, 0, 0.5)[0] * 32, drawn(1, 200, count=2) * 32
    found = pixels(View(erase=0.5), images)
    for i, image in enumerate(images):
        left, top = max(0.0, float(x[i] - side[i] / 2)), max(0.0, float(y[i] - side[i] / 2))
        corner = min(32.0, int(left) + float(side[i])), min(32.0, int(top) + float(side[i]))
        expected = pil(image)
        ImageDraw.Draw(expected).rectangle((int(left), int(top), *corner), (125, 123, 114))
        close(found[i], tensor(expected), 1e-5)


def test_fixmatchs_strong_view_erases_before_it_flips_and_shifts():
    view = replace(FIXMATCH_STRONG, operations=0, flip=1.0)
    images = many(photos(32, 32), 50)
    erased = pixels(View(erase=0.5), images).flip(-1)
    offset = drawn(4, 50, 0, 9, count=2).floor().long()
    padded = torch.nn.functional.pad(erased, (4,) * 4)
    for found, x, y, whole in zip(pixels(view, images), *offset.tolist(), padded, strict=True):
        close(found, whole[:, y : y + 32, x : x + 32], 1e-5)


def test_a_reflecting_crop_equals_numpys_reflection():
    images = many(photos(32, 32), 20)
    offset = drawn(0, 20, 0, 9, count=2).floor().long()
    for image, found, x, y in zip(images, pixels(View(pad=4, reflect=True), images), *offset.tolist(), strict=True):
        padded = np.pad(image.numpy() / 255, ((0, 0), (4, 4), (4, 4)), mode="reflect")
        close(found, torch.from_numpy(padded[:, y : y + 32, x : x + 32]).float(), 1e-5)


def test_reach_scales_shears_and_translations():
    x = photos(32, 32)
    for name in ("shear_x", "shear_y", "translate_x", "translate_y"):
        far = getattr(operations, name)(x / 255, torch.full((8,), 0.25), torch.ones(8), 0.3)
        close(far, operated(name, x, 0.75), 1e-6)


# compiled operations


class OnCUDA(Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = torch.device("cuda")  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]


def turned(images: Tensor, turn: Tensor) -> Tensor:
    return augment._run(turn_hue, images.clone().as_subclass(OnCUDA), turn).as_subclass(Tensor)


@pytest.fixture
def compiled() -> Iterator[None]:
    augment.set_compiled(True)
    augment._compiled.cache_clear()
    yield
    augment.set_compiled(False)
    augment._compiled.cache_clear()


def test_an_operation_is_compiled_where_that_is_asked_for(compiled, monkeypatch):
    seen = []

    def compile(function: Any, dynamic: bool) -> Any:
        seen.append((function, dynamic))
        return lambda x, turn: function(x, turn) * 0.5

    monkeypatch.setattr(torch, "compile", compile)
    images, turn = torch.rand(5, 3, 4, 4), torch.rand(5)
    expected = turn_hue(images.clone(), turn)
    for _ in range(2):
        assert torch.equal(turned(images, turn), expected * 0.5)
    assert seen == [(turn_hue, True)], "compiled once"
    assert torch.equal(augment._run(turn_hue, images.clone(), turn), expected), "a CPU does not compile"


def test_where_nothing_can_be_compiled_one_line_says_so(compiled, monkeypatch, caplog):
    def failing(function: Any, dynamic: bool) -> Any:
        def call(x: Tensor, turn: Tensor) -> Tensor:
            raise RuntimeError("no working C++ compiler\nand many lines more")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    images, turn = torch.rand(5, 3, 4, 4), torch.rand(5)
    for _ in range(2):
        assert torch.equal(turned(images, turn), turn_hue(images.clone(), turn))
    assert [record.message for record in caplog.records] == [
        "views are not compiled, which is slower only: no working C++ compiler"
    ]


@pytest.mark.slow
def test_compiled_operations_give_the_same_up_to_rounding():
    images, turn = torch.rand(5, 3, 8, 8), torch.rand(5)
    for count in (5, 3):
        found = torch.compile(turn_hue, dynamic=True)(images[:count].clone(), turn[:count])
        torch.testing.assert_close(found, turn_hue(images[:count].clone(), turn[:count]), atol=1e-5, rtol=1e-5)
