"""`--to csv`, `parquet` and `labelstudio`: other programs read what the run holds."""

import csv
import json
import os
from pathlib import Path
from urllib.parse import unquote_to_bytes
from xml.etree import ElementTree

import numpy as np
import pandas
import pyarrow.parquet
import pytest

from spice_dist import artifacts
from spice_dist.assignments import read_assignments
from spice_dist.data.files import path_of_cell
from spice_dist.data.manifest import read_paths
from spice_dist.data.sources import from_array
from spice_dist.errors import DamagedFile, UserError
from spice_dist.export import labelstudio, tables
from tests.export.conftest import HOSTILE, Made, Make, make_run


def silent(done: int, total: int) -> None:
    pass


def test_csv_has_the_rows_of_the_run_and_no_formula(hostile_run: Path, tmp_path: Path):
    tables.write_csv(hostile_run, tmp_path / "a.csv", silent)
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cluster, confidence, reliable = read_assignments(artifacts.assignments_file(hostile_run))
    assert [int(row["cluster"]) for row in rows] == cluster.tolist()
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], confidence, atol=1e-4)
    assert [row["reliable"] == "1" for row in rows] == reliable.tolist()
    assert {row["name"] for row in rows} == {"../../escaped [31m", "CON", "con"}
    assert [path_of_cell(row["path"]) for row in rows] == read_paths(artifacts.data(hostile_run))
    assert [row["path"] for row in rows if row["path"].startswith(("=", "+", "-", "@"))] == []


@pytest.mark.parametrize("rows", [4, 4_096])
def test_parquet_opens_with_the_features_and_their_main_directions(make: Make, tmp_path: Path, monkeypatch, rows: int):
    monkeypatch.setattr(tables, "ROWS", rows)
    run, out = make(names={"2": "hats"}), tmp_path / "a.parquet"
    tables.write_parquet(run, out, silent)
    frame = pandas.read_parquet(out)
    features = np.load(artifacts.features_file(run)).astype(np.float64)
    np.testing.assert_array_equal(np.stack(frame["embedding"].tolist()), features)
    assert frame["name"].tolist() == ["group-00", "group-01", "hats"] * 3
    assert frame["path"].tolist() == read_paths(artifacts.data(run))
    assert frame["cluster"].tolist() == [0, 1, 2] * 3

    centered = features - features.mean(0)
    _, _, directions = np.linalg.svd(centered)
    directions *= np.sign(directions[np.arange(6), np.abs(directions).argmax(1)])[:, None]
    np.testing.assert_allclose(frame[["x", "y"]], centered @ directions[:2].T, atol=1e-5)

    file = pyarrow.parquet.ParquetFile(out)
    assert file.num_row_groups == -(-9 // rows)
    assert str(file.schema_arrow.field("embedding").type) == "fixed_size_list<element: float>[6]"


def test_the_axes_of_many_images_are_those_of_a_part_of_them(monkeypatch):
    features = np.random.default_rng(0).normal(size=(3_000, 5)) * [5, 3, 1, 1, 1]
    exact = tables.principal_axes(features)[1]
    monkeypatch.setattr(tables, "FITTED", 1_000)
    sampled = tables.principal_axes(features)[1]
    assert np.abs(exact - sampled).max() > 0
    np.testing.assert_allclose(np.abs((exact * sampled).sum(0)), 1, atol=0.01)


def test_names_that_are_no_text_become_escapes_in_parquet(hostile_run: Path, tmp_path: Path):
    tables.write_parquet(hostile_run, tmp_path / "a.parquet", silent)
    expected = {name.decode("utf-8", "backslashreplace") for name in HOSTILE}
    assert set(pandas.read_parquet(tmp_path / "a.parquet")["path"]) == expected


def test_a_run_without_features_has_a_table_without_a_map(make: Make, tmp_path: Path):
    run = make()
    artifacts.features_file(run).unlink()
    assert "without features" in tables.write_parquet(run, tmp_path / "a.parquet", silent)[0]
    assert list(pandas.read_parquet(tmp_path / "a.parquet")) == ["path", "cluster", "name", "confidence", "reliable"]


def damage_features(run: Path) -> None:
    features = np.load(artifacts.features_file(run))
    features[0] = np.nan
    np.save(artifacts.features_file(run), features)


DAMAGES = {
    "too few features": lambda run: np.save(artifacts.features_file(run), np.zeros((2, 6), np.float16)),
    "not finite": damage_features,
    "too few names": lambda run: artifacts.paths_file(run).write_text('"a.jpg"\n'),
    "too many names": lambda run: artifacts.paths_file(run).write_text('"a.jpg"\n' * 10),
    "no names of groups": lambda run: artifacts.names_file(run).write_text("[1]"),
    "other clusters": lambda run: artifacts.metrics_file(run).write_text('{"k": 2}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_is_one_line_and_leaves_no_file(make: Make, tmp_path: Path, damage):
    run = make()
    damage(run)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DamagedFile) as error:
        tables.write_parquet(run, tmp_path / "a.parquet", silent)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_label_studio_finds_every_file_and_offers_every_name(hostile_run: Path, hostile_photos: Path, tmp_path: Path):
    *lines, config = labelstudio.export(hostile_run, tmp_path / "tasks.json", None, silent)
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    found = {unquote_to_bytes(task["data"]["image"].partition("?d=")[2]) for task in tasks}
    assert {os.path.join(os.fsencode(hostile_photos.parent), path) for path in found} == {
        os.fsencode(path) for path in hostile_photos.rglob("*") if path.is_file()
    }
    assert any(line.endswith(f"DOCUMENT_ROOT={hostile_photos.parent}") for line in lines)

    view = ElementTree.fromstring(config)
    offered = [choice.get("value") for choice in view.iter("Choice")]
    assert offered == ["../../escaped [31m", "CON", "con"]
    for task in tasks:
        (prediction,) = task["predictions"]
        (result,) = prediction["result"]
        assert result["value"]["choices"][0] in offered
        assert (result["from_name"], result["to_name"]) == ("cluster", "image")
        (control,) = view.findall(f".//*[@name='{result['from_name']}']")
        assert control.get("toName") == result["to_name"]
        assert 0 <= prediction["score"] <= 1


def test_label_studio_needs_files(tmp_path: Path):
    run = make_run(
        tmp_path / "run", from_array(np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)), Made(size=8)
    )
    with pytest.raises(UserError, match="have no files"):
        labelstudio.export(run, tmp_path / "tasks.json", None, silent)


def test_an_image_outside_of_all_groups_is_exported_as_such(make: Make, tmp_path: Path):
    run = make()
    path = artifacts.assignments_file(run)
    path.write_text(path.read_text().replace("\n4,04.jpg,1,", "\n4,04.jpg,-1,"))
    tables.write_csv(run, tmp_path / "a.csv", silent)
    assert "04.jpg,-1,no-group," in (tmp_path / "a.csv").read_text()
    assert '"no-group"' in labelstudio.export(run, tmp_path / "a.json", None, silent)[-1]
