"""The reliable labels of stage 3, and how they are made again from the averaged network while it trains."""

import sys

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from spice_dist import artifacts
from spice_dist.data.images import Images
from spice_dist.distributed import collectives
from spice_dist.distributed.worker import Worker
from spice_dist.inference import outputs
from spice_dist.methods.reliable import ReliableConfig, choose
from spice_dist.models.backbone import unit
from spice_dist.models.heads import ClusterNet, LinearNet
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.task import Task


class FeaturesAndLogits(nn.Module):
    """Maps images (B, C, H, W) to the features of a network and its logits beside them, (B, D + K)."""

    def __init__(self, net: ClusterNet | LinearNet):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        features = self.net.backbone(images)
        return torch.cat([features.float(), self.net.logits(features)], 1)


class ReliableLabels(nn.Module):
    """(N,) int64 on the host, UNRELIABLE where an image has none; a module, so that a checkpoint can hold them."""

    def __init__(self, labels: Int[Tensor, " N"]):
        super().__init__()
        self.labels: Tensor
        self.register_buffer("labels", labels)

    def clusters(self) -> list[int]:
        """Those that have a label."""
        return self.labels[self.labels != UNRELIABLE].unique().tolist()


def refreshed_labels(
    task: Task,
    least_agreement: float,
    ema: ClusterNet | LinearNet,
    images: Images,
    num_images: int,
    worker: Worker,
    labels: Int[Tensor, " N"],
) -> Int[Tensor, " N"]:
    """Reliable labels (N,) by the rule and settings of the stage `reliable`, from what the averaged network sees.

    Its clusters and its features of the first `num_images` images take the place of those of stages 1 and 2: an image
    is reliable where its neighbours among these features agree with its cluster. Costs one forward pass over these
    images and their nearest neighbours; every worker does its share. The file `reliable/labels.npy` stays as it is.

    The present `labels` stay, and a line says so, if no new one would be reliable, and if the averaged network agrees
    with less than `least_agreement` of them: it has not learnt them yet, and would replace them by its own errors.
    """
    settings = artifacts.reliable_summary(worker.run)["settings"]
    share = collectives.share(num_images)
    index_of_share = np.arange(share.start, share.stop)
    model = FeaturesAndLogits(ema)
    chunks = outputs(model, images, index_of_share, task.backbone.statistics, precision=task.precision)
    parts = [chunk.tensor_split([-task.clusters], 1) for chunk in chunks]
    features = collectives.gather_shares(torch.cat([unit(of_chunk).half() for of_chunk, _ in parts]), num_images)
    logits = collectives.gather_shares(torch.cat([of_chunk for _, of_chunk in parts]), num_images)
    confidences, clusters = logits.softmax(1).max(1)

    def predicted(index: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(index).to(clusters.device)
        return clusters[rows], confidences[rows]

    def unchanged(why: str) -> Tensor:
        if worker.rank == 0:
            tqdm.write(f"{why}; those of before are kept", sys.stderr)
        return labels

    labelled = (labels[:num_images] != UNRELIABLE).nonzero()[:, 0]
    agreement = float((predicted(labelled.numpy())[0].cpu() == labels[labelled]).float().mean())
    if agreement < least_agreement:
        return unchanged(f"the averaged network has learnt {agreement:.0%} of the reliable labels")
    labels_now, _, reliable, _ = choose(
        task, ReliableConfig(**settings), features.cpu().numpy(), predicted, worker.device
    )
    if not reliable.any():
        return unchanged("no label of the averaged network is reliable")
    refreshed = torch.full_like(labels, UNRELIABLE)
    refreshed[:num_images] = torch.where(reliable, labels_now, UNRELIABLE)
    return refreshed
