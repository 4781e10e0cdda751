"""`--to timm`: timm loads the file with strict keys and computes the run's features."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from spice_dist import artifacts
from spice_dist.errors import UserError
from spice_dist.export import timm_backbone, trained
from spice_dist.model_folder import load_model
from spice_dist.models.backbone import BackboneConfig
from tests.export.conftest import TINY, Make

NETWORKS = {
    "test_resnet": {},
    "resnet of other widths and depths": {
        "backbone": BackboneConfig("resnet18", "native", widths=(8, 8, 16, 32), depths=(1, 1, 1, 1))
    },
    "efficientnet_lite0": {
        "backbone": BackboneConfig("tf_efficientnet_lite0", "native", intermediate=True),
        "size": 64,
    },
    "grey": {"backbone": BackboneConfig("test_efficientnet", "native"), "channels": 1},
    "of one image size": {"backbone": BackboneConfig("test_vit", "native"), "size": 64},
}


def loaded_as_told(lines: list[str]) -> torch.nn.Module:
    """Run the printed line."""
    (line,) = [line.removeprefix("load it: model = ") for line in lines if line.startswith("load it: ")]
    return eval(line, {"timm": timm})


@pytest.mark.parametrize("network", NETWORKS)
def test_the_printed_line_loads_the_features_of_the_run(make: Make, tmp_path: Path, network: str):
    run, out = make(**NETWORKS[network]), tmp_path / "backbone.safetensors"
    model = loaded_as_told(timm_backbone.export(run, out))
    net, task = load_model(artifacts.model(run), torch.device("cpu"))
    images = torch.randn(4, task.data.channels, task.data.size, task.data.size)
    with torch.no_grad():
        ours, theirs = net.get_submodule("backbone.body")(images), model(images)
    assert ours.std() > 1e-3, "features that differ between images"
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


def test_every_tensor_is_there_under_timms_name(make: Make, tmp_path: Path):
    out = tmp_path / "backbone.safetensors"
    timm_backbone.export(make(backbone=BackboneConfig("test_efficientnet", "native")), out)
    reference = timm.create_model("test_efficientnet", pretrained=False, num_classes=0).state_dict()
    with safe_open(out, "pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118  no dict
            name: tuple(tensor.shape) for name, tensor in reference.items()
        }
        about = json.loads(file.metadata()["spice_dist"])
    assert about["architecture"] == "test_efficientnet"
    assert about["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert about["crop_pct"] == 1.0


def test_what_is_left_out_is_said(make: Make, tmp_path: Path):
    lines = timm_backbone.export(make(**NETWORKS["efficientnet_lite0"]), tmp_path / "b.safetensors")
    assert re.search(r"not in it: .*middle stage \(weight 0\.6 ", lines[-1])


REFUSED = {
    "others": BackboneConfig("test_resnet", "native", others=("test_vit",)),
    "stem": BackboneConfig("resnet18", "small", widths=(8, 8, 8, 8)),
    "no network of timm": BackboneConfig("wrn_28_2", "native"),
}


@pytest.mark.parametrize("backbone", REFUSED.values(), ids=REFUSED)
def test_networks_that_timm_does_not_build_are_refused_in_one_line(backbone: BackboneConfig):
    with pytest.raises(UserError, match="--to onnx") as error:
        timm_backbone.refuse_others(backbone)
    assert "\n" not in str(error.value)


def test_a_file_that_gives_other_features_is_not_written(make: Make, tmp_path: Path, monkeypatch):
    run, names = make(backbone=TINY), timm_backbone.with_timm_names

    def damaged(*arguments):
        tensors = names(*arguments)
        (norm, *_) = [name for name in tensors if name.endswith("running_mean")]
        return tensors | {norm: tensors[norm] + 1}

    monkeypatch.setattr(timm_backbone, "with_timm_names", damaged)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="nothing was written"):
        timm_backbone.export(run, tmp_path / "b.safetensors")
    assert sorted(tmp_path.iterdir()) == before


def test_differences_that_are_no_numbers_are_too_large():
    with pytest.raises(UserError, match="differ"):
        trained.largest_difference("x", torch.tensor([[float("nan")]]), torch.ones(1, 1), 1.0)
    assert trained.largest_difference("x", torch.tensor([[1.0, 2.5]]), torch.tensor([[1.0, 2.0]]), 1.0) == 0.25
