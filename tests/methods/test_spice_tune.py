"""Tuning the last blocks: what stays as it was, what is learnt, and when the result of stage 2 is kept."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import normalized_mutual_info_score

from spice_dist import graph
from spice_dist.config import override
from spice_dist.data.loaders import open_images
from spice_dist.data.views import View
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import Interrupted, UserError
from spice_dist.inference import outputs, probabilities
from spice_dist.methods import spice_tune
from spice_dist.methods.plumbing import finished
from spice_dist.methods.spice_tune import STRONG, WEAK, SpiceTuneConfig, chosen_images, draw, limits_of, soft_labels
from spice_dist.methods.stage2 import stage2_network
from spice_dist.methods.trunk_activations import encode, features_of
from spice_dist.methods.tune_guard import Guard
from spice_dist.models.backbone import Backbone
from spice_dist.models.heads import ClusterNet
from spice_dist.models.tail import SplitNetwork, split
from spice_dist.neighbors import nearest, without_itself
from spice_dist.pseudo_labels import UNRELIABLE
from tests.methods.conftest import CPU, SMALL
from tests.methods.test_methods import assert_same_bits, weights

TUNE = SpiceTuneConfig(
    **{"epochs": 2, "labelled": 16, "strong_views": 2, "guard_steps": 5, "neighbors": 0, "regroup": False},
    **{"lr": 3e-4, "head_lr": 0.01, "head_steps": 60, "strong": View((0.8, 1.0))},  # of a network that knows little
)


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """The run folder before this stage: only what is read, by links."""
    for name in ("data", "features", "moco", "spice_self"):
        (tmp_path / name).symlink_to(small_run / name)
    (tmp_path / "reliable").mkdir()
    labels = np.load(small_run / "reliable/labels.npy")
    np.save(tmp_path / "reliable/labels.npy", labels)
    return tmp_path


def train(run: Path, config: SpiceTuneConfig = TUNE, **options) -> dict[str, torch.Tensor]:
    """The state of the network that is left."""
    spice_tune.train(SMALL, config, LocalWorker(run, "spice_tune", CPU, **options))
    return finished(run / "spice_tune").tensors("net")


def parts_of(net: ClusterNet, blocks: int = 0) -> SplitNetwork:
    assert isinstance(net.backbone, Backbone)
    return split(net.backbone, 1, 8, blocks)


def summary(run: Path) -> dict[str, str]:
    return json.loads((run / "spice_tune/summary.json").read_text())


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "spice_tune/metrics.jsonl").read_text().splitlines()]


def test_the_tail_learns_and_nothing_else_changes(run):
    before = stage2_network(SMALL, run)
    blocks = parts_of(before).blocks
    after = train(run, replace(TUNE, epochs=6))
    assert summary(run)["kept"] == "tuned"
    early, _, late = np.array_split([line["loss"] for line in lines(run)], 3)
    assert np.mean(late) < np.mean(early)
    own = {id(p) for p in parts_of(before, blocks).tail.parameters()} | {id(p) for p in before.head.parameters()}
    for name, tensor in before.named_parameters():
        assert torch.equal(after[name], tensor) is (id(tensor) not in own), name
    for name, tensor in before.named_buffers():
        assert torch.equal(after[name], tensor), name


def test_the_result_agrees_more_with_the_reliable_labels_on_strong_views(run):
    labels = torch.from_numpy(np.load(run / "reliable/labels.npy"))
    reliable = labels != UNRELIABLE
    net = stage2_network(SMALL, run).eval()
    images = open_images(run / "data", device=CPU, size=8, channels=1)
    parts = parts_of(net)
    views = [(TUNE.weak, (SMALL.seed, 0, WEAK)), (TUNE.strong, (SMALL.seed, 0, STRONG))]
    activations = encode(SMALL, views, images, np.arange(200), parts.trunk, LocalWorker(run, "x", CPU))

    def loss() -> float:
        with torch.no_grad():
            logits = net.head(features_of(parts.tail, activations[1], SMALL))[0]
        return float(F.cross_entropy(logits[reliable], labels[reliable]))

    before = loss()
    net.load_state_dict(train(run, replace(TUNE, epochs=6)))
    assert loss() < before - 0.1


@pytest.mark.parametrize("cut", [1, 9])
def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(run, tmp_path_factory, cut):
    other = tmp_path_factory.mktemp("other")
    for name in ("data", "features", "moco", "spice_self", "reliable"):
        (other / name).symlink_to((run / name).resolve())
    train(other)
    calls = iter(range(1, 1000))
    with pytest.raises(Interrupted):
        train(run, stop_requested=lambda: next(calls) >= cut)
    train(run)
    assert_same_bits(weights(run, "spice_tune"), weights(other, "spice_tune"))
    train(run)
    assert_same_bits(weights(run, "spice_tune"), weights(other, "spice_tune"))


def test_a_rate_that_destroys_the_network_ends_in_the_result_of_stage_two(run, capsys):
    before = stage2_network(SMALL, run).state_dict()
    after = train(run, replace(TUNE, lr=1.0, head_lr=1.0))
    assert_same_bits(after, before)
    assert summary(run)["kept"] == "stage2"
    said = capsys.readouterr().err
    assert said.count("stage 2's result is kept") == 1
    assert summary(run)["why"] in said


def test_after_an_alarm_training_begins_again_at_a_third_of_the_rate(run, monkeypatch):
    """The attempt after a false alarm is the run whose rates are a third, but for the numbers that it draws."""
    real, rates, calls = Guard.see, [], iter(range(1000))

    def see(self: Guard, loss: torch.Tensor, step: int, last: bool, predicted) -> str:
        rates.append(self.retried)
        return "a test" if next(calls) == 6 else real(self, loss, step, last, predicted)

    monkeypatch.setattr(Guard, "see", see)
    train(run)
    steps = int(np.ceil(2 * 200 / 32))
    assert rates == [0] * 7 + [1] * steps
    assert finished(run / "spice_tune").step == 7 + steps
    assert f"lr {TUNE.lr / 3:.2g}" in summary(run)["why"]


def test_every_cluster_with_a_floor_of_labels_survives(run):
    """The clusters of the small run are of unlike size; one is cut down to its floor, a single label."""
    labels = np.load(run / "reliable/labels.npy")
    present, counts = np.unique(labels[labels != UNRELIABLE], return_counts=True)
    smallest = present[counts.argmin()]
    own = np.flatnonzero(labels == smallest)
    labels[own[1:]] = UNRELIABLE
    np.save(run / "reliable/labels.npy", labels)
    net = stage2_network(SMALL, run).eval()
    images = open_images(run / "data", device=CPU, size=8, channels=1)
    before = probabilities(net, images, SMALL.backbone.statistics).argmax(1)
    net.load_state_dict(train(run, replace(TUNE, epochs=6)))
    after = probabilities(net, images, SMALL.backbone.statistics).argmax(1)
    assert summary(run)["kept"] == "tuned"
    for cluster in np.unique(before):
        assert (after == cluster).sum() >= 0.2 * (before == cluster).sum()
    assert after[own[0]] == smallest


def test_the_head_learns_the_clusters_of_the_tuned_features(run):
    """They are those that stage 2 on the graph of neighbours starts from, under the numbers that clusters had."""
    free = replace(TUNE, regroup=True, min_size=0, min_agreement=0, head_steps=200)
    net = stage2_network(SMALL, run).eval()
    images = open_images(run / "data", device=CPU, size=8, channels=1)
    before = probabilities(net, images, SMALL.backbone.statistics).argmax(1)
    net.load_state_dict(train(run, free))
    assert summary(run)["why"].endswith("clusters among the new features are found again")
    now = probabilities(net, images, SMALL.backbone.statistics).argmax(1)
    features = torch.cat(
        list(outputs(net.backbone, images, np.arange(200), SMALL.backbone.statistics, lambda *_: None))
    )
    near = without_itself(nearest(F.normalize(features), 21).numpy().astype(np.int32))
    found = graph.graph_clusterings(near, 10, (10, 15, 20), (6, 8, 12), 0)
    probs = np.stack([graph.spread(np.eye(10, dtype=np.float32)[row], near[:, :15]) for row in found])
    expected = graph.consensus(probs)[0].argmax(1)
    assert normalized_mutual_info_score(expected, now) > 0.8
    best = (graph.matched(before, now, 10)[now] == before).mean()  # of all numberings
    assert (now == before).mean() > best - 0.05


def test_new_clusters_that_the_guard_refuses_leave_the_tuned_head(run, monkeypatch):
    own = train(run, replace(TUNE, guard_steps=0))
    shutil.rmtree(run / "spice_tune")
    monkeypatch.setattr(Guard, "changed", lambda *_: "a test")  # without looks in between, only new clusters are judged
    assert_same_bits(train(run, replace(TUNE, guard_steps=0, regroup=True)), own)
    assert summary(run)["why"].endswith("are not taken: a test")


def guard(labels: list[int], before: list[int]) -> Guard:
    return Guard(SMALL, limits_of(TUNE), torch.tensor(labels), torch.tensor(before))


def test_the_guard_sees_what_goes_wrong():
    before = [0] * 20 + [1] * 20 + [2] * 4
    labels = before[:30] + [UNRELIABLE] * 14
    everything = torch.arange(44)
    one = guard(labels, before)
    assert one.changed(everything, torch.tensor(before)) == ""
    assert one.changed(everything, torch.tensor([0] * 20 + [1] * 24)) == "", "too few to tell"
    assert "cluster 1 has shrunk from 20 to 3" in one.changed(everything, torch.tensor([0] * 37 + [1] * 3 + [2] * 4))
    swapped = torch.tensor([1] * 20 + [0] * 20 + [2] * 4)
    assert "0% of the reliable labels are predicted, 100% were" in one.changed(everything, swapped)
    rising, nan = "the loss has risen from 1 to 1.6", "the loss is not finite"
    for losses, expected in (
        ([1.0] * 5 + [1.4] * 5, [""] * 10),
        ([1.0] * 5 + [1.6] * 5, [""] * 9 + [rising]),
        ([1.0] * 5 + [1.4] * 5 + [1.6] * 5, [""] * 14 + [rising]),
        ([1.0] * 2 + [math.nan] * 3, [""] * 4 + [nan]),
        ([1.0] * 6 + [math.nan] * 4, [""] * 9 + [nan]),
    ):
        one = guard(labels, before)
        predicted = torch.tensor(before).__getitem__
        said = [one.see(torch.tensor(loss), step, False, predicted) for step, loss in enumerate(losses, 1)]
        assert said == expected
    for losses, expected in (([1.0] * 3, ""), ([1.0] * 2 + [math.nan], nan), ([1.0] * 5 + [1.6] * 2, rising)):
        one, last = guard(labels, before), None
        for step, loss in enumerate(losses, 1):
            last = one.see(torch.tensor(loss), step, step == len(losses), torch.tensor(before).__getitem__)
        assert last == expected, "the end of an attempt is looked at, whenever it is"
    one.go_back(10)
    assert (one.begun, one.retried) == (10, 1)


def test_soft_labels_are_those_of_the_formula(small_run):
    torch.manual_seed(0)
    features = F.normalize(torch.randn(12, 32), dim=1)
    head = stage2_network(SMALL, small_run).head
    labels = torch.full((12,), UNRELIABLE)
    labels[:4] = torch.tensor([3, 1, 1, 7])
    found = soft_labels(head, features, labels, replace(TUNE, neighbors=3))
    logits = head(features)[0].detach()
    temperature = spice_tune.best_temperature(logits[:4], labels[:4])
    own = torch.stack(
        [F.one_hot(labels[i], 10).float() if i < 4 else (logits[i] / temperature).softmax(0) for i in range(12)]
    )
    similar = features @ features.T - 9 * torch.eye(12)
    expected = own
    for _ in range(3):
        expected = torch.stack([own[i] / 2 + expected[similar[i].topk(3).indices].mean(0) / 2 for i in range(12)])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(12))
    alone = soft_labels(head, features, labels, replace(TUNE, neighbors=0))
    torch.testing.assert_close(alone, own)


def test_every_cluster_is_among_the_images_that_fit_the_memory():
    labels = np.full(1000, UNRELIABLE)
    labels[[5, 700]] = 4
    labels[100:400] = 2
    found = chosen_images(labels, SMALL, replace(TUNE, images=100), 1)
    assert len(found) == len(np.unique(found)) == 100
    assert (np.diff(found) > 0).all()
    assert {5, 700} <= set(found.tolist())
    assert len(chosen_images(labels, SMALL, replace(TUNE, memory=3 * 64 * 50), 64)) == 50
    assert np.array_equal(chosen_images(labels, SMALL, TUNE, 1), np.arange(1000))


def test_clusters_are_drawn_alike():
    teachers = [torch.tensor([7]), torch.arange(10, 40)]
    drawn = [draw(0, step, teachers, 50, 16, 8, 2) for step in range(200)]
    taught = torch.cat([rows for _, rows, _ in drawn])
    assert (taught == 7).float().mean() == pytest.approx(0.5, abs=0.03)
    assert set(taught.tolist()) == {7, *range(10, 40)}
    assert {view for view, _, _ in drawn} == {0, 1}
    assert torch.cat([rows for _, _, rows in drawn]).unique().tolist() == list(range(50))


def test_progress_is_told_while_views_are_encoded(run):
    told: list[tuple] = []
    worker = LocalWorker(run, "spice_tune", CPU, progress=lambda *args: told.append(args))
    spice_tune.train(SMALL, TUNE, worker)
    encoded = [args for args in told if args[2] is None]
    assert encoded[0][:2] == (32, 200)
    assert encoded[-1][:2] == (200, 200)


def test_what_cannot_be_tuned_keeps_the_result_of_stage_two(run, capsys, monkeypatch):
    def refuse(*args):
        raise UserError("the last blocks of a Thing cannot be tuned")

    before = stage2_network(SMALL, run).state_dict()
    monkeypatch.setattr(spice_tune, "split", refuse)
    assert_same_bits(train(run), before)
    assert summary(run) == {"kept": "stage2", "why": "the last blocks of a Thing cannot be tuned"}
    assert "of a Thing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "spice_tune.epochs is 0"),
        ({"lr": float("nan")}, "spice_tune.lr"),
        ({"ema": 1.5}, "spice_tune.ema is 1.5; it must be between 0 and 1"),
        ({"retries": -1}, "spice_tune.retries is -1"),
        ({"images": 10}, "10 clusters need 20"),
    ],
)
def test_settings_that_cannot_train_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        spice_tune.check(override(SMALL, {}), replace(TUNE, **changes))
