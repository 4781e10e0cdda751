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
from spice_dist.models.heads import ClusterNet
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.task import Task

CLASSIFIED = 65_536  # features that the head is given at a time


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
    ema: ClusterNet,
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
    chunks = outputs(ema.backbone, images, index_of_share, task.backbone.statistics, precision=task.precision)
    features = collectives.gather_shares(torch.cat([unit(chunk).half() for chunk in chunks]), num_images)
    splits = -(-num_images // CLASSIFIED)

    def predicted(index: np.ndarray) -> tuple[Tensor, Tensor]:
        chunks = (features[torch.from_numpy(rows).to(features.device)] for rows in np.array_split(index, splits))
        best = [ema.head(chunk.float())[0].softmax(1).max(1) for chunk in chunks]
        return torch.cat([chunk.indices for chunk in best]), torch.cat([chunk.values for chunk in best])

    def unchanged(why: str) -> Tensor:
        if worker.rank == 0:
            tqdm.write(f"{why}; those of before are kept", sys.stderr)
        return labels

    labelled = (labels[:num_images] != UNRELIABLE).nonzero()[:, 0]
    agreement = float((predicted(labelled.numpy())[0].cpu() == labels[labelled]).float().mean())
    if agreement < least_agreement:
        return unchanged(f"the averaged network has learnt {agreement:.0%} of the reliable labels")
    clusters, _, reliable, _ = choose(
        task, ReliableConfig(**settings), features.cpu().numpy(), predicted, worker.device
    )
    if not reliable.any():
        return unchanged("no label of the averaged network is reliable")
    refreshed = torch.full_like(labels, UNRELIABLE)
    refreshed[:num_images] = torch.where(reliable, clusters, UNRELIABLE)
    return refreshed
