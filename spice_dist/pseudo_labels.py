"""Pseudo-labels: the E-step of SPICE-Self and the reliable labels of SPICE-Semi. Tensors in, tensors out.

H = heads, M = images of one E-step, N = all images, K = clusters, D = feature width.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spice_dist.losses import double_softmax_cross_entropy

UNRELIABLE = -100  # the label of an image that has no reliable one; torch's cross-entropy ignores it by default


def cluster_centers(
    features: Float[Tensor, "M D"], probs: Float[Tensor, "H M K"], count: int
) -> Float[Tensor, "H K D"]:
    """SPICE eqs. (2) and (3): the mean feature of the `count` images that give cluster k the highest probability.

    for h, k: mean(features[argsort(-probs[h, :, k])[:count]])
    """
    confident = probs.topk(count, dim=1).indices  # H count K
    return features[confident].mean(1)


def nearest_to_centers(
    features: Float[Tensor, "M D"], centers: Float[Tensor, "H K D"], count: int
) -> tuple[Int[Tensor, "H P"], Int[Tensor, "H P"]]:
    """SPICE eq. (4): (image index, label) of the `count` images nearest to each center, by cluster; P = K count.

    Assignments may overlap: an image near two centers appears twice with two labels, one near none never appears. Rows
    of `features` have unit norm, so the dot product ranks like the cosine: a center's length is one factor per cluster.
    """
    heads, clusters, _ = centers.shape
    similarity = torch.einsum("md,hkd->hkm", features, centers)
    chosen = similarity.topk(count, dim=2).indices.flatten(1)
    labels = torch.arange(clusters, device=features.device).repeat_interleave(count).expand(heads, -1)
    return chosen, labels


def prototype_labels(
    features: Float[Tensor, "M D"], probs: Float[Tensor, "H M K"], center_fraction: float
) -> tuple[Int[Tensor, "H P"], Int[Tensor, "H P"]]:
    """The E-step, eqs. (2)-(4): floor(M/K) images per cluster, centers from `center_fraction` of that many."""
    images, clusters = probs.shape[1:]
    per_cluster = images // clusters
    if per_cluster < 1:
        raise ValueError(f"{images} images cannot give {clusters} clusters one image each")
    centers = cluster_centers(features, probs, max(1, int(center_fraction * per_cluster)))
    return nearest_to_centers(features, centers, per_cluster)


def selection_loss(
    features: Float[Tensor, "N D"], logits: Float[Tensor, "H N K"], center_fraction: float
) -> Float[Tensor, " H"]:
    """Label-free quality of every head: its loss (5) on its own prototype labels of the whole set, lower is better."""
    chosen, labels = prototype_labels(features, logits.softmax(2), center_fraction)
    rows = logits.gather(1, chosen[:, :, None].expand(-1, -1, logits.shape[2]))
    return double_softmax_cross_entropy(rows, labels)


def reliable_images(
    agreement: Float[Tensor, " N"], confidence: Float[Tensor, " N"], ratio: float, min_confidence: float
) -> Bool[Tensor, " N"]:
    """SPICE eq. (7) as its code has it: agreement (6) of at least `ratio` and confidence above `min_confidence`.

    The paper writes agreement > lambda and asks for no confidence: ratio = lambda + 1 / N_s, min_confidence = 0.
    """
    return (agreement >= ratio - 1e-6) & (confidence > min_confidence)  # 0.95 in float32 is below 0.95


def balanced(
    labels: Int[Tensor, " N"], reliable: Bool[Tensor, " N"], clusters: int, order: Int[Tensor, " N"]
) -> Bool[Tensor, " N"]:
    """As many reliable images of each cluster as the smallest has, those that come first in `order`: one that has none
    leaves none to any other."""
    chosen = order[reliable[order]]
    smallest = torch.bincount(labels[chosen], minlength=clusters).min()
    kept = torch.zeros_like(reliable)
    kept[chosen[_places(labels[chosen], clusters) < smallest]] = True
    return kept


def agreement_depth(labels: Int[Tensor, " N"], neighbors: Int[Tensor, "N S"]) -> Int[Tensor, " N"]:
    """How many of an image's neighbours, nearest first, carry its label before one does not: 0 .. S.

    The k nearest neighbours all agree where the depth is at least k.
    """
    return (labels[neighbors] == labels[:, None]).long().cumprod(1).sum(1)


def adaptive_depth(depth: Int[Tensor, " N"], largest: int) -> tuple[int, Int[Tensor, " S"]]:
    """DCBoost eq. (1): the k in 2 .. `largest` of largest k n_k, and n_k, the images of depth k or more, for k from 1.

    Of equal products the largest k is taken, the strictest. k is 1 where there is only one neighbour, or none.
    """
    passing = torch.bincount(depth, minlength=largest + 1).flip(0).cumsum(0).flip(0)[1:]
    products = passing * torch.arange(1, largest + 1, device=depth.device)
    if largest < 2:
        return 1, passing
    return largest - int(products[1:].flip(0).argmax()), passing


def raised_to_floor(
    labels: Int[Tensor, " N"],
    reliable: Bool[Tensor, " N"],
    score: Float[Tensor, " N"],
    confidence: Float[Tensor, " N"],
    clusters: int,
    fraction: float,
) -> Bool[Tensor, " N"]:
    """The reliable images, and in a cluster of n with fewer than max(1, ceil(fraction n)) of them the best others.

    Best is the highest `score`, of equal ones the more confident: every cluster that has an image keeps one.
    """
    order = torch.argsort(confidence, descending=True, stable=True)
    order = order[torch.argsort(score[order], descending=True, stable=True)]
    order = order[torch.argsort(reliable[order].int(), descending=True, stable=True)]
    sizes = torch.bincount(labels, minlength=clusters)
    wanted = (fraction * sizes.double() - 1e-9).ceil().clamp(min=1)  # 0.1 * 30 is above 3 in floating point
    kept = reliable.clone()
    kept[order[_places(labels[order], clusters) < wanted[labels[order]]]] = True
    return kept


def _places(labels: Int[Tensor, " M"], clusters: int) -> Int[Tensor, " M"]:
    """For each image the number of earlier ones with its label."""
    order = torch.argsort(labels, stable=True)
    sizes = torch.bincount(labels, minlength=clusters)
    starts = sizes.cumsum(0) - sizes
    places = torch.empty_like(labels)
    places[order] = torch.arange(len(labels), device=labels.device) - starts[labels[order]]
    return places
