"""A real SLURM on hosts made of namespaces: munged and slurmctld on `login`, an unmodified slurmd on every node."""

import os
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.slurm.nodes import LOGIN, Nodes, wait_until

MEMORY = 6000  # MB that each node says it has
CONFIG = """\
ClusterName=test
SlurmctldHost=login({login})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={run}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool-%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd-%n.pid
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
# what differs from a production cluster: everything is noticed in seconds
SlurmdTimeout=20
KillWait=15
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
NodeName={names} CPUs={cpus} RealMemory={memory} Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES DefaultTime=20 PriorityTier=1 GraceTime=5
PartitionName=urgent Nodes=ALL DefaultTime=20 PriorityTier=9 PreemptMode=OFF
"""


class SlurmCluster:
    """A SLURM that runs on `nodes`; commands are given on its login node."""

    def __init__(self, nodes: Nodes):
        self.nodes = nodes
        self.folder = nodes.folder / "slurm"
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *command: str, variables: Mapping[str, str] | None = None, **options) -> str:
        """What a SLURM command prints on the login node; `variables` go into its environment."""
        return self.nodes.run(LOGIN, *command, env={**self.environment, **(variables or {})}, **options).strip()

    def submit(self, *arguments: str | Path, **variables: str) -> str:
        """sbatch; returns the job's number. `variables` go into its environment."""
        environment = {**self.environment, **variables}
        return self.nodes.run(LOGIN, "sbatch", "--parsable", *map(str, arguments), env=environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, NodeList, ..."""
        shown = self.command("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, number: str, states: Sequence[str] = ("COMPLETED",), seconds: float = 200.0) -> dict[str, str]:
        """The job, once it is in one of these states."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert job["JobState"] not in ended, f"job {number} ended: {job}"
            assert time.monotonic() < deadline, f"job {number} is not {states}: {job}"
            time.sleep(0.5)
        return job

    def start(self) -> None:
        folder = self.folder
        folder.mkdir()
        (folder / "state").mkdir()
        names = self.nodes.names
        lines = CONFIG.format(
            login=self.nodes.address(LOGIN),
            run=folder,
            names=f"node[1-{len(names)}]",
            cpus=os.cpu_count(),
            memory=MEMORY,
        )
        (folder / "slurm.conf").write_text(lines)
        # a GPU to SLURM is any character device; those of a test need not be more than a name
        device = folder / "gpu"
        os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"NodeName=node[1-{len(names)}] Name=gpu File={device}\n")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_text(secrets.token_hex(512))
        places = [f"--{name}={folder}/munge.{name}" for name in ("pid-file", "log-file", "seed-file")]
        self._daemon(LOGIN, "munged", "-F", "-f", f"--key-file={key}", f"--socket={folder}/munge.sock", *places)
        wait_until((folder / "munge.sock").exists, 10)
        self._daemon(LOGIN, "slurmctld", "-D", "-i")
        for name in names:
            self.start_node(name)
        wait_until(lambda: self.idle_nodes() == len(names), 60)

    def start_node(self, name: str) -> None:
        """slurmd on a host that has been booted."""
        self._daemon(name, "slurmd", "-D", "-N", name)

    def idle_nodes(self) -> int:
        listed = self.command("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False)
        return len(listed.split())

    def _daemon(self, name: str, *command: str) -> subprocess.Popen:
        environment = {name: self.environment[name] for name in ("PATH", "SLURM_CONF")}
        log = open(self.folder / f"{command[0]}-{name}.out", "a")  # noqa: SIM115  the daemon's until it ends
        return self.nodes.popen(name, *command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@contextmanager
def slurm_cluster(names: Sequence[str], shared: Sequence[Path] = ()):
    with Nodes(names, shared) as nodes:
        cluster = SlurmCluster(nodes)
        cluster.start()
        yield cluster
