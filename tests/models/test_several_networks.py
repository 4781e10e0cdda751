"""Several networks as one backbone: unit features side by side, each network as it was trained."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from spice_dist import model_folder
from spice_dist.config import Config, override
from spice_dist.data.augment import normalize
from spice_dist.data.dataset import DataConfig
from spice_dist.data.views import Statistics
from spice_dist.errors import UserError
from spice_dist.models.backbone import (
    Backbone,
    BackboneConfig,
    check_crop,
    pretrained_backbone,
    unit,
    weights_fingerprint,
)
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.models.presets import for_several, for_untrained
from spice_dist.models.pretrained import published_data_config
from spice_dist.task import Task

NETWORKS = ("test_resnet", "test_vit", "test_efficientnet")  # patches of 16; statistics differ from the others' in one


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file of random weights for each."""
    folder = tmp_path_factory.mktemp("weights")
    for number, name in enumerate(NETWORKS):
        torch.manual_seed(number)
        save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in NETWORKS}


@pytest.fixture
def config(files) -> BackboneConfig:
    return override(Config(), for_several([f"{name}={files[name]}" for name in NETWORKS])).backbone


def pictures(size: int, channels: int = 3) -> Tensor:
    """(2, channels, size, size), values in [0, 1]."""
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(2))


def alone(name: str, file: Path, images: Tensor) -> Tensor:
    """Features of one network, of images with values in [0, 1] that are normalised as it was trained."""
    statistics: Statistics = published_data_config(name)[1:]
    channels, size = images.shape[1:3]
    one = pretrained_backbone(BackboneConfig(name, "native", weights=str(file)), channels, size).eval()
    return one(normalize(images, statistics))


def close(ours: Tensor, parts: list[Tensor]) -> None:
    torch.testing.assert_close(ours, torch.cat([unit(part) for part in parts], 1) / len(parts) ** 0.5)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(len(ours)))


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_those_of_each_network_alone_side_by_side(channels, config, files):
    assert len({published_data_config(name)[1:] for name in NETWORKS}) == 2
    images = pictures(96, channels)
    several = pretrained_backbone(config, channels, 96).eval()
    ours = several(normalize(images, config.statistics))
    close(ours, [alone(name, files[name], images) for name in NETWORKS])
    assert ours.shape[1] == several.dim == 96 + 64 + 256


def test_a_network_that_cannot_take_the_size_gets_the_nearest_that_it_can(config, files):
    images = pictures(100)
    ours = pretrained_backbone(config, 3, 100).eval()(normalize(images, config.statistics))
    smaller = F.interpolate(images, (96, 96), mode="bilinear", antialias=True)
    close(ours, [alone(name, files[name], smaller if name == "test_vit" else images) for name in NETWORKS])


def test_a_network_of_one_size_gets_crops_of_others_enlarged(config):
    several = pretrained_backbone(config, 3, 96).eval()
    check_crop(several, 3, 64, 64)
    assert several(pictures(64)).shape == (2, several.dim)


def test_one_network_keeps_its_tensors_and_features(config, files):
    one = replace(config, others=(), other_weights=())
    single = pretrained_backbone(one, 3, 96).eval()
    several = pretrained_backbone(config, 3, 96).eval()
    body = {name: tensor for name, tensor in several.state_dict().items() if not name.startswith("others.")}
    assert list(single.state_dict()) == list(body)
    assert all(name.startswith("body.") for name in body)
    assert all(torch.equal(tensor, body[name]) for name, tensor in single.state_dict().items())
    images = pictures(96)
    assert torch.equal(single(images), single.body(images))


def test_the_tensors_restore_the_backbone_anywhere(config):
    trained = pretrained_backbone(config, 3, 100).eval()
    described: dict[str, Any] = json.loads(json.dumps(asdict(replace(config, weights="", other_weights=()))))
    described |= {name: tuple(value) for name, value in described.items() if isinstance(value, list)}
    again = Backbone(BackboneConfig(**described), 3, 100).eval()
    images = pictures(100)
    assert not torch.allclose(again(images), trained(images), atol=1e-3)
    again.load_state_dict(trained.state_dict())
    assert torch.equal(again(images), trained(images))
    assert torch.equal(copy.deepcopy(again)(images), trained(images))


def test_a_model_folder_keeps_all_networks(config, tmp_path):
    net = ClusterNet(pretrained_backbone(config, 3, 96), ClusterHeads(1, 96 + 64 + 256, 3)).eval()
    model_folder.save_model(net, Task(clusters=3, data=DataConfig(size=96), backbone=config), tmp_path)
    again, task = model_folder.load_model(tmp_path, torch.device("cpu"))
    assert tuple(task.backbone.others) == config.others
    torch.testing.assert_close(again(pictures(96)), net(pictures(96)))


def test_half_precision_features_still_have_unit_norm(config):
    several = pretrained_backbone(config, 3, 96).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        features = several(pictures(96))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_all_networks_are_trained(config):
    several = pretrained_backbone(config, 3, 96).train()
    several(pictures(96)).square().mean(0).std().backward()
    assert {name.split(".")[0] for name, weight in several.named_parameters() if weight.grad is not None} == {
        "body",
        "others",
    }


def test_the_fingerprint_tells_every_networks_weights(config, files):
    first, *others = weights_fingerprint(config).split("+")
    assert len({first, *others}) == 3
    assert first == weights_fingerprint(replace(config, others=(), other_weights=()))
    assert weights_fingerprint(replace(config, other_weights=config.other_weights[::-1])) != weights_fingerprint(config)
    timms = BackboneConfig("test_vit", weights="timm", others=("vit_small_patch14_dinov2",))
    assert weights_fingerprint(timms) == "r160_in1k+lvd142m"


def test_the_settings_name_each_networks_weights(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = for_several(["tf_efficientnet_lite0", "test_vit", "test_resnet=x.safetensors"])
    assert settings["backbone.weights"] == "package"
    assert settings["backbone.others"] == ("test_vit", "test_resnet")
    assert settings["backbone.other_weights"] == ("timm", str(tmp_path.resolve() / "x.safetensors"))
    assert settings["data.size"] == 224
    changed = override(override(Config(), settings), for_untrained("resnet18")).backbone
    assert (changed.others, changed.other_weights) == ((), ())
    assert for_several(["test_vit", "test_resnet"], "timm")["backbone.other_weights"] == ("timm",)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["test_vit", "test_vitt"], None, "did you mean test_vit"),
        (["test_vit", "test_vit"], None, "--backbone test_vit is given twice; give different networks"),
        (["test_vit", "test_resnet"], "x.pt", "x.pt cannot fit test_vit and test_resnet; give --backbone NAME=FILE"),
        (["test_vit", "test_resnet=package"], None, "no package ships weights of test_resnet"),
        (["test_vit", "wrn_28_2"], None, "nobody publishes weights of wrn_28_2"),
    ],
)
def test_networks_that_cannot_be_had_are_told_in_one_line(names, weights, message):
    with pytest.raises(UserError, match=message) as caught:
        for_several(names, weights)
    assert "\n" not in str(caught.value)


def test_weights_must_be_as_many_as_the_networks(config):
    with pytest.raises(UserError, match=r"backbone.other_weights names 1 weights for 2 networks"):
        Backbone(replace(config, other_weights=("timm",)), 3, 96)
