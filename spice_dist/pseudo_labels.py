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
    labels: Int[Tensor, " N"],
    agreement: Float[Tensor, " N"],
    confidence: Float[Tensor, " N"],
    clusters: int,
    ratio: float,
    min_confidence: float,
    floor_fraction: float,
) -> Bool[Tensor, " N"]:
    """SPICE eq. (7): images whose neighbours agree with them, agreement > ratio, with confidence > min_confidence.

    A cluster left with fewer than `floor_fraction` of its images gets its best-agreeing ones up to that number (ties:
    the more confident first), so that no cluster vanishes before joint training; 0 is the paper's rule alone.
    """
    reliable = (agreement > ratio) & (confidence > min_confidence)
    order = torch.argsort(agreement + 1e-3 * confidence, descending=True, stable=True)
    for cluster in range(clusters):
        members = order[labels[order] == cluster]
        wanted = int(-(-floor_fraction * len(members) // 1))
        if int(reliable[members].sum()) < wanted:
            reliable[members[:wanted]] = True
    return reliable
