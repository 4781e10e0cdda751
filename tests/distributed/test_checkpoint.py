"""What was acknowledged is never lost and what is damaged is never loaded: truncations, flips, swaps, kills, races."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spice_dist.distributed import checkpoint
from spice_dist.distributed.checkpoint import Checkpoint, Tensors
from spice_dist.errors import DamagedFile, UserError

FILES = ["net.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def some_tensors(step: int) -> Tensors:
    return {"net": {"w": torch.arange(6.0).reshape(2, 3) + step, "n": torch.tensor(step)}, "optimizer": {}}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 and 20, read only."""
    folder = tmp_path_factory.mktemp("two")
    for step in (10, 20):
        checkpoint.save(folder, step, some_tensors(step), {"total": 100})
    return folder


@pytest.fixture
def folder(two: Path, tmp_path: Path) -> Path:
    shutil.copytree(two, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load_unverified(path: Path) -> Checkpoint:
    """What a store without a manifest would do."""
    return Checkpoint(path, int(path.name), {})


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


def test_what_is_loaded_equals_what_was_saved_bit_for_bit(tmp_path):
    ints = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    group = {str(dtype): torch.tensor([[0, 1], [100, 7]], dtype=dtype) for dtype in ints}
    group |= {str(dtype): torch.randn(3, 5).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)}
    special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    group |= {"special": special, "bool": torch.tensor([True, False]), "none": torch.zeros(0, 3)}
    group |= {"scalar": torch.tensor(7), "scalar32": torch.tensor(0.1), "view": torch.arange(12.0).reshape(3, 4).t()}
    group |= {"parameter": torch.nn.Parameter(torch.randn(4))}
    checkpoint.save(tmp_path, 3, {"net": group, "empty": {}}, {"total": 9, "name": "é"})
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (3, {"total": 9, "name": "é", "step": 3})
    assert found.tensors("empty") == {}
    loaded = found.tensors("net")
    assert loaded.keys() == group.keys()
    for name, value in group.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert bits(loaded[name]) == bits(value), name


def test_only_safetensors_and_json_are_written(two):
    assert sorted(path.name for path in (two / "000000020").iterdir()) == sorted(FILES)
    for path in two.rglob("*.json"):
        json.loads(path.read_bytes())
    for path in two.rglob("*.safetensors"):
        header = path.read_bytes()
        json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])


