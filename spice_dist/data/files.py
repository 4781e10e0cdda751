"""Files that appear whole or not at all: written beside, fsynced, renamed."""

import csv
import errno
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from spice_dist.errors import UserError

FORMULA = r"[=+\-@\t\r]"  # what a cell begins with that a spreadsheet runs
MARKS = ("stage.json", "model.json", "config.json")  # of stages, a model, the base run of a sweep

Progress = Callable[[int, int], None]
"""Called now and then as progress(done, total)."""


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Open a new binary file that replaces `path` when the block succeeds and leaves no trace when it fails.

    Raises:
        UserError: the file cannot be written (full disk, no permission).
    """
    temporary = None
    try:
        temporary = temporary_path(path)
        with open(temporary, "xb") as file:
            yield file
        commit(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # must not hide an error of the block
            if temporary is not None:
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


class _Echo:
    """Takes the place of the file of a csv.writer, whose `writerow` then returns the line."""

    def write(self, line: str) -> str:
        return line.removesuffix("\r\n") + "\n"


csv_line: Callable[[Iterable[Any]], str] = csv.writer(_Echo(), lineterminator="\r\n").writerow
"""Return a row as a line of a CSV, ended by a line feed; a cell with a carriage return is quoted too."""


def path_cell(path: str) -> str:
    r"""Return a path as a cell of a table: as it is, apart from two cases, which `path_of_cell` undoes.

    One that a spreadsheet would run as a formula gets ./ in front, by which it still names its file. Bytes that are no
    UTF-8 become \udc80 .. \udcff.
    """
    text = _utf8(path)
    return f"./{text}" if re.match(rf"(\./)*{FORMULA}", text) else text


def path_of_cell(cell: str) -> str:
    """Return the path that `path_cell` was given."""
    path = cell[2:] if re.match(rf"\./(\./)*{FORMULA}", cell) else cell
    return re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda match: chr(int(match[1], 16)), path)


def text_cell(text: str) -> str:
    """Return any other text as a cell: as it is, but an apostrophe keeps a spreadsheet from running it as a formula."""
    text = _utf8(text)
    return f"'{text}" if re.match(f"'*{FORMULA}", text) else text


def text_of_cell(cell: str) -> str:
    """Return the text that `text_cell` was given."""
    return cell[1:] if re.match(f"''*{FORMULA}", cell) else cell


def _utf8(text: str) -> str:
    """Escape bytes that are no UTF-8, which a table cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """Return `text` with Python escapes for backslashes, control characters and undecodable bytes."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode("ascii") for c in text)


def read_regular(path: Path) -> bytes:
    """Read a file; OSError if it is a pipe, a device or a socket, which would be waited for, or without an end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        return file.read()


def require_regular_files(*runs: Path) -> None:
    """Raise UserError if a pipe, a device or a socket lies in a run folder or a sweep, where reading could hang."""
    for run in runs:
        for place, folders, names in os.walk(run):
            if place == str(run):  # not what else may lie there, such as somebody's home
                folders[:] = [name for name in folders if _is_of_a_run(run / name)]
            for path in (Path(place, name) for name in names):
                with suppress(FileNotFoundError):
                    if not stat.S_ISREG(path.stat().st_mode):
                        raise UserError(f"{path} is no regular file; remove it, then run the same command again")


def _is_of_a_run(folder: Path) -> bool:
    return folder.name in ("trials", "report") or any(os.path.lexists(folder / name) for name in MARKS)


def let_umask_decide(path: Path) -> None:
    """Give a file that a library made private the mode of every other: other users may read it if the umask says so."""
    mask = re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert mask
    path.chmod(0o666 & ~int(mask[1], 8))


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
