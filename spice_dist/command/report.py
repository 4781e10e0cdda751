"""`spice-dist report`: report.html of a finished run."""

import argparse
from pathlib import Path

from spice_dist.command.options import Commands

EXAMPLES = """examples:
  spice-dist report runs/photos
  spice-dist report runs/photos --out photos.html
"""


def add(commands: Commands) -> None:
    command = commands.add_parser("report", help="write report.html of a finished run again", epilog=EXAMPLES)
    command.set_defaults(call=report)
    command.add_argument("run", type=Path)
    command.add_argument("--out", type=Path, help="default: report.html in the run folder")


def report(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.report import write_report

    print(f"wrote {write_report(options.run, options.out)}")
