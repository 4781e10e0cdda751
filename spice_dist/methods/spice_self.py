"""Stage 2 of SPICE, SPICE-Self: clustering heads on the frozen features by EM (Niu, Shan and Wang 2021, III-B).

E-step: the center of a cluster is the mean feature of its most confident images, and the images nearest to the center
get its label. Confidence is computed on weak views, similarity on images without augmentation. M-step: the heads learn
these labels on strong views. Heads differ only by their initial weights. The head of the lowest loss over the whole set
is selected, without labels.

The backbone stays in eval mode, as in the paper, so every view's features are computed once per E-step. An epoch costs
2 N forward passes of the backbone, and the training of the heads on vectors. `spice_self_joint` has the loop for a
backbone that changes, as in the published code and in the paper's ablation.

Each worker encodes its share of the views and trains its share of the heads.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_dist import artifacts
from spice_dist.data.crops import Key
from spice_dist.data.files import publish
from spice_dist.data.images import Images
from spice_dist.data.views import PLAIN, SCAN_STRONG, SCAN_WEAK, View
from spice_dist.distributed import collectives
from spice_dist.distributed.checkpoint import Tensors
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.losses import cross_entropy, double_softmax_cross_entropy, entropy_of_mean
from spice_dist.methods import stored_views
from spice_dist.methods.plumbing import (
    autocast,
    begin_with_earlier,
    load_backbone,
    load_modules,
    modules_state,
    open_dataset,
    place,
    tell_if_one_takes_all,
    view_features,
)
from spice_dist.models.backbone import Backbone
from spice_dist.models.heads import ClusterHeads
from spice_dist.optim import load_optimizer_tensors, optimizer_tensors
from spice_dist.pseudo_labels import Loss, Outputs, margins, prototype_labels, quotas, selection_loss
from spice_dist.settings import check_ranges, setting
from spice_dist.task import Task
from spice_dist.transfer import send

WEAK, STRONG, ORDER, SHUFFLE, SAMPLE, AGAIN = 10, 11, 12, 13, 14, 5  # streams of random numbers
ROUND = 512  # minibatches between two barriers of the workers
MANY = 100  # clusters from which the entropy term is on by default: SPICE needed it for 200 clusters, not for 10
FEATURES = ("unit", "raw")
LOOK_EPOCHS = 10  # between two looks at the largest cluster, for which a GPU is waited for
FOLLOWED = 4096  # images whose labels by every head and epoch are stored, for a curve of the report


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
    batch: int = setting(0, "M, images of one E-step; 0: samples_per_cluster times K", least=0)
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
    features: str = setting(
        "unit", "that the heads see: of unit norm, or raw, as published; similarity is of unit ones", choices=FEATURES
    )
    backbone_bn: str = setting(
        "eval", "BatchNorm of the backbone; train as in the published code", choices=("eval", "train")
    )
    joint: bool = setting(False, "train the backbone with the heads")
    weak: View = setting(SCAN_WEAK, "the weak view")
    strong: View = setting(SCAN_STRONG, "the strong view")

    def e_step_images(self, images: int, clusters: int) -> int:
        """M, of so many images."""
        return min(images, self.batch or self.samples_per_cluster * clusters)

    @property
    def encodes_anew(self) -> bool:
        """Whether the backbone changes within an E-step, so that no view's features can be reused."""
        return self.joint or self.backbone_bn == "train"


