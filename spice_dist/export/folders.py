"""The images of a run in one folder per group: copies, links, or the packed pixels where there are no files.

Everything is planned and checked before anything is written. A file appears whole or not at all and replaces none, so
an export that was stopped goes on.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spice_dist import artifacts
from spice_dist.data.files import Progress, publish_json, temporary_path
from spice_dist.errors import UserError, no_folder
from spice_dist.export.originals import Originals, find_originals
from spice_dist.export.packed_files import PackedFiles, open_packed
from spice_dist.export.result import read_result, utf8
from spice_dist.export.safe_names import distinct, folders_of, safe_name, spoken

RECORD = ".spice-dist-export.json"  # of OUT: which export it holds
BLOCK = 4_096  # bytes in which a file system gives out room
GROUPS_SHOWN = 40


@dataclass(frozen=True)
class Item:
    """A file to write."""

    index: int  # of the image
    name: str  # of the image, as the source gave it
    target: str  # "group/file" below OUT
    size: int  # bytes; of packed pixels at most


@dataclass(frozen=True)
class Plan:
    run: Path
    out: Path
    link: bool  # point to the files; else copy them
    files: Originals | PackedFiles
    items: list[Item]
    missing: list[str]  # names of images whose files are gone

    def original(self, item: Item) -> Path:
        assert isinstance(self.files, Originals)
        return self.files.path(item.name)


def export(
    run: Path, out: Path, *, link: bool, source: Path | None, skip_missing: bool, dry_run: bool, progress: Progress
) -> list[str]:
    """Write the images into `out`, or only say what would be written; return lines that say so.

    Args:
        link: write symbolic links in place of copies.
        source: where the files are now; None: where they were when the run was made.
        skip_missing: leave out images whose files are gone.
        dry_run: write nothing.

    Raises:
        UserError: a file is gone, `out` holds something else or cannot be written, there is no room.
    """
    plan = make_plan(run, out, link, source)
    _check_missing(plan, skip_missing)
    to_do = _check_out(plan)
    if dry_run:
        return [*_summary(plan, "would be"), "nothing is written: this was a dry run"]
    _write(plan, to_do, progress)
    already = len(plan.items) - len(to_do)
    return [*_summary(plan, "are"), *[f"{already:,} of them were there already"] * bool(already)]


def make_plan(run: Path, out: Path, link: bool, source: Path | None) -> Plan:
    """Give every image a place in the folder of its group: no two have the same, and no name leaves the folder."""
    result = read_result(run)
    files = find_originals(run, source, next(result.names())) or open_packed(run)
    if link and isinstance(files, PackedFiles):
        raise UserError("--link needs files to point to, and the run knows none; leave it out for the packed pixels")
    folders = folders_of(run, result.clusters)
    taken: dict[int, dict[str, int]] = {cluster: {} for cluster in folders}
    items, missing = [], []
    for index, (name, cluster) in enumerate(zip(result.names(), result.cluster.tolist(), strict=True)):
        size = files.size(name) if isinstance(files, Originals) else files.size(index)
        if size is None:
            missing.append(name)
            continue
        file = safe_name(_file_name(name, files), f"{index:07d}")
        items.append(Item(index, name, f"{folders[cluster]}/{distinct(file, taken[cluster])}", size))
    return Plan(run, out, link, files, items, missing)


def _file_name(name: str, files: Originals | PackedFiles) -> str:
    """Return the last part of an image's name, with the suffix of what is written."""
    last = PurePosixPath(utf8(name))
    return last.stem + files.suffix if isinstance(files, PackedFiles) else last.name


def _check_missing(plan: Plan, skip_missing: bool) -> None:
    if not plan.missing or (skip_missing and plan.items):
        return
    assert isinstance(plan.files, Originals), "packed images have no files to miss"
    count = f"{len(plan.missing):,} of {len(plan.missing) + len(plan.items):,} images are not in {plan.files}"
    remedy = "give the folder where they are now, --source DIR, or leave these out, --skip-missing"
    raise UserError(f"{count} ({spoken(plan.missing)}); {remedy}")


