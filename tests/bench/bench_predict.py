"""What `predict` costs beside the network's forward passes alone.

    python -m tests.bench.bench_predict DIR --images 10000 --width 16

DIR holds CIFAR-10 as `cifar10.npz` with test_images, and as class folders of PNG files in `cifar10/test`. The network
is a ResNet-18 for 32 pixels whose first stage has `width` channels, of random weights: the time does not depend on
them. The bare passes take batches that lie ready on the device.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--images", type=int, default=10_000)
    options.add_argument("--width", type=int, default=16)
    given = options.parse_args()
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
