"""The wide ResNets are those whose sizes and costs the papers' tables have."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spice_dist.errors import UserError
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.heads import ClusterHeads
from spice_dist.models.presets import for_small_images, for_untrained
from spice_dist.models.pretrained import published_data_config
from spice_dist.models.split_batch_norm import SplitBatchNorm2d
from spice_dist.models.wide_resnet import Block, WideResNet

PUBLISHED = {  # clusters, pixels, multiply-adds of an image in 10^9, parameters in 10^6, side of the last map
    "wrn_28_2": (10, 32, 0.214, 1.47, 8),
    "wrn_28_8": (20, 32, 3.360, 23.36, 8),
    "wrn_37_2": (10, 96, 0.646, 5.93, 6),
}


def multiply_adds_of(conv: nn.Conv2d, out: Tensor) -> int:
    """Of one image."""
    return out[0].numel() * conv.weight[0].numel()


@pytest.mark.parametrize("name", PUBLISHED)
def test_cost_and_size_are_published(name: str):
    clusters, side, multiply_adds, parameters, last = PUBLISHED[name]
    backbone = Backbone(BackboneConfig(name, "native"), 3, side).eval()
    spent, sides = [], []
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            of_one = partial(multiply_adds_of, module)
            module.register_forward_hook(lambda _m, _i, out, of_one=of_one: spent.append(of_one(out)))
        if isinstance(module, Block):
            module.register_forward_hook(lambda _m, _i, out: sides.append(out.shape[-1]))
    assert backbone(torch.zeros(1, 3, side, side)).shape == (1, backbone.dim)
    assert sum(spent) / 1e9 == pytest.approx(multiply_adds, abs=5e-4)
    head = ClusterHeads(1, backbone.dim, clusters, layers=1)
    size = sum(parameter.numel() for module in (backbone, head) for parameter in module.parameters())
    assert size / 1e6 == pytest.approx(parameters, abs=5e-3)
    assert sides[-1] == last


def test_the_network_is_the_one_of_its_formulas():
    """Every operation written out by name, in eval and in train mode, for grey images of an odd size."""
    torch.manual_seed(0)
    net = WideResNet("wrn_28_2", channels=1).double()
    for name, parameter in net.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    images = torch.randn(6, 1, 13, 13, dtype=torch.float64)
    tensors = net.state_dict()

    def active(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        scale, shift = (tensors[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
        return torch.where(x > 0, x, 0.1 * x)

    x = F.conv2d(images, tensors["stem.weight"], padding=1)
    for number in range(12):
        name, stride = f"blocks.{number}", 2 if number in (4, 8) else 1
        first = active(x, f"{name}.norm1")
        y = F.conv2d(first, tensors[f"{name}.conv1.weight"], stride=stride, padding=1)
        y = F.conv2d(active(y, f"{name}.norm2"), tensors[f"{name}.conv2.weight"], padding=1)
        x = y + (F.conv2d(first, tensors[f"{name}.shortcut.weight"], stride=stride) if number % 4 == 0 else x)
    expected = active(x, "norm").mean((2, 3))
    torch.testing.assert_close(net.train()(images), expected)
    assert expected.shape == (6, 128)


def test_it_starts_as_published():
    torch.manual_seed(0)
    net = Backbone(BackboneConfig("wrn_37_2", "native"), 3, 96)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000]
    for conv in convs:
        assert conv.weight.std().item() == pytest.approx(
            math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels)), rel=0.05
        )
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 2 * 16 + 1
    assert all(isinstance(norm, SplitBatchNorm2d) and norm.momentum == 0.001 for norm in norms)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 33])
def test_any_channels_size_and_memory_layout_do(channels: int, size: int):
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig("wrn_28_2", "native"), channels, size)
    images = torch.randn(4, channels, size, size)
    plain = backbone.train()(images)
    other = backbone.to(memory_format=torch.channels_last)(images)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(other, plain, atol=1e-4, rtol=1e-4)
    plain.sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_a_network_for_small_images_has_the_stem_that_its_kind_has():
    statistics = ((0.5,) * 3, (0.2,) * 3)
    stems = {name: for_small_images(name, statistics).stem for name in ("wrn_28_2", "resnet18", "convnext_atto")}
    assert stems == {"wrn_28_2": "native", "resnet18": "small", "convnext_atto": "native"}
    assert for_small_images("wrn_28_2", statistics).statistics == statistics
    assert for_untrained("wrn_28_8")["backbone.stem"] == "native"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Backbone(BackboneConfig("wrn_28_3", "native"), 3, 32), "did you mean wrn_28_"),
        (lambda: Backbone(BackboneConfig("wrn_28_2", "small"), 3, 32), 'use backbone.stem="native"'),
        (lambda: Backbone(BackboneConfig("wrn_28_2", "native", widths=(1,)), 3, 32), "takes no widths or depths"),
        (lambda: published_data_config("wrn_28_2"), "nobody publishes weights of wrn_28_2"),
        (lambda: for_small_images("resnet81", ((0.5,), (0.5,))), "did you mean"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(build, message):
    with pytest.raises(UserError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
