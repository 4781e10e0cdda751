"""The training loops: they learn, they resume bit for bit, and two workers equal one."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spice_dist import inference
from spice_dist.config import override
from spice_dist.data.loaders import open_images
from spice_dist.data.views import IMAGENET
from spice_dist.distributed import checkpoint
from spice_dist.distributed.checkpoint import Checkpoint
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import Interrupted, UserError
from spice_dist.methods import labelled_draw, moco, plumbing, reliable, spice_semi
from spice_dist.methods.plumbing import finished
from spice_dist.models.backbone import unit
from spice_dist.models.split_batch_norm import set_groups
from spice_dist.pseudo_labels import UNRELIABLE
from tests.methods.conftest import CPU, SMALL, TRAIN
from tests.methods.workers import on_workers

STAGES = list(TRAIN)


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """Everything the last checkpoint of a stage holds, by file and name."""
    saved: Checkpoint = finished(run / stage)
    names = [file.stem for file in sorted(saved.path.glob("*.safetensors"))]
    assert "optimizer" in names
    return {f"{name}/{key}": value for name in names for key, value in saved.tensors(name).items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def losses(run: Path, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def test_moco_learns_to_tell_images_apart(digits_folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "data").symlink_to(digits_folder / "data")
    TRAIN["moco"](override(SMALL, {"moco.epochs": 80}), LocalWorker(run, "moco", CPU))
    curve = losses(run, "moco")
    assert np.mean(curve[-10:]) < np.log(129) - 0.1, "below chance, ln(1 + queue)"


def test_spice_self_lowers_its_loss_and_keeps_the_best_of_every_head(small_run):
    curve = [json.loads(line) for line in (small_run / "spice_self/metrics.jsonl").read_text().splitlines()]
    assert curve[-1]["loss"] < curve[0]["loss"]
    selected = [line["select_loss"] for line in curve]
    assert selected == sorted(selected, reverse=True)


def test_every_cluster_keeps_a_reliable_label(small_run):
    labels = np.load(small_run / "reliable/labels.npy")
    assert labels.shape == (200,)
    summary = json.loads((small_run / "reliable/summary.json").read_text())
    assert summary["count"] == int((labels != UNRELIABLE).sum())
    for size, kept in zip(summary["cluster_sizes"], summary["per_cluster"], strict=True):
        assert kept >= min(size, 1)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("cut", [1, 3])
def test_an_interrupted_stage_resumes_bit_for_bit(small_run, without_stage, stage, cut):
    run = without_stage(stage)
    calls = iter(range(1, 1000))
    with pytest.raises(Interrupted):
        TRAIN[stage](SMALL, LocalWorker(run, stage, CPU, stop_requested=lambda: next(calls) >= cut))
    saved = checkpoint.newest(run / stage / "checkpoints")
    assert saved is not None
    assert saved.step == cut
    with pytest.raises(UserError, match="has lost its last checkpoint"):
        finished(run / stage)
    TRAIN[stage](SMALL, LocalWorker(run, stage, CPU))
    assert_same_bits(weights(run, stage), weights(small_run, stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_runs_again_without_changing_anything(small_run, tmp_path, stage):
    before = weights(small_run, stage)
    TRAIN[stage](SMALL, LocalWorker(small_run, stage, CPU))
    assert_same_bits(weights(small_run, stage), before)


@pytest.mark.parametrize("stage", ["moco", "byol", "imc_swav", "spice_semi", "scan", "self_label"])
def test_two_workers_equal_one_bit_for_bit(small_run, without_stage, stage):
    run = without_stage(stage)
    on_workers(2, SMALL, run, stage)
    assert_same_bits(weights(run, stage), weights(small_run, stage))


@pytest.mark.slow
def test_four_workers_equal_one_up_to_float_tolerance(small_run, without_stage):
    config = override(SMALL, {"bn_groups": 4, "moco.epochs": 1})
    one = without_stage("moco")
    four = one.with_name("four")
    four.mkdir()
    (four / "data").symlink_to(one / "data")
    TRAIN["moco"](config, LocalWorker(one, "moco", CPU))
    on_workers(4, config, four, "moco")
    ours, theirs = weights(one, "moco"), weights(four, "moco")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-5, rtol=1e-3)


def test_two_workers_embed_what_one_does(small_run, without_stage):
    run = without_stage("features")
    on_workers(2, SMALL, run, "features")
    assert np.array_equal(np.load(run / "features/features.npy"), np.load(small_run / "features/features.npy"))


@pytest.mark.parametrize("rule", ["adaptive", "official"])
def test_two_workers_select_the_labels_that_one_does(without_stage, tmp_path, rule):
    config = override(SMALL, {"reliable.rule": rule, "reliable.balance": False, "reliable.min_confidence": 0.0})
    one, two = without_stage("reliable"), tmp_path / "two"
    shutil.copytree(one, two)
    reliable.select(config, config.reliable, LocalWorker(one, "reliable", CPU))
    on_workers(2, config, two, "reliable")
    labels = np.load(one / "reliable/labels.npy")
    assert (labels != UNRELIABLE).any()
    assert np.array_equal(np.load(two / "reliable/labels.npy"), labels)
    assert (two / "reliable/summary.json").read_text() == (one / "reliable/summary.json").read_text()


def test_features_are_the_unit_vectors_of_plain_images_in_order(small_run):
    features = np.load(small_run / "features/features.npy").astype(np.float32)
    assert features.shape == (200, 32)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=2e-3)
    net = spice_semi.stage2_network(SMALL, small_run).eval()
    images = open_images(small_run / "data", device=CPU, size=8, channels=1)
    (last,) = inference.outputs(net.backbone, images, np.array([199]), IMAGENET, lambda done, total: None)
    np.testing.assert_allclose(unit(last)[0].detach().numpy(), features[199], atol=2e-3)


def test_shuffled_keys_come_back_in_the_order_of_their_images(small_run):
    worker = LocalWorker(small_run, "none", CPU)
    flatten = nn.Sequential(nn.Flatten())
    view = torch.randn(12, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    keys = moco.shuffled_keys(SMALL, flatten, view, 3, (0, 0, 0), worker)
    torch.testing.assert_close(keys, unit(view.flatten(1)))


def test_keys_are_normalised_among_other_images_than_their_queries(small_run):
    """With BatchNorm the shuffle must change the keys: that is what hides the batch from the query."""
    worker = LocalWorker(small_run, "none", CPU)
    torch.manual_seed(0)
    from spice_dist.models.split_batch_norm import SplitBatchNorm2d

    net = nn.Sequential(SplitBatchNorm2d(1), nn.Flatten())
    view = torch.randn(12, 1, 2, 2)
    shuffled = moco.shuffled_keys(SMALL, net, view, 3, (0, 0, 0), worker)
    unshuffled = torch.cat([unit(net(part)) for part in view.chunk(3)])
    assert not torch.allclose(shuffled, unshuffled)


@pytest.mark.parametrize(
    ("changes", "stage", "message"),
    [
        ({"moco.batch": 300}, "moco", "more than the 200 images"),
        ({"moco.queue": 60}, "moco", "must hold the 64 keys of a step"),
        ({"moco.queue": 201}, "moco", "one of each of the 200 images"),
        ({"moco.batch": 65, "moco.queue": 130}, "moco", "must be a multiple of bn_groups"),
        ({"clusters": 101}, "spice_self", "ask for 100 clusters or fewer"),
        ({"spice_semi.labelled": 15}, "spice_semi", "a multiple of bn_groups"),
        ({"spice_semi.init": "warm"}, "spice_semi", 'can be "scratch" or "stage2"'),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(without_stage, changes, stage, message):
    with pytest.raises(UserError, match=message) as caught:
        TRAIN[stage](override(SMALL, changes), LocalWorker(without_stage(stage), stage, CPU))
    assert "\n" not in str(caught.value)


def test_scratch_shares_no_weight_with_stage_one(small_run):
    config = override(SMALL, {"spice_semi.init": "scratch"})
    scratch = spice_semi.new_network(config, config.spice_semi, small_run).state_dict()
    stage2 = override(SMALL, {"spice_semi.init": "stage2"})
    warm = spice_semi.new_network(stage2, stage2.spice_semi, small_run).state_dict()
    assert_same_bits(
        {name.removeprefix("backbone."): value for name, value in warm.items() if "backbone" in name},
        finished(small_run / "moco").tensors("backbone"),
    )
    assert scratch.keys() == warm.keys()
    assert not torch.equal(scratch["backbone.body.conv1.weight"], warm["backbone.body.conv1.weight"])


class Recorder:
    """Images that only note in which order they were asked for."""

    n, size, channels, decodes = 200, 8, 1, False

    def __init__(self) -> None:
        self.orders: list[np.ndarray] = []

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.orders.append(order.reshape(-1, batch_size))
        return iter(())

    def crops(
        self, order: np.ndarray, batch_size: int, crops: object
    ) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        return iter(())

    def close(self) -> None:
        pass


def test_labelled_images_come_first_and_every_draw_is_a_function_of_the_step(small_run):
    def drawn(start: int) -> np.ndarray:
        images, worker, teachers = Recorder(), LocalWorker(small_run, "none", CPU), [np.array([3]), np.array([5])]
        list(labelled_draw.images_of_steps(images, teachers, 9, 16, 112, 0, range(start, 8), worker, span=3))
        return np.concatenate(images.orders)

    whole = drawn(0)
    assert whole.shape == (8, 16 * 8)
    assert set(whole[:, :16].ravel()) == {3, 5}
    assert np.array_equal(drawn(5), whole[5:])


LABELS = np.array([0] * 90 + [4] * 9 + [7] + [UNRELIABLE] * 50)


def test_the_teachers_are_grouped_by_cluster_or_all_in_one():
    by_cluster = labelled_draw.groups_of_teachers(LABELS, balanced=True)
    assert [group.tolist() for group in by_cluster] == [list(range(90)), list(range(90, 99)), [99]]
    assert [group.tolist() for group in labelled_draw.groups_of_teachers(LABELS, balanced=False)] == [list(range(100))]
    for balanced in (True, False):
        assert labelled_draw.groups_of_teachers(np.full(3, UNRELIABLE), balanced) == []


@pytest.mark.parametrize("balanced", [True, False])
def test_an_image_is_drawn_in_proportion_to_a_weight_of_mean_one(small_run, balanced):
    config = spice_semi.SpiceSemiConfig(steps=700)
    images, worker = Recorder(), LocalWorker(small_run, "none", CPU)
    teachers = labelled_draw.groups_of_teachers(LABELS, balanced)
    list(labelled_draw.images_of_steps(images, teachers, 150, config.labelled, 448, 0, range(700), worker))
    drawn = np.concatenate(images.orders)[:, : config.labelled]
    counts = np.bincount(drawn.ravel(), minlength=150)
    assert counts.sum() == counts[:100].sum()
    weights = 100 * counts[:100] / counts.sum()
    assert weights.mean() == pytest.approx(1)
    for cluster, size in ((0, 90), (4, 9), (7, 1)):
        expected = 100 / (3 * size) if balanced else 1.0
        assert weights[LABELS[:100] == cluster].mean() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("stage", ["moco", "byol", "spice_semi"])
def test_all_groups_in_one_pass_are_one_pass_per_group(without_stage, smooth, monkeypatch, stage):
    """As on a GPU. After few steps, since a prediction near the threshold may fall on either side of it later."""

    def one_pass(module: nn.Module, groups: int, device: torch.device) -> int:
        set_groups(module, groups)
        return 1

    config = override(SMALL, {"moco.epochs": 1, "moco.batch": 100, "moco.queue": 200, "spice_semi.steps": 2})
    config = override(config, {"byol.epochs": 1, "byol.batch": 100, "byol.warmup": 0, "seed": 2})
    run = without_stage(stage)
    TRAIN[stage](config, LocalWorker(run, stage, CPU))
    apart = weights(run, stage)
    shutil.rmtree(run / stage)
    monkeypatch.setattr(plumbing, "passes_per_step", one_pass)
    TRAIN[stage](config, LocalWorker(run, stage, CPU))
    together = weights(run, stage)
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], atol=1e-5, rtol=1e-3)


def test_one_cluster_that_takes_nearly_all_images_is_one_line(tmp_path, capsys):
    worker = LocalWorker(tmp_path, "spice_self", torch.device("cpu"))
    labels = torch.zeros(100, dtype=torch.long)
    labels[:10] = 3
    assert not plumbing.tell_if_one_takes_all("spice_self", labels, worker)
    assert capsys.readouterr().err == ""
    labels[9] = 0
    assert plumbing.tell_if_one_takes_all("spice_self", labels, worker)
    assert capsys.readouterr().err.startswith("spice_self: one cluster takes 91% of the images;")
