"""Whether the predictions of stage 3 are still healthy, watched while it trains."""

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spice_dist.data.images import CHUNK
from spice_dist.distributed import collectives
from spice_dist.distributed.worker import Probes, Worker
from spice_dist.methods.label_refresh import ReliableLabels
from spice_dist.methods.plumbing import autocast
from spice_dist.task import Task

SETTLED = 0.1  # share of the steps after which every cluster should be predicted now and then
ENOUGH = 100  # predictions for each cluster from which it can be told that one gets none


class PredictionMonitor:
    """Counts on the device what weak views are predicted to be; read where a line of metrics is written.

    Probes: the share of clusters that got an image since the last line; the share of a step's images that the averaged
    network puts elsewhere than the one that trains, whose cost is one forward pass for each line; images per second. A
    cluster with reliable labels into which no image is predicted any more is told once, in a line that says what to do.
    """

    def __init__(
        self, task: Task, steps: int, images_per_step: int, warning: Callable[[int, list[int]], str], worker: Worker
    ):
        """`steps` in all, of `images_per_step` of all workers; `warning` is the line, of (step, empty clusters)."""
        self.task, self.steps, self.images_per_step = task, steps, images_per_step
        self.warning, self.warned, self.worker = warning, False, worker
        # rows: since a line, since a judgement
        self.counts = torch.zeros(2, task.clusters, dtype=torch.long, device=worker.device)
        self.images, self.since = 0, time.monotonic()

    def count(
        self, step: int, ema: nn.Module, weak: Tensor, predictions: Sequence[Tensor], reliable: ReliableLabels
    ) -> Probes:
        """Count a step's predictions, logits (B, K) pass by pass, of weak views `weak` (B, C, H, W) of all passes."""
        predicted = torch.cat(list(predictions)).argmax(1)
        self.counts.index_add_(1, predicted, torch.ones_like(predicted).expand(2, -1))
        self.images += self.images_per_step
        return {
            "clusters_predicted": lambda: self._clusters_predicted(step, reliable),
            "ema_disagreement": lambda: self._ema_disagreement(ema, weak, predicted),
            "images_per_second": self._images_per_second,
        }

    def _clusters_predicted(self, step: int, reliable: ReliableLabels) -> Tensor:
        since_line, since_judgement = collectives.all_gather(self.counts[None]).sum(0)
        self.counts[0] = 0
        if step < SETTLED * self.steps:
            self.counts[1] = 0
        elif int(since_judgement.sum()) >= ENOUGH * self.task.clusters:
            self.counts[1] = 0
            empty = [cluster for cluster in reliable.clusters() if since_judgement[cluster] == 0]
            if empty and not self.warned and self.worker.rank == 0:
                self.warned = True
                tqdm.write(self.warning(step, empty), sys.stderr)
        return (since_line > 0).float().mean()

    @torch.no_grad()
    def _ema_disagreement(self, ema: nn.Module, weak: Tensor, predicted: Tensor) -> Tensor:
        with autocast(self.worker.device, self.task.precision):
            averaged = torch.cat([ema(chunk).argmax(1) for chunk in weak.split(CHUNK)])
        return (averaged != predicted).float().mean()

    def _images_per_second(self) -> Tensor:
        now = time.monotonic()
        speed = self.images / max(now - self.since, 1e-9)
        self.images, self.since = 0, now
        return torch.tensor(speed, device=self.worker.device)
