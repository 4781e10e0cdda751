"""Temperature scaling (Guo et al. 2017) of the head of stage 2, before stage 3 goes on from it.

The double softmax of stage 2 drives logits to where every prediction has a probability near 1: all would pass the
threshold, and the first gradients of plain cross-entropy would tear the network apart.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from spice_dist.data.images import Images
from spice_dist.data.views import View
from spice_dist.methods.plumbing import autocast, view_features
from spice_dist.models.heads import ClusterNet
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.task import Task

SAMPLE = 23  # stream of random numbers; stage 3 has those before it
CALIBRATED = 2048  # images by which the temperature is found


@torch.no_grad()
def calibrate(task: Task, strong: View, net: ClusterNet, images: Images, labels: Int[Tensor, " N"]) -> None:
    """Divide the head's logits by the temperature that makes the reliable labels likeliest on strong views.

    It is found on a sample of the reliable labels.
    """
    reliable = (labels != UNRELIABLE).nonzero()[:, 0].numpy()
    chosen = np.random.default_rng([task.seed, SAMPLE]).permutation(reliable)[:CALIBRATED]
    net.eval()

    def logits_of(view: Tensor) -> Tensor:
        with autocast(view.device, task.precision):
            return net(view).float()

    (logits,) = view_features(task, images, chosen, [(strong, (task.seed, 0, SAMPLE))], [logits_of])
    temperature = best_temperature(logits, labels[torch.from_numpy(chosen)].to(logits.device))
    for parameter in (net.head.weights[-1], net.head.biases[-1]):
        parameter /= temperature


def best_temperature(logits: Float[Tensor, "M K"], labels: Int[Tensor, " M"]) -> float:
    """The T, of 0.1 to 1000 in steps of 2 %, with the lowest cross-entropy of the labels under softmax(logits / T)."""
    candidates = 1.02 ** torch.arange(-116, 349)
    losses = torch.stack([F.cross_entropy(logits / value, labels) for value in candidates.tolist()])
    return float(candidates[losses.argmin()])
