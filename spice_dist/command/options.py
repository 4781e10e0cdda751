"""Options that several sub-commands share; functions that open the images and resolve the configuration they name.

Functions import heavy modules when called, so that --help stays fast.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spice_dist import catalog

if TYPE_CHECKING:
    from spice_dist.data.sources import Source
    from spice_dist.launching import Launch
    from spice_dist.resolve import Resolved

Commands = argparse._SubParsersAction  # of parsers; argparse has no public name for it


def add_task_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--clusters",
        type=number_of_clusters,
        metavar="K|auto",
        help="number of clusters; auto, the default with a trained network: as many as the features suggest",
    )
    command.add_argument(
        "--recipe",
        help="digits, photos, cifar10, ...: whole settings, see recipes.py; default: digits for them, else photos",
    )
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="instead of a recipe: best.json of a sweep, config.json of a run"
    )
    command.add_argument(
        "--backbone",
        metavar="NAME",
        action="append",
        default=[],
        help="a timm model, resnet50 or such; several, as NAME or NAME=WEIGHTS: their features side by side; auto (of "
        "photos): the best trained one that can be had; scratch: train the recipe's own",
    )
    command.add_argument(
        "--weights",
        metavar="timm|FILE",
        help="the backbone's trained weights, timm's own or a file's; images are sized as timm says for the model",
    )
    command.add_argument(
        "--pretext",
        choices=catalog.PRETEXTS,
        help="how the backbone learns first; none: not at all (default: moco, or none with --weights)",
    )
    command.add_argument(
        "--method",
        choices=catalog.METHODS,
        default="spice",
        help="imc_swav: learn features and clusters in one stage, from crops of two sizes; scan: cluster by nearest "
        "neighbours and self-labelling after stage 1; fixmatch, supervised: baselines that USE TRUE LABELS, "
        "given_labels.per_class of each class, with and without the other images (default: spice)",
    )
    command.add_argument("--seed", type=int, help="another seed, another run (default 0)")
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting: moco.epochs=50"
    )


def add_launch_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=number_of_workers,
        metavar="N|MIN:MAX",
        help="training processes, a divisor of bn_groups; 2:8 takes what a cluster has at the time, after a loss fewer "
        "and then more again; 0: no Ray (default: as many as GPUs, or 2 on a CPU)",
    )
    command.add_argument("--threads", type=int, help="CPU threads of each worker (default: cores / bn_groups)")
    command.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="a folder on each node's own disk: the packed images are copied there once and read from there",
    )
    add_cluster_options(command)


def add_cluster_options(command: argparse.ArgumentParser, seen: str = "--out") -> None:
    command.add_argument(
        "--address", help=f"a running Ray cluster to join, host:port or 'auto'; all its nodes must see {seen}"
    )
    command.add_argument(
        "--insecure", action="store_true", help="join a Ray cluster that asks for no token: anybody runs code on it"
    )


def add_ingest_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-bad", type=share, help="largest share of unreadable images to go on with (0.05)")
    command.add_argument(
        "--drop-duplicates", action="store_true", help="leave out exact copies of earlier images, and list them"
    )
    add_reading_options(command)
    command.add_argument(
        "--labels",
        choices=("folder", "array", "list"),
        help="where true labels are, for scores only (and for --method fixmatch and supervised): sub-folder names, an "
        "array of the .npz, a column of the list",
    )
    command.add_argument(
        "--split",
        choices=("whole", "split"),
        default="whole",
        help="named data sets: cluster all images, or train on the train part and score the test part",
    )
    command.add_argument(
        "--trust-foreign-beton",
        action="store_true",
        help="read a .beton that another program or user wrote, after checking and decoding all of it",
    )
    add_trust_list_option(command)


def add_trust_list_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust-list", action="store_true", help="also read the files that a list names outside of its own folder"
    )


def add_reading_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-megapixels",
        type=int,
        metavar="N",
        help="largest image to read, in millions of pixels (50); a JPEG, which is decoded small, five times as many",
    )
    command.add_argument(
        "--follow-links",
        action="store_true",
        help="read links too that point to files within DATA, or within the folder of the list, as in a snapshot of "
        "Hugging Face",
    )


def share(text: str) -> float:
    """Parse a share of the images."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        percent = f"; for {value:g} % give {value / 100:g}" * (1 < value <= 100)
        raise argparse.ArgumentTypeError(f"it is {text}; give a share of the images, from 0 to 1{percent}")
    return value


def number_of_clusters(text: str) -> int:
    """Parse K; "auto" is AUTO."""
    if text == "auto":
        from spice_dist.task import AUTO

        return AUTO
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"it is {text}; give auto, or a whole number of at least 2")
    return int(text)


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"it is {text}; give a whole number such as 4, or 0")
    return int(text)


def number_of_workers(text: str) -> int | tuple[int, int]:
    """Parse N, or MIN:MAX of an elastic run."""
    least, colon, most = text.partition(":")
    if not all(bound.isdecimal() for bound in (least, most or "0")):
        raise argparse.ArgumentTypeError(f"it is {text}; give a number such as 4, or a range such as 2:8")
    if not colon:
        return int(text)
    if not (most and 0 < int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text} is no range; give such as 2:8")
    return int(least), int(most)


def open_source(options: argparse.Namespace) -> "Source":
    """Open the images that DATA names."""
    from spice_dist.data.dataset import open_data

    return open_data(
        options.data,
        options.labels,
        options.split,
        options.trust_foreign_beton,
        options.follow_links,
        options.trust_list,
    )


def configuration(options: argparse.Namespace, source: "Source") -> "Resolved":
    """Resolve the configuration for these images, with the changes that the options ask for."""
    from spice_dist.errors import UserError

    changes: dict[str, Any] = {}
    for item in options.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f'--set takes NAME=VALUE, such as moco.epochs=50, not "{item}"')
        changes[name] = value
    by_option = {
        "clusters": options.clusters,
        "data.max_bad": options.max_bad,
        "data.drop_duplicates": options.drop_duplicates or None,
        "data.max_megapixels": options.max_megapixels,
        "seed": options.seed,
        "pretext": options.pretext,
    }
    changes |= {name: value for name, value in by_option.items() if value is not None}

    from spice_dist.resolve import Wish, resolve
    from spice_dist.terminal import Bar, StopSignal

    backbones = tuple(options.backbone)
    wish = Wish(options.recipe, options.method, backbones, options.weights, changes, options.config)
    with StopSignal() as stop, Bar("download", stop) as bar:
        return resolve(source, wish, options.out, bar.show)


def launch(options: argparse.Namespace) -> "Launch":
    """Return how the run is carried out."""
    from spice_dist.distributed.worker import Storage
    from spice_dist.launching import Launch

    storage = Storage(options.checkpoint_seconds, options.scratch)
    return Launch(options.workers, options.threads, options.address, options.insecure, storage, options.labels)
