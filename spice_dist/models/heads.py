"""Small networks on top of features: projections of stage 1 and SPICE's clustering heads."""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_dist.models.backbone import unit
from spice_dist.models.split_batch_norm import SplitBatchNorm2d


class Projection(nn.Sequential):
    """MoCo-v2's Linear(D, D)-ReLU-Linear(D, out)."""

    def __init__(self, dim: int, out: int):
        super().__init__(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, out))


class MLP(nn.Sequential):
    """BYOL's projection and prediction: Linear(dim, hidden)-BatchNorm-ReLU-Linear(hidden, out).

    The BatchNorm is over the same groups of the global batch as the backbone's.
    """

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__(
            nn.Linear(dim, hidden),
            nn.Unflatten(1, (hidden, 1, 1)),
            SplitBatchNorm2d(hidden),
            nn.Flatten(),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out),
        )


class ClusterHeads(nn.Module):
    """H independent heads of `layers` linear layers, Linear(D, D)-ReLU-...-Linear(D, K), as batched matrix products.

    Features have unit norm and are shared, (B, D), or a head's own, (H, B, D); the logits are (H, B, K), in float32
    also under autocast, as losses of many clusters need. Initialised as nn.Linear is, which expects entries of size
    one: unit vectors are scaled by the root of D first.
    """

    def __init__(self, heads: int, dim: int, clusters: int, layers: int = 2):
        super().__init__()
        widths = [dim] * layers + [clusters]
        bound = 1 / math.sqrt(dim)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in itertools.pairwise(widths):
            self.weights.append(nn.Parameter(torch.empty(heads, before, after).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(heads, 1, after).uniform_(-bound, bound)))

    def __len__(self) -> int:
        return len(self.biases[0])

    @classmethod
    def holding(cls, tensors: dict[str, Tensor]) -> "ClusterHeads":
        """The heads whose state these tensors are."""
        layers = len(tensors) // 2
        heads, dim, clusters = tensors[f"weights.{layers - 1}"].shape
        found = cls(heads, dim, clusters, layers)
        found.load_state_dict(tensors)
        return found

    def forward(self, features: Float[Tensor, "*shared B D"]) -> Float[Tensor, "H B K"]:
        x = features * math.sqrt(features.shape[-1])
        *hidden, (out_weight, out_bias) = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            x = torch.relu(torch.matmul(x, weight) + bias)
        with torch.autocast(x.device.type, enabled=False):
            return torch.baddbmm(out_bias, x.float().expand(len(self), -1, -1), out_weight)

    def part(self, start: int, stop: int) -> "ClusterHeads":
        """A copy of the heads start .. stop - 1, on the same device."""
        return self.holding({name: value[start:stop] for name, value in self.state_dict().items()}).to(
            self.biases[0].device
        )

    def select(self, head: int) -> "ClusterHeads":
        """A copy that holds only the given head."""
        return self.part(head, head + 1)


class ClusterNet(nn.Module):
    """A backbone and one clustering head: images (B, C, H, W) to logits (B, K)."""

    def __init__(self, backbone: nn.Module, head: ClusterHeads):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return self.head(unit(self.backbone(images)))[0]
