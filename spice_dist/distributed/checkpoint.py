"""The checkpoint store: what was acknowledged is never lost, what is damaged is never loaded.

A checkpoint is a folder `<step>/` of safetensors files, `state.json` and `manifest.json` with the SHA-256 of each.
It is written beside, flushed to disk and renamed, so a reader never sees a partial one; it is verified before it is
loaded, and the newest valid one wins. No pickle is written or read.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spice_dist.data.files import publish_json

Tensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `state` holds numbers and names, `tensors(name)` reads one of its weight files."""

    path: Path
    step: int
    state: dict

    def tensors(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")


def save(folder: Path, step: int, tensors: Tensors, state: dict, keep: int = 2) -> Path:
    """Write `folder/<step>/` atomically and drop all but the newest `keep`. OSError when the disk is full."""
    from safetensors.torch import save_file

    final = folder / f"{step:09d}"
    temporary = folder / f".{step:09d}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, group in tensors.items():
            copies = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(copies, temporary / f"{name}.safetensors")
        publish_json(temporary / "state.json", {**state, "step": step})
        files = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        publish_json(temporary / "manifest.json", {"version": 1, "step": step, "sha256": files})
        for file in (*temporary.iterdir(), temporary):
            _fsync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in sorted(_candidates(folder))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None. Damaged ones are set aside as `<step>.bad`."""
    for path in sorted(_candidates(folder), reverse=True):
        try:
            return load(path)
        except (OSError, ValueError, KeyError):
            path.rename(_free_name(path))
    return None


def load(path: Path) -> Checkpoint:
    """Verify and open one checkpoint; ValueError, KeyError or OSError if anything is missing or altered."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, expected in manifest["sha256"].items():
        if _sha256(path / name) != expected:
            raise ValueError(f"{path / name} does not match its manifest")
    return Checkpoint(path, int(manifest["step"]), json.loads((path / "state.json").read_text()))


def sweep(folder: Path) -> None:
    """Remove what writers that died left behind; call it only while owning the run folder."""
    for leftover in folder.glob(".*.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _candidates(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdigit()] if folder.is_dir() else []


def _free_name(path: Path) -> Path:
    bad = path.with_name(path.name + ".bad")
    number = 1
    while bad.exists():
        bad, number = path.with_name(f"{path.name}.bad{number}"), number + 1
    return bad


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Bring a file, or the names inside a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
