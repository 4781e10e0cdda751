"""Stage 3 against a float64 reference written from the formulas, and what its options promise."""

import copy
import csv
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spice_dist import cli, inference, model_folder
from spice_dist.assignments import read_assignments
from spice_dist.config import Config, override
from spice_dist.data import augment
from spice_dist.data.loaders import open_images
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import Interrupted, UserError
from spice_dist.evaluate import evaluate
from spice_dist.methods import spice_semi
from spice_dist.methods.head_calibration import best_temperature, calibrate
from spice_dist.methods.label_refresh import ReliableLabels, refreshed_labels
from spice_dist.methods.labelled_draw import images_of_steps
from spice_dist.methods.plumbing import finished, open_run_dataset
from spice_dist.methods.prediction_monitor import PredictionMonitor
from spice_dist.methods.thresholds import AdaptiveThreshold
from spice_dist.models.heads import ClusterNet, LinearNet
from spice_dist.pseudo_labels import UNRELIABLE
from tests.methods.conftest import CPU, SMALL, TRAIN, kept_above
from tests.methods.test_methods import assert_same_bits, weights
from tests.methods.workers import on_workers

WIDE = {"spice_semi.network": "wrn_28_2", "spice_semi.mean": (0.5,) * 3, "spice_semi.std": (0.25,) * 3}
BEYOND = {"threshold_rule": "adaptive", "refresh_steps": 3, "refresh_agreement": 0.0, "weak_apart": True}
EVERYTHING = override(SMALL, {**WIDE, **{f"spice_semi.{name}": value for name, value in BEYOND.items()}})


def train(config: Config, run: Path, **options) -> None:
    TRAIN["spice_semi"](config, LocalWorker(run, "spice_semi", CPU, **options))


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "spice_semi/metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the reference


def batches(run: Path, config: Config, labels: np.ndarray):
    """(weak views of labelled images, their labels, weak and strong views of the others) of every step, in float64."""
    own = config.spice_semi
    images = open_images(run / "data", device=CPU, size=8, channels=1)
    teachers = [np.flatnonzero(labels == cluster) for cluster in np.unique(labels[labels >= 0])]
    worker = LocalWorker(run, "none", CPU)
    drawn = images_of_steps(images, teachers, 200, own.labelled, own.labelled * own.ratio, 0, range(own.steps), worker)
    position = torch.arange(own.labelled * (1 + own.ratio))
    for step, (image, index) in enumerate(drawn):
        weak = augment.apply(own.weak, image, position, (0, step, 20 + 1), config.backbone.statistics).double()
        strong = augment.apply(own.strong, image, position, (0, step, 20 + 2), config.backbone.statistics).double()
        count = own.labelled
        yield weak[:count], torch.from_numpy(labels)[index[:count]], weak[count:], strong[count:]
    images.close()


def classify(net: ClusterNet, images: Tensor) -> Tensor:
    x = F.normalize(net.backbone(images), dim=1) * math.sqrt(32)
    (hidden, out), (hidden_bias, out_bias) = net.head.weights, net.head.biases
    return torch.relu(x @ hidden[0] + hidden_bias[0]) @ out[0] + out_bias[0]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("rule", ["fixed", "adaptive"])
