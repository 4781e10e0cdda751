"""What a worker saves, when it stops, what it writes down, and that a full disk costs as little as possible."""

import json
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spice_dist.data import augment
from spice_dist.distributed import checkpoint, setbacks
from spice_dist.distributed.checkpoint import Tensors
from spice_dist.distributed.metric_log import MetricLog
from spice_dist.distributed.worker import (
    NOT_FINITE,
    History,
    LocalWorker,
    StageCall,
    Storage,
    Worker,
    interval,
)
from spice_dist.errors import Interrupted, NotFinite, UserError
from spice_dist.task import Task

CPU = torch.device("cpu")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "moco/checkpoints").glob("*"))


def weights(value: float, count: int = 4) -> Callable[[], Tensors]:
    return lambda: {"net": {"w": torch.full((count,), value)}}


def loss(value: float) -> Tensor:
    return torch.tensor(value)


def settle(worker: LocalWorker) -> None:
    """Wait for the checkpoint in flight; whether it was written is the worker's to tell."""
    while worker.writer.busy:
        time.sleep(0.001)


def saved_names(run: Path) -> list[str]:
    return [name for name in saved(run) if not name.startswith(".")]


def started(run: Path, **options: Any) -> LocalWorker:
    worker = LocalWorker(run, "moco", CPU, **options)
    worker.resume()
    return worker


