"""Check the nodes of a Ray cluster: room for workers, versions of the program, access to the run folder."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from spice_dist.errors import UserError

LOOK_SECONDS = 3.0  # between two looks at the cluster
SAY_SECONDS = 30.0  # between two lines on what is waited for
CONNECT_SECONDS = 3.0  # in which a node that is there takes a connection
SECONDS = 60.0  # how long the nodes may take to answer: each starts a process for it
PACKAGES = ("spice_dist", "torch", "ray")


@dataclass(frozen=True)
class Report:
    """The answer of one node."""

    host: str
    versions: dict[str, str]  # of Python and PACKAGES
    free: float = 0.0  # bytes in the run folder's file system
    problem: str = ""  # with the run folder; empty if it can be used


def kind_of_seat() -> str:
    """Return what is scarce for workers in this session's cluster: "GPU" if any node has one, else "CPU"."""
    import ray

    return "GPU" if ray.cluster_resources().get("GPU") else "CPU"


def seat() -> dict[str, float]:
    """Return the resources that a worker occupies."""
    return {"CPU": 1, "GPU": 1} if kind_of_seat() == "GPU" else {"CPU": 1}


def _seats_in(resources: Mapping[str, float], each: Mapping[str, float]) -> int:
    return min(int(resources.get(kind, 0) // amount) for kind, amount in each.items())


def seats() -> int:
    """Return how many workers the nodes that stay could run if nothing else used them."""
    each = seat()
    return sum(_seats_in(node["Resources"], each) for node in _nodes())


def count() -> int:
    """Return how many nodes answer."""
    return len(_nodes())


def amounts(kind: str) -> list[int]:
    """Return how many CPUs or GPUs, by `kind`, each node that answers has."""
    return [int(node["Resources"].get(kind, 0)) for node in _nodes()]


def cpus_each(workers: int) -> int:
    """Return the most CPUs that each of so many workers, with a GPU each where there are GPUs, can have; 0: no room."""
    kind = kind_of_seat()
    nodes = list(zip(amounts("CPU"), amounts(kind), strict=True))
    for cpus in range(max((cpu for cpu, _ in nodes), default=0), 0, -1):
        if sum(min(cpu // cpus, seats) for cpu, seats in nodes) >= workers:
            return cpus
    return 0


def fits_a_node(resources: Mapping[str, float]) -> bool:
    """Return whether a single node that answers has all of these resources."""
    totals = [node["Resources"] for node in _nodes()]
    return any(all(total.get(kind, 0) >= amount for kind, amount in resources.items()) for total in totals)


def free_seats() -> int:
    """Return how many more workers the nodes that stay could run now."""
    each = seat()
    return sum(_seats_in(free, each) for free in _free())


def room_in_words() -> str:
    """Say what each worker needs, and what of it the nodes have free."""
    each, nodes, free = seat(), _nodes(), _free()
    needed = " and ".join(f"{amount:g} {kind}" for kind, amount in each.items())
    shares = (
        f"{sum(node.get(kind, 0) for node in free):g} of "
        f"{sum(node['Resources'].get(kind, 0) for node in nodes):g} {kind}s"
        for kind in each
    )
    return f"each needs {needed} of one node; free are {', '.join(shares)} on {len(nodes)} nodes"


def leaving(among: Collection[str]) -> list[str]:
    """Say of each of these nodes that is drained when it leaves the cluster.

    Ray's own notice in the workers, `ray.train.get_preemption_info`, is a collective that they would call every step.
    """
    deadlines, names = _draining(), {node["NodeID"]: node["NodeManagerHostname"] for node in _alive()}
    told = []
    for number in sorted(deadlines.keys() & names.keys() & set(among)):
        left = max(0.0, deadlines[number] / 1000 - time.time())
        told.append(f"node {names[number]} leaves " + (f"in {left:.0f} s" if deadlines[number] else "soon"))
    return told


def kill_worker(node: str, process: int) -> None:
    """Kill a process of Ray on a node, by a task there; not if another program has got its number meanwhile."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    kill = ray.remote(num_cpus=0, max_retries=0)(kill_here)
    kill.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(process)


def kill_here(process: int) -> None:
    """Kill a process of this machine if it is one of Ray's."""
    with contextlib.suppress(OSError):
        if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(process, signal.SIGKILL)


def _draining() -> dict[str, int]:
    """Return {number of a node that is about to leave: when, in milliseconds of UNIX time, or 0}."""
    from ray._private.state import state

    return state.get_draining_nodes()


def _free() -> list[dict[str, float]]:
    """Return what is free on each node that stays."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [free.get(node["NodeID"], {}) for node in _nodes()]


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def restarts() -> int:
    """Return how often Ray has started processes of this session's actors again."""
    import ray
    from ray._private import state

    job = ray.get_runtime_context().get_job_id()
    return sum(int(actor["NumRestarts"]) for actor in state.actors().values() if actor["JobID"] == job)


def _nodes() -> list[dict[str, Any]]:
    """Return the nodes that stay and whose daemon takes a connection: Ray notices a lost node many seconds later."""
    leaves = _draining()
    return [node for node in _alive() if node["NodeID"] not in leaves and _answers(node)]


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def survey(folder: Path | None) -> list[tuple[str, Report | str]]:
    """Ask every node of this session's cluster at once; return (name, its report or why it has none), by name.

    Args:
        folder: the run folder, which must exist here; a file in it shows whether every node sees the same folder.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mark = _leave_mark(folder) if folder else None
    ask = ray.remote(num_cpus=0, max_retries=0)(report_of_this_node)
    nodes = sorted(_nodes(), key=lambda node: (node["NodeManagerHostname"], node["NodeManagerAddress"]))
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asked = [ask.options(scheduling_strategy=node).remote(*(mark or (None, None))) for node in strategies]
    try:
        ray.wait(asked, num_returns=len(asked), timeout=SECONDS)
        names = [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes]
        return list(zip(names, map(_answer, asked), strict=True))
    finally:
        if mark:
            mark.path.unlink(missing_ok=True)


def report_of_this_node(mark: Path | None, text: str | None) -> Report:
    """Report whether this node reads `text` in the file `mark` and can write beside it."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))} | {name: _version(name) for name in PACKAGES}
    if mark is None:
        return Report(socket.gethostname(), versions)
    folder = mark.parent
    probe = mark.with_name(f"{mark.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        if mark.read_text() != text:
            return Report(socket.gethostname(), versions, problem=f"{folder} is another folder there")
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return Report(socket.gethostname(), versions, problem=f"{error.strerror or error}: {error.filename or folder}")
    return Report(socket.gethostname(), versions, free=shutil.disk_usage(folder).free)


def require_shared(folder: Path) -> None:
    """Raise UserError if a node of the cluster cannot use the run folder: workers there would lose what they train."""
    for name, answer in survey(folder):
        problem = answer if isinstance(answer, str) else answer.problem
        if problem:
            raise UserError(
                f"node {name} cannot use {folder} ({problem}); give an --out on storage that every node of the "
                "cluster mounts at the same place"
            )


class _Mark(NamedTuple):
    """A file in the run folder that a node must be able to read, and its content."""

    path: Path
    text: str


def _leave_mark(folder: Path) -> _Mark:
    text = secrets.token_hex(16)
    mark = _Mark(folder / f".seen-by-{text[:8]}", text)
    mark.path.write_text(text)
    return mark


def _answer(reference: Any) -> Report | str:
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(reference, timeout=0)
    except GetTimeoutError:
        return "it does not answer"
    except RayError as error:
        cause = error.__cause__ or error
        return next((line for line in reversed(str(cause).splitlines()) if line.strip()), type(cause).__name__)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
