"""Render the page of a run: template.html lays out what `sections` returns."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from spice_dist import artifacts
from spice_dist.errors import UserError
from spice_dist.report import charts, sections
from spice_dist.report.gallery import ReadImages, center_similarity, galleries, read_images
from spice_dist.report.reading import Run, load, mapping, number
from spice_dist.report.text import flatten, percent, printable

if TYPE_CHECKING:
    from jinja2 import Template

FOLDER = Path(__file__).parent  # holds the templates


def write_report(run: Path, out: Path | None = None, images: ReadImages = read_images) -> Path:
    """Write the page about a finished run to `out` (default: report.html inside the run) and return its path."""
    run = Path(run)
    page = render(load(run), images)
    out = artifacts.report_file(run) if out is None else Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder; name the file to write")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
    except FileNotFoundError:
        raise UserError(f"{out.parent} does not exist") from None
    finally:
        temporary.unlink(missing_ok=True)
    return out


def render(run: Run, images: ReadImages) -> str:
    similarity = None if run.features is None else center_similarity(run.features, run.labels, run.num_clusters)
    shown, notes = galleries(run, similarity, images)
    return template("template.html").render(
        title=sections.title(run),
        trust=run.trust,
        network=str(run.config.get("network") or ""),
        summary=sections.summary(run),
        labels_note=run.labels_note,
        facts=sections.facts(run),
        score_titles=sections.SCORE_TITLES,
        score_rows=sections.score_rows(run),
        label_free=sections.label_free(run),
        heads=sections.heads(run),
        head_selection=sections.head_selection(run),
        reliable_acc=number(mapping(run.metrics.get("reliable")).get("acc")),
        sizes=sections.sizes(run),
        curves=sections.curves(run),
        feature_map=sections.feature_map(run),
        durations=sections.durations(run),
        galleries=shown,
        gallery_notes=notes,
        compact=run.num_clusters > 60,
        by_center=similarity is not None,
        quarantine=run.quarantine,
        num_quarantined=run.num_quarantined,
        manifest=sections.manifest(run),
        command=sections.command(run),
        versions=flatten(mapping(run.config.get("versions"))),
        configuration=flatten(mapping(run.config.get("config"))),
        fingerprint=flatten(mapping(run.config.get("data"))),
    )


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
