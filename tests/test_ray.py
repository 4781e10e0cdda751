"""The same pipeline on real Ray Train workers: the same bits, after a killed worker and after Ctrl-C too."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from spice_dist import cli
from tests.test_cli import TINY, command, wait_for

SETTINGS = [*TINY[4:], "--threads", "1", "--set", "moco.epochs=20"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> bytes:
    """The assignments that this process makes without Ray."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main(["fit", "digits", "--out", str(out), "--workers", "0", *SETTINGS]) == 0
    return (out / "assignments.csv").read_bytes()


def kill_a_worker(run: Path, killed: list[int]) -> None:
    """SIGKILL one training worker once stage 1 has begun."""
    wait_for(run / "moco/metrics.jsonl")
    workers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "TrainWorker" in " ".join(process.cmdline()) or "TrainWorker" in process.name()
    ]
    workers[-1].kill()
    killed.append(workers[-1].pid)


def test_two_workers_give_the_bits_of_one_process_though_one_is_killed(alone, tmp_path, capfd):
    out = tmp_path / "run"
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(out, killed), daemon=True)
    killer.start()
    assert cli.main(["fit", "digits", "--out", str(out), "--workers", "2", *SETTINGS]) == 0
    killer.join(1)
    assert len(killed) == 1
    assert (out / "assignments.csv").read_bytes() == alone
    assert not (out / "moco/.ray").exists()


def test_ctrl_c_stops_all_workers_and_one_worker_finishes_with_the_same_bits(alone, tmp_path):
    out = tmp_path / "run"
    arguments = ["fit", "digits", "--out", str(out), *SETTINGS]
    child = subprocess.Popen(command(*arguments, "--workers", "2"), stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        wait_for(out / "moco/metrics.jsonl")
        family = psutil.Process(child.pid).children(recursive=True)
        os.killpg(child.pid, signal.SIGINT)  # a terminal sends it to every process of the group
        _, printed = child.communicate(timeout=90)
    finally:
        child.kill()
    assert child.returncode == 130
    assert "Traceback" not in printed
    assert int(max(path.name for path in (out / "moco/checkpoints").iterdir())) < 140
    deadline = time.monotonic() + 20
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family):
        assert time.monotonic() < deadline, "Ray's processes must end with the command"
        time.sleep(0.2)

    assert cli.main([*arguments, "--workers", "1"]) == 0
    assert (out / "assignments.csv").read_bytes() == alone


def test_no_cluster_at_the_address_is_one_line(tmp_path, capfd):
    arguments = ["fit", "digits", "--out", str(tmp_path / "run"), "--workers", "2", *SETTINGS]
    assert cli.main([*arguments, "--address", "127.0.0.1:1"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("spice-dist:")]
    assert len(lines) == 1
    assert "127.0.0.1:1" in lines[0]
