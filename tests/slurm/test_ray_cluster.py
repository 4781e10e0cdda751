"""A real Ray cluster of two hosts that asks for a token: who gets in, what a job does, what a lost host costs."""

import json
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spice_dist.distributed import ray_channel
from tests.slurm.conftest import ELASTIC, SHORT
from tests.slurm.nodes import REPOSITORY, Nodes, wait_until
from tests.test_outer_stages import slow_folder

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
PYTHON, RAY = str(REPOSITORY / ".venv/bin/python"), str(REPOSITORY / ".venv/bin/ray")
SPICE_DIST = [PYTHON, "-m", "spice_dist.cli"]
DASHBOARD = "http://127.0.0.1:8265"
HEAD, OTHER = "node1", "node2"
NOTICED_SOON = {  # what differs from production: a silent host is given up after 15 s, sooner than by default
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
}


class Cluster:
    """Ray on two hosts, of one core each; `environment` has the token."""

    def __init__(self, nodes: Nodes):
        self.nodes = nodes
        self.token = nodes.folder / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        anybody = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.anybody = {**anybody, **NOTICED_SOON, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self.environment = {**self.anybody, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        self.address = f"{nodes.address(HEAD)}:6379"

    def start(self, name: str, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
        command = [RAY, "start", "--block", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        place = f"--node-ip-address={self.nodes.address(name)}"
        with open(self.nodes.folder / f"{name}.log", "w") as log:
            env = environment or self.environment
            return self.nodes.popen(name, *command, place, *options, env=env, stdout=log, stderr=log)

    def start_head(self, port: int = 6379, dashboard: int = 8265, **options) -> subprocess.Popen:
        ports = (f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1")
        return self.start(HEAD, "--head", *ports, **options)

    def join(self) -> subprocess.Popen:
        return self.start(OTHER, f"--address={self.address}")

    def return_of(self, name: str) -> None:
        """Boot the host, also if it is up, and let it join."""
        if name in self.nodes.inits:
            self.nodes.kill(name)
        wait_until(lambda: self.count() == 1, 60, "the host that left is still counted")
        self.nodes.boot(name)
        self.join()
        wait_until(lambda: self.count() == 2, 120, "the host did not return")

    def drain(self, name: str, seconds: int) -> None:
        """Tell the cluster that the host leaves in so many seconds, as a cloud does before it takes a spot machine."""
        code = "import sys; from ray._raylet import GcsClient as C; print(*(i.hex() for i, n in "
        code += "C(address=sys.argv[1]).get_all_node_info(timeout=10).items() "
        code += "if n.state == 0 and n.node_manager_address == sys.argv[2]))"
        node = self.run(PYTHON, "-c", code, self.address, self.nodes.address(name)).stdout.strip()
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        when = ["--deadline-remaining-seconds", str(seconds)]
        drained = self.run(RAY, "drain-node", "--address", self.address, "--node-id", node, *why, *when)
        assert drained.returncode == 0, drained.stderr

    def run(self, *command: str, name: str = HEAD, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command on a host, with the token unless `environment` says otherwise."""
        return subprocess.run(
            self.nodes._enter(name, command),
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=550,
        )

    def count(self) -> int:
        """How many hosts the cluster has; 0 before it answers."""
        code = "import sys; from ray._raylet import GcsClient as C; print(sum(n.state == 0 for n in "
        code += "C(address=sys.argv[1]).get_all_node_info(timeout=10).values()))"
        done = self.run(PYTHON, "-c", code, self.address)
        return int(done.stdout) if done.returncode == 0 else 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Nodes([HEAD, OTHER]) as nodes:
        found = Cluster(nodes)
        found.start_head()
        wait_until(lambda: found.count() == 1, 120, "the head did not start")
        found.join()
        wait_until(lambda: found.count() == 2, 120, "the other host did not join")
        yield found


def test_a_job_with_the_token_runs_on_both_hosts_and_leaves_the_bits_of_one_process(cluster, alone):
    out = cluster.nodes.folder / "job"
    script = str(REPOSITORY / "launch/ray_job.sh")
    wait_until(lambda: "200" in dashboard_answers(cluster), 120, "the dashboard did not start")
    done = cluster.run(
        script, "fit", "digits", "--out", str(out), "--workers", "2", *SHORT, SPICE_DIST=" ".join(SPICE_DIST)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "assignments.csv").read_bytes() == alone(SHORT)


def dashboard_answers(cluster: Cluster) -> str:
    """The code of HTTP that the dashboard gives somebody with the token."""
    code = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{DASHBOARD}/api/jobs/"]
    return cluster.run(*code, "-H", f"Authorization: Bearer {cluster.token.read_text()}").stdout


def test_without_the_token_or_with_another_no_job_is_taken(cluster):
    wrong = cluster.nodes.folder / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text(secrets.token_hex(32))
    mark = cluster.nodes.folder / "was-here"
    submit = [RAY, "job", "submit", "--address", DASHBOARD, "--", "touch", str(mark)]
    for environment in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": str(wrong)}):
        done = cluster.run(*submit, **environment)
        assert done.returncode != 0
        assert "uthenticat" in done.stdout + done.stderr
    assert not mark.exists()
    assert cluster.run(*submit).returncode == 0  # the same with the token
    assert mark.exists()


def test_the_dashboard_is_not_reached_from_another_host(cluster):
    url = f"http://{cluster.nodes.address(HEAD)}:8265"
    assert cluster.run("curl", "-s", "-m", "5", url, name=OTHER).returncode != 0
    assert cluster.run("curl", "-s", "-m", "5", DASHBOARD).returncode == 0


def test_a_run_says_in_one_line_why_a_cluster_does_not_let_it_in(cluster):
    fit = [*SPICE_DIST, "fit", "digits", "--out", str(cluster.nodes.folder / "no"), *SHORT]
    wrong = {"RAY_AUTH_TOKEN": "0" * 64}
    missing = {"RAY_AUTH_TOKEN_PATH": str(cluster.nodes.folder / "absent")}
    for environment, words in ((wrong, "refuses the token of RAY_AUTH_TOKEN"), (missing, "asks for a token, and none")):
        done = cluster.run(*fit, "--address", cluster.address, **environment)
        assert done.returncode == 1
        assert [line for line in done.stderr.splitlines() if "spice-dist:" in line and words in line]
        assert "Traceback" not in done.stderr


def test_a_cluster_that_lets_anybody_in_is_refused_unless_told(cluster):
    head = cluster.start_head(7379, 9265, environment={**cluster.anybody, "RAY_AUTH_MODE": "disabled"})
    try:
        address = cluster.address.replace("6379", "7379")
        doctor = [*SPICE_DIST, "doctor", "--address", address]
        wait_until(lambda: "asks for no token" in cluster.run(*doctor).stdout, 120, "an open cluster was not refused")
        assert cluster.run(*doctor).returncode == 1
        told = cluster.run(*doctor, "--insecure")
        assert (told.returncode, "room for 1 workers" in told.stdout) == (0, True)
    finally:
        head.kill()


def test_the_doctor_visits_every_host(cluster):
    out = cluster.nodes.folder / "later"
    done = cluster.run(*SPICE_DIST, "doctor", "--address", cluster.address, "--out", str(out))
    assert done.returncode == 0, done.stdout
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("ok   node")] == [HEAD, OTHER]
    private = cluster.run(*SPICE_DIST, "doctor", "--address", cluster.address, "--out", "/tmp/run")
    assert private.returncode == 1
    bad = [line for line in private.stdout.splitlines() if line.startswith("BAD")]
    assert len(bad) == 1  # /tmp is each host's own
    assert f"node      {OTHER}" in bad[0]


def test_a_lost_host_costs_no_result_and_one_that_returns_is_used(cluster, alone):
    """Two workers, then one after a power cut, then two again: counted among the processes of the hosts."""
    out = cluster.nodes.folder / "elastic"
    fit = [*SPICE_DIST, "fit", "digits", "--out", str(out), "--workers", "1:2", *ELASTIC]
    seen: list[str] = []

    def lose_and_return() -> None:
        wait_until(lambda: step(out) > 20 and workers(cluster) == 2, 200, "two workers did not start")
        cluster.nodes.kill(OTHER)
        before = step(out)
        wait_until(lambda: workers(cluster) == 1 and 0 < step(out) != before, 200, "one worker did not go on")
        seen.append("shrunk")
        cluster.nodes.boot(OTHER)
        cluster.join()
        wait_until(lambda: workers(cluster) == 2, 200, "the group did not grow back")
        seen.append("grown")

    hand = threading.Thread(target=lose_and_return, daemon=True)
    hand.start()
    done = cluster.run(*fit, "--address", cluster.address)
    hand.join(10)
    assert done.returncode == 0, done.stderr
    assert seen == ["shrunk", "grown"]
    assert (out / "assignments.csv").read_bytes() == alone(ELASTIC)


@pytest.mark.parametrize(
    ("workers_asked", "cut"),
    [
        ("1:2", False),
        pytest.param("1:2", True, marks=pytest.mark.slow),
        pytest.param("2", False, marks=pytest.mark.slow),
    ],
)
def test_a_drained_host_costs_no_five_steps_and_the_run_goes_on_without_it(cluster, alone, workers_asked, cut):
    """An elastic run shrinks, also if the power is cut at the notice; two fixed workers wait until it is back."""
    out = cluster.nodes.folder / f"drained-{workers_asked[0]}-{cut}"
    seldom = ["--checkpoint-seconds", "4" if cut else "3600"]  # where no power is cut, the notice alone makes them save
    fit = [*SPICE_DIST, "fit", "digits", "--out", str(out), "--workers", workers_asked, *ELASTIC, *seldom]
    seen: list[int] = []

    def drain_and_return() -> None:
        wait_until(lambda: step(out) > 20 and workers(cluster) == 2, 200, "two workers did not start")
        wait_until(lambda: not cut or len(list((out / "moco/checkpoints").glob("0*"))) > 1, 60)
        cluster.drain(OTHER, 60)
        if cut:
            cluster.nodes.kill(OTHER)
        while workers(cluster) == 1 + (not cut):
            seen.append(step(out))
            time.sleep(0.1)
        if workers_asked == "1:2":
            wait_until(lambda: workers(cluster) == 1 and step(out) > 0, 200, "one worker did not go on")
            wait_until(lambda: workers(cluster) == 0, 500, "it did not end")
        else:
            time.sleep(45)  # the line about no room comes after 30 s
        cluster.return_of(OTHER)

    hand = threading.Thread(target=drain_and_return, daemon=True)
    hand.start()
    done = cluster.run(*fit, "--address", cluster.address)
    hand.join(100)
    assert not hand.is_alive()
    assert done.returncode == 0, done.stderr
    resumed = sorted(int(path.suffix[1:]) for path in (out / "moco").glob("events.*"))
    assert len(resumed) == 2
    assert cut or max(seen) - resumed[1] < 5
    assert cut or f"node {OTHER} leaves in " in done.stderr
    waits = "no room for 2 workers: each needs 1 CPU of one node; free are 1 of 1 CPUs on 1 nodes" in done.stderr
    assert waits == (workers_asked == "2")
    assert (out / "assignments.csv").read_bytes() == alone(ELASTIC)


def test_a_host_lost_while_images_are_packed_costs_no_byte_and_the_others_go_on(cluster):
    """The last test: the host does not return."""
    wait_until(lambda: cluster.count() == 2, 120, "the other host is not there")
    images = slow_folder(cluster.nodes.folder / "in")
    pack = [*SPICE_DIST, "pack", str(images), "--size", "32", "--format", "raw"]
    one, other = (cluster.nodes.folder / f"{name}.beton" for name in ("one", "other"))
    working = other.with_name(f".{other.name}.packing") / "data"

    def lose() -> None:
        wait_until(lambda: len(list(working.glob(".pieces/*/*/pages"))) > 2, 200, "the workers have not begun")
        assert workers(cluster) == 2
        cluster.nodes.kill(OTHER)

    hand = threading.Thread(target=lose, daemon=True)
    hand.start()
    done = cluster.run(*pack, str(other), "--address", cluster.address)
    assert done.returncode == 0, done.stderr
    assert OTHER not in cluster.nodes.inits, "it was lost before the end"
    assert cluster.run(*pack, str(one)).returncode == 0
    for path in cluster.nodes.folder.glob("one.beton*"):
        assert path.read_bytes() == path.with_name(path.name.replace("one", "other")).read_bytes(), path


def step(out: Path) -> int:
    """How far the stage that runs has come; 0 if no group is training."""
    try:
        return json.loads((out / ray_channel.PROGRESS).read_text())[1]
    except (OSError, ValueError):
        return 0


def workers(cluster: Cluster) -> int:
    """How many training workers run on the hosts that are up."""
    names = [
        line for name in (HEAD, OTHER) if name in cluster.nodes.inits for line in cluster.nodes.processes(name).values()
    ]
    return sum("TrainWorker" in line for line in names)
