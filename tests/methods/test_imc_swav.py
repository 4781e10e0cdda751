"""IMC-SwAV against a float64 reference written from the formulas, and what its options promise."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spice_dist import cli, model_folder
from spice_dist.config import Config, override
from spice_dist.data.ingest import ingest
from spice_dist.data.loaders import open_images
from spice_dist.data.order import epoch_order
from spice_dist.data.sources import open_source
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import Interrupted, UserError
from spice_dist.launching import Launch
from spice_dist.methods import imc_swav
from spice_dist.methods.imc_swav import EveryClassifier, SwavNet
from spice_dist.methods.known_images import Bank, known_images
from spice_dist.methods.plumbing import finished, load_backbone, new_backbone, view_lists
from spice_dist.models.backbone import Backbone, check_crop
from spice_dist.models.heads import ClassifierNet, Classifiers
from spice_dist.pipeline import fit
from spice_dist.recipes import RECIPES, recipe
from spice_dist.task import check_task
from tests.methods.conftest import CPU, SMALL, TRAIN
from tests.methods.test_methods import assert_same_bits, weights
from tests.methods.workers import on_workers

STAGE = "imc_swav"


def train(config: Config, run: Path, **options) -> dict[str, Tensor]:
    TRAIN[STAGE](config, LocalWorker(run, STAGE, CPU, **options))
    return weights(run, STAGE)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / STAGE / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def few_clustered(tmp_path: Path) -> Path:
    """A run folder with 200 digits, of which the last 80 only train the features."""
    source = open_source("digits")
    assert source.labels is not None
    few = replace(source, paths=source.paths[:200], labels=source.labels[:200], extra=80)
    ingest(few, tmp_path / "bank" / "data", size=8)
    return tmp_path / "bank"


def by_group(net: nn.Module, view: Tensor) -> list[Tensor]:
    """What a network makes of a view, each half normalised by itself."""
    found = [net(part) for part in view.chunk(2)]
    if isinstance(found[0], Tensor):
        return [torch.cat(found, dim=-2)]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def sinkhorn(scores: Tensor) -> Tensor:
    q = torch.exp(scores / 0.02)
    for _ in range(3):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / len(q)
    return q * len(q)


def test_five_steps_are_those_of_a_float64_reference(without_stage, smooth):
    """Losses and weights after Adam's steps, a warm-up with frozen prototypes, and a fall of the learning rate."""
    changes = {
        "imc_swav.local_views": 4,
        "imc_swav.epochs": 2,
        "imc_swav.milestones": (0.6,),
        "imc_swav.extra_clusters": (),
    }
    config = override(SMALL, {**changes, "imc_swav.classifiers": 1, "imc_swav.hinge": 0.05})
    own, run = config.imc_swav, without_stage(STAGE)
    train(config, run)
    saved = finished(run / STAGE)

    torch.manual_seed(0)
    net = SwavNet(new_backbone(config), own.dim, own.prototypes)
    heads = EveryClassifier(config, own, net.backbone.dim)
    first = {name: value.clone() for name, value in net.backbone.state_dict().items()}
    net.double().train()
    heads.double().train()
    parameters = [*net.parameters(), *heads.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p), [0]) for p in parameters]
    images = open_images(run / "data", device=CPU, size=8, channels=1)
    stream = view_lists(config, images, 200, 64, 2, own.views(config.data.size), 0, LocalWorker(run, "none", CPU))
    found = []
    for step, views in enumerate(stream):
        outputs = [by_group(net, view.double()) for view in views]
        scores = [out[2] for out in outputs]
        u = [(score.detach() / own.temperature).softmax(1) for score in scores]
        swav = torch.zeros((), dtype=torch.float64)
        for t, s in product(range(2), range(6)):
            if s != t:
                q, log_u = sinkhorn(scores[t].detach()), (scores[s] / own.temperature).log_softmax(1)
                swav = swav - (q * log_u).sum(1).mean() / 10
        logits = [by_group(heads[0], out[0].detach())[0][0] for out in outputs]
        mi = torch.zeros((), dtype=torch.float64)
        hinge = torch.zeros((), dtype=torch.float64)
        for t, s in product(range(6), range(6)):
            joint = logits[t].softmax(1).T @ u[s] / 64
            y = joint.sum(1)
            given = (joint * (joint / joint.sum(0)).log()).sum()
            mi = mi + (-given + own.balance * (y * y.log()).sum()) / 36
            hinge = hinge + (logits[t].abs() - own.hinge).clamp(min=0).sum(1).mean() / 36
        (swav + mi + own.hinge_weight * hinge).backward()
        found.append([swav.item(), mi.item(), hinge.item()])
        lr = own.lr * min(1, (step + 1) / own.warmup) * (own.decay if step / 6 >= 0.6 else 1)
        with torch.no_grad():
            for parameter, (mean, square, count) in zip(parameters, moments, strict=True):
                assert parameter.grad is not None
                if not (parameter is net.prototypes.weight and step < own.warmup):
                    count[0] += 1
                    gradient = parameter.grad + own.weight_decay * parameter
                    mean.lerp_(gradient, 1 - 0.8)
                    square.lerp_(gradient**2, 1 - 0.999)
                    down = (square / (1 - 0.999 ** count[0])).sqrt() + 1e-8
                    parameter -= lr * mean / (1 - 0.8 ** count[0]) / down
                parameter.grad = None
            net.prototypes.weight.copy_(nn.functional.normalize(net.prototypes.weight, dim=1))
    images.close()

    written = [[line[name] for name in ("swav", "mi", "hinge")] for line in log(run)]
    np.testing.assert_allclose(written[:3], found[:3], rtol=1e-4)
    np.testing.assert_allclose(written, found, rtol=2e-2)  # Adam enlarges what rounding makes of tiny gradients
    for name, value in saved.tensors("backbone").items():
        if "weight" in name:
            moved = (net.backbone.state_dict()[name] - first[name]).abs().mean()
            off = (value.double() - net.backbone.state_dict()[name]).abs().mean()
            assert off < 0.1 * moved, name
    torch.testing.assert_close(saved.tensors("prototypes")["weight"].norm(dim=1), torch.ones(24))


