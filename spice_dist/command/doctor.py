"""`spice-dist doctor`: find what would end a run, before it starts."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

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
    from spice_dist.config import Config
    from spice_dist.data.sources import Source

EXAMPLES = """examples:
  spice-dist doctor                                               this machine
  spice-dist doctor photos/ --clusters 12 --out runs/photos       and a run that is meant
  spice-dist doctor photos/ --address auto --out /shared/run      and every node of a Ray cluster
"""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "doctor", help="check this machine, a cluster and a run that is meant, before it starts", epilog=EXAMPLES
    )
    command.set_defaults(call=doctor, checkpoint_seconds=None)  # it saves nothing
    command.add_argument("data", nargs="?", help="as for fit; its images and the cost of the recipe are looked at")
    command.add_argument("--out", type=Path, help="the run folder that is meant: is it writable, from every node?")
    add_task_options(command)
    add_ingest_options(command)
    add_launch_options(command)


def doctor(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.doctor import BAD, IntendedRun, findings
    from spice_dist.errors import UserError

    def prepare() -> "tuple[Source, Config]":
        source = open_source(options)
        return source, configuration(options, source).config

    run = IntendedRun(prepare if options.data else None, options.out, launch(options))
    failed = 0
    for finding in findings(run):
        print(plain(str(finding)), flush=True)
        failed += finding.state == BAD
    if failed:
        raise UserError(f"{failed} of these would make a run fail")
