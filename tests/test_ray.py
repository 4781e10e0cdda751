"""The same pipeline on real Ray Train workers: the same bits, after a killed worker and after signals too."""

import io
import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray  # noqa: F401  as in a notebook, before any token is set: with that, too, our cluster asks for one

from spice_dist import cli, pipeline
from spice_dist.data.journal import RECORD
from spice_dist.distributed import (
    checkpoint,
    collectives,
    ray_channel,
    ray_elastic,
    ray_nodes,
    ray_pulse,
    ray_train,
)
from spice_dist.distributed.worker import StageCall, Worker
from spice_dist.errors import UserError
from spice_dist.stage_records import stage_record
from spice_dist.task import Task
from tests.chaos.runs import command_line, has_ended
from tests.test_cli import LONGER, PHOTO, command, photos, wait_for
from tests.test_outer_stages import slow_folder

SETTINGS = ["--workers", "2", *LONGER[2:]]
RESULTS = ("assignments.csv", "model/model.safetensors", "model/model.json", "duplicates.csv")


def training_workers() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if "TrainWorker" in command_line(each)]


def kill_a_worker_and_terminate(run: Path, stopped_at: int, done: list[str]) -> None:
    """SIGKILL a training worker once stage 1 has gone on, then SIGTERM this process once others have gone on."""
    wait_until(lambda: steps_done(run) > stopped_at)
    workers = training_workers()
    workers[-1].kill()
    done.append("killed")
    wait_until(lambda: len(now := training_workers()) == 2 and not {*now} & {*workers})
    started = time.time()
    wait_until(lambda: (run / ray_channel.PROGRESS).stat().st_mtime > started and steps_done(run) > stopped_at)
    os.kill(os.getpid(), signal.SIGTERM)
    done.append("terminated")


def steps_done(run: Path) -> int:
    progress = ray_channel.read_progress(run)
    return progress.done if progress and progress.stage == "moco" else -1


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "training did not go on"
        time.sleep(0.05)


def open_ports(processes: list[psutil.Process]) -> list[str]:
    """The addresses other than the loopback interface at which these processes listen."""
    sockets = [socket for process in processes for socket in process.net_connections("tcp")]
    listening = [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]
    assert listening
    return [address for address in listening if address not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]


@pytest.mark.timeout(480)  # starts Ray twice and workers three times
def test_signals_and_a_killed_worker_leave_the_bits_of_one_process(uninterrupted, tmp_path, capfd):
    out, temporary = tmp_path / "run", tempfile.mkdtemp(prefix="t-")  # pytest's names are too long for sockets
    arguments = ["fit", "digits", "--out", str(out), *SETTINGS]
    (Path(temporary) / "ray").touch()  # where Ray by itself would put its folder; another user's is in the way alike
    environment = {**os.environ, "TMPDIR": temporary}
    child = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, process_group=0, env=environment)
    try:
        wait_for(out / "moco/metrics.jsonl")
        family = psutil.Process(child.pid).children(recursive=True)
        called = [command_line(process) for process in family]
        assert len([name for name in called if name.startswith("ray::") and "Agent" not in name]) == 2 + 3
        training = [process for process, name in zip(family, called, strict=True) if "RayTrainWorker" in name]
        assert [process.nice() for process in training] == [0, 0], "beside other work they would starve"
        assert open_ports([process for process in family if process not in training]) == []
        assert len(open_ports(training)) == 1, "PyTorch's rendezvous"
        private = {path: stat.S_IMODE(path.stat().st_mode) for path in Path(temporary).iterdir() if path.is_dir()}
        assert set(private.values()) == {0o700}
        assert any((path / "ray/session_latest").exists() for path in private)
        os.killpg(child.pid, signal.SIGINT)  # a terminal sends it to every process of the group
        _, printed = child.communicate(timeout=90)
    finally:
        child.kill()
    assert child.returncode == 130
    assert "Traceback" not in printed
    stopped_at = int(max(path.name for path in (out / "moco/checkpoints").iterdir()))
    assert 0 < stopped_at < 8 * 7
    wait_until(lambda: all(map(has_ended, family)))
    # wandb, which Ray imports, makes folders at once
    assert [name for name in os.listdir(temporary) if "wandb" not in name] == ["ray"], "nothing of Ray is left"
    shutil.rmtree(temporary)

    done: list[str] = []
    killer = threading.Thread(target=kill_a_worker_and_terminate, args=(out, stopped_at, done), daemon=True)
    killer.start()
    (tmp_path / "file").touch()
    scratch = tmp_path / "file/below"  # where nothing can be written, as the workers say
    assert cli.main([*arguments, "--scratch", str(scratch)]) == 75
    assert done == ["killed", "terminated"]
    assert f"the images cannot be copied to {scratch}" in capfd.readouterr().err, "what a worker says reaches the user"
    assert int(max(path.name for path in (out / "moco/checkpoints").iterdir())) > stopped_at
    assert cli.main([*arguments, "--workers", "0"]) == 0
    assert (out / "assignments.csv").read_bytes() == uninterrupted
    assert not (out / ".ray").exists()


