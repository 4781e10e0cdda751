"""Assign pseudo-labels: the E-step of SPICE-Self and the reliable labels of SPICE-Semi. Tensors in, tensors out.

H = heads, M = images of one E-step, N = all images, K = clusters, D = feature width, n[k] = images wanted of cluster k.
The E-step takes the images in blocks. Its memory is that of NUMBERS numbers, at most 2 H M indices, and the features.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spice_dist.transfer import send

UNRELIABLE = -100  # the label of an image that has no reliable one; torch's cross-entropy ignores it by default
NUMBERS = 1 << 26  # probabilities held at once, 256 MB
ROWS = 1 << 16  # images whose neighbours are looked up at once
Outputs = Callable[[slice | Tensor], Float[Tensor, "H B K"]]
"""Gives all heads' outputs for a slice of the images, or for (H, B) numbers of images, a row for each head."""
Loss = Callable[[Float[Tensor, "H B K"], Int[Tensor, "H B"]], Float[Tensor, " H"]]


def quotas(images: int, clusters: int, prior: Sequence[float] = ()) -> list[int]:
    """Compute how many images each cluster gets: n[k] = floor(prior[k] images), or equal numbers without a prior."""
    if not prior:
        return [images // clusters] * clusters
    return [int(share * images / sum(prior) + 1e-9) for share in prior]  # 0.57 of 100 is below 57 in floating point


def margins(logits: Float[Tensor, "*rows K"], axis: int = -1) -> Float[Tensor, "*rows K"]:
    """Compute log p - log(1 - p) of the softmax along `axis`: the logit over the others' logsumexp.

    Margins rank images as probabilities p do. Probabilities of most images round to exactly 1 in float32 after some
    training; margins still differ.
    """
    largest_logit, at = logits.max(axis, keepdim=True)
    exponentials = (logits - largest_logit).exp()
    # of the largest entry the difference would cancel
    others = (exponentials.sum(axis, keepdim=True) - exponentials).log() + largest_logit
    beside_largest = logits.scatter(axis, at, -torch.inf).logsumexp(axis, keepdim=True)
    return logits - others.scatter(axis, at, beside_largest)


def prototype_labels(
    features: Float[Tensor, "M D"],
    confidence: Outputs,
    wanted: Sequence[int],
    center_fraction: float,
    overlap: bool = True,
) -> tuple[Int[Tensor, "H P"], Int[Tensor, "H P"]]:
    """Run the E-step, SPICE eqs. (2)-(4): (number of an image, its label), by cluster; P = sum of `wanted`, the n[k].

    `confidence` gives the probabilities, or `margins`, which rank alike. A cluster's center is the mean feature of its
    `center_fraction` n[k] most confident images. The n[k] images nearest to the center get the label. Rows of
    `features` have unit norm, so the dot product ranks like the cosine: a center's length is one factor per cluster.

    With overlap, as published, an image near two centers appears twice with two labels, and one near none is left out.
    Without overlap, a cluster takes neither images for its center nor images to label that a cluster before it has
    taken. This needs memory for H M K numbers.
    """
    if min(wanted) < 1:
        raise ValueError(f"{len(features)} images cannot give {len(wanted)} clusters one image each")
    confident = [max(1, int(center_fraction * count)) for count in wanted]
    labels = send(torch.arange(len(wanted)).repeat_interleave(torch.tensor(wanted)), features.device)
    if not len(confidence(slice(0, 1))):  # this worker has no head: there are more workers than heads
        return labels[None][:0], labels[None][:0]
    choose = _overlapping if overlap else _disjoint
    members = choose(features, confidence, wanted, confident)
    return members, labels.expand(len(members), -1)


def _overlapping(
    features: Float[Tensor, "M D"], confidence: Outputs, wanted: Sequence[int], confident: Sequence[int]
) -> Int[Tensor, "H P"]:
    members: dict[int, Int[Tensor, "H n"]] = {}
    for group in _alike(wanted):
        of = slice(None) if len(group) == len(wanted) else send(torch.tensor(group), features.device)
        columns = (block[:, :, of].transpose(1, 2) for block in _blocks(confidence, features, len(wanted)))
        counts = [confident[k] for k in group]
        centers = cluster_centers(features, largest(columns, max(counts)), counts)
        rows = max(1, NUMBERS // centers[:, :, 0].numel())
        similarities = (torch.einsum("hkd,md->hkm", centers, block) for block in features.split(rows))
        nearest = largest(similarities, max(wanted[k] for k in group))
        members |= {k: images[:, : wanted[k]] for k, images in zip(group, nearest.unbind(1), strict=True)}
    return torch.cat([members[k] for k in range(len(wanted))], 1)


def _alike(wanted: Sequence[int]) -> list[list[int]]:
    """Group clusters whose wanted numbers differ by a factor of two at most: all lists of a group have one length."""
    groups: list[list[int]] = []
    for k in sorted(range(len(wanted)), key=lambda k: wanted[k]):
        if groups and wanted[k] <= 2 * wanted[groups[-1][0]]:
            groups[-1].append(k)
        else:
            groups.append([k])
    return groups


def _disjoint(
    features: Float[Tensor, "M D"], confidence: Outputs, wanted: Sequence[int], confident: Sequence[int]
) -> Int[Tensor, "H P"]:
    columns = torch.cat(list(_blocks(confidence, features, len(wanted))), 1)
    heads = len(columns)
    used = torch.zeros(heads, len(features), dtype=torch.bool, device=features.device)
    labelled = used.clone()
    members = []
    for k, (count, of_center) in enumerate(zip(wanted, confident, strict=True)):
        most_confident = columns[:, :, k].masked_fill(used, -torch.inf).topk(of_center).indices
        used.scatter_(1, most_confident, True)
        center = features[most_confident].mean(1)
        members.append((center @ features.T).masked_fill(labelled, -torch.inf).topk(count).indices)
        labelled.scatter_(1, members[-1], True)
    return torch.cat(members, 1)


def cluster_centers(
    features: Float[Tensor, "M D"], confident: Int[Tensor, "H K C"], counts: Sequence[int]
) -> Float[Tensor, "H K D"]:
    """Average the features of the first counts[k] images of every cluster's list: SPICE eq. (3)."""
    weight = _first(counts, confident) / send(torch.tensor(counts), features.device)[:, None]
    weights = weight.expand(len(confident), -1, -1).flatten(0, 1)
    centers = F.embedding_bag(confident.flatten(0, 1), features, mode="sum", per_sample_weights=weights)
    return centers.unflatten(0, confident.shape[:2])


def selection_loss(
    features: Float[Tensor, "N D"], logits: Outputs, wanted: Sequence[int], center_fraction: float, loss: Loss
) -> Float[Tensor, " H"]:
    """Compute every head's loss (5) on its own prototype labels of the whole set: lower is better, without labels."""
    chosen, labels = prototype_labels(features, lambda rows: margins(logits(rows)), wanted, center_fraction)
    rows = max(1, NUMBERS // (max(1, len(chosen)) * max(features.shape[1], len(wanted))))
    total = torch.zeros(len(chosen), dtype=torch.float64, device=features.device)
    for images, label in zip(chosen.split(rows, 1), labels.split(rows, 1), strict=True):
        total += loss(logits(images), label) * images.shape[1]
    return (total / chosen.shape[1]).float()


def largest(blocks: Iterable[Tensor], count: int) -> Int[Tensor, "*rows {count}"]:
    """Find where each row of (*rows, N) has its `count` largest values, in order; the blocks (*rows, B) are columns."""
    values = positions = None
    start = 0
    for block in blocks:
        size = min(count, block.shape[-1])
        if values is not None and values.shape[-1] == count:  # only values above the smallest of these can enter
            size = min(size, int((block > values[..., -1:]).sum(-1, dtype=torch.int32).max()))
        best, where = block.topk(size)
        where += start
        start += block.shape[-1]
        values = best if values is None else torch.cat([values, best], -1)
        positions = where if positions is None else torch.cat([positions, where], -1)
        values, order = values.topk(min(count, values.shape[-1]))
        positions = positions.gather(-1, order)
    if positions is None or positions.shape[-1] < count:
        raise ValueError(f"{start} values have no {count} largest ones")
    return positions


def _blocks(outputs: Outputs, features: Float[Tensor, "M D"], clusters: int) -> Iterator[Float[Tensor, "H B K"]]:
    """Yield the outputs for all images; a block's outputs and the heads' hidden values are NUMBERS numbers at most."""
    heads = len(outputs(slice(0, 1)))
    rows = max(1, NUMBERS // (heads * max(clusters, features.shape[1])))
    for start in range(0, len(features), rows):
        yield outputs(slice(start, start + rows))


def _first(counts: Sequence[int], lists: Int[Tensor, "H K C"]) -> Bool[Tensor, "K C"]:
    """Mark the first counts[k] entries of cluster k's list."""
    limit = send(torch.tensor(counts), lists.device)
    return torch.arange(lists.shape[2], device=lists.device) < limit[:, None]


def reliable_images(
    agreement: Float[Tensor, " N"], confidence: Float[Tensor, " N"], ratio: float, min_confidence: float
) -> Bool[Tensor, " N"]:
    """Mark images of agreement (6) >= `ratio` and confidence > `min_confidence`: SPICE eq. (7) as its code has it.

    The paper's agreement > lambda, without confidence, is ratio = lambda + 1 / N_s and min_confidence = 0.
    """
    return (agreement >= ratio - 1e-6) & (confidence > min_confidence)  # 0.95 in float32 is below 0.95


def balanced(
    labels: Int[Tensor, " N"], reliable: Bool[Tensor, " N"], clusters: int, order: Int[Tensor, " N"]
) -> Bool[Tensor, " N"]:
    """Cut every cluster to the smallest number of reliable images, which may be 0; the first in `order` stay."""
    chosen = order[reliable[order]]
    smallest = torch.bincount(labels[chosen], minlength=clusters).min()
    selected = torch.zeros_like(reliable)
    selected[chosen[_places(labels[chosen], clusters) < smallest]] = True
    return selected


def agreement_depth(
    labels: Int[Tensor, " N"], neighbors: Int[Tensor, "R S"], rows: range | None = None
) -> Int[Tensor, " R"]:
    """Count for each of `rows` the nearest neighbours before the first one with another label: 0 .. S.

    The k nearest neighbours all agree where the depth is at least k.
    """
    own_labels = labels if rows is None else labels[rows.start : rows.stop]
    chunks = zip(own_labels.split(ROWS), neighbors.split(ROWS), strict=True)
    return torch.cat([(labels[index] == label[:, None]).long().cumprod(1).sum(1) for label, index in chunks])


def adaptive_depth(depth: Int[Tensor, " N"], largest: int) -> tuple[int, Int[Tensor, " S"]]:
    """Find the k in 2 .. `largest` of largest k n_k, DCBoost eq. (1): (k, n), n_k being the images of depth k or more.

    n starts with n_1. Of equal products the largest k is taken. k is 1 if `largest` is below 2.
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
    """Add the best other images to clusters of n images with fewer than max(1, ceil(fraction n)) reliable ones.

    The best have the highest `score`, or the higher confidence at equal scores. No cluster with images is left without.
    """
    order = torch.argsort(confidence, descending=True, stable=True)
    order = order[torch.argsort(score[order], descending=True, stable=True)]
    order = order[torch.argsort(reliable[order].int(), descending=True, stable=True)]
    sizes = torch.bincount(labels, minlength=clusters)
    wanted = (fraction * sizes.double() - 1e-9).ceil().clamp(min=1)  # 0.1 * 30 is above 3 in floating point
    selected = reliable.clone()
    selected[order[_places(labels[order], clusters) < wanted[labels[order]]]] = True
    return selected


def _places(labels: Int[Tensor, " M"], clusters: int) -> Int[Tensor, " M"]:
    """Count for each image the earlier ones with its label."""
    order = torch.argsort(labels, stable=True)
    sizes = torch.bincount(labels, minlength=clusters)
    starts = sizes.cumsum(0) - sizes
    places = torch.empty_like(labels)
    places[order] = torch.arange(len(labels), device=labels.device) - starts[labels[order]]
    return places
