"""`spice-dist fit`: the whole pipeline into a run folder."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spice_dist.command.evaluate import print_scores
from spice_dist.command.options import (
    Commands,
    add_ingest_options,
    add_launch_options,
    add_task_options,
    configuration,
    launch,
    open_source,
)
from spice_dist.errors import plain

if TYPE_CHECKING:
    from spice_dist.earlier import Earlier

EXAMPLES = """examples:
  spice-dist fit digits --out runs/digits                         a first run: 1,797 handwritten digits
  spice-dist fit photos/ --out runs/photos                        as many groups as the images suggest
  spice-dist fit photos/ --out runs/photos --clusters 12          other groups of the same run: seconds
  spice-dist fit photos/ --out runs/more --from runs/photos       more photos: clusters keep their numbers and names
  spice-dist fit cifar10:data --out runs/cifar --recipe cifar10 --dry-run    what it would cost
"""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "fit", help="cluster images: the whole pipeline into a run folder, resumable", epilog=EXAMPLES
    )
    command.set_defaults(call=fit)
    command.add_argument(
        "data", help="'digits' (built in), a folder, a list file, an array, NAME:DIR, a URL or a .beton"
    )
    command.add_argument("--out", type=Path, help="the run folder; the same command resumes a run in it")
    command.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="RUN",
        help="go on from a finished run with other images, such as more of them: its settings and weights; clusters "
        "keep their numbers and names",
    )
    command.add_argument("--dry-run", action="store_true", help="only tell what the run would cost: hours and memory")
    command.add_argument(
        "--until",
        metavar="STAGE",
        help="the last stage to run, such as spice_self or spice_graph; assignments, model and report are of it",
    )
    add_task_options(command)
    command.add_argument(
        "--track",
        action="append",
        default=[],
        choices=("mlflow", "wandb"),
        help="send the metrics of training there too; MLflow is found by MLFLOW_TRACKING_URI",
    )
    add_ingest_options(command)
    add_launch_options(command)
    command.add_argument(
        "--checkpoint-seconds",
        type=float,
        metavar="S",
        help="time between two checkpoints, which is what a lost node or worker can cost; default: 60, then by the "
        "time that saving takes and by how often the run was cut off",
    )


def fit(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.errors import UserError

    out: Path | None = options.out
    if out is None and not options.dry_run:
        raise UserError("the run has no folder; give --out, a folder for the run")
    source = open_source(options)
    if "torch" not in sys.modules:  # its import takes seconds
        print(f"{len(source.paths):,} images found; loading torch", file=sys.stderr)
    earlier = _earlier(options)
    resolved = configuration(options, source)

    from spice_dist import launching, pipeline
    from spice_dist.distributed import trackers

    trackers.request(options.track)
    if options.dry_run or out is None:
        if resolved.network:
            print(plain(f"network: {resolved.network}"))
        print(launching.dry_run(resolved.config, source, launch(options)))
        return
    command = ["spice-dist", *given]
    pipeline.fit(resolved.config, source, out, launch(options), command, options.until, resolved.network, earlier)
    print_scores(out)


def _earlier(options: argparse.Namespace) -> "Earlier | None":
    """Open the run of --from; the options get its settings."""
    from spice_dist.errors import UserError

    if options.start is None:
        return None
    settings = ("recipe", "config", "backbone", "weights", "pretext")
    if given := [name for name in settings if getattr(options, name)] or ["method"] * (options.method != "spice"):
        raise UserError(f"--from takes the settings of {options.start}: leave --{given[0]} out")

    from spice_dist import artifacts
    from spice_dist.earlier import open_earlier

    earlier = open_earlier(options.start, options.clusters)
    options.config, options.clusters = artifacts.config_file(earlier.run), options.clusters or earlier.clusters
    return earlier
