"""Stage 2: against the published procedure, over workers, with every choice of the ablations."""

import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spice_dist import artifacts, inference
from spice_dist.config import Config, override
from spice_dist.data import augment
from spice_dist.data.loaders import open_images
from spice_dist.data.views import PLAIN
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import Interrupted, UserError
from spice_dist.losses import double_softmax_cross_entropy
from spice_dist.methods import spice_self
from spice_dist.methods.plumbing import finished, load_backbone, view_features
from spice_dist.methods.spice_self import Selection, SpiceSelfConfig, check, m_step
from spice_dist.methods.spice_self_joint import JointSelection
from spice_dist.methods.stage2 import load_heads, stage2_network
from spice_dist.model_folder import load_model, save_model
from spice_dist.models.backbone import unit
from spice_dist.models.heads import ClusterHeads
from spice_dist.task import Task
from tests.bench.bench_heads import published_epoch
from tests.methods.conftest import CPU, SMALL, TRAIN
from tests.methods.test_methods import assert_same_bits, weights
from tests.methods.workers import on_workers

CHOICES: list[dict[str, Any]] = [
    {"assignment": "disjoint"},
    {"loss": "cross_entropy"},
    {"loss": "tempered"},
    {"entropy_weight": 1.0},
    {"score_view": "strong", "learn_view": "weak"},
    {"score_view": "strong"},
    {"learn_view": "weak"},
    {"layers": 1},
    {"layers": 3},
    {"center_fraction": 1.0},
    {"prior": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0)},
    {"view_epochs": 2},
    {"features": "raw"},
    {"backbone_bn": "train"},
    {"joint": True, "heads": 1},
    {"joint": True, "backbone_bn": "train"},
]


def changed(changes: dict[str, Any], **more: Any) -> Config:
    return override(SMALL, {f"spice_self.{name}": value for name, value in {**changes, **more}.items()})


def name_of(changes: dict[str, Any]) -> str:
    return "-".join(changes)


@pytest.mark.parametrize("changes", CHOICES, ids=name_of)
def test_every_choice_of_the_ablations_trains_and_changes_the_heads(small_run, without_stage, changes):
    run = without_stage("spice_self")
    TRAIN["spice_self"](changed(changes), LocalWorker(run, "spice_self", CPU))
    heads, loss = load_heads(run)
    assert loss.isfinite().all()
    assert len(heads) == changes.get("heads", 3)
    assert len(heads.weights) == changes.get("layers", 2)
    usual, _ = load_heads(small_run)
    same = len(loss) == 3 and len(heads.weights) == len(usual.weights)
    assert not (same and torch.equal(heads.weights[-1], usual.weights[-1]))


@pytest.mark.parametrize(
    "changes", [{}, {"assignment": "disjoint"}, {"loss": "cross_entropy"}, {"features": "raw"}], ids=name_of
)
def test_an_epoch_is_that_of_the_published_procedure(small_run, without_stage, changes):
    """Which encodes each head's strong images in every minibatch; here its BatchNorm is in eval mode too."""
    config = changed(changes, epochs=1)
    run = without_stage("spice_self")
    TRAIN["spice_self"](config, LocalWorker(run, "spice_self", CPU))
    expected, loss = published_epoch(config, small_run)
    heads = finished(run / "spice_self").tensors("heads")
    for name, value in expected.state_dict().items():  # without the flag of raw heads, which the reference lacks
        torch.testing.assert_close(heads[name], value, atol=1e-4, rtol=0)
    torch.testing.assert_close(load_heads(run)[1], loss, atol=1e-4, rtol=0)
    torch.manual_seed(SMALL.seed)
    start = ClusterHeads(3, 32, 10)
    assert (expected.weights[1] - start.weights[1]).abs().max() > 0.02, "they learned, so the test can fail"


@pytest.mark.parametrize(
    ("workers", "changes"), [(2, {"features": "raw"}), (3, {"heads": 2, "view_epochs": 1})], ids=str
)
def test_workers_share_the_heads_and_equal_one(without_stage, tmp_path, workers, changes):
    """Two share three heads unevenly; with more workers than heads one only encodes views."""
    config = changed(changes, epochs=2)
    one = without_stage("spice_self")
    several = tmp_path / "several"
    shutil.copytree(one, several)
    TRAIN["spice_self"](config, LocalWorker(one, "spice_self", CPU))
    on_workers(workers, config, several, "spice_self")
    ours, theirs = weights(one, "spice_self"), weights(several, "spice_self")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("changes", [{"view_epochs": 2}, {"backbone_bn": "train"}], ids=name_of)
def test_what_is_kept_between_steps_resumes_bit_for_bit(without_stage, tmp_path, changes):
    config = changed(changes)
    run, other = without_stage("spice_self"), tmp_path / "other"
    shutil.copytree(run, other)
    TRAIN["spice_self"](config, LocalWorker(run, "spice_self", CPU))
    with pytest.raises(Interrupted):
        TRAIN["spice_self"](config, LocalWorker(other, "spice_self", CPU, stop_requested=stop_at(3)))
    TRAIN["spice_self"](config, LocalWorker(other, "spice_self", CPU))
    assert_same_bits(weights(other, "spice_self"), weights(run, "spice_self"))
    assert np.array_equal(artifacts.head_features(other), artifacts.head_features(run))


