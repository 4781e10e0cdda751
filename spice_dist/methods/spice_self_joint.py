"""Stage 2 of SPICE with a backbone that changes: the published code's BatchNorm, and the paper's ablation.

The published code encodes the strong images of every head in every minibatch, with the backbone in train mode.
BatchNorm then uses the batch's statistics, and its running ones drift away from those of stage 1's features. An epoch
costs (2 + R H) N forward passes, where `spice_self` costs 2 N. `backbone_bn="train"` does this. `joint` also trains the
backbone, as in the paper's ablation. Both compute confidence by the current backbone and similarity on the features of
stage 1, in one process.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_dist import artifacts
from spice_dist.data.views import PLAIN
from spice_dist.distributed.worker import Worker
from spice_dist.errors import UserError
from spice_dist.methods import spice_self
from spice_dist.methods.plumbing import load_backbone, open_dataset, place, resume, state_of, view_features
from spice_dist.methods.spice_self import (
    FOLLOWED,
    ROUND,
    SHUFFLE,
    SpiceSelfConfig,
    check,
    drawn_images,
    drawn_views,
    encode_view,
    followed_images,
    head_optimizer,
    head_outputs,
    loss_of,
    m_step,
    new_heads,
    plain_loss,
    shuffles,
    write_features,
)
from spice_dist.models.backbone import Backbone
from spice_dist.models.heads import ClusterHeads
from spice_dist.models.momentum import copy_where
from spice_dist.models.split_batch_norm import set_groups, update_statistics
from spice_dist.pseudo_labels import margins, prototype_labels, quotas, selection_loss
from spice_dist.task import Task
from spice_dist.transfer import send


def train(task: Task, config: SpiceSelfConfig, worker: Worker) -> None:
    """Train as `spice_self.train`, with a backbone that changes within an E-step.

    Write also `spice_self/features.npy`, by the backbone at the epoch of the selected heads.
    """
    images, manifest = open_dataset(task, worker)
    num_images = manifest.clustered
    check(task, config, num_images)
    if worker.world > 1:
        raise UserError("a backbone that changes in stage 2 is trained by one worker: use --workers 0")
    features = torch.from_numpy(artifacts.features(worker.run, num_images)).to(worker.device)
    batch = config.e_step_images(num_images, task.clusters)
    sizes, sizes_of_all = (quotas(count, task.clusters, config.prior) for count in (batch, num_images))
    steps_per_epoch = num_images // batch
    total = config.epochs * steps_per_epoch

    backbone = place(load_backbone(task, worker.run), worker.device).eval()
    torch.manual_seed(task.seed)
    heads = new_heads(task, config, backbone.dim).to(worker.device)
    selection = JointSelection(heads, backbone, config.epochs, min(num_images, FOLLOWED))
    optimizer = head_optimizer(task, config, [*heads.parameters(), *(backbone.parameters() if config.joint else ())])
    parts: dict[str, nn.Module] = {"heads": heads, "select": selection, "backbone": backbone}
    start = resume(worker, parts, optimizer)

    encode = partial(encode_view, task, backbone, heads.inputs)
    learning_loss = loss_of(task, config)
    followed = torch.from_numpy(followed_images(task, num_images, selection.followed.shape[2])).to(worker.device)
    for step in range(start, total):
        epoch = step // steps_per_epoch
        chosen = drawn_images(task, step, num_images)[:batch]
        rows = send(torch.from_numpy(chosen), worker.device)
        views = view_features(task, images, chosen, drawn_views(task, config, epoch), [encode, lambda view: view])
        scored, strong_images = (view.float() for view in views)

        with torch.no_grad():  # E-step
            confidence = head_outputs(heads, scored, margins)
            overlap = config.assignment == "overlap"
            members, labels = prototype_labels(features[rows], confidence, sizes, config.center_fraction, overlap)

        order = send(shuffles(config, members.shape[1], (task.seed, step, SHUFFLE)), worker.device)
        inputs = partial(encode_again, encode, config, backbone, strong_images)
        losses = torch.zeros(len(heads), device=worker.device)
        for minibatches in order.split(ROUND):  # M-step
            loss = m_step(heads, optimizer, inputs, members, labels, minibatches, learning_loss, task.precision)
            losses += loss * len(minibatches)

        if (step + 1) % steps_per_epoch == 0:
            # features of all images by the current backbone
            (now,) = view_features(task, images, np.arange(num_images), [(PLAIN, (0, 0, 0))], [encode])
            with torch.no_grad():
                outputs, plain = head_outputs(heads, now), plain_loss(config)
                loss = selection_loss(features, outputs, sizes_of_all, config.center_fraction, plain)
                labels = heads(now[followed]).argmax(2)
            selection.update(epoch, heads, backbone, loss, labels)
        probes = {"select_loss": selection.loss.min} if step + 1 >= steps_per_epoch else {}  # before, it is infinite
        mean = losses.sum() / len(order) / config.heads
        worker.report(step + 1, total, mean, lambda: state_of(parts, optimizer), probes=probes, every=1)
    backbone.load_state_dict(selection.backbone.state_dict())
    write_features(images, task, encode, worker)
    images.close()


class JointSelection(nn.Module):
    """Holds all heads and the backbone of the epoch with the lowest label-free loss, and the history of epochs.

    Heads of different epochs would need the features of different networks.
    """

    def __init__(self, heads: ClusterHeads, backbone: Backbone, epochs: int, followed: int):
        super().__init__()
        count, device = len(heads), heads.biases[0].device
        self.best = heads.part(0, count).requires_grad_(False)
        self.backbone = deepcopy(backbone).requires_grad_(False)
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
        better = loss.min() < self.loss.min()
        self.loss.copy_(loss.where(better, self.loss))
        copy_where(better, self.best, heads)
        copy_where(better, self.backbone, backbone)


def encode_again(
    encode: Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B D"]],
    config: SpiceSelfConfig,
    backbone: Backbone,
    images: Float[Tensor, "M C H W"],
    rows: Int[Tensor, "heads B"],
) -> Float[Tensor, "heads B D"]:
    """Encode each head's images by the current `backbone` of `encode`; those of all heads are one BatchNorm batch."""
    set_groups(backbone, 1)
    backbone.train(config.backbone_bn == "train")
    with torch.set_grad_enabled(config.joint):
        features = encode(images[rows.flatten()])
    update_statistics(backbone)
    backbone.eval()
    return features.unflatten(0, rows.shape)


def loop_of(config: SpiceSelfConfig) -> Callable[[Task, SpiceSelfConfig, Worker], None]:
    """Return the loop of these settings: this file's, or the paper's with a frozen backbone."""
    return train if config.encodes_anew else spice_self.train
