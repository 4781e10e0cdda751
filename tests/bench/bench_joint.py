"""Stage 3 against the bare network and against a plain FixMatch step, on the same images and cores. Prints tables.

    python -m tests.bench.bench_joint --cifar DIR       DIR/cifar10.npz: train_images (50000, 32, 32, 3) uint8

A step is 64 labelled and 448 other images of 32 pixels, WRN-28-2. The bare passes: forward and backward of its 960
views, random numbers. Ours: `spice_semi.train` as it is, loader, augmentation, optimizer and averaging included, with
weak views in the batch, as published, and apart. The peer: the step as FixMatch describes it, with what PyTorch and
Pillow offer: a DataLoader for each of the two streams, a weak and a strong transform of every image, one forward pass
of all views, SGD, and an average of the network's state kept tensor by tensor. It has the same network. Each part in a
process of its own, in turn, `--rounds` times.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from spice_dist.config import Config, override
from spice_dist.data.augment import GREY
from spice_dist.data.dataset import DataConfig
from spice_dist.data.files import publish_json
from spice_dist.data.ingest import ingest
from spice_dist.data.sources import from_array
from spice_dist.data.views import IMAGENET_MEAN, IMAGENET_STD
from spice_dist.distributed.worker import usable_cores
from spice_dist.methods import spice_semi
from spice_dist.methods.plumbing import autocast, place
from spice_dist.models.heads import ClusterNet, LinearNet
from spice_dist.models.momentum import slow_copy
from spice_dist.models.split_batch_norm import forget_statistics
from tests.bench.bench_pretrain import CPU, Stopwatch

SIDE, LABELLED, RATIO, CLUSTERS = 32, 64, 7, 10
IMAGES = LABELLED * (1 + RATIO)  # of a step
VIEWS = LABELLED * (1 + 2 * RATIO)
KEPT = 10_000  # images of the data set; a tenth of them has a label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4, help="counted ones, after two that are not")
    parser.add_argument("--rounds", type=int, default=3, help="of all parts in turn; the median counts")
    parser.add_argument("--groups", type=int, default=1, help="BatchNorm groups of a step, and of the bare passes")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--part", choices=PARTS, help="time this one alone, print JSON")
    parser.add_argument("--skip-peer", action="store_true", help="only the step against the bare network")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    if options.part:
        (options.precision,) = options.precision
        print(json.dumps(statistics.median(PARTS[options.part](options))))
        return
    sizes = f"WRN-28-2, {SIDE} px, {LABELLED} + {IMAGES - LABELLED} images"
    print(f"{usable_cores()} cores, {sizes}, {options.groups} BatchNorm groups; wanted: 1.15 of bare, 2 of fixmatch\n")
    names = [name for name in PARTS if not (options.skip_peer and name == "fixmatch")]
    variants = [(name, precision) for precision in options.precision for name in names]
    seconds: dict[tuple[str, str], list[float]] = {variant: [] for variant in variants}
    for _ in range(options.rounds):
        for variant in variants:
            seconds[variant].append(in_a_process(*variant, options))
    found = {variant: statistics.median(values) for variant, values in seconds.items()}
    print(f"{'':<24}{'s / step':>10}{'images/s':>10}{'time / bare':>14}{'speed / fixmatch':>18}")
    for name, precision in variants:
        took = found[name, precision]
        peer = f"{found['fixmatch', precision] / took:.2f}" if "fixmatch" in names else ""
        row = f"{took:>10.2f}{IMAGES / took:>10.1f}{took / found['bare', precision]:>14.2f}{peer:>18}"
        print(f"{name + ', ' + precision:<24}{row}")


def in_a_process(name: str, precision: str, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "tests.bench.bench_joint", "--cifar", str(options.cifar), "--part", name]
    command += ["--steps", str(options.steps), "--groups", str(options.groups), "--precision", precision]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def config(options: argparse.Namespace) -> Config:
    return Config(
        clusters=CLUSTERS,
        bn_groups=options.groups,
        precision=options.precision,
        data=DataConfig(size=SIDE),
        spice_semi=spice_semi.SpiceSemiConfig(steps=options.steps + 2, network="wrn_28_2"),
    )


def network(settings: Config) -> ClusterNet | LinearNet:
    task = spice_semi.network_task(settings, settings.spice_semi)
    return spice_semi.new_network(task, settings.spice_semi, Path())


def cifar(options: argparse.Namespace) -> np.ndarray:
    return np.load(options.cifar / "cifar10.npz")["train_images"][:KEPT]


def labels() -> np.ndarray:
    """Any will do: a tenth of the images has one."""
    found = np.full(KEPT, spice_semi.UNRELIABLE)
    found[: KEPT // 10] = np.arange(KEPT // 10) % CLUSTERS
    return found


# ---------------------------------------------------------------- the step


def time_bare(options: argparse.Namespace) -> list[float]:
    """Forward and backward of the trained network over all views of a step, one BatchNorm group at a time."""
    torch.manual_seed(0)
    net = place(network(config(options)), CPU).train()
    views = torch.randn(options.groups, VIEWS // options.groups, 3, SIDE, SIDE)
    times = [time.perf_counter()]
    for _ in range(options.steps + 2):
        for part in views:
            with autocast(CPU, options.precision):
                loss = net(part).sum()
            loss.backward()
        net.zero_grad()
        forget_statistics(net)
        times.append(time.perf_counter())
    return np.diff(times).tolist()[2:]


def time_ours(options: argparse.Namespace, weak_apart: bool = False) -> list[float]:
    settings = override(config(options), {"spice_semi.weak_apart": weak_apart})
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run = Path(folder)
        ingest(from_array(cifar(options)), run / "data", size=SIDE, jpeg_side=SIDE)
        (run / "reliable").mkdir()
        np.save(run / "reliable/labels.npy", labels())
        publish_json(run / "reliable/summary.json", {})
        watch = Stopwatch(run)
        spice_semi.train(settings, settings.spice_semi, watch)
        return watch.seconds()[1:]


# ---------------------------------------------------------------- the peer


class WeakAndStrong(Dataset):
    """(weak view, strong view, label) of an image; only the weak one for labelled images."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, strong: bool):
        self.images, self.labels, self.strong = images, labels, strong

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = Image.fromarray(self.images[index]), torch.tensor(self.labels[index])
        weak = normalized(moved(image))
        return (weak, normalized(moved(rand_augment(image))), label) if self.strong else (weak, label)


