"""Marker gpu: the first two parts of the check on a CUDA device, as tests."""

import json
from pathlib import Path

import pytest

from tests.gpu import check

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("check")
    check.main(["10", "--folder", str(folder), "--parts", "equal", "speed"])
    path: Path = folder / "check.json"
    return json.loads(path.read_text())["rows"]


def test_the_last_step_of_every_loop_is_as_near_to_float64_as_the_cpus(rows):
    of_steps = [row for row in rows if row["part"] == "equal"]
    assert of_steps
    assert [row for row in of_steps if not row["ok"]] == []


def test_no_step_waits_for_the_device(rows):
    of_speed = {row["name"]: row for row in rows if row["part"] == "speed"}
    assert set(of_speed) == {"moco", "spice_semi", "imc_swav"}
    assert {name: row["asked_for_by"] for name, row in of_speed.items() if row["synchronisations_a_step"]} == {}
