"""The E-step against loops, by hand and under relabelling."""

import pytest
import torch
import torch.nn.functional as F

from spice_dist.losses import double_softmax_cross_entropy
from spice_dist.pseudo_labels import cluster_centers, prototype_labels, selection_loss


def random_case(heads: int = 3, images: int = 24, clusters: int = 4, dim: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(images, dim, generator=generator), dim=1)
    return features, torch.randn(heads, images, clusters, generator=generator).softmax(2)


def test_centers_are_the_loop_of_their_docstring():
    features, probs = random_case()
    centers = cluster_centers(features, probs, 3)
    for h in range(3):
        for k in range(4):
            best = sorted(range(24), key=lambda i: -float(probs[h, i, k]))[:3]
            torch.testing.assert_close(centers[h, k], features[best].mean(0))


def test_prototype_labels_are_the_nearest_images_of_each_center():
    features, probs = random_case()
    members, labels = prototype_labels(features, probs, 0.5)
    centers = cluster_centers(features, probs, 3)
    assert members.shape == labels.shape == (3, 24)
    for h in range(3):
        for k in range(4):
            cosine = F.cosine_similarity(features, centers[h, k][None], dim=1)
            nearest = set(sorted(range(24), key=lambda i: -float(cosine[i]))[:6])
            assert set(members[h][labels[h] == k].tolist()) == nearest


def test_every_cluster_gets_the_same_number_whatever_the_head_says():
    features, _ = random_case(heads=1)
    collapsed = torch.zeros(1, 24, 4)
    collapsed[..., 0] = 1.0
    _, labels = prototype_labels(features, collapsed, 0.5)
    assert torch.bincount(labels[0]).tolist() == [6, 6, 6, 6]


def test_labels_follow_a_permutation_of_the_clusters():
    features, probs = random_case(heads=1)
    order = torch.tensor([2, 0, 3, 1])
    members, labels = prototype_labels(features, probs, 0.5)
    moved_members, moved_labels = prototype_labels(features, probs[:, :, order], 0.5)
    for k in range(4):
        before = set(members[0][labels[0] == order[k]].tolist())
        assert set(moved_members[0][moved_labels[0] == k].tolist()) == before


def test_fewer_than_two_images_per_cluster_still_give_finite_centers():
    features, probs = random_case(images=5)
    assert cluster_centers(features, probs, 1).isfinite().all()
    members, _ = prototype_labels(features, probs, 0.5)
    assert members.shape == (3, 4)


def test_more_clusters_than_images_are_refused():
    features, probs = random_case(images=3)
    with pytest.raises(ValueError, match="3 images cannot give 4 clusters"):
        prototype_labels(features, probs, 0.5)


def test_selection_loss_is_the_loss_of_the_heads_own_labels():
    features, _ = random_case()
    logits = torch.randn(3, 24, 4, generator=torch.Generator().manual_seed(5))
    members, labels = prototype_labels(features, logits.softmax(2), 0.5)
    for h in range(3):
        own = double_softmax_cross_entropy(logits[h : h + 1, members[h]], labels[h : h + 1])
        torch.testing.assert_close(selection_loss(features, logits, 0.5)[h], own[0])


def test_selection_prefers_the_head_that_agrees_with_the_features():
    centers = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    truth = torch.arange(80) % 4
    noise = 0.1 * torch.randn(80, 16, generator=torch.Generator().manual_seed(3))
    features = F.normalize(centers[truth] + noise, dim=1)
    good = 12.0 * F.one_hot(truth, 4).float()
    merged = 12.0 * F.one_hot(truth.clamp(max=2), 4).float()  # two clusters share one output, one is empty
    loss = selection_loss(features, torch.stack([merged, good]), 0.5)
    assert loss[1] < loss[0]
