"""Stage 1 of SPICE: MoCo-v2 (Chen, Fan, Girshick and He 2020) learns features without labels.

The query of one random view must be closer to the key of the other view than to the keys of other images in a queue.
The key network is a moving average of the query network. Its images are shuffled, so that BatchNorm's statistics do not
identify the pair. The defaults are the 4-GPU recipe that SPICE uses: global batch 128, lr 0.015, tau 0.2, mu 0.999.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from spice_dist import losses
from spice_dist.data.views import MOCO_V2, View
from spice_dist.distributed import collectives
from spice_dist.distributed.worker import Probes, Worker
from spice_dist.errors import UserError
from spice_dist.methods.plumbing import (
    autocast,
    black_images,
    check_batch,
    first_backbone,
    in_passes,
    open_dataset,
    passes_that_fit,
    place,
    resume,
    state_of,
    view_pairs,
)
from spice_dist.models.backbone import unit
from spice_dist.models.heads import Projection
from spice_dist.models.momentum import Queue, follow, slow_copy
from spice_dist.models.split_batch_norm import forget_statistics, update_statistics
from spice_dist.optim import cosine, lars, set_lr, sgd, warm_up
from spice_dist.settings import check_ranges, setting
from spice_dist.task import Task
from spice_dist.transfer import send

KEY, QUERY = 2, 3  # streams of random numbers that shuffle a view's images; 0 and 1 draw the views


@dataclass(frozen=True)
class MoCoConfig:
    epochs: int = setting(1000, "passes over the images", above=0)
    batch: int = setting(128, "images per optimizer step, all workers together", above=0)
    lr: float = setting(
        0.015, "learning rate for this global batch; falls to 0 along a cosine, epoch by epoch", above=0
    )
    warmup: float = setting(
        0.0, "epochs over which the learning rate rises first; as published there are none", least=0
    )
    optimizer: str = setting(
        "sgd", "lars is for batches of thousands", choices=("sgd", "lars"), remedy="it can be sgd or lars"
    )
    weight_decay: float = setting(1e-4, "on every parameter; of lars on kernels only", least=0)
    momentum: float = setting(
        0.999, "mu, of the moving average that is the key network", least=0, most=1, remedy="give 0 to 1, such as 0.999"
    )
    temperature: float = setting(0.2, "tau, of the loss", above=0)
    symmetric: bool = setting(False, "add the loss with the views' roles exchanged; their keys enter the queue too")
    queue: int = setting(12800, "N_q, from the batch (twice, if symmetric) to the number of images", above=0)
    dim: int = setting(128, "width of the projection", above=0)
    view: View = setting(MOCO_V2, "both views of an image")

    @property
    def new_keys(self) -> int:
        """Number of keys that a step adds to the queue."""
        return self.batch * (2 if self.symmetric else 1)


def train(task: Task, config: MoCoConfig, worker: Worker) -> None:
    """Train; the stage's last checkpoint holds the query network's backbone, `backbone.safetensors`."""
    images, manifest = open_dataset(task, worker)
    check(task, config, manifest.training)
    steps_per_epoch = manifest.training // config.batch
    total = config.epochs * steps_per_epoch

    torch.manual_seed(task.seed)
    backbone = first_backbone(task, worker.run)
    projection = Projection(backbone.dim, config.dim)
    query_net = place(nn.Sequential(backbone, projection), worker.device)
    key_net = slow_copy(query_net)
    queue = Queue(config.queue, config.dim).to(worker.device)
    if config.optimizer == "lars":
        optimizer = lars(query_net, config.lr, config.weight_decay)
    else:
        optimizer = sgd(query_net.parameters(), config.lr, config.weight_decay)

    parts: dict[str, nn.Module] = {"backbone": backbone, "projection": projection, "key": key_net, "queue": queue}
    start = resume(worker, parts, optimizer)

    query_net.train()
    key_net.train()

    def trial(passes: int) -> Tensor:
        views = black_images(task, config.new_keys // worker.world // passes, config.view.size, worker)
        with torch.no_grad():
            keys = unit(key_net(views))
        return losses.info_nce(unit(query_net(views)), keys, queue.keys, config.temperature)

    passes = passes_that_fit(task, [query_net, key_net], config.new_keys, trial, optimizer, worker)
    model = worker.wrap(query_net)
    staleness = Staleness(config.queue // config.new_keys)
    views = view_pairs(task, images, manifest.training, config.batch, config.epochs, config.view, start, worker)
    for step, (query_view, key_view) in enumerate(views, start):
        if worker.leaves_out(step):
            continue
        rise, fall = warm_up(step / steps_per_epoch, config.warmup), cosine(step // steps_per_epoch / config.epochs)
        set_lr(optimizer, config.lr * rise * fall)

        follow(key_net, query_net, config.momentum)
        keys = [shuffled_keys(task, key_net, key_view, passes, (task.seed, step, KEY), worker)]
        if config.symmetric:
            update_statistics(key_net)
            keys.append(shuffled_keys(task, key_net, query_view, passes, (task.seed, step, QUERY), worker))
        update_statistics(key_net)
        directions = zip((query_view, key_view), keys, strict=False)  # one, or both if symmetric

        optimizer.zero_grad()
        loss, alignment = torch.zeros(2, device=worker.device)
        for pairs in in_passes(model, *(_by_pass(view, key, passes, worker) for view, key in directions)):
            with autocast(worker.device, task.precision):
                queries = [(unit(model(view)), key) for view, key in pairs]
                each = [losses.info_nce(query, key, queue.keys, config.temperature) for query, key in queries]
                loss_of_pass = torch.stack(each).sum() / passes
            loss_of_pass.backward()
            loss += loss_of_pass.detach()
            alignment += losses.alignment(queries[0][0].detach(), queries[0][1]) / passes
        optimizer.step()
        update_statistics(query_net)

        staleness.measure(task, step, key_net, key_view, keys[0], passes, worker)
        queue.push(torch.cat(keys), step)
        probes = {"uniformity": partial(losses.uniformity, keys[0]), **staleness.probe()}
        if (step + 1) * config.new_keys >= config.queue:  # before, the queue holds random vectors
            probes["effective_rank"] = partial(losses.effective_rank, queue.keys)
        metrics = {"alignment": alignment}
        worker.report(step + 1, total, loss, lambda: state_of(parts, optimizer), metrics, probes)
    images.close()


@torch.no_grad()
def shuffled_keys(
    task: Task, key_net: nn.Module, view: Tensor, passes: int, key: tuple[int, int, int], worker: Worker
) -> Tensor:
    """Compute keys (B, dim) of the global batch, in its order, normalised in groups of shuffled images (shuffle-BN)."""
    order = np.random.default_rng(key).permutation(len(view) * worker.world)
    shuffled = collectives.exchange(view, order)
    with autocast(worker.device, task.precision):
        keys = torch.cat([unit(key_net(of_pass)).float() for of_pass in shuffled.chunk(passes)])
    keys = collectives.all_gather(keys)
    return torch.empty_like(keys).index_copy_(0, send(torch.from_numpy(order), view.device), keys)


def _by_pass(view: Tensor, keys: Tensor, passes: int, worker: Worker) -> list[tuple[Tensor, Tensor]]:
    """Pair this worker's views with their keys among those of the global batch, pass by pass."""
    keys_of_worker = keys.chunk(worker.world)[worker.rank]
    return list(zip(view.chunk(passes), keys_of_worker.chunk(passes), strict=True))


