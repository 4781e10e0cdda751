"""`spice-dist predict` on workers: the bytes of one process, after killed workers and a killed driver too."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from spice_dist import cli, predicting
from spice_dist.data.dataset import DataConfig, open_given
from spice_dist.data.excerpts import Excerpts, excerpts
from spice_dist.data.packed_files import pack
from spice_dist.data.sources import Source
from spice_dist.distributed import ray_local, ray_predict, ray_train
from spice_dist.model_folder import load_model
from spice_dist.prediction_parts import PartJob, PartWorker, digest_of_model, file_of_part, read_part, size_of_part
from tests.chaos.runs import command_line, has_ended
from tests.test_cli import command
from tests.test_predict import saved_model
from tests.test_ray import wait_until

CPU = torch.device("cpu")
SIZE, IMAGES = 256, 100  # 32 images in a batch, and so in a part
UNREADABLE = (5, 40, 41, 99)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of a photograph, some of which are unreadable."""
    folder = tmp_path_factory.mktemp("images")
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    for i in range(IMAGES):
        path = folder / f"{i:03d}.jpg"
        photograph.crop((5 * i, 3 * i, 5 * i + 80, 3 * i + 70)).save(path)
        if i in UNREADABLE:
            path.write_bytes(b"\xff\xd8 no image" * (i % 2))
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    few = tmp_path_factory.mktemp("few")
    for i in range(10, 22):
        shutil.copy(folder / f"{i:03d}.jpg", few)
    return few


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, few: Path) -> Path:
    return saved_model(tmp_path_factory.mktemp("run"), DataConfig(size=SIZE), few)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The images inside of a parquet file."""
    out = tmp_path_factory.mktemp("table") / "images.parquet"
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.iterdir())]
    parquet.write_table(pa.table({"image": images}), out, row_group_size=7)
    return out


def spice(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


# ---------------------------------------------------------------- parts, in this process


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory, few: Path) -> Path:
    return saved_model(tmp_path_factory.mktemp("small"), DataConfig(size=32), few)


@pytest.fixture
def small_batches(monkeypatch) -> None:
    monkeypatch.setattr(predicting, "chunk_of", lambda size: 8)


def of_list(folder: Path, place: Path) -> str:
    (place / "list.txt").write_text("\n".join(map(str, [*sorted(folder.iterdir()), folder / "missing.jpg"])))
    return str(place / "list.txt")


def of_array(folder: Path, place: Path) -> str:
    np.save(place / "images.npy", np.random.default_rng(0).integers(0, 256, (70, 20, 30, 3), dtype=np.uint8))
    return str(place / "images.npy")


def of_beton(folder: Path, place: Path) -> str:
    pack(open_given(str(folder)), place / "images.beton", size=48, format="jpg", max_bad=0.5)
    return str(place / "images.beton")


def job_of(run: Path, source: Source, data: str, place: Path) -> PartJob:
    """Parts of 16 images, in two batches."""
    place.mkdir(exist_ok=True)
    return PartJob(
        run / "model", digest_of_model(run / "model"), excerpts(source, data, True, 16, place), None, place, 1, 1
    )


@pytest.mark.parametrize("kind", [lambda folder, _: str(folder), of_list, of_array, of_beton], ids=range(4))
def test_parts_are_those_of_the_whole_bit_for_bit(small_run, small_batches, folder, tmp_path, kind):
    data = kind(folder, tmp_path)
    source = open_given(data, trust_list=True)
    net, task = load_model(small_run / "model", CPU)
    best, reasons = predicting.apply(net, predicting.best_cluster, 2, task, source, CPU, False)
    job = job_of(small_run, source, data, tmp_path / "parts")
    assert job.excerpts.parts > 2
    with contextlib.closing(PartWorker(job)) as worker:
        parts = [worker.part(number)[0] for number in reversed(range(job.excerpts.parts))][::-1]
    assert np.array_equal(np.concatenate([part.best for part in parts]), best, equal_nan=True)
    found = {job.excerpts.numbers(part.number)[i]: reason for part in parts for i, reason in part.reasons.items()}
    assert found == reasons
    assert len({part.digest for part in parts}) == len(parts)


def another_model(job: PartJob) -> PartJob:
    about = job.model / "model.json"
    content = about.read_text()
    assert '"max_megapixels": 50' in content
    about.write_text(re.sub(r',\s*"seal": "\w+"', "", content.replace('"max_megapixels": 50', '"max_megapixels": 49')))
    return replace(job, model_digest=digest_of_model(job.model))


def another_image(job: PartJob) -> PartJob:
    shutil.copy(f"{job.excerpts.data}/001.jpg", f"{job.excerpts.data}/007.jpg")
    return job


def another_list(job: PartJob) -> PartJob:
    listed = job.folder / "images.jsonl"
    lines = listed.read_text().splitlines(keepends=True)
    lines[0], lines[1] = lines[1], lines[0]  # of equal length
    listed.write_text("".join(lines))
    return job


def damaged(job: PartJob) -> PartJob:
    with open(file_of_part(job.folder, 0), "r+b") as file:
        file.seek(100)
        file.write(b"\x55\x55\x55")
    return job


CHANGES: list[tuple[Callable[[PartJob], PartJob], int]] = [
    (lambda job: job, 0),
    (lambda job: replace(job, max_megapixels=7), 16),
    (another_model, 16),
    (another_image, 16),
    (another_list, 16),
    (damaged, 16),
]


@pytest.mark.parametrize(("change", "decoded"), CHANGES, ids=["nothing", "limit", "model", "image", "list", "file"])
def test_a_part_is_taken_up_only_if_it_is_of_the_same_model_and_images(small_run, folder, tmp_path, change, decoded):
    copies = {
        name: Path(shutil.copytree(path, tmp_path / name)) for name, path in {"a": folder, "b": small_run}.items()
    }
    job = job_of(copies["b"], open_given(str(copies["a"])), str(copies["a"]), tmp_path / "parts")
    with contextlib.closing(PartWorker(job)) as worker:
        assert worker.part(0)[1] == 16
    job = change(job)
    with contextlib.closing(PartWorker(job)) as worker:
        part, count = worker.part(0)
    assert count == decoded
    stored = read_part(file_of_part(job.folder, 0))
    assert stored is not None
    assert stored.digest == part.digest


def test_parts_are_whole_batches_neither_few_nor_many():
    for chunk in (16, 41, 512):
        for count in (1, 300, 20_000, 3_000_000, 200_000_000):
            size = size_of_part(count, chunk)
            assert size % chunk == 0
            assert -(-count // size) <= 10_000
            assert size == chunk or -(-count // size) >= 256


# ---------------------------------------------------------------- mistakes, before Ray starts


def test_mistakes_of_a_call_on_workers_are_one_line(run, folder, tmp_path, capfd):
    (tmp_path / "new.csv.parts").mkdir()
    (tmp_path / "new.csv.parts/diary.txt").touch()
    calls = {
        "diary": (["--workers", "2", "--out", tmp_path / "new.csv"], "holds other files"),
        "address": (["--address", "127.0.0.1:1", "--out", tmp_path / "b.csv"], "127.0.0.1:1"),
        "alone": (["--address", "127.0.0.1:1", "--workers", "0"], "leave --address out"),
    }
    for arguments, words in calls.values():
        assert spice("predict", run, folder, *arguments) == 1
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("spice-dist:")]
        assert len(lines) == 1
        assert words in lines[0]
    assert (tmp_path / "new.csv.parts/diary.txt").exists()


def test_a_worker_that_sees_other_images_or_another_model_says_so(small_run, folder, tmp_path):
    job = job_of(small_run, open_given(str(folder)), str(folder), tmp_path)
    elsewhere = replace(job.excerpts, seen=(("/nowhere/1.jpg", 5),))
    whole = Excerpts(str(folder), False, False, None, IMAGES + 1, 32)
    for changed, words in [
        (replace(job, excerpts=elsewhere), "does not see '/nowhere/1.jpg'"),
        (replace(job, excerpts=whole), "sees 100 images"),
        (replace(job, model_digest="another"), "does not see the model"),
    ]:
        answer = ray_predict._Worker(changed)({"part": np.array([0])})
        assert words in answer["error"][0]


# ---------------------------------------------------------------- workers


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """One Ray session with room for four workers."""
    with ray_local.quiet_driver(), ray_train.session(None, num_cpus=4):
        yield


@pytest.fixture
def on_workers(shared_ray, monkeypatch) -> list[ray_predict.Answer]:
    """Let calls use the shared session; return what workers answer."""
    answers: list[ray_predict.Answer] = []
    given = ray_predict._answers

    def noted(*arguments) -> Iterator[ray_predict.Answer]:
        for answer in given(*arguments):
            answers.append(answer)
            yield answer

    monkeypatch.setattr(ray_train, "session", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(ray_predict, "_answers", noted)
    return answers


def workers(process: psutil.Process) -> list[psutil.Process]:
    return [each for each in process.children(recursive=True) if "MapWorker" in command_line(each)]


@pytest.fixture(scope="module")
def alone(run, folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process without Ray writes of the folder."""
    out = tmp_path_factory.mktemp("alone") / "new.parquet"
    assert spice("predict", run, folder, "--out", out) == 0
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.parent.iterdir()}


