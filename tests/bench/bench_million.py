"""How the time and the memory of every stage grow from ten thousand images to a million.

    python -m tests.bench.bench_million 10000 100000 --out runs/million
    python -m tests.bench.bench_million 10000 100000 1000000 --out runs/million --workers 2

Images are JPEGs of `--side` pixels in a parquet file: gratings of ten directions with noise, drawn from a seed. A small
network is trained on them for one epoch; then come features, neighbours by an index, stage 2 on the graph, reliable
labels, evaluation with report, and `predict` on as many images. Files that are there already are taken as they are.

GB is the largest memory of all processes while a stage runs, sampled every 0.2 s, pages that they share counted once.
The exponent is log(t / t') / log(N / N') of the last two numbers of images: 1 where the time grows as the number.
"""

import argparse
import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tests.bench.bench_photos import GB, tree_bytes

ROWS, CLASSES = 1_000, 10  # images of a row group
AFTER, PREDICT = "evaluation, report", "predict"
SETTINGS = {
    "stage2": "spice_graph",
    "stage3": "none",
    "graph.search": "index",
    "backbone.widths": "(8,8,16,16)",
    "moco.epochs": 1,
    "moco.batch": 256,
    "moco.queue": 4096,
}
Measured = dict[str, tuple[float, float]]  # stage: (seconds, bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=int, nargs="+", metavar="N", help="numbers of images, ascending")
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--workers", default="0", help="of Ray (default: none)")
    parser.add_argument("--out", type=Path, default=Path("runs/million"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    measured = {}
    for count in options.images:
        measured[count] = measure(count, options.side, options.workers, options.out)
        print("\n".join(table(measured)), flush=True)


def measure(count: int, side: int, workers: str, out: Path) -> Measured:
    """Run `fit` and `predict` on `count` images in a new folder."""
    data, run = out / f"{count}-{side}.parquet", out / f"run-{count}-{side}-{workers}"
    if not data.exists():
        write_images(data, count, side)
    if run.exists():
        sys.exit(f"bench_million: {run} is there already; remove it, or give another --out")
    settings = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    fit = ["fit", str(data), "--recipe", "photos", "--backbone", "scratch", "--clusters", str(CLASSES)]
    stages = watched([*fit, "--set", f"data.size={side}", *settings, "--workers", workers, "--out", str(run)], run, out)
    predicted = watched(["predict", str(run), str(data), "--out", str(out / "predicted.csv")], None, out)
    return stages | predicted


def write_images(path: Path, count: int, side: int) -> None:
    """Write the parquet file: a column `image` of JPEGs, in row groups of ROWS."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rng, grid = np.random.default_rng(0), np.indices((side, side)) / side
    schema = pa.schema([("image", pa.binary())])
    part = path.with_suffix(".part")
    with parquet.ParquetWriter(part, schema) as writer:
        for start in tqdm(range(0, count, ROWS), desc="images", unit_scale=ROWS):
            rows = min(ROWS, count - start)
            angle = np.pi * rng.integers(CLASSES, size=rows) / CLASSES + rng.normal(0, 0.03, rows)
            direction = np.stack([np.sin(angle), np.cos(angle)], 1)
            phase = np.tensordot(direction, grid, 1) * 8 * np.pi + rng.uniform(0, 2 * np.pi, (rows, 1, 1))
            grey = 128 + 80 * np.sin(phase) + rng.normal(0, 20, phase.shape)
            pixels = grey[..., None] * rng.uniform(0.6, 1, (rows, 1, 1, 3))
            images = [encoded(image) for image in pixels.clip(0, 255).astype(np.uint8)]
            writer.write_table(pa.table({"image": images}, schema))
    part.rename(path)


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=90)
    return file.getvalue()


def watched(command: list[str], run: Path | None, out: Path) -> Measured:
    """Call `spice-dist`; return the seconds and the largest memory by stage of `run`, or of the whole command."""
    samples: list[tuple[str, float, float]] = []
    with open(out / "log.txt", "ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "spice_dist", *command], stdout=log, stderr=log)
        while process.poll() is None:
            samples.append((stage_now(run), time.monotonic(), tree_bytes(process.pid)))
            time.sleep(0.2)
    if process.returncode:
        sys.exit(f"bench_million: spice-dist {command[0]} ended with {process.returncode}; see {out / 'log.txt'}")
    samples.append((samples[-1][0], time.monotonic(), 0.0))
    result: Measured = {}
    for (stage, began, memory), (_, ended, _) in zip(samples, samples[1:], strict=False):
        seconds, most = result.get(stage, (0.0, 0.0))
        result[stage] = seconds + ended - began, max(most, memory)
    return result


def stage_now(run: Path | None) -> str:
    """Return the stage that is not done; before the first "start"; after the last AFTER."""
    if run is None:
        return PREDICT
    records = []
    for path in run.glob("*/stage.json"):
        try:
            records.append((path.parent.name, json.loads(path.read_text())["done"]))
        except (OSError, ValueError, KeyError):  # it is written at this moment
            continue
    if not records:
        return "start"
    return next((name for name, done in records if not done), AFTER)


def table(measured: dict[int, Measured]) -> list[str]:
    """Format as Markdown: a row for each stage, in order, and the sum."""
    counts = list(measured)
    lines = [
        "| |" + "".join(f" {count:,}: s | GB |" for count in counts) + " exponent |",
        "|---" * (2 * len(counts) + 2) + "|",
    ]
    for stage in measured[counts[-1]]:
        cells = [measured[count].get(stage, (0.0, 0.0)) for count in counts]
        lines.append(
            f"| {stage} |" + "".join(f" {s:.1f} | {b / GB:.2f} |" for s, b in cells) + f" {exponent(counts, cells)} |"
        )
    sums = [(sum(s for s, _ in each.values()), max(b for _, b in each.values())) for each in measured.values()]
    lines.append("| all |" + "".join(f" {s:.1f} | {b / GB:.2f} |" for s, b in sums) + f" {exponent(counts, sums)} |")
    return lines


def exponent(counts: list[int], cells: list[tuple[float, float]]) -> str:
    if len(counts) < 2 or min(cells[-2][0], cells[-1][0]) < 1:
        return ""
    return f"{math.log(cells[-1][0] / cells[-2][0]) / math.log(counts[-1] / counts[-2]):.2f}"


if __name__ == "__main__":
    main()
