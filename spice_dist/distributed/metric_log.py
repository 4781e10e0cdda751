"""The numbers of a stage by step: metrics.jsonl, TensorBoard events, trackers."""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spice_dist.data.files import publish
from spice_dist.distributed import trackers
from spice_dist.distributed.trackers import Tracker


class MetricLog:
    """Writes metrics.jsonl, one line per reported step, and the same numbers to TensorBoard events and trackers."""

    def __init__(self, folder: Path, step: int, opened: Sequence[Tracker] = ()):
        """Keep the lines up to `step`, where training resumes, so that steps strictly increase."""
        # not SummaryWriter: it blocks after a full disk has ended its thread
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        text = self.path.read_bytes() if self.path.exists() else b""
        earlier = b"".join(_lines_up_to(step, text))
        if earlier != text:
            with publish(self.path) as file:
                file.write(earlier)
        self.event: Any = Event
        self.events = EventsWriter(str(folder / "events"), f".{step}")
        self.events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.trackers = list(opened)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line; a full disk loses the line but does not stop the training."""
        from tensorboardX.summary import scalar

        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as handle:
                handle.write(json.dumps({"step": step, **metrics}) + "\n")
            size = self.path.stat().st_size
            for name, value in metrics.items():
                self.events.write_event(self.event(step=step, wall_time=time.time(), summary=scalar(name, value)))
            self.events.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # else the next line would continue half of this one
            warnings.warn(f"no metrics at step {step} ({error}); training goes on", stacklevel=2)
        self.trackers = trackers.log_to(self.trackers, step, metrics)

    def close(self) -> None:
        """Close the trackers at the end of the stage, or at a stop."""
        trackers.close(self.trackers)


def _lines_up_to(step: int, text: bytes) -> Iterator[bytes]:
    """Yield the whole lines of rising steps up to `step`, without half lines of a killed writer."""
    before = 0
    for line in text.splitlines(keepends=True):
        try:
            number = json.loads(line)["step"] if line.endswith(b"\n") else None
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(number, int) and before < number <= step:
            before = number
            yield line