class Staleness:
    """Measures 1 - cosine of keys that leave the queue and the current key network's keys of the same views.

    It is the mean over one batch: 0 is fresh, 1 unrelated. A shorter queue or a momentum nearer to 1 lowers it. The
    cost is one forward pass for each filling of the queue.
    """

    def __init__(self, lag: int):
        self.lag = lag
        self.kept: tuple[int, Tensor, Tensor] | None = None  # a step with its views and keys
        self.value: Tensor | None = None

    def measure(
        self, task: Task, step: int, key_net: nn.Module, view: Tensor, keys: Tensor, passes: int, worker: Worker
    ) -> None:
        """Keep this step's batch, or compare the one kept `lag` steps ago."""
        if self.kept is None:
            self.kept = (step, view, keys)
        elif step == self.kept[0] + self.lag:
            then, old_view, old_keys = self.kept
            now = shuffled_keys(task, key_net, old_view, passes, (task.seed, then, KEY), worker)
            forget_statistics(key_net)
            self.kept, self.value = None, 1 - (now * old_keys).sum(1).mean()

    def probe(self) -> Probes:
        """Return the last measurement; nothing before the first batch has left the queue."""
        value = self.value
        return {} if value is None else {"staleness": lambda: value}


def check(task: Task, config: MoCoConfig, num_images: int) -> None:
    """Raise a UserError if these settings cannot train on so many images."""
    check_ranges("moco", config, "lr", "temperature", "epochs", "batch", "queue", "dim", "momentum", "weight_decay")
    check_batch(task, "moco", config.batch, num_images)
    check_ranges("moco", config, "optimizer")
    if config.optimizer == "lars" and config.weight_decay == 0:
        raise UserError("lars adapts the step only of what decays: set moco.weight_decay above 0, such as 1e-6")
    if not 0 <= config.warmup < config.epochs:
        raise UserError(f"moco.warmup is {config.warmup} epochs; give 0 or more, and fewer than moco.epochs")
    if not config.new_keys <= config.queue <= num_images:
        raise UserError(
            f"moco.queue is {config.queue}; it must hold the {config.new_keys} keys of a step and at most one of each "
            f"of the {num_images} images, or an image would be its own negative (--set moco.queue=...)"
        )
