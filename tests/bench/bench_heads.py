"""Stage 2 against the published procedure, and the heads alone. Prints tables of ratios.

    python -m tests.bench.bench_heads --cifar DIR      DIR/cifar10.npz: train_images (50000, 32, 32, 3) uint8
    python -m tests.bench.bench_heads --large          K = 1000, N = 1,281,167 synthetic features: memory and time

The published procedure, as the paper and its code describe it: heads are separate networks in a loop; each minibatch
encodes the strong images of all heads by the frozen backbone, R times over; every epoch ends with an embedding of all
images for the selection. It gets the same views and the same order. Of its
minibatches `--steps` are timed, of all epochs one, and the rest is counted: with all of them it runs for the better
part of an hour (`--full`).
"""

import argparse
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spice_dist.config import Config
from spice_dist.data import augment
from spice_dist.data.dataset import DataConfig
from spice_dist.data.images import Images
from spice_dist.data.ingest import ingest
from spice_dist.data.sources import from_array
from spice_dist.data.views import PLAIN
from spice_dist.distributed.worker import LocalWorker, usable_cores
from spice_dist.losses import cross_entropy, double_softmax_cross_entropy
from spice_dist.methods import spice_self
from spice_dist.methods.plumbing import load_backbone, new_backbone, open_run_dataset
from spice_dist.methods.spice_self import ORDER, SHUFFLE, STRONG, WEAK, SpiceSelfConfig, head_outputs, m_step
from spice_dist.models.backbone import BackboneConfig, unit
from spice_dist.models.heads import ClusterHeads
from spice_dist.pseudo_labels import Loss, margins, prototype_labels, quotas, selection_loss

CPU = torch.device("cpu")
LOSSES: dict[str, Loss] = {"double_softmax": double_softmax_cross_entropy, "cross_entropy": cross_entropy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="folder of cifar10.npz")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=4, help="minibatches of the published procedure that are timed")
    parser.add_argument("--full", action="store_true", help="time all of them")
    parser.add_argument("--large", action="store_true", help="only the epoch of 1,281,167 features into 1,000 clusters")
    parser.add_argument("--large-steps", type=int, default=400, help="minibatches of it that are timed")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    if options.large:
        bench_large(options.large_steps)
        return
    bench_heads_alone()
    if options.cifar:
        with np.load(options.cifar / "cifar10.npz") as arrays:
            bench_epoch(arrays["train_images"][: options.images], None if options.full else options.steps)


# ---------------------------------------------------------------- the published procedure, in a loop over heads


