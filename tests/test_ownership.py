"""One live process owns a run folder, a dead one never blocks it, and what no longer fits is refused."""

import itertools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from spice_dist import ownership
from spice_dist.errors import DamagedFile, UserError
from spice_dist.ownership import OWNER, owned
from spice_dist.stage_records import refuse_changes, stage_record, write_stage_record

HOLDER = """
import sys
from pathlib import Path
from spice_dist.ownership import owned

with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(run: Path) -> Iterator[subprocess.Popen]:
    """Owns the folder until the block ends, unless it is killed before."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == "owned\n"
        yield child
        if child.stdin:
            child.stdin.close()


def left(run: Path) -> list[str]:
    return [path.name for path in run.iterdir()]


def identity(**changed: object) -> dict[str, Any]:
    """This process as it would write itself down, with changes."""
    return {**ownership._identity(), "beat": "000000000", **changed}


def write_owner(run: Path, content: dict[str, Any] | str | bytes) -> None:
    raw = json.dumps(content) if isinstance(content, dict) else content
    (run / OWNER).write_bytes(raw.encode() if isinstance(raw, str) else raw)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(ownership, "WRITING_SECONDS", 0.1)


def test_the_owner_file_says_who_and_is_gone_at_the_end(tmp_path):
    run = tmp_path / "a" / "b"
    with owned(run):
        holder = json.loads((run / OWNER).read_bytes())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        assert left(run) == [OWNER]
    assert left(run) == []
    with pytest.raises(ZeroDivisionError), owned(run):
        _ = 1 / 0
    assert left(run) == []


def test_a_second_live_process_is_refused_and_the_first_is_named(tmp_path):
    with another_process(tmp_path) as first:
        message = f"in use by process {first.pid} on {re.escape(socket.gethostname())}"
        with pytest.raises(UserError, match=message), owned(tmp_path):
            pass
        assert json.loads((tmp_path / OWNER).read_bytes())["pid"] == first.pid
    assert first.returncode == 0
    assert left(tmp_path) == []


