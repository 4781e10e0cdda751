"""`spice-dist slurm`: a command as a job of SLURM, by slurm/fit.sbatch."""

import argparse
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spice_dist.command.options import Commands

EXAMPLES = """examples:
  spice-dist slurm --nodes 4 --gpus 8 -- fit photos.beton --out runs/photos --set bn_groups=32    print the line
  spice-dist slurm --submit --nodes 1 --gpus 1 --time 2:00:00 -- fit photos.beton --out runs/photos
"""
PACKAGE = Path(__file__).resolve().parents[1]
CPUS, GIGABYTES = 8, 32  # of a worker, as in slurm/fit.sbatch


def add(commands: Commands) -> None:
    command = commands.add_parser("slurm", help="print or submit a command as a job of SLURM", epilog=EXAMPLES)
    command.set_defaults(call=slurm)
    command.add_argument("--nodes", type=at_least(1), default=1, metavar="N", help="how many nodes (1)")
    command.add_argument(
        "--gpus", type=at_least(0), default=0, metavar="G", help="GPUs of each node, a worker for each (0)"
    )
    command.add_argument(
        "--cpus", type=at_least(1), metavar="C", help=f"CPUs of each node (default: {CPUS} for each worker)"
    )
    command.add_argument("--mem", metavar="SIZE", help=f"memory of each node (default: {GIGABYTES}G for each worker)")
    command.add_argument(
        "--time", default="24:00:00", help="time limit, after which the job goes on in the queue (24:00:00)"
    )
    command.add_argument("--partition", metavar="NAME", help="partition (default: the cluster's)")
    command.add_argument("--submit", action="store_true", help="call sbatch, which this machine must have")
    command.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="fit photos.beton --out ...")


def at_least(least: int) -> Callable[[str], int]:
    """Return what parses a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"it is {text}; give a whole number of at least {least}")
        return int(text)

    return number


def slurm(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.errors import UserError
    from spice_dist.redaction import secrets_of

    words = options.words[options.words[:1] == ["--"] :]
    if not words:
        raise UserError("no command for the job; give one after --, such as: -- fit photos.beton --out runs/photos")
    if any(secrets_of(word) for word in words):
        raise UserError("SLURM shows the arguments of a job to everybody; give a place without a password or token")
    command = options.root.parse_args(words)  # a mistake is told here, not after hours in the queue
    workers = max(1, options.gpus)
    asked = {
        "--nodes": options.nodes,
        "--gpus-per-node": options.gpus or None,
        "--cpus-per-task": options.cpus or workers * CPUS,
        "--mem": options.mem or f"{workers * GIGABYTES}G",
        "--time": options.time,
        "--partition": options.partition,
    }
    given_to_sbatch = [f"{name}={value}" for name, value in asked.items() if value is not None]
    line = ["sbatch", *given_to_sbatch, str(batch_file()), *words]
    print(shlex.join(line))
    print(_in_words(options.nodes, options.gpus, asked, command))
    if options.submit:
        print(_submitted(line))


def batch_file() -> Path:
    """Return fit.sbatch of the checkout that SPICE_HOME names, or that this package is in."""
    from spice_dist.errors import UserError

    file = Path(os.environ.get("SPICE_HOME") or PACKAGE.parent) / "slurm/fit.sbatch"
    if not file.is_file():
        raise UserError(f"there is no {file}; name the checkout, which has it, in SPICE_HOME")
    return file


def _in_words(nodes: int, gpus: int, asked: dict[str, Any], command: argparse.Namespace) -> str:
    each = f"{gpus} GPU{'s' * (gpus > 1)}, " * bool(gpus)
    each += f"{asked['--cpus-per-task']} CPUs, {asked['--mem']} of memory"
    text = f"{nodes} node{'s' * (nodes > 1)} for {asked['--time']}, each with {each}"
    workers = nodes * max(1, gpus)
    if getattr(command, "workers", 0) is None and workers > 1:
        text += f"; {workers} workers, a number that bn_groups must be a multiple of (--set bn_groups={workers})"
    return text


def _submitted(line: list[str]) -> str:
    """Call sbatch; return what it prints."""
    from spice_dist.errors import UserError

    if shutil.which("sbatch") is None:
        raise UserError("this machine has no sbatch; give the line above on a login node of the cluster")
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"SLURM does not take the job ({reason.removeprefix('sbatch: error: ')})")
    return done.stdout.strip()
