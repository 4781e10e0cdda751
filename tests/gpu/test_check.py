"""The check for GPUs works on a CPU, where everything is tiny: it finds, writes, fails, resumes and ends in time."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.gpu import check, equal, travel

FEW = tuple(case for case in equal.CASES if case.name == "moco")
LAUNCH = Path(__file__).resolve().parents[2] / "launch/gpu_check.sh"


def run(folder: Path, *options: object) -> tuple[int, dict]:
    code = check.main(["--device", "cpu", "--folder", str(folder), *map(str, options)])
    return code, json.loads((folder / "check.json").read_text())


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of every fifth digit."""
    path = tmp_path_factory.mktemp("labels") / "labels.npy"
    _, digits = load_digits(return_X_y=True)
    np.save(path, np.where(np.arange(len(digits)) % 5 == 0, digits, -100))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, labels: Path) -> tuple[Path, dict]:
    """The folder of a check in which every part is done, of few steps in the first, and what it has found."""
    folder = tmp_path_factory.mktemp("check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equal, "CASES", FEW)
        code, found = run(folder, 30, "--labels", labels, "--out", folder / "out")
    assert code == 0, [row for row in found["rows"] if not row["ok"]]
    return folder, found


def steps_of(cases: Sequence[equal.Case]) -> list[str]:
    """The names of the rows of the first part."""
    return [f"{case.name} on digits{more}" for more in ("", ", one rank of gloo") for case in cases]


def names(found: dict, part: str) -> list[str]:
    return [row["name"] for row in found["rows"] if row["part"] == part]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_leaves_its_rows_in_both_tables(finished):
    folder, found = finished
    assert found["done"] == list(check.PARTS)
    assert names(found, "equal") == steps_of(FEW)
    assert names(found, "speed") == ["moco", "spice_semi", "imc_swav"]
    assert len(names(found, "cluster")) == 5
    assert names(found, "labels")[:2] == ["minute 1 of 2", "minute 2 of 2"]
    page = (folder / "check.md").read_text()
    assert all(f"| {row['part']} | {row['name']} | ok |" in page for row in found["rows"])
    assert (folder / "out/check.md").read_text() == page
    assert json.loads((folder / "out/check.json").read_text()) == found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_numbers_of_a_step_belong_together_and_a_cpu_launches_no_kernel(finished):
    for row in finished[1]["rows"]:
        if row["part"] == "speed":
            assert row["ratio"] == pytest.approx(row["step_ms"] / row["bare_ms"])
            images = 128 if row["name"] == "spice_semi" else 64  # half of stage 3's have a label
            assert row["images_per_second"] * row["step_ms"] / 1e3 == pytest.approx(images)
            assert row["operations_a_step"] > 100
            assert row["launches_a_step"] == row["synchronisations_a_step"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_done_is_not_done_again_and_checkpoints_travel(finished, labels, tmp_path):
    folder, found = finished
    started = time.monotonic()
    assert run(folder, 3, "--labels", labels) == (0, found)
    assert time.monotonic() - started < 10

    options = ["pack", "--resume", folder / "out", "--to", tmp_path / "parts", "--without-wheels"]
    assert travel.main(list(map(str, options))) == 0
    elsewhere = tmp_path / "elsewhere"
    for part in (tmp_path / "parts").iterdir():
        travel.unpack(part, elsewhere)
    content = json.loads((elsewhere / "check.json").read_text())
    assert content == found
    (elsewhere / "check.json").write_text(json.dumps(content | {"done": ["equal", "speed"]}))
    code, again = run(elsewhere, 3, "--labels", labels)
    assert code == 0
    assert scores(again) == scores(found)  # stage 1 and both networks of stage 3 are those of the first machine


def scores(found: dict) -> list[tuple]:
    return sorted((row["name"], row.get("accuracy"), row.get("acc")) for row in found["rows"])


@pytest.mark.slow
def test_the_last_step_of_every_loop_is_nearly_that_in_float64(tmp_path):
    code, found = run(tmp_path, 10, "--parts", "equal")
    assert code == 0
    assert names(found, "equal") == steps_of(equal.CASES)
    # float32 has 24 bits; spice_tune keeps activations of 11
    bound = {row["name"]: 2e-3 if "spice_tune" in row["name"] else 1e-5 for row in found["rows"]}
    assert [row["name"] for row in found["rows"] if not row["distance"] < bound[row["name"]]] == []


def test_a_step_of_another_precision_is_a_failure_and_a_part_that_fails_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr(equal, "CASES", FEW[:1])
    monkeypatch.setattr(equal, "PRECISION", "bf16")
    code, found = run(tmp_path, 10, "--parts", "equal", "labels")
    assert code == 1
    assert found["done"] == []
    rows = {(row["part"], row["name"]): row for row in found["rows"]}
    assert rows["equal", "moco on digits"]["share_of_allowed"] > 1
    assert not rows["equal", "moco on digits"]["ok"]
    assert "give --labels" in rows["labels", "the whole part"]["error"]
    assert "**FAILED**" in (tmp_path / "check.md").read_text()


def test_a_part_that_dies_or_hangs_is_a_row_and_the_next_one_begins(monkeypatch, tmp_path):
    monkeypatch.setattr("tests.gpu.context.GRACE", 0.5)
    parts = {
        "dies": check.Part(lambda context: os.kill(os.getpid(), 9), 1),
        "hangs": check.Part(lambda context: time.sleep(60), 1),
        "ends": check.Part(lambda context: context.results.add("ends", "a row", True), 8),
    }
    monkeypatch.setattr(check, "PARTS", parts)
    started = time.monotonic()
    code, found = run(tmp_path, 0.1, "--parts", *parts)
    assert time.monotonic() - started < 6 + 3 * 0.5 + 2  # minutes, grace of each, the rest
    assert code == 1
    assert found["done"] == ["ends"]
    errors = {row["part"]: row.get("error", "") for row in found["rows"]}
    assert errors["dies"] == "ended with exit code -9"
    assert errors["hangs"].startswith("killed")


def test_a_budget_that_ends_leaves_the_rest_to_the_next_call(labels, tmp_path):
    code, found = run(tmp_path, 0.001, "--labels", labels)
    assert code == 1
    assert found["done"] == []
    assert [row for row in found["rows"] if not row["ok"]] == []


def test_one_rank_that_gives_other_numbers_is_found(tmp_path):
    one = {"net/w": equal.torch.tensor([1.0, 2.0])}
    start = {"net/w": equal.torch.tensor([0.0, 2.0])}
    assert equal.distances(start, one, one) == {"net": 0.0}
    assert equal.distances(start, one, {"net/w": equal.torch.tensor([1.0, 2.5])}) == {"net": 0.5}
    assert equal.distances(start, one, {"net/w": equal.torch.tensor([1.0, float("nan")])}) == {"net": float("inf")}
    assert equal.distances(start, one, {"net/v": one["net/w"]}) == {"net": float("inf")}


def test_files_that_are_cut_into_parts_come_out_whole_in_any_order_and_damage_is_found(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(os.urandom(250))
    second.write_bytes(os.urandom(30))
    parts = travel.divide([(first, "data/first"), (second, "second")], tmp_path / "parts", 100)
    assert [sum(file.stat().st_size for file in part.iterdir() if file.name != "parts.json") for part in parts] == [
        100, 100, 80,
    ]  # fmt: skip
    for part in reversed(parts):
        travel.unpack(part, tmp_path / "there")
    assert (tmp_path / "there/data/first").read_bytes() == first.read_bytes()
    assert (tmp_path / "there/second").read_bytes() == second.read_bytes()

    piece = parts[1] / "data__first.1"
    piece.write_bytes(bytes(100))
    assert travel.main(["unpack", str(parts[1])]) == 1
    assert capsys.readouterr().err == (
        f"gpu_check: {piece} is damaged: its SHA-256 is not that of parts.json; copy it again\n"
    )


def test_the_check_needs_neither_ray_nor_ffcv_and_what_it_imports_travels():
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('ray', 'ffcv'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from tests.gpu import check\n"
        "from importlib.metadata import packages_distributions\n"
        "packages = packages_distributions()\n"
        "print(*{name for module in sys.modules for name in packages.get(module, ())})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=LAUNCH.parents[1], check=True, timeout=120, capture_output=True, text=True
    )
    imported = {name.lower().replace("_", "-") for name in done.stdout.split()}
    assert {"torch", "beartype"} <= imported
    travels = {name.lower().replace("_", "-") for name in (*closure("torch", "torchvision"), *travel.PACKAGES)}
    # dill and charset-normalizer: torch and requests take them where they are
    assert imported - travels <= {"spice-dist", "dill", "charset-normalizer"}


def closure(*packages: str) -> set[str]:
    """These packages with all that they need."""
    found: set[str] = set()
    left = list(packages)
    while left:
        name = re.split(r"[^\w.-]", left.pop())[0].lower()
        if name not in found and travel.installed(name):
            found.add(name)
            left += [need for need in requires(name) or [] if "extra ==" not in need]
    return found


def test_the_command_refuses_a_machine_without_a_gpu_in_one_line(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(
        [LAUNCH, "1", "--folder", tmp_path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith("gpu_check: cuda cannot be used: ")
    assert len(done.stderr.splitlines()) == 1