def test_classifiers_never_change_the_network(without_stage):
    """With other ones the backbone, the projection and the prototypes have the same bits."""
    run = without_stage(STAGE)
    one = train(SMALL, run)
    shutil.rmtree(run / STAGE)
    changes = {"classifiers": 3, "extra_clusters": (), "balance": 1.0, "hidden": 16}
    other = train(override(SMALL, {f"imc_swav.{name}": value for name, value in changes.items()}), run)
    shared = [name for name in one if name.split("/")[0] in ("backbone", "projection", "prototypes")]
    assert len(shared) > 50
    assert_same_bits({name: one[name] for name in shared}, {name: other[name] for name in shared})


def test_each_classifier_learns_as_if_it_were_alone():
    """Two of them at once have the outputs and the gradients of each by itself."""
    torch.manual_seed(0)
    both = Classifiers(2, 5, 8, 3).double().train()
    features = torch.randn(4, 6, 5, dtype=torch.float64)
    together = both(features)
    assert together.shape == (2, 4, 6, 3)
    together.square().sum().backward()
    for head in range(2):
        alone = both.select(head).double().train()
        logits = alone(features)
        torch.testing.assert_close(logits[0], together[head])
        logits.square().sum().backward()
        assert alone.hidden_weight.grad is not None
        assert both.hidden_weight.grad is not None
        torch.testing.assert_close(alone.hidden_weight.grad[0], both.hidden_weight.grad[head])
        assert alone.in_norm.weight.grad is not None
        assert both.in_norm.weight.grad is not None
        torch.testing.assert_close(alone.in_norm.weight.grad, both.in_norm.weight.grad[8 * head : 8 * head + 8])


def test_a_classifier_is_the_network_of_its_docstring():
    torch.manual_seed(0)
    ours = Classifiers(1, 5, 8, 3).double()
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()]
    torchs = nn.Sequential(*layers, nn.Linear(8, 3)).double()
    with torch.no_grad():
        linear = [layer for layer in torchs if isinstance(layer, nn.Linear)]
        for layer, weight in zip(linear, (ours.in_weight, ours.hidden_weight, ours.out_weight), strict=True):
            layer.weight.copy_(weight[0].T)
        linear[2].bias.copy_(ours.out_bias[0, 0])
    features = torch.randn(12, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.train()(features)[0], torchs.train()(features))