def train(task: Task, config: SpiceSelfConfig, worker: Worker) -> None:
    """Train; the last checkpoint holds all `heads` of the last step, and `select` (see `Selection`)."""
    images, manifest = open_dataset(task, worker)
    num_images = manifest.clustered
    check(task, config, num_images)
    features = torch.from_numpy(artifacts.features(worker.run, num_images)).to(worker.device)
    batch = config.e_step_images(num_images, task.clusters)
    sizes, sizes_of_all = (quotas(count, task.clusters, config.prior) for count in (batch, num_images))
    steps_per_epoch = num_images // batch
    total = config.epochs * steps_per_epoch

    backbone = place(load_backbone(task, worker.run), worker.device).eval()
    torch.manual_seed(task.seed)
    heads = begin_with_earlier(new_heads(task, config, backbone.dim), worker.run, "heads").to(worker.device)
    selection = Selection(heads, config.epochs, min(num_images, FOLLOWED))
    parts: dict[str, nn.Module] = {"heads": heads, "select": selection}
    saved = worker.resume()
    if saved:
        load_modules(parts, saved)
    share = collectives.share(config.heads)
    own_heads = heads.part(share.start, share.stop)
    optimizer = head_optimizer(task, config, own_heads.parameters())
    if saved:
        load_optimizer_tensors(optimizer, _rows_of_share(saved.tensors("optimizer"), share, config.heads))

    encode = partial(encode_view, task, backbone, heads.inputs)
    seen = features  # by the heads
    if config.features == "raw":
        write_features(images, task, encode, worker)
        seen = torch.from_numpy(artifacts.head_features(worker.run)[:num_images].astype(np.float32)).to(worker.device)
    draw = partial(drawn_views, task, config)
    repeated = stored_views.RepeatedViews(task, images, worker.run, draw, config.view_epochs, encode, config.features)
    learning_loss = loss_of(task, config)
    followed = torch.from_numpy(followed_images(task, num_images, selection.followed.shape[2])).to(worker.device)
    # steps after which the same views come again
    period = config.view_epochs * steps_per_epoch or total
    told = False
    for step in range(saved.step if saved else 0, total):
        number = step % period
        chosen = drawn_images(task, number, num_images)[:batch]
        rows, epoch = send(torch.from_numpy(chosen), worker.device), number // steps_per_epoch
        if config.view_epochs:
            views = repeated.features(number, epoch, chosen)
        else:
            views = view_features(task, images, chosen, draw(epoch), [encode, encode])
        scored, learned = (send(view, worker.device).float() for view in views)

        with torch.no_grad():  # E-step
            confidence = head_outputs(own_heads, scored, margins)
            overlap = config.assignment == "overlap"
            members, labels = prototype_labels(features[rows], confidence, sizes, config.center_fraction, overlap)

        order = send(shuffles(config, members.shape[1], (task.seed, step, SHUFFLE)), worker.device)
        losses = torch.zeros(len(own_heads), device=worker.device)
        for minibatches in order.split(ROUND):  # M-step
            loss = m_step(
                own_heads, optimizer, learned.__getitem__, members, labels, minibatches, learning_loss, task.precision
            )
            losses += loss * len(minibatches)
            collectives.barrier()  # so that workers with fewer heads wait no longer than the process group allows
        for of_all, of_share in zip(heads.parameters(), own_heads.parameters(), strict=True):
            of_all.data.copy_(collectives.gather_shares(of_share.data, config.heads))

        if (step + 1) % steps_per_epoch == 0:
            with torch.no_grad():
                outputs, plain = head_outputs(own_heads, seen), plain_loss(config)
                loss = selection_loss(features, outputs, sizes_of_all, config.center_fraction, plain)
                labels = heads(seen[followed]).argmax(2)
            loss = collectives.gather_shares(loss, config.heads)
            selection.update(step // steps_per_epoch, heads, loss, labels)
            if not told and (step + 1 == total or (step + 1) // steps_per_epoch % LOOK_EPOCHS == 0):
                told = tell_if_one_takes_all("spice_self", labels[loss.argmin()], worker)
        probes = {"select_loss": selection.loss.min} if step + 1 >= steps_per_epoch else {}  # before, it is infinite
        moments = _of_all_heads(optimizer, config.heads)
        # scaled so that the mean over workers is the mean over all heads
        mean = losses.sum() / len(order) * worker.world / config.heads
        worker.report(step + 1, total, mean, partial(_state, parts, moments), probes=probes, every=1)
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
    """Make one optimizer step per row of `order`, positions of pairs (image, label); return each head's mean loss.

    `inputs` gives the features of each head's images. Weights are float32; bf16 multiplies rounded copies.
    """
    sums = torch.zeros(len(members), device=members.device)
    for positions in order:
        # entered for each minibatch: autocast caches rounded copies, which a step makes outdated
        with autocast(members.device, precision):
            logits = heads(inputs(members[:, positions]))
        per_head = loss(logits, labels[:, positions])
        optimizer.zero_grad()
        per_head.sum().backward()  # heads share no weight: the sum gives each its own gradient
        optimizer.step()
        sums += per_head.detach()
    return sums / len(order)


def head_optimizer(task: Task, config: SpiceSelfConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
    # at K clusters the first gradients are K times smaller than cross-entropy's; Adam's eps must be smaller too
    return torch.optim.Adam(parameters, lr=config.lr, eps=1e-8 / task.clusters, fused=True)


def head_outputs(
    heads: ClusterHeads, features: Float[Tensor, "N D"], then: Callable[[Tensor, int], Tensor] = lambda x, axis: x
) -> Outputs:
    """Make a function that returns the heads' logits of some images, after `then` along the axis of the clusters."""
    return lambda rows: then(heads(features[rows]), 2)


class Selection(nn.Module):
    """Holds each head's lowest label-free loss, its weights of that epoch, and the history of epochs."""

    def __init__(self, heads: ClusterHeads, epochs: int, followed: int):
        super().__init__()
        count, device = len(heads), heads.biases[0].device
        self.best = heads.part(0, count).requires_grad_(False)
        self.loss: Tensor
        self.register_buffer("loss", torch.full((count,), torch.inf, device=device))
        self.losses: Tensor  # of every epoch and head
        self.register_buffer("losses", torch.full((epochs, count), torch.inf, device=device))
        self.followed: Tensor  # labels of some images by every epoch's heads
        self.register_buffer("followed", torch.zeros(epochs, count, followed, dtype=torch.int32, device=device))

    @torch.no_grad()
    def update(self, epoch: int, heads: ClusterHeads, loss: Float[Tensor, " H"], labels: Int[Tensor, "H S"]) -> None:
        self.losses[epoch], self.followed[epoch] = loss, labels
        better = loss < self.loss
        self.loss.copy_(loss.where(better, self.loss))
        for best, current in zip(self.best.parameters(), heads.parameters(), strict=True):
            best.copy_(current.where(better[:, None, None], best))


def followed_images(task: Task, num_images: int, count: int) -> Int[np.ndarray, " S"]:
    """Return the numbers of the images whose labels `Selection.followed` holds."""
    return np.random.default_rng([task.seed, SAMPLE]).permutation(num_images)[:count]


def check(task: Task, config: SpiceSelfConfig, num_images: int) -> None:
    """Raise a UserError if these settings cannot train on so many images."""
    check_ranges("spice_self", config, "heads", "layers", "repeats", "minibatch", "epochs", "lr", "temperature")
    check_ranges("spice_self", config, "center_fraction", "assignment", "loss", "score_view", "learn_view")
    check_ranges("spice_self", config, "features", "backbone_bn")
    if not math.isfinite(config.entropy_weight):
        raise UserError(f"spice_self.entropy_weight is {config.entropy_weight}; it must be finite")
    check_ranges("spice_self", config, "samples_per_cluster", "batch")
    if config.batch and config.batch < 2 * task.clusters:
        raise UserError(
            f"spice_self.batch is {config.batch}, fewer than 2 images for each of {task.clusters} clusters; give 0, or "
            f"at least {2 * task.clusters}"
        )
    if num_images < 2 * task.clusters:
        raise UserError(
            f"{num_images} images are too few for {task.clusters} clusters: prototypes need at least two images each; "
            f"ask for {num_images // 2} clusters or fewer"
        )
    if config.prior:
        _check_prior(task, config, config.e_step_images(num_images, task.clusters))
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


def drawn_images(task: Task, number: int, num_images: int) -> Int[np.ndarray, " N"]:
    """Return the images in the order in which E-step `number` takes them."""
    return np.random.default_rng([task.seed, number, ORDER]).permutation(num_images)


def drawn_views(task: Task, config: SpiceSelfConfig, epoch: int) -> list[tuple[View, Key]]:
    """Return kind and key of the views for confidence, and of those from which the heads learn.

    They depend on the epoch, not on the step, so that runs with other images per step can share them.
    """
    kinds = {"weak": (config.weak, WEAK), "strong": (config.strong, STRONG)}
    (score, score_stream), (learn, learn_stream) = kinds[config.score_view], kinds[config.learn_view]
    # two views of the same kind are drawn independently
    streams = (score_stream, learn_stream if learn_stream != score_stream else learn_stream + AGAIN)
    return [(view, (task.seed, epoch, stream)) for view, stream in zip((score, learn), streams, strict=True)]


def new_heads(task: Task, config: SpiceSelfConfig, dim: int) -> ClusterHeads:
    """Make heads of random weights for features of this width."""
    return ClusterHeads(config.heads, dim, task.clusters, config.layers, raw=config.features == "raw")


def encode_view(
    task: Task, backbone: Backbone, inputs: Callable[[Tensor], Tensor], view: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B D"]:
    """Compute what the heads see of a view, float32; `inputs` is `ClusterHeads.inputs`."""
    with autocast(view.device, task.precision):
        return inputs(backbone(view).float())


def write_features(
    images: Images, task: Task, encode: Callable[[Float[Tensor, "B C H W"]], Tensor], worker: Worker
) -> None:
    """Write `spice_self/features.npy`, (N, D) float16: what the heads see of all images without augmentation."""
    (features,) = view_features(task, images, np.arange(images.n), [(PLAIN, (0, 0, 0))], [encode])
    path = artifacts.stage2_features_file(worker.run)
    if worker.rank == 0:
        path.parent.mkdir(exist_ok=True)
        with publish(path) as file:
            np.save(file, features.half().cpu().numpy())
    collectives.barrier()


def store_views(task: Task, config: SpiceSelfConfig, worker: Worker, kinds: Sequence[str] = ("weak", "strong")) -> None:
    """Write `views/`, which `train` reads: features of all images' views of these kinds, of `view_epochs` epochs."""
    images, manifest = open_dataset(task, worker)
    backbone = place(load_backbone(task, worker.run), worker.device).eval()
    encode = partial(encode_view, task, backbone, new_heads(task, config, backbone.dim).inputs)
    for epoch in range(config.view_epochs):
        drawn = zip(drawn_views(task, config, epoch), (config.score_view, config.learn_view), strict=True)
        views = [view for view, kind in drawn if kind in kinds]
        stored_views.store(task, images, np.arange(manifest.clustered), views, encode, worker.run, config.features)
        worker.progress(epoch + 1, config.view_epochs, None)
    images.close()


def plain_loss(config: SpiceSelfConfig) -> Loss:
    """Return each head's loss: eq. (5), or one of the ablation."""
    if config.loss == "double_softmax":
        return double_softmax_cross_entropy
    return partial(cross_entropy, temperature=config.temperature if config.loss == "tempered" else 1.0)


def loss_of(task: Task, config: SpiceSelfConfig) -> Loss:
    """Return the heads' training loss: the plain one, minus a minibatch's entropy where clusters are many."""
    plain = plain_loss(config)
    # scaled as the double softmax's first gradients, which have the factor 1 / K
    usual = 1 / task.clusters if task.clusters >= MANY else 0.0
    weight = config.entropy_weight if config.entropy_weight >= 0 else usual
    return (lambda logits, labels: plain(logits, labels) - weight * entropy_of_mean(logits)) if weight else plain


def shuffles(config: SpiceSelfConfig, positions: int, key: tuple[int, int, int]) -> Int[Tensor, "S B"]:
    """Draw positions (steps, minibatch): R shuffles, cut into whole minibatches, shared by all heads as published."""
    size = min(config.minibatch, positions)
    generator = np.random.default_rng(key)
    rounds = [generator.permutation(positions)[: positions // size * size] for _ in range(config.repeats)]
    return torch.from_numpy(np.concatenate(rounds).reshape(-1, size))


def _of_all_heads(optimizer: torch.optim.Optimizer, heads: int) -> dict[str, Tensor]:
    """Gather the optimizer's state of all workers' heads."""
    tensors = optimizer_tensors(optimizer)
    return {name: collectives.gather_shares(value, heads) if value.ndim else value for name, value in tensors.items()}


def _rows_of_share(state: dict[str, Tensor], share: range, heads: int) -> dict[str, Tensor]:
    """Take this worker's rows of the state gathered by `_of_all_heads`."""
    if len(share) == heads:
        return state
    return {name: value[share.start : share.stop] if value.ndim else value for name, value in state.items()}


def _state(parts: dict[str, nn.Module], moments: dict[str, Tensor]) -> Tensors:
    return {**modules_state(parts), "optimizer": moments}
