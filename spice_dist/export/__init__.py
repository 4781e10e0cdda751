"""Take a run away: its images by group, tables, its networks. Each target is a module; TARGETS lists them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spice_dist.errors import UserError, no_folder

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wish:
    """What to export, where to, and the options that only some targets take."""

    to: str
    run: Path
    out: Path
    link: bool = False
    copy: bool = False
    dry_run: bool = False
    skip_missing: bool = False
    source: Path | None = None


@dataclass(frozen=True)
class Target:
    suffix: str  # of OUT; "": a folder
    options: tuple[str, ...] = ()  # names of the fields of Wish that it takes


TARGETS = {
    "folders": Target("", ("link", "copy", "dry_run", "skip_missing", "source")),
    "parquet": Target(".parquet"),
    "csv": Target(".csv"),
    "onnx": Target(".onnx"),
    "timm": Target(".safetensors"),
    "labelstudio": Target(".json", ("source",)),
}


def export(wish: Wish, progress: Progress) -> list[str]:
    """Write what is wished; return lines for the terminal. `progress` gets (done, all).

    Raises:
        UserError: an option does not fit the target, OUT exists, the run has not finished, or what the target says.
    """
    check(wish)
    lines = _export(wish, progress)
    return lines if wish.dry_run else [*lines, *_refresh_card(wish.run)]


def check(wish: Wish) -> None:
    """Raise a UserError if an option or OUT does not fit the target."""
    target = TARGETS[wish.to]
    for option in ("link", "copy", "dry_run", "skip_missing", "source"):
        if getattr(wish, option) and option not in target.options:
            takers = " and ".join(name for name in TARGETS if option in TARGETS[name].options)
            raise UserError(f"--{option.replace('_', '-')} is for --to {takers}; leave it out with --to {wish.to}")
    if wish.link and wish.copy:
        raise UserError("--link and --copy exclude each other; give one of them")
    if not target.suffix:
        return
    if wish.out.suffix.lower() != target.suffix:
        raise UserError(f"--to {wish.to} writes a {target.suffix} file; give OUT{target.suffix} in place of {wish.out}")
    if os.path.lexists(wish.out):
        raise UserError(f"{wish.out} exists; give an OUT that does not exist")
    if not wish.out.absolute().parent.is_dir():
        raise UserError(f"{no_folder(wish.out.parent)}; make it, or give another OUT")


def _export(wish: Wish, progress: Progress) -> list[str]:
    run, out = wish.run, wish.out
    if wish.to == "folders":
        from spice_dist.export import folders

        return folders.export(
            run,
            out,
            link=wish.link,
            source=wish.source,
            skip_missing=wish.skip_missing,
            dry_run=wish.dry_run,
            progress=progress,
        )
    if wish.to == "labelstudio":
        from spice_dist.export import labelstudio

        return labelstudio.export(run, out, wish.source, progress)
    if wish.to == "onnx":
        from spice_dist.export import onnx_network

        return onnx_network.export(run, out)
    if wish.to == "timm":
        from spice_dist.export import timm_backbone

        return timm_backbone.export(run, out)
    from spice_dist.export import tables

    write = {"csv": tables.write_csv, "parquet": tables.write_parquet}[wish.to]
    return write(run, out, progress)


def _refresh_card(run: Path) -> list[str]:
    """Write the model card again if names have changed since; return a line if that fails, as in a read-only run."""
    from spice_dist import artifacts

    card, names = artifacts.card_file(run), artifacts.names_file(run)
    if card.exists() and (not names.exists() or names.stat().st_mtime <= card.stat().st_mtime):
        return []
    from spice_dist.model_card import write_card

    try:
        write_card(run)
    except UserError as error:
        return [f"the model card was not written again: {error}"]
    return []
