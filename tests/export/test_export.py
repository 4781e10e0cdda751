"""`spice-dist export` as a user types it, and the model card."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from spice_dist import artifacts, cli
from spice_dist.data.files import publish_json
from spice_dist.export import TARGETS
from spice_dist.model_card import licence, literal, write_card
from tests.export.conftest import Make


def run_command(*arguments: str | Path) -> int:
    return cli.main(["export", *map(str, arguments)])


def test_a_table_and_folders_are_written_and_said(make: Make, tmp_path: Path, capsys):
    run = make()
    assert run_command(run, "--to", "csv", tmp_path / "a.csv") == 0
    assert f"wrote {tmp_path / 'a.csv'}: 9 images" in capsys.readouterr().out
    assert run_command(run, tmp_path / "out", "--to", "folders", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    assert run_command(run, tmp_path / "out", "--to", "folders") == 0
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 9


MISTAKES = {
    "--to csv a.csv --link": "--link is for --to folders; leave it out with --to csv",
    "--to onnx a.onnx --copy": "--copy is for --to folders",
    "--to parquet a.parquet --dry-run": "--dry-run is for --to folders",
    "--to timm a.safetensors --skip-missing": "--skip-missing is for --to folders",
    "--to csv a.csv --source .": "--source is for --to folders and labelstudio",
    "--to folders out --link --copy": "exclude each other",
    "--to parquet a.csv": "give OUT.parquet in place of a.csv",
    "--to csv there.csv": "there.csv exists",
    "--to folders there": "holds other files",
    "--to csv nowhere/a.csv": "there is no folder nowhere",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_what_does_not_fit_is_refused_in_one_line(make: Make, tmp_path: Path, monkeypatch, capsys, arguments: str):
    run = make()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.csv").write_text("kept")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run_command(run, *arguments.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("spice-dist: ")
    assert MISTAKES[arguments] in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.csv").read_text() == "kept"


@pytest.mark.parametrize("target", TARGETS)
def test_a_folder_without_a_finished_run_is_one_line(tmp_path: Path, capsys, target: str):
    out = tmp_path / f"a{TARGETS[target].suffix}"
    assert run_command(tmp_path, "--to", target, out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "give the folder" in error
    assert not out.exists()


def test_tables_load_no_network_library(make: Make, tmp_path: Path):
    run = make()
    write_card(run)
    code = (
        "import sys; from spice_dist.cli import main; "
        f"main(['export', {str(run)!r}, '--to', 'csv', {str(tmp_path / 'a.csv')!r}]); "
        "print(sorted({'torch', 'timm', 'onnx', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------- the model card


def card(run: Path) -> str:
    write_card(run)
    return artifacts.card_file(run).read_text()


def front_matter(text: str) -> dict:
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def test_the_card_states_the_run_and_no_path_of_this_machine(make: Make, tmp_path: Path):
    run = make(names={"1": "summer dresses"})
    backbone = {"name": "test_resnet", "weights": str(tmp_path / "weights.safetensors")}
    publish_json(artifacts.config_file(run), {"config": {"backbone": backbone}})
    text = card(run)
    assert front_matter(text)["library_name"] == "spice_dist"
    assert "license" not in front_matter(text)
    assert "| 1 | summer dresses | 3 |" in text
    assert "**fair**: heads agree by 0.78 of 1" in text
    assert "a file of weights" in text
    assert str(tmp_path) not in text
    assert "no true labels" in text


def test_scores_are_beside_those_of_kmeans(make: Make):
    run = make()
    metrics = artifacts.metrics(run)
    metrics |= {
        "eval": {"acc": 0.662, "nmi": 0.584, "ari": 0.5},
        "baselines": {"kmeans_features": {"acc": 0.603, "nmi": 0.546, "ari": 0.4}},
    }
    publish_json(artifacts.metrics_file(run), metrics)
    text = card(run)
    assert "| this model's groups | 66.2 | 58.4 | 50.0 |" in text
    assert "| k-means of features | 60.3 | 54.6 | 40.0 |" in text


HOSTILE = (
    "a | b <script>alert(1)</script> `x` [y](javascript:z) ![i](http://h) **b** www.evil.com\n# h \u202e\x1b[31m --- "
)


def test_a_hostile_name_is_shown_as_it_is_and_marks_nothing_up(make: Make):
    shown = literal(HOSTILE)
    plain = re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), shown)
    assert plain.split() == "".join(c if c.isprintable() else " " for c in HOSTILE).split()
    assert set(re.sub(r"&#\d+;", "", shown)) <= set("abcdefghijklmnopqrstuvwxyz0123456789 -")
    text = card(make(names={"1": HOSTILE}))
    row = next(line for line in text.splitlines() if line.startswith("| 1 |"))
    assert row.count("|") == 5
    assert literal(HOSTILE) in row


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ({"name": "tf_efficientnet_lite0", "weights": "package"}, "apache-2.0"),
        ({"name": "resnet18.a1_in1k", "weights": "timm"}, "apache-2.0"),
        ({"name": "resnet18", "weights": ""}, ""),
        ({"name": "resnet18", "weights": "/home/me/w.pt"}, ""),
        ({"name": "no_such_network", "weights": "timm"}, ""),
        (
            {"name": "tf_efficientnet_lite0", "weights": "package", "others": ["resnet18"], "other_weights": ["/w.pt"]},
            "other",
        ),
        (None, ""),
    ],
)
def test_the_licence_is_that_of_the_weights(backbone, expected):
    assert licence(backbone) == expected


def test_the_python_of_the_card_loads_the_model(make: Make):
    run = make()
    (code,) = re.findall(r"```python\n(.*?)```", card(run), re.DOTALL)
    scope: dict = {}
    exec(code.replace("MODEL_FOLDER", str(artifacts.model(run))), scope)
    images = torch.zeros(2, scope["task"].data.channels, scope["task"].data.size, scope["task"].data.size)
    assert scope["net"](images).shape == (2, 3)


def test_an_export_writes_the_card_again_when_names_have_changed(make: Make, tmp_path: Path):
    run = make()
    write_card(run)
    publish_json(artifacts.names_file(run), {"0": "hats"})
    os.utime(artifacts.card_file(run), (0, 0))
    assert run_command(run, "--to", "csv", tmp_path / "a.csv") == 0
    assert "| 0 | hats |" in artifacts.card_file(run).read_text()
    os.utime(artifacts.card_file(run), (2**32, 2**32))
    artifacts.card_file(run).write_text("as it was")
    os.utime(artifacts.names_file(run), (0, 0))
    assert run_command(run, "--to", "csv", tmp_path / "b.csv") == 0
    assert artifacts.card_file(run).read_text() == "as it was"
