"""`spice-dist pack`: images into one .beton file."""

import argparse
from pathlib import Path

from spice_dist.command.options import Commands, add_ingest_options, open_source

EXAMPLES = """examples:
  spice-dist pack photos/ photos.beton --size 256
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
    command.add_argument("--processes", type=int, help="decoding processes (default: as many as cores)")
    add_ingest_options(command)


def pack(options: argparse.Namespace, given: list[str]) -> None:
    from spice_dist.data import packed_files
    from spice_dist.data.decode import MAX_MEGAPIXELS
    from spice_dist.terminal import Bar, StopSignal

    source = open_source(options)
    with StopSignal() as stop, Bar("pack", stop) as bar:
        manifest = packed_files.pack(
            source,
            options.out,
            size=options.size,
            jpeg_side=options.size,
            format=options.format,
            quality=options.quality,
            max_megapixels=MAX_MEGAPIXELS if options.max_megapixels is None else options.max_megapixels,
            fit=options.fit,
            max_bad=0.05 if options.max_bad is None else options.max_bad,
            drop_duplicates=options.drop_duplicates,
            workers=options.processes,
            progress=bar.show,
        )
    print(f"wrote {manifest.n:,} images to {options.out}")
    for note in manifest.notes():
        print(note)
    if manifest.bad:
        print(f"{options.out}.quarantine.csv says why")
