"""`spice-dist pack`: images into one .beton file."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spice_dist.command.options import Commands, add_cluster_options, add_ingest_options, open_source

if TYPE_CHECKING:
    from spice_dist.data.manifest import Ingested
    from spice_dist.data.sources import Source
    from spice_dist.terminal import Bar, StopSignal

EXAMPLES = """examples:
  spice-dist pack photos/ photos.beton --size 256
  spice-dist pack /shared/photos /shared/photos.beton --address auto    on all nodes of a Ray cluster
  spice-dist fit photos.beton --out runs/photos
"""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "pack", help="check images and pack them into one .beton file, resumable", epilog=EXAMPLES
    )
    command.set_defaults(call=pack)
    command.add_argument("data", help="as for fit")
    command.add_argument("out", type=Path, help="a new .beton file; OUT.json and lists are written beside it")
    command.add_argument("--size", type=int, default=256, help="shorter side in pixels (256)")
    command.add_argument(
        "--format", choices=("auto", "jpg", "raw"), default="auto", help="raw squares or whole JPEG images"
    )
    command.add_argument(
        "--fit",
        choices=("crop", "squash"),
        default="crop",
        help="crop: squares are central ones; squash: whole images, distorted; fit needs the same data.fit",
    )
    command.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 100 (90)")
    command.add_argument("--processes", type=int, help="decoding processes of this one (default: as many as cores)")
    command.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="Ray workers that share a folder, a list of files or a bucket, each with the cores of its node (default: "
        "0, none; with --address one for each node, or for each GPU)",
    )
    add_cluster_options(command, "OUT and DATA")
    add_ingest_options(command)


def pack(options: argparse.Namespace, given: list[str]) -> None:
    from functools import partial

    from spice_dist.data import packed_files
    from spice_dist.data.dataset import can_travel
    from spice_dist.data.decode import MAX_MEGAPIXELS
    from spice_dist.data.ingest import ingest
    from spice_dist.errors import UserError
    from spice_dist.terminal import Bar, StopSignal

    if options.workers is not None and options.workers < 0:
        raise UserError(f"--workers is {options.workers}; give 1 or more, or 0 for none")
    source = open_source(options)
    if options.workers and not can_travel(source):
        raise UserError(
            f"workers share a folder, a list of files or a bucket; {source.name} is none: leave --workers out"
        )
    many = bool(options.workers) or (options.workers is None and options.address and can_travel(source))
    if many and options.processes:
        raise UserError("--processes is of packing without workers, which take all cores of their nodes; leave it out")
    with StopSignal() as stop, Bar("pack", stop) as bar:
        manifest = packed_files.pack(
            source,
            options.out,
            partial(_on_workers, options, stop, bar)
            if many
            else partial(ingest, workers=options.processes, progress=bar.show),
            size=options.size,
            jpeg_side=options.size,
            format=options.format,
            quality=options.quality,
            max_megapixels=MAX_MEGAPIXELS if options.max_megapixels is None else options.max_megapixels,
            fit=options.fit,
            max_bad=0.05 if options.max_bad is None else options.max_bad,
            drop_duplicates=options.drop_duplicates,
        )
    print(f"wrote {manifest.n:,} images to {options.out}")
    for note in manifest.notes():
        print(note)
    if manifest.bad:
        print(f"{options.out}.quarantine.csv says why")


def _on_workers(
    options: argparse.Namespace, stop: "StopSignal", bar: "Bar", source: "Source", folder: Path, **ingest: Any
) -> "Ingested":
    """Ingest on the workers of a Ray cluster."""
    from tqdm import tqdm

    from spice_dist.data import beton
    from spice_dist.data.manifest import read_manifest
    from spice_dist.distributed import ray_elastic, ray_nodes, ray_train
    from spice_dist.distributed.ray_channel import Progress
    from spice_dist.errors import plain
    from spice_dist.outer_stages import packing

    def show(progress: Progress) -> None:
        if progress.total:
            bar.show(progress.done, progress.total)

    def tell(line: str) -> None:
        tqdm.write(plain(line), sys.stderr)

    run = folder.parent
    run.mkdir(parents=True, exist_ok=True)
    with ray_train.session(options.address, options.workers or 1, options.insecure):
        stop.check()  # Ray takes many seconds to start, and cannot be interrupted meanwhile
        if options.address:
            ray_nodes.require_shared(run)
        job = ray_train.Job((packing(None, source, ingest),), run, 1, stop.requested, show, tell)
        most = ray_nodes.count() if ray_nodes.kind_of_seat() == "CPU" else ray_nodes.seats()
        # without a number, fewer after the loss of a node
        ray_elastic.train(job, (options.workers,) if options.workers else tuple(range(1, most + 1)))
    beton.seal_anew(folder / "dataset.beton")
    return read_manifest(folder)
