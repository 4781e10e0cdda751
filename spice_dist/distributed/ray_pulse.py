"""Signs of life: each worker writes some, and the process that started the group ends a worker that shows none.

A worker that is stopped or hangs holds up all others in their next collective, where they would wait for many minutes.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from spice_dist.distributed import ray_channel, ray_nodes
from spice_dist.distributed.pace import waits
from spice_dist.distributed.ray_channel import Pulse

BEAT_SECONDS = 5.0  # between two signs of life
SILENT_SECONDS = 60.0  # without one, after which that is said
KILL_SECONDS = 180.0  # after which the worker is killed, and the group starts again
HELD_UP_SECONDS = 120.0  # for which all others wait for a worker that lives, after which that is said


@contextmanager
def beating(run: Path, rank: int, node: str) -> Iterator[None]:
    """Write signs of life of this worker inside the block, from a thread of its own."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while True:
            since, count = waits.since, count + 1
            waited = 0.0 if since is None else time.monotonic() - since
            ray_channel.write_pulse(run, rank, Pulse(count, socket.gethostname(), node, os.getpid(), waited))
            if ended.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


class Watchdog:
    """Looks at the signs of life of a group: names a worker that shows none, or holds up the others; kills the former.

    Time counts only between looks: this process may be stopped itself.
    """

    def __init__(self, message: Callable[[str], None], kill: Callable[[str, int], None] = ray_nodes.kill_worker):
        """Take `kill`, which ends a process on a node."""
        self.message, self.kill = message, kill
        self.looked_at = time.monotonic()
        self.beats: dict[int, int] = {}
        self.silent: dict[int, float] = {}  # seconds for which each worker has shown no sign of life
        self.said: set[tuple[int, str]] = set()

    def look(self, pulses: Mapping[int, Pulse]) -> None:
        now = time.monotonic()
        passed, self.looked_at = min(now - self.looked_at, 2 * ray_nodes.LOOK_SECONDS), now
        for rank, pulse in pulses.items():
            new = self.beats.get(rank) != pulse.beat
            self.silent[rank] = 0.0 if new else self.silent[rank] + passed
            self.beats[rank] = pulse.beat
        if all(silent > 2 * BEAT_SECONDS for silent in self.silent.values()):
            return  # the group has ended, and Ray starts another
        for rank, pulse in pulses.items():
            who = f"worker {rank} (process {pulse.process} on {pulse.host})"
            if self.silent[rank] >= KILL_SECONDS:
                self._say(rank, "killed", f"{who} is killed, since the others wait for it; the group starts again")
                self.kill(pulse.node, pulse.process)
                self.silent[rank] = 0.0
            elif self.silent[rank] >= SILENT_SECONDS:
                when = f"after {KILL_SECONDS:.0f} s it is killed"
                self._say(rank, "silent", f"{who} has shown no sign of life for {self.silent[rank]:.0f} s; {when}")
            elif pulse.waited == 0 and _all_wait(rank, pulses):
                others = f"the other {len(pulses) - 1} workers"
                self._say(rank, "busy", f"{who} works while {others} have waited for {HELD_UP_SECONDS:.0f} s")

    def _say(self, rank: int, what: str, line: str) -> None:
        if (rank, what) not in self.said:
            self.said.add((rank, what))
            self.message(line)


def _all_wait(rank: int, pulses: Mapping[int, Pulse]) -> bool:
    """Tell whether all other workers have waited long; False if there are none."""
    waited = [pulse.waited for other, pulse in pulses.items() if other != rank]
    return min(waited, default=0.0) >= HELD_UP_SECONDS


class Watch:
    """Looks at the nodes and the workers of a running group: every LOOK_SECONDS at most."""

    def __init__(self, run: Path, workers: int, message: Callable[[str], None]):
        self.run, self.workers, self.message = run, workers, message
        self.started_at = self.looked_at = self.said_at = time.monotonic()
        self.watchdog, self.leaving = Watchdog(message), False

    def node_leaves(self) -> bool:
        """Tell whether a node of the group is about to leave; say what keeps the group from going on."""
        now = time.monotonic()
        if now - self.looked_at < ray_nodes.LOOK_SECONDS:
            return self.leaving
        self.looked_at = now
        pulses = ray_channel.read_pulses(self.run)
        if not pulses and now - self.said_at >= ray_nodes.SAY_SECONDS:
            self.said_at = now
            waited = f"{self.workers} workers have not begun after {now - self.started_at:.0f} s"
            self.message(f"{waited}; {ray_nodes.room_in_words()}")
        self.watchdog.look(pulses)
        if not self.leaving and (leaving := ray_nodes.leaving({pulse.node for pulse in pulses.values()})):
            self.message(f"{' and '.join(leaving)}: the workers save and stop")
            self.leaving = True
        return self.leaving