def test_the_lowest_loss_of_the_last_epoch_selects(small_run):
    """And `network` is the backbone with that classifier, on the features as they are."""
    classifiers, loss = imc_swav.trained_classifiers(small_run)
    assert loss.shape == (2,)
    last = [line["mi"] for line in log(small_run)[-3:]]
    assert loss.mean().item() == pytest.approx(np.mean(last), rel=1e-5)
    net = imc_swav.network(SMALL, small_run).eval()
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        expected = classifiers(net.backbone(images))[loss.argmin()]
        torch.testing.assert_close(net(images), expected)
    stage1 = load_backbone(replace(SMALL, pretext=STAGE), small_run)
    assert_same_bits(dict(net.backbone.state_dict()), dict(stage1.state_dict()))


def test_the_model_folder_holds_the_same_network(small_run, tmp_path):
    net = imc_swav.network(SMALL, small_run).eval()
    model_folder.save_model(net, SMALL, tmp_path)
    again, _ = model_folder.load_model(tmp_path, CPU)
    assert isinstance(again, ClassifierNet)
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(images), again(images))


def test_statistics_are_adapted_to_what_is_scored_and_weights_stay(small_run):
    net = imc_swav.network(SMALL, small_run)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = open_images(small_run / "data", device=CPU, size=8, channels=1)
    imc_swav.adapt_statistics(net, SMALL, SMALL.imc_swav, images, np.arange(200))
    after = net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "running" in name}
    assert not net.training
    images.close()


# ---------------------------------------------------------------- bank and queue


def test_the_bank_gives_batches_of_known_images_in_their_order():
    bank, worker = Bank(2, 6, 1), LocalWorker(Path(), "none", CPU)
    rows = torch.arange(40.0).reshape(1, 40, 1).expand(2, 40, 1)
    seen, full, before = [], [], 0
    for step in range(10):
        positions = np.array([0, 2, 3] if step % 2 else [1])
        batch = rows[:, 4 * step : 4 * step + 4]
        seen += batch[0, positions, 0].tolist()
        found = bank.push(batch, positions, before, worker)
        before += len(positions)
        if found is not None:
            assert torch.equal(found[0], found[1])
            full += found[0, :, 0].tolist()
    assert full == seen[:18]
    assert bank.push(rows[:, :4], np.array([], int), before, worker) is None


def test_known_images_are_counted_from_the_start_of_every_epoch(tmp_path):
    found = list(known_images(SMALL.seed, SMALL.imc_swav.epochs, SMALL.imc_swav.batch, 200, 120, 0))
    assert len(found) == 9
    for epoch in range(3):
        order, before = epoch_order(0, epoch, 200), 0
        for step in range(3):
            positions, counted = found[3 * epoch + step]
            assert (order[64 * step : 64 * step + 64][positions] < 120).all()
            assert counted == before
            before += len(positions)
    assert [
        counted for _, counted in known_images(SMALL.seed, SMALL.imc_swav.epochs, SMALL.imc_swav.batch, 200, 120, 4)
    ] == [counted for _, counted in found[4:]]


def test_only_images_that_are_clustered_teach_the_classifier(few_clustered):
    """120 of 200 images: a batch of 64 holds about 38 of them, so the first step of an epoch has too few."""
    trained = train(SMALL, few_clustered)
    lines = log(few_clustered)
    assert lines[0]["mi"] == 0
    assert lines[0]["entropy"] == 0
    assert lines[1]["mi"] < 0
    counted = [
        len(positions)
        for positions, _ in known_images(SMALL.seed, SMALL.imc_swav.epochs, SMALL.imc_swav.batch, 200, 120, 6)
    ]
    assert trained["classifiers/select_steps"] == sum(counted) // 64


@pytest.mark.slow
@pytest.mark.parametrize("option", ["bank", "queue"])
def test_with_bank_or_queue_two_workers_equal_one_and_a_resumed_run_an_uninterrupted_one(
    without_stage, few_clustered, option
):
    run = few_clustered if option == "bank" else without_stage(STAGE)
    config = override(SMALL, {"imc_swav.queue": 128, "imc_swav.queue_start": 0.5} if option == "queue" else {})
    whole = train(config, run)
    assert any(name.startswith(f"{option}/") for name in whole)
    shutil.rmtree(run / STAGE)
    on_workers(2, config, run, STAGE)
    assert_same_bits(weights(run, STAGE), whole)
    shutil.rmtree(run / STAGE)
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        train(config, run, stop_requested=lambda: next(calls) == 4)
    assert_same_bits(train(config, run), whole)


