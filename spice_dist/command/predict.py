"""`spice-dist predict`: the clusters of new images."""

import argparse
from pathlib import Path

from spice_dist.command.options import Commands


def add(commands: Commands) -> None:
    command = commands.add_parser("predict", help="assign new images with the model of a finished run")
    command.set_defaults(call=predict)
    command.add_argument("run", type=Path, help="a run folder, or a copy of its model folder")
    command.add_argument("data", help="as for fit")
    command.add_argument("--out", type=Path, required=True, help="a CSV file: index, path, cluster, confidence")


def predict(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist import model_folder

    model_folder.predict(options.run, options.data, options.out)
    print(f"wrote {options.out}")
