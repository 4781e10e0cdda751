"""Find copies of pictures: re-encoded, resized, slightly cropped, brighter; and series. Arrays in, arrays out.

Two images are compared only if one is among the candidates of the other: nearest neighbours by features, and
neighbours in sorted orders of a perceptual hash. Two rules then make a pair of copies. The pictures agree: small grey
pictures correlate after a small shift, zoom and rotation. And they agree much better than pictures of this kind do:
what the correlation lacks to 1 is small beside what that of the RANK-th candidate lacks. So two drawings of a one are
no copies though they correlate by .99, since many drawings of a one do. Where neighbours by features are known, a
second such ratio, of cosine distances, allows a larger first one: a cropped photo has moved edges, but the content.

N = images, C = candidates of each, P = pairs. Memory in bytes: pictures 2 SIDE^2 N, candidates 8 N C. Time: 63 N C
products, and a tenth of a millisecond for each pair that is worth a closer look, about one an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int, UInt8, UInt64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

SIDE = 24  # pixels of the pictures that are compared
FREQUENCIES = 8  # side of the block of low frequencies that the hash is made of, as in pHash
SORTINGS = 24  # orders of the hashes; the two images beside an image in each are its candidates
RANK = 10  # the candidate that says how alike pictures of this kind are
FLOOR = 0.1  # quantile over all images, the least such distance: many copies of a picture would hide each other
PROMISING = 0.5  # of such a distance, in low frequencies, up to which a pair is aligned
FLAT = 0.5  # grey levels of contrast below which a picture shows nothing that could be compared
CHUNK = 1024


@dataclass(frozen=True)
class Bound:
    """When two images belong together."""

    correlation: float  # of the aligned pictures, at least
    ratio: float  # of what it lacks to 1 and what that of the RANK-th candidate lacks, at most
    feature_ratio: float  # of cosine distances: to each other, and to the RANK-th neighbour, at most


# chosen on copies of real images: tests/bench/bench_duplicates.py
COPY = (Bound(0.96, 0.03, np.inf), Bound(0.96, 0.12, 0.25))
COPY_BY_HASH = (Bound(0.96, 0.01, np.inf),)  # without neighbours by features, alike pictures are not all candidates
SERIES = (Bound(0.85, 0.3, 0.3),)


@dataclass(frozen=True)
class Pairs:
    """Pairs of images that were compared closely, each once."""

    first: Int[np.ndarray, " P"]
    second: Int[np.ndarray, " P"]
    correlation: Float[np.ndarray, " P"]
    ratio: Float[np.ndarray, " P"]
    feature_ratio: Float[np.ndarray, " P"]  # infinite where neighbours by features are not known

    def within(self, bounds: Sequence[Bound]) -> Bool[np.ndarray, " P"]:
        """Tell which pairs are within one of the bounds."""
        inside = np.zeros(len(self.first), bool)
        for bound in bounds:
            close = (self.ratio <= bound.ratio) & (self.feature_ratio <= bound.feature_ratio)
            inside |= (self.correlation >= bound.correlation) & close
        return inside


@dataclass(frozen=True)
class Copies:
    """Three partitions of N images, each coarser than the one before."""

    content: Int[np.ndarray, " N"]  # equal where the stored bytes are
    picture: Int[np.ndarray, " N"]  # equal for copies of one picture
    scene: Int[np.ndarray, " N"]  # equal for pictures of one series


def pictures(images: UInt8[Tensor, "B C H W"]) -> Float16[np.ndarray, "B SIDE SIDE"]:
    """Reduce images to small grey pictures, 0 to 255."""
    weights = torch.tensor([0.299, 0.587, 0.114] if images.shape[1] == 3 else [1.0], device=images.device)
    grey = torch.einsum("bchw,c->bhw", images.float(), weights)[:, None]
    small = torch.nn.functional.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)
    return small[:, 0].half().cpu().numpy()


def find_copies(
    content: Int[np.ndarray, " N"],
    small: Float16[np.ndarray, "N SIDE SIDE"],
    neighbors: Int[np.ndarray, "M S"] | None = None,
    features: Float16[np.ndarray, "N D"] | None = None,
) -> Copies:
    """Find copies and series among images; of equal ones, by `content`, one is compared with the others.

    Args:
        content: equal where the stored bytes are.
        small: of `pictures`.
        neighbors: of the first M images the nearest others by cosine of `features`, nearest first.
    """
    _, chosen, index = np.unique(content, return_index=True, return_inverse=True)
    if neighbors is not None and features is not None:
        pairs, bounds = close_pairs(small[chosen], _among(chosen, index, neighbors), features[chosen]), COPY
    else:
        pairs, bounds = close_pairs(small[chosen]), COPY_BY_HASH
    copies = pairs.within(bounds)
    picture = components(len(chosen), pairs, copies)
    scene = components(len(chosen), pairs, copies | pairs.within(SERIES))
    return Copies(index, picture[index], scene[index])


def _among(
    chosen: Int[np.ndarray, " K"], index: Int[np.ndarray, " N"], neighbors: Int[np.ndarray, "M S"]
) -> Int[np.ndarray, "K S"]:
    """Return the neighbours of the chosen images in their numbering; itself where an image has none."""
    known = chosen < len(neighbors)
    among = np.repeat(np.arange(len(chosen))[:, None], neighbors.shape[1], axis=1)
    among[known] = index[neighbors[chosen[known]]]
    return among


def close_pairs(
    small: Float16[np.ndarray, "N SIDE SIDE"],
    neighbors: Int[np.ndarray, "N S"] | None = None,
    features: Float16[np.ndarray, "N D"] | None = None,
) -> Pairs:
    """Compare images with their candidates; return the pairs whose low frequencies agree well for their kind."""
    low = low_frequencies(small)
    candidates = _candidates(low, neighbors)
    agreement = _agreement(low, candidates)
    scale = _scale(agreement)
    rows, columns = np.nonzero(1 - agreement <= PROMISING * scale[:, None])
    others = candidates[rows, columns]
    keys = np.unique(np.minimum(rows, others) * len(small) + np.maximum(rows, others))
    first, second = keys // len(small), keys % len(small)
    correlation = alignment(small, first, second)
    ratio = (1 - correlation) / np.maximum(np.minimum(scale[first], scale[second]), 1e-6)
    if neighbors is None or features is None:
        return Pairs(first, second, correlation, ratio, np.full(len(first), np.inf))
    return Pairs(first, second, correlation, ratio, _feature_ratio(features, neighbors, first, second))


def low_frequencies(small: Float16[np.ndarray, "N SIDE SIDE"]) -> Float[np.ndarray, "N F"]:
    """Compute unit rows of the lowest frequencies of the cosine transform without the mean; 0 of a flat picture."""
    from scipy.fft import dctn

    rows = np.zeros((len(small), FREQUENCIES**2 - 1), np.float32)
    for start in range(0, len(small), CHUNK):
        waves: Any = dctn(small[start : start + CHUNK].astype(np.float32), axes=(1, 2), norm="ortho")
        block = waves[:, :FREQUENCIES, :FREQUENCIES].reshape(len(waves), -1)[:, 1:]
        length = np.linalg.norm(block, axis=1, keepdims=True)
        rows[start : start + CHUNK] = np.where(length > FLAT * SIDE, block / np.maximum(length, 1e-9), 0)
    return rows


def hashes(low: Float[np.ndarray, "N F"]) -> Bool[np.ndarray, "N F"]:
    """Return pHash: whether each of the low frequencies is above the median of its image."""
    return low > np.median(low, axis=1, keepdims=True)


def hash_neighbors(low: Float[np.ndarray, "N F"]) -> Int[np.ndarray, "N C"]:
    """Return the images beside each in several orders of the hashes, each by another order of the bits."""
    found, bits = [], hashes(low)
    for sorting in range(SORTINGS):
        order = np.random.default_rng(sorting).permutation(bits.shape[1])
        ranked = np.argsort(_numbers(bits[:, order]), kind="stable")
        for step in (-1, 1):
            beside = np.empty(len(low), np.int64)
            beside[ranked] = np.roll(ranked, step)
            found.append(beside)
    return np.stack(found, 1)


def _numbers(bits: Bool[np.ndarray, "N F"]) -> UInt64[np.ndarray, " N"]:
    padded = np.zeros((len(bits), 64), bool)
    padded[:, : bits.shape[1]] = bits
    return np.packbits(padded, axis=1).view(">u8")[:, 0].astype(np.uint64)


def _candidates(
    low: Float[np.ndarray, "N F"], neighbors: Int[np.ndarray, "N S"] | None
) -> Int[np.ndarray, "N C"]:  # fmt: skip
    """Return each candidate once, and the image itself in places that are left over."""
    itself = np.arange(len(low))[:, None]
    beside = hash_neighbors(low)
    candidates = np.sort(beside if neighbors is None else np.concatenate([beside, neighbors], 1), axis=1)
    repeated = np.zeros(candidates.shape, bool)
    repeated[:, 1:] = candidates[:, 1:] == candidates[:, :-1]
    return np.where(repeated, itself, candidates)


def _agreement(low: Float[np.ndarray, "N F"], candidates: Int[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
    """Compute the correlations of low frequencies; -inf with itself."""
    agreement = np.empty(candidates.shape, np.float32)
    for start in range(0, len(low), CHUNK):
        rows = slice(start, start + CHUNK)
        agreement[rows] = np.einsum("nf,ncf->nc", low[rows], low[candidates[rows]])
    agreement[candidates == np.arange(len(low))[:, None]] = -np.inf
    return agreement


def _scale(agreement: Float[np.ndarray, "N C"]) -> Float[np.ndarray, " N"]:
    """Return what the correlation with the RANK-th candidate, or the last one, lacks to 1: at least the FLOOR."""
    ranked = -np.sort(-agreement, axis=1)
    count = np.isfinite(ranked).sum(1)
    last = np.take_along_axis(ranked, np.clip(np.minimum(RANK, count) - 1, 0, None)[:, None], 1)[:, 0]
    scale = np.where(count > 0, 1 - last, 0)
    return np.maximum(scale, np.quantile(scale, FLOOR)) if len(scale) else scale


def alignment(
    small: Float16[np.ndarray, "N SIDE SIDE"], first: Int[np.ndarray, " P"], second: Int[np.ndarray, " P"]
) -> Float[np.ndarray, " P"]:
    """Correlate pictures of pairs, each as the other moved a little, and return the smaller of both correlations."""
    result = np.empty(len(first))
    for start in range(0, len(first), CHUNK):
        rows = slice(start, start + CHUNK)
        one, other = (small[index[rows]].astype(np.float32) for index in (first, second))
        result[rows] = np.minimum(explained(one, other), explained(other, one))
    return result


def explained(a: Float[np.ndarray, "P s s"], b: Float[np.ndarray, "P s s"]) -> Float[np.ndarray, " P"]:
    """Compute the multiple correlation of each `b` with `a` shifted, zoomed and rotated, to first order.

    b ~ c + g a + dx a_x + dy a_y + zoom (x a_x + y a_y) + turn (x a_y - y a_x), by least squares. It is 0 if b is a
    negative of a, and of flat pictures. A border of one pixel, where the slope is not known, is left out.
    """
    y, x = np.mgrid[: a.shape[1], : a.shape[1]].astype(np.float32) / (a.shape[1] - 1) - 0.5
    a_y, a_x = np.gradient(a, axis=(1, 2))
    moved = np.stack([a, a_x, a_y, x * a_x + y * a_y, x * a_y - y * a_x], 1)
    basis, target = (_centered(part[..., 1:-1, 1:-1]) for part in (moved, b[:, None]))
    products = (basis @ basis.transpose(0, 2, 1)).astype(np.float64)
    size = np.trace(products, axis1=1, axis2=2)[:, None, None] + 1e-6
    shared = (basis @ target.transpose(0, 2, 1)).astype(np.float64)
    weights = np.linalg.solve(products + 1e-6 * size * np.eye(5), shared)
    total = np.square(target.astype(np.float64)).sum((1, 2))
    unexplained = np.square(target - weights.transpose(0, 2, 1) @ basis).sum((1, 2))
    share = 1 - unexplained / np.maximum(total, 1e-6)
    shows = (weights[:, 0, 0] > 0) & (total > FLAT**2 * target.shape[2])
    return np.where(shows, np.sqrt(np.maximum(share, 0)), 0)


def _centered(images: Float[np.ndarray, "P B h w"]) -> Float[np.ndarray, "P B hw"]:
    rows = images.reshape(*images.shape[:2], -1)
    return rows - rows.mean(2, keepdims=True)


def _feature_ratio(
    features: Float16[np.ndarray, "N D"],
    neighbors: Int[np.ndarray, "N S"],
    first: Int[np.ndarray, " P"],
    second: Int[np.ndarray, " P"],
) -> Float[np.ndarray, " P"]:
    """Divide the cosine distance of each pair by the smaller of its images' distances to their RANK-th neighbour."""
    far = neighbors[:, min(RANK, neighbors.shape[1]) - 1]
    scale = cosine_distances(features, np.arange(len(far)), far)
    least = np.minimum(scale[first], scale[second])
    distance = cosine_distances(features, first, second)
    return np.where(least > 1e-4, distance / np.maximum(least, 1e-4), np.inf)


def cosine_distances(
    features: Float16[np.ndarray, "N D"], first: Int[np.ndarray, " P"], second: Int[np.ndarray, " P"]
) -> Float[np.ndarray, " P"]:
    """Compute 1 - the product of unit rows, in float32; 1 where a row is not finite."""
    distance = np.empty(len(first), np.float32)
    for start in range(0, len(first), CHUNK):
        rows = slice(start, start + CHUNK)
        one, other = (features[index[rows]].astype(np.float32) for index in (first, second))
        distance[rows] = 1 - np.einsum("pd,pd->p", one, other)
    return np.where(np.isfinite(distance), distance, 1)


def components(count: int, pairs: Pairs, chosen: Bool[np.ndarray, " P"]) -> Int[np.ndarray, " N"]:
    """Number the connected parts of `count` images that the chosen pairs join."""
    ends = (pairs.first[chosen], pairs.second[chosen])
    graph = coo_array((np.ones(len(ends[0])), ends), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def groups(labels: Int[np.ndarray, " N"]) -> list[Int[np.ndarray, " G"]]:
    """List the images of every label that two images or more have, in image order."""
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted((part for part in parts if len(part) > 1), key=lambda part: int(part[0]))
