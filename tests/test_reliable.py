"""Which labels are reliable: both rules against loops and by hand, the floor, copies, advice, the score."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spice_dist import artifacts
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import UserError
from spice_dist.evaluate import reliable_accuracy
from spice_dist.methods import reliable
from spice_dist.methods.reliable import ReliableConfig, advice, distinct, others
from spice_dist.neighbors import nearest
from spice_dist.pseudo_labels import (
    UNRELIABLE,
    adaptive_depth,
    agreement_depth,
    balanced,
    raised_to_floor,
    reliable_images,
)
from spice_dist.recipes import RECIPES
from spice_dist.report.reading import Run, load
from spice_dist.report.sections import label_free
from spice_dist.task import Task
from tests.test_cli import TINY, run

CPU = torch.device("cpu")


def blobs(sizes: list[int], spread: float, dim: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors around one random center per cluster, and the cluster of each, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centers = F.normalize(torch.randn(len(sizes), dim, generator=generator), dim=1)
    noise = torch.randn(len(labels), dim, generator=generator)
    return F.normalize(centers[labels] + spread * noise, dim=1), labels


def noisy(labels: Tensor, clusters: int, share: float, seed: int = 1) -> Tensor:
    """The labels, that share of them replaced by random ones."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < share
    return torch.where(wrong, torch.randint(clusters, (len(labels),), generator=generator), labels)


# the adaptive rule


