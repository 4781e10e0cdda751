"""Measure the seconds from a loss to the next step of training: of a worker, of the driver, of a node.

    python -m tests.chaos.recovery --of worker driver --times 20 --out recovery.jsonl
    python -m tests.chaos.recovery --of node --times 10 --out recovery.jsonl         # root: hosts made of namespaces
    python -m tests.chaos.recovery --table recovery.jsonl

A worker is replaced within a run. A killed driver is started again at once. A node is one of three with a power cut; a
silent node is given up after 15 s, as in tests/slurm, which is part of the time. Progress is written twice a second,
so times are up to half a second too long.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist.distributed import ray_channel
from tests.chaos import runs

LOSSES = ("worker", "driver", "node")
GOALS = {"worker": 30, "driver": 60, "node": 30}  # seconds
ENDLESS = "moco.epochs=100000"
OFTEN = ("--checkpoint-seconds", "1")
NODES = ("node1", "node2", "node3")


def trains(run: Path, since: float) -> bool:
    """Tell whether a step was made and told after this time."""
    path, progress = run / ray_channel.PROGRESS, ray_channel.read_progress(run)
    try:
        return progress is not None and progress.loss is not None and path.stat().st_mtime > since
    except FileNotFoundError:
        return False


def seconds_to_recover(run: Path, lose: Callable[[], object]) -> float:
    """Lose something in a run that trains; return after how many seconds it trains again."""
    since = time.time()
    runs.wait_until(lambda: trains(run, since), "it does not train")
    time.sleep(2)  # it has saved
    lost_at, began = time.time(), time.monotonic()
    lose()
    # what was told at the moment of the loss is no recovery
    runs.wait_until(lambda: trains(run, lost_at + 1), "it does not recover")
    return time.monotonic() - began


def of_processes(kinds: list[str], times: int, tell: Callable[[str, float], None]) -> None:
    """Lose a worker and the driver in turn, of a run on two Ray workers of this machine."""
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        folder = Path(name)
        run = folder / "run"
        arguments = runs.fit(runs.digits(folder, 200), run, 2, ENDLESS, *OFTEN)
        draw = random.Random(0)
        with runs.command(arguments, folder / "beside", run) as child:
            child.start()

            def lose_worker() -> None:
                draw.choice(child.training_workers()).kill()

            def lose_driver() -> None:
                assert child.child is not None
                child.child.kill()
                child.child.wait()
                child.start()

            losses = {"worker": lose_worker, "driver": lose_driver}
            for kind in kinds * times:
                tell(kind, seconds_to_recover(run, losses[kind]))


def of_nodes(times: int, tell: Callable[[str, float], None]) -> None:
    """Cut the power of one of the two nodes that have a worker and no driver; the other takes its place."""
    from tests.slurm.nodes import Nodes
    from tests.slurm.test_ray_cluster import HEAD, SPICE_DIST, Cluster

    with Nodes(NODES) as nodes:
        cluster = Cluster(nodes)
        cluster.start_head()
        runs.wait_until(lambda: cluster.count() == 1, "the head does not start")
        for name in NODES[1:]:
            cluster.start(name, f"--address={cluster.address}")
        runs.wait_until(lambda: cluster.count() == len(NODES), "the other nodes do not join")
        run = nodes.folder / "run"
        arguments = runs.fit(runs.digits(nodes.folder, 200), run, 2, ENDLESS, *OFTEN, "--address", cluster.address)
        with open(nodes.folder / "printed", "w") as log:
            nodes.popen(HEAD, *SPICE_DIST, *arguments, env=cluster.environment, stdout=log, stderr=log)
        lost: list[str] = []

        def lose() -> None:
            lost.append(next(name for name in NODES[1:] if has_worker(nodes, name)))
            nodes.kill(lost[-1])

        for _ in range(times):
            tell("node", seconds_to_recover(run, lose))
            nodes.boot(lost[-1])
            cluster.start(lost[-1], f"--address={cluster.address}")
            runs.wait_until(lambda: cluster.count() == len(NODES), "the node does not join again")


def has_worker(nodes: Any, name: str) -> bool:
    return any("TrainWorker" in line for line in nodes.processes(name).values())


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """Return the 50th and the 95th."""
    median, high = np.percentile(seconds, [50, 95])
    return float(median), float(high)


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Give the 50th and the 95th percentile of every loss, as Markdown."""
    yield "| loss | n | p50, s | p95, s | goal, s |"
    yield "|---|---|---|---|---|"
    for kind in LOSSES:
        seconds = [each["seconds"] for each in records if each["what"] == "recovery" and each["kind"] == kind]
        if seconds:
            median, high = percentiles(seconds)
            yield f"| {kind} | {len(seconds)} | {median:.1f} | {high:.1f} | {GOALS[kind]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", nargs="+", choices=LOSSES, default=LOSSES, help="what is lost")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a line for each loss is added to this file")
    parser.add_argument("--table", type=Path, help="print the table of the lines in this file")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table([json.loads(line) for line in options.table.read_text().splitlines()])))
        return

    def tell(kind: str, seconds: float) -> None:
        load = os.getloadavg()[0]  # of other programs too, which share the cores
        runs.note(options.out, what="recovery", kind=kind, seconds=round(seconds, 1), load=round(load, 1))

    if kinds := [kind for kind in options.of if kind != "node"]:
        of_processes(kinds, options.times, tell)
    if "node" in options.of:
        of_nodes(options.times, tell)


if __name__ == "__main__":
    main()