def test_two_workers_of_two_passes_equal_one_of_four_up_to_float_tolerance(without_stage):
    """Gradients of several passes meet those of another worker once, in the last pass.

    Adam turns rounding of tiny gradients into steps: after three, weights agree in all but a few entries.
    """
    config = override(SMALL, {"bn_groups": 4, "imc_swav.epochs": 1})
    run = without_stage(STAGE)
    one = train(config, run)
    losses = log(run)
    shutil.rmtree(run / STAGE)
    on_workers(2, config, run, STAGE)
    two = weights(run, STAGE)
    for ours, theirs in zip(losses, log(run), strict=True):
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-4)
    for name in one:
        if name.startswith("backbone/") and name.endswith("weight"):
            assert (one[name] - two[name]).abs().mean() < 1e-4


def test_the_queue_enters_sinkhorn_once_it_is_full_and_its_time_has_come(without_stage):
    run = without_stage(STAGE)
    without = log_of(SMALL, run)
    early = log_of(override(SMALL, {"imc_swav.queue": 128, "imc_swav.queue_start": 0.0}), run)
    late = log_of(override(SMALL, {"imc_swav.queue": 128, "imc_swav.queue_start": 1.5}), run)
    assert early[:2] == without[:2]
    assert early[2] != without[2]
    assert late[:5] == without[:5]
    assert late[5] != without[5]


def log_of(config: Config, run: Path) -> list[float]:
    shutil.rmtree(run / STAGE, ignore_errors=True)
    train(config, run)
    return [line["swav"] for line in log(run)]


