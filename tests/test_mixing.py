"""How much a middle stage counts: the part in which the groups are decides, whatever the labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spice_dist.mixing import choose_weight


def groups(rng: np.random.Generator, labels: np.ndarray, dimensions: int, distance: float) -> torch.Tensor:
    """(N, dimensions), unit normal around centers that are `distance` from zero."""
    centers = rng.standard_normal((labels.max() + 1, dimensions))
    centers *= distance / np.linalg.norm(centers, axis=1, keepdims=True)
    return torch.from_numpy((centers[labels] + rng.standard_normal((len(labels), dimensions))).astype(np.float32))


@pytest.mark.parametrize(("final", "middle", "expected"), [(0.0, 5.0, (0.6,)), (5.0, 0.0, (0.0, 0.3))])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_part_that_holds_the_groups_counts(final, middle, expected, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(600) % 12)
    mixture = choose_weight(F.normalize(groups(rng, labels, 32, final)), groups(rng, labels, 16, middle) + 5)
    assert round(mixture.weight.item(), 3) in expected


def test_the_center_is_the_mean_and_so_a_shift_of_all_images_changes_nothing():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 5
    features, middle = F.normalize(groups(rng, labels, 16, 3)), groups(rng, labels, 8, 3)
    one, other = choose_weight(features, middle), choose_weight(features, middle + 7)
    torch.testing.assert_close(one.center, middle.mean(0))
    torch.testing.assert_close(one(features, middle), other(features, middle + 7), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [3, 10, 40])
@pytest.mark.parametrize("alike", [False, True])
def test_few_images_and_copies_have_a_weight_too(count, alike):
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.standard_normal((1 if alike else count, 8)).astype(np.float32)).expand(count, 8)
    mixture = choose_weight(F.normalize(rows), rows)
    assert mixture(F.normalize(rows), rows).isfinite().all()


def test_features_that_are_no_numbers_are_left_for_the_neighbour_search_to_refuse():
    rows = torch.full((20, 4), float("nan"))
    assert choose_weight(rows, rows).weight == 0
