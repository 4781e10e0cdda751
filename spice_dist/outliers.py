"""Find images that are like no others, by the distance to the k-th nearest neighbour. Arrays in, arrays out.

Ramaswamy, Rastogi and Shim 2000. The neighbours are searched in at most SAMPLE images, evenly chosen, so that time and
memory stay linear in the number of images.
"""

import numpy as np
import torch
from jaxtyping import Float, Float16, Int

from spice_dist.neighbors import search

K = 30  # the neighbour whose distance counts: up to K foreign images that are alike do not hide each other
SAMPLE = 10_000
CHUNK = 8192  # images whose features are float32 at once
SHARE, MOST = 0.01, 100  # of the images are listed, at most so many


def kth_distances(features: Float16[np.ndarray, "N D"], k: int = K) -> Float[np.ndarray, " N"]:
    """Compute the cosine distance of each unit row to its k-th nearest other among the sample; 0 if there is none.

    Numbers that are not finite count as 0: such an image is as far from all others as unrelated ones are.
    """
    images = len(features)
    sample = np.unique(np.linspace(0, images - 1, min(images, SAMPLE)).astype(np.int64))
    k = min(k, len(sample) - 1)
    if k < 1:
        return np.zeros(images, np.float32)
    place = np.full(images, -1)
    place[sample] = np.arange(len(sample))
    reference = _finite(features[sample])
    result = np.empty(images, np.float32)
    for start in range(0, images, CHUNK):
        rows = slice(start, start + CHUNK)
        products, found = (part.numpy() for part in search(reference, _finite(features[rows]), k + 1))
        others = np.where(found == place[rows, None], -np.inf, products)
        result[rows] = 1 - np.sort(others, axis=1)[:, -k]
    return np.maximum(result, 0)


def scores(distance: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Divide by the median distance: 1 is usual, whatever the network; all 1 where the median is 0."""
    usual = float(np.median(distance)) if len(distance) else 0.0
    return distance / usual if usual > 0 else np.ones_like(distance)


def most_unusual(distance: Float[np.ndarray, " N"]) -> Int[np.ndarray, " L"]:
    """Return the images to list, most unusual first."""
    count = min(MOST, -(-len(distance) // round(1 / SHARE)))
    return np.argsort(-distance, kind="stable")[:count]


def _finite(features: Float16[np.ndarray, "B D"]) -> torch.Tensor:
    return torch.from_numpy(np.nan_to_num(features.astype(np.float32), posinf=0, neginf=0))