def moved(image: Image.Image) -> Image.Image:
    """A flip with probability 1/2, and a crop after padding by 4 black pixels."""
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    left, top = random.randint(0, 8), random.randint(0, 8)
    return ImageOps.expand(image, 4).crop((left, top, left + SIDE, top + SIDE))


def normalized(image: Image.Image) -> Tensor:
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def rand_augment(image: Image.Image) -> Image.Image:
    """Three of the 14 operations, then a grey square."""
    for _ in range(3):
        image = random.choice(list(OPERATIONS.values()))(image, random.random(), random.choice((-1, 1)))
    side = random.uniform(0, 0.5) * SIDE
    x, y = random.uniform(0, SIDE), random.uniform(0, SIDE)
    corners = (max(0, x - side / 2), max(0, y - side / 2), min(SIDE, x + side / 2), min(SIDE, y + side / 2))
    image = image.copy()
    ImageDraw.Draw(image).rectangle(corners, tuple(round(255 * value) for value in GREY))
    return image


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda x, u, sign: x,
    "autocontrast": lambda x, u, sign: ImageOps.autocontrast(x),
    "equalize": lambda x, u, sign: ImageOps.equalize(x),
    "brightness": lambda x, u, sign: ImageEnhance.Brightness(x).enhance(0.05 + 0.9 * u),
    "color": lambda x, u, sign: ImageEnhance.Color(x).enhance(0.05 + 0.9 * u),
    "contrast": lambda x, u, sign: ImageEnhance.Contrast(x).enhance(0.05 + 0.9 * u),
    "sharpness": lambda x, u, sign: ImageEnhance.Sharpness(x).enhance(0.05 + 0.9 * u),
    "posterize": lambda x, u, sign: ImageOps.posterize(x, 4 + int(4 * u)),
    "solarize": lambda x, u, sign: ImageOps.solarize(x, int(256 * u)),
    "rotate": lambda x, u, sign: x.rotate(30 * u * sign),
    "shear_x": lambda x, u, sign: affine(x, 1, 0.3 * u * sign, 0, 0, 1, 0),
    "shear_y": lambda x, u, sign: affine(x, 1, 0, 0, 0.3 * u * sign, 1, 0),
    "translate_x": lambda x, u, sign: affine(x, 1, 0, 0.3 * u * sign * SIDE, 0, 1, 0),
    "translate_y": lambda x, u, sign: affine(x, 1, 0, 0, 0, 1, 0.3 * u * sign * SIDE),
}


def time_fixmatch(options: argparse.Namespace) -> list[float]:
    torch.manual_seed(0)
    net = network(replace(config(options), bn_groups=1)).train()
    average = slow_copy(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.03, momentum=0.9, weight_decay=5e-4, nesterov=True)
    images, known = cifar(options), labels()
    reliable = known >= 0
    taught = endless(WeakAndStrong(images[reliable], known[reliable], strong=False), LABELLED, options)
    others = endless(WeakAndStrong(images, known, strong=True), IMAGES - LABELLED, options)
    times = [time.perf_counter()]
    for _ in range(options.steps + 2):
        view, label = next(taught)
        weak, strong, _ = next(others)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            logits = net(torch.cat([view, weak, strong]))
        on_view, on_weak, on_strong = logits.float().split([LABELLED, len(weak), len(strong)])
        confidence, target = on_weak.detach().softmax(1).max(1)
        each = F.cross_entropy(on_strong, target, reduction="none")
        loss = F.cross_entropy(on_view, label) + (each * (confidence >= 0.95)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        forget_statistics(net)
        with torch.no_grad():
            now = net.state_dict()
            for name, value in average.state_dict().items():
                value.copy_(0.999 * value + 0.001 * now[name] if value.is_floating_point() else now[name])
        times.append(time.perf_counter())
    return np.diff(times).tolist()[2:]


def endless(data: Dataset, batch: int, options: argparse.Namespace) -> Iterator[list[Tensor]]:
    """Batches drawn with replacement, by as many processes as there are cores for both streams together."""
    sampler = RandomSampler(data, replacement=True, num_samples=batch * (options.steps + 2))  # pyright: ignore[reportArgumentType]
    return iter(DataLoader(data, batch, sampler=sampler, num_workers=max(1, usable_cores() // 2)))


PARTS: dict[str, Callable[[argparse.Namespace], list[float]]] = {
    "bare": time_bare,
    "ours": time_ours,
    "ours, weak apart": partial(time_ours, weak_apart=True),
    "fixmatch": time_fixmatch,
}


if __name__ == "__main__":
    main()
