"""Backbones, heads, momentum networks and the queue."""

import pytest
import torch
from torch import nn

from spice_dist.errors import UserError
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.models.momentum import Queue, copy_buffers, follow, slow_copy

NARROW = BackboneConfig("resnet18", "small", (8, 8, 16, 24), (1, 1, 1, 1))


def test_the_small_stem_keeps_the_resolution_until_the_second_stage():
    backbone = Backbone(NARROW, channels=1, size=8)
    assert backbone.dim == 24
    seen = {}
    backbone.body.get_submodule("layer1").register_forward_hook(lambda _m, _i, out: seen.update(shape=out.shape))
    assert backbone(torch.zeros(2, 1, 8, 8)).shape == (2, 24)
    assert seen["shape"] == (2, 8, 8, 8)


def test_cifar_resnet18_has_the_published_size():
    backbone = Backbone(BackboneConfig("resnet18", "small"), channels=3, size=32)
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(11.17e6, rel=1e-3)


def test_a_vision_transformer_works_with_its_native_stem():
    backbone = Backbone(BackboneConfig("vit_tiny_patch16_224", "native"), channels=3, size=32)
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, backbone.dim)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BackboneConfig("resnet81"), "timm does not have"),
        (BackboneConfig("resnet18", stem="tiny"), "can be small, pooled, halved or native"),
        (BackboneConfig("vit_tiny_patch16_224", "small"), "needs a ResNet"),
        (BackboneConfig("vit_tiny_patch16_224", "native", widths=(1, 2)), "takes no widths"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(config, message):
    with pytest.raises(UserError, match=message):
        Backbone(config, channels=3, size=32)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_batched_heads_are_independent_linear_networks(layers):
    torch.manual_seed(0)
    heads = ClusterHeads(3, 6, 4, layers)
    features = torch.nn.functional.normalize(torch.randn(5, 6), dim=1)
    logits = heads(features)
    own = heads(features.expand(3, 5, 6))
    for h in range(3):
        hidden = [part for _ in range(layers - 1) for part in (nn.Linear(6, 6), nn.ReLU())]
        network = nn.Sequential(*hidden, nn.Linear(6, 4))
        state = []
        for weight, bias in zip(heads.weights, heads.biases, strict=True):
            state += [weight[h].T, bias[h, 0]]
        network.load_state_dict(dict(zip(network.state_dict(), state, strict=True)))
        expected = network(features * 6**0.5)
        torch.testing.assert_close(logits[h], expected)
        torch.testing.assert_close(own[h], expected)
        torch.testing.assert_close(heads.select(h)(features)[0], expected)


def test_logits_are_float32_also_under_autocast():
    torch.manual_seed(0)
    heads = ClusterHeads(2, 16, 4)
    features = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = heads(features)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, heads(features), atol=0.02, rtol=0.02)
    assert not torch.equal(rounded, heads(features)), "the hidden layer is in half precision"


def test_parts_of_heads_are_copies():
    torch.manual_seed(0)
    heads = ClusterHeads(5, 6, 4)
    part = heads.part(1, 3)
    torch.testing.assert_close(part(torch.eye(6)), heads(torch.eye(6))[1:3])
    part.biases[1].data += 1
    assert not torch.equal(part.biases[1], heads.biases[1][1:3])


def test_heads_start_like_linear_layers_and_differ():
    torch.manual_seed(0)
    heads = ClusterHeads(2, 100, 10)
    assert heads.weights[0].abs().max() <= 0.1
    assert heads.weights[0].std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert not torch.equal(heads.weights[0][0], heads.weights[0][1])


def test_a_cluster_net_sees_features_of_unit_norm():
    net = ClusterNet(nn.Flatten(), ClusterHeads(1, 12, 3))
    images = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(net(images), net(5 * images))


def test_following_is_the_weighted_mean_and_needs_no_gradient():
    torch.manual_seed(0)
    fast = nn.Linear(2, 2)
    slow = slow_copy(fast)
    before = slow.weight.clone()
    nn.init.ones_(fast.weight)
    follow(slow, fast, 0.9)
    torch.testing.assert_close(slow.weight, 0.9 * before + 0.1)
    assert not any(p.requires_grad for p in slow.parameters())


def test_buffers_are_copied_as_they_are():
    fast = nn.BatchNorm1d(2)
    slow = slow_copy(fast)
    fast(torch.randn(4, 2))
    assert slow.running_mean is not None
    assert fast.running_mean is not None
    assert not torch.equal(slow.running_mean, fast.running_mean)
    copy_buffers(slow, fast)
    assert torch.equal(slow.running_mean, fast.running_mean)


def test_the_queue_holds_the_last_keys_and_starts_on_the_sphere():
    queue = Queue(6, 3)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(6))
    for step in range(4):
        queue.push(torch.full((2, 3), float(step)), step)
    assert sorted(queue.keys[:, 0].tolist()) == [1, 1, 2, 2, 3, 3]
