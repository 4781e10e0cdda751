"""`spice-dist apply`: corrections of a run's groups, learned."""

import argparse
from pathlib import Path

from spice_dist.command.options import Commands
from spice_dist.data.files import require_regular_files
from spice_dist.errors import plain

EXAMPLES = """examples:
  spice-dist apply runs/photos edits.json                      writes the run folder runs/photos-edited
  spice-dist apply runs/photos edits.json --out runs/photos2
"""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "apply",
        help="apply corrections of the groups of a finished run, and learn from them",
        description="Name, merge and split groups and fix images as edits.json says, spread that to similar images, "
        "and train the model again. The result is another run folder.",
        epilog=EXAMPLES,
    )
    command.set_defaults(call=apply)
    command.add_argument("run", type=Path)
    command.add_argument("edits", type=Path, help="edits.json: saved from the page of the run, or written by hand")
    command.add_argument("--out", type=Path, help="the new run folder; default: that of the run with -edited appended")
    command.add_argument(
        "--force", action="store_true", help="also corrections that were made on another assignments.csv"
    )


def apply(options: argparse.Namespace, given: list[str]) -> None:
    require_regular_files(options.run)
    from spice_dist import applying

    text = applying.apply(options.run, options.edits, options.out, ["spice-dist", *given], options.force)
    print(plain(text))
