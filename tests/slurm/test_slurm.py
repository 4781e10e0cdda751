"""The sbatch files on a real SLURM of two nodes: a local run's result, through everything that ends a job early."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spice_dist.distributed import checkpoint
from tests.slurm.cluster import SlurmCluster, slurm_cluster
from tests.slurm.conftest import ENDLESS, LONG, SHORT
from tests.slurm.nodes import REPOSITORY, wait_until
from tests.sweep.test_tune import RATES, SETTINGS, SLOW
from tests.test_cli import DIGITS

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
JOB = ["--cpus-per-task=1", "--mem=5000", "--time=20", f"--chdir={REPOSITORY}"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder that all nodes see."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def slurm(shared) -> Iterator[SlurmCluster]:
    with slurm_cluster(["node1", "node2"], [shared]) as cluster:
        yield cluster


class Job:
    """One submission of an sbatch file; its output is shown when a test fails."""

    def __init__(self, slurm: SlurmCluster, folder: Path, *arguments: str | Path, **variables: str):
        """`arguments`: options of sbatch, the file, and what it is given."""
        self.slurm, self.log = slurm, folder / "job.out"
        folder.mkdir(exist_ok=True)
        variables |= {"PYTHONPATH": str(REPOSITORY), "SPICE_LOGS": str(folder)}
        self.number = slurm.submit(*JOB, f"--output={self.log}", *arguments, **variables)

    def wait(self, *states: str, seconds: float = 400.0) -> dict[str, str]:
        try:
            return self.slurm.wait(self.number, states, seconds)
        except AssertionError:
            print(self.log.read_text() if self.log.exists() else "no output")
            raise

    def wait_for_training(self, run: Path) -> None:
        self.wait("RUNNING")
        wait_until(lambda: (run / "moco/metrics.jsonl").exists() or self.failed(), 300)

    def states(self) -> set[str]:
        """Of the tasks of an array."""
        return set(self.slurm.command("squeue", "-h", "--states=all", "-j", self.number, "-r", "-o", "%T").split())

    def failed(self) -> bool:
        """False, or an AssertionError that shows the output."""
        state = self.slurm.job(self.number)["JobState"]
        assert state == "RUNNING", f"{state}: {self.log.read_text()}"
        return False


def fit(slurm: SlurmCluster, folder: Path, *options: str, nodes: int = 2, **variables: str) -> Job:
    """`fit.sbatch` on both nodes, or the first; the job is told that its time is up a minute before it is."""
    file = REPOSITORY / "slurm/fit.sbatch"
    command = ["fit", "digits", "--out", folder / "run", *options]
    return Job(slurm, folder, f"--nodes={nodes}", "--signal=B:USR1@60", file, *command, **variables)


def require_quiet(slurm: SlurmCluster) -> None:
    """AssertionError if a job left a process, or a file outside what it was asked to write."""
    wait_until(lambda: slurm.idle_nodes() == 2, 60)
    wait_until(lambda: not left_over(slurm), 5, lambda: f"still there: {left_over(slurm)}; not gone")
    for name in slurm.nodes.names:
        assert slurm.nodes.run(name, "find", "/tmp", "-maxdepth", "1", "-name", "spice-[0-9]*") == ""


def left_over(slurm: SlurmCluster) -> list[str]:
    """What runs on the nodes beside SLURM's daemons."""
    running = ((name, line) for name in slurm.nodes.names for line in slurm.nodes.processes(name).values())
    return [f"{name}: {line}" for name, line in running if line != f"slurmd -D -N {name}"]


def process(slurm: SlurmCluster, name: str, words: str) -> int:
    """The number of the one process of a node that has these words in its command line."""
    (found,) = (pid for pid, line in slurm.nodes.processes(name).items() if words in line)
    return found


def resumed_at(run: Path) -> list[int]:
    """The steps at which stage 1 was begun and gone on with, in that order."""
    return sorted(int(path.suffix[1:]) for path in (run / "moco").glob("events.*"))


def test_two_nodes_with_a_worker_each_give_the_assignments_of_one_process(slurm, shared, alone):
    folder = shared / "two"
    job = fit(slurm, folder, *SHORT, SPICE_SCRATCH="/tmp/disk")
    job.wait_for_training(folder / "run")
    for name in slurm.nodes.names:
        tokens = slurm.nodes.run(name, "sh", "-c", "stat -c %a /tmp/spice-*/token*").split()
        assert set(tokens) == {"600"}
    job.wait("COMPLETED")
    assert (folder / "run/assignments.csv").read_bytes() == alone(SHORT)
    for name in slurm.nodes.names:  # each had room for one worker, and that read its own disk
        assert slurm.nodes.run(name, "find", "/tmp/disk", "-name", "dataset.beton") != ""
    require_quiet(slurm)


