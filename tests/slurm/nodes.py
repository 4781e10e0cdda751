"""Hosts made of namespaces on one machine, to run real daemons on: SLURM's, Ray's, anything.

with Nodes(["node1", "node2"]) as nodes:
    nodes.run("node1", "ping", "-c1", "node2")       # waits, returns what it printed
    nodes.popen("node2", "some-daemon")              # a Popen whose kill() kills the daemon
    nodes.kill("node2")                              # a power cut
    nodes.boot("node2")                              # and back, with the /tmp it had

Every node has its own process table, address, host name, /tmp and /dev/shm; the rest of the disk is common and plays
the shared file system. All of them live inside the namespaces of one more host, `login`, with the bridge that connects
them: nothing of this machine's network is touched, and the end of login's first process, at the latest with this one,
is the end of everything. Needs root, util-linux and iproute2.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

LOGIN = "login"
NETWORK = "10.213.77"  # seen in these namespaces alone, so it cannot clash with anything
REPOSITORY = Path(__file__).resolve().parents[2]
OWN = ("--pid", "--mount", "--net", "--uts", "--ipc")
INIT = "echo ready; read"  # the first process of a process table: collects orphans until our end of the pipe closes


class Nodes:
    """Hosts that are up inside the `with` block. `folder` is common to them and short enough for sockets."""

    def __init__(self, names: Sequence[str], shared: Sequence[Path] = ()):
        """`shared`: folders under /tmp that all hosts see; the repository and this Python are among them."""
        self.names = tuple(names)
        self.folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
        self.shared = [path.resolve() for path in (self.folder, REPOSITORY, Path(sys.prefix), *shared)]
        self.inits: dict[str, tuple[subprocess.Popen, int]] = {}  # what keeps a host up, and its first process

    def __enter__(self) -> "Nodes":
        try:
            self._boot_login()
            for name in self.names:
                self.boot(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def address(self, name: str) -> str:
        return f"{NETWORK}.{1 if name == LOGIN else 11 + self.names.index(name)}"

    def run(self, name: str, *command: str, check: bool = True, timeout: float = 60.0, **options) -> str:
        """What the command prints on that host, run in the current folder; options are those of subprocess.run.

        Raises:
            CalledProcessError: its exit code is not 0.
        """
        done = subprocess.run(
            self._enter(name, command), stdout=subprocess.PIPE, text=True, check=check, timeout=timeout, **options
        )
        return done.stdout

    def popen(self, name: str, *command: str, env: Mapping[str, str] | None = None, **options) -> subprocess.Popen:
        """Start the command on that host. SIGKILL to the Popen, or the end of this process, kills it."""
        return subprocess.Popen(self._enter(name, command), env=env, **options)

    def processes(self, name: str) -> dict[int, str]:
        """{pid: command line} of what runs there beside its first process."""
        init = self.inits[name][1]
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                there = os.readlink(f"/proc/{process.pid}/ns/pid") == os.readlink(f"/proc/{init}/ns/pid")
                if there and process.pid != init and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = " ".join(process.cmdline())
        return found

    def kill(self, name: str) -> None:
        """Cut the power: SIGKILL to everything that runs there."""
        keeper, init = self.inits.pop(name)
        if name != LOGIN:
            self._network("ip", "link", "delete", f"{name}-port")
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, 9)
        keeper.wait(60)

    def boot(self, name: str) -> None:
        """Start a host; its /tmp is as it was left."""
        self._start(name, [*self._namespaces_of(LOGIN), "unshare"])
        port, init = f"{name}-port", str(self.inits[name][1])
        hardware = f"02:00:00:00:00:{11 + self.names.index(name):02d}"  # the same after every boot: others remember it
        eth0 = ("peer", "name", "eth0", "address", hardware, "netns", init)
        self._network("ip", "link", "add", port, "type", "veth", *eth0)
        self._network("ip", "link", "set", port, "master", "bridge", "up")
        self._prepare(name)
        self.run(name, "mount", "-t", "tmpfs", "-o", "size=2g,mode=1777", "shm", "/dev/shm")
        self._own_tmp(name)
        self.run(name, "ip", "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        self.run(name, "ip", "link", "set", "eth0", "up")
        self.run(name, "ip", "route", "add", "default", "via", self.address(LOGIN))

    def close(self) -> None:
        """End all hosts and remove the folder."""
        if LOGIN in self.inits:
            self.kill(LOGIN)  # the others are in its process table
        for keeper, _ in self.inits.values():
            keeper.wait(60)
        self.inits.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _boot_login(self) -> None:
        hosts = {name: self.address(name) for name in (LOGIN, *self.names)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in hosts.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "resolv.conf").touch()  # no name server: what is not in hosts is not found, at once
        self._start(LOGIN, ["unshare"])
        self._prepare(LOGIN)
        self._network("ip", "link", "add", "bridge", "type", "bridge")
        self._network("ip", "addr", "add", f"{self.address(LOGIN)}/24", "dev", "bridge")
        self._network("ip", "link", "set", "bridge", "up")

    def _start(self, name: str, unshare: list[str]) -> None:
        command = [*unshare, "--fork", "--kill-child=KILL", *OWN, "--mount-proc", "bash", "-c", INIT]
        pipe = subprocess.PIPE
        keeper = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd="/", start_new_session=True
        )
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        if keeper.stdout.readline() != "ready\n":
            raise RuntimeError(f"no namespaces without CAP_SYS_ADMIN and CAP_NET_ADMIN: {keeper.stderr.read()}")
        init = keeper.pid
        for _ in range(1 if name == LOGIN else 2):  # unshare's child; nsenter's child's
            init = int(Path(f"/proc/{init}/task/{init}/children").read_text())
        self.inits[name] = keeper, init

    def _prepare(self, name: str) -> None:
        self.run(name, "hostname", name)
        self.run(name, "ip", "link", "set", "lo", "up")
        for file in ("hosts", "resolv.conf"):
            self.run(name, "mount", "--bind", str(self.folder / file), f"/etc/{file}")

    def _own_tmp(self, name: str) -> None:
        """A /tmp of its own, in which the shared folders have their places."""
        own = self.folder / "tmp" / name
        own.mkdir(parents=True, exist_ok=True)
        own.chmod(0o1777)
        for path in self.shared:
            if path.is_relative_to("/tmp"):
                place = own / path.relative_to("/tmp")
                place.mkdir(parents=True, exist_ok=True)
                self.run(name, "mount", "--bind", str(path), str(place))
        self.run(name, "mount", "--rbind", str(own), "/tmp")

    def _network(self, *command: str) -> None:
        """In login's network, but with this machine's process numbers."""
        subprocess.run(["nsenter", "-t", str(self.inits[LOGIN][1]), "--net", *command], check=True)

    def _namespaces_of(self, name: str) -> list[str]:
        return ["nsenter", "-t", str(self.inits[name][1]), *OWN, f"--wdns={os.getcwd()}"]

    def _enter(self, name: str, command: Sequence[str]) -> list[str]:
        return [*self._namespaces_of(name), "setpriv", "--pdeathsig", "KILL", *command]


def wait_until(condition: Callable[[], object], seconds: float, what: str | Callable[[], object] = "not true") -> None:
    """AssertionError, with `what` that means, unless it comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what() if callable(what) else what} within {seconds} s")
        time.sleep(0.25)
