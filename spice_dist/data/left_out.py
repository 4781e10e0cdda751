"""What is left out of a set of images: counts by reason, and one sentence about them."""

from collections.abc import Mapping

from spice_dist.data.sources import HEIC_HINT, HEIC_SUFFIXES, counted, kind_of_ignored


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
    counts = {kind_of_ignored(kind): count for kind, count in by_suffix}
    counts |= {"closed folder": closed, "unreadable": unreadable, "further page": pages, "duplicate": duplicates}
    return {reason: count for reason, count in counts.items() if count}


def left_out_line(counts: Mapping[str, int], kept: int) -> str:
    """Say what `left_out` has counted, such as "51 of 10,051 left out: 30 .heic, 12 links, 9 unreadable"."""
    if not counts:
        return ""
    missing = sum(counts.values())
    line = f"{missing:,} of {kept + missing:,} left out: {', '.join(counted(*item) for item in counts.items())}"
    is_heic = any(f".{suffix}" in counts for suffix in HEIC_SUFFIXES)
    return f"{line}; {HEIC_HINT}" if is_heic else line
