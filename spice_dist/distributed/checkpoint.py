"""The checkpoint store: what was acknowledged is never lost, what is damaged is never loaded.

A checkpoint is a folder `<step>/` of safetensors files, `state.json` and `manifest.json` with the SHA-256 of each.
It is written under a temporary name, flushed to disk and renamed, so that a reader never sees a partial one. It is
verified before it is loaded, and the newest valid one is used. No pickle is written or read.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spice_dist.data.files import fsync
from spice_dist.errors import DamagedFile

Tensors = dict[str, dict[str, Tensor]]
KEPT = 2  # newest checkpoints of a stage
DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # other errors, such as missing rights, are raised


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `state` holds numbers and names, `tensors(name)` reads one of its weight files."""

    path: Path
    step: int
    state: dict

    def tensors(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")


def save(folder: Path, step: int, tensors: Tensors, state: dict) -> Path:
    """Write `folder/<step>/` atomically and drop all but the newest KEPT; OSError, and no trace, if the disk is full.

    A valid checkpoint of the same step is kept instead: replacing it would leave a moment without one.
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
        for name, group in tensors.items():
            _write_tensors(temporary / f"{name}.safetensors", group)
        (temporary / "state.json").write_text(json.dumps({**state, "step": step}))
        files = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps({"version": 1, "step": step, "sha256": files}, indent=1))
        for file in (*temporary.iterdir(), temporary):
            fsync(file)
        os.replace(temporary, final)
        fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _candidates(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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
            if _sha256(path / name) != expected:
                raise ValueError(f"{name} does not match its manifest")
        return Checkpoint(path, manifest["step"], json.loads((path / "state.json").read_bytes()))
    except OSError as error:
        if error.errno not in DAMAGE:
            raise
        raise DamagedFile(f"{path} is damaged: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error


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
    except SafetensorError as error:  # a full disk raises it
        raise OSError(str(error)) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
