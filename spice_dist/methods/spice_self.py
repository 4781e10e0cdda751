"""Stage 2 of SPICE, SPICE-Self: clustering heads on the frozen features by EM (Niu, Shan and Wang 2021, III-B).

E-step: per cluster, the mean feature of the most confident images is its center, and the images nearest to it get its
label; confidence comes from weak views, similarity from the images as they are. M-step: the heads learn these labels on
strong views. Several heads differ by their initial weights only; the one with the lowest loss over the whole set is
kept, which needs no labels.

The backbone stays in eval mode, as the paper says, so every view's features are computed once per E-step: an epoch
costs 2 N forward passes of the backbone and the training of the heads on vectors. The published code costs
(2 + R H) N: its M-step encodes the strong images of every head in every minibatch, with the backbone in train mode, so
that BatchNorm takes the batch's statistics and its running ones drift away from those that the features were made with.
`backbone_bn="train"` does that, and `joint` trains the backbone too, as the paper's ablation does. Both compute
confidence with the backbone as it is now and similarity on the features of stage 1, in one process.

Each worker trains its share of the heads, on views of which every worker encoded its share.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_dist.data import augment
from spice_dist.data.crops import Key
from spice_dist.data.files import publish
from spice_dist.data.images import Images
from spice_dist.data.views import PLAIN, SCAN_STRONG, SCAN_WEAK, View
from spice_dist.distributed import collectives
from spice_dist.distributed.checkpoint import Tensors
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.losses import cross_entropy, double_softmax_cross_entropy, entropy_of_mean
from spice_dist.methods import spice_graph
from spice_dist.methods.plumbing import autocast, finished, load_backbone, modules_state, named, open_dataset, place
from spice_dist.models.backbone import Backbone, unit
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.models.split_batch_norm import set_groups, update_statistics
from spice_dist.optim import load_optimizer_tensors, optimizer_tensors
from spice_dist.pseudo_labels import Loss, Outputs, prototype_labels, quotas, selection_loss
from spice_dist.settings import check_ranges, setting
from spice_dist.task import Task

WEAK, STRONG, ORDER, SHUFFLE, SAMPLE, AGAIN = 10, 11, 12, 13, 14, 5  # streams of random numbers
ROUND = 512  # minibatches between two meetings of the workers
MANY = 100  # clusters from which the entropy term is on by default: SPICE found it needed for 200, useless for 10
FOLLOWED = 4096  # images whose labels by every head are kept for every epoch, for the curve of the report


@dataclass(frozen=True)
class SpiceSelfConfig:
    heads: int = setting(10, "H, of which the lowest loss takes one", above=0)
    layers: int = setting(2, "linear layers of a head", above=0)
    epochs: int = setting(100, "passes over the images", above=0)
    samples_per_cluster: int = setting(
        500,
        "M / K, images of one E-step per cluster; fewer if the data set is smaller",
        least=2,
        remedy="a center needs at least 2 images",
    )
    center_fraction: float = setting(
        0.5, "share of these images that make up a center", above=0, most=1, remedy="it is a share, at most 1"
    )
    assignment: str = setting(
        "overlap",
        "disjoint: an image has one label at most, clusters choose in turn",
        choices=("overlap", "disjoint"),
    )
    prior: tuple[float, ...] = setting((), "expected sizes of the clusters, in any unit; none: all the same", above=0)
    loss: str = setting(
        "double_softmax",
        "cross_entropy (CE) and tempered (TCE) are of the ablation",
        choices=("double_softmax", "cross_entropy", "tempered"),
    )
    temperature: float = setting(0.2, "of the tempered loss", above=0)
    entropy_weight: float = setting(
        -1.0, "of the entropy of a minibatch; below 0: 1 / K of double softmax from K = 100 on, else 0"
    )
    repeats: int = setting(8, "R, passes over the labels of one E-step", above=0)
    minibatch: int = setting(128, "labelled images per head and Adam step", above=0)
    lr: float = setting(0.005, "learning rate of Adam", above=0)
    score_view: str = setting("weak", "the view that confidence comes from", choices=("weak", "strong"))
    learn_view: str = setting("strong", "the view that the heads learn from", choices=("weak", "strong"))
    view_epochs: int = setting(0, "epochs after which earlier views come again, from memory; 0: never", least=0)
    backbone_bn: str = setting(
        "eval", "BatchNorm of the backbone; train as in the published code", choices=("eval", "train")
    )
    joint: bool = setting(False, "train the backbone with the heads")
    weak: View = setting(SCAN_WEAK, "the weak view")
    strong: View = setting(SCAN_STRONG, "the strong view")

    @property
    def encodes_anew(self) -> bool:
        """Whether the backbone changes within an E-step, so that no view's features can be kept."""
        return self.joint or self.backbone_bn == "train"


