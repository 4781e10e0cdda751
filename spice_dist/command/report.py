"""`spice-dist report`: report.html of a finished run, or a page about two runs of the same images."""

import argparse
from pathlib import Path

from spice_dist.command.options import Commands
from spice_dist.data.files import require_regular_files
from spice_dist.errors import UserError, plain

EXAMPLES = """examples:
  spice-dist report runs/photos
  spice-dist report runs/photos --out photos.html
  spice-dist report runs/a runs/b --out compared.html
"""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "report", help="write report.html of a finished run again, or compare two runs", epilog=EXAMPLES
    )
    command.set_defaults(call=report)
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="one run, or two of the same images")
    command.add_argument("--out", type=Path, help="default: report.html in the run folder; needed for two runs")
    command.add_argument(
        "--map", choices=("umap", "pca"), default="umap", help="umap (default) where installed, a minute; or pca"
    )
    command.add_argument("--page-mb", type=float, help="megabytes of thumbnails in the page (20); others lie beside it")


def report(options: argparse.Namespace, given: list[str]) -> None:
    require_regular_files(*options.runs)
    runs: list[Path] = options.runs
    out: Path | None = options.out
    if len(runs) > 2:
        raise UserError(f"{len(runs)} runs were given: give one run, or two to compare")
    if out is None and len(runs) == 2:
        raise UserError("two runs are compared on a page of its own: name it by --out page.html")
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out is {out}; the report is a page: give a name that ends with .html")
    from spice_dist.report import PAGE_MB, write_comparison, write_report

    if len(runs) == 2 and out is not None:
        written = write_comparison(runs[0], runs[1], out)
    else:
        page_mb = PAGE_MB if options.page_mb is None else options.page_mb
        written = write_report(runs[0], out, page_mb=page_mb, take_time=options.map == "umap")
    print(plain(f"wrote {written}"))