@pytest.mark.parametrize(("clusters", "share"), [(2, 0.1), (5, 0.4), (20, 0.0)])
def test_depth_and_k_are_the_loops_of_their_docstrings(clusters: int, share: float):
    features, labels = blobs([200 // clusters] * clusters, 0.4)
    labels = noisy(labels, clusters, share)
    largest = min(50, 200 // clusters)
    neighbors = others(nearest(features, largest + 1), range(200))
    depth = agreement_depth(labels, neighbors)
    for image in range(200):
        ranked = sorted((j for j in range(200) if j != image), key=lambda j: -float(features[image] @ features[j]))
        by_hand = 0
        while by_hand < largest and labels[ranked[by_hand]] == labels[image]:
            by_hand += 1
        assert depth[image] == by_hand
    k, passing = adaptive_depth(depth, largest)
    by_k = [sum(d >= candidate for d in depth.tolist()) for candidate in range(1, largest + 1)]
    assert passing.tolist() == by_k
    assert k == max(range(2, largest + 1), key=lambda candidate: (candidate * by_k[candidate - 1], candidate))


def test_a_single_neighbour_is_never_enough_where_there_are_two():
    depth = torch.tensor([1] * 9 + [2])
    assert adaptive_depth(depth, 5)[0] == 2, "1 x 10 is more than 2 x 1"


@pytest.mark.parametrize("largest", [0, 1])
def test_without_two_neighbours_k_is_one(largest: int):
    assert adaptive_depth(torch.zeros(3, dtype=torch.long), largest)[0] == 1


def test_where_nobody_agrees_no_image_passes():
    k, passing = adaptive_depth(torch.zeros(6, dtype=torch.long), 3)
    assert passing.tolist() == [0, 0, 0]
    assert k >= 2


def raised(labels: list[int], passed: list[int], score: list[float], confidence: list[float], fraction: float):
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[passed] = True
    kept = raised_to_floor(
        torch.tensor(labels), mask, torch.tensor(score), torch.tensor(confidence), max(labels) + 2, fraction
    )
    return kept.nonzero()[:, 0].tolist()


def test_the_floor_adds_the_best_agreeing_images_and_of_equal_ones_the_more_confident():
    labels, score = [0, 0, 0, 0, 1, 1, 1, 1], [9.0, 9.0, 1.0, 1.0, 2.0, 3.0, 3.0, 0.0]
    confidence = [1.0, 1.0, 1.0, 1.0, 1.0, 0.6, 0.7, 1.0]
    assert raised(labels, [0, 1], score, confidence, 0.25) == [0, 1, 6]
    assert raised(labels, [0, 1], score, confidence, 0.5) == [0, 1, 5, 6]
    assert raised(labels, [0, 1], score, confidence, 0.0) == [0, 1, 6], "at least one"
    assert raised(labels, [0, 1], score, confidence, 1.0) == list(range(8))


def test_the_floor_counts_what_has_passed_before_it_adds_any():
    assert raised([0, 0, 0, 0], [3], [5.0, 4.0, 3.0, 0.0], [1.0] * 4, 0.5) == [0, 3]


def test_the_floor_is_the_ceiling_of_the_share_despite_rounding():
    assert len(raised([0] * 30, [], [float(i) for i in range(30)], [1.0] * 30, 0.1)) == 3
    assert len(raised([0] * 31, [], [float(i) for i in range(31)], [1.0] * 31, 0.1)) == 4


# the official rule

TOY = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
AGREEMENT = torch.tensor([1.0, 0.96, 0.95, 0.94, 0.2, 1.0, 1.0, 0.9, 0.3, 0.97, 0.2, 0.1])
CONFIDENCE = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.99, 1.0, 1.0, 0.995, 1.0, 1.0])


def test_the_official_rule_by_hand():
    passed = reliable_images(AGREEMENT, CONFIDENCE, 0.95, 0.99)
    assert passed.nonzero()[:, 0].tolist() == [0, 1, 2, 5, 9], "0.95 is enough, a probability of 0.99 is not"
    kept = balanced(TOY, passed, 3, torch.arange(12))
    assert kept.nonzero()[:, 0].tolist() == [0, 5, 9]
    assert balanced(TOY, passed, 3, torch.arange(12).flip(0)).nonzero()[:, 0].tolist() == [2, 5, 9]


def test_the_papers_rule_is_strictly_above_lambda():
    passed = reliable_images(AGREEMENT, CONFIDENCE, 0.95 + 1 / 100, 0.0)
    assert passed.nonzero()[:, 0].tolist() == [0, 1, 5, 6, 9]


@pytest.mark.parametrize("count", [3, 7, 20, 100, 1000])
def test_a_ratio_is_compared_as_a_number_of_neighbours(count: int):
    agreement = torch.tensor([[True] * part + [False] * (count - part) for part in range(count + 1)]).float().mean(1)
    ones = torch.ones(count + 1)
    for part in range(1, count + 1):
        assert int(reliable_images(agreement, ones, part / count, 0.0).sum()) == count + 1 - part


def test_a_cluster_without_any_leaves_none_to_the_others():
    passed = reliable_images(AGREEMENT, CONFIDENCE, 0.95, 0.99)
    assert not balanced(TOY, passed, 4, torch.arange(12)).any()


def test_the_draw_for_balance_does_not_depend_on_what_the_clusters_are_called():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    passed = torch.rand(12, generator=torch.Generator().manual_seed(1)) < 0.8
    renamed = torch.tensor([2, 0, 1])[TOY]
    assert torch.equal(balanced(TOY, passed, 3, order), balanced(renamed, passed, 3, order))


# the stage


class Says:
    """In place of trained heads: the given labels, with the given probability, for the images in their order."""

    def __init__(self, features: Tensor, labels: Tensor, clusters: int, confidence: float):
        self.label_of = {row.numpy().tobytes(): label for row, label in zip(features, labels, strict=True)}
        self.logit = float(np.log(confidence * (clusters - 1) / (1 - confidence)))
        self.clusters = clusters

    def select(self, head: int) -> "Says":
        assert head == 0
        return self

    def to(self, device: torch.device) -> "Says":
        del device
        return self

    def __call__(self, features: Tensor) -> Tensor:
        labels = torch.stack([self.label_of[row.numpy().tobytes()] for row in features])
        return self.logit * F.one_hot(labels, self.clusters).float()[None]


@pytest.fixture
def selected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the stage leaves for these features and labels: (labels (N,), summary)."""

    def run(
        features: Tensor,
        labels: Tensor,
        clusters: int,
        config: ReliableConfig,
        confidence: float = 0.999,
        seed: int = 0,
    ) -> tuple[np.ndarray, dict]:
        stored = features.half()
        (tmp_path / "features").mkdir(exist_ok=True)
        np.save(tmp_path / "features/features.npy", stored.numpy())
        manifest = type("Manifest", (), {"n": len(labels), "clustered": len(labels)})
        monkeypatch.setattr(artifacts, "manifest", lambda _: manifest)
        says = Says(stored.float(), labels, clusters, confidence)
        monkeypatch.setattr(reliable, "load_heads", lambda *_: (says, torch.zeros(1)))
        task = Task(clusters=clusters, seed=seed)
        reliable.select(task, config, LocalWorker(tmp_path, "reliable", CPU))
        return np.load(tmp_path / "reliable/labels.npy"), json.loads((tmp_path / "reliable/summary.json").read_text())

    return run


OFFICIAL = ReliableConfig("official")


def test_the_adaptive_stage_is_the_loop_over_its_rule(selected):
    features, truth = blobs([60, 60, 60], 0.45)
    labels = noisy(truth, 3, 0.2)
    found, summary = selected(features, labels, 3, ReliableConfig(floor_fraction=0.0))
    similarity = features.half().float() @ features.half().float().T
    similarity.fill_diagonal_(-2)
    ranked = similarity.argsort(dim=1, descending=True)
    passes = {k: (labels[ranked[:, :k]] == labels[:, None]).all(1) for k in range(1, 51)}
    products = {k: k * int(passes[k].sum()) for k in range(2, 51)}
    best = max(products, key=lambda k: (products[k], k))
    assert summary["k"] == best
    assert summary["passing_at_k"] == [int(passes[k].sum()) for k in range(1, 51)]
    assert torch.equal(torch.from_numpy(found) != UNRELIABLE, passes[best])
    assert (found[passes[best]] == labels[passes[best]].numpy()).all()
    right = (found == truth.numpy())[found != UNRELIABLE].mean()
    assert right > float((labels == truth).float().mean()) + 0.05


@pytest.mark.parametrize("config", [ReliableConfig(), ReliableConfig("official", neighbors=20, ratio=0.7)])
def test_the_choice_does_not_depend_on_what_the_clusters_are_called(selected, config):
    features, labels = blobs([40, 40, 40, 40], 0.4)
    labels = noisy(labels, 4, 0.1)
    renamed = torch.tensor([3, 0, 2, 1])[labels]
    one, _ = selected(features, labels, 4, config)
    other, _ = selected(features, renamed, 4, config)
    assert 0 < (one != UNRELIABLE).sum() < 160
    assert np.array_equal(one != UNRELIABLE, other != UNRELIABLE)


def test_a_cluster_of_three_among_hundreds_lives(selected, capsys):
    features, labels = blobs([100, 100, 100, 3], 0.05)
    found, summary = selected(features, labels, 4, ReliableConfig())
    assert summary["per_cluster"] == [100, 100, 100, 1]
    assert (summary["count"], summary["passed"], summary["added_to_reach_floor"]) == (301, 300, 1)
    assert labels[found == 3].tolist() == [3]
    assert summary["advice"] == (
        "300 of 303 labels (99%) from 3 of 4 clusters are reliable by agreement; of 1 more only the best-agreeing "
        "images are kept. To have more, ask for fewer clusters."
    )
    assert summary["advice"] in capsys.readouterr().err


def test_the_official_rule_says_which_cluster_left_it_empty(selected, capsys):
    features, labels = blobs([100, 100, 100, 3], 0.05)
    found, summary = selected(features, labels, 4, replace(OFFICIAL, neighbors=50))
    assert (found == UNRELIABLE).all()
    assert re.search(r"300 pass, none of cluster 3, .*reliable\.rule=adaptive", summary["advice"])
    assert capsys.readouterr().err == summary["advice"] + "\n"
    assert (summary["count"], summary["passed"], summary["dropped_for_balance"]) == (0, 300, 300)
    found, _ = selected(features, labels, 4, replace(OFFICIAL, neighbors=50, balance=False))
    assert (found != UNRELIABLE).sum() == 300


def test_the_official_rule_balances_by_a_draw_from_the_seed(selected):
    features, labels = blobs([90, 60, 30], 0.05)
    config = ReliableConfig("official", neighbors=20)
    one, summary = selected(features, labels, 3, config)
    assert summary["per_cluster"] == [30, 30, 30]
    assert np.array_equal(selected(features, labels, 3, config)[0], one)
    other, _ = selected(features, labels, 3, config, seed=1)
    assert not np.array_equal(other, one)


def test_labels_of_too_little_probability_leave_the_official_set_empty(selected):
    features, labels = blobs([50, 50], 0.1)
    found, summary = selected(features, labels, 2, OFFICIAL, confidence=0.98)
    assert (found == UNRELIABLE).all()
    assert "nowhere do 95% of 50 neighbours agree with a label of probability above 0.99" in summary["advice"]


def test_a_run_without_reliable_labels_ends_with_the_result_of_stage_2(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("fit", "digits", "--out", out, *TINY, "--set", "reliable.rule=official") == 0
    assert "no label is reliable" in (line := capsys.readouterr()).err
    assert "stage 3 cannot start, and the result is that of stage 2" in line.out
    assert "stage 3 cannot start" in (out / "report.html").read_text()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["reliable"]["count"] == 0
    chosen = min(metrics["heads"], key=lambda head: head["select_loss"])
    assert metrics["eval"]["acc"] == chosen["acc"]
    assert load(out).scores["SPICE"] is None
    assert run("predict", out, "digits", "--out", tmp_path / "new.csv") == 0
    assignments = (out / "assignments.csv").read_bytes()
    (out / "assignments.csv").unlink()
    assert run("fit", "digits", "--out", out, *TINY, "--set", "reliable.rule=official") == 0
    assert (out / "assignments.csv").read_bytes() == assignments


def test_all_labels_equal(selected):
    features, _ = blobs([20, 20], 0.5)
    found, summary = selected(features, torch.zeros(40, dtype=torch.long), 2, ReliableConfig())
    assert (found == 0).all()
    assert summary["k"] == 20
    assert "from 1 of 2 clusters" in summary["advice"]
    assert "1 is empty" in summary["advice"]


def test_two_images(selected):
    features = torch.eye(2)
    for labels, k in ((torch.tensor([0, 1]), 1), (torch.tensor([0, 0]), 1)):
        found, summary = selected(features, labels, 2, ReliableConfig())
        assert found.tolist() == labels.tolist()
        assert summary["k"] == k


def test_a_thousand_clusters_of_four_images_each_keep_a_label(selected):
    features, labels = blobs([4] * 1000, 0.1, dim=64)
    labels = noisy(labels, 1000, 0.3)
    found, summary = selected(features, labels, 1000, ReliableConfig())
    assert summary["k"] <= 4
    sizes = torch.bincount(labels, minlength=1000).numpy()
    kept = np.bincount(found[found != UNRELIABLE], minlength=1000)
    assert (kept[sizes > 0] > 0).all()


def test_fewer_images_than_clusters(selected):
    features, labels = blobs([1] * 5, 0.1)
    found, _ = selected(features, labels, 9, ReliableConfig())
    assert np.array_equal(found, labels.numpy()), "each is the best of its cluster"


# copies


def test_copies_do_not_vouch_for_each_other(selected):
    """Ten copies with a label of their own, in the middle of a cluster of another: alone they have no support."""
    features, labels = blobs([60, 60], 0.2)
    inside = features[labels == 0].mean(0)
    copies = F.normalize(inside, dim=0).expand(10, -1)
    features, labels = torch.cat([features, copies]), torch.cat([labels, torch.full((10,), 1)])
    found, summary = selected(features, labels, 2, ReliableConfig())
    assert summary["copies"] == 9
    assert (found[-10:] == UNRELIABLE).all()
    counting_them = others(nearest(features, 10), range(len(features)))
    assert (agreement_depth(labels, counting_them)[-10:] == 9).all(), "they would have passed at k = 9"


def test_copies_are_reliable_all_or_none(selected):
    features, labels = blobs([30, 30], 0.2)
    features, labels = torch.cat([features, features[:7]]), torch.cat([labels, labels[:7]])
    found, _ = selected(features, labels, 2, ReliableConfig())
    assert np.array_equal(found[:7], found[60:])


def test_images_that_are_all_the_same_keep_a_label_by_the_floor(selected):
    found, summary = selected(torch.ones(6, 4) / 2, torch.zeros(6, dtype=torch.long), 2, ReliableConfig())
    assert (found == 0).all()
    assert summary["passed"] == 0


def test_an_index_finds_the_same_reliable_images(selected):
    features, truth = blobs([60, 60, 60], 0.45)
    labels = noisy(truth, 3, 0.2)
    exact, _ = selected(features, labels, 3, ReliableConfig())
    found, _ = selected(features, labels, 3, ReliableConfig(search="index"))  # so few images: every list is visited
    assert np.array_equal(found, exact)


def test_distinct_names_the_first_image_of_each_kind():
    rows = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4]], np.float16)
    first, copy_of = distinct(rows)
    assert first.tolist() == [0, 1, 3]
    assert copy_of.tolist() == [0, 1, 0, 2, 1]
    assert np.array_equal(rows[first][copy_of], rows)


def test_the_image_itself_is_left_out_by_its_number_not_by_its_place():
    neighbors = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 0, 3], [3, 0, 2]])  # the third was pushed out by rounding
    assert others(neighbors, range(4)).tolist() == [[1, 2], [2, 0], [1, 0], [0, 2]]
    assert others(neighbors[1:], range(1, 4)).tolist() == [[2, 0], [1, 0], [0, 2]]


# settings and words


def test_an_index_without_faiss_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(reliable, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        reliable.check(ReliableConfig(search="index"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ReliableConfig("paper"), 'reliable.rule is "paper"; it can be adaptive, official'),
        (ReliableConfig(max_neighbors=1), "reliable.max_neighbors is 1; it must be at least 2"),
        (ReliableConfig(search="ivf"), 'reliable.search is "ivf"; it can be exact, index'),
        (ReliableConfig(floor_fraction=1.5), "reliable.floor_fraction is 1.5; it must be between 0 and 1"),
        (ReliableConfig(ratio=95), "reliable.ratio is 95; it must be between 0 and 1"),
        (ReliableConfig(min_confidence=float("nan")), "reliable.min_confidence is nan"),
    ],
)
def test_settings_that_cannot_select_are_refused_in_one_line(config: ReliableConfig, message: str):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        reliable.check(config)


def test_published_recipes_select_as_published_and_ours_adapt():
    ours = {"digits", "photos", "fashion_mnist", "cifar10_short", "cifar100", "tiny_imagenet"}
    for name, recipe in RECIPES.items():
        config = recipe(1000).reliable
        reliable.check(config)
        assert (config.rule == "adaptive") == (name in ours), name
        if name not in ours:
            assert (config.neighbors, config.min_confidence, config.balance) == (100, 0.99, True)


def summary_of(passed: list[int], kept: list[int], sizes: list[int], rule: str = "adaptive") -> dict:
    return {
        "rule": rule,
        "settings": {},
        "images": sum(sizes),
        "count": sum(kept),
        "passed": sum(passed),
        "clusters": sum(count > 0 for count in kept),
        "clusters_that_passed": sum(count > 0 for count in passed),
        "cluster_sizes": sizes,
    }


def test_no_advice_where_all_is_well():
    assert advice(summary_of([30, 40], [30, 40], [100, 100])) == ""


def test_advice_where_few_labels_are_reliable():
    found = advice(summary_of([100, 212, 0], [100, 212, 40], [2000, 2600, 2400]))
    assert found == (
        "only 312 of 7,000 labels (4%) from 2 of 3 clusters are reliable by agreement; of 1 more only the "
        "best-agreeing images are kept. To have more, train stage 1 longer, as the features may be too weak, or ask "
        "for fewer clusters."
    )
    assert "use --set reliable.rule=adaptive" in advice(summary_of([1, 1], [1, 1], [100, 100], "official"))


def test_the_report_shows_the_advice():
    metrics = {"reliable": {"count": 2, "fraction": 0.5, "acc": None, "advice": "only <2> of 4"}}
    empty: dict = {}
    run = Run(
        *(Path("none"), empty, metrics, 2, np.array([0, 1, 1, 0]), np.ones(4), np.array([True, True, False, False])),
        *(None, {}, {}, {}, {}, [], 0),
    )
    rows = {name: (value, explained) for name, value, explained in label_free(run)}
    assert rows["reliable images"][0] == "2"
    assert rows["reliable images"][1].endswith("Advice: only <2> of 4")
    metrics["reliable"]["advice"] = ""
    assert "Advice" not in str(label_free(run))


# the score


def test_the_accuracy_of_reliable_labels_uses_the_matching_of_all_images():
    y_true = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assigned = np.array([5, 5, 5, 6, 6, 6, 6, 5])  # 5 is class 0, 6 is class 1, 6 of 8 are right
    reliable = np.array([-100, -100, -100, 6, -100, -100, -100, 5])
    assert reliable_accuracy(y_true, assigned, reliable) == 0.0
    assert reliable_accuracy(y_true, reliable, reliable) == 1.0, "matched over the reliable images alone"


def test_reliable_labels_without_any_have_no_accuracy():
    assert reliable_accuracy(np.zeros(3, int), np.zeros(3, int), np.full(3, UNRELIABLE)) is None


def test_a_reliable_label_of_a_cluster_without_a_class_is_wrong():
    y_true, assigned = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 2, 1, 1, 1])
    assert reliable_accuracy(y_true, assigned, assigned) == pytest.approx(5 / 6)
