"""SHA-256 of what a run leaves: recorded when a file is written, compared when it is first read.

A record is a JSON file whose `sha256` names files beside or below it, and whose `seal` is the digest of the record
itself. Folders of earlier versions have neither; their files are read as they are.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spice_dist.data.files import publish_json
from spice_dist.errors import DamagedFile

OF_RUN = "checksums.json"  # what evaluation wrote into a run folder, and its configuration
RECORDS = ("stage.json", "manifest.json", "model.json", "trial.json", OF_RUN)
_whole: dict[Path, tuple[int, int, int]] = {}  # files that were compared -> inode, size and time of change


def sha256(path: Path) -> str:
    """Return the hexadecimal digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_sealed(path: Path, content: dict[str, Any]) -> None:
    """Publish a JSON object with its seal."""
    publish_json(path, {**content, "seal": _seal(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON object without its seal; ValueError if it is none or was altered since it was sealed."""
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("an object was expected")
    if "seal" in content and content.pop("seal") != _seal(content):
        raise ValueError("its content does not match its seal")
    return content


def _seal(content: dict[str, Any]) -> str:
    # as JSON gives it back: tuples are lists there
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def require_whole(path: Path) -> Path:
    """Return the path of a file that is as it was recorded, or that no record names.

    A file is hashed once by a process, and again when it has changed.

    Raises:
        DamagedFile: the file, or the record beside it, was altered, or a file that a record names is missing.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if _recorded(path) is None:
            return path  # whoever opens it says that it is missing
        raise DamagedFile(f"{path} is missing; run the command that made it again") from None
    now = status.st_ino, status.st_size, status.st_mtime_ns
    if _whole.get(path) != now:
        require_digest(path, _recorded(path))
        _whole[path] = now
    return path


def require_digest(path: Path, expected: str | None) -> None:
    """Raise DamagedFile if the file's SHA-256 is another; None expects nothing."""
    if expected is not None and sha256(path) != expected:
        raise DamagedFile(
            f"{path} is damaged: its SHA-256 is not the one recorded when it was written; "
            "run the command that made it again"
        )


def _recorded(path: Path) -> str | None:
    places = ((path.parent, path.name), (path.parent.parent, f"{path.parent.name}/{path.name}"))
    for folder, name in places:
        for record in RECORDS:
            if name != record and name in (sums := sums_in(folder / record)):
                return sums[name]
    return None


def sums_in(record: Path) -> dict[str, str]:
    """Return the digests that a record holds, by names relative to its folder; none without a record."""
    try:
        return dict(read_sealed(record).get("sha256") or {})
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError) as error:
        raise DamagedFile(f"{record} is damaged ({error}); run the command that made it again") from error


def record_files(run: Path, names: Iterable[str], anew: bool = False) -> None:
    """Add files of a run folder to the record of the run; those that do not exist are left out of it.

    Args:
        anew: the record names no others.
    """
    try:
        sums = {} if anew else sums_in(run / OF_RUN)
    except DamagedFile:
        sums = {OF_RUN: "unknown"}  # so that its own loss is seen
    for name in names:
        sums.pop(name, None)
        if (run / name).is_file():
            sums[name] = sha256(run / name)
    publish_sealed(run / OF_RUN, {"version": 1, "sha256": sums})


def differing(folder: Path, sums: dict[str, str]) -> list[str]:
    """Return the names of files of a folder that are missing, or not as recorded."""
    return [name for name, expected in sums.items() if not _is(folder / name, expected)]


def _is(path: Path, expected: str) -> bool:
    try:
        return sha256(path) == expected
    except OSError:
        return False
