"""Who shows no sign of life, and who holds up the others, from signs as workers write them (real ones: test_ray.py)."""

import os
import subprocess
from collections.abc import Callable

import pytest

from spice_dist.distributed import ray_channel, ray_nodes, ray_pulse
from spice_dist.distributed.ray_channel import Pulse
from spice_dist.distributed.ray_pulse import Watchdog

STEP = 5.0  # seconds between two looks


class Group:
    """Workers on two hosts that are looked at every STEP seconds; what is said and killed, with the second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: int = 3):
        self.now, self.workers = 0.0, workers
        self.said: list[tuple[float, str]] = []
        self.killed: list[tuple[float, str, int]] = []
        monkeypatch.setattr(ray_pulse.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ray_nodes, "LOOK_SECONDS", STEP)
        self.watchdog = Watchdog(
            lambda line: self.said.append((self.now, line)), lambda *process: self.killed.append((self.now, *process))
        )

    def look(self, looks: int, beats: Callable[[int], bool], waited: Callable[[int], float] = lambda _: 0.0) -> None:
        """Look so often, at workers of which those beat of which `beats` tells so."""
        for _ in range(looks):
            self.now += STEP
            pulses = {
                rank: Pulse(int(self.now if beats(rank) else 0), f"host{rank}", f"node{rank}", 100 + rank, waited(rank))
                for rank in range(self.workers)
            }
            self.watchdog.look(pulses)


def test_a_worker_without_a_sign_of_life_is_named_then_killed(monkeypatch):
    group = Group(monkeypatch)
    group.look(40, lambda rank: rank != 1)
    who = "worker 1 (process 101 on host1)"
    named, killed = group.said
    assert named == (65.0, f"{who} has shown no sign of life for 60 s; after 180 s it is killed")
    assert killed == (185.0, f"{who} is killed, since the others wait for it; the group starts again")
    assert group.killed == [(185.0, "node1", 101)]


def test_a_group_that_has_ended_is_not_taken_for_workers_that_hang(monkeypatch):
    group = Group(monkeypatch)
    group.look(100, lambda _rank: False)
    assert (group.said, group.killed) == ([], [])


def test_the_time_for_which_this_process_was_stopped_does_not_count(monkeypatch):
    group = Group(monkeypatch)
    group.look(3, lambda _rank: True)
    group.now += 1000
    group.look(9, lambda rank: rank != 1)
    assert (group.said, group.killed) == ([], [])


def test_a_worker_that_lives_and_holds_up_all_others_is_named_and_not_killed(monkeypatch):
    group = Group(monkeypatch)
    group.look(100, lambda _rank: True, lambda rank: 0.0 if rank == 2 else group.now)
    assert group.said == [
        (120.0, "worker 2 (process 102 on host2) works while the other 2 workers have waited for 120 s")
    ]
    assert group.killed == []
    quiet = Group(monkeypatch)
    quiet.look(100, lambda _rank: True, lambda rank: 0.0 if rank else quiet.now)  # two work, one waits
    assert quiet.said == []


def test_a_worker_writes_signs_of_life_from_its_first_moment_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pulse, "BEAT_SECONDS", 0.01)
    ray_channel.open_channel(tmp_path)

    def pulse() -> Pulse:
        return ray_channel.read_pulses(tmp_path)[3]

    with ray_pulse.beating(tmp_path, 3, "node"):
        while not ray_channel.read_pulses(tmp_path):
            pass
        first = pulse()
        assert (first.node, first.process, first.waited) == ("node", os.getpid(), 0.0)
        monkeypatch.setattr(ray_pulse.waits, "since", ray_pulse.time.monotonic() - 50)
        while pulse().waited < 50:
            pass
        assert pulse().beat > first.beat


def test_only_a_process_of_ray_is_killed():
    others = [subprocess.Popen(["bash", "-c", f"exec -a {name} sleep 60"]) for name in ("ray::Worker", "other")]
    try:
        for process in others:
            while not (line := open(f"/proc/{process.pid}/cmdline").read()) or line.startswith("bash"):  # noqa: SIM115
                pass
            ray_nodes.kill_here(process.pid)
        assert others[0].wait(10) == -9
        assert others[1].poll() is None
    finally:
        for process in others:
            process.kill()
            process.wait()
