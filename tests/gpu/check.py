"""Check the program on a GPU within some minutes: correct, fast, and good for something, in this order.

    launch/gpu_check.sh MINUTES --out DIR

Every finding is written at once to check.json and check.md in the folder of the check and, with --out, there too. Each
part has a share of the minutes, and what it leaves goes to the parts after it. What fails is a row. The next call goes
on where this one ends; --out also gets carry.tar.*, with which `launch/gpu_check.sh pack` lets it go on elsewhere.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from spice_dist.distributed.worker import usable_cores
from spice_dist.errors import UserError
from tests.gpu import equal, speed, state, training
from tests.gpu.context import OUT_OF_TIME, Context, apart
from tests.gpu.results import Results

FOLDER = Path("runs/gpu_check")


@dataclass(frozen=True)
class Part:
    run: Callable[[Context], None]
    minutes: float  # that it is expected to take on a GPU


PARTS = {
    equal.NAME: Part(equal.run, 2.5),
    speed.NAME: Part(speed.run, 1.5),
    training.CLUSTER: Part(training.cluster, 9.0),
    training.LABELS: Part(training.from_labels, 9.5),
}


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if all parts that were asked for are done and no row is a failure, else 1."""
    options = parse(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic products need
    deadline = monotonic() + 60 * options.minutes
    for folder in (options.folder, options.out):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    results = Results(options.folder, options.out)
    context = Context(options.folder, torch.device(options.device), deadline, options.labels, results)
    why = apart(describe, context, deadline=deadline)
    results.read()
    if why:
        print(f"gpu_check: {options.device} cannot be used: {why}", file=sys.stderr)
        return 1
    left = [name for name in PARTS if name in options.parts and name not in results.done]
    while left:
        name, *after = left
        share = PARTS[name].minutes / sum(PARTS[other].minutes for other in left)
        run_part(context, name, monotonic() + share * max(0.0, deadline - monotonic()))
        left = after
    if options.out:
        state.bundle(options.folder, options.out)
    print(results.page())
    failed = [row for row in results.rows if not row["ok"]]
    return int(bool(failed) or not set(options.parts) <= set(results.done))


def run_part(context: Context, name: str, deadline: float) -> None:
    """Run a part until its deadline, in a process of its own; it is done when it has ended without a failure."""
    results = context.results
    part = Context(context.folder, context.device, deadline, context.labels, results)
    print(f"{name}: {deadline - monotonic():.0f} s", file=sys.stderr)
    why = apart(PARTS[name].run, part, deadline=deadline)
    results.read()
    if why and why != OUT_OF_TIME:
        results.add(name, "the whole part", False, error=why)
    elif not why:
        results.rows = [row for row in results.rows if (row["part"], row["name"]) != (name, "the whole part")]
        if all(row["ok"] for row in results.rows if row["part"] == name):
            results.finish(name)
    results.write()


def describe(context: Context) -> None:
    """Write down what the check runs on; raise UserError if the device does not answer."""
    machine = {
        "device": "cpu",
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    try:
        torch.ones(1, device=context.device).add_(1)
    except (AssertionError, RuntimeError) as error:
        raise UserError(str(error)) from error
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        machine["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        machine["cuda"] = str(torch.version.cuda)
        machine["cudnn"] = str(torch.backends.cudnn.version())
    context.results.machine = {name: str(value) for name, value in machine.items()}
    context.results.write()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("minutes", type=float, nargs="?", default=60.0, help="in all (60)")
    folder = Path(os.environ.get("GPU_CHECK_FOLDER", FOLDER))
    parser.add_argument("--folder", type=Path, default=folder, help=f"of the check ({folder})")
    parser.add_argument("--out", type=Path, help="where findings and carry.tar.* are copied to")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny, shows that the check works"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument(
        "--labels", type=Path, help="an array of reliable labels, -100 where there is none, to start from"
    )
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"MINUTES is {options.minutes:g}; give more than 0")
    packed = options.folder / "data/labels.npy"
    if options.labels is None and packed.exists():
        options.labels = packed
    if options.labels and not options.labels.is_file():
        parser.error(f"--labels {options.labels} is no file")
    return options


if __name__ == "__main__":
    sys.exit(main())
