"""Names of the groups of a run as one line of printable text. A name that a user gave is hostile text."""

from pathlib import Path

from spice_dist import artifacts

OUTSIDE = -1  # the cluster of an image that belongs to no group


def plain(text: str) -> str:
    """Return one line of printable characters: no controls, no marks that turn the direction, no lone surrogates."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def labels_of(model: Path, clusters: int) -> list[str]:
    """Return a printable label for each cluster of a model folder: the name that the user gave, or "group-03"."""
    names = artifacts.model_names(model)
    return [plain(str(names.get(cluster, ""))) or numbered(cluster, clusters) for cluster in range(clusters)]


def numbered(cluster: int, clusters: int) -> str:
    """Return "group-03": as many digits as the last group needs, at least two."""
    if cluster == OUTSIDE:
        return "no-group"
    return f"group-{cluster:0{max(2, len(str(clusters - 1)))}d}"
