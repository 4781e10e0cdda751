"""Boxes of crops against torchvision's rule, bounds and independence of the batch."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from spice_dist.data.crops import Crop, boxes, central_squares, cut

KEY = (5, 2, 1)


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 0.4)])
def test_boxes_of_images_of_many_sizes_lie_inside_and_do_not_depend_on_the_batch(scale: tuple[float, float]):
    rng = np.random.default_rng(0)
    index, heights, widths = rng.permutation(2000), rng.integers(1, 500, 2000), rng.integers(1, 500, 2000)
    found = boxes(Crop(scale, 32), KEY, index, heights, widths)
    left, top, width, height = found.T
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] >= 1).all()
    assert (left + width <= widths).all()
    assert (top + height <= heights).all()
    for some in (slice(7, 8), slice(100, 163), slice(None, None, 3)):
        assert np.array_equal(boxes(Crop(scale, 8), KEY, index[some], heights[some], widths[some]), found[some])
    assert not np.array_equal(boxes(Crop(scale, 32), (5, 2, 2), index, heights, widths), found)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (375, 500), (60, 200)])
def test_areas_shapes_and_places_are_distributed_as_torchvisions(height: int, width: int):
    n = 10_000
    ours = boxes(Crop((0.2, 1.0), 32), KEY, np.arange(n), np.full(n, height), np.full(n, width))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    drawn = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    theirs = drawn[:, [1, 0, 3, 2]]
    for column in range(4):
        test: Any = stats.ks_2samp(ours[:, column], theirs[:, column])
        assert test.pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1), (1, 7)])
def test_where_nothing_fits_the_centre_is_taken_as_torchvision_does(height: int, width: int):
    found = boxes(Crop((1.0, 1.0), 32, ratio=(0.9, 1.1)), KEY, np.arange(5), np.full(5, height), np.full(5, width))
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [5.0, 5.0], [0.9, 1.1])  # never fits
    top, left, rows, columns = theirs
    assert (found == [left, top, columns, rows]).all() or (height, width) == (1, 1)


def test_central_squares_are_the_largest_and_in_the_middle():
    found = central_squares(np.array([5, 10, 7]), np.array([9, 4, 7]))
    assert found.tolist() == [[2, 0, 5, 5], [0, 3, 4, 4], [0, 0, 7, 7]]


@pytest.mark.parametrize("side", [8, 20, 33])
def test_cuts_are_those_of_the_triangle_filter_in_float64(side: int):
    """Pixel j of n counts max(0, 1 - |j + 1/2 - m_i| / max(1, s)) in output i, of s = box / side, m_i = (i + 1/2) s."""
    rng = np.random.default_rng(0)
    x = rng.random((6, 3, 20, 24)).astype(np.float32)
    box = boxes(Crop((0.08, 1.0), 0), KEY, np.arange(6), np.full(6, 20), np.full(6, 24))

    def weights(length: int) -> np.ndarray:
        scale = length / side
        middle = (np.arange(side)[:, None] + 0.5) * scale
        weight = np.maximum(0, 1 - np.abs(np.arange(length) + 0.5 - middle) / max(1, scale))
        return weight / weight.sum(1, keepdims=True)

    found = cut(torch.from_numpy(x), box, side, side)
    for image, (left, top, width, height), out in zip(x.astype(np.float64), box, found.numpy(), strict=True):
        inside = image[:, top : top + height, left : left + width]
        assert np.abs(weights(height) @ inside @ weights(width).T - out).max() < 1e-5
