"""The E-step against loops in float64, by hand, under relabelling, in blocks, with priors and without overlap."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spice_dist import pseudo_labels
from spice_dist.losses import cross_entropy, double_softmax_cross_entropy
from spice_dist.pseudo_labels import Outputs, largest, margins, prototype_labels, quotas, selection_loss


def random_case(heads: int = 3, images: int = 24, clusters: int = 4, dim: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(images, dim, generator=generator), dim=1)
    return features, torch.randn(heads, images, clusters, generator=generator).softmax(2)


def given(table: Tensor) -> Outputs:
    """Outputs (H, N, K) as the functions ask for them."""

    def of(rows: slice | Tensor) -> Tensor:
        if isinstance(rows, slice):
            return table[:, rows]
        return table.gather(1, rows[:, :, None].expand(-1, -1, table.shape[2]))

    return of


def loop(features: Tensor, probs: Tensor, wanted: list[int], fraction: float, overlap: bool = True) -> list[set]:
    """Equations (2) to (4) as written, in float64: for each head the set of (image, label)."""
    found = []
    for head in probs.double():
        pairs, used, labelled = set(), set(), set()
        for k, count in enumerate(wanted):
            ranked = head[:, k].argsort(descending=True).tolist()
            confident = [i for i in ranked if overlap or i not in used][: max(1, math.floor(fraction * count))]
            center = features.double()[confident].mean(0)
            ranked = F.cosine_similarity(features.double(), center[None], dim=1).argsort(descending=True).tolist()
            nearest = [i for i in ranked if overlap or i not in labelled][:count]
            used |= set(confident)
            labelled |= set(nearest)
            pairs |= {(i, k) for i in nearest}
        found.append(pairs)
    return found


def pairs_of(members: Tensor, labels: Tensor) -> list[set]:
    return [set(zip(m.tolist(), y.tolist(), strict=True)) for m, y in zip(members, labels, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_margins_are_the_log_odds_of_the_softmax(scale):
    logits = scale * torch.randn(7, 50, 4, generator=torch.Generator().manual_seed(0))
    others = [logits.double()[..., [j for j in range(4) if j != k]].logsumexp(-1) for k in range(4)]
    torch.testing.assert_close(
        margins(logits).double(), logits.double() - torch.stack(others, -1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(margins(logits.transpose(1, 2), 1), margins(logits).transpose(1, 2))


@pytest.mark.parametrize("overlap", [True, False])
def test_images_that_are_all_sure_are_ranked_whatever_their_order(overlap):
    """Of most images a probability is exactly 1 in float32: ranks by probability follow the order of the images."""
    features, probs = random_case(images=200)
    logits = 60 * probs.log()
    assert (logits.softmax(2).amax(2) == 1).float().mean() > 0.7
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))

    def labelled(ranks, order: Tensor) -> list[set]:
        members, labels = prototype_labels(features[order], given(ranks(logits[:, order])), [50] * 4, 0.5, overlap)
        return pairs_of(order[members], labels)

    assert labelled(margins, torch.arange(200)) == labelled(margins, order)
    by_probability = partial(torch.softmax, dim=2)
    assert labelled(by_probability, torch.arange(200)) != labelled(by_probability, order)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("wanted", [[6, 6, 6, 6], [2, 9, 5, 8], [20, 1, 2, 1]])
@pytest.mark.parametrize("fraction", [0.5, 1.0, 0.01])
def test_labels_are_those_of_the_equations(overlap, wanted, fraction):
    features, probs = random_case()
    members, labels = prototype_labels(features, given(probs), wanted, fraction, overlap)
    assert members.shape == labels.shape == (3, 24)
    assert pairs_of(members, labels) == loop(features, probs, wanted, fraction, overlap)


@pytest.mark.parametrize(("block", "heads", "clusters"), [(1, 3, 4), (100, 3, 4), (900, 1, 2), (5000, 2, 12)])
def test_blocks_of_any_size_find_the_same(monkeypatch, block, heads, clusters):
    features, probs = random_case(heads, 97, clusters)
    wanted = quotas(97, clusters)
    whole = prototype_labels(features, given(probs), wanted, 0.5)
    loss = selection_loss(features, given(probs.log()), wanted, 0.5, double_softmax_cross_entropy)
    monkeypatch.setattr(pseudo_labels, "NUMBERS", block)
    members, labels = prototype_labels(features, given(probs), wanted, 0.5)
    assert pairs_of(members, labels) == pairs_of(*whole)
    in_blocks = selection_loss(features, given(probs.log()), wanted, 0.5, double_softmax_cross_entropy)
    torch.testing.assert_close(in_blocks, loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("block", [1, 3, 40, 100])
def test_the_largest_of_rows_do_not_depend_on_the_blocks(block):
    rows = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(4))
    assert torch.equal(largest(rows.split(block, 2), 7), rows.topk(7).indices)
    rising = rows.sort(2).values
    assert torch.equal(largest(rising.split(block, 2), 7), rising.topk(7).indices)


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="5 values have no 6 largest ones"):
        largest([torch.rand(2, 3), torch.rand(2, 2)], 6)


def test_the_papers_figure_4():
    """Ten images, three clusters: three most confident images make a center, its three nearest get the label.

    Two tight groups of four at 0 and 90 degrees, two images at 200: whatever single images are confused about, labels
    follow the groups.
    """
    degrees = torch.tensor([0.0, 2, 4, 6, 90, 92, 94, 96, 200, 202])
    features = torch.stack([torch.cos(degrees.deg2rad()), torch.sin(degrees.deg2rad())], 1)
    scores = torch.full((1, 10, 3), 0.1)
    scores[0, 0:4, 0] = torch.tensor([0.9, 0.8, 0.2, 0.7])  # image 2 is not sure
    scores[0, 4:8, 1] = torch.tensor([0.8, 0.7, 0.9, 0.2])
    scores[0, 8:10, 2] = 0.9
    scores[0, 2, 2] = 0.6  # and takes part in the center of cluster 2
    members, labels = prototype_labels(features, given(scores), quotas(10, 3), 1.0)
    found = pairs_of(members, labels)[0]
    assert {i for i, k in found if k == 0} <= {0, 1, 2, 3}
    assert {i for i, k in found if k == 1} <= {4, 5, 6, 7}
    assert {8, 9} < {i for i, k in found if k == 2}
    assert len(found) == 9


def test_every_cluster_gets_its_number_whatever_the_head_says():
    features, _ = random_case(heads=1)
    collapsed = torch.zeros(1, 24, 4)
    collapsed[..., 0] = 1.0
    for overlap in (True, False):
        _, labels = prototype_labels(features, given(collapsed), [6, 6, 6, 6], 0.5, overlap)
        assert torch.bincount(labels[0]).tolist() == [6, 6, 6, 6]


def test_without_overlap_no_image_has_two_labels():
    features, probs = random_case()
    members, _ = prototype_labels(features, given(probs), [6] * 4, 0.5, overlap=False)
    assert all(len(set(row.tolist())) == 24 for row in members)
    overlapping, _ = prototype_labels(features, given(probs), [6] * 4, 0.5)
    assert any(len(set(row.tolist())) < 24 for row in overlapping), "so the test can fail"


def test_labels_follow_a_permutation_of_the_clusters():
    features, probs = random_case(heads=1)
    order = torch.tensor([2, 0, 3, 1])
    wanted = [3, 6, 7, 8]
    before = pairs_of(*prototype_labels(features, given(probs), wanted, 0.5))[0]
    moved = [wanted[k] for k in order]
    after = pairs_of(*prototype_labels(features, given(probs[:, :, order]), moved, 0.5))[0]
    assert {(i, int(order[k])) for i, k in after} == before
    losses = [selection_loss(features, given(probs[:, :, o].log()), w, 0.5, double_softmax_cross_entropy) for o, w in
              ((torch.arange(4), wanted), (order, moved))]  # fmt: skip
    torch.testing.assert_close(*losses)


def test_copies_of_an_image_are_labelled_alike():
    features, probs = random_case(images=12)
    features, probs = features.repeat(2, 1), probs.repeat(1, 2, 1)
    members, labels = prototype_labels(features, given(probs), quotas(24, 4), 0.5)
    for found in pairs_of(members, labels):
        assert {(i, k) for i, k in found if i < 12} == {(i - 12, k) for i, k in found if i >= 12}


@pytest.mark.parametrize(("images", "clusters"), [(4, 2), (50, 2), (2000, 1000)])
def test_few_and_many_clusters(images, clusters):
    features, probs = random_case(2, images, clusters)
    members, labels = prototype_labels(features, given(probs), quotas(images, clusters), 0.5)
    assert pairs_of(members, labels) == loop(features, probs, quotas(images, clusters), 0.5)


def test_more_clusters_than_images_are_refused():
    features, probs = random_case(images=3)
    with pytest.raises(ValueError, match="3 images cannot give 4 clusters"):
        prototype_labels(features, given(probs), quotas(3, 4), 0.5)


def test_quotas_follow_the_prior():
    assert quotas(103, 4) == [25, 25, 25, 25]
    assert quotas(100, 3, (1, 2, 1)) == [25, 50, 25]
    assert quotas(10, 3, (0.3, 0.3, 0.4)) == [3, 3, 4]
    assert quotas(100, 2, (29, 71)) == [29, 71]
    assert quotas(10_000, 2, (0.57, 0.43)) == [5700, 4300]


@pytest.mark.parametrize("loss", [double_softmax_cross_entropy, cross_entropy])
def test_selection_loss_is_the_loss_of_the_heads_own_labels(loss):
    features, _ = random_case()
    logits = torch.randn(3, 24, 4, generator=torch.Generator().manual_seed(5))
    members, labels = prototype_labels(features, given(logits.softmax(2)), [6] * 4, 0.5)
    for h in range(3):
        own = loss(logits[h : h + 1, members[h]], labels[h : h + 1])
        torch.testing.assert_close(selection_loss(features, given(logits), [6] * 4, 0.5, loss)[h], own[0])


def test_selection_prefers_the_head_that_agrees_with_the_features():
    centers = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    truth = torch.arange(80) % 4
    noise = 0.1 * torch.randn(80, 16, generator=torch.Generator().manual_seed(3))
    features = F.normalize(centers[truth] + noise, dim=1)
    good = 12.0 * F.one_hot(truth, 4).float()
    merged = 12.0 * F.one_hot(truth.clamp(max=2), 4).float()  # two clusters share one output, one is empty
    both = given(torch.stack([merged, good]))
    loss = selection_loss(features, both, [20] * 4, 0.5, double_softmax_cross_entropy)
    assert loss[1] < loss[0]