def test_a_job_at_its_time_limit_goes_on_after_a_requeue_to_the_same_result(slurm, shared, alone):
    folder = shared / "limit"
    job = fit(slurm, folder, *LONG)
    job.wait_for_training(folder / "run")
    slurm.command("scontrol", "update", f"JobId={job.number}", "EndTime=now+65seconds")
    # told when 60 s are left, which SLURM looks at every 30 s: training stands still so long, or might end before
    worker = process(slurm, "node2", "TrainWorker")
    os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: "SIGUSR1: the command is asked to save" in job.log.read_text(), 60)
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: slurm.job(job.number)["Restarts"] == "1", 60)
    slurm.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=20")
    job.wait("COMPLETED")
    begun, gone_on = resumed_at(folder / "run")
    assert begun == 0 < gone_on
    assert (folder / "run/assignments.csv").read_bytes() == alone(LONG)


def test_a_killed_node_costs_at_most_one_checkpoint_interval(slurm, shared, alone):
    folder, interval, saving = shared / "killed", 4.0, 3.0
    store = folder / "run/moco/checkpoints"
    job = fit(slurm, folder, *LONG, "--checkpoint-seconds", str(interval))
    job.wait_for_training(folder / "run")
    wait_until(lambda: len(list(store.glob("0*/manifest.json"))) == 2, 60)  # the first is that of the first step
    slurm.nodes.kill("node2")
    killed_at = time.time()
    newest = max(store.glob("0*/manifest.json"))
    assert newest.stat().st_mtime > killed_at - interval - saving
    slurm.nodes.boot("node2")
    slurm.start_node("node2")
    job.wait("COMPLETED")
    assert int(slurm.job(job.number)["Restarts"]) >= 1
    assert resumed_at(folder / "run")[1] >= int(newest.parent.name)
    assert (folder / "run/assignments.csv").read_bytes() == alone(LONG)
    require_quiet(slurm)  # what the killed node kept on its disk is gone too


def test_a_command_that_crashes_is_run_once_more_to_the_same_result(slurm, shared, alone):
    folder = shared / "crashed"
    job = fit(slurm, folder, *SHORT, nodes=1)
    job.wait_for_training(folder / "run")
    os.kill(process(slurm, "node1", "spice-dist fit"), signal.SIGSEGV)
    job.wait("COMPLETED")
    assert "crashed with exit code 139; once more" in job.log.read_text()
    assert (folder / "run/assignments.csv").read_bytes() == alone(SHORT)


def test_scancel_saves_and_leaves_no_process(slurm, shared):
    folder = shared / "cancelled"
    job = fit(slurm, folder, *ENDLESS, "--checkpoint-seconds", "3600")  # what is saved is saved because of the signal
    job.wait_for_training(folder / "run")
    slurm.command("scancel", job.number)
    job.wait("CANCELLED", seconds=60)
    require_quiet(slurm)
    saved = checkpoint.newest(folder / "run/moco/checkpoints")
    assert saved is not None
    assert saved.step > 0
    assert "back into the queue" not in job.log.read_text()


def test_pre_emption_saves_and_puts_the_job_back(slurm, shared):
    folder = shared / "preempted"
    job = fit(slurm, folder, *ENDLESS, "--checkpoint-seconds", "3600")
    job.wait_for_training(folder / "run")
    urgent = slurm.submit("--nodes=2", "--exclusive", "--partition=urgent", "--output=/dev/null", "--wrap", "sleep 1")
    slurm.wait(urgent, seconds=90)
    assert slurm.job(job.number)["Restarts"] == "1"
    slurm.command("scancel", job.number)
    saved = checkpoint.newest(folder / "run/moco/checkpoints")
    assert saved is not None
    assert saved.step > 0
    require_quiet(slurm)


def test_a_command_that_cannot_save_is_killed_before_slurm_ends_the_job(slurm, shared):
    folder = shared / "stuck"
    job = fit(slurm, folder, *ENDLESS, nodes=1, SPICE_STOP_SECONDS="3")
    job.wait_for_training(folder / "run")
    os.kill(process(slurm, "node1", "spice-dist fit"), signal.SIGSTOP)
    slurm.command("scancel", "--signal=USR1", "--batch", job.number)
    wait_until(lambda: slurm.job(job.number)["Restarts"] == "1", 60)
    assert "not stopped after 3 s: killed" in job.log.read_text()
    slurm.command("scancel", job.number)
    require_quiet(slurm)


def test_a_command_does_not_wait_for_a_ray_that_is_gone(slurm, shared):
    """Its own time out is a minute; stopped, it would wait for ever."""
    folder = shared / "gone"
    job = fit(slurm, folder, *ENDLESS, nodes=1)
    job.wait_for_training(folder / "run")
    os.kill(process(slurm, "node1", "spice-dist fit"), signal.SIGSTOP)
    slurm.command("scancel", "--signal=KILL", f"{job.number}.0")
    wait_until(lambda: slurm.job(job.number)["Restarts"] == "1", 60)
    assert "Ray is gone" in job.log.read_text()
    slurm.command("scancel", job.number)
    require_quiet(slurm)


