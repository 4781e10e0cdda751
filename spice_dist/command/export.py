"""`spice-dist export`: the images in folders, tables, the networks of a finished run."""

import argparse
from pathlib import Path

from spice_dist.command.options import Commands
from spice_dist.data.files import require_regular_files
from spice_dist.errors import plain
from spice_dist.export import TARGETS

EXAMPLES = """examples:
  spice-dist export runs/photos --to folders sorted --dry-run    what would be copied where
  spice-dist export runs/photos --to folders sorted              a folder per group; --link for links
  spice-dist export runs/photos --to parquet photos.parquet      path, cluster, name, ..., x, y, embedding
  spice-dist export runs/photos --to onnx photos.onnx            bytes of images in, probabilities out
  spice-dist export runs/photos --to timm backbone.safetensors   timm.create_model(..., checkpoint_path=...)
"""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "export",
        help="take a finished run away: images in folders, tables, networks",
        epilog=EXAMPLES,
    )
    command.set_defaults(call=export)
    command.add_argument("run", type=Path, help="the folder of a finished run")
    command.add_argument("out", type=Path, help="a new file, or for folders a new folder")
    command.add_argument("--to", required=True, choices=tuple(TARGETS), help="what to write")
    command.add_argument("--copy", action="store_true", help="folders: copy the files (the default)")
    command.add_argument("--link", action="store_true", help="folders: symbolic links to the files")
    command.add_argument("--dry-run", action="store_true", help="folders: only say what would be written")
    command.add_argument("--skip-missing", action="store_true", help="folders: leave out images whose files are gone")
    command.add_argument(
        "--source", type=Path, metavar="DIR", help="folders, labelstudio: where the images are, if they have moved"
    )


def export(options: argparse.Namespace, given: list[str]) -> None:
    require_regular_files(options.run)
    from spice_dist.export import Wish, export
    from spice_dist.terminal import Bar, StopSignal

    wish = Wish(
        options.to,
        options.run,
        options.out,
        link=options.link,
        copy=options.copy,
        dry_run=options.dry_run,
        skip_missing=options.skip_missing,
        source=options.source,
    )
    with StopSignal() as stop, Bar("export", stop) as bar:
        lines = export(wish, bar.show)
    print(plain("\n".join(lines)))