def flips(size: int) -> list[int]:
    return sorted({size * i // 64 for i in range(64)})


def damages(file: Path, other: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every fault of one file: its name, and what does it."""
    content = file.read_bytes()
    yield "truncated", lambda: file.write_bytes(content[: len(content) // 2])
    yield "one byte short", lambda: file.write_bytes(content[:-1])
    yield "one byte more", lambda: file.write_bytes(content + b"}")
    yield "emptied", lambda: file.write_bytes(b"")
    yield "zeroed", lambda: file.write_bytes(bytes(len(content)))
    yield "deleted", file.unlink
    yield "a folder", lambda: (file.unlink(), file.mkdir())
    if other.read_bytes() != content:
        yield "swapped", lambda: file.write_bytes(other.read_bytes())
    for number, place in enumerate(flips(len(content))):
        flipped = bytearray(content)
        flipped[place] ^= 1 << number % 8
        yield f"bit {number % 8} of byte {place}", lambda flipped=flipped: file.write_bytes(flipped)


def not_recovered(folder: Path, file: str) -> list[str]:
    """The faults of the newest checkpoint's `file` after which the store does not fall back to the one before."""
    newest, kept, failed = folder / "000000020", folder.with_name("kept"), []
    shutil.copytree(newest, kept)
    for name, damage in damages(newest / file, folder / "000000010" / file):
        damage()
        with warnings.catch_warnings(record=True) as told:
            found = checkpoint.newest(folder)
        set_aside = names(folder) == ["000000010", "000000020.bad"] and "000000020.bad" in "".join(map(str, told))
        if found is None or found.step != 10 or not set_aside:
            failed.append(name)
        shutil.rmtree(newest if newest.exists() else folder / "000000020.bad")
        shutil.copytree(kept, newest)
    return failed


@pytest.mark.parametrize("file", FILES)
def test_any_damage_falls_back_to_the_checkpoint_before(folder, file):
    assert not_recovered(folder, file) == []


@pytest.mark.parametrize("file", FILES)
def test_without_the_manifest_every_damage_would_be_loaded(folder, file, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", load_unverified)
    faults = [name for name, _ in damages(folder / "000000020" / file, folder / "000000010" / file)]
    assert not_recovered(folder, file) == faults


def test_a_checkpoint_under_the_name_of_another_step_is_refused(folder):
    (folder / "000000020").rename(folder / "000000030")
    with pytest.raises(DamagedFile):
        checkpoint.load(folder / "000000030")


def test_a_file_that_the_manifest_does_not_know_is_refused(folder):
    shutil.copy(folder / "000000020/net.safetensors", folder / "000000020/other.safetensors")
    with pytest.raises(DamagedFile):
        checkpoint.load(folder / "000000020")


def test_all_damaged_means_none_and_nothing_is_deleted(folder):
    for step in ("000000010", "000000020"):
        (folder / step / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="set aside"):
        assert checkpoint.newest(folder) is None
    assert names(folder) == ["000000010.bad", "000000020.bad"]
    assert checkpoint.newest(folder) is None
    assert checkpoint.newest(folder / "absent") is None


def test_a_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(folder):
    for _ in range(3):
        checkpoint.save(folder, 20, some_tensors(20), {})
        (folder / "000000020/state.json").unlink()
        with pytest.warns(UserWarning, match="set aside"):
            checkpoint.newest(folder)
    assert names(folder) == ["000000010", "000000020.bad", "000000020.bad1", "000000020.bad2"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_being_unable_to_read_is_not_taken_for_damage(folder, monkeypatch, number):
    def fail(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoint, "sha256", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        checkpoint.newest(folder)
    assert names(folder) == ["000000010", "000000020"]


def test_where_renaming_is_forbidden_the_checkpoint_before_is_still_found(folder, monkeypatch):
    def forbidden(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    (folder / "000000020/state.json").unlink()
    monkeypatch.setattr(Path, "rename", forbidden)
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.step == 10


HEAVY = {
    "weights": ({"net": {"w": torch.zeros(1000)}}, {}),
    "state": ({"net": {}}, {"notes": "x" * 4000}),
    "manifest": ({f"part{i}": {} for i in range(30)}, {}),
}


@pytest.mark.parametrize("heavy", HEAVY)
def test_a_full_disk_leaves_what_was_there_and_no_trace(folder, heavy):
    tensors, state = HEAVY[heavy]
    with no_room_for_more_than(1000), pytest.raises(OSError, match="large"):
        checkpoint.save(folder, 30, tensors, state)
    assert names(folder) == ["000000010", "000000020"]
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.step == 20


@pytest.mark.parametrize("call", ["replace", "fsync", "mkdir"])
def test_an_error_of_any_system_call_leaves_what_was_there_and_no_trace(folder, monkeypatch, call):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, call, full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, 30, some_tensors(30), {})
    monkeypatch.undo()
    assert names(folder) == ["000000010", "000000020"]


def test_without_the_clean_up_an_error_would_leave_a_trace(folder, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    with no_room_for_more_than(1000), pytest.raises(OSError, match="large"):
        checkpoint.save(folder, 30, *HEAVY["weights"])
    assert len(names(folder)) == 3


def test_only_the_newest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "KEPT", 3)
    for step in (5, 1_000_000_000, 999_999_999, 7):
        checkpoint.save(tmp_path, step, {}, {})
    assert names(tmp_path) == ["000000007", "1000000000", "999999999"]


def test_a_valid_checkpoint_of_the_same_step_stays_and_a_damaged_one_makes_room(folder):
    before = (folder / "000000020/manifest.json").read_bytes()
    checkpoint.save(folder, 20, some_tensors(99), {})
    assert (folder / "000000020/manifest.json").read_bytes() == before
    (folder / "000000020/net.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="set aside"):
        checkpoint.save(folder, 20, some_tensors(20), {})
    assert checkpoint.load(folder / "000000020").step == 20
    assert names(folder) == ["000000010", "000000020", "000000020.bad"]


def test_sweep_removes_leftovers_and_nothing_else(folder):
    (folder / ".000000030.1234abcd").mkdir()
    (folder / ".000000030.1234abcd/net.safetensors").write_bytes(b"half")
    (folder / "000000005.bad").mkdir()
    checkpoint.sweep(folder)
    checkpoint.sweep(folder / "absent")
    assert names(folder) == ["000000005.bad", "000000010", "000000020"]


KILLER = r"""
import itertools, json, os, random, shutil, signal, sys, time, warnings
from pathlib import Path

import torch

from spice_dist.distributed import checkpoint

torch.set_num_threads(1)
warnings.simplefilter("ignore")
os.fsync = lambda _: None  # a killed process loses nothing that it has written; only a power failure does
root = Path(sys.argv[1])
SOUND = {"load": checkpoint.load, "aside": checkpoint._set_aside, "replace": os.replace}


def tensors(step):
    return {"net": {"w": torch.full((300,), step)}, "optimizer": {"m": torch.full((2000,), step)}}


def start(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def complaints(folder, least):
    "What is wrong with a folder in which checkpoint `least` was acknowledged, after a kill."
    found = checkpoint.newest(folder)
    step = found.step if found else 0
    wrong = [f"lost {least}, have {step}"] if step < least else []
    try:
        for name, group in tensors(step).items():
            if found and any(not torch.equal(found.tensors(name)[key], value) for key, value in group.items()):
                wrong.append(f"{step} holds something else")
    except Exception as error:
        wrong.append(f"{step} cannot be read: {error}")
    checkpoint.sweep(folder)
    return step, wrong + [f"left {path.name}" for path in folder.glob(".*")]


def killed_at_random(folder, times):
    def save_on(first, pipe):
        for step in itertools.count(first):
            checkpoint.save(folder, step, tensors(step), {})
            os.write(pipe, b"%d\n" % step)

    wrong, last, dirty, acknowledged = [], 0, 0, 0
    for _ in range(times):
        out, pipe = os.pipe()
        pid = start(lambda: save_on(last + 1, pipe))
        os.close(pipe)
        time.sleep(random.uniform(0.01, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(out) as lines:
            steps = [last, *map(int, lines)]
        acknowledged += len(steps) - 1
        dirty += any(folder.glob(".*"))
        last, new = complaints(folder, steps[-1])
        wrong += new
    return {"wrong": wrong, "acknowledged": acknowledged, "dirty": dirty}


def killed_at_every_call(folder):
    "Kill before the 1st, 2nd, ... file operation of a save, until one comes through."
    def save_until(number):
        left = [number]

        def count(event, _):
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        checkpoint.save(folder, 3, tensors(3), {})

    wrong = []
    for number in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        for step in (1, 2):
            checkpoint.save(folder, step, tensors(step), {})
        _, status = os.waitpid(start(lambda: save_until(number)), 0)
        _, new = complaints(folder, 2 if status else 3)
        wrong += [f"call {number}: {text}" for text in new]
        if status == 0:
            return {"wrong": wrong, "calls": number - 1}
        if not os.WIFSIGNALED(status):
            return {"wrong": [f"call {number}: status {status}"], "calls": 0}


def two_readers(folder, rounds):
    wrong = []
    for _ in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        for step in (1, 2):
            checkpoint.save(folder, step, tensors(step), {})
        (folder / "000000002/state.json").unlink()
        begin = time.monotonic() + 0.02

        def read():
            time.sleep(max(0, begin - time.monotonic()))
            assert checkpoint.newest(folder).step == 1

        sys.stderr.flush()
        wrong += [status for pid in [start(read), start(read)] if (status := os.waitpid(pid, 0)[1])]
    return wrong


def replace_in_place(source, target):
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copy(file, target)
    shutil.rmtree(source)


def load_unverified(path):
    return checkpoint.Checkpoint(path, int(path.name), {})


def load_slowly(path):
    try:
        return SOUND["load"](path)
    except checkpoint.DamagedFile:
        time.sleep(0.03)
        raise


report = {"random": killed_at_random(root / "a", 12), "calls": killed_at_every_call(root / "b")}
checkpoint.load, os.replace = load_unverified, replace_in_place
report["calls undefended"] = killed_at_every_call(root / "c")
checkpoint.load, os.replace = load_slowly, SOUND["replace"]
report["readers"] = two_readers(root / "d", 8)
checkpoint._set_aside = lambda path, why: path.rename(path.with_name(path.name + ".bad"))
sys.stderr = open(os.devnull, "w")
os.dup2(sys.stderr.fileno(), 2)
report["readers undefended"] = two_readers(root / "e", 3)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Saves killed by SIGKILL; one process loads torch and forks all the others."""
    command = [sys.executable, "-c", KILLER, str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_at_a_random_moment_loses_no_acknowledged_checkpoint(killed):
    assert killed["random"]["wrong"] == []
    assert killed["random"]["acknowledged"] >= 10


def test_a_kill_before_any_file_operation_of_a_save_loses_nothing(killed):
    assert killed["calls"]["wrong"] == []
    assert killed["calls"]["calls"] >= 10


def test_without_rename_and_manifest_a_kill_would_lose_a_checkpoint(killed):
    assert any("cannot be read" in text for text in killed["calls undefended"]["wrong"])


def test_two_processes_may_set_the_same_damaged_checkpoint_aside(killed):
    assert killed["readers"] == []
    assert killed["readers undefended"] != []


def test_a_process_that_has_lost_the_run_folder_saves_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "STALE_SECONDS", 0.1)
    store = tmp_path / "moco/checkpoints"
    (tmp_path / checkpoint.OWNER).write_text(json.dumps({"token": "another"}))
    with pytest.raises(UserError, match="another process has taken .* over"):
        checkpoint.save(store, 10, some_tensors(10), {}, owner="this")
    assert names(store) == []
    checkpoint.save(store, 10, some_tensors(10), {}, owner="another")
    assert names(store) == ["000000010"]


def test_later_checkpoints_of_another_process_do_not_drop_those_of_the_owner(tmp_path):
    for step in (300, 500):  # it was suspended, and lost the folder after its check of the owner
        checkpoint.save(tmp_path, step, some_tensors(step), {}, owner="another")
    with pytest.warns(UserWarning, match="was written by another process"):
        checkpoint.save(tmp_path, 340, some_tensors(340), {}, owner="this")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 340
    assert names(tmp_path) == ["000000300", "000000340", "000000500.bad"]


def test_no_checkpoint_is_begun_that_the_disk_has_no_room_for(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30))
    monkeypatch.setattr(checkpoint, "_write_tensors", lambda *given: pytest.fail("it was begun"))
    with pytest.raises(OSError, match="and the disk has 0.0 MB left"):  # 6 numbers and a step are 32 bytes
        checkpoint.save(folder, 30, some_tensors(30), {})
    assert names(folder) == ["000000010", "000000020"]