@pytest.mark.parametrize("joint", [False, True])
def test_raw_heads_predict_by_the_backbones_features_as_they_are(without_stage, tmp_path, joint):
    """In the run, in its saved model and on new images alike, and not by features of unit norm."""
    config = changed({"features": "raw", "joint": joint})
    run = without_stage("spice_self")
    TRAIN["spice_self"](config, LocalWorker(run, "spice_self", CPU))
    save_model(stage2_network(config, run), config, tmp_path)
    net, _ = load_model(tmp_path, CPU)
    with closing(open_images(run / "data", device=CPU, size=8, channels=1)) as images:
        logits = torch.cat(list(inference.outputs(net, images, np.arange(200), config.backbone.statistics)))
        features = torch.cat(list(inference.outputs(net.backbone, images, np.arange(200), config.backbone.statistics)))
    heads, loss = load_heads(run)
    best = heads.select(int(loss.argmin()))
    hidden = torch.relu(features @ best.weights[0][0] + best.biases[0][0])
    expected = hidden @ best.weights[1][0] + best.biases[1][0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    of_run = best(torch.from_numpy(artifacts.head_features(run).astype(np.float32)))[0]
    torch.testing.assert_close(of_run, expected, atol=2e-2, rtol=1e-2)
    assert not torch.allclose(unit(features), features)


def stop_at(step: int) -> Callable[[], bool]:
    calls = iter(range(1, 100))
    return lambda: next(calls) >= step


def test_kept_views_come_again_and_cost_no_forward_pass(without_stage, monkeypatch):
    encoded = []
    real = augment.view_batches  # the one way from images to views in this stage
    monkeypatch.setattr(augment, "view_batches", lambda *args: encoded.append(len(args[1])) or real(*args))
    config = changed({"view_epochs": 1, "epochs": 4})
    TRAIN["spice_self"](config, LocalWorker(without_stage("spice_self"), "spice_self", CPU))
    assert encoded == [200]


def test_batchnorm_in_train_mode_moves_its_statistics_and_no_weight(small_run, without_stage):
    config = changed({"backbone_bn": "train"})
    run = without_stage("spice_self")
    TRAIN["spice_self"](config, LocalWorker(run, "spice_self", CPU))
    before = load_backbone(config, run).state_dict()
    net = stage2_network(config, run)
    moved = {name for name, value in net.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("running" in name for name in moved)
    # the heads were made for the features of that backbone
    images = open_images(run / "data", device=CPU, size=8, channels=1)
    plain = [(PLAIN, (0, 0, 0))]
    encode = lambda view: unit(net.backbone.eval()(view).detach())  # noqa: E731
    (features,) = view_features(config, images, np.arange(200), plain, [encode])
    np.testing.assert_allclose(artifacts.head_features(run).astype(np.float32), features.numpy(), atol=1e-3)
    assert artifacts.head_features_file(small_run) == small_run / "features/features.npy"


def test_joint_training_moves_the_backbones_weights(without_stage):
    config = changed({"joint": True, "heads": 1})
    run = without_stage("spice_self")
    TRAIN["spice_self"](config, LocalWorker(run, "spice_self", CPU))
    before = load_backbone(config, run).state_dict()
    after = stage2_network(config, run).backbone.state_dict()
    assert not torch.equal(after["body.conv1.weight"], before["body.conv1.weight"])


def test_the_course_of_the_selection_is_kept(small_run):
    saved = finished(small_run / "spice_self").tensors("select")
    losses, followed = saved["losses"], saved["followed"]
    assert losses.shape == (4, 3)
    assert followed.shape == (4, 3, 200)
    assert torch.equal(losses.min(0).values, saved["loss"])
    heads = ClusterHeads.holding(finished(small_run / "spice_self").tensors("heads"))
    features = torch.from_numpy(np.load(small_run / "features/features.npy").astype(np.float32))
    order = spice_self.followed_images(SMALL, 200, 200)
    assert sorted(order) == list(range(200))
    assert torch.equal(heads(features[order]).argmax(2).int(), followed[-1])


def test_selection_keeps_the_best_moment_of_each_head_or_of_a_changing_backbone(small_run):
    backbone = load_backbone(SMALL, small_run)
    heads = ClusterHeads(2, 32, 10)
    selection = JointSelection(heads, backbone, 3, 5)
    labels = torch.zeros(2, 5, dtype=torch.long)
    for epoch, loss in enumerate([[3.0, 2.0], [1.0, 4.0], [2.0, 1.5]]):
        for parameter in [*heads.parameters(), *backbone.parameters()]:
            parameter.data.fill_(epoch)
        selection.update(epoch, heads, backbone, torch.tensor(loss), labels)
    assert selection.loss.tolist() == [1.0, 4.0]
    assert selection.best.biases[1][:, 0, 0].tolist() == [1.0, 1.0], "heads of another moment saw another network"
    assert all((parameter == 1).all() for parameter in selection.backbone.parameters())
    frozen = Selection(heads, 2, 5)
    for epoch, loss in enumerate([[1.0, 2.0], [3.0, 1.5]]):
        for parameter in heads.parameters():
            parameter.data.fill_(epoch)
        frozen.update(epoch, heads, torch.tensor(loss), labels)
    assert frozen.loss.tolist() == [1.0, 1.5]
    assert frozen.best.biases[1][:, 0, 0].tolist() == [0.0, 1.0]


def test_the_entropy_term_is_on_from_a_hundred_clusters():
    logits = 10 * torch.eye(100)[:1].repeat(1, 8, 1)
    labels = torch.zeros(1, 8, dtype=torch.long)
    config = SpiceSelfConfig()
    values = {
        (clusters, weight): spice_self.loss_of(Task(clusters=clusters), replace(config, entropy_weight=weight))(
            logits, labels
        ).item()
        for clusters in (99, 100)
        for weight in (-1.0, 0.0, 0.01)
    }
    assert values[99, -1.0] == values[99, 0.0] == values[100, 0.0]
    assert values[100, -1.0] == values[100, 0.01] != values[100, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"assignment": "greedy"}, 'can be "?overlap, disjoint'),
        ({"loss": "mse"}, "can be double_softmax, cross_entropy, tempered"),
        ({"center_fraction": 1.5}, "at most 1"),
        ({"center_fraction": 0.0}, "must be above 0"),
        ({"layers": 0}, "must be above 0"),
        ({"lr": 0.0}, "must be above 0"),
        ({"entropy_weight": float("nan")}, "must be finite"),
        ({"prior": (float("inf"),) * 10}, "one above 0"),
        ({"samples_per_cluster": 1}, "at least 2 images"),
        ({"prior": (1.0, 2.0)}, "has 2 sizes"),
        ({"prior": (1.0,) * 9 + (0.0,)}, "one above 0 for each of the 10 clusters"),
        ({"prior": (1.0,) * 9 + (100.0,)}, "leaves a cluster 1 of the 200 images"),
        ({"view_epochs": 2, "joint": True}, "those of another network"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        check(SMALL, changed(changes).spice_self, 200)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encodes", [False, True])
def test_in_half_precision_every_minibatch_sees_the_weights_of_the_one_before(encodes: bool):
    """Autocast keeps its rounded copies of weights; if it were entered once, all would see those of the first."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(40, 8, generator=generator)
    rows = torch.randint(40, (2, 40), generator=generator)
    order = torch.randint(40, (30, 10), generator=generator)
    labels = torch.randint(3, (2, 40), generator=generator)

    def trained(parts: list[torch.Tensor], precision: str) -> ClusterHeads:
        torch.manual_seed(0)
        heads, backbone = ClusterHeads(2, 8, 3), torch.nn.Linear(8, 8)
        adam = torch.optim.Adam([*heads.parameters(), *backbone.parameters()], 0.01)
        inputs = (lambda chosen: backbone(views[chosen])) if encodes else views.__getitem__
        for part in parts:
            m_step(heads, adam, inputs, rows, labels, part, double_softmax_cross_entropy, precision)
        return heads

    at_once, one_by_one = trained([order], "bf16"), trained(list(order.split(1)), "bf16")
    assert_same_bits(dict(at_once.state_dict()), dict(one_by_one.state_dict()))
    full = trained([order], "fp32")
    assert not torch.equal(full.weights[0], at_once.weights[0]), "so it is in half precision"
    torch.testing.assert_close(full.weights[1], at_once.weights[1], atol=0.05, rtol=0.1)


def test_a_changing_backbone_has_one_worker(without_stage):
    worker = LocalWorker(without_stage("spice_self"), "spice_self", CPU)
    worker.world = 2
    with pytest.raises(UserError, match="--workers 0"):
        TRAIN["spice_self"](changed({"joint": True}), worker)


@pytest.mark.parametrize("images", [19, 20])
def test_two_images_for_each_cluster_are_needed(images: int):
    if images < 20:
        with pytest.raises(UserError, match="ask for 9 clusters or fewer"):
            check(SMALL, SMALL.spice_self, images)
    else:
        check(SMALL, SMALL.spice_self, images)


@pytest.mark.parametrize("clusters", [2, 100])
def test_few_and_many_clusters_train(small_run: Path, without_stage, clusters: int):
    run = without_stage("spice_self")
    TRAIN["spice_self"](override(SMALL, {"clusters": clusters}), LocalWorker(run, "spice_self", CPU))
    heads, loss = load_heads(run)
    assert heads.weights[1].shape[2] == clusters
    assert loss.isfinite().all()
