"""Files of a run that are damaged, lost or of an earlier version, and a loss that is no number: see chaos/damage.py."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spice_dist import cli
from spice_dist.data import checksums
from spice_dist.errors import DamagedFile, UserError
from spice_dist.model_folder import load_model, save_model
from tests.chaos.damage import SETTINGS, Case, call, cases, make_run, outcome, results
from tests.folders import unrecorded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run of 200 digits beside its images: read only."""
    return make_run(tmp_path_factory.mktemp("damage"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def last(whole: Path, stage: str) -> str:
    return max((whole / stage / "checkpoints").glob("[0-9]*")).relative_to(whole).as_posix()


AGAIN = [
    ("features/features.npy", "flip 1"),
    ("data/labels.npy", "deleted"),
    ("moco", "backbone.safetensors"),
    ("model/model.safetensors", "deleted"),
    ("checksums.json", "flip 1"),
    ("checksums.json", "deleted"),
]


@pytest.mark.parametrize(("file", "damage"), AGAIN)
def test_what_fit_can_make_again_is_made_again_with_a_line_and_comes_out_the_same(whole, file, damage):
    if damage.endswith(".safetensors"):
        file, damage = f"{last(whole, file)}/{damage}", "flip 1"
    name, printed = outcome(Case(file, damage, "fit"), whole)
    assert name == "made again", printed


TOLD = [
    ("features/features.npy", "report"),
    ("data/paths.jsonl", "export"),
    ("data/quarantine.csv", "report"),
    ("assignments.csv", "report"),
    ("metrics.json", "evaluate"),
    ("model/model.safetensors", "predict"),
    ("model/model.json", "predict"),
    ("moco/stage.json", "fit"),
]


@pytest.mark.parametrize(("file", "command"), TOLD)
def test_what_cannot_be_made_again_is_one_line(whole, file, command):
    name, printed = outcome(Case(file, "flip 3", command), whole)
    assert name == "one line", printed
    assert Path(file).name in printed.splitlines()[-1]


def scale_a_weight(run: Path) -> None:
    """Change the exponent of one weight of the model's head."""
    path = run / "model/model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.startswith("head.") and weights[name].ndim > 1)
    weights[name].view(-1)[0] *= 2.0**60
    save_file(weights, path)


def test_without_the_recorded_digests_a_changed_model_would_predict_otherwise(whole, run, monkeypatch):
    assert call("predict", whole.parent, run)[0] == 0
    before = results("predict", run)
    scale_a_weight(run)
    code, said = call("predict", whole.parent, run)
    assert (code, said.count("\n")) == (1, 1)
    assert "model.safetensors is damaged: its SHA-256 is not the one recorded" in said
    monkeypatch.setattr(checksums, "require_digest", lambda path, expected: None)
    assert call("predict", whole.parent, run)[0] == 0
    assert results("predict", run) != before


def test_a_file_is_compared_again_when_it_has_changed(run):
    path = checksums.require_whole(run / "features/features.npy")
    features = np.load(path)
    features[0, 0] *= 2
    np.save(path, features)
    with pytest.raises(DamagedFile, match="features.npy is damaged"):
        checksums.require_whole(path)


@pytest.mark.slow
def test_a_stage_that_comes_out_otherwise_takes_those_after_it_along(whole, run):
    """Its record names another result than it has on this machine: what later stages learned from is not known."""
    path = run / "features/stage.json"
    record = checksums.read_sealed(path)
    record["sha256"] = {name: "0" * 64 for name in record["sha256"]}
    checksums.publish_sealed(path, record)
    code, said = call("fit", whole.parent, run)
    assert code == 0
    assert "features has come out otherwise than before: spice_self, reliable, spice_semi are made again" in said
    assert results("fit", run) == results("fit", whole)


@pytest.mark.parametrize("command", ["fit", "predict", "evaluate"])
def test_a_folder_of_an_earlier_version_opens_as_it_is(whole, run, command):
    assert call(command, whole.parent, run)[0] == 0
    before = results(command, run)
    code, said = call(command, whole.parent, unrecorded(run))
    assert code == 0
    assert "damaged" not in said
    assert results(command, run) == before


def test_in_a_folder_of_an_earlier_version_a_lost_checkpoint_is_made_again_too(whole, run):
    unrecorded(run)
    (run / last(run, "moco") / "backbone.safetensors").write_bytes(b"")
    code, said = call("fit", whole.parent, run)
    assert code == 0
    assert "the stage moco is done again" in said
    assert results("fit", run) == results("fit", whole)


def test_a_model_with_what_is_no_number_is_neither_saved_nor_loaded(whole, run):
    net, task = load_model(whole / "model", CPU)
    weight = next(net.parameters())
    weight.data.view(-1)[0] = torch.nan
    with pytest.raises(UserError, match="1 of [0-9]+ numbers in .* are not finite"):
        save_model(net, task, run / "model")
    path, about = run / "model/model.safetensors", checksums.read_sealed(run / "model/model.json")
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, path)
    checksums.publish_sealed(run / "model/model.json", {**about, "sha256": {path.name: checksums.sha256(path)}})
    code, said = call("predict", whole.parent, run)
    assert (code, said.count("\n")) == (1, 1)
    assert "are not finite; make the model again with fit" in said


def test_the_remedy_for_a_loss_that_is_not_finite_runs_and_goes_on(whole, tmp_path, capsys):
    data, out = str(whole.parent / "images.npz"), str(tmp_path / "run")
    diverging = ["fit", data, "--out", out, *SETTINGS, "--set", "moco.lr=1e30"]
    said = ""
    for _ in range(2):  # the same command again says the same
        assert cli.main(diverging) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("spice-dist: the loss of moco is not finite at step")
    remedy = shlex.split(said.partition("to train it anew: ")[2])
    assert remedy[0] == "spice-dist"
    assert cli.main(remedy[1:]) == 0
    said = capsys.readouterr().err
    assert "data        finished before" in said
    assert "moco did not stay finite with its earlier settings: it begins anew" in said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_damage_of_any_file_is_silent_a_traceback_or_a_hang(whole):
    tried = [(case, *outcome(case, whole)) for case in cases(whole)]
    assert len(tried) >= 400
    assert [each for each in tried if each[1] in ("silent", "traceback", "hang")] == []