def test_three_steps_are_those_of_a_float64_reference(without_stage, smooth, rule, apart):
    """Losses, thresholds, Nesterov's momentum, decay of kernels, BatchNorm in groups, the averaged network."""
    config = override(
        SMALL,
        {
            **{"spice_semi.steps": 3, "spice_semi.threshold_rule": rule, "spice_semi.threshold": 0.13},
            **{"spice_semi.threshold_momentum": 0.5, "spice_semi.lr": 0.01, "spice_semi.ema": 0.9},
            "spice_semi.weak_apart": apart,
        },
    )
    own, run = config.spice_semi, without_stage("spice_semi")
    train(config, run)
    written = lines(run)

    torch.manual_seed(0)
    net = spice_semi.new_network(config, own, run).double().train()
    assert isinstance(net, ClusterNet)
    slow = copy.deepcopy(net)
    named = dict(net.named_parameters())
    velocity = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    tau, shares = 0.1, torch.full((10,), 0.1, dtype=torch.float64)
    losses, kept, agreed = [], [], []
    for step, parts in enumerate(batches(run, config, np.load(run / "reliable/labels.npy"))):
        threshold = torch.full((10,), 0.13) if rule == "fixed" else tau * shares / shares.max()
        outputs = []
        for taught, label, weak, strong in zip(*(part.chunk(2) for part in parts), strict=True):
            if apart:
                on_weak = classify(net, weak)
                on_taught, on_strong = classify(net, torch.cat([taught, strong])).split([len(taught), len(strong)])
            else:
                logits = classify(net, torch.cat([taught, weak, strong]))
                on_taught, on_weak, on_strong = logits.split([len(taught), len(weak), len(strong)])
            outputs.append((on_taught, label, on_weak.detach().softmax(1), on_strong))
        on_taught, label, probs, on_strong = (torch.cat(part) for part in zip(*outputs, strict=True))
        confidence, cluster = probs.max(1)
        kept.append(kept_above(confidence - threshold[cluster], written[step]["confident_fraction"]))
        per_image = -on_strong.log_softmax(1)[torch.arange(len(probs)), cluster]
        loss = F.cross_entropy(on_taught, label) + (kept[-1] * per_image).mean()
        agreed.append((on_taught.argmax(1) == label).double().mean().item())
        loss.backward()
        losses.append(loss.item())
        tau = 0.5 * tau + 0.5 * probs.max(1).values.mean().item()
        shares = 0.5 * shares + 0.5 * probs.mean(0)
        lr = own.lr * math.cos(7 * math.pi * step / (16 * 3))
        with torch.no_grad():
            for name, parameter in named.items():
                assert parameter.grad is not None
                decays = parameter.ndim >= 2 and "bias" not in name
                gradient = parameter.grad + 5e-4 * decays * parameter
                velocity[name] = 0.9 * velocity[name] + gradient
                parameter.sub_(lr * (gradient + 0.9 * velocity[name]))
                parameter.grad = None
            for averaged, parameter in zip(slow.parameters(), net.parameters(), strict=True):
                averaged.mul_(0.9).add_(0.1 * parameter)

    assert 0 < torch.cat(kept).double().mean() < 1
    np.testing.assert_allclose([line["loss"] for line in written], losses, rtol=1e-4)
    np.testing.assert_allclose(np.mean([line["reliable_agreement"] for line in written]), np.mean(agreed), rtol=1e-5)
    saved = finished(run / "spice_semi")
    for name, expected in (("net", net), ("ema", slow)):
        wanted = dict(expected.named_parameters())
        found = saved.tensors(name)
        for key in wanted:
            torch.testing.assert_close(found[key].double(), wanted[key].detach(), atol=2e-4, rtol=2e-3)
    if rule == "adaptive":
        state = saved.tensors("threshold")
        assert state["confidence"].item() == pytest.approx(tau, rel=1e-4)
        assert written[-1]["threshold"] == pytest.approx(tau, rel=1e-4)
        torch.testing.assert_close(state["shares"].double(), shares, atol=1e-5, rtol=1e-4)


def test_kernels_learn_in_bfloat16_after_a_pass_without_gradients(without_stage):
    """The pass of the weak views takes no gradient from the pass after it. Current torch keeps them apart by itself."""
    changes = {"precision": "bf16", "spice_semi.weak_apart": True, "spice_semi.weight_decay": 0.0}
    config, run = override(SMALL, {**changes, "spice_semi.steps": 1}), without_stage("spice_semi")
    train(config, run)
    torch.manual_seed(0)
    before = spice_semi.new_network(config, config.spice_semi, run).state_dict()
    after = finished(run / "spice_semi").tensors("net")
    still = [name for name, value in after.items() if value.ndim == 4 and torch.equal(value, before[name])]
    assert not still


