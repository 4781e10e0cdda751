"""Files that appear whole or not at all: written beside, fsynced, renamed."""

import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from spice_dist.errors import UserError

Progress = Callable[[int, int], None]
"""Called now and then as progress(done, total)."""


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Open a new binary file that replaces `path` when the block succeeds and leaves no trace when it fails.

    Raises:
        UserError: the file cannot be written (full disk, no permission).
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            yield file
        commit(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def publish_json(path: Path, content: Any) -> None:
    """Publish `content` as ASCII-escaped JSON."""
    with publish(path) as file:
        file.write(json.dumps(content, indent=1).encode("ascii") + b"\n")


def temporary_path(path: Path) -> Path:
    """Return an unused hidden name beside `path`. Leftovers of dead writers of this host are removed."""
    host = socket.gethostname().replace("~", "-")
    for leftover in path.parent.glob(f".{path.name}~{host}~*~*.tmp"):
        pid = leftover.name.split("~")[-2]
        if pid.isdecimal() and not _alive(int(pid)):
            leftover.unlink(missing_ok=True)
    return path.parent / f".{path.name}~{host}~{os.getpid()}~{secrets.token_hex(4)}.tmp"


def commit(temporary: Path, path: Path) -> None:
    """Make the bytes of `temporary` durable, then give them the name `path`."""
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def csv_cell(text: str) -> str:
    """Return `text` as a safe cell: no control characters, no lone surrogates, not a formula to a spreadsheet.

    Backslashes, control characters and undecodable bytes become Python escapes; a leading = + - @ gets an apostrophe.
    """
    text = printable(text)
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


def printable(text: str) -> str:
    """Return `text` with Python escapes for backslashes, control characters and undecodable bytes."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode("ascii") for c in text)


def unguard(cell: str) -> str:
    """Undo the quote that keeps spreadsheets from running a cell that starts like a formula."""
    return cell[1:] if cell[:1] == "'" and cell[1:2] in tuple("=+-@\t\r") else cell


def fsync(path: Path) -> None:
    """Bring a file, or the names inside a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
