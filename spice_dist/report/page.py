"""Render the page of a run: template.html lays out what `sections` returns, tool/ holds its script."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from spice_dist import artifacts
from spice_dist.errors import UserError, no_folder
from spice_dist.report import attention, charts, confusion, payload, previews, sections, sprites, words
from spice_dist.report.evidence import Evidence, gather
from spice_dist.report.gallery import (
    Gallery,
    ReadImages,
    center_similarity,
    cluster_centers,
    galleries,
    read_images,
)
from spice_dist.report.layout import place_images
from spice_dist.report.reading import Run, load, mapping, number
from spice_dist.report.text import flatten, percent, printable

if TYPE_CHECKING:
    from jinja2 import Template

FOLDER = Path(__file__).parent  # holds the templates
PAGE_MB = 20  # of all thumbnails, by default


def write_report(
    run: Path,
    out: Path | None = None,
    images: ReadImages = read_images,
    page_mb: float = PAGE_MB,
    take_time: bool = False,
) -> Path:
    """Write the page about a finished run to `out` (default: report.html inside the run) and return its path.

    Args:
        page_mb: megabytes of thumbnails in the page; others lie in a folder beside it (RUN/report/).
        take_time: whether UMAP, which takes a minute, may make the map.

    Raises:
        UserError: the run has not finished, or the page cannot be written.
        DamagedFile: a file that the page needs is wrong.
    """
    run = Path(run)
    if out is None:
        out = artifacts.report_file(run)
    else:
        check_replaced(out := Path(out))
    if not 0 <= page_mb < 1e6:
        raise UserError(f"the megabytes of a page must be from 0 to a million, not {page_mb:g}")
    loaded = load(run)
    check_out(out)
    folder = (
        artifacts.map_file(run).parent
        if out.resolve() == artifacts.report_file(run).resolve()
        else out.with_suffix(".sheets")
    )
    page, sheets = render(loaded, images, int(page_mb * 1e6), folder.name, take_time)
    if sheets is not None:
        sprites.write_beside(sheets, folder)
    write_page(out, page)
    return out


def check_replaced(out: Path) -> None:
    """Raise a UserError if another file than a page would be lost."""
    if out.is_file() and out.stat().st_size and not out.read_bytes()[:15].lower().startswith(b"<!doctype html"):
        raise UserError(f"{out} is no page; give another --out")


def check_out(out: Path) -> None:
    """Raise a UserError if no page can be written there."""
    if out.is_dir():
        raise UserError(f"{out} is a folder; name the file to write")
    if not out.parent.is_dir():
        raise UserError(f"{no_folder(out.parent)}; make it, or give another --out")


def write_page(out: Path, page: str) -> None:
    """Write the page whole or not at all."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def render(
    run: Run, images: ReadImages, budget: int, folder: str, take_time: bool
) -> tuple[str, sprites.Sheets | None]:
    """Return the page, and the sheets of which it holds the first ones; None if the images cannot be read."""
    centers = similarity = None
    if run.features is not None:
        centers = cluster_centers(run.features, run.labels, run.num_clusters)
        similarity = center_similarity(run.features, run.labels, centers)
    typical = run.confidence if similarity is None else similarity
    shown, notes = galleries(run, similarity, images)
    evidence = gather(run, typical, centers, _indices(shown))
    place = sprites.places(run.labels[evidence.shown])
    sheets, sharp = None, {}
    if _indices(shown).size or not notes:
        taken = sum(thumbnail.bytes for gallery in shown for thumbnail in (*gallery.nearest, *gallery.uncertain))
        left = max(0, budget - taken)
        most = min(previews.SHARE * left, previews.BYTES_EACH * len(evidence.shown))
        sharp = previews.make(run.folder, shown, images, most)
        left -= sum(map(len, sharp.values()))
        sheets = sprites.make(run.folder, evidence.shown, place, images, left)
    points, method = None, ""
    if run.features is not None and len(run.labels) >= 3:
        points, method = place_images(run.folder, run.features, evidence.shown, take_time)
    truth = true_classes(run)
    data = payload.build(run, evidence, place, sheets, folder, points, truth)
    page = template("template.html").render(
        **_context(run, evidence, shown, notes),
        by_center=similarity is not None,
        spotlights=attention.spotlights(run.folder, shown),
        confusion=None if truth is None else confusion.table(run.labels, truth, run.num_clusters, data["classes"]),
        map_method=method,
        data=payload.embed(data),
        sheets=[payload.encoded(sheet) for sheet in sheets.inside] if sheets else [],
        previews=sharp,
        beside_files=bool(sheets and sheets.outside),
        beside=_beside(run, evidence, sheets, folder),
        script=payload.script(),
        script_hash=payload.script_hash(),
    )
    return page, sheets