def train(task: Task, config: SpiceSelfConfig, worker: Worker) -> None:
    """Leaves, in the last checkpoint, `heads` (all, as trained last) and `select` (see `Selection`).

    With a backbone that changed also `spice_self/features.npy`, of the backbone at the moment of the selected head.
    """
    images, manifest = open_dataset(task, worker.run, worker.device, worker.scratch)
    num_images = manifest.clustered
    check(task, config, num_images)
    if config.encodes_anew and worker.world > 1:
        raise UserError("a backbone that changes in stage 2 is trained by one worker: use --workers 0")
    features = np.load(worker.run / "features/features.npy", mmap_mode="r")[:num_images]
    features = torch.from_numpy(features.astype(np.float32)).to(worker.device)
    batch = min(num_images, config.samples_per_cluster * task.clusters)  # M
    wanted = quotas(batch, task.clusters, config.prior)
    steps_per_epoch = num_images // batch
    total = config.epochs * steps_per_epoch

    backbone = place(load_backbone(task, worker.run), worker.device).eval()
    torch.manual_seed(task.seed)
    heads = ClusterHeads(config.heads, backbone.dim, task.clusters, config.layers).to(worker.device)
    selection = Selection(heads, backbone if config.encodes_anew else None, config.epochs, min(num_images, FOLLOWED))
    parts: dict[str, nn.Module] = {"heads": heads, "select": selection}
    if config.encodes_anew:
        parts["backbone"] = backbone
    start = 0
    if saved := worker.resume():
        start = saved.step
        for name, module in parts.items():
            module.load_state_dict(saved.tensors(name))
    share = collectives.share(config.heads)
    own = heads.part(share.start, share.stop)
    trained = [*own.parameters(), *(backbone.parameters() if config.joint else ())]
    # at K clusters the first gradients are K times smaller than plain cross-entropy's; Adam's eps must not hide them
    optimizer = torch.optim.Adam(trained, lr=config.lr, eps=1e-8 / task.clusters, fused=True)
    if saved:
        load_optimizer_tensors(optimizer, _part_of(saved.tensors("optimizer"), share, config.heads))

    followed = followed_images(task, num_images, selection.followed.shape[2])
    encode = partial(_encode, task, backbone)
    learn = _loss_of(task, config)
    keep = config.view_epochs > 0 and not _all_stored(task, config, worker.run)
    drawn: dict[int, list[Tensor]] = {}
    for step in range(start, total):
        number = step % (config.view_epochs * steps_per_epoch) if config.view_epochs else step  # of these views
        chosen = np.random.default_rng([task.seed, number, ORDER]).permutation(num_images)[:batch]
        if number not in drawn:
            drawn[number] = _views(task, config, encode, images, chosen, number // steps_per_epoch, worker.run)
        views = drawn[number] if keep else drawn.pop(number)
        scored, learned = (x.to(worker.device).float() for x in views)

        with torch.no_grad():  # E-step
            probs = outputs(own, scored, torch.softmax)
            overlap = config.assignment == "overlap"
            members, labels = prototype_labels(features[chosen], probs, wanted, config.center_fraction, overlap)

        order = _shuffles(config, members.shape[1], (task.seed, step, SHUFFLE)).to(worker.device)
        inputs = partial(_encode_again, task, config, backbone, learned) if config.encodes_anew else learned.__getitem__
        losses = torch.zeros(len(own), device=worker.device)
        for part in order.split(ROUND):
            losses += m_step(own, optimizer, inputs, members, labels, part, learn, task.precision) * len(part)
            collectives.barrier()  # workers with fewer heads wait here, never longer than the process group allows
        for everyone, mine in zip(heads.parameters(), own.parameters(), strict=True):
            everyone.data.copy_(collectives.gather_shares(mine.data, config.heads))

        if (step + 1) % steps_per_epoch == 0:
            seen = features
            if config.encodes_anew:  # the heads see what the backbone makes of the images now
                (seen,) = view_features(task, images, np.arange(num_images), [(PLAIN, (0, 0, 0))], [encode])
            whole = quotas(num_images, task.clusters, config.prior)
            with torch.no_grad():
                loss = selection_loss(features, outputs(own, seen), whole, config.center_fraction, _plain_loss(config))
                labels = heads(seen[followed]).argmax(2)
            loss = collectives.gather_shares(loss, config.heads)
            selection.update(step // steps_per_epoch, heads, backbone, loss, labels)
        probes = {"select_loss": selection.loss.min} if step + 1 >= steps_per_epoch else {}  # infinite before
        state = partial(_state, parts, _gathered(optimizer, config.heads))
        mean = (
            losses.sum() / len(order) * worker.world / config.heads
        )  # the workers' means are averaged, of unlike shares too
        worker.report(step + 1, total, {"loss": mean}, state, probes, every=1)
    if selection.backbone is not None:
        _write_features(task, selection.backbone, images, worker.run / "spice_self/features.npy")
    images.close()


def m_step(
    heads: ClusterHeads,
    optimizer: torch.optim.Optimizer,
    inputs: Callable[[Int[Tensor, "H B"]], Float[Tensor, "H B D"]],
    members: Int[Tensor, "H P"],
    labels: Int[Tensor, "H P"],
    order: Int[Tensor, "S B"],
    loss: Loss,
    precision: str = "fp32",
) -> Float[Tensor, " H"]:
    """One optimizer step per row of `order`, on the pairs (image, label) at these positions; each head's mean loss.

    `inputs` gives the features of each head's images. Weights are float32; in bf16 their rounded copies multiply.
    """
    sums = torch.zeros(len(members), device=members.device)
    for positions in order:
        with autocast(
            members.device, precision
        ):  # in the loop: it would keep rounded copies of weights that have moved
            logits = heads(inputs(members[:, positions]))
        per_head = loss(logits, labels[:, positions])
        optimizer.zero_grad()
        per_head.sum().backward()  # heads share no weight: the sum gives each its own gradient
        optimizer.step()
        sums += per_head.detach()
    return sums / len(order)


def outputs(
    heads: ClusterHeads, features: Float[Tensor, "N D"], then: Callable[[Tensor, int], Tensor] = lambda x, axis: x
) -> Outputs:
    """What the heads say of some of the images; `then` is applied to the last axis."""
    return lambda rows: then(heads(features[rows]), 2)


class Selection(nn.Module):
    """The lowest label-free loss that each head has had, with its weights at that moment, and what led there.

    With a backbone that changes: all heads, and the backbone, at the moment of the lowest loss of all.
    """

    def __init__(self, heads: ClusterHeads, backbone: Backbone | None, epochs: int, followed: int):
        super().__init__()
        count, device = len(heads), heads.biases[0].device
        self.best = heads.part(0, count).requires_grad_(False)
        self.backbone = deepcopy(backbone).requires_grad_(False) if backbone else None
        self.loss: Tensor
        self.register_buffer("loss", torch.full((count,), torch.inf, device=device))
        self.losses: Tensor  # of every epoch and head
        self.register_buffer("losses", torch.full((epochs, count), torch.inf, device=device))
        self.followed: Tensor  # labels of some images by every epoch's heads
        self.register_buffer("followed", torch.zeros(epochs, count, followed, dtype=torch.int32, device=device))

    @torch.no_grad()
    def update(
        self,
        epoch: int,
        heads: ClusterHeads,
        backbone: Backbone,
        loss: Float[Tensor, " H"],
        labels: Int[Tensor, "H S"],
    ) -> None:
        self.losses[epoch], self.followed[epoch] = loss, labels
        better = loss < self.loss
        if self.backbone is not None:  # heads of other moments would see the features of another network
            better = (loss.min() < self.loss.min()).expand_as(loss)
            if better.any():
                self.backbone.load_state_dict(backbone.state_dict())
        self.loss[better] = loss[better]
        for kept, new in zip(self.best.parameters(), heads.parameters(), strict=True):
            kept[better] = new[better]


@torch.no_grad()
def view_features(
    task: Task,
    images: Images,
    index: np.ndarray,
    views: Sequence[tuple[View, Key]],
    uses: Sequence[Callable[[Float[Tensor, "B C H W"]], Tensor]],
    chunk: int = 512,
) -> list[Tensor]:
    """What each of `uses` makes of its kind of random view, (M, ...), in the order of `index`; an image is read once.

    Every worker computes its share and gets all.
    """
    share = collectives.share(len(index))
    found: list[list[Tensor]] = [[] for _ in views]
    for batch, _ in augment.view_batches(
        images, index[share.start : share.stop], chunk, views, task.backbone.statistics
    ):
        for made, use, view in zip(found, uses, batch, strict=True):
            made.append(use(view))
    return [collectives.gather_shares(torch.cat(made), len(index)) for made in found]


def followed_images(task: Task, num_images: int, count: int) -> Int[np.ndarray, " S"]:
    """The numbers of the images whose labels `Selection.followed` holds."""
    return np.random.default_rng([task.seed, SAMPLE]).permutation(num_images)[:count]


def load_heads(run: Path) -> tuple[ClusterHeads, Float[Tensor, " H"]]:
    """Every head at its best moment, and their label-free losses: the lowest one is the one to use."""
    saved = finished(run / "spice_self").tensors("select")
    return ClusterHeads.holding(named(saved, "best.")), saved["loss"]


def head_features(run: Path) -> Path:
    """The file of the features that the heads of stage 2 were made for: stage 1's, unless the backbone changed."""
    own = run / "spice_self/features.npy"
    return own if own.exists() else run / "features/features.npy"


def stage2_network(task: Task, run: Path) -> ClusterNet:
    """The backbone of stage 1, or what stage 2 made of it, with the selected head or with the head of a consensus."""
    if task.stage2 == "spice_graph":
        return spice_graph.network(task, run)
    backbone = load_backbone(task, run)
    if changed := named(finished(run / "spice_self").tensors("select"), "backbone."):
        backbone.load_state_dict(changed)
    heads, loss = load_heads(run)
    return ClusterNet(backbone, heads.select(int(loss.argmin())))


def check(task: Task, config: SpiceSelfConfig, num_images: int) -> None:
    """UserError if these settings cannot train on so many images."""
    check_ranges("spice_self", config, "heads", "layers", "repeats", "minibatch", "epochs", "lr", "temperature")
    check_ranges("spice_self", config, "center_fraction", "assignment", "loss", "score_view", "learn_view")
    check_ranges("spice_self", config, "backbone_bn")
    if not math.isfinite(config.entropy_weight):
        raise UserError(f"spice_self.entropy_weight is {config.entropy_weight}; it must be finite")
    check_ranges("spice_self", config, "samples_per_cluster")
    if num_images < 2 * task.clusters:
        raise UserError(
            f"{num_images} images are too few for {task.clusters} clusters: prototypes need at least two images each; "
            f"ask for {num_images // 2} clusters or fewer"
        )
    if config.prior:
        _check_prior(task, config, min(num_images, config.samples_per_cluster * task.clusters))
    if config.view_epochs < 0 or (config.view_epochs and config.encodes_anew):
        raise UserError(
            f"spice_self.view_epochs is {config.view_epochs}; give 0 or more, and 0 with a backbone that changes: its "
            f"features of earlier views would be those of another network"
        )


def _check_prior(task: Task, config: SpiceSelfConfig, batch: int) -> None:
    if len(config.prior) != task.clusters or not 0 < min(config.prior) <= max(config.prior) < math.inf:
        raise UserError(
            f"spice_self.prior has {len(config.prior)} sizes, the smallest {min(config.prior)}; give one above 0 for "
            f"each of the {task.clusters} clusters"
        )
    if min(wanted := quotas(batch, task.clusters, config.prior)) < 2:
        raise UserError(
            f"spice_self.prior leaves a cluster {min(wanted)} of the {batch} images of an E-step, and a center needs "
            f"at least 2; raise the smallest size, or spice_self.samples_per_cluster"
        )


def _views(
    task: Task, config: SpiceSelfConfig, encode: Callable, images: Images, chosen: np.ndarray, epoch: int, run: Path
) -> list[Tensor]:
    """Of these images what confidence comes from, and what the heads learn from; half precision on the host if kept.

    Views are a function of the epoch, not of the step, so that runs which take other images per step can share them.
    """
    views = _drawn_views(task, config, epoch)
    uses = [encode, _as_it_is if config.encodes_anew else encode]
    if not config.view_epochs:
        return view_features(task, images, chosen, views, uses)
    stored = {number: path for number, view in enumerate(views) if (path := _stored(run, view)).exists()}
    missing = [number for number in range(len(views)) if number not in stored]
    made = {number: torch.from_numpy(np.load(path, mmap_mode="r")[chosen]) for number, path in stored.items()}
    if missing:
        new = view_features(task, images, chosen, [views[i] for i in missing], [uses[i] for i in missing])
        made |= {number: x.half().cpu() for number, x in zip(missing, new, strict=True)}
    return [made[number] for number in range(len(views))]


def _drawn_views(task: Task, config: SpiceSelfConfig, epoch: int) -> list[tuple[View, Key]]:
    """The kind and the key of the views that confidence comes from, and of those that the heads learn from."""
    kinds = {"weak": (config.weak, WEAK), "strong": (config.strong, STRONG)}
    (score, score_stream), (learn, learn_stream) = kinds[config.score_view], kinds[config.learn_view]
    # the same view twice is two draws of it
    streams = (score_stream, learn_stream if learn_stream != score_stream else learn_stream + AGAIN)
    return [(view, (task.seed, epoch, stream)) for view, stream in zip((score, learn), streams, strict=True)]


def store_views(task: Task, config: SpiceSelfConfig, worker: Worker, kinds: Sequence[str] = ("weak", "strong")) -> None:
    """Leaves `views/`: the features (N, D), float16, of all images' views of these kinds, of `view_epochs` epochs.

    `train` reads them in place of encoding, so that many runs on the same features share one encoding. Files that an
    earlier call left are kept.
    """
    images, manifest = open_dataset(task, worker.run, worker.device, worker.scratch)
    encode = partial(_encode, task, place(load_backbone(task, worker.run), worker.device).eval())
    (worker.run / "views").mkdir(exist_ok=True)
    for epoch in range(config.view_epochs):
        drawn = zip(_drawn_views(task, config, epoch), (config.score_view, config.learn_view), strict=True)
        missing = [view for view, kind in drawn if kind in kinds and not _stored(worker.run, view).exists()]
        made = view_features(task, images, np.arange(manifest.clustered), missing, [encode] * len(missing))
        for features, view in zip(made, missing, strict=True):
            with publish(_stored(worker.run, view)) as file:
                np.save(file, features.half().cpu().numpy())
        worker.progress(epoch + 1, config.view_epochs, None)
    images.close()


def _all_stored(task: Task, config: SpiceSelfConfig, run: Path) -> bool:
    """Whether no view has to be encoded, so that none has to be kept in memory either."""
    views = (view for epoch in range(config.view_epochs) for view in _drawn_views(task, config, epoch))
    return all(_stored(run, view).exists() for view in views)


def _stored(run: Path, view: tuple[View, Key]) -> Path:
    """Where `store_views` leaves this view: named by everything that it depends on beside images and backbone."""
    return run / f"views/{sha256(repr(view).encode()).hexdigest()[:16]}.npy"


def _as_it_is(view: Tensor) -> Tensor:
    return view


def _encode(task: Task, backbone: Backbone, view: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
    with autocast(view.device, task.precision):
        return unit(backbone(view).float())


def _encode_again(
    task: Task,
    config: SpiceSelfConfig,
    backbone: Backbone,
    views: Float[Tensor, "M C H W"],
    rows: Int[Tensor, "heads B"],
) -> Float[Tensor, "heads B D"]:
    """The features of each head's images by the backbone as it is now; all heads' images are one BatchNorm batch."""
    set_groups(backbone, 1)
    backbone.train(config.backbone_bn == "train")
    with torch.set_grad_enabled(config.joint):
        features = _encode(task, backbone, views[rows.flatten()])
    update_statistics(backbone)
    backbone.eval()
    return features.unflatten(0, rows.shape)


def _write_features(task: Task, backbone: Backbone, images: Images, path: Path) -> None:
    encode = partial(_encode, task, backbone.eval())
    (features,) = view_features(task, images, np.arange(images.n), [(PLAIN, (0, 0, 0))], [encode])
    with publish(path) as file:
        np.save(file, features.half().cpu().numpy())


def _plain_loss(config: SpiceSelfConfig) -> Loss:
    if config.loss == "double_softmax":
        return double_softmax_cross_entropy
    return partial(cross_entropy, temperature=config.temperature if config.loss == "tempered" else 1.0)


def _loss_of(task: Task, config: SpiceSelfConfig) -> Loss:
    """What the heads learn by: eq. (5), less the entropy of a minibatch's mean prediction where clusters are many."""
    plain = _plain_loss(config)
    usual = (
        1 / task.clusters if task.clusters >= MANY else 0.0
    )  # the double softmax's first gradients have that factor too
    weight = config.entropy_weight if config.entropy_weight >= 0 else usual
    return (lambda logits, labels: plain(logits, labels) - weight * entropy_of_mean(logits)) if weight else plain


def _shuffles(config: SpiceSelfConfig, positions: int, key: tuple[int, int, int]) -> Int[Tensor, "S B"]:
    """(steps, minibatch) positions: R shuffles, each cut into whole minibatches, shared by all heads as published."""
    size = min(config.minibatch, positions)
    generator = np.random.default_rng(key)
    rounds = [generator.permutation(positions)[: positions // size * size] for _ in range(config.repeats)]
    return torch.from_numpy(np.concatenate(rounds).reshape(-1, size))


def _gathered(optimizer: torch.optim.Optimizer, heads: int) -> dict[str, Tensor]:
    """The optimizer's state of all workers' heads."""
    found = optimizer_tensors(optimizer)
    return {name: collectives.gather_shares(value, heads) if value.ndim else value for name, value in found.items()}


def _state(parts: dict[str, nn.Module], optimizer: dict[str, Tensor]) -> Tensors:
    return {**modules_state(parts), "optimizer": optimizer}


def _part_of(state: dict[str, Tensor], share: range, heads: int) -> dict[str, Tensor]:
    """This worker's part of what `_gathered` gave."""
    if len(share) == heads:
        return state
    return {name: value[share.start : share.stop] if value.ndim else value for name, value in state.items()}
