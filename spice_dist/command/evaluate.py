"""`spice-dist evaluate`: the scores of finished runs, or of the features of a run's checkpoints."""

import argparse
import json
from pathlib import Path

from spice_dist.command.options import Commands
from spice_dist.data.files import require_regular_files
from spice_dist.errors import plain

EXAMPLES = """examples:
  spice-dist evaluate runs/photos
  spice-dist evaluate runs/seed-0 runs/seed-1 runs/seed-2         mean and standard deviation
  spice-dist evaluate runs/photos --json | jq .runs[0].clusters
  spice-dist evaluate runs/digits --probe knn                     features of the checkpoints of stage 1
"""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "evaluate", help="print the scores of finished runs, or probe a run's features", epilog=EXAMPLES
    )
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
    command.add_argument("--json", action="store_true", help="print the numbers as JSON, for scripts")


def evaluate(options: argparse.Namespace, given: list[str]) -> None:
    require_regular_files(*options.run)
    first, *others = options.run
    if options.probe is None:
        _print_runs(options.run, options.json)
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
    print(json.dumps(rows, indent=1) if options.json else plain(format_rows(rows)))


def _print_runs(runs: list[Path], as_json: bool) -> None:
    from spice_dist.report import table

    if as_json:
        print(table.as_json(runs))
    elif len(runs) > 1:
        print(plain(table.format_seeds(runs)))
    else:
        print_scores(runs[0])


def print_scores(run: Path) -> None:
    from spice_dist.report.table import format_scores

    print(plain(format_scores(run)))
