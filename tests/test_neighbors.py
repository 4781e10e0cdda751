"""Blocked nearest neighbours against the whole similarity matrix."""

import pytest
import torch
import torch.nn.functional as F

from spice_dist.neighbors import label_agreement, nearest


@pytest.mark.parametrize("block", [1, 7, 50, 64, 1000])
def test_any_block_size_finds_what_the_whole_matrix_shows(block):
    features = F.normalize(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = (features @ features.T).topk(9, dim=1).indices
    assert torch.equal(nearest(features, 9, block), whole)


def test_an_image_is_its_own_first_neighbour():
    features = F.normalize(torch.randn(20, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    assert torch.equal(nearest(features, 3)[:, 0], torch.arange(20))


def test_more_neighbours_than_images_are_refused():
    with pytest.raises(ValueError, match="between 1 and the 4 rows"):
        nearest(torch.eye(4), 5)


def test_agreement_is_the_share_of_neighbours_with_the_same_label():
    labels = torch.tensor([0, 0, 1, 1])
    neighbors = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 1], [2, 0, 1, 0], [3, 2, 2, 0]])
    assert label_agreement(labels, neighbors).tolist() == [0.5, 1.0, 0.25, 0.75]
