"""Our own Ray cluster on this machine: private files, servers on the loopback interface, our handler of SIGTERM."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from spice_dist.errors import UserError

SOCKET_BYTES = 107  # of the name of a Unix socket, which Linux limits
# the longest name that we and Ray give to a socket below the temporary folder
SOCKET = "spice-12345678/ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"
# waits for the end of its input; a process that has got the number of one of Ray's in the meantime is left alone; the
# others need a moment to end, in which they write
WATCH = 'cat; for p in $0; do grep -qs ray "/proc/$p/cmdline" && kill -9 "$p"; done; sleep 1; rm -rf -- "$@"'
PREFIX, HELD = "spice-", "held"  # names of a private folder, and of the file in it that its process holds locked
ROOM = 64 << 20  # bytes: Ray's logs of a run are a few megabytes


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder for Ray that no other user can enter, and remove it at the end.

    Ray opens its own folder to everybody, so it gets one inside.

    Raises:
        UserError: the temporary folder cannot be used for it.
    """
    parent = temporary_folder()
    with contextlib.ExitStack() as stack:
        try:
            private = stack.enter_context(held_folder(parent))
        except OSError as error:
            raise _unusable(parent, error.strerror or str(error)) from error
        yield private / "ray"


@contextmanager
def held_folder(parent: Path) -> Iterator[Path]:
    """Make a folder that no other user can enter, and remove it at the end.

    Those of killed processes beside it, which may hold a token, are removed first.
    """
    for abandoned in parent.glob(f"{PREFIX}*/{HELD}"):
        with contextlib.suppress(OSError), open(abandoned, "rb") as file:  # locked, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(abandoned.parent, ignore_errors=True)
    private = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with open(private / f"{HELD}.new", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.rename(file.name, private / HELD)  # locked from its first moment on
            yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextmanager
def watched(*folders: Path) -> Iterator[None]:
    """Let a shell end Ray's processes and remove these folders once this process is killed.

    Ray's agents would stay for a minute: they try to tell the head node, which is gone, what has happened.
    """
    processes = " ".join(str(child.pid) for child in psutil.Process().children(recursive=True))
    shell = ["/bin/sh", "-c", WATCH, processes, *map(str, folders)]
    # the pipe closes when this process ends, however it ends
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as watcher:
        try:
            yield
        finally:
            watcher.kill()


def keep_logs(folder: Path) -> Path:
    """Copy the logs of Ray's session in `folder` to a private folder that stays, and return that."""
    kept = Path(tempfile.mkdtemp(prefix="spice-logs-", dir=folder.parent.parent))
    shutil.copytree(folder / "session_latest/logs", kept, dirs_exist_ok=True)
    return kept


def temporary_folder() -> Path:
    """Return where Ray's files can be: RAY_TMPDIR, TMPDIR or /tmp.

    Raises:
        UserError: it is too full, or its name is too long for the sockets in it, or there is none.
    """
    try:
        folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _unusable(error.filename or "the temporary folder", error.strerror or str(error)) from error
    if (excess := len(os.fsencode(folder / SOCKET)) - SOCKET_BYTES) > 0:
        raise _unusable(folder, f"its name is {excess} bytes too long for the sockets in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unusable(folder, "it cannot be written")
    if free < ROOM:
        raise _unusable(folder, f"it has {free >> 20} MB left, and Ray needs {ROOM >> 20}")
    return folder


def _unusable(folder: Path | str, why: str) -> UserError:
    return UserError(f"Ray cannot put its files into {folder} ({why}); set TMPDIR to a folder such as /tmp")


@contextmanager
def loopback() -> Iterator[None]:
    """Let a cluster that starts inside the block have the address 127.0.0.1, where alone Ray's servers then listen."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # as on systems where Ray forms no cluster of several machines
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def our_handler_of_sigterm() -> Iterator[None]:
    """Keep this process's handler in ray.init: Ray sets one that exits, and a native one that aborts after 3 s."""
    from ray._private import ray_constants, utils

    set_handler = utils.set_sigterm_handler
    without_native = getattr(ray_constants, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", False)  # not in every version
    utils.set_sigterm_handler = lambda sigterm_handler: None
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = without_native


@contextmanager
def quiet_driver() -> Iterator[None]:
    """Let Ray print nothing by itself in this process if a session starts inside the block; its daemons log all.

    Its native part prints of every actor of Ray Data, as an error, that its arguments may be lost. What Ray tells of
    lost workers goes to standard output, where rows go.
    """
    from ray._private import worker

    connect, listen, level = worker.connect, worker.listen_error_messages, "RAY_BACKEND_LOG_LEVEL"

    def quietly(*arguments: Any, **options: Any) -> None:
        before, stderr = os.environ.get(level), os.dup(2)
        os.environ[level] = "fatal"
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)  # it prints that this variable is set
        try:
            connect(*arguments, **options)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.environ.pop(level)
            os.environ.update({} if before is None else {level: before})

    worker.connect, worker.listen_error_messages = quietly, lambda worker, threads_stopped: None
    try:
        yield
    finally:
        worker.connect, worker.listen_error_messages = connect, listen