def test_any_command_of_a_module_runs_and_ray_has_the_gpus_that_slurm_gave(slurm, shared):
    """Here the program is on the PATH only once its module is loaded, by each node's own shell."""
    folder = shared / "gpus"
    (folder / "modules").mkdir(parents=True)
    (folder / "modules/spice").write_text(f"#%Module\nprepend-path PATH {REPOSITORY}/.venv/bin\n")
    modules = {"SPICE_MODULES": "spice", "MODULEPATH": str(folder / "modules"), "SPICE_VENV": str(shared / "none")}
    job = Job(
        slurm, folder, "--nodes=2", "--gpus-per-node=1", REPOSITORY / "slurm/fit.sbatch", "evaluate", shared / "none",
        **modules,
    )  # fmt: skip
    job.wait("FAILED")
    assert "Ray runs on 2 of 2 nodes: 2 CPUs, 2 GPUs" in job.log.read_text()
    assert f"spice-dist: {shared / 'none'} is not a folder" in job.log.read_text()


def test_the_command_slurm_submits_the_job_that_it_prints(slurm, shared, alone):
    folder = shared / "submitted"
    asked = ["--nodes", "2", "--cpus", "1", "--mem", "5000M", "--time", "20", "--partition", "main", "--submit"]
    command = ["fit", "digits", "--out", str(folder / "run"), *SHORT]
    variables = {
        "PYTHONPATH": str(REPOSITORY),
        "SPICE_LOGS": str(shared),
        "SBATCH_OUTPUT": str(shared / "submitted.out"),
    }
    printed = slurm.command(
        sys.executable, "-m", "spice_dist", "slurm", *asked, "--", *command, cwd=REPOSITORY, variables=variables
    )
    line, meaning, answer = printed.splitlines()
    assert line.startswith("sbatch --nodes=2 --cpus-per-task=1 --mem=5000M --time=20 --partition=main ")
    assert meaning.startswith("2 nodes for 20, each with 1 CPUs, 5000M of memory")
    slurm.wait(answer.removeprefix("Submitted batch job "), seconds=400)
    assert (folder / "run/assignments.csv").read_bytes() == alone(SHORT)


def test_an_array_of_seeds_leaves_one_table(slurm, shared):
    folder = shared / "seeds"
    settings = [*DIGITS[2:], "--workers", "1"]
    job = Job(
        slurm, folder, "--array=0-1", f"--output={folder}/%a.out", REPOSITORY / "slurm/seeds.sbatch", "digits",
        "--out", folder / "runs", *settings,
    )  # fmt: skip
    wait_until(lambda: job.states().isdisjoint({"PENDING", "RUNNING", "COMPLETING"}), 300)
    assert job.states() == {"COMPLETED"}
    assert (folder / "runs/seeds.txt").read_text().startswith("2 runs, mean ± standard deviation")


def test_a_sweep_told_to_stop_goes_on_with_the_trials_that_are_not_finished(slurm, shared):
    folder = shared / "sweep"
    (folder / "runs").mkdir(parents=True)
    (folder / "space.py").write_text(f"from ray import tune\nSPACE = {RATES}\n")
    job = Job(
        slurm, folder, "--nodes=2", REPOSITORY / "slurm/tune.sbatch", "digits", "--out", folder / "runs/sweep",
        "--space", folder / "space.py", "--trials", "6", *SETTINGS, *SLOW,
    )  # fmt: skip
    job.wait("RUNNING")
    wait_until(lambda: finished_trials(folder) or job.failed(), 300)
    slurm.command("scancel", "--signal=USR1", "--batch", job.number)
    wait_until(lambda: slurm.job(job.number)["Restarts"] == "1", 90)
    before = finished_trials(folder)
    assert len(before) < 6
    job.wait("COMPLETED")
    after = finished_trials(folder)
    assert len(after) == 6
    assert before.items() <= after.items(), "a finished trial was run again"
    assert "the state is saved" in job.log.read_text()
    require_quiet(slurm)


def finished_trials(folder: Path) -> dict[str, int]:
    """When each was written."""
    files = folder.glob("runs/sweep/trials/*/trial.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in files if '"finished"' in path.read_text()}


def test_shell_files_pass_shellcheck():
    files = [*REPOSITORY.glob("slurm/*.sbatch"), *REPOSITORY.glob("launch/*.sh"), REPOSITORY / ".ci/run"]
    assert len(files) > 5
    subprocess.run(["shellcheck", "-x", *files], check=True, cwd=REPOSITORY)
