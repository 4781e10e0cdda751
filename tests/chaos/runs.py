"""Runs of `fit` that are hurt from outside, and what is left of them: shared by the scripts beside this file."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from spice_dist.distributed import ray_channel
from spice_dist.distributed.ray_channel import Progress
from tests.chaos.damage import SETTINGS

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 600  # after which a run that does not go on hangs


class Hangs(AssertionError):
    """Nothing went on for SECONDS."""


def digits(folder: Path, images: int) -> Path:
    """Write the first so many digits and their labels to a file."""
    from sklearn.datasets import load_digits

    loaded: Any = load_digits()
    path = folder / "images.npz"
    np.savez(path, images=(loaded.images[:images] * 15.9).astype(np.uint8), labels=loaded.target[:images])
    return path


def fit(images: Path, run: Path, workers: int, settings: str = "", *more: str) -> list[str]:
    """Return the arguments of the command; `settings` are words name=value, of which later ones win."""
    changes = [word for change in f"umap_baseline=false {settings}".split() for word in ("--set", change)]
    return ["fit", str(images), "--out", str(run), *SETTINGS, *changes, "--workers", str(workers), *more]


def results(run: Path) -> dict[str, object]:
    """Return what a run leaves, without times: what its stages wrote, assignments, model, scores, the report's data."""
    metrics = json.loads((run / "metrics.json").read_text())
    metrics.pop("seconds")
    stages = {path.parent.name: json.loads(path.read_text())["sha256"] for path in run.glob("*/stage.json")}
    files = ("assignments.csv", "model/model.safetensors")
    page = (run / "report.html").read_bytes()  # beside its data it has times and rates
    (data,) = re.findall(rb'<script type="application/json".*?</script>', page, re.DOTALL)
    return {"metrics": metrics, "stages": stages, "report": data, **{name: (run / name).read_bytes() for name in files}}


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return [name for name in one if one[name] != other[name]]


def note(out: Path, **record: Any) -> None:
    """Add a line to a file of results; `table.py` reads them."""
    with open(out, "a") as file:
        file.write(json.dumps(record) + "\n")


class Command:
    """The command in a process of its own, started again after each end. Its Ray is in a private folder."""

    def __init__(self, arguments: list[str], folder: Path, run: Path):
        self.arguments, self.run, self.printed = arguments, run, folder / "printed"
        self.temporary = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))  # short, since Ray makes sockets in it
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.temporary),
            "XDG_DATA_HOME": str(folder / "home"),
        }
        self.starts = 0
        self.child: subprocess.Popen[bytes] | None = None
        self.family: set[psutil.Process] = set()

    def start(self) -> None:
        self.starts += 1
        command = [sys.executable, "-m", "spice_dist.cli", *self.arguments]
        with self.printed.open("a") as file:
            self.child = subprocess.Popen(command, stdout=file, stderr=file, env=self.environment, cwd=REPOSITORY)

    def code(self) -> int | None:
        """Return the exit code; None while it runs."""
        assert self.child is not None
        return self.child.poll()

    def progress(self) -> Progress | None:
        return ray_channel.read_progress(self.run)

    def processes(self) -> list[psutil.Process]:
        """Return the processes below the command."""
        assert self.child is not None
        with contextlib.suppress(psutil.Error):
            self.family.update(psutil.Process(self.child.pid).children(recursive=True))
        return [each for each in self.family if not has_ended(each)]

    def training_workers(self) -> list[psutil.Process]:
        found = [each for each in self.processes() if "TrainWorker" in command_line(each)]
        return sorted(found, key=lambda each: each.pid)

    def kill_driver(self) -> None:
        """SIGKILL the command, and wait until nothing of its Ray runs or lies there."""
        self.processes()
        assert self.child is not None
        self.child.kill()
        self.child.wait()
        wait_until(lambda: all(map(has_ended, self.family)), "Ray's processes stay after a killed driver")
        wait_until(lambda: not self.leftovers(), f"Ray's files stay after a killed driver: {self.leftovers()}")
        self.family.clear()

    def leftovers(self) -> list[str]:
        """Return the private folders of Ray, which hold tokens."""
        return [path.name for path in self.temporary.glob("spice-*")]

    def ends(self) -> int:
        """Wait for the end; return the exit code."""
        wait_until(lambda: self.code() is not None, "the command does not end")
        code = self.code()
        assert code is not None
        return code

    def last_words(self) -> str:
        return " | ".join(self.printed.read_text().splitlines()[-3:])

    def close(self) -> None:
        """End what is left of it."""
        processes = self.processes() if self.child else []
        if self.child:
            self.child.kill()
            self.child.wait()
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGCONT)
                each.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


@contextmanager
def command(arguments: list[str], folder: Path, run: Path) -> Iterator[Command]:
    folder.mkdir(parents=True, exist_ok=True)
    made = Command(arguments, folder, run)
    try:
        yield made
    finally:
        made.close()


def command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):  # it has just ended
        return " ".join(process.cmdline())
    return ""


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """Raise Hangs, saying `what`, unless the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Hangs(what)
        time.sleep(0.02)
