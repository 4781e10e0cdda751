"""Names of files and folders that are safe on any system, and different."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from spice_dist import artifacts
from spice_dist.group_names import OUTSIDE, labels_of, numbered, plain

MAX_BYTES = 200  # of a safe name in UTF-8; most file systems take 255, and `distinct` adds a number
FORBIDDEN = '<>:"/\\|?*'  # on Windows, as are control characters, and a dot or space at the end
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³")}


def safe_name(text: str, stem: str = "_") -> str:
    """Return a name for a file or folder on any system; `stem` is taken for a name of which nothing is left.

    No separator, control character, device name (CON), leading dot, or dot or space at the end; NFC; at most MAX_BYTES
    bytes, cut in front of the suffix.
    """
    text = "".join(c if c.isprintable() and c not in FORBIDDEN else "_" for c in unicodedata.normalize("NFC", text))
    text = text.strip(". ")
    name, dot, suffix = text.rpartition(".")
    if not dot or len(suffix) > 10:
        name, dot, suffix = text, "", ""
    if name.split(".")[0].rstrip().lower() in DEVICES:
        name = f"_{name}"
    room = MAX_BYTES - len(f"{dot}{suffix}".encode())
    name = name.encode()[:room].decode(errors="ignore").rstrip(". ")
    return f"{name or stem}{dot}{suffix}"


def folders_of(run: Path, clusters: int) -> dict[int, str]:
    """Return a folder name for each cluster and for OUTSIDE, different also where upper and lower case are one."""
    labels = labels_of(artifacts.model(run), clusters)
    taken: dict[str, int] = {}
    folders = {}
    for cluster in [*range(clusters), OUTSIDE]:
        number = numbered(cluster, clusters)
        folders[cluster] = distinct(safe_name(labels[cluster] if cluster >= 0 else number, number), taken)
    return folders


def distinct(name: str, taken: dict[str, int]) -> str:
    """Return the name, or with the first free number in front of its suffix: "a-2.jpg"; enter it into `taken`."""
    stem, dot, suffix = name.rpartition(".")
    if not stem:
        stem, dot, suffix = name, "", ""
    number, candidate = taken.get(name.casefold(), 1), name
    while candidate.casefold() in taken:
        number += 1
        candidate = f"{stem}-{number}{dot}{suffix}"
    taken[name.casefold()] = number
    taken.setdefault(candidate.casefold(), 1)
    return candidate


def spoken(names: Sequence[str], most: int = 3) -> str:
    """Return the first names for a message, printable, and how many more there are."""
    shown = ", ".join(plain(name) for name in names[:most])
    return shown + f" and {len(names) - most:,} more" * (len(names) > most)
