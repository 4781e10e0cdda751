"""SCAN against float64 references written from the formulas, its selection, and a whole run of it."""

import copy
import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spice_dist import cli
from spice_dist.assignments import read_assignments
from spice_dist.config import Config, override
from spice_dist.data import augment
from spice_dist.data.loaders import open_images
from spice_dist.data.order import epoch_order
from spice_dist.data.views import PLAIN
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import UserError
from spice_dist.launching import Launch
from spice_dist.methods import scan
from spice_dist.methods.plumbing import finished, load_backbone
from spice_dist.models.heads import ClusterHeads
from spice_dist.pipeline import fit
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.report.reading import load
from spice_dist.report.table import format_scores
from tests.methods.conftest import CPU, SMALL, TRAIN, kept_above
from tests.methods.test_methods import Recorder, assert_same_bits, weights
from tests.test_parts import parts

Without = Callable[[str], Path]


def train(config: Config, run: Path, stage: str) -> None:
    TRAIN[stage](config, LocalWorker(run, stage, CPU))


def line(run: Path, stage: str) -> dict[str, float]:
    return json.loads((run / stage / "metrics.jsonl").read_text().splitlines()[0])


def pixels(run: Path, index: np.ndarray) -> Tensor:
    images = open_images(run / "data", device=CPU, size=8, channels=1)
    (batch, _) = next(images.batches(index, len(index)))
    images.close()
    return batch


def classify(net: scan.ScanNet, images: Tensor) -> Tensor:
    """Logits (heads, B, K) in float64, which the heads themselves do not compute in."""
    x = F.normalize(net.backbone(images), dim=1) * math.sqrt(net.backbone.dim)
    return x @ net.heads.weights[0] + net.heads.biases[0]


def first_gradient(run: Path, stage: str, net: torch.nn.Module, decay: float) -> list[tuple[Tensor, Tensor]]:
    """(found, expected) for every parameter: Adam's first moment is a tenth of the gradient with its decay."""
    saved = finished(run / stage).tensors("optimizer")
    pairs = []
    for number, parameter in enumerate(net.parameters()):
        assert parameter.grad is not None
        pairs.append((10 * saved[f"{number}.exp_avg"].double(), parameter.grad + decay * parameter.detach()))
    return pairs


# ---------------------------------------------------------------- the SCAN loss


@pytest.mark.parametrize("heads", [1, 3])
def test_a_step_descends_the_float64_formula_of_the_whole_batch(without_stage: Without, smooth, heads):
    """The loss and the gradient of every parameter; BatchNorm is over groups, the mean prediction over all."""
    changes = {"scan.epochs": 1, "scan.batch": 100, "scan.neighbors": 7, "scan.weight_decay": 0.01}
    config, run = override(SMALL, {**changes, "scan.heads": heads, "bn_groups": 2}), without_stage("scan")
    train(override(config, {"scan.batch": 200}), run, "scan")  # one step in all

    order = epoch_order(0, 0, 200)
    features = np.load(run / "features/features.npy").astype(np.float32)
    lists = np.argsort(-(features @ features.T), axis=1)[:, :7]
    assert (lists == np.arange(200)[:, None]).any(1).all(), "an image is its own neighbour"
    partner = lists[order, np.random.default_rng([0, 0, 40]).integers(7, size=200)]
    both = pixels(run, np.concatenate([order, partner]))
    view = augment.apply(config.scan.view, both, torch.arange(400), (0, 0, 41), config.backbone.statistics).double()

    torch.manual_seed(0)
    backbone = load_backbone(config, run)
    net = scan.ScanNet(backbone, ClusterHeads(heads, backbone.dim, 10, layers=1)).double().train()
    anchors, others = [], []
    for group in range(2):
        rows = torch.arange(group * 100, group * 100 + 100)
        probs = classify(net, view[torch.cat([rows, rows + 200])]).softmax(2)
        anchors.append(probs[:, :100])
        others.append(probs[:, 100:])
    anchor, other = torch.cat(anchors, 1), torch.cat(others, 1)
    consistency = -(anchor * other).sum(2).log().mean(1)
    mean = anchor.mean(1)
    entropy = -(mean * mean.log()).sum(1)
    loss = consistency - 5 * entropy
    loss.sum().backward()

    written = line(run, "scan")
    for name, expected in (("loss", loss), ("consistency", consistency), ("entropy", entropy)):
        assert written[name] == pytest.approx(expected.mean().item(), rel=1e-4)
    for found, expected in first_gradient(run, "scan", net, 0.01):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-3)


