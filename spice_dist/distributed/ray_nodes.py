"""Check the nodes of a Ray cluster: room for workers, versions of the program, access to the run folder."""

import os
import secrets
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from spice_dist.errors import UserError

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
    """Return what a worker occupies in this session's cluster: "GPU" if any node has one, else "CPU"."""
    import ray

    return "GPU" if ray.cluster_resources().get("GPU") else "CPU"


def seats() -> int:
    """Return how many workers the nodes that answer could run if nothing else used them."""
    return sum(amounts(kind_of_seat()))


def count() -> int:
    """Return how many nodes answer."""
    return len(_nodes())


def amounts(kind: str) -> list[int]:
    """Return how many CPUs or GPUs, by `kind`, each node that answers has."""
    return [int(node["Resources"].get(kind, 0)) for node in _nodes()]


def fits_a_node(resources: Mapping[str, float]) -> bool:
    """Return whether a single node that answers has all of these resources."""
    totals = [node["Resources"] for node in _nodes()]
    return any(all(total.get(kind, 0) >= amount for kind, amount in resources.items()) for total in totals)


def free_seats() -> int:
    """Return how many more workers the nodes could run now."""
    from ray._private.state import available_resources_per_node

    kind, free = kind_of_seat(), available_resources_per_node()
    return sum(int(free.get(node["NodeID"], {}).get(kind, 0)) for node in _nodes())


def _nodes() -> list[dict[str, Any]]:
    """Return the nodes whose daemon takes a connection: Ray itself notices a lost node only after many seconds."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and _answers(node)]


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
