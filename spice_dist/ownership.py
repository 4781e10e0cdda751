"""Lock a run folder for one process at a time, on all hosts that share it."""

import _thread
import contextlib
import errno
import json
import os
import secrets
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from spice_dist.data.files import read_regular
from spice_dist.distributed.checkpoint import OWNER
from spice_dist.errors import UserError

HEARTBEAT_SECONDS = 5.0
WRITING_SECONDS = 1.0  # longer than a process takes to fill the owner file after creating it


@contextmanager
def owned(run: Path) -> Iterator[str]:
    """Own the folder for the block and yield the owner's token.

    The owner file holds the host, the process and its start time. An owner on this machine is dead if its process is.
    An owner elsewhere is alive while its heartbeat changes, which is watched for three beats.

    flufl.lock does not replace this: it compares a file's time across machines' clocks, takes over from a process that
    is only suspended, needs a heartbeat too, and waited 25 s for a dead process of this machine.

    Raises:
        UserError: another live process owns the folder, or it cannot be written.
    """
    owner, identity = run / OWNER, _identity()
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = _claim(owner, identity)
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror or error}; give another --out") from error
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(owner, descriptor, identity, stop), daemon=True)
    beat.start()
    try:
        yield identity["token"]
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(OSError):  # must not hide an error of the block
            if _is_open_as(descriptor, owner):
                owner.unlink()
            os.close(descriptor)


def _claim(path: Path, identity: dict[str, Any]) -> int:
    """Write this process's identity to `path` and return it open; UserError if a live process holds it.

    A dead holder is replaced under a second claim, on a file named after that holder: two processes that see the same
    dead holder cannot both replace it, and neither can replace its successor by mistake.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _write(descriptor, identity, 0)
            except OSError:
                path.unlink()
                os.close(descriptor)
                raise
            if _is_open_as(descriptor, path):
                return descriptor
            # this process was suspended for so long that another took the file over
            os.close(descriptor)
            continue
        with contextlib.suppress(FileNotFoundError):  # the holder has just finished: the loop tries again
            holder = _read(path)
            if holder and _alive(path, holder):
                raise UserError(
                    f"{path.parent} is in use by process {holder['pid']} on {holder['host']}: "
                    "wait for it or give another --out"
                )
            succession = path.with_name(f"{path.name}.{holder['token'] if holder else 'unreadable'}")
            descriptor = _claim(succession, identity)
            with contextlib.suppress(FileNotFoundError):
                if _read(path) == holder:
                    os.replace(succession, path)
                    return descriptor
            succession.unlink()
            os.close(descriptor)


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    about = {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _started(pid)}
    return {**about, "token": secrets.token_hex(8)}


def _machine() -> str:
    """Name one boot of one host and one process namespace of containers, whose processes see each other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> float | None:
    """Return the seconds from boot to the start of a process, which setting the clock does not change; None if dead."""
    try:
        process = psutil.Process(pid)
        dead = process.status() == psutil.STATUS_ZOMBIE
        return None if dead else process.create_time() - psutil.boot_time()
    except (psutil.NoSuchProcess, ValueError):
        return None


def _alive(path: Path, holder: dict[str, Any]) -> bool:
    if holder["machine"] == _machine():
        try:
            started = _started(holder["pid"])
        except psutil.AccessDenied:
            return True
        return started is not None and abs(started - holder["started"]) < 2  # the time of boot is in whole seconds
    time.sleep(3 * HEARTBEAT_SECONDS)
    return _read(path) != holder


def _read(path: Path) -> dict[str, Any] | None:
    """Read the identity in the file; None if it is unreadable, after waiting for a holder that is writing it."""
    deadline = time.monotonic() + WRITING_SECONDS
    while True:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            holder = json.loads(_content(path))
            if _is_identity(holder):
                return holder
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)


def _content(path: Path) -> bytes:
    """Read the file; empty if it is a pipe or such, which is no owner's."""
    try:
        return read_regular(path)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENXIO):
            return b""
        raise


def _is_identity(holder: Any) -> bool:
    kinds = {"host": str, "machine": str, "pid": int, "started": float, "token": str, "beat": str}
    return all(isinstance(holder[name], kind) for name, kind in kinds.items()) and holder["token"].isalnum()


def _write(descriptor: int, identity: dict[str, Any], beat: int) -> None:
    """Write in place and at constant length: a beat needs no space on a full disk and replaces no other file."""
    os.pwrite(descriptor, json.dumps({**identity, "beat": f"{beat:09d}"}).encode(), 0)
    os.fsync(descriptor)


def _is_open_as(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _beat(owner: Path, descriptor: int, identity: dict[str, Any], stop: threading.Event) -> None:
    number = 0
    while not stop.wait(HEARTBEAT_SECONDS):
        number += 1
        with contextlib.suppress(OSError):  # a failing disk must not end the run; the next beat tries again
            if owner.exists() and not _is_open_as(descriptor, owner):
                warnings.warn(f"another process has taken {owner.parent} over; this one stops", stacklevel=1)
                _thread.interrupt_main(signal.SIGTERM)  # no effect without a handler
                return
            _write(descriptor, identity, number)