@contextmanager
def no_room_for_more_than(size: int) -> Iterator[None]:
    """A file that would grow beyond `size` bytes fails as on a full disk (with EFBIG: needs no small disk, no root)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_resumed_log_keeps_the_lines_up_to_its_step(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step in (10, 20, 30, 40):
        log.write(step, {"loss": step / 10})
    log = MetricLog(tmp_path, 25)
    assert lines(tmp_path) == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}]
    log.write(30, {"loss": 9.0})
    assert steps(tmp_path) == [10, 20, 30]
    MetricLog(tmp_path, 0)
    assert steps(tmp_path) == []


TAILS = [
    *(b'{"step": 20, "lo', b'{"step": 20}', b"\0" * 30, b"\0" * 30 + b"\n", b"\xff\xfe\n"),
    *(b"[3]\n", b"7\n", b'{"step": null}\n'),
]


@pytest.mark.parametrize("tail", TAILS)
def test_what_a_killed_writer_tore_is_dropped_and_the_next_line_stands_alone(tmp_path, tail):
    MetricLog(tmp_path, 0).write(10, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    MetricLog(tmp_path, 20).write(30, {"loss": 3.0})
    assert lines(tmp_path) == [{"step": 10, "loss": 1.0}, {"step": 30, "loss": 3.0}]


def test_a_damaged_line_in_the_middle_costs_only_itself_and_steps_strictly_rise(tmp_path):
    rows = ['{"step": 10}', '{"step": 2', '{"step": 20}', '{"step": 20}', '{"step": 15}', '{"step": 30}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    MetricLog(tmp_path, 30)
    assert steps(tmp_path) == [10, 20, 30]


def test_appending_without_truncation_would_repeat_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("spice_dist.distributed.metric_log._lines_up_to", lambda step, text: iter([text]))
    for _ in range(2):
        MetricLog(tmp_path, 0).write(10, {"loss": 1.0})
    assert steps(tmp_path) == [10, 10]


def test_tensorboard_reads_the_same_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    log = MetricLog(tmp_path, 7)
    log.write(8, {"loss": 1.5, "select_loss": 0.25})
    log.write(9, {"loss": 2.5})
    (path,) = tmp_path.glob("*tfevents*")
    raw, events = path.read_bytes(), []
    while raw:  # a record is its length, a checksum of that, the event, a checksum
        length = int.from_bytes(raw[:8], "little")
        events.append(Event.FromString(raw[12 : 12 + length]))
        raw = raw[16 + length :]
    assert [event.session_log.status for event in events if event.HasField("session_log")] == [1]  # start: drops from
    assert [event.step for event in events if event.HasField("session_log")] == [8]
    found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert found == [(8, "loss", 1.5), (8, "select_loss", 0.25), (9, "loss", 2.5)]


def test_a_full_disk_costs_lines_of_the_log_and_tears_none(tmp_path):
    log = MetricLog(tmp_path, 0)
    log.write(1, {"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    for step in range(2, 40):  # far more than any queue of events holds
        with no_room_for_more_than(size + 9), pytest.warns(UserWarning, match=f"no metrics at step {step} "):
            log.write(step, {"loss": 2.0})
    assert steps(tmp_path) == [1]
    log.write(40, {"loss": 3.0})
    assert steps(tmp_path) == [1, 40]


def test_without_cutting_back_a_full_disk_would_tear_a_line(tmp_path, monkeypatch):
    log = MetricLog(tmp_path, 0)
    monkeypatch.setattr("spice_dist.distributed.metric_log.os.truncate", lambda *_: None)
    with no_room_for_more_than(9), pytest.warns(UserWarning, match="no metrics"):
        log.write(1, {"loss": 2.0})
    log.write(2, {"loss": 3.0})
    with pytest.raises(ValueError, match="JSON|delimiter|Extra"):
        lines(tmp_path)


def test_the_last_step_is_saved_and_resume_returns_the_newest(tmp_path):
    worker = LocalWorker(tmp_path, "moco", CPU)
    assert isinstance(worker, Worker)
    assert worker.resume() is None
    for step in (1, 2, 3):
        worker.report(step, 3, loss(1.0), weights(step))
    assert saved(tmp_path) == ["000000003"]
    found = LocalWorker(tmp_path, "moco", CPU).resume()
    assert found is not None
    assert (found.step, found.state["total"]) == (3, 3)
    assert found.tensors("net")["w"].tolist() == [3.0] * 4


def test_asked_to_stop_it_saves_this_step_and_raises_interrupted(tmp_path):
    wish = [False]
    worker = started(tmp_path, stop_requested=lambda: wish[0])
    worker.report(1, 9, loss(1.0), weights(1))
    wish[0] = True
    with pytest.raises(Interrupted):
        worker.report(2, 9, loss(1.0), weights(2))
    assert saved(tmp_path) == ["000000002"]


def test_asked_to_stop_at_the_last_step_it_is_simply_done(tmp_path):
    worker = started(tmp_path, stop_requested=lambda: True)
    worker.report(9, 9, loss(1.0), weights(9))
    assert saved(tmp_path) == ["000000009"]


def test_it_saves_when_the_clock_says_so_and_only_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("spice_dist.distributed.worker.time.monotonic", lambda: now[0])
    worker = started(tmp_path, storage=Storage(checkpoint_seconds=60))
    at = []
    for step in range(1, 20):
        now[0] += 25.0
        monkeypatch.setattr("spice_dist.distributed.worker.time.time", lambda step=step: 1e9 * (-1) ** step)  # unused
        worker.report(step, 100, loss(1.0), lambda step=step: at.append(step) or weights(step)())
        settle(worker)
    assert at == [3, 6, 9, 12, 15, 18]  # more than 60 s after the one before
    assert saved(tmp_path) == ["000000015", "000000018"]


def test_resume_sweeps_up_what_a_killed_save_left(tmp_path):
    started(tmp_path).report(1, 1, loss(1.0), weights(1))
    (tmp_path / "moco/checkpoints/.000000002.12ab").mkdir()
    worker = LocalWorker(tmp_path, "moco", CPU)
    worker.rank = 1  # only the first worker may: it is the one that saves
    worker.resume()
    assert ".000000002.12ab" in saved(tmp_path)
    started(tmp_path)
    assert saved(tmp_path) == ["000000001"]


def test_a_damaged_newest_checkpoint_takes_the_metrics_back_with_it(tmp_path):
    wish = [True]
    for step in (1, 2):
        worker = started(tmp_path, stop_requested=lambda: wish[0])
        with pytest.raises(Interrupted):
            worker.report(step, 50, loss(step), weights(step))
    (tmp_path / "moco/checkpoints/000000002/net.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="set aside"):
        found = LocalWorker(tmp_path, "moco", CPU).resume()
    assert found is not None
    assert found.step == 1
    assert steps(tmp_path / "moco") == [1]


def test_checkpoints_are_as_far_apart_as_asked_for(tmp_path, monkeypatch):
    """By a clock that moves a second per step: after every 25th second, and at the end."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    worker = started(tmp_path, storage=Storage(checkpoint_seconds=25))
    kept = []
    for step in range(1, 101):
        now += 1
        worker.report(step, 100, loss(1.0), weights(step))
        settle(worker)
        kept += saved(tmp_path)[-1:]
    assert sorted({int(name) for name in kept}) == [26, 52, 78, 100]


