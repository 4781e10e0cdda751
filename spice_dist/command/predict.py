"""`spice-dist predict`: the clusters of new images."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spice_dist.command.options import (
    Commands,
    add_cluster_options,
    add_reading_options,
    add_trust_list_option,
    whole_number,
)
from spice_dist.data.files import require_regular_files
from spice_dist.errors import UserError, plain

if TYPE_CHECKING:
    from spice_dist.predicting import Predictions

SUFFIXES = (".csv", ".parquet")
EXAMPLES = """examples:
  spice-dist predict runs/photos new.jpg                          one image: its cluster on the screen
  spice-dist predict runs/photos new_photos/ --out new.csv        or new.parquet
  find new_photos -name '*.jpg' | spice-dist predict runs/photos - --unreadable keep --out new.csv
  spice-dist predict runs/photos s3://bucket/photos --out new.parquet --address auto    on a Ray cluster
  spice-dist predict runs/photos new_photos/ --json | jq '.images[] | select(.cluster == 3).path'
"""


def add(commands: Commands) -> None:
    command = commands.add_parser("predict", help="assign new images with the model of a finished run", epilog=EXAMPLES)
    command.set_defaults(call=predict)
    command.add_argument("run", type=Path, help="a run folder, or a copy of its model folder")
    command.add_argument("data", help="as for fit, one image file, or -: a list of paths from standard input")
    command.add_argument(
        "--out",
        type=Path,
        help="a .csv or .parquet file: index, path, cluster, confidence, name (default: CSV on standard output)",
    )
    command.add_argument(
        "--unreadable",
        choices=("skip", "keep", "error"),
        default="skip",
        help="an image that cannot be used is left out and listed (skip, the default), a row with cluster -1 and no "
        "confidence (keep), or ends the command (error)",
    )
    add_reading_options(command)
    add_trust_list_option(command)
    command.add_argument(
        "--workers",
        type=whole_number,
        metavar="N",
        help="processes that share the images, by Ray Data; 0: this one alone, without Ray (default; with --address "
        "as many as the cluster has room for)",
    )
    add_cluster_options(command)
    command.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")


def predict(options: argparse.Namespace, given: list[str]) -> None:
    require_regular_files(options.run)
    from spice_dist import artifacts
    from spice_dist.data.dataset import open_given

    _check_out(options.out, options.data)
    if options.workers == 0 and options.address:
        raise UserError("--workers is 0: this process alone; leave --address out, or give more workers")
    folder = artifacts.trained_model(options.run)
    source = open_given(options.data, options.follow_links, options.trust_list)

    from spice_dist import predicting
    from spice_dist.terminal import Bar

    if options.workers == 0 or options.workers is options.address is None:
        with Bar("predict") as bar:
            predictions = predicting.predict(folder, source, options.unreadable, bar.show, options.max_megapixels)
        _show(predictions, options)
        return

    from spice_dist.distributed.ray_predict import Cluster, Images, predicted

    images = Images(source, options.data, options.trust_list, options.max_megapixels)
    cluster = Cluster(options.workers, options.address, options.insecure)
    with predicted(folder, images, options.out, options.unreadable, cluster) as predictions:
        _show(predictions, options)


def _check_out(out: Path | None, data: str) -> None:
    from spice_dist.errors import no_folder

    if out is None:
        return
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out is {str(out)!r}; give a name that ends with {' or '.join(SUFFIXES)}")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{no_folder(out.parent)}; give a file in a folder that exists")
    if out.exists() and Path(data).is_file() and out.samefile(data):
        raise UserError(f"--out would replace {data!r}, from which the images are read; give another name")


def _show(predictions: "Predictions", options: argparse.Namespace) -> None:
    from spice_dist import prediction_files as files
    from spice_dist.data.left_out import left_out_line

    listed = files.write_predictions(options.out, predictions) if options.out else None
    if options.json:
        sys.stdout.writelines(files.json_pieces(predictions))
    elif options.out:
        print(plain(f"wrote {options.out}"))
    elif options.data == predictions.source.paths[0]:
        print(plain(files.one_line(predictions)))
    else:
        lines = files.csv_lines(predictions)
        sys.stdout.writelines(map(plain, lines) if sys.stdout.isatty() else lines)
    if line := left_out_line(predictions.left_out(), int(predictions.shown.sum())):
        print(plain(line + (f"; {listed} says why" if listed else "")), file=sys.stderr)
