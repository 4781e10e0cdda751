"""How long training waits for a checkpoint, and how long it takes to be written beside training.

    python -m tests.bench.bench_checkpoint --megabytes 140      # a ResNet-18 with momentum, key network and queue

Prints the median of --times checkpoints: the time for which a step waits, the whole time of saving, the time between
checkpoints that follows from it, and which share of training the waiting is.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from spice_dist.distributed.checkpoint import Writer
from spice_dist.distributed.worker import BETWEEN_FAILURES, interval

TENSORS = 60


def measure(megabytes: float, times: int, folder: Path) -> tuple[float, float]:
    """Return the median seconds of waiting and of saving."""
    state = {"net": {f"{i}": torch.randn(int(megabytes * 1e6 / 4 / TENSORS)) for i in range(TENSORS)}}
    writer, waited, saved = Writer(folder, ""), [], []
    for step in range(times):
        began = time.perf_counter()
        writer.start(step, state, {"total": times})
        waited.append(time.perf_counter() - began)
        assert writer.wait() is None
        assert writer.seconds is not None
        saved.append(writer.seconds)
    return statistics.median(waited), statistics.median(saved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1.0, 140.0])
    parser.add_argument("--times", type=int, default=7)
    options = parser.parse_args()
    print("| MB | waited, ms | saved, ms | between checkpoints, s | share waited |\n|---|---|---|---|---|")
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            waited, saved = measure(megabytes, options.times, Path(folder))
        between = interval(saved, BETWEEN_FAILURES)
        cells = (f"{megabytes:g}", f"{1e3 * waited:.1f}", f"{1e3 * saved:.0f}", f"{between:.0f}")
        print(f"| {' | '.join(cells)} | {waited / between:.3%} |")


if __name__ == "__main__":
    main()
