"""Nearest neighbours by dot product. `nearest` is exact and blocked: memory linear in N, never N x N.

Scores come in tiles, a block of rows by a block of others. Two things make it fast. The matrix of scores is symmetric:
a tile serves its rows and, transposed, its columns. And a row that has found `count` others wants only what beats the
worst of them: one comparison with this floor leaves few scores of a tile, and only those are stored and sorted.
"""

import warnings
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spice_dist.errors import UserError

BLOCK = 2048  # rows of a tile: its scores, 16 MiB, stay in the cache of most CPUs
BLOCK_ROUGH = 1536  # in bfloat16, which holds more beside a tile
BLOCK_GPU = 16_384  # 1 GiB: a launch of kernels costs more than a product of small tiles


@torch.no_grad()
def nearest(
    features: Float[Tensor, "N D"],
    count: int,
    rows: range | None = None,
    precision: str = "fp32",
    block: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Int[Tensor, "R count"]:
    """The `count` rows of `features` of largest dot product with each of `rows`, best first; a row is its own too.

    Exact in every precision: the order is that of float32 products, rows of equal product in any order. "bf16" computes
    all products in bfloat16, keeps whatever may be among the best within the largest error these can have, and computes
    the products of those again; a row with too many of them, as in very tight clusters, is searched again in float32.
    On CPUs that are fast at bfloat16 it takes a fifth less time than "fp32" (60,000 rows of 512, AVX-512), and holds
    more.

    `rows` is a consecutive share of 0 .. N-1, all by default. Within the share a tile serves twice, so that one of W
    equal shares costs 1 - 1 / (2 W) of the products of its rows with all. Indices are int32, where `features` are.
    Memory beyond `features`, in bytes: R (28 count + 80) + 40 block^2; for "bf16" R (32 count + 350) + 2 N D +
    40 block^2, and 4 N D unless they are float32. `progress` gets (done, R) in rows' worth of work, R once, at the end.
    ValueError if `count` is not in 1 .. N, `rows` not in 0 .. N, a feature not finite, or `precision` unknown.
    """
    rows = range(len(features)) if rows is None else rows
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, not {precision!r}")
    rough = precision == "bf16"
    block = _block_of(features, BLOCK_ROUGH if rough else BLOCK) if block is None else block
    _check(features, count, block, rows)
    tile = _Tile(features.bfloat16() if rough else features, block)
    best = _Best(len(rows), count, features.device, 2 * _largest_error(features) if rough else 0.0)
    own = list(_blocks(rows, block))
    others = [*_blocks(range(rows.start), block), *_blocks(range(rows.stop, len(features)), block)]
    here = [slice(part.start - rows.start, part.stop - rows.start) for part in own]
    total, done = len(rows) * (len(features) - len(rows)) + len(rows) * (len(rows) + 1) // 2, 0
    # In sorted data a row's own block holds its likes: with these first, the floors are high from the beginning.
    for mine, part in zip(here, own, strict=True):
        best.take(mine, tile(part, part), part.start)
        done += len(part) * (len(part) + 1) // 2
    for number, part in enumerate(own):
        for later in range(number + 1, len(own)):
            scores = tile(part, own[later])
            best.offer(here[number], scores, own[later].start)
            best.offer(here[later], scores, part.start, transposed=True)
            done += scores.numel()
        for other in others:
            best.offer(here[number], tile(part, other), other.start)
            done += len(part) * len(other)
        if done < total:
            progress(len(rows) * done // total, len(rows))
    del tile  # its copy of the features makes room
    found = _exactly(features, rows, best, block) if rough else best.sorted(block)[1]
    progress(len(rows), len(rows))
    return found


@torch.no_grad()
def search(
    features: Float[Tensor, "N D"],
    queries: Float[Tensor, "M D"],
    count: int,
    skip: Int[Tensor, " M"] | None = None,
    block: int | None = None,
) -> tuple[Float[Tensor, "M count"], Int[Tensor, "M count"]]:
    """The `count` largest float32 dot products of each query with rows of `features`, best first, and the int32 rows.

    Row skip[i] of `features` is never found by query i; `count` is then at most N - 1. ValueError as in `nearest`.
    Memory beyond the arguments: M (28 count + 80) + 40 block^2 bytes.
    """
    block = _block_of(features) if block is None else block
    _check(features, count, block, spare=int(skip is not None))
    best = _Best(len(queries), count, features.device)
    tile = _Tile(features, block, queries)
    for part in _blocks(range(len(queries)), block):
        for other in _blocks(range(len(features)), block):
            scores = tile(part, other)
            if skip is not None:
                at = skip[part.start : part.stop] - other.start
                row = ((at >= 0) & (at < len(other))).nonzero()[:, 0]
                scores[row, at[row]] = -torch.inf
            best.offer(slice(part.start, part.stop), scores, other.start)
    return best.sorted(block)


def without_itself(neighbors: Int[np.ndarray, "N S1"]) -> Int[np.ndarray, "N S"]:
    """(N, S) of (N, S + 1): each image's others. A copy may stand before the image, so it is looked for by number."""
    itself = neighbors == np.arange(len(neighbors), dtype=np.int32)[:, None]
    itself[:, -1] |= ~itself.any(1)
    return neighbors[~itself].reshape(len(neighbors), -1)


def distinct(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first (M,), copy_of (N,)): the first image of each kind of equal rows, and every image's place among those."""
    seen: dict[bytes, int] = {}
    digests = (blake2b(row.tobytes(), digest_size=16).digest() for row in np.asarray(features))
    copy_of = np.array([seen.setdefault(digest, len(seen)) for digest in digests])
    return np.unique(copy_of, return_index=True)[1], copy_of


def label_agreement(
    labels: Int[Tensor, " N"], neighbors: Int[Tensor, "R S"], rows: range | None = None
) -> Float[Tensor, " R"]:
    """SPICE eq. (6): the share of an image's neighbours that carry its label; `neighbors` are those of `rows`."""
    own = labels if rows is None else labels[rows.start : rows.stop]
    parts = zip(own.split(BLOCK), neighbors.split(BLOCK), strict=True)
    return torch.cat([(labels[found] == label[:, None]).float().mean(1) for label, found in parts])


def nearest_by_index(
    features: Float[Tensor, "N D"],
    count: int,
    rows: range | None = None,
    probes: int = 64,
    chunk: int = 4096,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Int[Tensor, "R count"]:
    """`nearest` for more rows than N^2 products allow, about 10 million: approximate, by an inverted file of faiss.

    The unit rows of `features`, on the CPU, fall into 4 sqrt(N) lists (fewer for N below 25 000) by k-means on at most
    64 rows a list; a row is compared with those of the `probes` lists nearest to it. Of clustered features 95 % of the
    true neighbours are found (tested); with as many probes as lists, all. Each worker builds the index of all rows.
    Memory beyond `features`: N (4 D + 8) + 256 D lists + 4 R count bytes. UserError if faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("to search by an index its library is needed: pip install faiss-cpu") from error
    rows = range(len(features)) if rows is None else rows
    _check(features, count, chunk, rows)
    faiss.omp_set_num_threads(torch.get_num_threads())  # its own pool; one of the two works at a time
    lists = max(1, min(round(4 * len(features) ** 0.5), len(features) // 39))  # k-means wants 39 rows a list
    index: Any = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(features.shape[1]), features.shape[1], lists, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.spherical, index.cp.max_points_per_centroid = True, 64
    sample = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[: 64 * lists]
    index.train(features[sample].float().numpy())
    for part in features.split(chunk):
        index.add(part.float().contiguous().numpy())
    found = torch.empty((len(rows), count), dtype=torch.int32)
    for part in _blocks(rows, chunk):
        asked = features[part.start : part.stop].float().contiguous().numpy()
        index.nprobe = min(probes, lists)
        near = index.search(asked, count)[1]
        short = (near < 0).any(1)  # the lists held fewer than `count` rows
        if short.any():
            index.nprobe = lists
            near[short] = index.search(asked[short], count)[1]
        found[part.start - rows.start : part.stop - rows.start] = torch.from_numpy(near)
        progress(part.stop - rows.start, len(rows))
    return found


class _Tile:
    """float32 products of a block of rows, of `queries` or of `features` too, with a block of rows of `features`.

    They are in one buffer: the next call overwrites the last. The products of bfloat16 are rounded to it.
    """

    def __init__(self, features: Float[Tensor, "N D"], block: int, queries: Float[Tensor, "M D"] | None = None):
        self.others = features
        self.rows = features if queries is None else queries
        size = min(block, len(self.rows)) * min(block, len(features))
        self.room = torch.empty(size, device=features.device)
        self.rough = torch.empty(size if features.dtype == torch.bfloat16 else 0, device=features.device).bfloat16()

    def __call__(self, rows: range, others: range) -> Float[Tensor, "B C"]:
        shape = (len(rows), len(others))
        out = self.room[: shape[0] * shape[1]].view(shape)
        a, b = self.rows[rows.start : rows.stop], self.others[others.start : others.stop]
        if len(self.rough):
            return out.copy_(torch.mm(a, b.T, out=self.rough[: out.numel()].view(shape)))
        return torch.mm(a.float(), b.float().T, out=out)


def _block_of(features: Float[Tensor, "N D"], on_cpu: int = BLOCK) -> int:
    return on_cpu if features.device.type == "cpu" else BLOCK_GPU


def _largest_error(features: Float[Tensor, "N D"]) -> float:
    """Of the rounded product of two rounded rows. With u the roundings: |ab - a'b'| <= |u_a| |b| + |a'| |u_b|."""
    error = norm = 0.0
    for part in features.split(BLOCK):
        whole = part.float()
        error = max(error, float((whole - whole.bfloat16().float()).norm(dim=1).max()))
        norm = max(norm, float(whole.norm(dim=1).max()))
    sums = features.shape[1] * 2**-23  # float32 sums, of the rounded product and of the one it stands for
    return 1.01 * (error * (2 * norm + error) + (2**-9 + sums) * (norm + error) ** 2)


def _exactly(features: Float[Tensor, "N D"], rows: range, best: "_Best", block: int) -> Int[Tensor, "R count"]:
    """The best by float32 products among the candidates that `best` holds."""
    features = features.float()
    found = best.index.new_empty(len(rows), best.count)
    for part in _blocks(range(len(rows)), block):
        mine = slice(part.start, part.stop)
        held = best.scores[mine] > best.floor[mine, None]
        index = torch.where(held, best.index[mine], len(features)).sort(dim=1).values  # whose products: sparse rows
        held = index < len(features)
        ends = torch.nn.functional.pad(held.sum(1).cumsum(0), (1, 0))
        with warnings.catch_warnings(action="ignore"):  # torch calls its sparse rows a beta
            where = torch.sparse_csr_tensor(
                ends.int(), index[held], torch.zeros(int(ends[-1]), device=features.device),
                size=(len(part), len(features)), check_invariants=False,
            )  # fmt: skip
        left = features[rows.start + part.start : rows.start + part.stop]
        products = torch.sparse.sampled_addmm(where, left, features.T, beta=0.0).values()
        scores = torch.full(index.shape, -torch.inf, device=features.device).masked_scatter_(held, products)
        found[mine] = index.gather(1, scores.topk(best.count, dim=1).indices)
    for lost in best.lost.nonzero()[:, 0].split(block):
        if len(lost):
            found[lost] = search(features, features[rows.start + lost], best.count, block=block)[1]
    return found


class _Best:
    """Of all scores offered to each of R rows, at least the `count` best, and whose they are, unordered.

    With a `margin`, also whatever is less than it below the worst of these; a row with more than can be held is `lost`.
    """

    def __init__(self, rows: int, count: int, device: torch.device, margin: float = 0.0):
        self.count, self.margin = count, margin
        self.held = 2 * count + 32 if margin else count
        self.width = self.held + count + count // 2 + 8  # room for some more: not every offer is sorted
        self.scores = torch.full((rows, self.width), -torch.inf, device=device)
        self.index = torch.zeros((rows, self.width), dtype=torch.int32, device=device)
        self.filled = torch.zeros(rows, dtype=torch.long, device=device)
        self.floor = torch.full((rows,), -torch.inf, device=device)  # only better scores are wanted
        self.lost = torch.zeros(rows, dtype=torch.bool, device=device)

    def offer(self, rows: slice, scores: Float[Tensor, "B C"], first: int, transposed: bool = False) -> None:
        """Scores of `rows` with others `first`, `first` + 1, ...; `transposed` if the rows are the columns."""
        floor = self.floor[rows]
        at = _where(scores > (floor if transposed else floor[:, None]))
        score = scores.view(-1)[at]
        row, other = at // scores.shape[1], at % scores.shape[1]
        if transposed:
            row, order = other.sort()
            other, score = at[order] // scores.shape[1], score[order]
        added = torch.bincount(row, minlength=len(floor))
        if self._crowded(rows, added):
            self._keep(rows, self.scores[rows], self.index[rows])
            wanted = score > self.floor[rows][row]
            row, other, score = row[wanted], other[wanted], score[wanted]
            added = torch.bincount(row, minlength=len(floor))
            if self._crowded(rows, added):
                self.take(rows, scores.T.contiguous() if transposed else scores, first)
                return
        before = self.filled[rows] - added.cumsum(0) + added
        slot = before[row] + torch.arange(len(row), device=row.device)
        place = (row + rows.start) * self.width + slot
        self.scores.view(-1)[place] = score
        self.index.view(-1)[place] = (other + first).int()
        self.filled[rows] += added

    def take(self, rows: slice, scores: Float[Tensor, "B C"], first: int) -> None:
        """The same for a tile of which much is wanted: sorts all of it."""
        top, at = scores.topk(min(self.held, scores.shape[1]), dim=1, sorted=False)
        self.filled[rows] += top.shape[1]
        self._keep(rows, torch.cat([self.scores[rows], top], 1), torch.cat([self.index[rows], (at + first).int()], 1))

    def sorted(self, block: int) -> tuple[Float[Tensor, "R count"], Int[Tensor, "R count"]]:
        scores = self.scores.new_empty(len(self.scores), self.count)
        index = self.index.new_empty(len(self.index), self.count)
        for start in range(0, len(scores), block):
            rows = slice(start, start + block)
            scores[rows], at = self.scores[rows].topk(self.count, dim=1)
            index[rows] = self.index[rows].gather(1, at)
        return scores, index

    def _crowded(self, rows: slice, added: Int[Tensor, " B"]) -> bool:
        return bool((self.filled[rows] + added).max() > self.width)

    def _keep(self, rows: slice, scores: Float[Tensor, "B W"], index: Int[Tensor, "B W"]) -> None:
        best, at = scores.topk(self.held, dim=1)
        floor = best[:, self.count - 1] - self.margin
        self.index[rows, : self.held] = index.gather(1, at)
        self.scores[rows, : self.held] = best
        self.scores[rows, self.held :] = -torch.inf
        # Equal scores: the first `count` are enough, unless they are rough.
        self.filled[rows] = (best > floor[:, None]).sum(1) if self.margin else self.filled[rows].clamp(max=self.count)
        self.lost[rows] |= best[:, -1] > floor
        self.floor[rows] = floor


def _where(hits: Bool[Tensor, "B C"]) -> Int[Tensor, " n"]:
    """Flat positions of the true ones, ascending; they are few, so eight are passed over at a time."""
    flat = hits.view(-1)
    if len(flat) % 8:
        return flat.nonzero()[:, 0]
    words = flat.view(torch.int64).nonzero()[:, 0]
    at = flat.view(-1, 8).index_select(0, words).view(-1).nonzero()[:, 0]
    return words[at // 8] * 8 + at % 8


def _blocks(rows: range, block: int) -> Iterator[range]:
    return (range(start, min(start + block, rows.stop)) for start in range(rows.start, rows.stop, block))


def _check(features: Float[Tensor, "N D"], count: int, block: int, rows: range = range(0), spare: int = 0) -> None:
    if not 1 <= count <= len(features) - spare:
        raise ValueError(f"count must be between 1 and the {len(features) - spare} rows, not {count}")
    if rows.step != 1 or not 0 <= rows.start <= max(rows.start, rows.stop) <= len(features):
        raise ValueError(f"rows must be a consecutive part of the {len(features)} rows, not {rows}")
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}")
    for part in features.split(BLOCK):
        least, most = part.aminmax()  # both are NaN if any is; isfinite would make copies
        if not (least.isfinite() and most.isfinite()):
            raise ValueError("features must be finite: a row that is not has no neighbours")
