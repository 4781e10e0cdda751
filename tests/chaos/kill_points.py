"""Kill a run by SIGKILL at drawn points of every stage, run the same command again, and compare the bytes.

    python -m tests.chaos.kill_points --out kill_points.jsonl                       # one process, minutes
    python -m tests.chaos.kill_points --ray 15 --out kill_points.jsonl              # on two Ray workers, a minute each
    python -m tests.chaos.kill_points --table kill_points.jsonl

Without Ray, a point is a step (before it is reported, after, or while its checkpoint is written) or an operation on a
file of the stage (open, rename, remove, make a folder). The run is a fork of this process, which has imported all that
it needs; it begins with a copy of the calm run, from which the stage and those after it are taken away. With Ray, a
worker or the driver is killed once the stage is seen to have come so far.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spice_dist.distributed import ray_channel
from spice_dist.stage_records import stage_record
from tests.chaos import runs

RESULTS = ("packing", "evaluation", "report")  # what a run does beside its stages
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")
MOMENTS = ("before", "during", "after")  # the report of a step
IMAGES = 200
CHAINS = {
    "spice": ("moco", "features", "spice_self", "reliable", "spice_semi", *RESULTS),
    "graph": ("byol", "graph", "spice_graph", "spice_tune"),
    "scan": ("scan", "self_label"),
    "imc_swav": ("imc_swav",),
    "joint": ("spice_self",),
}
CHANGES = {
    "spice": "",
    "graph": "pretext=byol stage2=spice_graph stage3=spice_tune byol.epochs=2 byol.batch=64 byol.warmup=1"
    " spice_graph.steps=20 spice_tune.epochs=1",
    "scan": "method=scan scan.epochs=2 scan.batch=64 scan.heads=2 self_label.epochs=2 self_label.batch=64"
    " self_label.threshold=0.15",
    "imc_swav": "method=imc_swav pretext=imc_swav imc_swav.epochs=2 imc_swav.batch=64 imc_swav.warmup=2"
    " imc_swav.prototypes=24 imc_swav.dim=16",
    "joint": "spice_self.joint=true",
}
# stages that last for seconds on two Ray workers
LONGER = (
    "moco.epochs=30 byol.epochs=30 imc_swav.epochs=20 scan.epochs=20 self_label.epochs=20 spice_self.epochs=40"
    " spice_semi.steps=80"
)


@dataclass(frozen=True)
class Point:
    """Where a run is killed: at a moment of step `number` of a stage, or at its file operation `number`."""

    chain: str
    stage: str
    moment: str
    number: int


Hook = Callable[[str, str, int], None]  # called as hook(stage, moment, number)


def watch(run: Path, hook: Hook) -> None:
    """Call the hook at every point of the run in this process, for good."""
    from spice_dist.distributed.worker import LocalWorker

    counts: Counter[str] = Counter()
    reported = LocalWorker.report

    def report(self: LocalWorker, step: int, *arguments: Any, **options: Any) -> None:
        hook(self.stage, "before", step)
        try:
            reported(self, step, *arguments, **options)
        finally:
            hook(self.stage, "during", step)
            hook(self.stage, "after", step)

    def operation(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])
            if isinstance(path, str) and path.startswith(f"{run}/") and (stage := part_of(path[len(f"{run}/") :])):
                counts[stage] += 1
                hook(stage, "file", counts[stage])

    LocalWorker.report = report
    sys.addaudithook(operation)


def part_of(name: str) -> str:
    """Return what writes this file of a run folder; "" for the lock and the like."""
    top = name.removeprefix(".").split("/")[0]
    if top == "data":
        return "packing"
    if "/" in name and top != "model":
        return top
    if top.startswith("report.html"):
        return "report"
    return "evaluation" if top.startswith(("assignments", "metrics", "model", "outliers", "levels")) else ""


def in_a_fork(
    arguments: list[str], run: Path, printed: Path, hook: Hook, at_end: Callable[[], object] = lambda: None
) -> int:
    """Run the command in a fork of this process, which has computed nothing; return its exit code, or -SIGNAL."""
    if not (child := os.fork()):
        code = 99
        try:
            with printed.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            watch(run, hook)
            from spice_dist import cli

            code = cli.main(arguments)
            at_end()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + runs.SECONDS
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def draw_points(chain: str, seen: dict[tuple[str, str], int], each: int, seed: int) -> Iterator[Point]:
    """Draw `each` points of every stage of a chain: steps if it has any, else file operations."""
    for stage in CHAINS[chain]:
        draw = random.Random(f"{chain}/{stage}/{seed}")
        for number in range(each):
            moment = MOMENTS[number % len(MOMENTS)] if (stage, "before") in seen and number < each - 1 else "file"
            yield Point(chain, stage, moment, draw.randint(1, seen[stage, moment]))


def without(calm: Path, run: Path, stage: str) -> None:
    """Copy a finished run, but for a stage, those after it, and the results."""
    shutil.copytree(calm, run)
    if stage == "report":
        (run / "report.html").unlink()
        return
    stages = sorted(calm.glob("*/stage.json"), key=lambda path: path.stat().st_mtime_ns)
    names = [path.parent.name for path in stages]
    first = {"packing": 0, "evaluation": len(names)}
    for name in [*names[first[stage] if stage in first else names.index(stage) :], "model"]:
        shutil.rmtree(run / name)
    for file in run.glob("[!.]*"):
        if file.is_file() and file.name != "config.json":
            file.unlink()


def without_ray(out: Path, each: int, chains: list[str], seed: int) -> None:
    """Try `each` points of every stage of these chains."""
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        images, printed = runs.digits(Path(folder), IMAGES), Path(folder) / "printed"
        for chain in chains:
            calm = Path(folder) / chain / "run"
            calm.parent.mkdir()
            most = count_points(runs.fit(images, calm, 0, CHANGES[chain]), calm, printed)
            before = runs.results(calm)
            for point in draw_points(chain, most, each, seed):
                began = time.monotonic()
                killed, differ = try_point(point, images, calm, before, printed)
                tell(out, "one process", point, killed, differ, began)


def count_points(arguments: list[str], run: Path, printed: Path) -> dict[tuple[str, str], int]:
    """Make a calm run; return the largest number of every kind of point, by stage and moment."""
    most: dict[str, int] = {}
    counted = run.with_name("counted.json")

    def count(stage: str, moment: str, number: int) -> None:
        most[f"{stage} {moment}"] = number

    code = in_a_fork(arguments, run, printed, count, lambda: counted.write_text(json.dumps([most, list(sys.modules)])))
    assert code == 0, printed.read_text()
    of_fork, modules = json.loads(counted.read_text())
    for name in modules:  # so that the next forks have them
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    return {(name.split()[0], name.split()[1]): number for name, number in of_fork.items()}


def try_point(
    point: Point, images: Path, calm: Path, before: dict[str, object], printed: Path
) -> tuple[bool, list[str]]:
    """Kill a run at a point and go on; return whether it was killed, and which results are not those of the calm."""
    run = calm.parent / "again" / calm.name  # the report shows the name
    shutil.rmtree(run, ignore_errors=True)
    without(calm, run, point.stage)
    arguments = runs.fit(images, run, 0, CHANGES[point.chain])
    draw = random.Random(str(point))

    def strike(stage: str, moment: str, number: int) -> None:
        if (stage, moment, number) == (point.stage, point.moment, point.number):
            if moment == "during":  # the checkpoint is written in a thread beside
                time.sleep(0.01 * draw.random())
            os.kill(os.getpid(), signal.SIGKILL)

    killed = in_a_fork(arguments, run, printed, strike) == -signal.SIGKILL
    code = in_a_fork(arguments, run, printed, lambda stage, moment, number: None)
    if code:
        return killed, [f"exit code {code}: {printed.read_text().splitlines()[-1]}"]
    return killed, runs.differences(before, runs.results(run))


def tell(out: Path, on: str, point: Point, killed: bool, differ: list[str], began: float) -> None:
    seconds = round(time.monotonic() - began, 1)
    runs.note(out, what="kill point", on=on, **asdict(point), killed=killed, differ=differ, seconds=seconds)
    if differ or not killed:
        print(on, point, "killed" if killed else "not killed", differ, file=sys.stderr)


ON_RAY = (  # (chain, stage), in the order in which points are drawn
    ("spice", "moco"), ("spice", "spice_self"), ("spice", "spice_semi"), ("scan", "scan"), ("imc_swav", "imc_swav"),
    ("spice", "features"), ("spice", "evaluation"), ("graph", "byol"), ("scan", "self_label"), ("spice", "reliable"),
)  # fmt: skip


def on_ray(out: Path, first: int, points: int, seed: int) -> None:
    """Kill a worker, or every third time the driver, of runs on two Ray workers."""
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        place = Path(folder)
        images = runs.digits(place, IMAGES)
        calm: dict[str, dict[str, object]] = {}
        for number in range(first, points):
            chain, stage = ON_RAY[number % len(ON_RAY)]
            began, draw = time.monotonic(), random.Random(f"{number}/{seed}")
            if chain not in calm:
                run = place / chain
                with runs.command(runs.fit(images, run, 0, f"{CHANGES[chain]} {LONGER}"), place / "calm", run) as child:
                    child.start()
                    assert child.ends() == 0, child.printed.read_text()
                calm[chain] = runs.results(run)
            point = Point(chain, stage, "driver" if number % 3 == 2 else "worker", draw.randint(1, 40))
            run = place / str(number)
            with runs.command(
                runs.fit(images, run, 2, f"{CHANGES[chain]} {LONGER}"), place / f"{number}p", run
            ) as child:
                differ = kill_on_ray(child, point) or runs.differences(calm[chain], runs.results(run))
                tell(out, "two Ray workers", point, True, differ, began)
            shutil.rmtree(run)


def kill_on_ray(child: runs.Command, point: Point) -> list[str]:
    """Kill a worker or the driver at the point, go on to the end, and return what went wrong."""
    child.start()
    runs.wait_until(lambda: child.code() is not None or has_come(child.run, point), f"{point} is not reached")
    if child.code() is not None:
        return [f"it ended before: {child.printed.read_text().splitlines()[-1]}"]
    workers = child.training_workers()
    if point.moment == "worker" and workers:
        random.Random(str(point)).choice(workers).kill()
    else:
        child.kill_driver()
        child.start()
    code = child.ends()
    return [f"exit code {code}: {child.printed.read_text().splitlines()[-1]}"] if code else []


def has_come(run: Path, point: Point) -> bool:
    """Tell whether a run on Ray is at the point or behind it: a stage of a moment is seen too late."""
    if point.stage == "evaluation":
        return (stage_record(run, "spice_semi") or {}).get("done", False)
    progress = ray_channel.read_progress(run)
    order = CHAINS[point.chain]
    if progress is None or progress.stage not in order:
        return False
    now, then = order.index(progress.stage), order.index(point.stage)
    return now > then or (now == then and (progress.done >= point.number or progress.total == 0 < point.number))


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Count the points and the equal results by method and stage, as Markdown."""
    yield "| run | stage | one process: n | equal | two Ray workers: n | equal |"
    yield "|---|---|---|---|---|---|"
    killed = [record for record in records if record["what"] == "kill point" and record["killed"]]
    places = list(dict.fromkeys((record["chain"], record["stage"]) for record in killed))
    for chain, stage in [*places, ("all", "")]:
        cells = []
        for on in ("one process", "two Ray workers"):
            here = [each for each in killed if each["on"] == on]
            here = [each for each in here if chain == "all" or (each["chain"], each["stage"]) == (chain, stage)]
            cells += [len(here), sum(not each["differ"] for each in here)]
        yield f"| {chain} | {stage} | {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a line for each point is added to this file")
    parser.add_argument("--each", type=int, default=5, help="points of every stage, without Ray")
    parser.add_argument("--chains", nargs="+", default=list(CHAINS), choices=CHAINS)
    parser.add_argument("--ray", type=int, default=0, help="so many points on Ray instead")
    parser.add_argument(
        "--first", type=int, default=0, help="the number of the first point on Ray, to go on from there"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="print the table of the lines in this file")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table([json.loads(line) for line in options.table.read_text().splitlines()])))
    elif options.ray:
        on_ray(options.out, options.first, options.ray, options.seed)
    else:
        without_ray(options.out, options.each, options.chains, options.seed)


if __name__ == "__main__":
    main()
