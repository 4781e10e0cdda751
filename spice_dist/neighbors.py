"""Find nearest neighbours by dot product: exactly, or by an index of faiss for tens of millions of rows.

The exact search computes the products of a strip of queries with all rows and takes the largest of each query by
`torch.topk`. Memory is linear in the number of rows, never N x N.
"""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spice_dist.errors import UserError

STRIP = 1 << 25  # products of a strip on a CPU: 128 MiB
STRIP_GPU = 1 << 28  # 1 GiB: a launch of kernels costs more than a small product
CHUNK = 2048  # rows of features or labels that are looked at together
INDEX_CHUNK = 4096  # rows that faiss takes at a time
PROBES = 64  # lists of an index that a row is compared with


def nearest(
    features: Float[Tensor, "N D"],
    count: int,
    rows: range | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Int[Tensor, "R count"]:
    """Find the `count` rows of `features` of largest float32 dot product with each of `rows`, best first.

    A row is its own neighbour too. `rows` is a consecutive share of 0 .. N-1, all by default. Indices are int32, on the
    device of `features`; rows of equal product come in any order. `progress` gets (rows done, R), R once, at the end.
    Memory beyond `features`, in bytes: 8 R count, 4 N D unless they are float32, and on a CPU 4 STRIP and 16 N for each
    thread, on a GPU 4 STRIP_GPU and what topk takes.

    Raises:
        ValueError: `count` is not in 1 .. N, `rows` not in 0 .. N, or a feature not finite.
    """
    rows = range(len(features)) if rows is None else rows
    _check_rows(features, rows)
    return search(features, features[rows.start : rows.stop], count, progress=progress)[1]


@torch.no_grad()
def search(
    features: Float[Tensor, "N D"],
    queries: Float[Tensor, "M D"],
    count: int,
    skip: Int[Tensor, " M"] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Float[Tensor, "M count"], Int[Tensor, "M count"]]:
    """Find the `count` largest float32 products of each query with rows of `features`, best first: (products, rows).

    Row skip[i] of `features` is never found by query i; `count` is then at most N - 1. The rest is as in `nearest`.
    """
    _check(features, count, spare=int(skip is not None))
    others = features.float()
    best = others.new_empty(len(queries), count)
    index = torch.empty((len(queries), count), dtype=torch.int32, device=features.device)
    at_once = max(1, (STRIP if features.device.type == "cpu" else STRIP_GPU) // len(features))
    # shared by all strips: a C library gives large buffers back to the system, and new ones cost a tenth of the time
    buffer = others.new_empty(min(at_once, len(queries)), len(features))
    for strip in _chunks(range(len(queries)), at_once):
        here = slice(strip.start, strip.stop)
        products = torch.mm(queries[here].float(), others.T, out=buffer[: len(strip)])
        if skip is not None:
            products.scatter_(1, skip[here, None].long(), -torch.inf)
        best[here], index[here] = products.topk(count, dim=1)
        if strip.stop < len(queries):
            progress(strip.stop, len(queries))
    progress(len(queries), len(queries))
    return best, index


def without_itself(neighbors: Int[np.ndarray, "N S1"]) -> Int[np.ndarray, "N S"]:
    """Remove each image from its own neighbours, (N, S + 1) -> (N, S), by its number: a copy may stand before it."""
    itself = neighbors == np.arange(len(neighbors), dtype=np.int32)[:, None]
    itself[:, -1] |= ~itself.any(1)
    return neighbors[~itself].reshape(len(neighbors), -1)


def distinct(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find equal rows: (first (M,), copy_of (N,)), the first image of each group of equals and each image's group."""
    seen: dict[bytes, int] = {}
    digests = (blake2b(row.tobytes(), digest_size=16).digest() for row in np.asarray(features))
    copy_of = np.array([seen.setdefault(digest, len(seen)) for digest in digests])
    return np.unique(copy_of, return_index=True)[1], copy_of


def label_agreement(
    labels: Int[Tensor, " N"], neighbors: Int[Tensor, "R S"], rows: range | None = None
) -> Float[Tensor, " R"]:
    """Compute SPICE's eq. (6): the share of each image's neighbours that carry its label, for images `rows`."""
    own_labels = labels if rows is None else labels[rows.start : rows.stop]
    chunks = zip(own_labels.split(CHUNK), neighbors.split(CHUNK), strict=True)
    return torch.cat([(labels[index] == label[:, None]).float().mean(1) for label, index in chunks])


def nearest_by_index(
    features: Float[Tensor, "N D"],
    count: int,
    rows: range | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Int[Tensor, "R count"]:
    """Approximate `nearest` by an inverted file of faiss, for more rows than N^2 products allow, about 10 million.

    The unit rows of `features`, on the CPU, fall into 4 sqrt(N) lists (fewer for N below 25 000) by k-means on at most
    64 rows a list. A row is compared with the PROBES lists nearest to it. For clustered features 95 % of the true
    neighbours are found (tested), and all with as many probes as lists. Each worker builds the index of all rows.
    Memory beyond `features`: N (4 D + 8) + 256 D lists + 4 R count bytes. UserError if faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("to search by an index its library is needed: pip install faiss-cpu") from error
    rows = range(len(features)) if rows is None else rows
    _check_rows(features, rows)
    _check(features, count)
    # faiss has a pool of its own; torch's is idle meanwhile
    faiss.omp_set_num_threads(torch.get_num_threads())
    # faiss warns below 39 rows a list
    lists = max(1, min(round(4 * len(features) ** 0.5), len(features) // 39))
    index: Any = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(features.shape[1]), features.shape[1], lists, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.spherical, index.cp.max_points_per_centroid = True, 64
    sample = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[: 64 * lists]
    index.train(features[sample].float().numpy())
    for chunk in features.split(INDEX_CHUNK):
        index.add(chunk.float().contiguous().numpy())
    neighbors = torch.empty((len(rows), count), dtype=torch.int32)
    for chunk in _chunks(rows, INDEX_CHUNK):
        queries = features[chunk.start : chunk.stop].float().contiguous().numpy()
        index.nprobe = min(PROBES, lists)
        near = index.search(queries, count)[1]
        # faiss gives -1 where the lists hold fewer than `count` rows
        incomplete = (near < 0).any(1)
        if incomplete.any():
            index.nprobe = lists
            near[incomplete] = index.search(queries[incomplete], count)[1]
        neighbors[chunk.start - rows.start : chunk.stop - rows.start] = torch.from_numpy(near)
        progress(chunk.stop - rows.start, len(rows))
    return neighbors


def _chunks(rows: range, size: int) -> Iterator[range]:
    return (range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size))


def _check_rows(features: Float[Tensor, "N D"], rows: range) -> None:
    if rows.step != 1 or not 0 <= rows.start <= max(rows.start, rows.stop) <= len(features):
        raise ValueError(f"rows must be a consecutive part of the {len(features)} rows, not {rows}")


def _check(features: Float[Tensor, "N D"], count: int, spare: int = 0) -> None:
    if not 1 <= count <= len(features) - spare:
        raise ValueError(f"count must be between 1 and the {len(features) - spare} rows, not {count}")
    for chunk in features.split(CHUNK):
        # both are NaN if a feature is NaN; isfinite would make copies
        least, most = chunk.aminmax()
        if not (least.isfinite() and most.isfinite()):
            raise ValueError("features must be finite: a row that is not has no neighbours")