def kill_when(condition: Callable[[], bool], then: Callable[[], None] = lambda: None) -> threading.Thread:
    """SIGKILL the last training worker once the condition holds; call `then` when others have taken their place."""

    def kill() -> None:
        wait_until(condition)
        workers = training_workers()
        workers[-1].kill()
        wait_until(lambda: len(now := training_workers()) == len(workers) and not {*now} & {*workers})
        then()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


@pytest.mark.timeout(240)  # starts workers twice
def test_a_worker_killed_while_it_packs_costs_no_byte_and_what_is_stored_is_not_stored_again(tmp_path):
    images, pack = slow_folder(tmp_path / "in"), ["--size", "32", "--format", "raw"]
    assert cli.main(["pack", str(images), str(tmp_path / "one.beton"), *pack]) == 0
    working = tmp_path / ".two.beton.packing/data"
    before: dict[Path, int] = {}

    def finished_pieces() -> dict[Path, int]:
        records = working.glob(".pieces/*/*/records")
        return {path: path.stat().st_ino for path in records if path.stat().st_size == 64 * RECORD.itemsize}

    def some_are_finished() -> bool:
        before.update(finished_pieces())
        return len(before) > 1

    def go_on_with_them() -> None:
        wait_until(lambda: len(finished_pieces()) > len(before))
        assert before.items() <= finished_pieces().items(), "they are not stored again"

    killer = kill_when(some_are_finished, go_on_with_them)
    assert cli.main(["pack", str(images), str(tmp_path / "two.beton"), *pack, "--workers", "2"]) == 0
    killer.join(10)
    assert not killer.is_alive()
    for one in tmp_path.glob("one.beton*"):
        assert one.read_bytes() == one.with_name(one.name.replace("one", "two")).read_bytes(), one
    assert not working.parent.exists()


@pytest.mark.timeout(480)  # starts Ray once and workers twice
def test_workers_pack_and_evaluate_a_run_of_several_nodes_and_one_is_killed_in_evaluation(tmp_path, monkeypatch):
    photos(tmp_path / "in")
    (tmp_path / "in/upright/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    fit = ["fit", str(tmp_path / "in"), "--clusters", "3", "--recipe", "digits", *PHOTO]
    assert cli.main([*fit, "--out", str(tmp_path / "one")]) == 0
    monkeypatch.setattr(ray_nodes, "count", lambda: 2)  # so that workers pack
    monkeypatch.setattr(pipeline, "prepare", None)
    out = tmp_path / "two"

    def evaluating() -> bool:
        progress = ray_channel.read_progress(out)
        return progress is not None and progress.stage == "evaluate" and progress.total > 0

    killer = kill_when(evaluating)
    assert cli.main([*fit, "--out", str(out), "--workers", "2"]) == 0
    killer.join(10)
    assert not killer.is_alive()
    for path in (tmp_path / "one/data").iterdir():
        assert path.name == "stage.json" or path.read_bytes() == (out / "data" / path.name).read_bytes(), path
    for name in RESULTS:
        assert (tmp_path / "one" / name).read_bytes() == (out / name).read_bytes(), name
    metrics = [json.loads((run / "metrics.json").read_bytes()) for run in (tmp_path / "one", out)]
    assert metrics[0].pop("seconds").keys() == metrics[1].pop("seconds").keys()
    assert metrics[0] == metrics[1]


START = """
import signal, sys, time
import psutil
from spice_dist.distributed import ray_train
from spice_dist.terminal import StopSignal

with StopSignal() as stop, ray_train.session(None, num_cpus=1):
    print(stop.received, flush=True)
    print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(60)
"""


@pytest.mark.timeout(120)
def test_a_signal_while_ray_starts_is_kept_and_ray_ends_soon_after_a_killed_driver():
    temporary = tempfile.mkdtemp(prefix="t-")  # pytest's names are too long for sockets
    child = subprocess.Popen(
        [sys.executable, "-c", START],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": temporary},
    )
    assert child.stdout
    try:
        # Ray's first process; importing may start others, before signals are taken
        wait_until(lambda: any("gcs_server" in command_line(each) for each in psutil.Process(child.pid).children()))
        while not select.select([child.stdout], [], [], 0.5)[0]:
            assert child.poll() is None, "the signal has ended the process"
            child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == f"{int(signal.SIGTERM)}\n"
        family = [psutil.Process(int(pid)) for pid in child.stdout.readline().split()]
        child.send_signal(signal.SIGTERM)
        time.sleep(4)  # an alarm of Ray's native handler would end it after three seconds
        assert child.poll() is None
        assert any("Agent" in command_line(process) for process in family)
    finally:
        child.kill()
        child.communicate()
    began = time.monotonic()
    wait_until(lambda: all(map(has_ended, family)))
    assert time.monotonic() - began < 20
    wait_until(lambda: not list(Path(temporary).glob("spice-*")))  # also that of the token
    shutil.rmtree(temporary)


@pytest.mark.slow  # the others wait for the killer
@pytest.mark.timeout(480)
def test_a_worker_that_is_stopped_in_training_is_named_and_killed_and_the_run_leaves_the_same_bits(
    uninterrupted, tmp_path, monkeypatch, capfd
):
    """Without the watchdog the other worker would wait for ten minutes, and no line would name anybody."""
    monkeypatch.setattr(ray_pulse, "SILENT_SECONDS", 12.0)
    monkeypatch.setattr(ray_pulse, "KILL_SECONDS", 20.0)
    out, stopped = tmp_path / "run", []

    def stop_one() -> None:
        wait_until(lambda: steps_done(out) > 5)
        pulse = ray_channel.read_pulses(out)[1]
        os.kill(pulse.process, signal.SIGSTOP)
        stopped.append((pulse.process, time.monotonic()))

    threading.Thread(target=stop_one, daemon=True).start()
    assert cli.main(["fit", "digits", "--out", str(out), *SETTINGS]) == 0
    ((process, at),) = stopped
    assert time.monotonic() - at < 200
    said = capfd.readouterr().err
    assert f"worker 1 (process {process} on {socket.gethostname()}) has shown no sign of life for " in said
    assert f"worker 1 (process {process} on {socket.gethostname()}) is killed, since the others wait for it" in said
    assert (out / "assignments.csv").read_bytes() == uninterrupted


POINTS = ("start", "ray", "data", "moco", "features", "spice_self", "reliable", "spice_semi", "evaluate", "report")
SIGNALS = ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130))


