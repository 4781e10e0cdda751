"""What `predict` costs beside the network's forward passes alone, and what it gains by workers.

    python -m tests.bench.bench_predict DIR --images 10000 --width 16
    python -m tests.bench.bench_predict DIR --workers 0 1 2

DIR holds CIFAR-10 as `cifar10.npz` with test_images, and as class folders of PNG files in `cifar10/test`. The network
is a ResNet-18 for 32 pixels whose first stage has `width` channels, of random weights: the time does not depend on
them. The bare passes take batches that lie ready on the device.

With `--workers` DIR is any folder of images, and each number is a call of the command: images per second, by the time
in which its bar is shown and by that of the whole call, and the largest resident memory of the command's process and
of a worker, without the decoding processes.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch

from spice_dist import predicting
from spice_dist.data.dataset import DataConfig, open_data
from spice_dist.data.images import chunk_of
from spice_dist.data.sources import Source, from_array
from spice_dist.inference import outputs_of
from spice_dist.model_folder import load_model, save_model
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.task import Task


def model(folder: Path, width: int) -> None:
    widths = tuple(width * 2**stage for stage in range(4))
    task = Task(clusters=10, data=DataConfig(size=32), backbone=BackboneConfig(stem="small", widths=widths))
    backbone = Backbone(task.backbone, 3, 32)
    save_model(ClusterNet(backbone, ClusterHeads(1, backbone.dim, 10)), task, folder)


def bare(folder: Path, images: np.ndarray) -> None:
    """Forward passes alone, of pixels that lie ready."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, task = load_model(folder, device)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    batches = zip(pixels.split(chunk_of(32)), torch.arange(len(pixels)).split(chunk_of(32)), strict=True)
    for _, out in outputs_of(net, batches, task.backbone.statistics):
        out.softmax(1).cpu()


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def first(source: Source, count: int) -> Source:
    return replace(source, paths=source.paths[:count])


def on_workers(model: Path, images: Path, workers: int) -> str:
    """Call the command; return a line about its speed and memory."""
    with tempfile.TemporaryDirectory() as place:
        arguments = ["predict", str(model), str(images), "--out", f"{place}/new.csv", "--workers", str(workers)]
        began = time.perf_counter()
        with open(f"{place}/printed", "w") as printed:
            process = psutil.Popen([sys.executable, "-m", "spice_dist", *arguments], stderr=printed, stdout=printed)
            driver = worker = 0
            while process.poll() is None:
                with suppress(psutil.Error):
                    driver = max(driver, process.memory_info().rss)
                    children = [each for each in process.children(recursive=True) if "MapWorker" in each.name()]
                    worker = max([worker, *(each.memory_info().rss for each in children)])
                time.sleep(0.2)
        spent = time.perf_counter() - began
        minutes, shown = re.findall(r"predict .*100%.*\[(\d+):(\d+)<", Path(f"{place}/printed").read_text())[-1]
        rows = len(Path(f"{place}/new.csv").read_text().splitlines()) - 1
    shown = max(1, 60 * int(minutes) + int(shown))
    return (
        f"{workers:>7} {rows / shown:>12.0f} {rows / spent:>12.0f} {driver / 1e6:>10.0f} MB "
        f"{f'{worker / 1e6:.0f} MB' if worker else '-':>10}"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--images", type=int, default=10_000)
    options.add_argument("--width", type=int, default=16)
    options.add_argument("--workers", type=int, nargs="+")
    given = options.parse_args()
    if given.workers:
        with tempfile.TemporaryDirectory() as folder:
            model(Path(folder), given.width)
            print("workers  images/s in the bar / whole call     command     worker")
            for workers in given.workers:
                print(on_workers(Path(folder), given.folder, workers), flush=True)
        return
    images = np.load(given.folder / "cifar10.npz")["test_images"][: given.images]
    files = first(open_data(str(given.folder / "cifar10/test")), given.images)
    with tempfile.TemporaryDirectory() as folder:
        model(Path(folder), given.width)
        bare(Path(folder), images[:512])
        alone = seconds(lambda: bare(Path(folder), images))
        print(f"{len(images)} images, width {given.width}, {torch.get_num_threads()} threads")
        print(f"bare forward    {alone:6.1f} s")
        for title, source in {"array": from_array(images), "PNG files": files}.items():
            spent = seconds(lambda source=source: predicting.predict(Path(folder), source))
            print(f"{title:<15} {spent:6.1f} s   {spent / alone:.2f} of the bare forward")
        again = seconds(lambda: bare(Path(folder), images))
        print(f"bare forward    {again:6.1f} s, again")


if __name__ == "__main__":
    main()