def test_every_neighbour_of_the_list_is_drawn_about_as_often(small_run):
    lists = np.arange(200)[:, None] + 1000 * np.arange(4)
    images, config = Recorder(), override(SMALL, {"scan.epochs": 50, "scan.batch": 50}).scan
    list(scan.pairs(images, lists, config, 0, 0, LocalWorker(small_run, "none", CPU)))
    drawn = np.concatenate(images.orders)
    assert drawn.shape == (200, 100)
    anchors, partners = drawn[:, :50].ravel(), drawn[:, 50:].ravel()
    assert np.array_equal(partners % 1000, anchors), "a neighbour stands where its image does"
    assert np.array_equal(np.bincount(anchors), np.full(200, 50))
    shares = np.bincount(partners // 1000) / len(partners)
    assert shares == pytest.approx(np.full(4, 0.25), abs=0.02)


# ---------------------------------------------------------------- selection


def test_the_selection_loss_is_its_float64_formula_on_plain_images(small_run):
    net, kept = scan.trained(SMALL, small_run)
    lists = scan.find_neighbors(SMALL.scan, 200, LocalWorker(small_run, "none", CPU))[:, :6]
    view = augment.apply(PLAIN, pixels(small_run, np.arange(200)), torch.arange(200), ())
    with torch.no_grad():
        probs = classify(net.double().eval(), view.double()).softmax(2)
    expected = []
    for head in probs.numpy():
        products = [math.log(head[i] @ head[j]) for i in range(200) for j in lists[i]]
        mean = head.mean(0)
        expected.append(-np.mean(products) + (mean * np.log(mean)).sum())
    assert kept.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_network_of_the_lowest_loss_of_any_head_is_kept(small_run):
    net = scan.trained(SMALL, small_run)[0]
    selection = scan.Selection(net)
    states = []
    for loss in ([3.0, 2.0, 4.0], [1.5, 9.0, 9.0], [1.6, 1.7, 1.6]):
        with torch.no_grad():
            net.heads.biases[0].add_(1)
        states.append(copy.deepcopy(net.state_dict()))
        selection.update(net, torch.tensor(loss))
    assert selection.loss.tolist() == [1.5, 9.0, 9.0]
    assert_same_bits(selection.net.state_dict(), states[1])


# ---------------------------------------------------------------- self-labelling


def test_a_step_of_self_labelling_is_the_float64_formula(without_stage: Without, smooth):
    changes = {"self_label.epochs": 1, "self_label.batch": 200, "self_label.weight_decay": 0.01}
    config, run = override(SMALL, changes), without_stage("self_label")
    train(config, run, "self_label")

    order, index = epoch_order(0, 0, 200), torch.from_numpy(epoch_order(0, 0, 200))
    images = pixels(run, order)
    strong = augment.apply(config.self_label.view, images, index, (0, 0, 1)).double()
    selected, loss = scan.trained(config, run)
    net = selected.double()
    head = int(loss.argmin())
    with torch.no_grad():
        plain = augment.apply(PLAIN, images, index, ()).double()
        confidence, label = classify(net.eval(), plain)[head].softmax(1).max(1)
    written = line(run, "self_label")
    kept = kept_above(confidence - 0.15, written["confident_fraction"])
    assert 0 < kept.sum() < 200
    counts = label[kept].bincount(minlength=10)
    net.train()
    logits = torch.cat([classify(net, part)[head] for part in strong.chunk(2)])
    per_image = -logits.log_softmax(1)[torch.arange(200), label]
    expected = torch.stack([per_image[kept & (label == k)].mean() for k in range(10) if counts[k]]).mean()
    expected.backward()

    assert written["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert written["clusters_taught"] == pytest.approx((counts > 0).double().mean().item())
    for parameter in net.heads.parameters():  # only the selected head trains
        assert parameter.grad is not None
        gradient = parameter.grad[head : head + 1]
        parameter.grad, parameter.data = None, parameter.data[head : head + 1]
        parameter.grad = gradient
    for found, wanted in first_gradient(run, "self_label", net, 0.01):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-3)


def test_labels_are_counted_where_there_are_any():
    labels = torch.tensor([2, UNRELIABLE, 2, 0, UNRELIABLE])
    assert scan.label_counts(labels, 4).tolist() == [1, 0, 2, 0]
    assert scan.label_counts(labels[1:2], 4).tolist() == [0, 0, 0, 0]


def test_nothing_to_label_is_one_line_with_remedies(without_stage: Without):
    with pytest.raises(UserError, match=r"above 0.999.*self_label.threshold.*scan.epochs") as caught:
        train(override(SMALL, {"self_label.threshold": 0.999}), without_stage("self_label"), "self_label")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- labels, whole runs, settings


def test_true_labels_teach_nothing(small_run, without_stage: Without):
    run = without_stage("scan")
    shutil.rmtree(run / "self_label")
    true = np.load(run / "data/labels.npy")
    np.save(run / "data/labels.npy", np.random.default_rng(0).permutation(true) + 1)
    for stage in ("scan", "self_label"):
        train(SMALL, run, stage)
        assert_same_bits(weights(run, stage), weights(small_run, stage))


def test_a_run_leaves_scores_of_both_stages_a_report_and_a_model(tmp_path):
    """Held-out images train nothing and alone are scored; SPICE goes on in the same folder from the same stage 1."""
    config = override(SMALL, {"method": "scan", "data.loader": "torch", "moco.epochs": 1})
    run = tmp_path / "run"
    first = fit(config, parts(), run, Launch(workers=0), until="scan")
    assert first["eval"]["acc"] == min(first["heads"], key=lambda head: head["select_loss"])["acc"]
    assert list(load(run).scores)[3:] == ["SCAN, no self-label"]
    found = fit(config, parts(), run, Launch(workers=0))
    assert (found["method"], found["reliable"]["count"], len(found["heads"])) == ("scan", 0, 3)
    assert set(found["seconds"]) == {"data", "moco", "features", "scan", "self_label"}
    scores = load(run).scores
    assert list(scores)[3:] == ["SCAN, no self-label", "SCAN"]
    best = min(found["heads"], key=lambda head: head["select_loss"])
    assert (scores["SCAN, no self-label"] or {})["acc"] == best["acc"]
    assert scores["SCAN"] == found["eval"]
    assert "SCAN, no self-label" in format_scores(run)
    assert "SCAN, self-labelling" in (run / "report.html").read_text()

    assert cli.main(["predict", str(run), "digits", "--out", str(tmp_path / "out.csv")]) == 0
    with open(tmp_path / "out.csv") as file:
        predicted = [int(row["cluster"]) for row in csv.DictReader(file)]
    assert predicted[:200] == read_assignments(run / "assignments.csv")[0].tolist()

    before = weights(run, "moco")
    fit(override(config, {"method": "spice"}), parts(), run, Launch(workers=0))
    assert_same_bits(weights(run, "moco"), before)
    assert list(load(run).scores)[3:] == ["SPICE-Self", "SPICE"]
    fit(config, parts(), run, Launch(workers=0))  # all is trained: only the scores are made again
    assert load(run).scores == scores


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scan.batch": 201}, "more than the 200 images"),
        ({"scan.batch": 65}, "multiple of bn_groups"),
        ({"scan.neighbors": 1}, "nearest one is the image itself"),
        ({"scan.neighbors": 201}, "more than the 200 images"),
        ({"scan.lr": 0.0}, "scan.lr is 0"),
        ({"scan.heads": 0}, "scan.heads is 0"),
        ({"scan.entropy_weight": -1.0}, "give 0 or more"),
        ({"self_label.batch": 1000}, "more than the 200 images"),
        ({"self_label.threshold": 1.0}, "less than 1"),
        ({"self_label.weight_decay": -1.0}, "give 0 or more"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_in_one_line(changes, words):
    config = override(SMALL, changes)
    stage = next(iter(changes)).split(".")[0]
    check = {"scan": scan.check, "self_label": scan.check_self_label}[stage]
    with pytest.raises(UserError, match=words) as caught:
        check(config, getattr(config, stage), 200)
    assert "\n" not in str(caught.value)