def has_reached(run: Path, printed: Path, point: str) -> bool:
    said = printed.read_text()
    progress = ray_channel.read_progress(run)
    return {
        "start": "loading torch" in said,
        "ray": "starting Ray" in said,
        "data": "starting Ray" in said and (run / "data/stage.json").exists(),
        "evaluate": (run / "spice_semi/stage.json").exists() and (stage_record(run, "spice_semi") or {})["done"],
        "report": (run / "metrics.json").exists(),
    }.get(point, progress is not None and progress.stage == point)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("number", "code"), SIGNALS, ids=["term", "usr1", "int"])
def test_every_signal_at_every_point_of_a_run_on_ray_can_be_gone_on_from(uninterrupted, tmp_path, point, number, code):
    out, printed = tmp_path / "run", tmp_path / "printed"
    arguments = ["fit", "digits", "--out", str(out), *SETTINGS]
    with printed.open("w") as file:
        child = subprocess.Popen(command(*arguments), stdout=file, stderr=file)
    try:
        wait_until(lambda: has_reached(out, printed, point), 400)
        assert child.poll() is None, "it has ended before"
        child.send_signal(number)
        began = time.monotonic()
        assert child.wait(150) == code
        assert time.monotonic() - began < 60
    finally:
        child.kill()
    assert "Traceback" not in printed.read_text()
    assert cli.main([*arguments, "--workers", "0"]) == 0
    assert (out / "assignments.csv").read_bytes() == uninterrupted


def test_a_worker_that_hangs_as_its_cluster_ends_is_killed_and_no_other_process_is(monkeypatch):
    monkeypatch.setattr(ray_train, "ENDING_SECONDS", 0.2)
    hung, other = (subprocess.Popen(["bash", "-c", f"exec -a {name} sleep 60"]) for name in ("ray::Hung", "other"))
    try:
        deadline = time.monotonic() + 20
        while not (workers := ray_train._worker_processes()):
            assert time.monotonic() < deadline
        ray_train._end(workers)
        assert hung.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        hung.kill()
        other.kill()


def late(_task: Task, _config: None, worker: Worker) -> None:
    """A stage whose first worker needs longer than the other to write what it leaves."""
    if worker.rank == 0:
        time.sleep(1)
        checkpoint.save(worker.run / "late/checkpoints", 7, {}, {"total": 7})
        warnings.warn("written late", stacklevel=1)


def looked(_task: Task, name: str, worker: Worker) -> None:
    """A stage in which every worker notes who it is and whether it finds what the stage before left."""
    found = checkpoint.newest_step(worker.run / "late/checkpoints")
    (worker.run / f"{name}.{worker.rank}").write_text(f"{found} {worker.world} {collectives.alone()} {os.getpid()}")
    time.sleep(1)  # the other worker must not end the stage
    worker.progress(1, 1, None)


