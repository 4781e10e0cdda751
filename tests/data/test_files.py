"""Files of the program: regular ones alone are read, and the umask says who else may."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from spice_dist import cli
from spice_dist.data.files import read_regular, require_regular_files
from spice_dist.distributed import checkpoint
from spice_dist.errors import UserError
from spice_dist.ownership import OWNER, owned


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.timeout(20)
def test_no_pipe_or_device_in_a_run_folder_is_waited_for(make, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "moco").mkdir(parents=True)
    make(run / "moco/stage.json")
    with pytest.raises(OSError, match="Not a regular file"):
        read_regular(run / "moco/stage.json")
    commands = [
        ["fit", "digits", "--out", run, "--workers", "0"], ["evaluate", run], ["report", run], ["predict", run, "-"],
        ["export", run, "--to", "csv", tmp_path / "x.csv"], ["apply", run, tmp_path / "edits.json"],
    ]  # fmt: skip
    for arguments in commands:
        assert cli.main([str(argument) for argument in arguments]) == 1
        assert f"{run / 'moco/stage.json'} is no regular file" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.timeout(20)
def test_a_pipe_as_owner_is_nobody(tmp_path):
    os.mkfifo(tmp_path / OWNER)
    with owned(tmp_path):
        assert stat.S_ISREG((tmp_path / OWNER).stat().st_mode)
    assert list(tmp_path.iterdir()) == []


def test_folders_links_to_files_and_links_to_nothing_are_no_mistake(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    os.mkfifo(tmp_path / "other/pipe")  # of somebody else: the folder of a run may hold anything beside it
    for name in ("file", "stage.json"):
        (tmp_path / "a" / name).touch()
    (tmp_path / "link").symlink_to("a/file")
    (tmp_path / "folder").symlink_to("a")
    (tmp_path / "nothing").symlink_to("x")
    require_regular_files(tmp_path)
    os.mkfifo(tmp_path / "a/b/pipe")
    with pytest.raises(UserError, match="pipe is no regular file"):
        require_regular_files(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path, mask):
    before = os.umask(mask)
    try:
        saved = checkpoint.save(tmp_path / "checkpoints", 1, {"net": {"weight": torch.zeros(3)}}, {})
        np.save(tmp_path / "plain.npy", np.zeros(3))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (*saved.iterdir(), tmp_path / "plain.npy")}
    assert set(modes.values()) == {0o666 & ~mask}
    assert modes.keys() >= {"net.safetensors", "state.json", "plain.npy"}
