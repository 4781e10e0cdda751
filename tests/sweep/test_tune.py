"""Sweeps on real Ray: what survives a killed command, a killed trial, memory that runs out, and a bad value."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet
import pytest

from spice_dist import cli
from spice_dist.config import override
from spice_dist.data.sources import open_source
from spice_dist.launching import Launch
from spice_dist.pipeline import fit_until
from spice_dist.recipes import digits
from tests.test_cli import command

pytestmark = [pytest.mark.tune, pytest.mark.timeout(900)]

SETTINGS = [
    *("--set", "moco.epochs=1", "--set", "moco.queue=256", "--set", "data.loader=torch"),
    *("--set", "spice_self.epochs=3", "--set", "spice_self.heads=3", "--set", "spice_self.repeats=1"),
    *("--set", "spice_semi.steps=2"),
]
SLOW = [  # seconds
    *("--set", "spice_self.epochs=20", "--set", "spice_self.view_epochs=2")
]
RATES = "{'spice_self.lr': tune.loguniform(1e-3, 1e-2)}"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run whose data, stage 1 and features the sweeps take."""
    out = tmp_path_factory.mktemp("tune") / "run"
    changes = dict(item.split("=") for item in SETTINGS if item != "--set")
    config = override(digits(), changes)
    fit_until("features", config, open_source("digits"), out, Launch(workers=0, threads=1))
    return out


@pytest.fixture
def own_space(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "own.py").write_text(f"from ray import tune\nSPACE = {text}\n")
        return tmp_path / "own.py"

    return write


def arguments(base: Path, out: Path, *more: str | Path) -> list[str]:
    return ["tune", "digits", "--base", str(base), "--out", str(out), *SETTINGS, *map(str, more)]


def run(arguments: list[str]) -> int:
    """As a user runs it: what Ray pickles holds none of the tests' own checks of types."""
    return subprocess.run(command(*arguments), timeout=600).returncode


def records(out: Path) -> list[dict]:
    return [json.loads(path.read_bytes()) for path in sorted((out / "trials").glob("*/trial.json"))]


def table(out: Path) -> list[dict]:
    return pyarrow.parquet.read_table(out / "trials.parquet").to_pylist()


def trial_processes(command_pid: int) -> list[psutil.Process]:
    family = psutil.Process(command_pid).children(recursive=True)
    return [process for process in family if "ImplicitFunc" in " ".join(process.cmdline())]


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it ended, or is not ours to look at
        return []


