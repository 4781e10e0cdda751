"""The same pipeline on real Ray Train workers: the same bits, after a killed worker and after Ctrl-C too."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray  # noqa: F401  as in a notebook, before any token is set: with that, too, our cluster asks for one

from spice_dist import cli
from tests.test_cli import LONGER, command, wait_for

SETTINGS = ["--workers", "2", *LONGER[2:]]


def kill_a_worker(run: Path, stopped_at: int, killed: list[int]) -> None:
    """SIGKILL one training worker once stage 1 has gone on from the step at which it stopped."""
    lines = run / "moco/metrics.jsonl"
    deadline = time.monotonic() + 120
    while json.loads(lines.read_text().splitlines()[-1])["step"] <= stopped_at:
        assert time.monotonic() < deadline, "training did not go on"
        time.sleep(0.05)
    workers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "TrainWorker" in " ".join(process.cmdline()) or "TrainWorker" in process.name()
    ]
    workers[-1].kill()
    killed.append(workers[-1].pid)


@pytest.mark.timeout(480)  # starts Ray twice and workers five times
def test_ctrl_c_and_a_killed_worker_leave_the_bits_of_one_process(uninterrupted, tmp_path):
    out = tmp_path / "run"
    arguments = ["fit", "digits", "--out", str(out), *SETTINGS]
    child = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        wait_for(out / "moco/metrics.jsonl")
        family = psutil.Process(child.pid).children(recursive=True)
        training = [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]
        assert [process.nice() for process in training] == [0, 0], "beside other work they would starve"
        os.killpg(child.pid, signal.SIGINT)  # a terminal sends it to every process of the group
        _, printed = child.communicate(timeout=90)
    finally:
        child.kill()
    assert child.returncode == 130
    assert "Traceback" not in printed
    stopped_at = int(max(path.name for path in (out / "moco/checkpoints").iterdir()))
    assert 0 < stopped_at < 20 * 7
    deadline = time.monotonic() + 20
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family):
        assert time.monotonic() < deadline, "Ray's processes must end with the command"
        time.sleep(0.2)

    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(out, stopped_at, killed), daemon=True)
    killer.start()
    assert cli.main(arguments) == 0
    killer.join(1)
    assert len(killed) == 1
    assert (out / "assignments.csv").read_bytes() == uninterrupted
    assert not (out / "moco/.ray").exists()


@pytest.mark.parametrize("first", ["", "import ray"])  # as in a notebook
def test_outside_a_session_ray_starts_no_cluster_by_itself(first):
    code = f"""
{first}
from spice_dist.distributed import ray_train
ray_train.prepare(None)
import ray
try:
    ray.put(1)
except Exception as error:
    print(type(error).__name__, ray.is_initialized())
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_AUTO_CONNECT"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["RaySystemError", "False"]


def test_no_cluster_at_the_address_is_one_line(tmp_path, capfd):
    arguments = ["fit", "digits", "--out", str(tmp_path / "run"), *SETTINGS]
    assert cli.main([*arguments, "--address", "127.0.0.1:1"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("spice-dist:")]
    assert len(lines) == 1
    assert "127.0.0.1:1" in lines[0]
