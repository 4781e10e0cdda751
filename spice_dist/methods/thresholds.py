"""From which confidence on a prediction counts as a label: the same for all, or as the network's confidence rises."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_dist.distributed import collectives


class FixedThreshold(nn.Module):
    """FixMatch's eta, the same for all classes at all times: has no state."""

    def __init__(self, eta: float):
        super().__init__()
        self.eta = eta

    def of_classes(self) -> float:
        return self.eta

    def update(self, predictions: Sequence[Tensor]) -> None:
        """Nothing that was predicted changes it."""

    def metrics(self) -> dict[str, Tensor]:
        return {}


class AdaptiveThreshold(nn.Module):
    """FreeMatch's self-adaptive thresholds (Wang et al. 2023), from the predictions q_b of a step's weak views:

        tau_t = lambda tau_{t-1} + (1 - lambda) mean_b max_k q_b(k)        starts at 1 / K
        p_t(k) = lambda p_{t-1}(k) + (1 - lambda) mean_b q_b(k)            starts at 1 / K
        tau_t(k) = tau_t p_t(k) / max_j p_t(j)

    A network that is unsure has low thresholds, a class that is rarely predicted a lower one than the others.
    """

    def __init__(self, clusters: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.confidence: Tensor
        self.register_buffer("confidence", torch.tensor(1 / clusters))
        self.shares: Tensor
        self.register_buffer("shares", torch.full((clusters,), 1 / clusters))

    def of_classes(self) -> Float[Tensor, " K"]:
        """tau_t(k), in (0, 1]."""
        return self.confidence * self.shares / self.shares.max()

    @staticmethod
    def summary(logits: Float[Tensor, "B K"]) -> Float[Tensor, " L"]:
        """What `update` has to know of these predictions, L = K + 1: the mean of max_k q(k), then those of q(k)."""
        probs = logits.detach().float().softmax(1)
        return torch.cat([probs.amax(1).mean()[None], probs.mean(0)])

    def update(self, predictions: Sequence[Tensor]) -> None:
        """Follow the global batch, from this worker's logits (B, K) of each pass, all of one size.

        The passes of all workers are added up in the same order everywhere.
        """
        own = torch.stack([self.summary(logits) for logits in predictions])
        summary = collectives.all_gather(own).mean(0)
        self.confidence.lerp_(summary[0], 1 - self.momentum)
        self.shares.lerp_(summary[1:], 1 - self.momentum)

    def metrics(self) -> dict[str, Tensor]:
        return {"threshold": self.confidence}