@pytest.mark.timeout(300)
def test_one_two_and_four_workers_write_the_bytes_of_one_process(run, folder, tmp_path, on_workers, alone, capfd):
    last = "4 of 100 left out: 4 unreadable; "
    for number in ("1", "2", "4"):
        out = tmp_path / number / "new.parquet"
        out.parent.mkdir()
        assert spice("predict", run, folder, "--workers", number, "--out", out) == 0
        assert contents(out) == alone, "and no parts are left"
        printed = capfd.readouterr()
        assert printed.out == f"wrote {out}\n"
        assert printed.err.splitlines()[-1] == f"{last}{out}.quarantine.csv says why"
    assert [sum(answer.decoded for answer in on_workers)] == [3 * IMAGES]


@pytest.mark.timeout(300)
def test_a_list_on_standard_input_and_a_table_are_answered_as_by_one_process(
    run, folder, table, tmp_path, on_workers, monkeypatch, capfd
):
    monkeypatch.chdir(folder)
    names = [*(path.name.encode() for path in sorted(folder.iterdir())), b"no-utf8-\xff.jpg", b"000.jpg"]
    answers = {}
    for number in ("0", "2"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(names))))
        assert spice("predict", run, "-", "--json", "--unreadable", "keep", "--workers", number) == 0
        assert spice("predict", run, table, "--workers", number) == 0
        answers[number] = capfd.readouterr().out
    assert answers["0"] == answers["2"]
    assert len(answers["0"]) > 100 * IMAGES
    errors = {}
    for number in ("0", "2"):
        out = tmp_path / "new.csv"
        assert spice("predict", run, folder, "--unreadable", "error", "--workers", number, "--out", out) == 1
        errors[number] = capfd.readouterr().err.splitlines()[-1]
        assert not out.exists()
    assert errors["0"] == errors["2"]
    assert "005.jpg" in errors["0"], "the first one"


