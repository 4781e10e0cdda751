"""Small networks on top of features: projections of stage 1 and SPICE's clustering heads."""

import itertools
import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_dist.models.backbone import unit
from spice_dist.models.split_batch_norm import SplitBatchNorm2d


class Projection(nn.Sequential):
    """MoCo-v2's Linear(D, D)-ReLU-Linear(D, out)."""

    def __init__(self, dim: int, out: int):
        super().__init__(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, out))


class MLP(nn.Sequential):
    """BYOL's projection and prediction: Linear(dim, hidden)-BatchNorm-ReLU-Linear(hidden, out).

    The BatchNorm normalises the same groups of the global batch as the backbone's.
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

    Features have unit norm and are shared by the heads, (B, D), or different for each head, (H, B, D). The logits are
    (H, B, K), in float32 also under autocast, as losses of many clusters need. The initialisation is nn.Linear's, which
    expects entries of size one: features of unit norm are multiplied by the root of D first. `raw` heads see the
    backbone's features as they are.
    """

    def __init__(self, heads: int, dim: int, clusters: int, layers: int = 2, raw: bool = False):
        super().__init__()
        self.raw: Tensor | None
        # a flag of every head, so that it is saved and selected with the weights
        self.register_buffer("raw", torch.ones(heads, dtype=torch.bool) if raw else None)
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
        """Make heads of this state."""
        layers = len(tensors) // 2
        heads, dim, clusters = tensors[f"weights.{layers - 1}"].shape
        module = cls(heads, dim, clusters, layers, "raw" in tensors)
        module.load_state_dict(tensors)
        return module

    def inputs(self, features: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return what `forward` takes of the backbone's features: of unit norm, or as they are."""
        return unit(features) if self.raw is None else features

    def forward(self, features: Float[Tensor, "*shared B D"]) -> Float[Tensor, "H B K"]:
        x = features * math.sqrt(features.shape[-1]) if self.raw is None else features
        *hidden, (out_weight, out_bias) = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            x = torch.relu(torch.matmul(x, weight) + bias)
        with torch.autocast(x.device.type, enabled=False):
            return torch.baddbmm(out_bias, x.float().expand(len(self), -1, -1), out_weight)

    def part(self, start: int, stop: int) -> "ClusterHeads":
        """Copy the heads start .. stop - 1, on the same device."""
        return self.holding({name: value[start:stop] for name, value in self.state_dict().items()}).to(
            self.biases[0].device
        )

    def select(self, head: int) -> "ClusterHeads":
        """Copy one head."""
        return self.part(head, head + 1)


class ClusterNet(nn.Module):
    """A backbone and one clustering head: images (B, C, H, W) to logits (B, K)."""

    def __init__(self, backbone: nn.Module, head: ClusterHeads):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return self.logits(self.backbone(images))

    def logits(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Return the logits of images whose features the backbone has computed."""
        return self.head(self.head.inputs(features))[0]


class LinearNet(nn.Module):
    """A backbone and one linear layer on its features, not normalised: images (B, C, H, W) to logits (B, K).

    So are the published networks of stage 3. The initialisation is nn.Linear's, with biases of zero. The logits are in
    float32 also under autocast.
    """

    def __init__(self, backbone: nn.Module, dim: int, clusters: int):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(dim, clusters)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return self.logits(self.backbone(images))

    def logits(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Return the logits of images whose features the backbone has computed."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))


class LinearProjection(nn.Sequential):
    """IMC-SwAV's projection, Linear(D, D)-Linear(D, out) without an activation: a linear map of two factors."""

    def __init__(self, dim: int, out: int):
        super().__init__(nn.Linear(dim, dim), nn.Linear(dim, out))


class Prototypes(nn.Module):
    """J unit vectors (J, D): maps unit embeddings (..., D) to cosines (..., J), in float32 also under autocast."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(unit(torch.randn(count, dim)))

    @torch.no_grad()
    def renormalise(self) -> None:
        """Normalise in place after a step; no gradient passes through the normalisation."""
        self.weight.copy_(unit(self.weight))

    def forward(self, embeddings: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch J"]:
        with torch.autocast(embeddings.device.type, enabled=False):
            return embeddings.to(self.weight.dtype) @ self.weight.T


class Classifiers(nn.Module):
    """H independent MLPs, Linear(D, hidden)-BatchNorm-ReLU-Linear(hidden, hidden)-BatchNorm-ReLU-Linear(hidden, K).

    Features (..., D) are shared by all; the logits are (H, ..., K), in float32 also under autocast. BatchNorm
    normalises the groups of `set_groups`, consecutive rows of the features. The initialisation is nn.Linear's. Linear
    layers before a BatchNorm have no bias, since BatchNorm subtracts it.
    """

    def __init__(self, heads: int, dim: int, hidden: int, clusters: int):
        super().__init__()
        self.in_weight = nn.Parameter(torch.empty(heads, dim, hidden))
        self.in_norm = SplitBatchNorm2d(heads * hidden)
        self.hidden_weight = nn.Parameter(torch.empty(heads, hidden, hidden))
        self.hidden_norm = SplitBatchNorm2d(heads * hidden)
        self.out_weight = nn.Parameter(torch.empty(heads, hidden, clusters))
        self.out_bias = nn.Parameter(torch.empty(heads, 1, clusters))
        nn.init.uniform_(self.in_weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))
        for parameter in (self.hidden_weight, self.out_weight, self.out_bias):
            nn.init.uniform_(parameter, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))

    @classmethod
    def holding(cls, tensors: dict[str, Tensor]) -> "Classifiers":
        """Make classifiers of this state."""
        heads, dim, hidden = tensors["in_weight"].shape
        module = cls(heads, dim, hidden, tensors["out_weight"].shape[2])
        module.load_state_dict(tensors)
        return module

    def forward(self, features: Float[Tensor, "*batch D"]) -> Float[Tensor, "H *batch K"]:
        rows = features.flatten(0, -2)
        x = self._activate(self.in_norm, torch.matmul(rows, self.in_weight))
        x = self._activate(self.hidden_norm, torch.matmul(x, self.hidden_weight))
        with torch.autocast(x.device.type, enabled=False):
            logits = torch.baddbmm(self.out_bias, x.to(self.out_bias.dtype), self.out_weight)
        return logits.unflatten(1, features.shape[:-1])

    def _activate(self, norm: SplitBatchNorm2d, x: Tensor) -> Tensor:
        """Normalise (H, R, hidden), each column of each head by itself, and apply ReLU."""
        columns = x.transpose(0, 1).flatten(1)  # R (H hidden)
        return norm(columns[..., None, None]).relu().flatten(1).unflatten(1, (len(x), -1)).transpose(0, 1)

    def select(self, head: int) -> "Classifiers":
        """Copy one classifier to the CPU."""
        heads = len(self.in_weight)
        tensors = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        for name, value in tensors.items():
            if value.ndim:  # not BatchNorm's counter; BatchNorm's vectors hold the heads one after another
                tensors[name] = value.unflatten(0, (heads, -1))[head].reshape(-1, *value.shape[1:]).clone()
        return self.holding(tensors)


class ClassifierNet(nn.Module):
    """A backbone and one classifier on its features, not normalised: images (B, C, H, W) to logits (B, K)."""

    def __init__(self, backbone: nn.Module, head: Classifiers):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return self.logits(self.backbone(images))

    def logits(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Return the logits of images whose features the backbone has computed."""
        return self.head(features)[0]


@torch.no_grad()
def renumber(net: "ClusterNet | LinearNet", numbers: Int[np.ndarray, " K"]) -> None:
    """Give cluster k the number `numbers[k]`, in place."""
    places = torch.from_numpy(np.argsort(numbers)).to(next(net.parameters()).device)
    if isinstance(net, LinearNet):
        for parameter in (net.head.weight, net.head.bias):
            parameter.copy_(parameter[places])
        return
    for parameter in (net.head.weights[-1], net.head.biases[-1]):
        parameter.copy_(parameter[..., places])


Network = ClusterNet | LinearNet | ClassifierNet
"""What a run can end with: maps images (B, C, H, W) to logits (B, K), by its `backbone` and its `head`."""
