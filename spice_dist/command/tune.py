"""`spice-dist tune`: a sweep."""

import argparse
from pathlib import Path

from spice_dist.command.options import (
    Commands,
    add_cluster_options,
    add_ingest_options,
    add_task_options,
    configuration,
    open_source,
)
from spice_dist.errors import plain

EXAMPLES = """examples:
  spice-dist tune digits --space heads --trials 20 --out sweeps/digits
  spice-dist tune digits --space heads --trials 40 --out sweeps/digits --resume
  spice-dist fit digits --config sweeps/digits/best.json --out runs/best
"""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "tune", help="search settings without labels: many trials on one base run, resumable", epilog=EXAMPLES
    )
    command.set_defaults(call=tune)
    command.add_argument("data", help="as for fit")
    command.add_argument("--out", type=Path, required=True, help="the folder of the sweep")
    command.add_argument(
        "--space",
        required=True,
        help="what is searched: heads, thresholds, augmentations, pretrain, or your own .py file with SPACE and METRIC",
    )
    command.add_argument("--trials", type=int, default=20, help="how many, those before --resume included (20)")
    command.add_argument("--resume", action="store_true", help="go on with the sweep in --out; finished trials stay")
    command.add_argument("--objective", help="the label-free score that chooses (default: METRIC of the space)")
    command.add_argument("--search", choices=("optuna", "random"), default="optuna", help="TPE (default) or chance")
    command.add_argument(
        "--scheduler", choices=("none", "asha"), default="none", help="asha: stop trials that promise little"
    )
    command.add_argument("--max-concurrent", type=int, help="trials at a time (default: as many as there is room for)")
    command.add_argument("--time-budget", type=float, metavar="SECONDS", help="start no trial and stop all after this")
    command.add_argument(
        "--base", type=Path, metavar="RUN", help="take data, stage 1 and features from this run folder"
    )
    add_task_options(command)
    add_ingest_options(command)
    command.add_argument(
        "--workers", type=int, default=0, help="training processes of stage 1; 0 (default): the trial's own process"
    )
    command.add_argument("--threads", type=int, default=1, help="CPU threads of a trial, or of each of its workers (1)")
    add_cluster_options(command)


def tune(options: argparse.Namespace, given: list[str]) -> None:
    source = open_source(options)
    config = configuration(options, source).config

    from spice_dist.launching import Launch
    from spice_dist.sweep import run
    from spice_dist.sweep.ray_tune import Search
    from spice_dist.sweep.report import format_sweep

    search = Search(
        options.trials,
        options.objective or "",
        options.search,
        options.scheduler,
        options.max_concurrent,
        options.time_budget,
    )
    place = run.Place(options.out, options.resume, options.base)
    launch = Launch(options.workers, options.threads, options.address, options.insecure, labels=options.labels)
    rows = run.tune(config, source, options.space, place, search, launch, ["spice-dist", *given])
    print(plain(format_sweep(options.out, rows)))