@pytest.mark.timeout(300)
def test_a_killed_worker_costs_only_its_part(run, folder, tmp_path, on_workers, alone):
    out = tmp_path / "new.parquet"
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: len(list(tmp_path.glob("new.parquet.parts/*.npz"))) > 0)
        victim = workers(psutil.Process())[0]
        victim.kill()
        killed.append(victim.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert spice("predict", run, folder, "--workers", "1", "--out", out) == 0
    assert killed
    assert contents(out) == alone
    assert len(on_workers) == len({answer.part for answer in on_workers}) == 4, "Ray Data itself tried again"


@pytest.mark.timeout(300)
def test_after_a_killed_driver_the_written_parts_are_not_decoded_again(run, folder, tmp_path, on_workers, alone):
    out = tmp_path / "out/new.parquet"
    out.parent.mkdir()
    parts = out.with_name("new.parquet.parts")
    temporary = tempfile.mkdtemp(prefix="t-")  # pytest's names are too long for sockets
    arguments = command("predict", str(run), str(folder), "--workers", "1", "--out", str(out))
    child = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": temporary})
    try:
        wait_until(lambda: len(list(parts.glob("*.npz"))) > 1)
        family = psutil.Process(child.pid).children(recursive=True)
    finally:
        child.kill()
        child.wait()
    wait_until(lambda: all(map(has_ended, family)))
    time.sleep(0.1)
    written = {int(path.stem) for path in parts.glob("*.npz")}
    assert {0, 1} <= written < {0, 1, 2, 3}
    assert not out.exists()
    assert spice("predict", run, folder, "--workers", "2", "--out", out) == 0
    assert contents(out) == alone
    again = {answer.part: answer.decoded for answer in on_workers}
    assert again == {part: 0 if part in written else 4 if part == 3 else 32 for part in range(4)}
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.timeout(300)
def test_workers_that_die_again_and_again_end_the_call_in_one_line(
    run, folder, tmp_path, on_workers, monkeypatch, capfd
):
    # the last test of the shared session: what it leaves there goes on
    monkeypatch.setattr(ray_predict, "RESTARTS", 1)
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.1):
            for victim in workers(psutil.Process()):
                with contextlib.suppress(psutil.Error):
                    victim.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        assert spice("predict", run, folder, "--workers", "1", "--out", tmp_path / "new.csv") == 1
    finally:
        over.set()
        thread.join()
    assert "workers end again and again" in capfd.readouterr().err.splitlines()[-1]
