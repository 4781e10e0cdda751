"""`spice-dist suggest-k`: how many groups the images form."""

import argparse
from pathlib import Path

from spice_dist.command.options import Commands, add_ingest_options, configuration, open_source

EXAMPLES = """examples:
  spice-dist suggest-k runs/photos                                from the features of a run: at once
  spice-dist suggest-k photos/                                    from the images
"""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "suggest-k", help="how many groups the images form: a curve, a range, three levels", epilog=EXAMPLES
    )
    command.set_defaults(
        call=suggest_k, out=None, recipe=None, method="spice", clusters=None, config=None, pretext=None
    )
    command.add_argument("data", help="as for fit, or the folder of a run whose features are there")
    command.add_argument("--backbone", action="append", default=[], metavar="NAME", help="as for fit (default: auto)")
    command.add_argument("--weights", metavar="timm|FILE", help="as for fit")
    command.add_argument("--seed", type=int, help="of the subsamples (default 0)")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as for fit")
    add_ingest_options(command)


def suggest_k(options: argparse.Namespace, given: list[str]) -> None:
    import tempfile

    from spice_dist.launching import Launch
    from spice_dist.methods.suggested import read_suggestion
    from spice_dist.pipeline import fit_until
    from spice_dist.suggest import describe

    suggestion = read_suggestion(Path(options.data))
    if suggestion is None:
        source = open_source(options)
        resolved = configuration(options, source)
        with tempfile.TemporaryDirectory(prefix="spice-") as folder:
            fit_until("suggest", resolved.config, source, Path(folder), Launch(0), network=resolved.network)
            suggestion = read_suggestion(Path(folder))
    assert suggestion is not None, "the stage leaves one"
    print(describe(suggestion))
