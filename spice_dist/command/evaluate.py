"""`spice-dist evaluate`: the scores of finished runs, or of the features of a run's checkpoints."""

import argparse
from pathlib import Path

from spice_dist.command.options import Commands


def add(commands: Commands) -> None:
    command = commands.add_parser("evaluate", help="print the scores of finished runs, or probe a run's features")
    command.set_defaults(call=evaluate)
    command.add_argument(
        "run", type=Path, nargs="+", help="of several, such as seeds, mean and standard deviation are printed"
    )
    command.add_argument(
        "--probe",
        action="append",
        choices=("knn", "kmeans", "linear"),
        help="instead: accuracy of the features of each kept checkpoint of stage 1, also of a run that is not finished",
    )


def evaluate(options: argparse.Namespace, given: list[str]) -> None:
    first, *others = options.run
    if options.probe is None:
        if others:
            from spice_dist.report.table import format_seeds

            print(format_seeds(options.run))
        else:
            print_scores(first)
        return
    import torch

    from spice_dist.errors import UserError
    from spice_dist.probes import format_rows, probe_checkpoints
    from spice_dist.terminal import Bar, StopSignal

    if others:
        raise UserError("--probe takes one run at a time")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with StopSignal() as stop, Bar("probe", stop) as bar:
        rows = probe_checkpoints(first, options.probe, device, bar.show)
    print(format_rows(rows))


def print_scores(run: Path) -> None:
    from spice_dist.report.table import format_scores

    print(format_scores(run))
