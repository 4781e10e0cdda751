"""Another stage 1: BYOL (Grill et al. 2020) learns features without labels and without negatives.

A network predicts, from one view of an image, the projection of the other view by its own moving average. There are no
negatives, so nothing pushes two images of a kind apart, which suits clusters. The losses of both directions are added.
Momentum 0.996 rising to 1 is the paper's. The other defaults, for small images and SGD, were not searched.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spice_dist import losses
from spice_dist.data.views import MOCO_V2, View
from spice_dist.distributed import collectives
from spice_dist.distributed.worker import Worker
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
from spice_dist.models.heads import MLP
from spice_dist.models.momentum import follow, slow_copy
from spice_dist.models.split_batch_norm import update_statistics
from spice_dist.optim import cosine, set_lr, sgd, warm_up
from spice_dist.settings import check_ranges, setting
from spice_dist.task import Task


@dataclass(frozen=True)
class BYOLConfig:
    epochs: int = setting(1000, "passes over the images", above=0)
    batch: int = setting(256, "images per optimizer step, all workers together", above=0)
    lr: float = setting(0.03, "learning rate for this global batch; falls to 0 along a cosine", above=0)
    warmup: float = setting(
        0.0, "epochs over which the learning rate rises first; the paper has 10 of its 1,000", least=0
    )
    weight_decay: float = setting(5e-4, "on every parameter", least=0)
    momentum: float = setting(
        0.996, "of the target network at the start; it rises to 1 along a cosine", least=0, below=1
    )
    hidden: int = setting(4096, "width of the hidden layer of projection and prediction", above=0)
    dim: int = setting(256, "width of the projection", above=0)
    view: View = setting(MOCO_V2, "both views of an image")


def train(task: Task, config: BYOLConfig, worker: Worker) -> None:
    """Train; the stage's last checkpoint holds the online network's backbone, `backbone.safetensors`."""
    images, manifest = open_dataset(task, worker)
    check(task, config, manifest.training)
    steps_per_epoch = manifest.training // config.batch
    total = config.epochs * steps_per_epoch

    torch.manual_seed(task.seed)
    backbone = first_backbone(task, worker.run)
    projection = MLP(backbone.dim, config.hidden, config.dim)
    prediction = MLP(config.dim, config.hidden, config.dim)
    online = place(nn.Sequential(backbone, projection, prediction), worker.device)
    target = slow_copy(online[:2])
    optimizer = sgd(online.parameters(), config.lr, config.weight_decay)

    parts = {"backbone": backbone, "projection": projection, "prediction": prediction, "target": target}
    start = resume(worker, parts, optimizer)

    online.train()
    target.train()

    def trial(passes: int) -> Tensor:
        views = black_images(task, 2 * config.batch // worker.world // passes, config.view.size, worker)
        with torch.no_grad():
            targets = unit(target(views))
        return losses.byol(unit(online(views)), targets)

    passes = passes_that_fit(task, [online, target], 2 * config.batch, trial, optimizer, worker)
    model = worker.wrap(online)
    views = view_pairs(task, images, manifest.training, config.batch, config.epochs, config.view, start, worker)
    for step, (one, other) in enumerate(views, start):
        if worker.leaves_out(step):
            continue
        epoch = step / steps_per_epoch
        set_lr(optimizer, config.lr * warm_up(epoch, config.warmup) * cosine(epoch / config.epochs))

        optimizer.zero_grad()
        loss = torch.zeros((), device=worker.device)
        projections: list[Tensor] = []
        for pair in in_passes(model, one.chunk(passes), other.chunk(passes)):
            with autocast(worker.device, task.precision):
                with torch.no_grad():
                    targets = [unit(target(view)) for view in pair]
                predictions = [unit(model(view)) for view in pair]
                distances = losses.byol(predictions[0], targets[1]) + losses.byol(predictions[1], targets[0])
                loss_of_pass = distances / passes
            loss_of_pass.backward()
            loss += loss_of_pass.detach()
            projections += targets
        optimizer.step()
        update_statistics(online)
        update_statistics(target)
        follow(target, online[:2], target_momentum(config.momentum, step / total))

        probes = {
            "uniformity": lambda seen=projections: losses.uniformity(collectives.all_gather(torch.cat(seen))),
            "effective_rank": lambda seen=projections: losses.effective_rank(collectives.all_gather(torch.cat(seen))),
        }
        # the loss is the sum of two squared distances, alignment their mean
        metrics = {"alignment": loss / 2}
        worker.report(step + 1, total, loss, lambda: state_of(parts, optimizer), metrics, probes)
    images.close()


def target_momentum(first: float, progress: float) -> float:
    """Compute 1 - (1 - first) (cos(pi p) + 1) / 2: `first` at progress 0, 1 at progress 1."""
    return 1 - (1 - first) * (math.cos(math.pi * progress) + 1) / 2


def check(task: Task, config: BYOLConfig, num_images: int) -> None:
    """Raise a UserError if these settings cannot train on so many images."""
    check_ranges("byol", config, "lr", "epochs", "batch", "hidden", "dim", "weight_decay")
    check_batch(task, "byol", config.batch, num_images)
    check_ranges("byol", config, "momentum")
    if not 0 <= config.warmup < config.epochs:
        raise UserError(f"byol.warmup is {config.warmup} epochs; give 0 or more, and fewer than byol.epochs")
