"""The data path against its peers, on the same images, cores and work, in one run. Prints a table of ratios.

    python -m tests.bench.bench_loader --cifar DIR       DIR/cifar10.npz: train_images (50000, 32, 32, 3) uint8

Peers: torchvision v2 transforms in a torch DataLoader with as many worker processes as there are cores, which is how
the usual self-supervised trainers load; stock FFCV for decoding and cropping alone; Pillow for reading files. Every
figure is the median of `--repeats` passes, peer and ours in turn, after one that does not count.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from spice_dist.data import beton
from spice_dist.data.augment import view_batches
from spice_dist.data.beton_writer import BetonWriter
from spice_dist.data.crops import Crop
from spice_dist.data.ingest import ingest
from spice_dist.data.loaders import open_images
from spice_dist.data.packed import PackedImages
from spice_dist.data.pillow_decoder import PillowDecoder
from spice_dist.data.sources import from_array, open_source
from spice_dist.data.torchvision_decoder import TorchvisionDecoder
from spice_dist.data.views import MOCO_V2
from spice_dist.distributed.worker import usable_cores

CPU = torch.device("cpu")
PHOTO_SIDES = (400, 500)  # height, width
PARTS = ("ingest", "small", "photos", "verify", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument(
        "--photos", type=int, default=3_000, help="JPEG photos to make and ingest; a fifth of them is loaded"
    )
    parser.add_argument("--small", type=int, default=5_000, help="CIFAR-10 images to load")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        root = Path(folder)
        files = make_photos(root / "photos", options.photos)
        cifar = np.load(options.cifar / "cifar10.npz")["train_images"][: options.small]
        print(f"{usable_cores()} cores, {len(cifar)} images of 32 px, {len(files)} photos of {PHOTO_SIDES}\n")
        print(f"{'':<44}{'peer/s':>10}{'ours/s':>10}{'ratio':>8}{'wanted':>8}")
        if {"photos", "memory"} & set(options.parts):
            ingest(open_source(str(root / "photos")), root / "jpg", size=224, jpeg_side=400, format="jpg")
        parts = {
            "ingest": partial(bench_ingest, root, files, options.repeats),
            "small": partial(bench_small, root, cifar, options.repeats),
            "photos": partial(bench_photos, root, options.repeats),
            "verify": partial(bench_verify, root),
            "memory": partial(bench_memory, root),
        }
        for part in PARTS:
            if part in options.parts:
                parts[part]()


def row(name: str, count: int, peer: Callable[[], Any], ours: Callable[[], Any], repeats: int, wanted: float) -> None:
    """Both in turn, so that a machine that slows down slows both."""
    seconds: dict[str, list[float]] = {"peer": [], "ours": []}
    for number in range(repeats + 1):
        for who, work in (("peer", peer), ("ours", ours)):
            started = time.perf_counter()
            work()
            if number:
                seconds[who].append(time.perf_counter() - started)
    slow, fast = (count / statistics.median(seconds[who]) for who in ("peer", "ours"))
    ratio = statistics.median(p / o for p, o in zip(seconds["peer"], seconds["ours"], strict=True))
    print(f"{name:<44}{slow:>10.0f}{fast:>10.0f}{ratio:>8.2f}{wanted:>8.2f}", flush=True)


def make_photos(folder: Path, count: int) -> list[Path]:
    """Random parts of two real photographs, as JPEG files of about 400x500 pixels."""
    from sklearn.datasets import load_sample_images

    height, width = PHOTO_SIDES
    folder.mkdir()
    whole = [Image.fromarray(image).resize((1280, 854)) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        left, top = int(rng.integers(0, 1280 - width)), int(rng.integers(0, 854 - height))
        part = whole[number % 2].crop((left, top, left + width, top + height))
        files.append(folder / f"{number:05d}.jpg")
        part.save(files[-1], quality=90)
    return files


def drain(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


# ---------------------------------------------------------------- reading files


def decode(file: Path) -> None:
    Image.open(file).convert("RGB")


def reduce_jpeg(file: Path) -> bytes:
    image, out = Image.open(file).convert("RGB"), io.BytesIO()
    scale = 256 / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.BILINEAR).save(out, "JPEG", quality=90)
    return out.getvalue()


def reduce_square(file: Path) -> bytes:
    image = Image.open(file).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((224, 224), Image.Resampling.BILINEAR, (left, top, left + side, top + side)).tobytes()


def bench_ingest(root: Path, files: list[Path], repeats: int) -> None:
    """Reading, checking, hashing and packing against Pillow over as many processes: its bare decoding, and its
    decoding with the same change of size and format, the results sent to this process."""
    source = open_source(str(files[0].parent))
    cores = usable_cores()

    def peer(work: Callable[[Path], Any]) -> None:
        with ProcessPoolExecutor(cores) as pool:
            drain(pool.map(work, files, chunksize=16))

    def ours(format: str, jpeg_side: int = 256) -> None:
        with tempfile.TemporaryDirectory(dir=root) as out:
            ingest(source, Path(out), size=224, jpeg_side=jpeg_side, format=format, workers=cores)

    kept, small, squares = partial(ours, "jpg", 400), partial(ours, "jpg"), partial(ours, "raw")
    for name, work, mine in (
        ("ingest, kept as they are / decoding", decode, kept),
        ("ingest, JPEG of 256 px / decoding", decode, small),
        ("ingest, JPEG of 256 px / the same", reduce_jpeg, small),
        ("ingest, raw 224 px / decoding", decode, squares),
        ("ingest, raw 224 px / the same", reduce_square, squares),
    ):
        row(name, len(files), partial(peer, work), mine, repeats, 1.0)


# ---------------------------------------------------------------- two views


def two_views(size: int) -> Callable[[Image.Image], list[torch.Tensor]]:
    """MoCo-v2's views in torchvision."""
    from torchvision.transforms import v2

    view = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(23 if size > 64 else 5, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return lambda image: [view(image), view(image)]


class TorchvisionPairs(torch.utils.data.Dataset):
    """Two views of each image: of an array, as torchvision's CIFAR10 holds it, or of files."""

    def __init__(self, images: Any, size: int):
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        item = self.images[index]
        image = Image.open(item).convert("RGB") if isinstance(item, Path) else Image.fromarray(item)
        return two_views(self.size)(image)


def torchvision_loader(images: Any, size: int, batch: int) -> Any:
    return torch.utils.data.DataLoader(
        TorchvisionPairs(images, size), batch, shuffle=True, num_workers=usable_cores(), persistent_workers=True
    )


def our_pairs(images: Any, n: int, batch: int, epoch: list[int]) -> None:
    epoch[0] += 1
    order = np.random.default_rng(epoch[0]).permutation(n)
    drain(view_batches(images, order, batch, [(MOCO_V2, (0, epoch[0], stream)) for stream in (0, 1)]))


def bench_small(root: Path, cifar: np.ndarray, repeats: int) -> None:
    ingest(from_array(cifar), root / "cifar", size=32, jpeg_side=32)
    peer = torchvision_loader(cifar, 32, 256)
    for kind, options in (("kept in memory", {}), ("FFCV", {"resident_bytes": 0, "loader": "ffcv"})):
        with closing(open_images(root / "cifar", device=CPU, size=32, **options)) as images:
            work = partial(our_pairs, images, len(cifar), 256, [0])
            row(f"two MoCo views, 32 px, {kind}", len(cifar), partial(drain, peer), work, repeats, 3.0)


def bench_photos(root: Path, repeats: int) -> None:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    files = sorted((root / "photos").iterdir())
    files, n = files[: len(files) // 5], len(files) // 5
    peer = torchvision_loader(files, 224, 64)
    crop = Crop((0.2, 1.0), 224)
    decoder = RandomResizedCropRGBImageDecoder((224, 224), scale=(0.2, 1.0))
    stock = Loader(
        str(root / "jpg/dataset.beton"),
        batch_size=64,
        num_workers=usable_cores(),
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=range(n),
        drop_last=False,
        pipelines={"image": [decoder], "index": [IntDecoder()]},
    )
    torch.set_num_threads(usable_cores())
    with closing(open_images(root / "jpg", device=CPU, size=224, loader="ffcv")) as images:
        order = np.random.default_rng(0).permutation(n)
        one, two = ([(crop, (0, 0, stream)) for stream in range(count)] for count in (1, 2))
        views = partial(our_pairs, images, n, 64, [0])
        row("two MoCo views, 224 px", n, partial(drain, peer), views, repeats, 3.0)
        for name, crops, wanted in (("decode and crop, 224 px", one, 0.85), ("decode once, crop twice", two, 0.5)):
            row(name, n, partial(drain, stock), partial(our_crops, images, order, crops), repeats, wanted)
    info = beton.verify(root / "jpg/dataset.beton")
    with ExitStack() as opened:
        pillow, torchvision = (
            opened.enter_context(closing(PackedImages(info, decoder(), CPU, 224, 3, usable_cores())))
            for decoder in (PillowDecoder, TorchvisionDecoder)
        )
        passes = [partial(our_crops, images, order, one) for images in (pillow, torchvision)]
        row("without FFCV: Pillow's decoder, torchvision's", n, passes[0], passes[1], repeats, 1.0)


def our_crops(images: Any, order: np.ndarray, crops: Any) -> None:
    drain(images.crops(order, 64, crops))


# ---------------------------------------------------------------- bounds


def bench_verify(root: Path) -> None:
    """The structure of a file of a million samples: written sparsely, so that it takes no room."""
    n, side, page = 1_000_000, 32, 1 << 21
    writer = BetonWriter(root / "million.beton", n, page)
    each, per_page = side * side * 3, page // (side * side * 3)
    offsets = writer.position + np.arange(n) // per_page * page + np.arange(n) % per_page * each
    writer.position = int(offsets[-1]) + each
    sides = np.full(n, side, np.uint16)
    writer.finish("raw", sides, sides, offsets, np.full(n, each))
    started = time.perf_counter()
    info = beton.verify(writer.path, trusted_sidecar=False)
    print(f"\nstructure of {info.n} samples verified in {time.perf_counter() - started:.2f} s (wanted: below 2)")


def bench_memory(root: Path) -> None:
    """Resident memory and threads over 20 epochs of the loader, each cut off half-way."""
    me = psutil.Process()
    seen = []
    with closing(open_images(root / "jpg", device=CPU, size=224, loader="ffcv")) as images:
        for epoch in range(21):
            batches = images.crops(np.arange(min(images.n, 512)), 64, [(Crop((0.2, 1.0), 224), (0, epoch, 0))])
            drain(zip(range(4), batches, strict=False))
            del batches
            seen.append((me.memory_info().rss >> 20, me.num_threads()))
    (first, threads), (last, threads_after) = seen[1], seen[-1]
    print(f"20 epochs: memory {first} -> {last} MiB, threads {threads} -> {threads_after}")


if __name__ == "__main__":
    main()