def test_no_time_between_checkpoints_is_a_mistake():
    with pytest.raises(UserError, match="--checkpoint-seconds is 0; it must be above 0"):
        Storage(checkpoint_seconds=0)


def test_a_full_disk_in_the_middle_warns_and_training_goes_on(tmp_path):
    worker = started(tmp_path)
    worker.checkpoint_seconds = -1.0
    worker.report(1, 200, loss(1.0), weights(1))
    settle(worker)
    with no_room_for_more_than(2000):
        worker.report(2, 200, loss(1.0), weights(2, 10_000))
        settle(worker)
        with pytest.warns(UserWarning, match="no checkpoint at step 2 .*goes on"):
            worker.report(3, 200, loss(1.0), weights(3, 10_000))
        settle(worker)
    assert saved(tmp_path) == ["000000001"]
    with pytest.warns(UserWarning, match="no checkpoint at step 3 "):
        worker.report(4, 200, loss(1.0), weights(4, 10_000))
    settle(worker)
    assert saved(tmp_path) == ["000000001", "000000004"]


def test_a_full_disk_at_the_end_is_a_mistake_told_in_one_line(tmp_path):
    worker = started(tmp_path)
    message = rf"^cannot save {tmp_path}/moco/checkpoints: [^\n]+; make room, then run the same command again$"
    with no_room_for_more_than(2000), pytest.raises(UserError, match=message):
        worker.report(5, 5, loss(1.0), weights(5, 10_000))


def test_every_worker_learns_that_the_first_could_not_save(tmp_path, monkeypatch):
    """Nobody is left waiting for a worker that has given up."""
    monkeypatch.setattr("spice_dist.distributed.collectives.largest_int", lambda value, device: 1)
    worker = LocalWorker(tmp_path, "moco", CPU)
    worker.rank = 1
    with pytest.raises(UserError, match="the first worker says why"):
        worker.report(5, 5, loss(1.0), weights(5))


def test_a_full_disk_when_asked_to_stop_does_not_claim_that_the_state_is_saved(tmp_path):
    worker = started(tmp_path, stop_requested=lambda: True)
    with no_room_for_more_than(2000), pytest.raises(UserError, match="make room"):
        worker.report(2, 5, loss(1.0), weights(2, 10_000))


def test_a_slow_disk_holds_no_step_and_one_checkpoint_is_in_flight(tmp_path, monkeypatch):
    """The disk takes as long as the test wants: five steps end meanwhile, and none begins a second checkpoint."""
    free, begun, write = threading.Event(), [], checkpoint._write_tensors

    def slowly(path: Path, tensors: dict[str, Tensor]) -> None:
        begun.append(path)
        assert free.wait(60)
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "_write_tensors", slowly)
    worker = started(tmp_path)
    worker.checkpoint_seconds = -1.0
    for step in range(1, 6):
        worker.report(step, 100, loss(1.0), weights(step))
    assert saved_names(tmp_path) == []
    free.set()
    settle(worker)
    assert saved_names(tmp_path) == ["000000001"]
    assert len(begun) == 1