def _check_out(plan: Plan) -> list[Item]:
    """Return what is still to be written; UserError if `out` holds anything else, or there is no room."""
    out, files = plan.out, plan.files
    if isinstance(files, Originals) and not files.listed and out.resolve().is_relative_to(files.root.resolve()):
        raise UserError(f"{out} is inside of the images' folder {files}; give another OUT")
    if any(os.path.isfile(place) for place in (out, *out.parents)):
        raise UserError(f"{no_folder(out)}; give another OUT")
    if os.path.lexists(out) and _record(out) != _fingerprint(plan):
        raise UserError(f"{out} exists and holds other files than this export; give an OUT that does not exist")
    to_do = [item for item in plan.items if not _is_there(plan, item)]
    room = _room(out)
    needed = sum(BLOCK if plan.link else -(-item.size // BLOCK) * BLOCK for item in to_do)
    if needed > room:
        raise UserError(f"{out} needs {_megabytes(needed)}, there is room for {_megabytes(room)}; give another OUT")
    return to_do


def _is_there(plan: Plan, item: Item) -> bool:
    """Tell whether a file is written already; UserError if there is another one in its place."""
    path = plan.out / item.target
    if not os.path.lexists(path):
        return False
    if plan.link:
        same = path.is_symlink() and Path(os.readlink(path)) == plan.original(item)
    else:
        packed = isinstance(plan.files, PackedFiles)
        same = path.is_file() and not path.is_symlink() and (packed or path.stat().st_size == item.size)
    if not same:
        raise UserError(f"{path} is there already and is not what is exported; move it away and start again")
    return True


def _room(out: Path) -> int:
    """Return the free bytes where `out` will be; UserError if nothing can be written there."""
    folder = next(parent for parent in [out, *out.absolute().parents] if parent.is_dir())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {folder}: no permission; give another OUT")
    return shutil.disk_usage(folder).free


def _fingerprint(plan: Plan) -> str:
    """Hash what is written where, and of which run: an export goes on only with itself."""
    root = plan.files.root if isinstance(plan.files, Originals) else ""
    total = hashlib.sha256(os.fsencode(f"{plan.link}\0{root}\0"))
    total.update(artifacts.assignments_file(plan.run).read_bytes())
    for item in plan.items:
        total.update(os.fsencode(f"{item.name}\0{item.target}\0"))
    return total.hexdigest()


def _record(out: Path) -> str | None:
    """Return the fingerprint of the export that `out` holds; None if it holds none."""
    try:
        return json.loads((out / RECORD).read_bytes())["export"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(plan: Plan, to_do: list[Item], progress: Progress) -> None:
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        publish_json(plan.out / RECORD, {"version": 1, "export": _fingerprint(plan)})
        for folder in sorted({item.target.partition("/")[0] for item in to_do}):
            (plan.out / folder).mkdir(exist_ok=True)
        temporary = temporary_path(plan.out / "part")
        try:
            for done, (item, write) in enumerate(_writers(plan, to_do), 1):
                write(temporary)
                _place(temporary, plan.out / item.target)
                progress(done, len(to_do))
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {plan.out}: {error.strerror or error}; start again to go on") from error


def _place(temporary: Path, path: Path) -> None:
    """Give a file its name; UserError if another program has taken the name since it was found free."""
    if os.path.lexists(path):
        raise UserError(f"{path} has appeared meanwhile; move it away and start again")
    os.rename(temporary, path)


def _writers(plan: Plan, to_do: list[Item]) -> Iterator[tuple[Item, Callable[[Path], object]]]:
    """Yield every item with a function that writes its file."""
    if isinstance(plan.files, PackedFiles):
        contents = plan.files.contents([item.index for item in to_do])
        for item, content in zip(to_do, contents, strict=True):
            yield item, lambda path, content=content: path.write_bytes(content)
        return
    for item in to_do:
        original = plan.original(item)
        if plan.link:
            yield item, lambda path, original=original: path.symlink_to(original)
        else:
            yield item, lambda path, original=original: shutil.copy2(original, path, follow_symlinks=False)


def _summary(plan: Plan, verb: str) -> list[str]:
    """Say what is written where, and what is not as it was."""
    sizes = Counter(item.target.partition("/")[0] for item in plan.items)
    total = _megabytes(sum(item.size for item in plan.items))
    what = "linked" if plan.link else f"copied, {total},"
    if isinstance(plan.files, PackedFiles):
        what = f"written as {plan.files.meaning} (the run knows no files of them),"
    lines = [f"{len(plan.items):,} images {verb} {what} in {len(sizes)} folders of {plan.out}"]
    lines += [f"  {folder}  {sizes[folder]:,}" for folder in sorted(sizes)[:GROUPS_SHOWN]]
    if len(sizes) > GROUPS_SHOWN:
        lines.append(f"  and {len(sizes) - GROUPS_SHOWN:,} more")
    if plan.missing:
        lines.append(f"{len(plan.missing):,} images are left out: their files are gone ({spoken(plan.missing)})")
    changed = [item.name for item in plan.items if not item.target.endswith("/" + _file_name(item.name, plan.files))]
    if changed:
        lines.append(f"{len(changed):,} names are changed, to be safe and different ({spoken(changed)})")
    return lines


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
