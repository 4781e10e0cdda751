"""Files in the run folder for messages between a group of workers and the process that started it.

The first worker writes its progress and its messages to the user; the process asks the group to stop. Files also work
while Ray's controller is lost. The folder also holds Ray's own files; it exists while a group runs.
"""

import contextlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from spice_dist.errors import warn_in_one_line

FOLDER = ".ray"
STOP = f"{FOLDER}/stop"  # asks every worker to save and stop
PROGRESS = f"{FOLDER}/progress.json"  # of the first worker
MESSAGES = f"{FOLDER}/messages"  # from the first worker to the user
PULSES = f"{FOLDER}/pulses"  # a file for each worker, named by its rank
RAY_FILES = f"{FOLDER}/train"


class Progress(NamedTuple):
    """Progress of the first worker: `done` of `total` steps, or images; both 0 when a stage begins."""

    stage: str
    done: int
    total: int
    loss: float | None  # None: the stage has none


class Pulse(NamedTuple):
    """A sign of life of a worker."""

    beat: int  # how many it has given
    host: str
    node: str  # number of its node in Ray
    process: int
    waited: float  # seconds for which it has waited for the others, in one collective; 0: it works


def open_channel(run: Path) -> None:
    """Empty the folder, so that nothing of an earlier group is read."""
    close_channel(run)
    (run / PULSES).mkdir(parents=True, exist_ok=True)
    (run / MESSAGES).touch()


def close_channel(run: Path) -> None:
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def write_progress(run: Path, progress: Progress) -> None:
    """Write the progress of this worker; a full disk stops the bar, not the training."""
    _write(run / PROGRESS, progress)


def read_progress(run: Path) -> Progress | None:
    """Read the progress of the group; None before its first stage, and on NFS while another machine writes it."""
    try:
        return Progress(*json.loads((run / PROGRESS).read_bytes()))
    except (OSError, ValueError):
        return None


def write_pulse(run: Path, rank: int, pulse: Pulse) -> None:
    _write(run / PULSES / str(rank), pulse)


def read_pulses(run: Path) -> dict[int, Pulse]:
    """Read the last sign of life of every worker that has begun, by rank."""
    pulses = {}
    with contextlib.suppress(OSError):
        for name in filter(str.isdecimal, os.listdir(run / PULSES)):
            with contextlib.suppress(OSError, ValueError):  # on NFS, while another machine writes it
                pulses[int(name)] = Pulse(*json.loads((run / PULSES / name).read_bytes()))
    return pulses


def _write(path: Path, value: tuple) -> None:
    with contextlib.suppress(OSError):
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_text(json.dumps(value))
        temporary.replace(path)


def pass_on_messages(run: Path, position: int, message: Callable[[str], None]) -> int:
    """Call `message` with each complete line of MESSAGES from byte `position` on; return where the next call starts."""
    with contextlib.suppress(OSError), (run / MESSAGES).open("rb") as messages:
        messages.seek(position)
        for line in messages:
            if not line.endswith(b"\n"):
                break  # it is still being written
            message(line.decode(errors="replace").rstrip())
            position += len(line)
    return position


@contextmanager
def errors_as_messages(run: Path) -> Iterator[None]:
    """Send what this process writes to stderr to the user, each warning as one line."""
    raw = io.BufferedWriter(LossyFile(run / MESSAGES, "a"))
    with (
        io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True) as file,
        contextlib.redirect_stderr(file),
    ):
        warn_in_one_line()
        # DDP warns of it for an axis of one entry
        warnings.filterwarnings("ignore", "Grad strides do not match")
        yield


class LossyFile(io.FileIO):
    """A file that ignores a full disk, which loses messages but does not stop the training."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes

    def close(self) -> None:
        # NFS reports a full disk here
        with contextlib.suppress(OSError):
            super().close()
