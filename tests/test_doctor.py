"""The doctor's findings, each against a machine or a run that has that trouble, and against one that has not."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from spice_dist import cli, doctor
from spice_dist.data.dataset import open_data
from spice_dist.distributed.ray_nodes import Report
from spice_dist.distributed.worker import Storage
from spice_dist.doctor import BAD, NOTE, OK, Finding, IntendedRun
from spice_dist.errors import UserError
from spice_dist.launching import Launch
from spice_dist.recipes import recipe


def states(check: doctor.Check, run: IntendedRun | None = None) -> list[str]:
    return [finding.state for finding in check(run or IntendedRun())]


def of_run(out: Path | None = None, **launch) -> IntendedRun:
    return IntendedRun(lambda: (open_data("digits"), recipe("digits", 1797)), out, Launch(**launch))


@pytest.fixture(scope="module")
def packed(tmp_path_factory, digits_folder) -> Path:
    from spice_dist.data.packed_files import pack
    from spice_dist.data.sources import open_source

    out = tmp_path_factory.mktemp("packed") / "digits.beton"
    source = open_source("digits")
    pack(replace(source, paths=source.paths[:50], labels=None), out, size=8, jpeg_side=8)
    return out


@pytest.fixture
def quick(monkeypatch) -> None:
    """Without the check that imports FFCV in another Python, for seconds."""
    monkeypatch.setattr(doctor, "ffcv", lambda run: iter(()))


def test_a_healthy_machine_and_run_are_fit_and_leave_no_trace(tmp_path, capsys):
    out = tmp_path / "a/b/run"
    assert cli.main(["doctor", "digits", "--out", str(out), "--workers", "1:2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    checks = [line.split()[1] for line in lines]
    assert checks == [
        "python", "packages", "torch", "ffcv", "limits", "network", "slurm", "storage", "ray", "data", "cost",
    ]  # fmt: skip
    assert not [line for line in lines if line.startswith(BAD)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_what_would_fail_is_one_line_with_its_remedy_and_exit_code_1(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "no photos"), "--clusters", "3", "--out", "/proc/run"]) == 1
    shown = capsys.readouterr()
    bad = [line for line in shown.out.splitlines() if line.startswith(BAD)]
    assert [line.split()[1] for line in bad] == ["storage", "data"]
    assert "fix: give another --out" in bad[0]
    assert shown.err == "spice-dist: 2 of these would make a run fail\n"


@pytest.mark.usefixtures("quick")
def test_a_check_that_breaks_is_a_finding_and_the_others_still_run(monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("driver and library\ndiffer")

    monkeypatch.setattr(doctor.torch.cuda, "is_available", broken)
    found = {finding.check: finding for finding in doctor.findings(IntendedRun())}
    assert found["torch"] == Finding("torch", BAD, "RuntimeError: driver and library")
    assert {"python", "slurm", "ray"} <= set(found)


@pytest.mark.usefixtures("quick")
def test_a_packed_file_is_verified_to_its_last_pixel(packed, tmp_path):
    assert doctor._of_beton(packed).state == OK
    for file in packed.parent.iterdir():
        shutil.copy(file, tmp_path)
    damaged = tmp_path / packed.name
    content = bytearray(damaged.read_bytes())
    content[content.index(bytes(open_data(str(packed)).read(49))[:48])] ^= 1  # within the last image
    damaged.write_bytes(content)
    run = IntendedRun(lambda: (open_data(str(damaged)), recipe("digits", 50)))
    findings = [finding for finding in doctor.findings(run) if finding.check == "data"]
    assert [finding.state for finding in findings] == [BAD]
    assert "damaged" in findings[0].text


def test_images_that_cannot_be_decoded_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    (tmp_path / "notes.txt").touch()
    found = doctor._of_source(open_data(str(tmp_path)), recipe("digits", 1797))
    assert (found.state, "broken.png" in found.text) == (NOTE, True)
    assert "1 of 2 left out: 1 .txt" in found.text


def test_more_memory_than_there_is_would_fail(monkeypatch):
    assert doctor._of_cost(*of_run().prepare(), Launch(workers=1)).state == OK  # pyright: ignore[reportOptionalCall]
    monkeypatch.setattr(doctor, "_memory", lambda: 1e9)
    found = doctor._of_cost(*of_run().prepare(), Launch(workers=1))  # pyright: ignore[reportOptionalCall]
    assert found.state == BAD
    assert "of 1.0 GB" in found.text


def test_a_job_that_ends_before_the_run_is_told(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    found = doctor._of_cost(*of_run().prepare(), Launch(workers=1))  # pyright: ignore[reportOptionalCall]
    assert (found.state, "--time" in found.fix) == (NOTE, True)


def test_a_job_without_a_limit_of_memory_is_told(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    assert states(doctor.slurm) == [NOTE]
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "8000")
    monkeypatch.setenv("PATH", "/nowhere")
    assert states(doctor.slurm) == [BAD]  # no scontrol to ask for another try with


def test_gpus_that_torch_does_not_see_would_be_a_run_on_the_cpu(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.Path, "exists", lambda path: False)
    assert states(doctor.accelerator) == [OK]
    monkeypatch.setattr(doctor.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    assert states(doctor.accelerator) == [BAD]


def test_a_token_in_the_home_that_no_run_here_reads_does_not_matter(monkeypatch, tmp_path):
    (tmp_path / ".ray").mkdir()
    token = tmp_path / ".ray/auth_token"
    token.write_text("0" * 32)
    token.chmod(0o644)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert states(doctor.ray_cluster) == [OK]
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with pytest.raises(UserError, match="others can read the token"):
        states(doctor.ray_cluster)


def test_the_scratch_folder_is_tried_like_the_run_folder(tmp_path):
    launch = Launch(storage=Storage(scratch=tmp_path / "disk"))
    found = list(doctor.storage(IntendedRun(out=tmp_path / "run", launch=launch)))
    assert [finding.state for finding in found] == [OK, OK]
    assert list(tmp_path.iterdir()) == []


def test_few_open_files_and_a_small_dev_shm_are_told(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (1024, 1024))
    assert states(doctor.limits) == [BAD]
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (1024, 65536))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(total=64 << 20))  # as containers have it
    assert states(doctor.limits) == [NOTE]


@pytest.mark.parametrize(("address", "state"), [("127.0.1.1", NOTE), ("192.0.2.7", OK)])
def test_a_host_name_that_means_this_host_alone_is_told(monkeypatch, address, state):
    monkeypatch.setattr(doctor.socket, "gethostbyname", lambda _: address)
    assert states(doctor.network) == [state]


def test_a_node_with_other_versions_or_another_folder_would_fail():
    here = {"python": "3.11.7", "torch": "2.15.0"}
    good = Report("b", here, free=1e12)
    for report, state, words in (
        (good, OK, "writes to --out (1,000 GB free)"),
        (replace(good, versions={**here, "torch": "2.14.0"}), BAD, "torch 2.14.0 instead of 2.15.0"),
        (replace(good, problem="/x is another folder there"), BAD, "/x is another folder there"),
        ("ModuleNotFoundError: No module named 'spice_dist'", BAD, "No module named 'spice_dist'"),
    ):
        found = doctor._of_node("b (10.0.0.2)", report, here)
        assert (found.state, words in str(found)) == (state, True)


def test_a_token_that_others_can_read_is_refused(monkeypatch, tmp_path):
    token = tmp_path / "token"
    token.write_text("0" * 32)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for mode in (0o644, 0o660):
        token.chmod(mode)
        with pytest.raises(UserError, match=f"chmod 600 {token}"):
            states(doctor.ray_cluster)
    token.chmod(0o600)
    assert states(doctor.ray_cluster) == [OK]
