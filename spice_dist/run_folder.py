"""The run folder: who owns it, which stages are finished, and whether a configuration still fits them."""

import _thread
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from spice_dist.data.files import publish_json
from spice_dist.errors import DamagedFile, UserError

OWNER = ".owner.json"
HEARTBEAT_SECONDS = 5.0
WRITING_SECONDS = 1.0  # longer than anybody takes to fill the owner file after creating it


@contextmanager
def owned(run: Path) -> Iterator[None]:
    """Make the folder ours for the block. UserError if another live process has it, or it cannot be written.

    The owner file holds host, process and its start time: on this machine a dead owner is recognised by its process.
    One elsewhere counts as alive while its heartbeat moves, which is watched for three beats before taking over.
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
        yield
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(OSError):  # must not hide what went wrong inside
            if _is_open_as(descriptor, owner):
                owner.unlink()
            os.close(descriptor)


def _claim(path: Path, identity: dict[str, Any]) -> int:
    """Make `path` hold our identity; returns it open. UserError if a live process holds it.

    A dead holder is replaced under a second claim, on a name of its own: two that find the same dead one cannot both
    replace it, and none can replace its successor by mistake.
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
            os.close(descriptor)  # we were asleep for so long that another took us for dead
            continue
        with contextlib.suppress(FileNotFoundError):  # its holder has just finished: once more
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
    """The same for processes that see each other: one boot of one host, one process namespace of containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> float | None:
    """Seconds from boot to the start of a process, which setting the clock does not change; None if it is dead."""
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
    """Who holds the file; None if that is unreadable. One who is just writing it is waited for."""
    deadline = time.monotonic() + WRITING_SECONDS
    while True:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            holder = json.loads(path.read_bytes())
            if _is_identity(holder):
                return holder
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)


def _is_identity(holder: Any) -> bool:
    kinds = {"host": str, "machine": str, "pid": int, "started": float, "token": str, "beat": str}
    return all(isinstance(holder[name], kind) for name, kind in kinds.items()) and holder["token"].isalnum()


def _write(descriptor: int, identity: dict[str, Any], beat: int) -> None:
    """In place and of constant length: a beat needs no room on a full disk and never replaces another's file."""
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
                _thread.interrupt_main(signal.SIGTERM)  # nothing if nobody handles it
                return
            _write(descriptor, identity, number)


def stage_record(run: Path, stage: str) -> dict[str, Any] | None:
    """What was noted when the stage began: {"settings", "done", "seconds"}; None if it never did."""
    path = run / stage / "stage.json"
    try:
        record = json.loads(path.read_bytes())
        return {"settings": dict(record["settings"]), "done": record["done"], "seconds": record["seconds"]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged; remove {path.parent} to do this stage again") from error


def write_stage_record(run: Path, stage: str, settings: dict[str, Any], done: bool, seconds: float) -> None:
    (run / stage).mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "done": done, "seconds": round(seconds, 2)}
    publish_json(run / stage / "stage.json", record)


def refuse_changes(
    run: Path, stage: str, settings: dict[str, Any], remedy: str = "give another --out or the same settings"
) -> None:
    """UserError, with the difference, if the stage has left anything that was made with other settings than these."""
    record = stage_record(run, stage)
    trained = any((run / stage).glob("checkpoints/*"))
    if record is None:
        if trained:
            raise UserError(
                f"{run / stage} has checkpoints but no stage.json, which says what they were made with; "
                f"remove {run / stage} to do this stage again"
            )
        return
    if not record["done"] and not trained:
        return
    then, now = record["settings"], json.loads(json.dumps(settings))
    changed = [name for name in sorted({*then, *now}) if name not in then or name not in now or then[name] != now[name]]
    if changed:
        shown = ", ".join(f"{name} was {_short(then, name)}, now {_short(now, name)}" for name in changed[:3])
        more = f" and {len(changed) - 3} more" * (len(changed) > 3)
        raise UserError(f"{run} was made with another configuration, stage {stage}: {shown}{more}; {remedy}")


def forget_other_clusters(run: Path, settings: dict[str, dict[str, Any]]) -> None:
    """Remove what was made for another number of clusters, or other settings of stage 2 on the neighbour graph.

    The features and neighbours stay, from which it is made in seconds; one line says so.
    """
    names = list(settings)
    if "spice_graph" not in names:
        return
    record = stage_record(run, "spice_graph")
    now = json.loads(json.dumps(settings["spice_graph"]))
    own = ("clusters", "spice_graph.")
    earlier = {
        name: value for name, value in (record or {"settings": now})["settings"].items() if not name.startswith(own)
    }
    if (
        record is None
        or record["settings"] == now
        or earlier != {k: v for k, v in now.items() if not k.startswith(own)}
    ):
        return
    was = record["settings"].get("clusters") or "suggested"
    print(f"the groups in {run} (clusters: {was}) are made anew; features and neighbours stay", file=sys.stderr)
    for name in (*names[names.index("spice_graph") :], "spice_tune", "model"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("assignments.csv", "levels.csv", "metrics.json", "report.html"):  # they would describe other groups
        (run / name).unlink(missing_ok=True)


def _short(settings: dict[str, Any], name: str) -> str:
    if name not in settings:
        return "absent"
    text = json.dumps(settings[name])
    return text if len(text) <= 60 else text[:57] + "..."