def test_what_training_changes_while_a_checkpoint_is_written_is_not_in_it(tmp_path, monkeypatch):
    free, write = threading.Event(), checkpoint._write_tensors
    monkeypatch.setattr(checkpoint, "_write_tensors", lambda *given: free.wait(60) and write(*given))
    state = torch.arange(4.0)
    writer = checkpoint.Writer(tmp_path, "")
    writer.start(1, {"net": {"w": state}}, {"total": 2})
    state += 100
    free.set()
    assert writer.wait() is None
    assert checkpoint.load(tmp_path / "000000001").tensors("net")["w"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_state_that_holds_what_is_no_number_is_not_saved(tmp_path):
    writer = checkpoint.Writer(tmp_path, "")
    writer.start(1, {"net": {"w": torch.tensor([1.0, torch.nan])}}, {})
    assert isinstance(writer.wait(), ValueError)
    writer.start(2, {"net": {"loss": torch.tensor([torch.inf])}}, {})  # of a head that has none yet
    assert writer.wait() is None
    assert [path.name for path in tmp_path.glob("*")] == ["000000002"]


def test_the_time_between_checkpoints_loses_least():
    """Young 1974: saving costs `saving` / T of the time, a failure T / 2 of work every M seconds."""
    for saving, between in ((2.0, 10800.0), (30.0, 600.0)):
        lost = {t: saving / t + t / (2 * between) for t in np.linspace(5, 2000, 20_000)}
        assert interval(saving, between) == pytest.approx(min(lost, key=lost.__getitem__), rel=1e-2)
    assert (interval(None, 1.0), interval(1e-6, 1.0)) == (60.0, 10.0)


def test_a_stage_that_was_cut_off_saves_more_often_and_one_that_was_stopped_does_not(tmp_path):
    cut = History().after(100.0, stopped=False).resumed()
    assert cut.failures == 1
    assert cut.between_failures(0.0) == (3 * 3600 + 100) / 2
    assert History().after(100.0, stopped=True).resumed().failures == 0
    worker = started(tmp_path)
    worker.checkpoint_seconds = -1.0
    worker.report(1, 9, loss(1.0), weights(1))
    settle(worker)
    assert started(tmp_path).history.failures == 1


class Poison:
    """Training whose loss is no number at one step: the first `times` times, and only above a rate of `limit`."""

    def __init__(self, times: int, limit: float = 0.0):
        self.left, self.limit = times, limit
        self.weights = torch.zeros(1)

    def train(self, task: Any, config: Any, worker: Any) -> None:
        found = worker.resume()
        self.weights = found.tensors("net")["w"] if found else torch.zeros(1)
        for step in range(found.step if found else 0, 6):
            if worker.leaves_out(step):
                continue
            bad = step == 3 and self.left > 0 and config.lr > self.limit
            self.left -= bad
            self.weights = self.weights + (torch.nan if bad else config.lr * 2.0**step)
            worker.report(step + 1, 6, self.weights.sum(), lambda: {"net": {"w": self.weights}})


@dataclass(frozen=True)
class Rate:
    lr: float = 1.0


def poisoned(tmp_path: Path, poison: Poison) -> LocalWorker:
    worker = LocalWorker(tmp_path, "moco", CPU)
    StageCall("moco", poison.train, Task(), Rate()).run(worker, 1)
    return worker


def test_a_step_whose_loss_is_no_number_is_left_out(tmp_path, capsys):
    poison = Poison(times=1)
    poisoned(tmp_path, poison)
    assert poison.weights.item() == 1 + 2 + 4 + 16 + 32  # all but the fourth
    assert "loss of moco is not finite at step 4: it goes back to its last checkpoint, and on without that step" in (
        capsys.readouterr().err
    )


class Heads(Poison):
    """A loop that cannot leave a step out."""

    def train(self, task: Any, config: Any, worker: Any) -> None:
        worker.resume()
        for step in range(6):
            bad = step == 3 and self.left > 0 and config.lr > self.limit
            self.left -= bad
            self.weights = torch.tensor([torch.nan if bad else config.lr])
            worker.report(step + 1, 6, self.weights.sum(), lambda: {"net": {"w": self.weights}})


def test_the_second_time_the_rate_is_lowered_and_stays_so_when_resumed(tmp_path, capsys):
    heads = Heads(times=9, limit=0.5)
    poisoned(tmp_path, heads)
    assert heads.weights.item() == pytest.approx(0.1)
    assert "and on with 0.1 times its rate" in capsys.readouterr().err
    again = Heads(times=9, limit=0.5)
    poisoned(tmp_path, again)
    assert again.left == 9, "the full rate was not tried again"


def test_the_third_time_it_stops_and_every_later_call_too(tmp_path):
    for _ in range(2):
        with pytest.raises(NotFinite, match="the loss of moco is not finite at step 4"):
            poisoned(tmp_path, Heads(times=9))
    assert setbacks.gave_up(tmp_path / "moco")
    assert saved(tmp_path) == []


def test_workers_agree_on_the_first_step_that_was_not_finite(tmp_path, monkeypatch):
    """The other worker's wish and step come by `largest_int`, as they would from a process of its own."""
    other = iter([NOT_FINITE, 9 - 2])  # its loss was no number at step 2 of 9
    monkeypatch.setattr("spice_dist.distributed.collectives.largest_int", lambda value, device: max(value, next(other)))
    worker = started(tmp_path)
    with pytest.raises(NotFinite, match="at step 2") as raised:
        worker.report(3, 9, loss(1.0), weights(3))
    assert (raised.value.step, raised.value.total) == (2, 9)


def test_a_line_holds_the_means_since_the_line_before(tmp_path):
    worker = started(tmp_path)
    for step in range(1, 301):  # a line every third step
        worker.report(step, 300, torch.tensor(float(step)), weights(0), {"extra": torch.tensor(step % 3)})
    expected = [{"step": s, "extra": 1.0, "loss": s - 1.0} for s in range(3, 301, 3)]
    assert lines(tmp_path / "moco") == expected


def test_a_short_stage_has_a_line_for_every_step(tmp_path):
    worker = started(tmp_path)
    for step in (1, 2, 3):
        worker.report(step, 3, loss(step), weights(0))
    assert lines(tmp_path / "moco") == [{"step": s, "loss": float(s)} for s in (1, 2, 3)]


def test_reported_metrics_are_neither_changed_nor_kept_in_the_graph(tmp_path):
    worker = started(tmp_path)
    first = torch.tensor(1.0, requires_grad=True)
    value = first * 2
    for step in (1, 2):
        worker.report(step, 1000, value, weights(0))
    assert value.item() == 2.0
    assert not worker.sums["loss"].requires_grad


def test_progress_is_shown_at_most_twice_a_second_and_at_the_end(tmp_path, monkeypatch):
    now, shown = [0.0], []
    monkeypatch.setattr("spice_dist.distributed.worker.time.monotonic", lambda: now[0])
    worker = started(tmp_path, progress=lambda step, total, value: shown.append((step, total, value)))
    for step in range(1, 31):
        now[0] += 0.125
        worker.report(step, 30, loss(step), weights(0))
    assert [step for step, _, _ in shown] == [5, 10, 15, 20, 25, 30]
    assert shown[-1] == (30, 30, 30.0)


def test_every_report_is_passed_on_with_the_state_at_its_step(tmp_path):
    seen: list[tuple[int, int, float, float]] = []

    def on_report(step: int, total: int, value: Tensor, save: Callable[[], Tensors]) -> None:
        seen.append((step, total, float(value), float(save()["net"]["w"][0])))

    worker = started(tmp_path, on_report=on_report)
    for step in (1, 2):
        worker.report(step, 2, loss(2.0 * step), weights(step))
    assert seen == [(1, 2, 2.0, 1.0), (2, 2, 4.0, 2.0)]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_stage_looks_for_the_fastest_kernels_and_compiles_views_if_asked(tmp_path, wanted):
    seen: list[tuple[bool, bool]] = []

    def look(task: Task, config: None, worker: Worker) -> None:
        seen.append((torch.backends.cudnn.benchmark, augment._compiles))
        raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        StageCall("looks", look, Task(compile_views=wanted), None).run(started(tmp_path), 1)
    assert seen == [(True, wanted)]
    assert not torch.backends.cudnn.benchmark, "other programs that use this process keep their setting"
