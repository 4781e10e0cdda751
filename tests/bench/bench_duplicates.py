"""Copies and outliers: which edited copies of real images are found, and which foreign images stand out.

    python -m tests.bench.bench_duplicates RUN ... [--count 40]
    python -m tests.bench.bench_duplicates --synthetic 70000        seconds of the search, without a run

RUN is a run of `fit FOLDER` with a trained network that is on the neighbour graph and whose FOLDER is still there. Of
each edit, `--count` other images get one copy each. The copies go the way of any file: encoded, packed, embedded. What
is found among the original images themselves is listed, to be looked at: sets have copies of their own. The foreign
images are of the other runs.
"""

import argparse
import io
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.metrics import roc_auc_score

from spice_dist import artifacts, duplicates, outliers
from spice_dist.data import augment, beton
from spice_dist.data.decode import Packing, pack_image
from spice_dist.data.manifest import read_paths
from spice_dist.data.views import PLAIN
from spice_dist.model_folder import load_model
from spice_dist.models.backbone import unit
from spice_dist.neighbors import nearest, search, without_itself

FOREIGN = 20  # images of each other run
BICUBIC = Image.Resampling.BICUBIC


def encoded(image: Image.Image, format: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def resized(image: Image.Image, scale: float) -> Image.Image:
    return image.resize((max(2, round(image.width * scale)), max(2, round(image.height * scale))), BICUBIC)


def cropped(image: Image.Image, share: float) -> Image.Image:
    width, height = image.width * (1 - share), image.height * (1 - share)
    left, top = 0.3 * (image.width - width), 0.7 * (image.height - height)
    size = max(2, round(width)), max(2, round(height))
    return image.resize(size, BICUBIC, box=(left, top, left + width, top + height))


def watermarked(image: Image.Image) -> Image.Image:
    marked, (width, height) = image.copy(), image.size
    draw = ImageDraw.Draw(marked)
    draw.rectangle((width * 0.75, height * 0.9, width * 0.98, height * 0.97), fill=(255, 255, 255))
    draw.rectangle((width * 0.78, height * 0.92, width * 0.95, height * 0.95), fill=(200, 30, 30))
    return marked


def next_shot(image: Image.Image, degrees: float, zoom: float, light: float) -> Image.Image:
    width, height = image.size
    near, far = 0.5 - 0.48 / zoom, 0.5 + 0.48 / zoom
    box = (width * near, height * near, width * far, height * far)
    turned = image.rotate(degrees, BICUBIC).resize(image.size, BICUBIC, box=box)
    return ImageEnhance.Brightness(turned).enhance(light)


EDITS: dict[str, Callable[[Image.Image], bytes]] = {
    "same pixels, PNG": encoded,
    "JPEG 95": lambda image: encoded(image, "JPEG", quality=95),
    "JPEG 60": lambda image: encoded(image, "JPEG", quality=60),
    "JPEG 30": lambda image: encoded(image, "JPEG", quality=30),
    "resized to 2": lambda image: encoded(resized(image, 2)),
    "resized to .6": lambda image: encoded(resized(image, 0.6)),
    "resized to .3": lambda image: encoded(resized(image, 0.3)),
    "brightness .9": lambda image: encoded(ImageEnhance.Brightness(image).enhance(0.9)),
    "brightness 1.1": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.1)),
    "crop of 2 %": lambda image: encoded(cropped(image, 0.02)),
    "crop of 5 %": lambda image: encoded(cropped(image, 0.05)),
    "watermark": lambda image: encoded(watermarked(image)),
    "half, crop 3 %, JPEG 70": lambda image: encoded(cropped(resized(image, 0.5), 0.03), "JPEG", quality=70),
    "next shot: 2 degrees": lambda image: encoded(next_shot(image, 2, 1.06, 1.03)),
    "next shot: 4 degrees": lambda image: encoded(next_shot(image, -4, 1.12, 0.95)),
    "mirrored (no copy)": lambda image: encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
}


