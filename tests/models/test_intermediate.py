"""A middle stage's features beside the final ones: what stands in a row, and where it comes from."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from spice_dist.models.backbone import Backbone, BackboneConfig, unit
from spice_dist.models.intermediate import Mixture, middle_stage, peaks, stages
from tests.models.test_tail import images, trained_looking

STAGES = {"tf_efficientnet_lite0": 112, "resnet10t": 256, "convnext_atto": 160, "swin_tiny_patch4_window7_224": 384}


def with_middle(name: str) -> Backbone:
    backbone = trained_looking(name, intermediate=True)
    assert backbone.mixture is not None
    backbone.mixture.set(0.5, [0.1] * len(backbone.mixture.center))
    return backbone


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet10t", "convnext_atto"])
def test_features_are_the_final_ones_and_the_peaks_of_the_stage_at_a_16th(name):
    """The oracle reads the stage from a hook on the plain network."""
    plain, backbone, x = trained_looking(name), with_middle(name), images()
    seen = []
    module = next(stage["module"] for stage in stages(plain.body) if stage["num_chs"] == STAGES[name])
    plain.body.get_submodule(module).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        final, found = unit(plain(x)), backbone(x)
    peak = seen[0].amax((2, 3)) - 0.1
    expected = torch.cat([final, 0.5 * peak / peak.norm(dim=1, keepdim=True)], 1) / 1.25**0.5
    torch.testing.assert_close(found, expected)
    assert backbone.dim == found.shape[1] == final.shape[1] + STAGES[name]
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(x)))


@pytest.mark.parametrize("name", STAGES)
def test_the_stage_is_the_last_of_its_resolution(name):
    body = timm.create_model(name, num_classes=0)
    place = middle_stage(body)
    assert place is not None
    assert stages(body)[place]["num_chs"] == STAGES[name]
    assert stages(body)[place + 1]["reduction"] == 32


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "wrn_28_2"])
def test_a_network_without_stages_gives_its_final_features(name):
    size = 64
    one, other = (Backbone(BackboneConfig(name, "native", intermediate=flag), 3, size) for flag in (True, False))
    other.load_state_dict(one.state_dict())
    assert one.mixture is None
    assert torch.equal(one.eval()(images()), other.eval()(images()))


def test_until_it_is_set_the_final_features_count_alone():
    mixture = Mixture(4)
    features = unit(torch.randn(5, 3))
    found = mixture(features, torch.randn(5, 4))
    assert torch.equal(found[:, :3], features)
    assert not found[:, 3:].any()


def test_the_mixture_travels_with_the_weights():
    backbone = with_middle("resnet10t")
    again = trained_looking("resnet10t", intermediate=True)
    again.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images()), backbone(images()))


def test_peaks_are_the_largest_of_each_channel():
    activations = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 4, 5)))
    assert peaks(activations).tolist() == nn.MaxPool2d((4, 5))(activations.float()).flatten(1).tolist()