def test_adaptive_thresholds_follow_confidence_class_by_class():
    threshold = AdaptiveThreshold(3, 0.9)
    torch.testing.assert_close(threshold.of_classes(), torch.full((3,), 1 / 3))
    logits = torch.tensor([[9.0, 0, 0]] * 3 + [[0.0, 5, 0]])
    for _ in range(200):
        threshold.update([logits])
    probs = logits.softmax(1)
    torch.testing.assert_close(threshold.confidence, probs.amax(1).mean())
    found = threshold.of_classes()
    torch.testing.assert_close(found, probs.amax(1).mean() * probs.mean(0) / probs.mean(0).max())
    assert found[0] > found[1] > found[2] > 0
    halves = torch.stack([threshold.summary(part) for part in logits.chunk(2)]).mean(0)
    torch.testing.assert_close(halves, threshold.summary(logits))


# ---------------------------------------------------------------- workers, resume, labels


def test_with_all_options_two_workers_equal_one_and_a_resumed_run_an_uninterrupted_one(without_stage):
    """Another network and its statistics, adaptive thresholds, weak views apart, labels anew; cut where due."""
    run = without_stage("spice_semi")
    train(EVERYTHING, run)
    whole = weights(run, "spice_semi")
    assert {"threshold/confidence", "threshold/shares", "reliable/labels"} <= whole.keys()
    assert not np.array_equal(whole["reliable/labels"].numpy(), np.load(run / "reliable/labels.npy"))
    for cut in (3, 5):
        shutil.rmtree(run / "spice_semi")
        calls = iter(range(1, 100))
        with pytest.raises(Interrupted):
            train(EVERYTHING, run, stop_requested=lambda calls=calls, cut=cut: next(calls) >= cut)
        train(EVERYTHING, run)
        assert_same_bits(weights(run, "spice_semi"), whole)
    shutil.rmtree(run / "spice_semi")
    on_workers(2, EVERYTHING, run, "spice_semi")
    assert_same_bits(weights(run, "spice_semi"), whole)


def test_true_labels_teach_nothing(small_run, without_stage):
    run = without_stage("spice_semi")
    true = np.load(run / "data/labels.npy")
    np.save(run / "data/labels.npy", np.random.default_rng(0).permutation(true) + 1)
    train(SMALL, run)
    assert_same_bits(weights(run, "spice_semi"), weights(small_run, "spice_semi"))


def test_without_a_reliable_label_nothing_is_trained(without_stage):
    run = without_stage("spice_semi")
    np.save(run / "reliable/labels.npy", np.full(200, UNRELIABLE))
    train(SMALL, run)
    assert not list(run.glob("spice_semi/checkpoints/*"))


def test_labels_made_again_are_the_rules_answer_to_the_averaged_network(small_run):
    """Labels of the network's own clusters, on clustered images alone; the former ones where the rule leaves none."""
    worker = LocalWorker(small_run, "none", CPU)
    images = open_images(small_run / "data", device=CPU, size=8, channels=1)
    net = spice_semi.stage2_network(SMALL, small_run).eval()
    before = torch.from_numpy(np.load(small_run / "reliable/labels.npy"))
    again = refreshed_labels(SMALL, SMALL.spice_semi.refresh_agreement, net, images, 200, worker, before)
    assert (again == before).float().mean() > 0.98, "the same network and rule, but for the rounding of its features"
    fewer = refreshed_labels(SMALL, SMALL.spice_semi.refresh_agreement, net, images, 150, worker, before)
    assert (fewer[150:] == UNRELIABLE).all()
    predicted = inference.probabilities(net, images, SMALL.backbone.statistics).argmax(1)
    labelled = (fewer[:150] != UNRELIABLE).numpy()
    assert labelled.any()
    assert np.array_equal(fewer[:150].numpy()[labelled], predicted[:150][labelled])


def test_labels_stay_where_the_rule_leaves_none(without_stage, capsys):
    run = without_stage("spice_semi")
    path = run / "reliable/summary.json"
    summary = json.loads(path.read_text())
    summary["settings"] |= {"rule": "official", "min_confidence": 1.0}
    path.write_text(json.dumps(summary))
    train(override(SMALL, {"spice_semi.refresh_steps": 5, "spice_semi.refresh_agreement": 0.0}), run)
    kept = finished(run / "spice_semi").tensors("reliable")["labels"].numpy()
    assert np.array_equal(kept, np.load(run / "reliable/labels.npy"))
    assert capsys.readouterr().err.count("is reliable; those of before are kept") == 1


