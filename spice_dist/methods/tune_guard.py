"""Detect harm by fine-tuning: compare loss, sizes of clusters and reliable labels with those at the start."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.task import Task

SAMPLE = 53  # stream of random numbers
WATCHED = 1024  # images of the guard's sample at most, unless clusters are many
SEEN = 5  # images of each cluster in the sample, if it has so many


@dataclass(frozen=True)
class Limits:
    """The limits of a guard, which the settings of `spice_tune` explain."""

    steps: int
    max_rise: float
    min_size: float
    min_agreement: float


class Guard(nn.Module):
    """Detects harm by the loss of every step and by the averaged network's clusters.

    The averaged network's clusters are compared with stage 2's, `before` (M,): every `limits.steps` steps for a sample,
    at the end for all images. A cluster of SEEN images or more must keep the share `min_size` of them.
    """

    def __init__(self, task: Task, limits: Limits, labels: Int[Tensor, " M"], before: Int[Tensor, " M"]):
        super().__init__()
        self.limits, self.labels, self.before = limits, labels, before
        order = np.random.default_rng([task.seed, SAMPLE]).permutation(len(before))
        clusters = before.cpu().numpy()[order]
        few = [order[clusters == cluster][:SEEN] for cluster in range(task.clusters)]
        self.sample = torch.from_numpy(np.unique(np.concatenate([*few, order[:WATCHED]])))
        self.everything = torch.arange(len(before))
        self.counters: Tensor  # first step of this attempt, number of attempts before it
        self.register_buffer("counters", torch.zeros(2, dtype=torch.long))
        self.sums: Tensor  # sum and number of the losses of the first steps, then of those since the last look
        self.register_buffer("sums", torch.zeros(4, dtype=torch.float64, device=before.device))

    @property
    def begun(self) -> int:
        return int(self.counters[0])

    @property
    def retried(self) -> int:
        return int(self.counters[1])

    def go_back(self, step: int) -> None:
        """Begin a new attempt after `step`."""
        self.counters.copy_(torch.tensor([step, self.retried + 1]))
        self.sums.zero_()

    def see(self, loss: Tensor, step: int, last: bool, predicted: Callable[[Tensor], Tensor]) -> str:
        """Return why this attempt has failed after `step`, "" if it has not. `predicted` gives the clusters of rows.

        The host reads the sums every `limits.steps` steps only: each reading waits for a GPU.
        """
        if not self.limits.steps:
            return ""
        done = step - self.begun  # steps of this attempt
        sums = self.sums[:2] if done <= self.limits.steps else self.sums[2:]
        sums[0] += loss.double()
        sums[1] += 1
        if not last and done % self.limits.steps:
            return ""
        start, now = (self.sums[::2] / self.sums[1::2]).tolist()  # NaN without a step since the last look
        if not (math.isfinite(start) and (done <= self.limits.steps or math.isfinite(now))):
            return "the loss is not finite"
        if not last and done == self.limits.steps:
            return ""
        self.sums[2:] = 0
        if now > self.limits.max_rise * start:
            return f"the loss has risen from {start:.2g} to {now:.2g}"
        rows = self.everything if last else self.sample
        return self.changed(rows, predicted(rows))

    def changed(self, rows: Int[Tensor, " S"], now: Int[Tensor, " S"]) -> str:
        """Compare the clusters `now` of these images with those before; return what `see` returns."""
        before, labels = self.before[rows], self.labels[rows]
        clusters = int(max(before.max(), now.max())) + 1
        had, has = (torch.bincount(of_images, minlength=clusters) for of_images in (before, now))
        dying = (had >= SEEN) & (has < self.limits.min_size * had)
        if dying.any():
            cluster = int(dying.nonzero()[0, 0])
            return f"cluster {cluster} has shrunk from {had[cluster]} to {has[cluster]} images"
        agreed = [float((of_images == labels)[labels != UNRELIABLE].float().mean()) for of_images in (before, now)]
        if agreed[1] < self.limits.min_agreement * agreed[0]:
            return f"{agreed[1]:.0%} of the reliable labels are predicted, {agreed[0]:.0%} were before"
        return ""