class Published:
    """Frozen backbone in eval mode, H separate heads, one Adam: as the paper and its code describe them."""

    def __init__(self, config: Config, backbone: nn.Module, heads: ClusterHeads):
        self.config, self.settings, self.backbone = config, config.spice_self, backbone
        self.heads = separate(heads)
        eps = (
            1e-8 / config.clusters / len(self.heads)
        )  # the loss is a mean over heads; ours, with a sum, has no such factor
        self.optimizer = torch.optim.Adam(nn.ModuleList(self.heads).parameters(), self.settings.lr, eps=eps)
        self.loss = LOSSES[self.settings.loss]
        self.raw = self.settings.features == "raw"

    def inputs(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return features if self.raw else unit(features)

    def scaled(self, features: Tensor) -> Tensor:
        return features if self.raw else features * math.sqrt(features.shape[-1])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([self.inputs(part) for part in images.split(512)])

    @torch.no_grad()
    def labels(self, features: Tensor, scored: Tensor, disjoint: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Equations (2) to (4) for every head."""
        per_cluster = len(features) // self.config.clusters
        confident = max(1, int(self.settings.center_fraction * per_cluster))
        found = []
        for head in self.heads:
            probs = head(self.scaled(scored)).softmax(1)
            used = torch.zeros(len(features), dtype=torch.bool)
            labelled = used.clone()
            members = []
            for k in range(self.config.clusters):
                column = probs[:, k].masked_fill(used, -1) if disjoint else probs[:, k]
                top = column.sort(descending=True, stable=True).indices[:confident]
                similarity = features @ features[top].mean(0)
                similarity = similarity.masked_fill(labelled, -torch.inf) if disjoint else similarity
                members.append(similarity.sort(descending=True, stable=True).indices[:per_cluster])
                used[top], labelled[members[-1]] = True, True
            found.append((torch.cat(members), torch.arange(self.config.clusters).repeat_interleave(per_cluster)))
        return found

    def minibatch(self, strong: Tensor, labelled: list[tuple[Tensor, Tensor]], positions: Tensor) -> None:
        rows = torch.cat([members[positions] for members, _ in labelled])
        with torch.no_grad():
            features = self.inputs(strong[rows]).chunk(len(self.heads))
        self.step(features, [labels[positions] for _, labels in labelled])

    def step(self, features: tuple[Tensor, ...], labels: list[Tensor]) -> None:
        losses = [
            self.loss(head(self.scaled(x))[None], y[None]).sum()
            for head, x, y in zip(self.heads, features, labels, strict=True)
        ]
        self.optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()

    @torch.no_grad()
    def select(self, features: Tensor, scored: Tensor) -> Tensor:
        """The loss of every head on its own labels of the whole set."""
        labelled = self.labels(features, scored)
        return torch.stack(
            [
                self.loss(head(self.scaled(scored[members]))[None], labels[None])[0]
                for head, (members, labels) in zip(self.heads, labelled, strict=True)
            ]
        )


def separate(heads: ClusterHeads) -> list[nn.Sequential]:
    """The same heads of two layers as networks of their own."""
    _, dim, clusters = heads.weights[1].shape
    networks = []
    for h in range(len(heads)):
        network = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, clusters))
        state = (heads.weights[0][h].T, heads.biases[0][h, 0], heads.weights[1][h].T, heads.biases[1][h, 0])
        network.load_state_dict(dict(zip(network.state_dict(), state, strict=True)))
        networks.append(network)
    return networks


def together(networks: Iterable[nn.Sequential]) -> ClusterHeads:
    """The inverse of `separate`."""
    states = [network.state_dict() for network in networks]
    layers = {"weights.0": "0.weight", "biases.0": "0.bias", "weights.1": "2.weight", "biases.1": "2.bias"}
    stacked = {ours: torch.stack([state[theirs] for state in states]) for ours, theirs in layers.items()}
    return ClusterHeads.holding(
        {name: x.transpose(1, 2) if "weights" in name else x[:, None] for name, x in stacked.items()}
    )


def published_epoch(config: Config, run: Path) -> tuple[ClusterHeads, Tensor]:
    """The heads after the first epoch on the features of a run, and their selection losses."""
    images, manifest = open_run_dataset(config, run, CPU)
    features = torch.from_numpy(np.load(run / "features/features.npy")[: manifest.clustered].astype(np.float32))
    backbone = load_backbone(config, run).eval()
    torch.manual_seed(config.seed)
    settings = config.spice_self
    published = Published(config, backbone, ClusterHeads(settings.heads, backbone.dim, config.clusters))
    batch = min(len(features), settings.samples_per_cluster * config.clusters)
    for step in range(len(features) // batch):
        chosen = np.random.default_rng([config.seed, step, ORDER]).permutation(len(features))[:batch]
        views = [(settings.weak, (config.seed, step, WEAK)), (settings.strong, (config.seed, step, STRONG))]
        ((weak, strong), _), *_ = augment.view_batches(images, chosen, batch, views)
        disjoint = settings.assignment == "disjoint"
        labelled = published.labels(features[chosen], published.encode(weak), disjoint)
        for positions in spice_self.shuffles(settings, len(labelled[0][0]), (config.seed, step, SHUFFLE)):
            published.minibatch(strong, labelled, positions)
    plain = features
    if published.raw:
        every = np.arange(len(features))
        ((view,), _), *_ = augment.view_batches(images, every, len(every), [(PLAIN, (0, 0, 0))])
        plain = published.encode(view)
    images.close()
    return together(published.heads), published.select(features, plain)


# ---------------------------------------------------------------- one epoch


def bench_epoch(pictures: np.ndarray, steps: int | None) -> None:
    """ResNet-18 for 32 pixels with its first weights; 10 heads, 10 clusters, 8 repeats, minibatches of 128."""
    print(f"\n{f'an epoch, {len(pictures):,} images':<36}{'s':>10}{'ratio':>8}{'wanted':>8}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run = Path(folder)
        ingest(from_array(pictures), run / "data", size=32, jpeg_side=32)
        config = settings("fp32")
        torch.manual_seed(0)
        backbone = new_backbone(config).eval()
        images, _ = open_run_dataset(config, run, CPU)
        features, embedding = timed(lambda: embed(config, backbone, images))
        (run / "features").mkdir()
        np.save(run / "features/features.npy", features.half().numpy())
        theirs, part = time_published(config, backbone, images, features, embedding, steps)
        print(f"{'published procedure' + part:<36}{theirs:>10.1f}{1:>8.1f}", flush=True)
        for precision in ("fp32", "bf16"):
            with mock.patch.object(spice_self, "load_backbone", return_value=backbone):
                worker = LocalWorker(run, f"spice_self_{precision}", CPU)
                task = settings(precision)
                _, ours = timed(partial(spice_self.train, task, task.spice_self, worker))
            print(f"{'ours, ' + precision:<36}{ours:>10.1f}{theirs / ours:>8.1f}{25:>8}", flush=True)


def settings(precision: str) -> Config:
    return Config(
        precision=precision,
        data=DataConfig(size=32),
        backbone=BackboneConfig(name="resnet18", stem="small"),
        spice_self=SpiceSelfConfig(epochs=1),
    )


def time_published(
    config: Config, backbone: nn.Module, images: Images, features: Tensor, embedding: float, steps: int | None
) -> tuple[float, str]:
    """Seconds of an epoch, and how many of its minibatches were timed."""
    own, num_images = config.spice_self, len(features)
    published = Published(config, backbone, ClusterHeads(own.heads, features.shape[1], config.clusters))
    started = time.perf_counter()
    views = [(own.weak, (0, 0, WEAK)), (own.strong, (0, 0, STRONG))]
    ((weak, strong), _), *_ = augment.view_batches(images, np.arange(num_images), num_images, views)
    labelled = published.labels(features, published.encode(weak))
    once = time.perf_counter() - started
    order = spice_self.shuffles(own, len(labelled[0][0]), (0, 0, SHUFFLE))
    seconds = []
    for positions in order[: None if steps is None else steps + 1]:
        seconds.append(timed(partial(published.minibatch, strong, labelled, positions))[1])
    counted = seconds[1:]  # the first one allocates
    _, selecting = timed(lambda: published.select(features, features))
    total = once + statistics.mean(counted) * len(order) + embedding + selecting
    return total, f" ({len(counted)} of {len(order)} timed)"


def embed(config: Config, backbone: nn.Module, images: Images) -> Tensor:
    batches = augment.view_batches(images, np.arange(images.n), 512, [(PLAIN, (0, 0, 0))])
    with torch.no_grad():
        return torch.cat([unit(backbone(view)) for (view,), _ in batches])


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


# ---------------------------------------------------------------- the heads alone


def bench_heads_alone() -> None:
    """The M-step on features that are there: ten networks in a loop against ours, the same minibatches."""
    print(f"{'heads alone, ms a minibatch of 128':<36}{'loop':>10}{'ours':>10}{'ratio':>8}{'wanted':>8}")
    for dim, clusters in ((512, 10), (128, 10), (512, 200)):
        features = F.normalize(torch.randn(5000, dim), dim=1)
        config = Config(clusters=clusters)
        batched = ClusterHeads(10, dim, clusters)
        members = torch.randint(5000, (10, 5000))
        labels = torch.randint(clusters, (10, 5000))
        order = torch.randint(5000, (100, 128))
        loop = Published(config, nn.Identity(), batched)

        def theirs(order: Tensor, loop: Published, features: Tensor, members: Tensor, labels: Tensor) -> None:
            for positions in order:
                inputs = tuple(features[rows[positions]] for rows in members)
                loop.step(inputs, [row[positions] for row in labels])

        theirs(order[:10], loop, features, members, labels)
        _, seconds = timed(partial(theirs, order, loop, features, members, labels))
        for precision in ("fp32", "bf16"):
            heads = batched.part(0, 10)
            adam = torch.optim.Adam(heads.parameters(), 0.005, fused=True)
            settings = {"loss": double_softmax_cross_entropy, "precision": precision}
            step = partial(m_step, heads, adam, features.__getitem__, members, labels, **settings)
            step(order=order[:10])
            _, ours = timed(partial(step, order=order))
            name = f"10 heads, D = {dim}, K = {clusters}, {precision}"
            row = f"{10 * seconds:>10.2f}{10 * ours:>10.2f}{seconds / ours:>8.2f}{5:>8}"
            print(f"{name:<36}{row}", flush=True)


# ---------------------------------------------------------------- a thousand clusters


def bench_large(steps: int) -> None:
    """An epoch of 1,281,167 features into 1,000 clusters: E-steps of 500,000, M-step, selection over all."""
    images, dim, clusters, count = 1_281_167, 128, 1000, 10
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(clusters, dim, generator=generator), dim=1)
    features = torch.empty(images, dim)
    for part in features.split(100_000):
        truth = torch.randint(clusters, (len(part),), generator=generator)
        noise = torch.randn(len(part), dim, generator=generator) / dim**0.5
        torch.nn.functional.normalize(centers[truth] + noise, dim=1, out=part)
    own = SpiceSelfConfig()
    heads = ClusterHeads(count, dim, clusters)
    adam = torch.optim.Adam(heads.parameters(), own.lr, eps=1e-8 / clusters, fused=True)
    batch = own.samples_per_cluster * clusters
    print(f"N = {images:,}, D = {dim}, K = {clusters:,}, {count} heads: E-steps of {batch:,} images")
    with peak_memory() as peak:
        chosen = torch.randperm(images, generator=generator)[:batch]
        similar = features[chosen]
        scored = F.normalize(similar + 0.3 * torch.randn(batch, dim) / dim**0.5, dim=1)

        @torch.no_grad()
        def e_step() -> tuple[Tensor, Tensor]:
            confidence = head_outputs(heads, scored, margins)
            return prototype_labels(similar, confidence, quotas(batch, clusters), own.center_fraction)

        (members, labels), expecting = timed(e_step)
        print(f"E-step {expecting:.0f} s", flush=True)
        order = spice_self.shuffles(own, members.shape[1], (0, 0, SHUFFLE))
        learn = partial(m_step, heads, adam, scored.__getitem__, members, labels, loss=double_softmax_cross_entropy)
        _, part = timed(partial(learn, order[:steps]))
        learning = part / len(order[:steps]) * len(order)
        print(f"M-step {learning:.0f} s, from {len(order[:steps]):,} of its {len(order):,} minibatches", flush=True)

        @torch.no_grad()
        def select() -> Tensor:
            whole = quotas(images, clusters)
            return selection_loss(
                features, head_outputs(heads, features), whole, own.center_fraction, double_softmax_cross_entropy
            )

        _, selecting = timed(select)
        print(f"selection {selecting:.0f} s", flush=True)
    total = images // batch * (expecting + learning) + selecting
    print(f"an epoch: {total / 60:.0f} minutes, at most {peak() / 2**30:.1f} GiB in this process (wanted: 12)")


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """The largest resident size of this process inside the block."""
    highest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.1):
            highest = max(highest, psutil.Process().memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: highest
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
