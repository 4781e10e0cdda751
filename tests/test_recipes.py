"""The recipes are the papers' tables, and each can train on the data set it is for."""

import inspect

import pytest
import torch
from torch import nn

from spice_dist.errors import UserError
from spice_dist.methods import moco, spice_self, spice_semi
from spice_dist.models.backbone import Backbone
from spice_dist.recipes import RECIPES, recipe
from spice_dist.task import check_task

PUBLISHED = {  # K, pixels, epochs of stage 1, queue, epochs of stage 2, ratio of the reliable labels, cutout in pixels
    "cifar10": (10, 32, 1000, 12_800, 30, 0.99, 16),
    "cifar100_20": (20, 32, 1000, 12_800, 100, 0.99, 16),
    "stl10": (10, 96, 1000, 65_536, 100, 0.9, 32),
    "imagenet_10": (10, 224, 5000, 12_800, 100, 0.9, 32),
    "imagenet_dogs": (15, 224, 3000, 12_800, 100, 0.9, 32),
    "tiny_imagenet": (200, 64, 1000, 12_800, 100, 0.9, 32),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_its_row_of_the_papers_tables(name: str):
    config = RECIPES[name](0)
    found = (
        *(config.clusters, config.data.size, config.moco.epochs, config.moco.queue, config.spice_self.epochs),
        *(config.reliable.ratio, round(config.spice_self.strong.cutout * config.data.size)),
    )
    assert found == PUBLISHED[name]
    own = config.moco
    assert (own.batch, own.lr, own.weight_decay, own.momentum, own.temperature) == (128, 0.015, 1e-4, 0.999, 0.2)
    assert (config.spice_self.heads, config.spice_self.lr, config.spice_semi.steps) == (10, 0.005, 2**20)
    assert config.backbone.name == "resnet34"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_train_on_its_data_set(name: str):
    default = inspect.signature(RECIPES[name]).parameters["num_images"].default
    num_images = 1000 if default is inspect.Parameter.empty else default
    config = recipe(name, num_images)
    check_task(config)
    moco.check(config, config.moco, num_images)
    spice_self.check(config, config.spice_self, num_images)
    spice_semi.check(config, config.spice_semi)


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
