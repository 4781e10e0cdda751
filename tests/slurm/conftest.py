"""What one process makes without SLURM and Ray, to which the runs on clusters are compared."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.slurm.nodes import REPOSITORY, wait_until
from tests.test_cli import DIGITS, TINY

# a second of training; enough to save twice and be interrupted; enough to lose a node and have it back; never finished
SHORT, LONG = ([*DIGITS[2:], "--set", f"moco.epochs={epochs}"] for epochs in (1, 30))
ELASTIC, ENDLESS = ([*TINY[2:], "--set", f"moco.epochs={epochs}"] for epochs in (60, 1000))


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str]], bytes]]:
    """The assignments of `fit digits` with one of these settings, made beside the tests with what they leave idle."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {tuple(settings): folder / str(number) for number, settings in enumerate((SHORT, ELASTIC, LONG))}
    fit = [sys.executable, "-m", "spice_dist.cli", "fit", "digits", "--workers", "0"]
    script = " && ".join(shlex.join([*fit, "--out", str(out), *settings]) for settings, out in runs.items())
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with (folder / "log").open("w") as log:
        maker = subprocess.Popen(
            ["nice", "-n", "19", "sh", "-c", script], env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def assignments(settings: list[str]) -> bytes:
        made = runs[tuple(settings)] / "assignments.csv"
        wait_until(lambda: made.exists() or maker.poll() is not None, 400)
        assert made.exists(), (folder / "log").read_text()
        return made.read_bytes()

    yield assignments
    if maker.poll() is None:
        os.killpg(maker.pid, 9)
        maker.wait()