def wait_until(condition, what: str, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_killed_command_goes_on_without_running_a_finished_trial_again(base, tmp_path, own_space):
    out = tmp_path / "sweep"
    more = ["--space", own_space(RATES), "--trials", "8", *SLOW]
    child = subprocess.Popen(command(*arguments(base, out, *more)), stderr=subprocess.DEVNULL, process_group=0)
    try:
        wait_until(lambda: sum(record["state"] == "finished" for record in records(out)) >= 3, "no trial finished")
        family = psutil.Process(child.pid).children(recursive=True)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    finally:
        child.kill()
    psutil.wait_procs(family, timeout=60)
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/trial.json")}
    finished = {path for path in before if json.loads(path.read_bytes())["state"] == "finished"}
    begun = {path.parent.name for path in before}
    assert 3 <= len(finished) < 8

    assert run(arguments(base, out, *more)) == 1, "a sweep that is there is not gone on with unasked"
    assert run(arguments(base, out, *more, "--resume")) == 0
    assert {path for path in finished if path.stat().st_mtime_ns != before[path]} == set()
    rows = table(out)
    assert [row["state"] for row in rows] == ["finished"] * 8
    assert begun <= {row["trial"] for row in rows}, "settings that were being tried are tried to the end"
    assert all(np.isfinite(row["generalization"]) for row in rows)
    assert not (out / ".ray").exists()
    assert (out / "report.html").exists()

    again = out / "trials.csv"
    stamp = again.read_bytes()
    assert run(arguments(base, out, *more, "--resume")) == 0, "and then there is nothing to do"
    assert again.read_bytes() == stamp


def test_a_killed_trial_and_bad_values_are_rows_and_the_sweep_goes_on(base, tmp_path, own_space):
    out = tmp_path / "sweep"
    space = own_space(
        "{'spice_self.lr': tune.loguniform(1e-3, 1e-2), 'spice_self.center_fraction': tune.choice([0.5, 7.0])}"
    )
    more = ["--space", space, "--trials", "10", "--search", "random", "--max-concurrent", "1", *SLOW]
    child = subprocess.Popen(command(*arguments(base, out, *more)), stderr=subprocess.PIPE, text=True, process_group=0)
    killed = []
    try:

        def running() -> bool:
            return any(record["state"] == "running" for record in records(out))

        wait_until(lambda: (running() and bool(trial_processes(child.pid))) or child.poll() is not None, "no trial ran")
        (name,) = [path.parent.name for path in out.glob("trials/*/trial.json") if '"running"' in path.read_text()]
        trial_processes(child.pid)[0].kill()
        killed.append(name)
        _, printed = child.communicate(timeout=600)
    finally:
        child.kill()
    assert child.returncode == 0, printed
    assert "Traceback" not in printed
    rows = table(out)
    assert len(rows) == 10
    reasons = {row["trial"]: row["reason"] for row in rows if row["state"] == "failed"}
    assert "its process was killed" in reasons.pop(killed[0])
    assert reasons, "of ten draws some have the bad value"
    bad = {row["trial"] for row in rows if row["spice_self.center_fraction"] == 7.0} - set(killed)
    assert set(reasons) == bad
    assert all("it is a share, at most 1" in reason for reason in reasons.values())
    assert {row["state"] for row in rows if row["trial"] not in (*bad, *killed)} == {"finished"}


def test_a_trial_that_runs_out_of_memory_is_a_row(base, tmp_path, own_space):
    out = tmp_path / "sweep"
    space = own_space(
        "{'spice_self.heads': tune.choice([2, 2_000_000_000]), 'spice_self.lr': tune.uniform(1e-3, 1e-2)}"
    )
    more = ["--space", space, "--trials", "6", "--search", "random"]
    assert run(arguments(base, out, *more)) == 0
    rows = table(out)
    large = [row for row in rows if row["spice_self.heads"] > 2]
    assert {row["state"] for row in large} == {"failed"}
    assert all(row["reason"].startswith("out of memory") for row in large)
    assert {row["state"] for row in rows if row["spice_self.heads"] == 2} == {"finished"}
    assert 0 < len(large) < 6


def test_asha_stops_trials_early_and_the_best_is_one_that_finished(base, tmp_path, own_space):
    out = tmp_path / "sweep"
    more = ["--space", own_space(RATES), "--trials", "9", "--scheduler", "asha", "--max-concurrent", "1", *SLOW]
    assert run(arguments(base, out, *more)) == 0
    rows = table(out)
    states = [row["state"] for row in rows]
    assert states.count("stopped") >= 3
    assert states.count("finished") >= 1
    assert len(states) == 9
    stopped = [row["generalization"] for row in rows if row["state"] == "stopped"]
    assert all(np.isfinite(stopped)), "what was known when it was stopped is kept"
    best = json.loads((out / "best.json").read_text())["trial"]
    assert next(row["state"] for row in rows if row["trial"] == best) == "finished"


def test_a_time_budget_ends_the_sweep_and_what_was_cut_off_is_not_a_result(base, tmp_path, own_space):
    out = tmp_path / "sweep"
    endless = ["--set", "spice_self.epochs=100000", "--set", "spice_self.view_epochs=2"]
    more = ["--space", own_space(RATES), "--trials", "2", *endless, "--time-budget", "40"]
    started = time.monotonic()
    assert run(arguments(base, out, *more)) == 0
    assert time.monotonic() - started < 240
    assert {record["state"] for record in records(out)} == {"running"}
    assert not (out / "best.json").exists()


def test_ctrl_c_ends_with_130_and_its_processes(base, tmp_path, own_space):
    out = tmp_path / "sweep"
    child = subprocess.Popen(
        command(*arguments(base, out, "--space", own_space(RATES), "--trials", "20", *SLOW)),
        stderr=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    try:
        wait_until(lambda: len(records(out)) > 0, "no trial began")
        family = psutil.Process(child.pid).children(recursive=True)
        os.killpg(child.pid, signal.SIGINT)
        _, printed = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 130, printed
    assert "Traceback" not in printed
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    (session,) = Path("/tmp/ray").glob(f"session_*_{child.pid}")  # the thread of the sweep started no other one
    assert not [process for process in psutil.process_iter() if session.name in " ".join(_command_of(process))]


def test_a_trial_of_two_workers_is_a_ray_train_run_with_the_result_of_one(base, tmp_path, own_space):
    space = own_space("{'moco.temperature': tune.choice([0.1])}")
    found = {}
    for workers in ("0", "2"):
        out = tmp_path / workers
        assert run(arguments(base, out, "--space", space, "--trials", "1", "--workers", workers)) == 0
        (row,) = table(out)
        assert row["state"] == "finished"
        found[workers] = row["generalization"], np.load(out / "trials" / row["trial"] / "clusters.npy").tobytes()
    assert found["0"] == found["2"]


def test_trials_leave_room_for_their_workers(base, tmp_path, own_space):
    out = tmp_path / "sweep"
    space = own_space("{'moco.temperature': tune.uniform(0.1, 0.3)}")
    assert run(arguments(base, out, "--space", space, "--trials", "3", "--workers", "2")) == 0
    assert [row["state"] for row in table(out)] == ["finished"] * 3


def test_the_best_configuration_is_fitted(base, tmp_path):
    out = tmp_path / "sweep"
    assert run(arguments(base, out, "--space", "thresholds", "--trials", "3")) == 0
    best = str(out / "best.json")
    fitted = tmp_path / "run"
    assert run(["fit", "digits", "--config", best, "--out", str(fitted), "--workers", "0"]) == 0
    wanted = json.loads(Path(best).read_text())["config"]
    assert json.loads((fitted / "config.json").read_text())["config"] == wanted


def test_spaces_are_found_from_an_installed_wheel(tmp_path):
    root = Path(cli.__file__).parents[1]
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(root),
    ]
    if subprocess.run([sys.executable, "-c", "import hatchling"], capture_output=True).returncode:
        build.remove("--no-build-isolation")
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    code = "from spice_dist.sweep import spaces; print(spaces.space_file('heads'))"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}, cwd=tmp_path,
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert found.stdout.strip() == str(site / "spice_dist/tune_spaces/heads.py")
