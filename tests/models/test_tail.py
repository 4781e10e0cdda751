"""The two parts of a network are the network, for every family that can be cut."""

import pytest
import torch
from torch import nn

from spice_dist.errors import UserError
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.tail import TAIL_SHARE, SplitNetwork, split

FAMILIES = {"tf_efficientnet_lite0": 64, "resnet10t": 64, "convnext_atto": 64, "vit_tiny_patch16_224": 64}


def trained_looking(name: str, size: int = 64, stem: str = "native", intermediate: bool = False) -> Backbone:
    """A backbone of random weights and random statistics of its normalisations."""
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(name, stem, intermediate=intermediate), 3, size)
    for tensor_name, tensor in backbone.state_dict().items():
        if tensor_name.endswith("running_mean"):
            tensor.uniform_(-0.2, 0.2)
        if tensor_name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return backbone.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request) -> Backbone:
    return trained_looking(request.param, FAMILIES[request.param])


def images(count: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_tail_of_trunk_is_the_backbone(backbone, blocks):
    parts = split(backbone, 3, 64, blocks)
    x = images()
    with torch.no_grad():
        kept = parts.trunk(x)
        expected, found = backbone(x), parts.tail(kept.float())
    assert kept.dtype == torch.float16
    assert kept[0].numel() * 2 == parts.activation_bytes
    assert parts.blocks == (blocks or parts.blocks)
    assert ((found - expected).norm(dim=1) < 5e-3 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("blocks", [1, 3, 6])  # the middle stage is in the trunk, or in the tail
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "convnext_atto"])
def test_a_middle_stage_goes_through_both_parts(name, blocks):
    backbone = trained_looking(name, intermediate=True)
    assert backbone.mixture is not None
    backbone.mixture.set(0.5, [0.1] * len(backbone.mixture.center))
    parts, x = split(backbone, 3, 64, blocks), images()
    with torch.no_grad():
        kept, expected = parts.trunk(x), backbone(x)
        found = parts.tail(kept.float())
    assert kept[0].numel() * 2 == parts.activation_bytes
    assert ((found - expected).norm(dim=1) < 5e-3).all()


def test_the_default_tail_is_cheap(backbone):
    one, default = split(backbone, 3, 64, 1), split(backbone, 3, 64)
    assert 0 < one.share <= default.share < 1
    assert default.blocks == 1 or default.share <= TAIL_SHARE
    assert split(backbone, 3, 64, default.blocks + 1).share > TAIL_SHARE


def test_a_step_of_the_tail_is_a_step_of_the_backbone(backbone):
    """Exactly the parameters of the last blocks have gradients: the tail holds no copies and leaves none out."""
    parts = split(backbone, 3, 64, 1)
    backbone.zero_grad()
    parts.tail(parts.trunk(images()).float()).square().sum().backward()
    own = {id(parameter) for parameter in parts.tail.parameters()}
    assert own == {id(parameter) for layer in parts.tail.layers for parameter in layer.parameters()}
    with_gradient = {id(parameter) for parameter in backbone.parameters() if parameter.grad is not None}
    assert with_gradient == own
    backbone.zero_grad()
    named = dict(backbone.named_parameters())
    assert 0 < len(own) < len(named)
    backbone(images()).square().sum().backward()
    reference = {name: parameter.grad for name, parameter in named.items() if id(parameter) in own}
    backbone.zero_grad()
    parts.tail(parts.trunk(images()).float()).square().sum().backward()
    for name, gradient in reference.items():
        found = named[name].grad
        assert gradient is not None
        assert found is not None
        assert (found - gradient).norm() <= 0.02 * gradient.norm() + 1e-5, name
    backbone.zero_grad()


def test_blocks_are_counted_by_their_multiplications():
    """Of lite0 at 224 pixels: the last block, 1x1 and depthwise kernels on 7 x 7, and the last convolution."""
    parts = split(trained_looking("tf_efficientnet_lite0"), 3, 224)
    wide = 192 * 6
    by_hand = 49 * (192 * wide + 9 * wide + wide * 320 + 320 * 1280)
    assert parts.blocks == 1
    assert parts.activation_bytes == 2 * 192 * 49
    assert parts.share == pytest.approx(by_hand / 385.5e6, rel=0.02), "the published size is 385 million (timm: 0.38 G)"


@pytest.mark.parametrize("stem", ["small", "pooled"])
def test_a_small_stem_is_part_of_the_trunk(stem):
    backbone = trained_looking("resnet18", 32, stem)
    parts = split(backbone, 3, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            parts.tail(parts.trunk(images(size=32)).float()), backbone(images(size=32)), rtol=1e-2, atol=1e-2
        )


def test_what_cannot_be_cut_says_what_can():
    other = Backbone(BackboneConfig("regnetx_002", "native"), 3, 64)
    with pytest.raises(UserError, match=r"RegNet cannot be tuned; those of EfficientNet, ResNet, ConvNeXt and Vision"):
        split(other, 3, 64)
    backbone = trained_looking("resnet10t")
    with pytest.raises(UserError, match=r"last 9 blocks .* has 4"):
        split(backbone, 3, 64, 9)
    backbone.others.append(nn.Identity())
    with pytest.raises(UserError, match="several networks side by side"):
        split(backbone, 3, 64)


def test_a_network_whose_forward_pass_is_another_is_refused():
    backbone = trained_looking("resnet10t")
    before = backbone.body.forward

    def other(x: torch.Tensor) -> torch.Tensor:
        return before(x) + 1

    backbone.body.forward = other  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="cannot be tuned"):
        split(backbone, 3, 64)


def test_splitting_leaves_the_mode_of_the_network(backbone):
    backbone.train()
    parts: SplitNetwork = split(backbone, 3, 64)
    assert backbone.training
    assert parts.tail.training
    backbone.eval()
