"""Small networks on top of features: projections of stage 1 and SPICE's clustering heads."""

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
        self.hidden_weight = nn.Parameter(torch.empty(heads, layers - 1, dim, dim))
        self.hidden_bias = nn.Parameter(torch.empty(heads, layers - 1, 1, dim))
        self.out_weight = nn.Parameter(torch.empty(heads, dim, clusters))
        self.out_bias = nn.Parameter(torch.empty(heads, 1, clusters))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    @classmethod
    def holding(cls, tensors: dict[str, Tensor]) -> "ClusterHeads":
        """The heads whose state these tensors are."""
        heads, dim, clusters = tensors["out_weight"].shape
        found = cls(heads, dim, clusters, tensors["hidden_weight"].shape[1] + 1)
        found.load_state_dict(tensors)
        return found

    def forward(self, features: Float[Tensor, "*shared B D"]) -> Float[Tensor, "H B K"]:
        x = features * math.sqrt(features.shape[-1])
        for layer in range(self.hidden_weight.shape[1]):
            x = torch.relu(torch.matmul(x, self.hidden_weight[:, layer]) + self.hidden_bias[:, layer])
        with torch.autocast(x.device.type, enabled=False):
            return torch.baddbmm(self.out_bias, x.float().expand(len(self.out_weight), -1, -1), self.out_weight)

    def part(self, start: int, stop: int) -> "ClusterHeads":
        """A copy of the heads start .. stop - 1, on the same device."""
        return self.holding({name: value[start:stop] for name, value in self.state_dict().items()}).to(
            self.out_weight.device
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
