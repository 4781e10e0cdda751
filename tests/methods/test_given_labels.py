"""Baselines that learn from true labels: from those given and no others, the same loop, and plainly named."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spice_dist import cli, losses
from spice_dist.assignments import read_assignments
from spice_dist.config import Config, override
from spice_dist.data.sources import open_source
from spice_dist.distributed.worker import LocalWorker
from spice_dist.errors import UserError
from spice_dist.launching import Launch
from spice_dist.methods import given_labels
from spice_dist.methods.given_labels import GivenLabelsConfig, draw
from spice_dist.pipeline import fit
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.recipes import recipe
from spice_dist.report.reading import load
from spice_dist.report.table import format_scores
from tests.folders import unrecorded
from tests.methods.conftest import CPU, SMALL, TRAIN
from tests.methods.test_methods import assert_same_bits, weights
from tests.methods.workers import on_workers
from tests.test_parts import parts

FIXMATCH = override(SMALL, {"method": "fixmatch", "pretext": "none", "given_labels.per_class": 3})
SUPERVISED = override(FIXMATCH, {"method": "supervised", "spice_semi.ratio": 0})


@pytest.fixture
def data(digits_folder: Path, tmp_path: Path) -> Path:
    """A run folder that has only its data."""
    shutil.copytree(digits_folder / "data", tmp_path / "run/data")
    return tmp_path / "run"


def give(config: Config, run: Path) -> np.ndarray:
    given_labels.give(config, config.given_labels, LocalWorker(run, "given_labels", CPU))
    return np.load(run / "given_labels/labels.npy")


def train(config: Config, run: Path) -> dict[str, torch.Tensor]:
    TRAIN["spice_semi"](config, LocalWorker(run, "spice_semi", CPU))
    return weights(run, "spice_semi")


# ---------------------------------------------------------------- which labels are given


def test_n_of_each_class_are_given_as_the_seed_says_and_they_are_true(data):
    true = np.load(data / "data/labels.npy")
    given = give(FIXMATCH, data)
    known = given != UNRELIABLE
    assert np.bincount(given[known]).tolist() == [3] * 10
    assert np.array_equal(given[known], true[known])
    assert np.array_equal(give(FIXMATCH, data), given)
    assert not np.array_equal(give(override(FIXMATCH, {"seed": 1}), data), given)


def test_classes_of_any_numbers_become_those_of_the_clusters():
    labels = np.array([7, 7, -1, 30, 30, 7])
    given = draw(override(FIXMATCH, {"clusters": 2}), GivenLabelsConfig(2), labels, 5, 1)
    assert given.tolist() == [0, 0, UNRELIABLE, 1, 1]
    assert draw(override(FIXMATCH, {"clusters": 2}), GivenLabelsConfig(0), labels, 6, 1).tolist()[-1] == 0


@pytest.mark.parametrize("config", [FIXMATCH, SUPERVISED], ids=["fixmatch", "supervised"])
def test_labels_that_are_not_given_teach_nothing(data, config):
    """Unknown before the draw, or wrong after it: the same weights to the bit. A wrong label that is given does."""
    path = unrecorded(data) / "data/labels.npy"
    true = np.load(path)
    given = give(config, data)
    clean = train(config, data)
    unknown = np.where(given == UNRELIABLE, -1, true)
    unknown[np.flatnonzero(given == UNRELIABLE)[-1]] = 0  # one must be left to score
    np.save(path, unknown)
    assert np.array_equal(give(config, data), given)
    np.save(path, np.where(given == UNRELIABLE, (true + 1) % 10, true))
    shutil.rmtree(data / "spice_semi")
    assert_same_bits(train(config, data), clean)

    np.save(data / "given_labels/labels.npy", np.where(given == UNRELIABLE, given, (given + 1) % 10))
    shutil.rmtree(data / "spice_semi")
    with pytest.raises(AssertionError):
        assert_same_bits(train(config, data), clean)


# ---------------------------------------------------------------- the loop without other images


def test_without_other_images_two_workers_equal_one_and_views_that_are_not_there_do_not_matter(data):
    give(SUPERVISED, data)
    one = train(SUPERVISED, data)
    lines = [json.loads(line) for line in (data / "spice_semi/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["loss"] == line["supervised_loss"] > 0
        assert line["confident_fraction"] == 0
        assert 0 < line["clusters_predicted"] <= 1
        assert 0 <= line["ema_disagreement"] <= 1
    shutil.rmtree(data / "spice_semi")
    on_workers(2, SUPERVISED, data, "spice_semi")
    assert_same_bits(weights(data, "spice_semi"), one)
    shutil.rmtree(data / "spice_semi")
    other_views = {"spice_semi.strong.rotate": 90.0, "spice_semi.threshold": 0.1}
    assert_same_bits(train(override(SUPERVISED, other_views), data), one)


def test_consistency_of_no_images_is_nothing_and_of_some_their_mean():
    assert [part.item() for part in losses.consistency(torch.zeros(0, 3), torch.zeros(0, 3), 0.5)] == [0, 0]
    weak, strong = torch.tensor([[9.0, 0, 0], [0, 0, 0]]), torch.tensor([[0.0, 0, 0], [5, 0, 0]])
    loss, passed = losses.consistency(weak, strong, 0.9)
    assert loss.item() == pytest.approx(np.log(3) / 2)
    assert passed.item() == 0.5


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("config", [FIXMATCH, SUPERVISED], ids=["fixmatch", "supervised"])
def test_a_run_says_that_it_used_labels_and_scores_other_images(tmp_path, config):
    source = replace(parts(), extra=0, held_out=0, labels=open_source("digits").labels[:200])  # pyright: ignore[reportOptionalSubscript]
    run = tmp_path / "run"
    found = fit(override(config, {"data.loader": "torch"}), source, run, Launch(workers=0))
    assert found["uses_labels"] is True
    assert found["given_labels"] | {"accuracy": 0} == {"count": 30, "scored": 170, "accuracy": 0}
    assert set(found["seconds"]) == {"data", "given_labels", "spice_semi"}
    given = np.load(run / "given_labels/labels.npy") != UNRELIABLE
    assigned = read_assignments(run / "assignments.csv")[0]
    assert source.labels is not None
    right = (assigned == source.labels)[~given].mean()
    assert found["given_labels"]["accuracy"] == pytest.approx(right)
    assert found["eval"]["acc"] >= right, "ACC matches clusters to classes, which cannot lower it"
    for text in (format_scores(run), (run / "report.html").read_text()):
        assert "This run USED TRUE LABELS: it learned from 30 of them" in text
        assert "the 170 images whose labels were not given" in text
    assert list(load(run).scores)[1].endswith("(30 labels)")
    assert cli.main(["predict", str(run), "digits", "--out", str(tmp_path / "out.csv")]) == 0
    with open(tmp_path / "out.csv") as file:
        assert [int(row["cluster"]) for row in csv.DictReader(file)][:200] == assigned.tolist()

    other = replace(source, labels=np.roll(source.labels, 1))
    with pytest.raises(UserError, match="labels was"):
        fit(override(config, {"data.loader": "torch"}), other, run, Launch(workers=0))


def test_with_a_test_part_all_labels_may_be_given(tmp_path):
    """The held-out images alone are scored; extra ones without labels train FixMatch and nothing supervised."""
    config = override(SUPERVISED, {"data.loader": "torch", "given_labels.per_class": 0})
    found = fit(config, parts(), tmp_path / "run", Launch(workers=0))
    assert (found["given_labels"]["count"], found["given_labels"]["scored"]) == (130, 30)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"given_labels.per_class": 30}, "smallest class has"),
        ({"given_labels.per_class": 0}, "no image be left to score"),
        ({"given_labels.per_class": -1}, "give 1 or more"),
        ({"clusters": 9}, "name 10 classes"),
        ({"pretext": "moco"}, "has no stage 1"),
        ({"spice_semi.init": "stage2"}, "no stage 2 to go on from"),
        ({"spice_semi.refresh_steps": 5}, "give 0"),
        ({"spice_semi.ratio": 0}, "use supervised"),
        ({"spice_semi.ratio": -1}, "0 for labelled images alone"),
        ({"method": "supervised"}, "0 images beside the given ones"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_in_one_line_before_anything_runs(tmp_path, changes, words):
    source = replace(parts(), extra=0, held_out=0, labels=open_source("digits").labels[:200])  # pyright: ignore[reportOptionalSubscript]
    with pytest.raises(UserError, match=words) as caught:
        fit(override(FIXMATCH, changes), source, tmp_path / "run", Launch(workers=0))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["fixmatch", "supervised"])
def test_data_without_labels_is_one_line_that_says_how_to_give_them(tmp_path, capsys, method):
    np.save(tmp_path / "images.npy", np.zeros((40, 8, 8), np.uint8))
    given = ["--clusters", "2", "--method", method, "--out", str(tmp_path / "run")]
    assert cli.main(["fit", str(tmp_path / "images.npy"), *given]) == 1
    error = capsys.readouterr().err
    assert "--labels folder" in error
    assert error.count("\n") == 1


def test_help_and_dry_run_name_what_they_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    assert "USE TRUE LABELS" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["fit", "digits", "--method", "supervised", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["spice_semi", "together"]


def test_a_recipe_for_them_is_that_of_stage_3_from_scratch():
    spice = recipe("cifar10", 60_000).spice_semi
    assert recipe("cifar10", 60_000, "fixmatch").spice_semi == spice
    assert recipe("cifar10", 60_000, "supervised").spice_semi == replace(spice, ratio=0)
    assert recipe("photos", 1000, "fixmatch").spice_semi.init == "scratch"
