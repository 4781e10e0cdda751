"""The hosts that the other tests run daemons on are separate, connected, and gone without a trace."""

import subprocess
import sys
import time

import psutil
import pytest

from tests.slurm.nodes import Nodes

pytestmark = pytest.mark.slurm
CONNECT = "import socket; socket.create_connection(('node2', 8000), 3).close()"


def test_hosts_are_separate_connected_and_leave_nothing():
    with Nodes(["node1", "node2"]) as nodes:
        assert nodes.run("node1", "hostname", "-I").split() == [nodes.address("node1")]
        assert nodes.run("node1", "hostname") == "node1\n"
        nodes.run("node1", "touch", "/tmp/mine", str(nodes.folder / "ours"))
        assert nodes.run("node2", "sh", "-c", f"ls /tmp/mine {nodes.folder}/ours || true").split() == [
            str(nodes.folder / "ours")
        ]
        server = nodes.popen("node2", sys.executable, "-m", "http.server", "8000", stderr=subprocess.DEVNULL)
        pid = wait_for_server(nodes)
        assert pid not in nodes.processes("node1")
        nodes.kill("node2")
        assert server.wait(10) != 0
        assert not psutil.pid_exists(pid)
        nodes.boot("node2")
        with pytest.raises(subprocess.CalledProcessError):
            nodes.run("node1", sys.executable, "-c", CONNECT, stderr=subprocess.DEVNULL)
        left = [init for _, init in nodes.inits.values()]
    assert not nodes.folder.exists()
    assert not any(psutil.pid_exists(init) for init in left)


def wait_for_server(nodes: Nodes) -> int:
    """Its process, once the other host reaches it."""
    deadline = time.monotonic() + 30
    while True:
        try:
            nodes.run("node1", sys.executable, "-c", CONNECT, stderr=subprocess.DEVNULL)
        except subprocess.CalledProcessError:
            assert time.monotonic() < deadline
            continue
        (pid,) = nodes.processes("node2")
        return pid