def asking(_task: Task, _config: None, worker: Worker) -> None:
    """A stage that is through when it learns that all shall stop."""
    (worker.run / ray_channel.STOP).touch()


def refused(_task: Task, _config: None, worker: Worker) -> None:
    """A stage at whose end the first worker cannot write what it leaves."""
    if worker.rank == 0:
        raise UserError("no room")


@pytest.fixture
def terminated():
    """The SIGTERMs that this process got."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


@pytest.mark.timeout(240)
def test_one_group_goes_through_all_stages_and_each_begins_when_the_first_worker_has_left_the_one_before(
    tmp_path, terminated
):
    stages = (
        StageCall("late", late, Task(), None),
        StageCall("together", looked, Task(), "together"),
        StageCall("single", looked, Task(), "single", shared=False),
        StageCall("after", looked, Task(), "after"),
        StageCall("refused", refused, Task(), None),
    )
    shown: list[ray_channel.Progress] = []
    said: list[str] = []
    job = ray_train.Job(stages, tmp_path, 1, lambda: False, shown.append, said.append)
    with ray_train.session(None, num_cpus=2):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(UserError, match="no room"):
            ray_elastic.train(job, (2,))
        waited = time.time() - (tmp_path / "after.0").stat().st_mtime
        assert waited < 120, "the other worker must not wait for its collective to time out"
        assert list(dict.fromkeys(progress.stage for progress in shown))[:4] == [stage.name for stage in stages[:4]]
        stopped = replace(
            job, stages=(StageCall("asking", asking, Task(), None), StageCall("never", looked, Task(), "never"))
        )
        assert not ray_train.run_group(stopped, 2)
        assert shown[-1].stage == "never", "the stage before is done"
    os.kill(os.getpid(), signal.SIGTERM)
    assert terminated == [signal.SIGTERM] * 2, "in the session and after it"
    notes = {path.name: path.read_text().split() for path in tmp_path.glob("*.[01]")}
    processes = {notes[f"together.{rank}"][3] for rank in (0, 1)}
    assert notes.keys() == {"together.0", "together.1", "single.0", "after.0", "after.1"}
    assert {tuple(notes[name][:3]) for name in notes if name != "single.0"} == {("7", "2", "False")}
    assert notes["single.0"][:3] == ["7", "1", "True"]
    assert {note[3] for note in notes.values()} == processes
    assert [line for line in said if "written late" in line]


def test_what_workers_say_is_passed_on_once_in_whole_lines_whatever_the_bytes(tmp_path):
    said: list[str] = []
    messages = tmp_path / ray_channel.MESSAGES
    messages.parent.mkdir()
    messages.write_bytes(b"one\n\xff two\nha")
    position = ray_channel.pass_on_messages(tmp_path, 0, said.append)
    assert said == ["one", "\ufffd two"]
    with messages.open("ab") as file:
        file.write(b"lf\n")
    assert ray_channel.pass_on_messages(tmp_path, position, said.append) == messages.stat().st_size
    assert said[2:] == ["half"]


@pytest.mark.parametrize("kind", [ray_channel.LossyFile, io.FileIO])
def test_a_full_disk_costs_what_a_worker_says_and_not_the_worker(kind):
    full = io.BufferedWriter(kind("/dev/full", "a"))
    outcome = pytest.raises(OSError, match="No space") if kind is io.FileIO else nullcontext()
    with outcome, io.TextIOWrapper(full, line_buffering=True) as file:
        print("a line", file=file)


def test_a_node_that_does_not_see_the_last_checkpoint_fails_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "STALE_SECONDS", 0.0)
    ray_train._wait_to_see(-1, tmp_path)
    with pytest.raises(TimeoutError, match="step 7"):
        ray_train._wait_to_see(7, tmp_path)


@pytest.mark.parametrize("first", ["", "import ray"])  # as in a notebook
def test_outside_a_session_ray_starts_no_cluster_by_itself(first):
    code = f"""
{first}
from spice_dist.distributed import ray_train
ray_train.prepare(None)
import ray
try:
    ray.put(1)
except Exception as error:
    print(type(error).__name__, ray.is_initialized())
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_AUTO_CONNECT"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["RaySystemError", "False"]


def test_no_cluster_at_the_address_is_one_line(tmp_path, capfd):
    arguments = ["fit", "digits", "--out", str(tmp_path / "run"), *SETTINGS]
    assert cli.main([*arguments, "--address", "127.0.0.1:1"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("spice-dist:")]
    assert len(lines) == 1
    assert "127.0.0.1:1" in lines[0]
