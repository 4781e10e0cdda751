"""Exact nearest neighbours in blocks: memory O(block x N), never N x N."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def nearest(
    features: Float[Tensor, "N D"],
    count: int,
    block: int = 4096,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Int[Tensor, "N count"]:
    """The `count` rows of largest dot product with each row, best first. A row is its own neighbour, as in SPICE.

    One block of scores, `block` x `block` floats, and N x count indices are held. `progress` gets (rows done, rows).
    """
    if not 1 <= count <= len(features):
        raise ValueError(f"count must be between 1 and the {len(features)} rows, not {count}")
    found = features.new_empty((len(features), count), dtype=torch.long)
    for start in range(0, len(features), block):
        rows = features[start : start + block]
        found[start : start + block] = _block_nearest(features, rows, count, block)
        progress(start + len(rows), len(features))
    return found


def _block_nearest(
    features: Float[Tensor, "N D"], rows: Float[Tensor, "B D"], count: int, block: int
) -> Int[Tensor, "B count"]:
    scores = features.new_empty((len(rows), 0), dtype=torch.float32)
    found = torch.empty((len(rows), 0), dtype=torch.long, device=features.device)
    for start in range(0, len(features), block):
        others = features[start : start + block]
        here = torch.arange(start, start + len(others), device=features.device).expand(len(rows), -1)
        scores, found = torch.cat([scores, rows.float() @ others.float().T], 1), torch.cat([found, here], 1)
        scores, best = scores.topk(min(count, scores.shape[1]), dim=1)
        found = found.gather(1, best)
    return found


def label_agreement(labels: Int[Tensor, " N"], neighbors: Int[Tensor, "N S"]) -> Float[Tensor, " N"]:
    """SPICE eq. (6): the share of an image's neighbours that carry its label."""
    return (labels[neighbors] == labels[:, None]).float().mean(1)
