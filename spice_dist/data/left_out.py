"""What is left out of a set of images: counts by reason, and one sentence about them."""

from collections.abc import Mapping
from pathlib import Path

from spice_dist.data.files import printable
from spice_dist.data.folders import HEIC_SUFFIXES, HIDDEN, IMAGE_SUFFIXES, SPECIAL, SYMLINK, SYSTEM

WITHOUT_SUFFIX = "without suffix"
HEIC_HINT = "HEIC is read with pillow-heif: pip install 'spice_dist[heic]'"


def left_out(
    ignored: Mapping[str, int], closed: int, unreadable: int, pages: int = 0, duplicates: int = 0
) -> dict[str, int]:
    """Count what is not among the images, by reason, without the reasons that nothing is left out for.

    Args:
        ignored: as `Source.ignored`.
        closed: folders that cannot be listed.
        unreadable: images that cannot be used.
        pages: of TIFFs, after the first of each.
        duplicates: copies that are left out.
    """
    by_suffix = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    counts = {_name_of(kind): count for kind, count in by_suffix}
    counts |= {"closed folder": closed, "unreadable": unreadable, "further page": pages, "duplicate": duplicates}
    return {reason: count for reason, count in counts.items() if count}


def left_out_line(counts: Mapping[str, int], kept: int) -> str:
    """Say what `left_out` has counted, such as "51 of 10,051 left out: 30 .heic, 12 links, 9 unreadable"."""
    if not counts:
        return ""
    missing = sum(counts.values())
    line = f"{missing:,} of {kept + missing:,} left out: {', '.join(_counted(*item) for item in counts.items())}"
    is_heic = any(f".{suffix}" in counts for suffix in HEIC_SUFFIXES)
    return f"{line}; {HEIC_HINT}" if is_heic else line


def why_no_image(root: Path, ignored: Mapping[str, int], closed: int) -> str:
    """Say what lies in a folder without an image; `closed` of its folders cannot be listed."""
    if not ignored and not closed:
        return f"the folder {str(root)!r} is empty: put images into it ({', '.join(sorted(IMAGE_SUFFIXES))})"
    largest = sorted(ignored.items(), key=lambda item: -item[1])[:6]
    others = [_counted(_name_of(kind), count) for kind, count in largest]
    if closed:
        others.append(f"{closed} folders without read permission")
    hint = ""
    if SYMLINK in ignored:
        hint = "; links are not followed: give the folder they point to, or --follow-links if that is within this one"
    elif HEIC_SUFFIXES & ignored.keys():
        hint = f"; {HEIC_HINT}"
    return (
        f"no image file in {str(root)!r}: found {', '.join(others)}, "
        f"looked for {', '.join(sorted(IMAGE_SUFFIXES))}{hint}"
    )


def _name_of(kind: str) -> str:
    """Return a kind of `Source.ignored` as people call it: ".heic", "link"."""
    if kind == SYMLINK:
        return "link"
    return kind if kind in (SPECIAL, SYSTEM, HIDDEN) else f".{kind}" if kind else WITHOUT_SUFFIX


def _counted(kind: str, count: int) -> str:
    """Return such as "30 .heic" or "2 links"."""
    plural = "s" * (count > 1 and kind[0] != "." and kind not in (WITHOUT_SUFFIX, "unreadable"))
    return f"{count:,} {printable(kind)}{plural}"
