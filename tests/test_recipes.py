"""The recipes build the published networks, and each can train on the data set it is for."""

import inspect

import pytest
import torch
from torch import nn

from spice_dist.errors import UserError
from spice_dist.methods import moco, scan, spice_self, spice_semi
from spice_dist.models.backbone import Backbone
from spice_dist.recipes import RECIPES, recipe
from spice_dist.task import check_task


@pytest.mark.parametrize(
    ("name", "network", "parameters", "decay", "mean"),
    [
        ("cifar10", "wrn_28_2", 1.47, 5e-4, 125.3),
        ("cifar100_20", "wrn_28_8", 23.36, 1e-3, 129.3),
        ("stl10", "wrn_37_2", 5.93, 5e-4, 0.485 * 255),
        ("imagenet_10", "resnet34", 21.3, 5e-4, 0.485 * 255),
        ("imagenet_dogs", "resnet34", 21.3, 5e-4, 0.485 * 255),
        ("tiny_imagenet", "resnet34", 21.3, 5e-4, 0.485 * 255),
    ],
)
def test_stage_3_trains_the_published_network(name, network, parameters, decay, mean, tmp_path):
    config = RECIPES[name](0)
    task = spice_semi.network_task(config, config.spice_semi)
    assert task.backbone.name == network
    net = spice_semi.new_network(task, config.spice_semi, tmp_path).eval()
    size = sum(parameter.numel() for parameter in net.parameters())
    head = sum(parameter.numel() for parameter in net.head.parameters())
    linear = net.backbone(torch.zeros(1, 3, 32, 32)).shape[1] * config.clusters + config.clusters
    assert (size if network.startswith("wrn") else size - head) / 1e6 == pytest.approx(parameters, abs=0.03)
    assert (head == linear) == (name != "tiny_imagenet")
    assert config.spice_semi.weight_decay == decay
    assert task.backbone.mean[0] * 255 == pytest.approx(mean)


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "labelling", "cutout"),
    [("cifar10", 50, 128, 200, 16), ("cifar100_20", 100, 512, 200, 16), ("stl10", 100, 128, 100, 32)],
)
def test_scan_trains_as_published(name, epochs, batch, labelling, cutout):
    config = recipe(name, 0, "scan")
    own, then = config.scan, config.self_label
    assert (config.method, own.epochs, own.batch, then.epochs, then.batch) == ("scan", epochs, batch, labelling, 1000)
    assert (own.lr, own.weight_decay, then.lr, then.weight_decay) == (1e-4,) * 4
    assert (own.neighbors, own.entropy_weight, own.heads, then.threshold) == (21, 5, 1, 0.99)  # itself and 20 others
    assert own.view == then.view
    assert round(own.view.cutout * config.data.size) == cutout
    assert own.view.operations == 4


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_train_on_its_data_set(name: str):
    default = inspect.signature(RECIPES[name]).parameters["num_images"].default
    num_images = 1000 if default is inspect.Parameter.empty else default
    config = recipe(name, num_images)
    check_task(config)
    moco.check(config, config.moco, num_images)
    spice_self.check(config, config.spice_self, num_images)
    spice_semi.check(config, config.spice_semi)
    scan.check(config, config.scan, num_images)
    scan.check_self_label(config, config.self_label, num_images)


def test_an_unknown_recipe_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"cifar10, cifar10_short"):
        recipe("cifar", 100)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("stl10", [49, 49, 25, 13, 7]),
        ("tiny_imagenet", [33, 33, 17, 9, 5]),
        ("cifar10", [17, 17, 9, 5, 3]),
        ("imagenet_10", [56, 56, 28, 14, 7]),
        ("cifar10_short", [32, 32, 16, 8, 4]),
    ],
)
def test_the_feature_maps_have_the_sides_that_spices_networks_have(name: str, sides: list[int]):
    config = RECIPES[name](0)
    backbone = Backbone(config.backbone, 3, config.data.size).eval()
    found: list[int] = []
    for layer in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
        module = getattr(backbone.body, layer)
        assert isinstance(module, nn.Module)
        module.register_forward_hook(lambda _module, _input, output: found.append(output.shape[-1]))
    backbone(torch.zeros(1, 3, config.data.size, config.data.size))
    assert found == sides
    assert backbone.dim == 512