def _context(run: Run, evidence: Evidence, shown: list[Gallery], notes: list[str]) -> dict[str, Any]:
    """Return what the template shows without a script."""
    names = payload.cluster_names(run)
    return {
        "title": sections.title(run),
        "trust": run.trust,
        "network": str(run.config.get("network") or ""),
        "summary": sections.summary(run),
        "how_sure": words.how_sure(run, evidence),
        "findings": words.findings(run, evidence, names),
        "labels_note": run.labels_note,
        "facts": sections.facts(run),
        "score_titles": sections.SCORE_TITLES,
        "score_rows": sections.score_rows(run),
        "label_free": sections.label_free(run),
        "heads": sections.heads(run),
        "head_selection": sections.head_selection(run),
        "reliable_acc": number(mapping(run.metrics.get("reliable")).get("acc")),
        "sizes": sections.sizes(run),
        "curves": sections.curves(run),
        "feature_map": sections.feature_map(run),
        "durations": sections.durations(run),
        "galleries": shown,
        "group_names": [words.group_name(k, names) for k in range(run.num_clusters)],
        "evidence": evidence,
        "outliers": sections.outliers(run, evidence),
        "copies": sections.copies(run, evidence),
        "gallery_notes": notes,
        "compact": run.num_clusters > 60,
        "image_notes": run.notes,
        "quarantine": run.quarantine,
        "num_quarantined": run.num_quarantined,
        "manifest": sections.manifest(run),
        "command": sections.command(run),
        "apply": sections.apply_command(run),
        "versions": flatten(mapping(run.config.get("versions"))),
        "configuration": flatten(mapping(run.config.get("config"))),
        "fingerprint": flatten(mapping(run.config.get("data"))),
    }


def _indices(shown: list[Gallery]) -> Int[np.ndarray, " W"]:
    return np.unique(np.array([t.index for g in shown for t in (*g.nearest, *g.uncertain)], dtype=np.int64))


def _beside(run: Run, evidence: Evidence, sheets: sprites.Sheets | None, folder: str) -> list[str]:
    """Say which images or thumbnails the page does not hold."""
    notes = []
    if len(evidence.shown) < len(run.labels):
        notes.append(
            f"This page shows {len(evidence.shown):,} of {len(run.labels):,} images: the galleries and a random sample."
        )
    if sheets and sheets.outside:
        inside = min(len(sheets.inside) * sprites.PER_SHEET, len(evidence.shown))
        notes.append(
            f"It holds the thumbnails of {inside:,} images; the others lie in the folder {folder}/ beside it, "
            "which must go along if the page is moved."
        )
    return notes


def true_classes(run: Run) -> Int[np.ndarray, " N"] | None:
    """Return the classes that the scores were made of; None where the run has none."""
    if not run.has_labels:
        return None
    from spice_dist import evaluate

    truth = evaluate.true_classes(run.folder)
    return truth if truth is not None and truth.shape == run.labels.shape and truth.max() >= 0 else None


def template(name: str, folder: Path = FOLDER) -> "Template":
    """Return a template of `folder`, which may include those of this folder; it escapes all values."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "mark": charts.cluster_mark}
    return environment.get_template(name)
