"""Whom the workers wait for: measured on two real processes over gloo, one of which is held up in every step."""

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

from spice_dist.distributed import pace
from spice_dist.distributed.pace import Pace
from tests.methods.workers import GlooWorker

STEPS, QUICK, HELD_UP = 60, 0.01, 0.05  # seconds of work in a step


def train(rank: int, folder: str, seconds: tuple[float, float]) -> None:
    """A loop of work, a backward pass and a report; leaves what was said and how long the process waited."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    pace.SECONDS = 0.4
    waited = pace.Waits.take
    total: list[float] = []
    pace.Waits.take = lambda waits: total.append(waited(waits)) or total[-1]  # type: ignore[method-assign]
    worker = GlooWorker(Path(folder), "moco")
    module = worker.wrap(nn.Linear(4, 4))
    with open(f"{folder}/said.{rank}", "w") as said, contextlib.redirect_stderr(said):
        worker.resume()
        for step in range(1, STEPS + 1):
            time.sleep(seconds[rank])
            loss = module(torch.ones(2, 4)).square().mean()
            loss.backward()
            worker.report(step, STEPS, loss.detach(), dict)
    pace.waits.take()
    Path(folder, f"waited.{rank}").write_text(str(sum(total)))
    dist.barrier()
    os._exit(0)  # not through the teardown of gloo's threads, which now and then aborts an idle process


@pytest.mark.parametrize(
    ("seconds", "named"), [((QUICK, HELD_UP), 1), ((HELD_UP, QUICK), 0), ((HELD_UP, HELD_UP), None)]
)
def test_the_worker_that_the_others_wait_for_is_named_once_with_its_share(tmp_path, seconds, named):
    start_processes(train, (str(tmp_path), seconds), 2, start_method="forkserver")
    said = (tmp_path / "said.0").read_text().splitlines()
    assert (tmp_path / "said.1").read_text() == ""
    if named is None:
        assert said == []
        return
    (line,) = said
    assert line.startswith(f"worker {named} on {socket.gethostname()} is the slowest in moco: it works for ")
    waited = float((tmp_path / f"waited.{1 - named}").read_text())
    assert waited > 0.9 * STEPS * (HELD_UP - QUICK), "the wait for its gradients is counted"
    own = float((tmp_path / f"waited.{named}").read_text())
    assert own < 0.5 * waited


def test_a_worker_is_slow_only_at_two_looks_in_a_row_and_named_once():
    looks = Pace()
    even, second, first = [0.5, 0.5], [0.5, 0.9], [0.9, 0.5]
    named = [looks.slowest(shares) for shares in (even, second, even, second, first, first, first)]
    assert named == [None, None, None, None, None, 0, None]


class Event:
    """Of a GPU: has passed once its time has come."""

    now = 0.0

    def __init__(self, at: float):
        self.at = at

    def query(self) -> bool:
        return self.at <= Event.now

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at)


def test_waits_on_a_gpu_are_read_only_once_they_have_passed(monkeypatch):
    waits, times = pace.Waits(), iter([1.0, 2.0, 4.0, 7.0])
    monkeypatch.setattr(pace, "_event", lambda: Event(next(times)))
    for _ in range(2):
        with waits.during(torch.device("cuda")):
            assert waits.since is not None
    taken = []
    for Event.now in (1.5, 2.0, 7.0):
        taken.append(waits.take())
    assert taken == [0.0, 1.0, 3.0]
    assert waits.since is None
