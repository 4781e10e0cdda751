"""IMC-SwAV (Ntelemis, Jin and Thomas 2021): features and clusters in one stage, from crops of several sizes.

SwAV (Caron et al. 2020) assigns the two large crops of an image softly to prototypes, with equal shares over the batch,
and every other crop must predict that assignment. A classifier learns clusters from the features: its predictions for
one crop should share information with the prototypes of another, and all clusters should be in use. No gradient flows
from it into the features, so any number of classifiers, also of other K, can be trained beside one network. Sinkhorn
and the joint of clusters and prototypes use the global batch. Equation numbers are the authors'.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_dist import losses
from spice_dist.clustering import Clustering, scored_images
from spice_dist.data import augment
from spice_dist.data.files import Progress
from spice_dist.data.images import Images
from spice_dist.data.views import IMC_GLOBAL, IMC_LOCAL, PLAIN, View
from spice_dist.distributed import collectives
from spice_dist.distributed.checkpoint import Tensors
from spice_dist.distributed.worker import Worker, accumulating
from spice_dist.errors import UserError
from spice_dist.inference import reduced
from spice_dist.methods.known_images import Bank, known_images, shares
from spice_dist.methods.plumbing import (
    autocast,
    black_images,
    check_batch,
    finished,
    in_passes,
    named,
    new_backbone,
    open_dataset,
    open_run_dataset,
    passes_that_fit,
    place,
    resume,
    state_of,
    view_lists,
)
from spice_dist.models.backbone import Backbone, check_crop, unit
from spice_dist.models.heads import ClassifierNet, Classifiers, LinearProjection, Prototypes
from spice_dist.models.momentum import Queue
from spice_dist.models.split_batch_norm import set_groups, update_statistics
from spice_dist.optim import adam, set_lr, steps_down, warm_up
from spice_dist.settings import check_ranges, setting
from spice_dist.task import Task, require_positive

GLOBAL = 2  # large crops, which are assigned to prototypes
PUBLISHED_CROPS = {32: (28, 18), 64: (56, 36), 96: (76, 52)}  # pixels of the image -> of its large and small crops
ADAPT_BATCHES = 50  # of the authors' evaluation at most


@dataclass(frozen=True)
class ImcSwavConfig:
    epochs: int = setting(500, "passes over the images", above=0)
    batch: int = setting(256, "images per optimizer step, all workers together", above=0)
    lr: float = setting(5e-4, "learning rate of Adam", above=0)
    milestones: tuple[float, ...] = setting(
        (0.3, 0.6, 0.8),
        "shares of the epochs at which the learning rate falls",
        above=0,
        below=1,
        remedy="give shares of the epochs between 0 and 1",
    )
    decay: float = setting(0.4, "factor by which it falls there", above=0)
    warmup: int = setting(
        500, "first optimizer steps, in which the learning rate rises and the prototypes are frozen", least=0
    )
    betas: tuple[float, float] = setting(
        (0.8, 0.999), "of Adam", least=0, below=1, remedy="give two numbers from 0 up, and less than 1"
    )
    weight_decay: float = setting(1e-5, "on every parameter, as part of the gradient", least=0)
    dim: int = setting(128, "width of the projection", above=0)
    prototypes: int = setting(
        1000, "K'; about as many as batch and queue hold, or images are spread over several", least=2
    )
    temperature: float = setting(0.1, "tau, eq. (2)", above=0)
    epsilon: float = setting(0.05, "of Sinkhorn, eqs. (3, 4); 0.03 if all images end up alike", above=0)
    iterations: int = setting(3, "of Sinkhorn", above=0)
    queue: int = setting(0, "earlier images that Sinkhorn sees beside a small batch, as in SwAV; 0: none", least=0)
    queue_start: float = setting(15.0, "epochs, from which on Sinkhorn sees the queue", least=0)
    hidden: int = setting(1024, "width of the classifier's hidden layers", above=0)
    classifiers: int = setting(1, "for each K; the lowest loss (6) over the last epoch selects one", above=0)
    extra_clusters: tuple[int, ...] = setting((), "other K, for which classifiers are trained as well", least=2)
    balance: float = setting(
        4.0, "b, eq. (6): the weight of H(Y), which keeps all clusters in use; 1: mutual information", above=0
    )
    hinge: float = setting(5.0, "bound of the logits", above=0)
    hinge_weight: float = setting(0.01, "of what exceeds the bound", least=0)
    local_views: int = setting(4, "small crops of an image", above=0)
    eval_bn: str = setting(
        "train_stats",
        "adapt_on_test: the authors' BatchNorm statistics of the images that are scored",
        choices=("train_stats", "adapt_on_test"),
        remedy="it can be train_stats or adapt_on_test",
    )
    global_view: View = setting(
        IMC_GLOBAL, "the two large crops of an image; of size 0: 28 of 32 pixels, 56 of 64, 76 of 96, else 7/8"
    )
    local_view: View = setting(
        IMC_LOCAL, "the small crops of an image; of size 0: 18 of 32 pixels, 36 of 64, 52 of 96, else 9/16"
    )

    def views(self, size: int) -> list[View]:
        """The views of images of `size` pixels, large crops first."""
        large, small = crop_sizes(size)
        large_view = replace(self.global_view, size=self.global_view.size or large)
        small_view = replace(self.local_view, size=self.local_view.size or small)
        return [large_view] * GLOBAL + [small_view] * self.local_views


def crop_sizes(size: int) -> tuple[int, int]:
    """The sides in pixels of large and small crops: the authors', or 7/8 and 9/16 of other images, as of 32 pixels."""
    return PUBLISHED_CROPS.get(size, (max(1, 7 * size // 8), max(1, 9 * size // 16)))


class SwavNet(nn.Module):
    """Backbone, projection and prototypes, for eqs. (1) to (6)."""

    def __init__(self, backbone: Backbone, dim: int, prototypes: int):
        super().__init__()
        self.backbone = backbone
        self.projection = LinearProjection(backbone.dim, dim)
        self.prototypes = Prototypes(dim, prototypes)

    def forward(
        self, images: Float[Tensor, "B C H W"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B E"], Float[Tensor, "B J"]]:
        """Compute (features z, unit embeddings, their cosines with prototypes), the last two in float32 at least."""
        features = self.backbone(images)
        embeddings = unit(self.projection(features).to(self.prototypes.weight.dtype))
        return features, embeddings, self.prototypes(embeddings)


class EveryClassifier(nn.ModuleList):
    """`classifiers` of every K, the task's K first: maps features (..., D) to a list of logits (H, ..., K).

    `select_loss` (a row of H for each K) is the sum of eq. (6) over the last epoch, `select_steps` its number of steps.
    """

    def __init__(self, task: Task, config: ImcSwavConfig, dim: int):
        every = (task.clusters, *config.extra_clusters)
        super().__init__(Classifiers(config.classifiers, dim, config.hidden, clusters) for clusters in every)
        self.select_loss: Tensor
        self.select_steps: Tensor
        self.register_buffer("select_loss", torch.zeros(len(every), config.classifiers))
        self.register_buffer("select_steps", torch.zeros(()))

    def forward(self, features: Tensor) -> list[Tensor]:
        return [classifiers(features) for classifiers in self]

    @torch.no_grad()
    def note(self, loss: Tensor, first: bool) -> None:
        """Add this step's eq. (6), (number of K, H), to the sums; the first step of an epoch resets them."""
        self.select_loss.copy_(loss if first else self.select_loss + loss)
        self.select_steps.copy_(torch.ones_like(self.select_steps) if first else self.select_steps + 1)

    def selected(self) -> Classifiers:
        """Return the classifier of the task's K with the lowest loss."""
        classifiers = self[0]
        assert isinstance(classifiers, Classifiers)
        return classifiers.select(int(self.select_loss[0].argmin()))


def train(task: Task, config: ImcSwavConfig, worker: Worker) -> None:
    """Train; the stage's last checkpoint holds the whole network, which `network` reads."""
    images, manifest = open_dataset(task, worker)
    check(task, config, manifest.training, manifest.clustered)
    steps_per_epoch = manifest.training // config.batch
    total = config.epochs * steps_per_epoch
    groups = task.bn_groups // worker.world  # on this worker

    torch.manual_seed(task.seed)
    net = SwavNet(new_backbone(task), config.dim, config.prototypes)
    crop_views = config.views(task.data.size)
    for size in {view.size for view in crop_views}:
        check_crop(net.backbone, task.data.channels, size, task.data.size)
    classifiers = EveryClassifier(task, config, net.backbone.dim)
    place(net, worker.device)
    place(classifiers, worker.device)
    optimizer = adam([*net.parameters(), *classifiers.parameters()], config.lr, config.betas, config.weight_decay)

    parts: dict[str, nn.Module] = {
        "backbone": net.backbone,
        "projection": net.projection,
        "prototypes": net.prototypes,
        "classifiers": classifiers,
    }
    queue, bank = None, None
    if config.queue:
        queue = parts["queue"] = place(Queue(config.queue, GLOBAL * config.dim), worker.device)
    if manifest.clustered < manifest.training:
        width = net.backbone.dim + config.prototypes
        bank = parts["bank"] = place(Bank(len(crop_views), config.batch, width), worker.device)
    start = resume(worker, parts, optimizer)

    net.train()
    classifiers.train()

    def trial(passes: int) -> Tensor:
        of_pass = config.batch // worker.world // passes
        views = [black_images(task, of_pass, view.size, worker) for view in crop_views]
        # the large crops of all passes wait for the assignments
        encoded = [encode(net, net, views[:GLOBAL], groups // passes) for _ in range(passes)]
        encoded.append(encode(net, net, views[GLOBAL:], groups // passes))
        return torch.stack([out.float().sum() for outs in encoded for out in outs]).sum()

    passes = passes_that_fit(task, [net], len(crop_views) * config.batch, trial, optimizer, worker)
    set_groups(classifiers, len(crop_views) * groups // passes)
    model, classify = worker.wrap(net), worker.wrap(classifiers)
    stream = view_lists(task, images, manifest.training, config.batch, config.epochs, crop_views, start, worker)
    known = known_images(task.seed, config.epochs, config.batch, manifest.training, manifest.clustered, start)
    reported = torch.zeros(4, device=worker.device)  # from the last step in which the classifiers learned
    for step, (views, (positions, before)) in enumerate(zip(stream, known, strict=True), start):
        rise, fall = warm_up(step + 1, config.warmup), steps_down(step / total, config.milestones, config.decay)
        set_lr(optimizer, config.lr * rise * fall)
        optimizer.zero_grad()

        # large crops first: assignments need their scores over the whole batch
        crops = list(zip(*(view.chunk(passes) for view in views), strict=True))
        with accumulating(model, last=False), autocast(worker.device, task.precision):
            large = [encode(model, net, views_of_pass[:GLOBAL], groups // passes) for views_of_pass in crops]
        update_statistics(net, GLOBAL)  # as the authors, who pass each view by itself
        embeddings, scores = (torch.cat([of_pass[kind].detach() for of_pass in large], dim=1) for kind in (1, 2))
        in_use = queue if step >= config.queue_start * steps_per_epoch and step * config.batch >= config.queue else None
        targets = assignments(config, net.prototypes, scores, embeddings, in_use, groups, worker)

        swav = torch.zeros((), device=worker.device)
        features, probs = [], []
        for views_of_pass, of_large, target in in_passes(model, crops, large, targets.chunk(passes, 1)):
            with autocast(worker.device, task.precision):
                of_small = encode(model, net, views_of_pass[GLOBAL:], groups // passes)
            z, _, every = (torch.cat(pair) for pair in zip(of_large, of_small, strict=True))
            swav_of_pass = losses.swapped_prediction(target, every, config.temperature) / passes
            swav_of_pass.backward()
            swav += swav_of_pass.detach()
            features.append(z.detach().float())
            probs.append((every.detach() / config.temperature).softmax(-1))
        update_statistics(net, config.local_views)
        if step < config.warmup:
            net.prototypes.weight.grad = None
        if queue is not None:
            queue.push(collectives.all_gather(embeddings.transpose(0, 1).flatten(1)), step)

        learned = list(zip(features, probs, strict=True))
        if bank is not None:
            rows = torch.cat([torch.cat(pair, 2) for pair in learned], dim=1)
            full = bank.push(rows, positions, before, worker)
            learned = [] if full is None else shares(full, net.backbone.dim, passes, worker)
        if learned:
            clustering_loss, objective, reported = cluster_losses(task, config, classify, learned, worker)
            clustering_loss.backward()
            update_statistics(classifiers, len(crop_views))
            classifiers.note(objective, first=before < config.batch)
        optimizer.step()
        net.prototypes.renormalise()

        loss = swav + reported[0] + config.hinge_weight * reported[1]
        names = ("mi", "hinge", "entropy", "conditional_entropy")
        metrics = {"swav": swav, **dict(zip(names, reported, strict=True))}
        probes = {"perplexity": partial(prototypes_in_use, probs)}
        worker.report(step + 1, total, loss, lambda: saved_state(parts, optimizer, classifiers), metrics, probes)
    images.close()


def encode(model: nn.Module, net: SwavNet, views: Sequence[Tensor], groups: int) -> list[Tensor]:
    """Return `SwavNet`'s outputs for views of one size, (V, b, ...) each; views share no BatchNorm group."""
    set_groups(net, len(views) * groups)
    return [out.unflatten(0, (len(views), -1)) for out in model(torch.cat(list(views)))]


@torch.no_grad()
def assignments(
    config: ImcSwavConfig,
    prototypes: Prototypes,
    scores: Float[Tensor, "T b J"],
    embeddings: Float[Tensor, "T b E"],
    queue: Queue | None,
    groups: int,
    worker: Worker,
) -> Float[Tensor, "T b J"]:
    """Compute q of eqs. (3) and (4) for this worker's rows of each large view; Sinkhorn sees all rows and the queue."""
    parts = scores.unflatten(1, (groups, -1))
    if queue is not None:
        earlier = queue.keys.chunk(worker.world)[worker.rank].unflatten(1, (len(scores), -1)).transpose(0, 1)
        parts = torch.cat([parts, prototypes(earlier).unflatten(1, (groups, -1))], dim=2)
    balance = partial(losses.sinkhorn, epsilon=config.epsilon, iterations=config.iterations)
    balanced = torch.stack([balance(of_view, gather=collectives.all_gather) for of_view in parts])
    return balanced[:, :, : scores.shape[1] // groups].flatten(1, 2)


def cluster_losses(
    task: Task, config: ImcSwavConfig, classify: nn.Module, learned: list[tuple[Tensor, Tensor]], worker: Worker
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (loss to minimise, eq. (6) of every classifier (number of K, H), four numbers to report) of a batch.

    `learned` holds for each pass the features (V, b, D) and the prototypes' probabilities u (V, b, J) of this worker's
    rows. The numbers are means over classifiers of the task's K: eq. (6), the hinge, H(Y) and H(Y|U).
    """
    with autocast(worker.device, task.precision):
        by_pass = [classify(features) for features, _ in learned]
    objectives, loss, reported = [], torch.zeros((), device=worker.device), []
    for logits in zip(*by_pass, strict=True):  # of one K, by pass
        counts = [losses.joint_counts(x.softmax(-1), u) for x, (_, u) in zip(logits, learned, strict=True)]
        joint = collectives.total(torch.stack(counts).sum(0)) / config.batch  # H V V K J
        entropy, conditional = (by_view.flatten(1).mean(1) for by_view in losses.entropies(joint))
        objective = conditional - config.balance * entropy
        hinge = torch.stack([losses.logit_hinge(x, config.hinge).mean(1) for x in logits]).mean(0)
        loss = loss + (objective + config.hinge_weight * hinge).sum()
        objectives.append(objective.detach())
        reported.append(torch.stack([objective, hinge, entropy, conditional]).mean(1).detach())
    return loss, torch.stack(objectives), reported[0]


def prototypes_in_use(probs: list[Tensor]) -> Tensor:
    """Compute the perplexity, in [1, J], of the mean of u over images and views."""
    return losses.perplexity(collectives.mean(torch.cat(probs, 1).flatten(0, 1).mean(0)))


def saved_state(parts: dict[str, nn.Module], optimizer: torch.optim.Optimizer, classifiers: EveryClassifier) -> Tensors:
    return {**state_of(parts, optimizer), "selected": classifiers.selected().state_dict()}


def network(task: Task, run: Path) -> ClassifierNet:
    """Load the trained backbone with the selected classifier: images (B, C, H, W) to logits (B, K)."""
    saved = finished(run / "imc_swav")
    backbone = Backbone(task.backbone, task.data.channels, task.data.size)
    backbone.load_state_dict(saved.tensors("backbone"))
    return ClassifierNet(backbone, Classifiers.holding(saved.tensors("selected")))


def trained_classifiers(run: Path) -> tuple[Classifiers, Tensor]:
    """Load (all classifiers of the task's K, the mean of eq. (6) of each over the last epoch (H,))."""
    tensors = finished(run / "imc_swav").tensors("classifiers")
    of_task = named(tensors, "0.")
    return Classifiers.holding(of_task).eval(), tensors["select_loss"][0] / tensors["select_steps"]


@torch.no_grad()
def adapt_statistics(net: nn.Module, task: Task, config: ImcSwavConfig, images: Images, index: np.ndarray) -> None:
    """Set BatchNorm statistics from up to 50 batches of the images `index`, which are scored, as the authors do.

    These are statistics of whole images, while training used crops. The predictions depend on which images are scored
    together.
    """
    order = np.random.default_rng(task.seed).permutation(index)[: ADAPT_BATCHES * config.batch]
    order = order[: max(1, len(order) // config.batch) * config.batch]
    set_groups(net, 1)
    net.train()
    for image, number in images.batches(order, config.batch):
        with autocast(image.device, task.precision):
            net(augment.apply(PLAIN, image, number, (), task.backbone.statistics))
        update_statistics(net)
    net.eval()


def result(
    task: Task, config: ImcSwavConfig, run: Path, device: torch.device, progress: Progress, until: str | None
) -> Clustering:
    """Return the network with the selected classifier; heads are all classifiers of the task's K, adapted as it is."""
    net = network(task, run)
    classifiers, loss = trained_classifiers(run)
    if config.eval_bn == "adapt_on_test":
        images, manifest = open_run_dataset(task, run, device)
        with closing(images):
            whole = place(ClassifierNet(net.backbone, classifiers), device)
            adapt_statistics(whole, task, config, images, scored_images(manifest))
        net.head = classifiers.select(int(loss.argmin())).eval()
    (labels,) = reduced(net.backbone, task, run, device, partial(_labels_by_classifier, classifiers), progress)
    by_head = labels.T
    return Clustering(task, net, by_head, loss)


@torch.no_grad()
def _labels_by_classifier(classifiers: Classifiers, features: Float[Tensor, "B D"]) -> tuple[np.ndarray]:
    return (classifiers.to(features.device)(features).argmax(2).cpu().numpy().T,)


def check(task: Task, config: ImcSwavConfig, num_images: int, clustered: int) -> None:
    """Raise a UserError if these settings cannot train on `num_images`, the first `clustered` of them with clusters."""
    check_ranges("imc_swav", config, "epochs", "batch", "lr", "dim")
    require_positive("imc_swav", prototypes=config.prototypes)
    check_ranges("imc_swav", config, "temperature", "epsilon", "iterations", "hidden", "classifiers", "balance")
    check_ranges("imc_swav", config, "decay", "hinge", "local_views", "warmup", "weight_decay", "queue", "queue_start")
    check_ranges("imc_swav", config, "hinge_weight")
    check_batch(task, "imc_swav", config.batch, num_images)
    check_ranges("imc_swav", config, "prototypes", "milestones", "betas")
    if config.queue % task.bn_groups:
        raise UserError(f"imc_swav.queue is {config.queue}; it must be a multiple of bn_groups, {task.bn_groups}")
    if config.queue and not config.batch <= config.queue <= num_images:
        raise UserError(
            f"imc_swav.queue is {config.queue}; give 0, or from the {config.batch} images of a batch to {num_images}"
        )
    for clusters in config.extra_clusters:
        if not 2 <= clusters <= clustered or (task.clusters, *config.extra_clusters).count(clusters) > 1:
            raise UserError(
                f"imc_swav.extra_clusters holds {clusters}; name each number of clusters once, from 2 to the "
                f"{clustered} images, and not {task.clusters}, which is trained anyway"
            )
    if clustered < num_images and clustered - num_images % config.batch < config.batch:
        raise UserError(
            f"imc_swav.batch is {config.batch}, more than an epoch is sure to hold of the {clustered} images that are "
            f"to be clustered; set a smaller one (--set imc_swav.batch=...)"
        )
    check_ranges("imc_swav", config, "eval_bn")
