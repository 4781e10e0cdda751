"""The checkpoint store: what was acknowledged is never lost, what is damaged is never loaded.

A checkpoint is a folder `<step>/` of safetensors files, `state.json` and `manifest.json` with the SHA-256 of each.
It is written under a temporary name, flushed to disk and renamed, so that a reader never sees a partial one. It is
verified before it is loaded, and the newest valid one is used. No pickle is written or read.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from spice_dist.data.checksums import sha256
from spice_dist.data.files import fsync, let_umask_decide
from spice_dist.errors import DamagedFile, UserError

Tensors = dict[str, dict[str, Tensor]]
OWNER = ".owner.json"  # in a run folder: the process that owns it
STALE_SECONDS = 120.0  # twice the default time for which NFS shows an old listing of a folder
KEPT = 2  # newest checkpoints of a stage
DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # other errors, such as missing rights, are raised


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `state` holds numbers and names, `tensors(name)` reads one of its weight files."""

    path: Path
    step: int
    state: dict
    sha256: dict[str, str] = field(default_factory=dict)  # of its files, by name

    def tensors(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")


def save(folder: Path, step: int, tensors: Tensors, state: dict, owner: str = "") -> Path:
    """Write `folder/<step>/` atomically and drop all but the newest KEPT.

    A valid checkpoint of the same step is kept instead: replacing it would leave a moment without one.

    Args:
        owner: of the run folder, see `owner_of`; checkpoints of later steps by others are set aside.

    Raises:
        OSError: the disk is full; nothing is left behind.
        UserError: the folder has another owner by now; nothing is left behind.
    """
    final = folder / f"{step:09d}"
    if final.exists():
        try:
            return load(final).path
        except DamagedFile as error:
            _set_aside(final, error)
    temporary = folder / f".{step:09d}.{secrets.token_hex(4)}"
    temporary.mkdir(parents=True)
    try:
        _require_room(folder, tensors)
        for name, group in tensors.items():
            _write_tensors(temporary / f"{name}.safetensors", group)
        (temporary / "state.json").write_text(json.dumps({**state, "step": step}))
        files = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        manifest = {"version": 1, "step": step, "owner": owner, "sha256": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in (*temporary.iterdir(), temporary):
            fsync(file)
        _require_owner(folder, owner)
        os.replace(temporary, final)
        fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for later in _candidates(folder):
        # of a process that lost the folder: it would be taken for the newest, and this one's be dropped
        if int(later.name) > step and owner and _owner_in(later) != owner:
            _set_aside(later, DamagedFile(f"{later} was written by another process than this run's"))
    for old in _candidates(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def owner_of(run: Path) -> str:
    """Return the token of the process that owns a run folder; "" if none does."""
    try:
        return str(json.loads((run / OWNER).read_bytes())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _require_owner(folder: Path, owner: str) -> None:
    """Raise UserError if the run folder has another owner."""
    run, deadline = folder.parent.parent, time.monotonic() + STALE_SECONDS
    while owner and owner_of(run) not in ("", owner):
        if time.monotonic() > deadline:
            raise UserError(f"another process has taken {run} over; this one saves nothing more")
        time.sleep(0.5)


def _owner_in(path: Path) -> str:
    try:
        return str(json.loads((path / "manifest.json").read_bytes()).get("owner", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _require_room(folder: Path, tensors: Tensors) -> None:
    """Raise OSError if the disk has less room than the tensors take: half a checkpoint would crowd others out."""
    size = sum(value.numel() * value.element_size() for group in tensors.values() for value in group.values())
    if (free := shutil.disk_usage(folder).free) < size:
        raise OSError(errno.ENOSPC, f"it takes {size / 1e6:.1f} MB, and the disk has {free / 1e6:.1f} MB left")


def _require_numbers(tensors: Tensors) -> None:
    """Raise ValueError for what is no number, from which no training can go on; infinity is where nothing is known."""
    for name, group in tensors.items():
        for key, value in group.items():
            if value.is_floating_point() and bool(value.isnan().any()):
                raise ValueError(f"{key} of {name} holds what is no number")


class Writer:
    """Writes checkpoints in a thread beside training, one at a time.

    `seconds` is how long the last one took, None before it; `step` is its step.
    """

    def __init__(self, folder: Path, owner: str):
        self.folder, self.owner, self.step = folder, owner, 0
        self.seconds: float | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, tensors: Tensors, state: dict) -> None:
        """Copy the tensors to memory of their own, which is all that training waits for, and begin to write them."""
        self.wait()
        copies = {
            name: {key: value.detach().to("cpu", copy=True).contiguous() for key, value in group.items()}
            for name, group in tensors.items()
        }
        self.step = step
        self._thread = threading.Thread(target=self._write, args=(step, copies, state), daemon=True)
        self._thread.start()

    def wait(self) -> Exception | None:
        """Wait for the checkpoint in flight; return why the last one was not written, once, or None."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        return error

    def _write(self, step: int, tensors: Tensors, state: dict) -> None:
        began = time.monotonic()
        try:
            _require_numbers(tensors)
            save(self.folder, step, tensors, state, self.owner)
            self.seconds = time.monotonic() - began
        except Exception as error:  # whoever waits tells it
            self._error = error


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None; damaged ones are renamed `<step>.bad`, with a warning."""
    for path in _candidates(folder):
        try:
            return load(path)
        except DamagedFile as error:
            _set_aside(path, error)
    return None


def newest_step(folder: Path) -> int:
    """Return the largest step among the names of the checkpoints, unverified; -1 if there is none."""
    return max((int(path.name) for path in _candidates(folder)), default=-1)


def load(path: Path) -> Checkpoint:
    """Verify and open one checkpoint; DamagedFile if anything is missing or altered."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        names = {file.name for file in path.glob("*.safetensors")} | {"state.json"}
        if (manifest["version"], manifest["step"], set(manifest["sha256"])) != (1, int(path.name), names):
            raise ValueError("manifest.json does not belong to these files")
        for name, expected in manifest["sha256"].items():
            if sha256(path / name) != expected:
                raise ValueError(f"{name} does not match its manifest")
        state = json.loads((path / "state.json").read_bytes())
        return Checkpoint(path, manifest["step"], state, manifest["sha256"])
    except OSError as error:
        if error.errno not in DAMAGE:
            raise
        raise DamagedFile(f"{path} is damaged: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error


def drop_last(folder: Path) -> None:
    """Remove the newest checkpoint, if there is one."""
    for path in _candidates(folder)[:1]:
        shutil.rmtree(path)


def sweep(folder: Path) -> None:
    """Remove the partial checkpoints of ended processes; call it only while owning the run folder."""
    for leftover in folder.glob(".*.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _candidates(folder: Path) -> list[Path]:
    """Return the folders that may be checkpoints, the newest first."""
    paths = [path for path in folder.glob("*") if path.name.isdecimal()] if folder.is_dir() else []
    return sorted(paths, key=lambda path: int(path.name), reverse=True)


def _set_aside(path: Path, why: DamagedFile) -> None:
    bad, number = path.with_name(f"{path.name}.bad"), 1
    while bad.exists():
        bad, number = path.with_name(f"{path.name}.bad{number}"), number + 1
    with contextlib.suppress(OSError):  # another process renamed it first, or the folder is read-only
        path.rename(bad)
        warnings.warn(f"{why}; it is set aside as {bad.name}, and the checkpoint before it is used", stacklevel=3)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
        let_umask_decide(path)
    except SafetensorError as error:  # a full disk raises it
        raise OSError(str(error)) from error
