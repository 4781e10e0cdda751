"""The run folder: who owns it, which stages are finished, and whether a configuration still fits them."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from spice_dist.data.files import publish_json
from spice_dist.errors import UserError

OWNER = ".owner.json"
HEARTBEAT_SECONDS = 5.0


@contextmanager
def owned(run: Path) -> Iterator[None]:
    """Make the folder ours for the block. UserError if another live process has it, or it cannot be written.

    The owner file holds host, process and its start time: on this host a dead owner is recognised by its process. One
    on another host counts as alive while its heartbeat moves, which is watched for three beats before taking over.
    """
    owner = run / OWNER
    try:
        run.mkdir(parents=True, exist_ok=True)
        _claim(owner)
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror or error}; give another --out") from error
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(owner, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        owner.unlink(missing_ok=True)


def _claim(owner: Path) -> None:
    try:
        with open(owner, "x") as file:
            json.dump(_identity(0), file)
        return
    except FileExistsError:
        pass
    holder = _read(owner)
    if holder and _alive(owner, holder):
        raise UserError(
            f"{owner.parent} is in use by process {holder['pid']} on {holder['host']}: "
            "wait for it or give another --out"
        )
    owner.unlink(missing_ok=True)
    _claim(owner)


def _identity(beat: int) -> dict[str, Any]:
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time(), "beat": beat}


def _alive(owner: Path, holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname():
        try:
            return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1
        except psutil.NoSuchProcess:
            return False
    threading.Event().wait(3 * HEARTBEAT_SECONDS)
    return _read(owner) != holder


def _read(owner: Path) -> dict[str, Any] | None:
    try:
        return json.loads(owner.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _beat(owner: Path, stop: threading.Event) -> None:
    number = 0
    while not stop.wait(HEARTBEAT_SECONDS):
        number += 1
        beside = owner.with_name(f"{OWNER}.{os.getpid()}")
        try:
            beside.write_text(json.dumps(_identity(number)))
            beside.replace(owner)
        except OSError:
            continue  # a full disk must not end the run; the next beat tries again


def stage_record(run: Path, stage: str) -> dict[str, Any] | None:
    """What was noted when the stage began: {"settings", "done", "seconds"}; None if it never did."""
    try:
        return json.loads((run / stage / "stage.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_stage_record(run: Path, stage: str, settings: dict[str, Any], done: bool, seconds: float) -> None:
    (run / stage).mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "done": done, "seconds": round(seconds, 2)}
    publish_json(run / stage / "stage.json", record)


def refuse_changes(run: Path, stage: str, settings: dict[str, Any]) -> None:
    """UserError, with the difference, if the stage began with other settings than these."""
    record = stage_record(run, stage)
    if record is None:
        return
    then, now = record["settings"], json.loads(json.dumps(settings))
    changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if changed:
        shown = ", ".join(f"{name} was {_short(then.get(name))}, now {_short(now.get(name))}" for name in changed[:3])
        more = f" and {len(changed) - 3} more" * (len(changed) > 3)
        raise UserError(
            f"{run} was made with another configuration, stage {stage}: {shown}{more}; "
            "give another --out or the same settings"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