def test_a_network_that_has_not_learnt_its_labels_replaces_none(small_run, capsys):
    """Of wrong clusters for a tenth of the labels it agrees with nine in ten."""
    worker = LocalWorker(small_run, "none", CPU)
    images = open_images(small_run / "data", device=CPU, size=8, channels=1)
    net = spice_semi.stage2_network(SMALL, small_run).eval()
    predicted = torch.from_numpy(inference.probabilities(net, images, SMALL.backbone.statistics).argmax(1))
    labels = torch.where(torch.arange(200) % 2 == 0, predicted, UNRELIABLE)
    labels[:20:2] = (labels[:20:2] + 1) % 10
    for asked, changed in ((0.89, True), (0.91, False)):
        again = refreshed_labels(SMALL, asked, net, images, 200, worker, labels)
        assert torch.equal(again, labels) is not changed
        assert ("has learnt 90% of the reliable labels" in capsys.readouterr().err) is not changed


# ---------------------------------------------------------------- another network


def test_the_model_of_a_run_is_the_network_of_stage_three(without_stage, tmp_path):
    config = override(SMALL, WIDE)
    run = without_stage("spice_semi")
    train(config, run)
    result = evaluate(config, run, CPU, {})
    assert result["eval"] is not None
    about = json.loads((run / "model/model.json").read_text())
    assert about["backbone"]["name"] == "wrn_28_2"
    assert about["backbone"]["mean"] == [0.5] * 3
    net, task = model_folder.load_model(run / "model", CPU)
    assert isinstance(net, LinearNet)
    assert (task.backbone.name, net.head.weight.shape) == ("wrn_28_2", (10, 128))
    assert_same_bits(net.state_dict(), finished(run / "spice_semi").tensors("ema"))
    assert cli.main(["predict", str(run), "digits", "--out", str(tmp_path / "out.csv")]) == 0
    assigned = read_assignments(run / "assignments.csv")[0]
    with open(tmp_path / "out.csv") as file:
        predicted = [int(row["cluster"]) for row in csv.DictReader(file)]
    assert len(predicted) == 1797
    assert predicted[:200] == assigned.tolist()


def test_batchnorm_of_a_wide_resnet_follows_as_slowly_as_the_average(small_run):
    config = override(SMALL, {**WIDE, "spice_semi.ema": 0.95})
    net = spice_semi.new_network(spice_semi.network_task(config, config.spice_semi), config.spice_semi, small_run)
    assert {module.momentum for module in net.modules() if isinstance(module, nn.BatchNorm2d)} == {1 - 0.95}


