"""What a page says first: how sure the groups are, and which of them and which images to look at."""

from dataclasses import dataclass, field

import numpy as np

from spice_dist import artifacts
from spice_dist.report.evidence import Evidence
from spice_dist.report.reading import Run, mapping, read_json
from spice_dist.report.text import percent

UNSTABLE = 0.6  # mean Jaccard index below which a group counts as not found again
MIXED = 0.7  # share of neighbours in the same group, below which it counts as mixed
UNSURE = 0.5  # mean confidence, likewise
TOUCHING = 0.1  # share of a group's neighbours in one other group, from which on the two are named
MOST = 6  # that are named of each kind


@dataclass(frozen=True)
class Finding:
    """A sentence: `text`, links to what it is about, and `rest`."""

    text: str
    links: list[tuple[str, str]] = field(default_factory=list)  # (id on the page, its name)
    rest: str = ""
    look: str = ""  # the filter of the page's script that shows it


def group_name(cluster: int, names: dict[int, str]) -> str:
    return f"{cluster} · {names[cluster]}" if cluster in names else f"Cluster {cluster}"


def outside_group(run: Run) -> int | None:
    """Return the group of a corrected run whose images belong to none; it can be neither merged nor divided."""
    path = artifacts.corrections_summary_file(run.folder)
    group = mapping(read_json(path)).get("outside")
    return group if isinstance(group, int) else None


def findings(run: Run, evidence: Evidence, names: dict[int, str]) -> list[Finding]:
    """Return what to look at, the most important first; one sentence says so where nothing stands out."""
    sizes = np.bincount(run.labels, minlength=run.num_clusters)
    weak = _weak(run, evidence, sizes)
    outside = outside_group(run)
    result = [Finding(text, _links(clusters, names), rest) for text, clusters, rest in weak if clusters]
    result += _pairs(evidence, sizes, names, outside)
    if evidence.outliers:
        count = len(evidence.outliers)
        text = f"{count} image{'s fit' if count != 1 else ' fits'} nowhere well"
        result.append(Finding(text + ": ", [("outliers", "look at them")], ".", "outliers"))
    if evidence.copies:
        count = len(evidence.copies)
        text = f"{count} picture{'s are' if count != 1 else ' is'} there more than once: "
        result.append(Finding(text, [("copies", "look at the copies")], ".", "copies"))
    return result or [Finding("No group and no image stands out: look at the galleries from the first to the last.")]


def _weak(run: Run, evidence: Evidence, sizes: np.ndarray) -> list[tuple[str, list[int], str]]:
    sure = np.bincount(run.labels, run.confidence, run.num_clusters) / np.maximum(sizes, 1)
    filled = (sizes > 0) & (np.arange(run.num_clusters) != outside_group(run))
    unstable = np.zeros(run.num_clusters, bool) if evidence.stability is None else evidence.stability < UNSTABLE
    mixed = sure < UNSURE if evidence.cohesion is None else (evidence.cohesion < MIXED) | (sure < UNSURE)
    by_need = np.argsort(sure, kind="stable")
    blurred, several = (by_need[which[by_need]].tolist() for which in (unstable & filled, mixed & ~unstable & filled))
    return [
        (
            "Hardly to be found again in other groupings of the same images: ",
            blurred,
            ". Name one if you know what it is; else merge it or move its images.",
        ),
        (
            "Mixed, with unsure images or neighbours in other groups: ",
            several,
            ". Look at the images on its border; a group of two things can be split.",
        ),
    ]


def _links(clusters: list[int], names: dict[int, str]) -> list[tuple[str, str]]:
    links = [(f"cluster-{k}", group_name(k, names)) for k in clusters[:MOST]]
    return links + [("clusters", f"and {len(clusters) - MOST} more")] * (len(clusters) > MOST)


def _pairs(evidence: Evidence, sizes: np.ndarray, names: dict[int, str], outside: int | None) -> list[Finding]:
    """Return the pairs of groups that touch most."""
    if evidence.crossing is None:
        return []
    others = evidence.crossing * ~np.eye(len(sizes), dtype=bool)
    if outside is not None:
        others[outside], others[:, outside] = 0, 0
    both = np.maximum(others, others.T)
    pairs = sorted(((both[a, b], a, b) for a, b in np.argwhere(np.triu(both) >= TOUCHING).tolist()), reverse=True)
    result = []
    for share, a, b in pairs[:MOST]:
        first, second = (a, b) if others[a, b] >= others[b, a] else (b, a)
        links = [(f"cluster-{k}", group_name(k, names)) for k in (first, second)]
        rest = f": {percent(share, 0)} % of the nearest neighbours of the first are in the second."
        result.append(Finding("Two that may be one, or that share a border: ", links, rest))
    return result


def how_sure(run: Run, evidence: Evidence) -> str:
    """Say in one sentence how many groups hold together."""
    sizes = np.bincount(run.labels, minlength=run.num_clusters)
    filled = int((sizes > 0).sum())
    weak = {k for _, clusters, _ in _weak(run, evidence, sizes) for k in clusters}
    kept = filled - len(weak)
    if filled == 1:
        return "There is one group" + ("; look at it closely." if weak else ".")
    if not weak:
        return f"All {filled} groups hold together."
    return (
        f"{kept} of {filled} groups hold together; {len(weak)} {'are' if len(weak) > 1 else 'is'} worth a closer look."
    )
