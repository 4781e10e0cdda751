"""The costs of a run: counted operations against sums over layers, stages against closed forms."""

import pytest
import torch
from torch import nn

from spice_dist import cli
from spice_dist.config import override
from spice_dist.counting import counted
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.recipes import RECIPES, recipe
from spice_dist.stages import estimate

CONFIG = recipe("cifar10", 60_000, "spice")


def stages(changes: dict | None = None, images: int = 60_000, workers: int = 1, method: str = "spice"):
    config = override(recipe("cifar10", images, method), changes or {})
    return estimate(config, images, images, workers)


@pytest.mark.parametrize(("name", "stem"), [("resnet18", "small"), ("resnet34", "pooled"), ("wrn_28_2", "native")])
def test_operations_are_two_for_each_multiply_add_of_every_layer(name, stem):
    config = BackboneConfig(name, stem)
    network = Backbone(config, 3, 32).eval()
    total = 0

    def add(layer: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        total += 2 * output.numel() * layer.weight[0].numel()  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(add)
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    assert counted(config, 32, 3).forward == total


def test_kept_activations_are_those_that_real_tensors_keep():
    config = BackboneConfig("resnet18", "small", widths=(8, 8, 16, 16), depths=(1, 1, 1, 1))
    network = Backbone(config, 1, 8)
    owned = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(torch.zeros(64, 1, 8, 8))
    real = sum(size for place, size in kept.items() if place not in owned)
    assert out.requires_grad
    assert 64 * counted(config, 8, 1, "fp32").saved == pytest.approx(
        real, rel=0.01
    )  # but for BatchNorm's own statistics


def test_moco_takes_four_forward_passes_of_an_image_and_epoch():
    network = counted(CONFIG.backbone, 32, 3)
    images = 60_000 // 128 * 128 * 1000
    expected = images * (4 * network.forward + 6 * 12_800 * 128)  # query, its gradients, key; queue and its gradients
    assert stages()["moco"].operations == pytest.approx(expected)
    assert stages({"moco.symmetric": True})["moco"].operations == pytest.approx(2 * expected)


def test_spice_semi_takes_the_passes_of_the_paper():
    network = counted(BackboneConfig("wrn_28_2", "native"), 32, 3)
    assert stages()["spice_semi"].operations == pytest.approx(2**20 * (64 + 2 * 448) * 3 * network.forward)
    apart = stages({"spice_semi.weak_apart": True})["spice_semi"]
    assert apart.operations == pytest.approx(2**20 * ((64 + 448) * 3 + 448) * network.forward)


def test_cached_views_save_the_passes_of_the_published_stage_two():
    kept, again = stages()["spice_self"], stages({"spice_self.backbone_bn": "train"})["spice_self"]
    epoch = 60_000 // 5_000 * 5_000
    assert kept.work[0].seen == 30 * 2 * epoch
    assert again.work[0].seen == 30 * (2 + 10 * 8 / 2) * epoch  # 10 heads, 8 repeats, of half of the images


def test_imc_swav_counts_small_crops_as_small():
    work = stages(method="imc_swav")["imc_swav"].work
    assert [part.seen / work[0].seen for part in work] == [1, 2]
    assert work[1].network.forward < work[0].network.forward


def test_scan_takes_both_views_of_every_step_and_a_look_at_all_images_an_epoch():
    found = stages(method="scan")
    assert list(found) == ["moco", "features", "scan", "self_label"]
    network = counted(CONFIG.backbone, 32, 3)
    views = 50 * (60_000 // 128 * 128) * 2
    expected = (3 * views + 50 * 60_000) * network.forward + 2 * 60_000**2 * network.dim
    assert found["scan"].operations == pytest.approx(expected)
    assert found["self_label"].operations == pytest.approx(200 * 60_000 * 4 * network.forward)


def test_workers_share_activations_and_not_the_arithmetic():
    one, four = stages()["spice_semi"], stages(workers=4)["spice_semi"]
    assert one.operations == four.operations
    network = one.work[0].network
    assert one.memory - four.memory == pytest.approx(0.75 * 960 * network.saved)


def test_raw_images_that_stay_in_memory_are_counted_where_images_are_read():
    raw, jpg = (stages({"data.format": name}) for name in ("raw", "jpg"))
    held = {name: raw[name].memory - jpg[name].memory for name in raw}
    assert held == {**dict.fromkeys(raw, 60_000 * 3 * 32**2), "reliable": 0}


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "photos"])
def test_every_recipe_is_counted(name):
    config = recipe(name, 100_000, "spice")
    found = estimate(config, 100_000, 100_000)
    assert list(found) == ["moco", "features", "spice_self", "reliable", "spice_semi"]
    assert all(cost.operations > 0 and cost.memory > 0 for cost in found.values())


def test_a_dry_run_prints_a_table_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["fit", "digits", "--out", str(out), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:8]] == [
        "moco", "features", "spice_self", "reliable", "spice_semi", "together",
    ]  # fmt: skip
    assert not out.exists()


def test_a_dry_run_refuses_what_a_run_would(capsys):
    assert cli.main(["fit", "digits", "--dry-run", "--set", "moco.batch=5000"]) == 1
    assert "moco.batch" in capsys.readouterr().err


def test_without_dry_run_there_must_be_a_folder(capsys):
    assert cli.main(["fit", "digits"]) == 1
    assert "--out" in capsys.readouterr().err
