"""Stage 1 of SPICE: MoCo-v2 (Chen, Fan, Girshick and He 2020) learns features without labels.

Two random views of an image must find each other among the keys of other images, kept in a queue. The key network is a
slow average of the query network and sees its images in another order, so that BatchNorm cannot give the pair away.
The defaults are the 4-GPU recipe that SPICE uses: global batch 128, lr 0.015, tau 0.2, mu 0.999.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spice_dist import losses
from spice_dist.data import augment
from spice_dist.data.augment import MOCO_V2, View
from spice_dist.data.images import Images
from spice_dist.data.order import epoch_order, worker_batches
from spice_dist.distributed import collectives
from spice_dist.distributed.worker import Worker, accumulating
from spice_dist.errors import UserError
from spice_dist.methods.plumbing import autocast, load_state, open_dataset, passes_per_step, place, state_of
from spice_dist.models.backbone import Backbone, unit
from spice_dist.models.heads import Projection
from spice_dist.models.momentum import Queue, follow, slow_copy
from spice_dist.models.split_batch_norm import update_statistics
from spice_dist.optim import cosine, set_lr
from spice_dist.task import Task, require_positive

QUERY, KEY, SHUFFLE = 0, 1, 2  # streams of random numbers


@dataclass(frozen=True)
class MoCoConfig:
    epochs: int = 1000
    batch: int = 128  # images per optimizer step, all workers together
    lr: float = 0.015  # for this global batch; falls to 0 along a cosine
    weight_decay: float = 1e-4  # on every parameter
    momentum: float = 0.999  # mu, of the key network
    temperature: float = 0.2  # tau
    queue: int = 12800  # N_q, a multiple of the batch
    dim: int = 128  # width of the projection
    view: View = MOCO_V2


def train(task: Task, config: MoCoConfig, worker: Worker) -> None:
    """Leaves the query network's backbone in the stage's last checkpoint, `backbone.safetensors`."""
    images, manifest = open_dataset(task, worker.run, worker.device)
    check(task, config, manifest.training)
    steps_per_epoch = manifest.training // config.batch
    total = config.epochs * steps_per_epoch
    groups = task.bn_groups // worker.world  # on this worker

    torch.manual_seed(task.seed)
    backbone = Backbone(task.backbone, task.data.channels, task.data.size)
    projection = Projection(backbone.dim, config.dim)
    query_net = place(nn.Sequential(backbone, projection), worker.device)
    key_net = slow_copy(query_net)
    queue = Queue(config.queue, config.dim).to(worker.device)
    optimizer = torch.optim.SGD(query_net.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay)

    parts: dict[str, nn.Module] = {"backbone": backbone, "projection": projection, "key": key_net, "queue": queue}
    start = 0
    if saved := worker.resume():
        start = saved.step
        load_state(parts, optimizer, saved)
    model = worker.wrap(query_net)

    query_net.train()
    key_net.train()
    passes = passes_per_step(query_net, groups, worker.device)
    passes_per_step(key_net, groups, worker.device)
    stream = _views(task, images, manifest.training, config, start, worker)
    for step, (query_view, key_view) in enumerate(stream, start):
        set_lr(optimizer, config.lr * cosine(step // steps_per_epoch / config.epochs))

        follow(key_net, query_net, config.momentum)
        keys = shuffled_keys(key_net, key_view, passes, (task.seed, step, SHUFFLE), worker)
        own_keys = keys.chunk(worker.world)[worker.rank]

        optimizer.zero_grad()
        loss = torch.zeros((), device=worker.device)
        for number, (view, key) in enumerate(zip(query_view.chunk(passes), own_keys.chunk(passes), strict=True), 1):
            with accumulating(model, last=number == passes), autocast(worker.device):
                query = unit(model(view))
                part = losses.info_nce(query, key, queue.keys, config.temperature) / passes
            part.backward()
            loss += part.detach()
        optimizer.step()
        update_statistics(query_net)
        queue.push(keys, step)
        worker.report(step + 1, total, {"loss": loss}, lambda: state_of(parts, optimizer))
    images.close()


@torch.no_grad()
def shuffled_keys(key_net: nn.Module, view: Tensor, passes: int, key: tuple[int, int, int], worker: Worker) -> Tensor:
    """Shuffle-BN: keys (B, dim) of the global batch in its order, each normalised among other images than its query."""
    views = collectives.all_gather(view)
    order = torch.from_numpy(np.random.default_rng(key).permutation(len(views))).to(view.device)
    own = views[order.chunk(worker.world)[worker.rank]]
    with autocast(worker.device):
        keys = torch.cat([unit(key_net(part)).float() for part in own.chunk(passes)])
    update_statistics(key_net)
    keys = collectives.all_gather(keys)
    return torch.empty_like(keys).index_copy_(0, order, keys)


def _views(
    task: Task, images: Images, num_images: int, config: MoCoConfig, start: int, worker: Worker
) -> Iterator[list[Tensor]]:
    """This worker's two views of every global batch from step `start` on; an epoch's incomplete batch is left out."""
    steps = num_images // config.batch
    for epoch in range(start // steps, config.epochs):
        own = worker_batches(epoch_order(task.seed, epoch, num_images), config.batch, worker.world, worker.rank)
        done = max(0, start - epoch * steps)
        pair = [(config.view, (task.seed, epoch, stream)) for stream in (QUERY, KEY)]
        if done < steps:
            order, size = own[done:].ravel(), own.shape[1]
            for views, _ in augment.view_batches(images, order, size, pair, task.backbone.statistics):
                yield views


def check(task: Task, config: MoCoConfig, num_images: int) -> None:
    """UserError if these settings cannot train on so many images."""
    require_positive(
        "moco", epochs=config.epochs, batch=config.batch, queue=config.queue, temperature=config.temperature
    )
    if config.batch > num_images:
        raise UserError(
            f"moco.batch is {config.batch}, more than the {num_images} images; "
            f"set it to {num_images // task.bn_groups * task.bn_groups} or less (--set moco.batch=...)"
        )
    if config.batch % task.bn_groups:
        raise UserError(f"moco.batch is {config.batch}, which is not a multiple of bn_groups, {task.bn_groups}")
    if config.queue % config.batch:
        raise UserError(f"moco.queue is {config.queue}, which is not a multiple of moco.batch, {config.batch}")