def test_another_network_ends_with_one_linear_layer_on_its_features_as_they_are(small_run):
    """The published head: logits W f + b with b = 0 at the start, so that features of twice the size double them."""
    for changes in (WIDE, {"spice_semi.linear_head": True}):
        config = override(SMALL, changes)
        task = spice_semi.network_task(config, config.spice_semi)
        net = spice_semi.new_network(task, config.spice_semi, small_run).eval()
        assert isinstance(net, LinearNet)
        images = torch.rand(5, 1, 8, 8)
        features = net.backbone(images).double()
        expected = features @ net.head.weight.double().T
        torch.testing.assert_close(net(images).double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(net.logits(2 * features.float()).double(), 2 * expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- what is watched


def test_lines_tell_how_healthy_the_predictions_are(small_run):
    for line in lines(small_run):
        for name in ("confident_fraction", "reliable_agreement", "clusters_predicted", "ema_disagreement"):
            assert 0 <= line[name] <= 1
        assert line["images_per_second"] > 0
        assert "threshold" not in line


def monitored(run: Path, config: Config, logits: Tensor, labels: list[int], steps: list[int]) -> list[dict]:
    """What the probes say after each of `steps`, of ten alike."""
    own = config.spice_semi
    warning = partial(spice_semi.collapse_warning, config, own)
    images_per_step = own.labelled * (1 + own.ratio)
    monitor = PredictionMonitor(config, own.steps, images_per_step, warning, LocalWorker(run, "none", CPU))
    reliable = ReliableLabels(torch.tensor(labels))
    images = torch.zeros(len(logits), 1, 1, 1)
    told = []
    for step in steps:
        probes = {}
        for _ in range(10):
            probes = monitor.count(step, nn.Sequential(nn.Flatten(), nn.Linear(1, 10)), images, [logits], reliable)
        told.append({name: probe().item() for name, probe in probes.items()})
    return told


def test_a_cluster_that_vanishes_is_told_once_with_what_to_do(small_run, capsys):
    """Not while the network settles, not of a cluster that has no reliable label, not from few predictions."""
    config = override(SMALL, {"spice_semi.steps": 1000})
    but_two = F.one_hot(torch.arange(128) % 8, 10).float()  # none into 8 and 9
    told = monitored(small_run, config, but_two, [0, 8, UNRELIABLE], [50, 500, 600])
    assert [line["clusters_predicted"] for line in told] == pytest.approx([0.8] * 3)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "step 500" in warning
    assert "cluster 8 any more" in warning
    assert "threshold_rule=adaptive" in warning
    monitored(small_run, config, but_two, [0, 9, 8], [50])
    monitored(small_run, config, but_two, [0, 1, UNRELIABLE], [500])
    monitored(small_run, config, but_two[:64], [0, 8], [500])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threshold_rule": "free"}, 'can be "fixed" or "adaptive"'),
        ({"threshold": 95.0}, "between 0 and 1"),
        ({"threshold_momentum": -0.1}, "between 0 and 1"),
        ({"refresh_steps": -1}, "0, for never"),
        ({"init": "stage2", "network": "wrn_28_2"}, 'or set init="scratch"'),
        ({"init": "stage2", "mean": (0.5,) * 3, "std": (0.5,) * 3}, 'or set init="scratch"'),
        ({"mean": (0.5,) * 3}, "three numbers of each"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}, "deviations above 0"),
        ({"network": "wrn_28_3"}, "did you mean wrn_28"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_in_one_line(changes, words):
    config = replace(SMALL.spice_semi, **changes)
    with pytest.raises(UserError, match=words) as caught:
        spice_semi.check(SMALL, config)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- going on from stage 2


def test_the_best_temperature_is_that_of_the_model_that_drew_the_labels():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
    for temperature in (0.3, 1.0, 40.0):
        assert best_temperature(scores * temperature, labels) == pytest.approx(temperature, rel=0.06)


def test_calibrating_changes_no_prediction_and_makes_reliable_labels_likelier_on_strong_views(small_run):
    config = override(SMALL, {"spice_semi.init": "stage2"})
    own = config.spice_semi
    images, _ = open_run_dataset(config, small_run, CPU)
    labels = torch.from_numpy(np.load(small_run / "reliable/labels.npy"))
    net = spice_semi.new_network(config, own, small_run)
    assert isinstance(net, ClusterNet)
    with torch.no_grad():
        net.head.weights[-1].mul_(1000)
        net.head.biases[-1].mul_(1000)
    sharp = copy.deepcopy(net).eval()
    calibrate(config, own.strong, net, images, labels)

    chosen = (labels != UNRELIABLE).nonzero()[:, 0]
    (batch, index) = next(images.batches(chosen.numpy(), len(chosen)))
    images.close()
    view = augment.apply(own.strong, batch, index, (0, 7, 7), config.backbone.statistics)
    with torch.no_grad():
        before, after = sharp(view), net.eval()(view)
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert F.cross_entropy(after, labels[chosen]) < F.cross_entropy(before, labels[chosen]) / 2


def test_stage_three_goes_on_from_a_calibrated_network(without_stage):
    """At a learning rate of 0 the averaged network stays what it began as."""
    config = override(SMALL, {"spice_semi.init": "stage2", "spice_semi.lr": 0.0, "spice_semi.steps": 2})
    run = without_stage("spice_semi")
    train(config, run)
    began = spice_semi.new_network(config, config.spice_semi, run)
    assert isinstance(began, ClusterNet)
    images, _ = open_run_dataset(config, run, CPU)
    calibrate(config, config.spice_semi.strong, began, images, torch.from_numpy(np.load(run / "reliable/labels.npy")))
    images.close()
    kept = finished(run / "spice_semi").tensors("ema")
    assert_same_bits(dict(began.named_parameters()), {name: kept[name] for name, _ in began.named_parameters()})