@torch.no_grad()
def embedded(run: Path, images: torch.Tensor) -> np.ndarray:
    """The features (B, D) of packed images (B, 3, H, W) by the run's network."""
    net, task = load_model(artifacts.model(run), torch.device("cpu"))
    rows = []
    for batch in images.split(16):
        plain = augment.apply(PLAIN, batch, torch.zeros(len(batch), dtype=torch.long), (), task.backbone.statistics)
        rows.append(unit(net.backbone(plain)).half().numpy())
    return np.concatenate(rows)


def packed(run: Path, index: np.ndarray, size: int) -> torch.Tensor:
    """Images of a run as squares of `size` pixels."""
    raw = beton.Samples(beton.verify(artifacts.data(run) / "dataset.beton")).raw(index)
    squares = [np.asarray(Image.fromarray(square).resize((size, size), BICUBIC)) for square in raw]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


def copies_of(run: Path, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Packed copies (E count, 3, H, W), edit after edit, and the image that each is of."""
    folder, names, size = (
        Path(artifacts.manifest(run).source),
        read_paths(artifacts.data(run)),
        artifacts.manifest(run).size,
    )
    originals = np.random.default_rng(0).permutation(len(names))[: len(EDITS) * count]
    squares = []
    for place, i in enumerate(originals):
        with Image.open(folder / names[i]) as image:
            edit = list(EDITS.values())[place // count]
            result = pack_image(edit(image.convert("RGB")), Packing("raw", size))
        assert not isinstance(result, str), result
        squares.append(np.frombuffer(result[1], np.uint8).reshape(size, size, 3))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2), originals


def small_pictures(run: Path) -> np.ndarray:
    index = np.arange(artifacts.manifest(run).n)
    size = artifacts.manifest(run).size
    parts = [duplicates.pictures(packed(run, rows, size)) for rows in np.array_split(index, -(-len(index) // 64))]
    return np.concatenate(parts)


def equal_hashes(small: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The simplest rule: the pHash of both is the same."""
    bits = duplicates.hashes(duplicates.low_frequencies(small))
    return (bits[pairs[:, 0]] == bits[pairs[:, 1]]).all(1)


def pairs_of_equal_hashes(small: np.ndarray) -> int:
    _, sizes = np.unique(duplicates.hashes(duplicates.low_frequencies(small)), axis=0, return_counts=True)
    return int((sizes * (sizes - 1) // 2).sum())


def measure_copies(run: Path, count: int) -> list[str]:
    original, (images, of) = small_pictures(run), copies_of(run, count)
    n, small = len(original), np.concatenate([original, duplicates.pictures(images)])
    features = np.concatenate([artifacts.stored_features(run), embedded(run, images)])
    neighbors = without_itself(nearest(torch.from_numpy(features).float(), 31).numpy())
    started = time.monotonic()
    with_features = duplicates.find_copies(np.arange(len(small)), small, neighbors, features)
    seconds = time.monotonic() - started
    without = duplicates.find_copies(np.arange(len(small)), small)
    planted = np.stack([of, np.arange(n, len(small))], 1)

    def shares(joined: np.ndarray) -> list[str]:
        return [f"{100 * share:.0f}" for share in joined.reshape(len(EDITS), count).mean(1)]

    columns = [
        shares(partition[planted[:, 0]] == partition[planted[:, 1]])
        for partition in (with_features.picture, with_features.scene, without.picture)
    ] + [shares(equal_hashes(small, planted))]
    rows = [f"| {name} | {' | '.join(cells)} |" for name, *cells in zip(EDITS, *columns, strict=True)]
    among = [
        [tuple(group.tolist()) for group in duplicates.groups(partition[:n])]
        for partition in (with_features.picture, with_features.scene, without.picture)
    ]
    counts = [str(len(found)) for found in among] + [str(pairs_of_equal_hashes(original))]
    rows.append(f"| groups of originals | {' | '.join(counts)} |")
    joined = [of_group(group, of, n, count) for group in duplicates.groups(with_features.picture)]
    wrong = [group for group in joined if len({image for image, _ in group}) > 1]
    rows.append(f"copies: groups of different originals: {wrong}")
    rows.append(f"originals: copies {among[0]}, series {among[1]}; no features {among[2]}")
    return [*rows, f"{seconds:.1f} s for {len(small)} images, reading left out"]


def of_group(group: np.ndarray, of: np.ndarray, n: int, count: int) -> list[tuple[int, str]]:
    """The original of each image of a group, and the edit that was made of it."""
    kinds = list(EDITS)
    return [(int(i), "") if i < n else (int(of[i - n]), kinds[(i - n) // count]) for i in group]


def local_ratio(features: np.ndarray, k: int) -> np.ndarray:
    """The distance to the k-th neighbour over its mean of the neighbours, as in the local outlier factor."""
    rows = torch.from_numpy(features.astype(np.float32))
    products, index = search(rows, rows, k, skip=torch.arange(len(rows)))
    distance = 1 - products[:, -1]
    return (distance / distance[index.long()].mean(1)).numpy()


def measure_outliers(run: Path, others: Sequence[Path]) -> dict[str, float]:
    """AUROC of foreign images against the run's."""
    size = artifacts.manifest(run).size
    chosen = [np.random.default_rng(1).permutation(artifacts.manifest(other).n)[:FOREIGN] for other in others]
    foreign = torch.cat([packed(other, np.sort(index), size) for other, index in zip(others, chosen, strict=True)])
    features = np.concatenate([artifacts.stored_features(run), embedded(run, foreign)])
    is_foreign = np.arange(len(features)) >= artifacts.manifest(run).n
    ways = {f"{k}-th neighbour": partial(outliers.kth_distances, k=k) for k in (1, 5, 10, 30)}
    ways |= {f"local ratio, k = {k}": partial(local_ratio, k=k) for k in (10, 30)}
    return {name: float(roc_auc_score(is_foreign, way(features))) for name, way in ways.items()}


def measure_time(count: int) -> str:
    """The seconds of the search among synthetic images of ten kinds, of which a hundredth have a brighter copy."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 10, count)
    waves = rng.normal(size=(10, 1, 5, 5))[kind] + 0.7 * rng.normal(size=(count, 1, 5, 5))
    originals = torch.nn.functional.interpolate(torch.from_numpy(waves).float(), (28, 28), mode="bicubic")
    images = (128 + 30 * originals).clamp(0, 255)
    features = (2 * rng.normal(size=(10, 64))[kind] + rng.normal(size=(count, 64))).astype(np.float32)
    copies = np.arange(count // 100)
    images[copies + count // 2] = (1.1 * images[copies] + 8).clamp(0, 255)
    features[copies + count // 2] = features[copies] + 0.02 * rng.normal(size=(len(copies), 64))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    neighbors = without_itself(nearest(torch.from_numpy(features), 31).numpy())
    started = time.perf_counter()
    batches = images.to(torch.uint8).split(1024)
    small = np.concatenate([duplicates.pictures(batch) for batch in batches])
    reduced = time.perf_counter() - started
    found = duplicates.find_copies(np.arange(count), small, neighbors, features.astype(np.float16)).picture
    seconds = time.perf_counter() - started
    share = (found[copies] == found[copies + count // 2]).mean()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    groups = len(duplicates.groups(found))
    return (
        f"{count} images: {seconds:.1f} s, {reduced:.1f} of them to reduce the pictures; {groups} groups, "
        f"{share:.1%} of {len(copies)} copies found; peak {peak:.1f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--synthetic", type=int, metavar="N", help="time the search among so many images instead")
    parser.add_argument("--count", type=int, default=40, help="images with a copy of each kind (40)")
    parser.add_argument("--only", type=Path, help="measure this one of the runs")
    options = parser.parse_args()
    if options.synthetic:
        print(measure_time(options.synthetic))
        return
    for run in [options.only] if options.only else options.runs:
        print(f"\n{run}\n\n| edit | copies | and series | copies, no features | equal pHash |\n|---|---|---|---|---|")
        print("\n".join(measure_copies(run, options.count)))
        others = [other for other in options.runs if other != run]
        for name, value in (measure_outliers(run, others) if others else {}).items():
            print(f"AUROC of the {name}: {value:.3f}")


if __name__ == "__main__":
    main()
