"""The 100 nearest neighbours of every row against scikit-learn's and faiss' exact searches. Prints tables of ratios.

    python -m tests.bench.bench_neighbors [--full]

60 000 x 512 unit rows in clusters, like the features of stage 1, and without any, on the same cores, each search in a
process of its own: the best of `--repeats` times, and the largest resident memory over what there was with the
features loaded. All must find the same. Then 1 281 167 x 128, the features of ImageNet behind stage 1's
projection: the search of all, stopped after a share, and the time of the whole from that.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from spice_dist.distributed.worker import usable_cores
from spice_dist.neighbors import nearest, nearest_by_index

N, DIM, COUNT = 60_000, 512, 100
LARGE_N, LARGE_DIM, LARGE_SHARE = 1_281_167, 128, 0.02


def by_sklearn(metric: str) -> Callable[[Tensor], np.ndarray]:
    def search(features: Tensor) -> np.ndarray:
        from sklearn.neighbors import NearestNeighbors

        fitted = NearestNeighbors(n_neighbors=COUNT, algorithm="brute", metric=metric, n_jobs=-1).fit(features.numpy())
        return fitted.kneighbors(return_distance=True, X=features.numpy())[1]

    return search


def by_faiss(features: Tensor) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(usable_cores())
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features.numpy())
    return index.search(features.numpy(), COUNT)[1]


SEARCHES = {
    "sklearn, euclidean": by_sklearn("euclidean"),
    "faiss IndexFlatIP": by_faiss,
    "ours": lambda features: nearest(features, COUNT).numpy(),
    "sklearn, cosine": by_sklearn("cosine"),
    "ours, faiss IVF": lambda features: nearest_by_index(features, COUNT).numpy(),
}
PEERS = ("sklearn, euclidean", "faiss IndexFlatIP")
APPROXIMATE = ("ours, faiss IVF",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("small", "large"), help="one of the two tables")
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--data", nargs="+", choices=("clusters", "random"), default=["clusters", "random"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="all rows of the large set")
    parser.add_argument("--one", nargs=2, metavar=("SEARCH", "DATA"), help="time this one alone, print JSON")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    if options.one:
        name, data = options.one
        print(json.dumps(time_one(name, data, options.repeats)))
        return
    print(f"{usable_cores()} cores, torch {torch.__version__}, top {COUNT}\n")
    if options.only != "large":
        for data in options.data:
            bench_small(data, options.searches, options.repeats)
    if options.only != "small":
        bench_large(options.full)


def rows_of(data: str, n: int, dim: int) -> Tensor:
    """Unit rows: ten Gaussians, each spread over few directions, or one Gaussian at 0."""
    generator = torch.Generator().manual_seed(0)
    if data == "random":
        return F.normalize(torch.randn(n, dim, generator=generator), dim=1)
    features = torch.randn(n, dim, generator=generator)
    features *= torch.arange(1, dim + 1) ** -0.5  # as of a trained network: a few directions hold most of the variance
    features *= dim**0.5 / features.norm(dim=1).mean()
    features += torch.randn(10, dim, generator=generator)[torch.randint(10, (n,), generator=generator)]
    return F.normalize(features, dim=1, out=features)


# ---------------------------------------------------------------- against the peers


def bench_small(data: str, searches: list[str], repeats: int) -> None:
    print(f"{f'{N} x {DIM}, {data}':<28}{'s':>8}{'extra MB':>10}{'sklearn/it':>12}{'faiss/it':>10}{'agree':>9}")
    seconds: dict[str, float] = {}
    for name in searches:
        found = in_a_process(name, data, repeats)
        seconds[name] = found["seconds"]
        ratios = [
            seconds.get(peer, float("nan")) / seconds[name] for peer in ("sklearn, euclidean", "faiss IndexFlatIP")
        ]
        row = f"{seconds[name]:>8.1f}{found['extra'] / 1e6:>10.0f}{ratios[0]:>12.2f}{ratios[1]:>10.2f}"
        print(f"{name:<28}{row}{found['recall']:>9.4f}", flush=True)
        if found["recall"] < 1 and name not in APPROXIMATE:
            raise SystemExit(f"{name} does not find the nearest")
    print()


def in_a_process(name: str, data: str, repeats: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.bench_neighbors", "--one", name, data, "--repeats", str(repeats)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1])


def time_one(name: str, data: str, repeats: int) -> dict[str, float]:
    features = rows_of(data, N, DIM)
    torch.mm(features[:64], features[:64].T)  # threads and libraries are there before the memory is taken
    seconds, extra = [], 0
    found = np.empty(0)
    for _ in range(repeats):
        found, elapsed, peak = measured(lambda: SEARCHES[name](features))
        seconds.append(elapsed)
        extra = max(extra, peak)
    return {"seconds": min(seconds), "extra": extra, "recall": recall(features, torch.from_numpy(found).long())}


def measured(work: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, int]:
    """(what it returns, seconds, largest resident bytes over those at the start)."""
    process = psutil.Process()
    base = peak = process.memory_info().rss
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    found = work()
    elapsed = time.perf_counter() - start
    over.set()
    thread.join()
    return found, elapsed, peak - base


def recall(features: Tensor, found: Tensor) -> float:
    """Of 1000 rows, the share of distinct found ones not worse than the last of the true ones, up to 1e-6: ties."""
    rows = torch.arange(0, len(features), len(features) // 1000)
    scores = features[rows].double() @ features.double().T
    last = scores.topk(COUNT, dim=1).values[:, -1:]
    right = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, found[rows], True) & (scores >= last - 1e-6)
    return min(1.0, float(right.sum() / (len(rows) * COUNT)))


# ---------------------------------------------------------------- ImageNet's size


class Enough(Exception):
    pass


def bench_large(full: bool) -> None:
    """The search itself, stopped after the first strips."""
    features, share = rows_of("clusters", LARGE_N, LARGE_DIM), 0.0

    def progress(done: int, total: int) -> None:
        nonlocal share
        share = done / total
        if share >= LARGE_SHARE and not full:
            raise Enough

    def work() -> np.ndarray:
        try:
            return nearest(features, COUNT, progress=progress).numpy()
        except Enough:
            return np.empty(0)

    _, elapsed, extra = measured(work)
    print(f"{LARGE_N} x {LARGE_DIM}: {100 * share:.1f} % of the work in {elapsed:.0f} s;")
    print(f"{extra / 1e9:.1f} GB, {(extra + 4 * features.numel()) / 1e9:.1f} GB with the features (wanted: 8)")
    if not full:
        print(f"EXTRAPOLATED, not measured: {elapsed / share / 60:.0f} minutes for the whole")


if __name__ == "__main__":
    main()