def test_the_same_process_is_refused_a_second_time(tmp_path):
    with owned(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), owned(tmp_path):
        pass


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_is_taken_over_even_while_it_is_a_zombie(tmp_path, reaped):
    with another_process(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        if reaped:
            first.wait()
        else:
            while psutil.Process(first.pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        with owned(tmp_path):
            assert left(tmp_path) == [OWNER]
    assert left(tmp_path) == []


def test_if_the_dead_were_thought_alive_a_killed_owner_would_block_the_folder(tmp_path, monkeypatch):
    with another_process(tmp_path) as first:
        first.kill()
        first.wait()
    monkeypatch.setattr(ownership, "_alive", lambda *_: True)
    with pytest.raises(UserError, match="in use"), owned(tmp_path):
        pass


TORN = [
    *("", "{", '{"host": "x", "pid', "null", "[]", "7", "{}", "\0" * 40, b"\xff\xfe"),
    *(identity(pid="7"), identity(token="../../x"), identity(started=None), identity(host=None), identity(beat=3)),
]


@pytest.mark.parametrize("content", TORN)
def test_an_unreadable_owner_file_is_taken_over(tmp_path, brief, content):
    write_owner(tmp_path, content)
    with owned(tmp_path):
        assert json.loads((tmp_path / OWNER).read_bytes())["pid"] == os.getpid()
        assert left(tmp_path) == [OWNER]
    assert left(tmp_path) == []


def test_an_owner_that_is_just_writing_its_file_is_waited_for(tmp_path):
    write_owner(tmp_path, "")
    writer = threading.Timer(0.2, lambda: write_owner(tmp_path, identity()))
    writer.start()
    with pytest.raises(UserError, match="in use"), owned(tmp_path):
        pass
    writer.join()


def test_without_waiting_a_file_being_written_would_be_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "WRITING_SECONDS", 0.0)
    write_owner(tmp_path, "")
    with owned(tmp_path):
        pass


def test_a_process_id_that_another_process_got_is_taken_over(tmp_path):
    me = identity()
    write_owner(tmp_path, {**me, "started": me["started"] - 60})
    with owned(tmp_path):
        pass
    write_owner(tmp_path, me)
    with pytest.raises(UserError, match="in use"), owned(tmp_path):
        pass


def test_setting_the_clock_does_not_make_a_live_owner_look_dead(tmp_path, monkeypatch):
    before = psutil._psplatform.boot_time()  # pyright: ignore[reportAttributeAccessIssue]
    with another_process(tmp_path):
        for shift in (-86400, 86400):
            monkeypatch.setattr(psutil._psplatform, "boot_time", lambda shift=shift: before + shift)  # pyright: ignore[reportAttributeAccessIssue]
            monkeypatch.setattr(time, "time", lambda shift=shift: 1.7e9 + shift)
            with pytest.raises(UserError, match="in use"), owned(tmp_path):
                pass


@pytest.mark.usefixtures("brief")
def test_an_owner_elsewhere_is_refused_while_its_heartbeat_moves_and_taken_over_when_it_stops(tmp_path):
    elsewhere = identity(machine="another", host="node7", pid=123)
    stop = threading.Event()

    def beat() -> None:
        with open(tmp_path / OWNER, "r+b") as file:
            for number in itertools.count():
                file.seek(0)
                file.write(json.dumps({**elsewhere, "beat": f"{number:09d}"}).encode())
                file.flush()
                if stop.wait(0.02):
                    return

    write_owner(tmp_path, elsewhere)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 123 on node7"), owned(tmp_path):
            pass
    finally:
        stop.set()
        thread.join()
    with owned(tmp_path):
        assert json.loads((tmp_path / OWNER).read_bytes())["pid"] == os.getpid()


@pytest.mark.usefixtures("brief")
def test_a_container_of_the_same_host_name_is_not_judged_by_process_id(tmp_path, monkeypatch):
    """Its processes cannot be seen from here: only its heartbeat tells."""
    write_owner(tmp_path, identity(machine="the same boot, other processes", pid=2**22 + 1))
    looks = []
    monkeypatch.setattr(ownership, "_started", lambda pid: looks.append(pid) or 1.0)
    with owned(tmp_path):
        pass
    assert 2**22 + 1 not in looks


@pytest.mark.usefixtures("brief")
def test_the_heartbeat_moves_and_stays_readable(tmp_path):
    with owned(tmp_path):
        beats = set()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            beats.add(json.loads((tmp_path / OWNER).read_bytes())["beat"])
    assert len(beats) >= 3


@pytest.mark.usefixtures("brief")
def test_an_owner_that_slept_while_it_was_taken_over_stops_and_leaves_the_others_file(tmp_path):
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with warnings.catch_warnings(record=True) as told, owned(tmp_path):
            (tmp_path / "new").write_text(json.dumps(identity(pid=123)))
            (tmp_path / "new").replace(tmp_path / OWNER)
            deadline = time.monotonic() + 5
            while not received and time.monotonic() < deadline:
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert "another process has taken" in str(told[0].message)
    assert json.loads((tmp_path / OWNER).read_bytes())["pid"] == 123


RACE = r"""
import json, os, random, sys, time
from pathlib import Path

from spice_dist import ownership
from spice_dist.errors import UserError

ownership.WRITING_SECONDS = 0.05
root, claimants = Path(sys.argv[1]), 6
alive = ownership._alive


def alive_then_sleep(path, holder):
    answer = alive(path, holder)
    time.sleep(random.uniform(0, 0.03))  # between finding an owner dead and taking its place
    return answer


def claim_by_unlinking(path, identity):
    "What looks right and is not: who finds the owner dead removes the file, whosever it is by then."
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            ownership._write(descriptor, identity, 0)
            return descriptor
        except FileExistsError:
            holder = ownership._read(path)
            if holder and ownership._alive(path, holder):
                raise UserError("in use")
            path.unlink(missing_ok=True)


def claim(run, begin, pipe, end):
    random.seed(os.getpid())
    time.sleep(max(0, begin - time.monotonic()))
    try:
        with ownership.owned(run):
            os.write(pipe, b"w")
            os.read(end, 1)  # hold it until everybody has tried
    except UserError as error:
        os.write(pipe, b"r" if "in use" in str(error) else b"?")


def race(run, owner):
    run.mkdir()
    if owner is not None:
        (run / ".owner.json").write_text(owner)
    out, pipe = os.pipe()
    end, ended = os.pipe()
    begin, children = time.monotonic() + 0.03, []
    for _ in range(claimants):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                os.close(ended)
                claim(run, begin, pipe, end)
            finally:
                os._exit(0)
    os.close(pipe), os.close(end)
    answers = "".join(os.read(out, 1).decode() for _ in range(claimants))
    os.close(ended), os.close(out)
    for child in children:
        os.waitpid(child, 0)
    return ["".join(sorted(answers)), sorted(path.name for path in run.iterdir())]


child = os.fork()
if child == 0:
    (root / "dead").write_text(json.dumps({**ownership._identity(), "beat": "000000000"}))
    os._exit(0)
os.waitpid(child, 0)
dead = (root / "dead").read_text()
ownership._alive = alive_then_sleep
owners = {"none": None, "dead": dead, "torn": ""}
report = {name: [race(root / f"{name}{i}", owner) for i in range(8)] for name, owner in owners.items()}
ownership._claim = claim_by_unlinking
report["undefended"] = [race(root / f"undefended{i}", dead) for i in range(4)]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    command = [sys.executable, "-c", RACE, str(tmp_path_factory.mktemp("race"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("owner", ["none", "dead", "torn"])
def test_of_several_claimants_exactly_one_wins_and_nothing_is_left(races, owner):
    assert races[owner] == [["rrrrrw", []]] * 8


def test_if_the_dead_owners_file_were_simply_removed_several_would_win(races):
    assert any(answers.count("w") > 1 for answers, _ in races["undefended"])


def test_an_unusable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file" / "run", tmp_path / "file", Path("/proc/1/run")):
        with pytest.raises(UserError, match=rf"^cannot write to {run}: [^\n]+; give another --out$"), owned(run):
            pass


def test_a_full_disk_is_one_clear_line_and_leaves_no_owner(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write to [^\n]+ give another --out$"), owned(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(tmp_path) == []


SETTINGS = {"moco.lr": 0.06, "moco.view.crop_scale": (0.2, 1.0), "labels": None, "backbone.widths": ()}


def test_the_same_settings_pass_and_a_stage_that_never_began_refuses_nothing(tmp_path):
    refuse_changes(tmp_path, "moco", SETTINGS)
    assert stage_record(tmp_path, "moco") is None
    write_stage_record(tmp_path, "moco", SETTINGS, False, 1.234)
    refuse_changes(tmp_path, "moco", SETTINGS)
    refuse_changes(tmp_path, "moco", dict(reversed(SETTINGS.items())))
    record = stage_record(tmp_path, "moco")
    assert record is not None
    assert (record["done"], record["seconds"]) == (False, 1.23)


def test_a_change_is_refused_with_both_values_and_what_to_do(tmp_path):
    write_stage_record(tmp_path, "moco", SETTINGS, True, 0.0)
    with pytest.raises(UserError) as refused:
        refuse_changes(tmp_path, "moco", {**SETTINGS, "moco.lr": 0.1})
    assert "stage moco: moco.lr was 0.06, now 0.1; give another --out or the same settings" in str(refused.value)
    assert "\n" not in str(refused.value)


CHANGES = {
    "new": ({**SETTINGS, "moco.new": 1}, "moco.new was absent, now 1"),
    "new and null": ({**SETTINGS, "moco.new": None}, "moco.new was absent, now null"),
    "missing": ({k: v for k, v in SETTINGS.items() if k != "moco.lr"}, "moco.lr was 0.06, now absent"),
    "missing and null": ({k: v for k, v in SETTINGS.items() if k != "labels"}, "labels was null, now absent"),
    "order": ({**SETTINGS, "moco.view.crop_scale": (1.0, 0.2)}, r"was \[0.2, 1.0\], now \[1.0, 0.2\]"),
    "many": (dict.fromkeys(SETTINGS, "x"), "and 1 more"),
    "long": ({**SETTINGS, "labels": "x" * 200}, r"x{50,}\.\.\."),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_difference_counts(tmp_path, change):
    settings, shown = CHANGES[change]
    write_stage_record(tmp_path, "moco", SETTINGS, True, 0.0)
    with pytest.raises(UserError, match=shown):
        refuse_changes(tmp_path, "moco", settings)


def test_values_that_differ_beyond_what_is_shown_are_still_different(tmp_path):
    write_stage_record(tmp_path, "moco", {"images": "x" * 100 + "a"}, True, 0.0)
    with pytest.raises(UserError, match="images was"):
        refuse_changes(tmp_path, "moco", {"images": "x" * 100 + "b"})


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"done": true}', '{"settings": 3, "done": 1, "seconds": 1}']
)
def test_a_damaged_record_is_refused_instead_of_matching_any_settings(tmp_path, content):
    write_stage_record(tmp_path, "moco", SETTINGS, True, 0.0)
    (tmp_path / "moco/stage.json").write_text(content)
    with pytest.raises(DamagedFile, match=f"remove {tmp_path}/moco"):
        refuse_changes(tmp_path, "moco", SETTINGS)


def test_checkpoints_without_a_record_are_refused(tmp_path):
    (tmp_path / "moco/checkpoints/000000010").mkdir(parents=True)
    with pytest.raises(UserError, match=f"remove {tmp_path}/moco"):
        refuse_changes(tmp_path, "moco", SETTINGS)
