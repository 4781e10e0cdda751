"""The folder of our own Ray cluster: private, gone at the end, refused in one line where it cannot be."""

import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from spice_dist import cli, doctor
from spice_dist.distributed import ray_local
from spice_dist.doctor import BAD, IntendedRun
from spice_dist.errors import UserError


@pytest.fixture
def temporary(monkeypatch):
    """A temporary folder of a short name."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def fail_in_a_private_folder() -> None:
    with ray_local.private_folder() as folder:
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        folder.mkdir(mode=0o777)
        raise RuntimeError


def test_the_folder_is_closed_to_others_and_gone_at_the_end_also_of_a_failure(temporary):
    with pytest.raises(RuntimeError):
        fail_in_a_private_folder()
    assert list(temporary.iterdir()) == []


HOLD = """
import sys
from pathlib import Path
from spice_dist.distributed import ray_local
with ray_local.held_folder(Path(sys.argv[1])) as folder:
    (folder / "token").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_folder_of_a_killed_process_is_removed_at_the_next_start_and_that_of_a_living_one_is_not(temporary):
    held = []
    for _ in range(2):
        held.append(subprocess.Popen([sys.executable, "-c", HOLD, temporary], stdin=-1, stdout=-1, text=True))
    killed, living = (Path(each.stdout.readline().strip()) for each in held if each.stdout)
    other = temporary / "spice-of-another"  # program, or of an earlier version
    other.mkdir()
    held[0].kill()
    held[0].wait()
    with ray_local.held_folder(temporary) as folder:
        assert {*temporary.iterdir()} == {living, other, folder}
    assert (living / "token").exists()
    held[1].communicate("")
    assert {*temporary.iterdir()} == {other}
    assert not killed.exists()


def test_the_longest_name_that_is_taken_holds_a_socket_and_one_byte_more_does_not(temporary, monkeypatch):
    length = ray_local.SOCKET_BYTES - len("/" + ray_local.SOCKET) - len(f"{temporary}/")
    longest = temporary / ("x" * length)
    longest.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(longest))
    place = ray_local.temporary_folder() / ray_local.SOCKET
    place.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place))
        (temporary / ("y" * (length + 1))).mkdir()
        with socket.socket(socket.AF_UNIX) as too_long, pytest.raises(OSError, match="too long"):
            too_long.bind(str(place).replace("x" * length, "y" * (length + 1)) + "z")
    monkeypatch.setenv("RAY_TMPDIR", str(temporary / ("y" * (length + 1))))
    with pytest.raises(UserError, match="1 bytes too long for the sockets"):
        ray_local.temporary_folder()


@pytest.mark.parametrize("trouble", ["long", "full", "missing"])
def test_fit_and_before_it_doctor_name_a_temporary_folder_that_ray_cannot_use(
    temporary, tmp_path, monkeypatch, capsys, trouble
):
    folder = temporary
    if trouble == "long":
        folder = temporary / ("x" * 80)
        folder.mkdir()
    elif trouble == "full":
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(ray_local.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    else:
        folder = temporary / "missing"
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    words = {"long": "too long", "full": "it has 1 MB left", "missing": "No such file or directory"}[trouble]

    (found,) = [finding for finding in doctor.findings(IntendedRun()) if finding.check == "ray"]
    assert (found.state, words in found.text) == (BAD, True)
    assert cli.main(["fit", "digits", "--out", str(tmp_path / "run"), "--workers", "2"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spice-dist:")]
    assert words in line
    assert line.endswith("set TMPDIR to a folder such as /tmp")