def test_assignments_with_a_queue_are_sinkhorn_over_both():
    torch.manual_seed(0)
    net = SwavNet(new_backbone(SMALL), 4, 6).prototypes
    scores, keys = torch.randn(2, 8, 6).tanh(), nn.functional.normalize(torch.randn(2, 12, 4), dim=2)
    queue = imc_swav.Queue(12, 8)
    queue.push(keys.transpose(0, 1).flatten(1), 0)
    own = replace(SMALL.imc_swav, epsilon=0.02)
    worker = LocalWorker(Path(), "none", CPU)
    found = imc_swav.assignments(own, net, scores, torch.empty(2, 8, 4), queue, 2, worker)
    for t in range(2):
        with torch.no_grad():
            every = torch.cat([scores[t], net(keys[t])]).double()
        torch.testing.assert_close(found[t].double(), sinkhorn(every)[:8], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- the whole run


def test_a_run_clusters_predicts_and_is_evaluated_again_with_other_statistics(tmp_path):
    source = open_source("digits")
    assert source.labels is not None
    few = replace(source, paths=source.paths[:200], labels=source.labels[:200])
    config = replace(SMALL, method=STAGE, pretext=STAGE)
    run, launch = tmp_path / "run", Launch(workers=0, threads=1)
    metrics = fit(config, few, run, launch)
    assert set(metrics["seconds"]) == {"data", "imc_swav", "features"}
    assert len(metrics["heads"]) == 2
    assert metrics["select"]["select_loss"] == min(head["select_loss"] for head in metrics["heads"])
    assert "IMC-SwAV" in (run / "report.html").read_text()
    assert cli.main(["predict", str(run), "digits", "--out", str(tmp_path / "new.csv")]) == 0
    ours = (run / "assignments.csv").read_text().splitlines()[1:]
    again = (tmp_path / "new.csv").read_text().splitlines()[1:201]
    assert [row.split(",")[2] for row in ours] == [row.split(",")[2] for row in again]

    before = weights(run, STAGE)
    adapted = fit(override(config, {"imc_swav.eval_bn": "adapt_on_test"}), few, run, launch)
    assert adapted["eval_bn"] == "adapt_on_test"
    assert adapted["select"]["mean_confidence"] != metrics["select"]["mean_confidence"]
    for scored in (metrics, adapted):  # the selected head is the network's own
        assert min(scored["heads"], key=lambda head: head["select_loss"])["acc"] == scored["eval"]["acc"]
    assert_same_bits(weights(run, STAGE), before)
    with pytest.raises(UserError, match="imc_swav.lr was"):
        fit(override(config, {"imc_swav.lr": 0.1}), few, run, launch)

    spice = fit(replace(config, method="spice"), few, run, launch)  # goes on from the same features
    assert set(spice["seconds"]) == {"data", "imc_swav", "features", "spice_self", "reliable", "spice_semi"}
    assert_same_bits(weights(run, STAGE), before)
    assert "SPICE-Semi" in (run / "report.html").read_text()


def test_a_method_that_learns_its_own_features_takes_no_other_pretext():
    with pytest.raises(UserError, match='not by pretext "moco"'):
        check_task(replace(SMALL, method=STAGE))


@pytest.mark.parametrize("name", RECIPES)
def test_crops_of_every_recipe_leave_a_map_to_learn_from(name):
    config = recipe(name, method=STAGE)
    backbone = Backbone(config.backbone, config.data.channels, config.data.size)
    for view in config.imc_swav.views(config.data.size):
        check_crop(backbone, config.data.channels, view.size, config.data.size)


def test_crops_follow_the_image_and_one_of_a_single_position_is_refused():
    config = recipe("photos", method=STAGE)
    for size, sides in {32: (28, 18), 64: (56, 36), 96: (76, 52), 224: (196, 126)}.items():
        assert [view.size for view in config.imc_swav.views(size)] == [sides[0]] * 2 + [sides[1]] * 4
    backbone = Backbone(config.backbone, 3, 64)
    with pytest.raises(UserError, match="crop of 28 pixels has 1 position, that of the whole image of 64 pixels has 4"):
        check_crop(backbone, 3, 28, 64)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 201}, "more than the 200 images"),
        ({"batch": 65}, "multiple of bn_groups"),
        ({"lr": 0.0}, "imc_swav.lr is 0"),
        ({"warmup": -1}, "give 0 or more"),
        ({"prototypes": 1}, "give 2 or more"),
        ({"milestones": (1.5,)}, "between 0 and 1"),
        ({"betas": (0.9, 1.0)}, "less than 1"),
        ({"queue": 65}, "multiple of bn_groups"),
        ({"queue": 32}, "from the 64 images of a batch to 200"),
        ({"queue": 400}, "from the 64 images of a batch to 200"),
        ({"extra_clusters": (10,)}, "not 10, which is trained anyway"),
        ({"extra_clusters": (7, 7)}, "name each number of clusters once"),
        ({"extra_clusters": (1,)}, "from 2 to the 200 images"),
        ({"local_views": 0}, "local_views is 0"),
        ({"eval_bn": "test"}, "train_stats or adapt_on_test"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(changes, words):
    config = override(SMALL, {f"imc_swav.{name}": value for name, value in changes.items()})
    with pytest.raises(UserError, match=words) as caught:
        imc_swav.check(config, config.imc_swav, 200, 200)
    assert "\n" not in str(caught.value)


def test_a_bank_that_an_epoch_may_not_fill_is_refused():
    with pytest.raises(UserError, match="sure to hold of the 70 images"):
        imc_swav.check(SMALL, SMALL.imc_swav, 200, 70)
    imc_swav.check(SMALL, SMALL.imc_swav, 200, 72)


def test_crops_that_the_network_cannot_take_are_one_line(without_stage):
    config = override(SMALL, {"backbone.name": "vit_tiny_patch16_224", "backbone.stem": "native"})
    config = override(config, {"backbone.widths": (), "backbone.depths": (), "data.size": 8})
    with pytest.raises(UserError) as caught:
        train(config, without_stage(STAGE))
    assert "\n" not in str(caught.value)


def test_training_in_bfloat16_is_near_to_float32(small_run, without_stage):
    run = without_stage(STAGE)
    train(override(SMALL, {"precision": "bf16"}), run)
    low, high = log(run), log(small_run)
    assert low != high
    for ours, exact in zip(low[:3], high[:3], strict=True):
        assert ours["swav"] == pytest.approx(exact["swav"], rel=0.03)
