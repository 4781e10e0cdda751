"""The order of images: pure functions of (seed, epoch), the same on any number of workers."""

import numpy as np
from jaxtyping import Int64

ORDER_STREAM = 0x6F72646572  # "order": keeps this stream apart from others drawn from the same seed and epoch


def epoch_order(seed: int, epoch: int, n: int) -> Int64[np.ndarray, " n"]:
    """Draw a permutation of range(n). Order (seed 0, epoch 1) and (seed 1, epoch 0) are unrelated. seed, epoch >= 0."""
    return np.random.default_rng([seed, epoch, ORDER_STREAM]).permutation(n).astype(np.int64)


def global_batches(order: Int64[np.ndarray, " n"], batch_size: int, drop_last: bool) -> list[np.ndarray]:
    """Return order[0:b], order[b:2b], ...; the last one may be shorter, or is left out with drop_last."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    end = len(order) - len(order) % batch_size if drop_last else len(order)
    return [order[start : start + batch_size] for start in range(0, end, batch_size)]


def worker_batches(
    order: Int64[np.ndarray, " n"], batch_size: int, world: int, rank: int
) -> Int64[np.ndarray, "steps share"]:
    """Return the share of worker `rank` of `world` of each whole global batch; an incomplete last batch is left out.

    Joined in the order of the ranks, the shares are the global batches, for any number of workers.

    Raises:
        ValueError: fewer images than a batch holds, or a batch that the workers cannot share evenly.
    """
    if not 1 <= batch_size <= len(order):
        raise ValueError(f"{len(order)} images do not fill a batch of {batch_size}")
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} cannot be shared by {world} workers")
    whole = order[: len(order) - len(order) % batch_size]
    return whole.reshape(-1, world, batch_size // world)[:, rank]


def check_order(order: np.ndarray, batch_size: int, n: int) -> Int64[np.ndarray, " m"]:
    """Return `order` as int64, every entry in [0, n).

    Raises:
        ValueError: empty, not one axis of integers, or a batch size below 1.
        IndexError: an entry outside the data set; native readers would read foreign memory.
    """
    order = np.asarray(order)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    if order.ndim != 1 or order.size == 0 or order.dtype.kind not in "iu":
        raise ValueError(f"an order is a non-empty 1-D array of integers, got {order.dtype} of shape {order.shape}")
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= n:
        raise IndexError(f"the order holds {low if low < 0 else high}, but images are numbered 0 .. {n - 1}")
    return order.astype(np.int64)
