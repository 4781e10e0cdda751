"""A network with BatchNorm folded into its convolutions is the same network."""

import pytest
import torch
from torch import nn

from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.folding import folded
from spice_dist.models.split_batch_norm import SplitBatchNorm2d, split_batch_norm

NORMS_LEFT = {"resnet10t": 1}  # behind a stem that is a block of its own


def norms(module: nn.Module) -> int:
    return sum(isinstance(child, SplitBatchNorm2d) for child in module.modules())


def with_statistics(module: nn.Module) -> nn.Module:
    for norm in module.modules():
        if isinstance(norm, SplitBatchNorm2d):
            for tensor in (norm.running_mean, norm.bias):
                assert tensor is not None
                tensor.data.normal_(0, 0.2)
            assert norm.running_var is not None
            norm.running_var.uniform_(0.5, 2)
    return module.eval()


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "resnet10t", "resnet18", "vit_tiny_patch16_224", "convnext_atto"]
)
def test_the_same_features_without_a_batch_norm(name):
    torch.manual_seed(0)
    backbone = with_statistics(Backbone(BackboneConfig(name, "native"), 3, 64))
    images = torch.rand(4, 3, 64, 64)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    fast = folded(backbone, images[:1])
    assert norms(fast) == NORMS_LEFT.get(name, 0) < max(1, norms(backbone))
    with torch.no_grad():
        wanted = backbone(images)
        torch.testing.assert_close(fast(images), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_an_order_that_misleads_keeps_the_network():
    class Reversed(nn.Module):
        """Its normalisation comes before the convolution that is registered first."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv(self.norm(x)).mean((2, 3))

    torch.manual_seed(0)
    net = Reversed()
    split_batch_norm(net)
    with_statistics(net)
    assert folded(net, torch.rand(2, 3, 8, 8)) is net
