"""Predictions as rows, as JSON, as a line; the rows are index, path, cluster, confidence, name."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from spice_dist.data.files import csv_line, path_cell, printable, publish, text_cell
from spice_dist.predicting import Predictions

COLUMNS = ("index", "path", "cluster", "confidence", "name")
ROW_GROUP = 65_536  # rows of a parquet file that are in memory at once


def write_predictions(out: Path, predictions: Predictions) -> Path | None:
    """Write the rows to `out`, by its suffix as .parquet or CSV.

    Returns:
        OUT.quarantine.csv, path and reason of each unreadable image; None, and no such file, where all are readable.
    """
    if out.suffix == ".parquet":
        _write_parquet(out, predictions)
    else:
        with publish(out) as file:
            file.writelines(line.encode() for line in csv_lines(predictions))
    listed = out.with_name(out.name + ".quarantine.csv")
    if not predictions.reasons:
        listed.unlink(missing_ok=True)  # of an earlier call
        return None
    unreadable = ((path_cell(predictions.source.paths[i]), text_cell(why)) for i, why in predictions.reasons.items())
    with publish(listed) as file:
        file.writelines(csv_line(row).encode() for row in [("path", "reason"), *unreadable])
    return listed


def csv_lines(predictions: Predictions) -> Iterator[str]:
    """Yield the lines of a CSV file; an unreadable image has no confidence."""
    yield csv_line(COLUMNS)
    for index, path, cluster, confidence, name in predictions.rows():
        sure = "" if confidence is None else f"{confidence:.4f}"
        yield csv_line((index, path_cell(path), cluster, sure, text_cell(name or "")))


def one_line(predictions: Predictions) -> str:
    """Say what becomes of a single image."""
    ((_, path, cluster, confidence, name),) = predictions.rows()
    if confidence is None:
        return f"{printable(path)}: unreadable ({printable(predictions.reasons[0])})"
    named = f" ({printable(name)})" if name else ""
    return f"{printable(path)}: cluster {cluster}{named}, confidence {confidence:.2f}"


def json_pieces(predictions: Predictions) -> Iterator[str]:
    """Yield, piece by piece, an object with the images, how many files were given and are left out, and why."""
    yield '{\n "images": ['
    for i, row in enumerate(predictions.rows()):
        image = json.dumps(dict(zip(COLUMNS, row, strict=True)), indent=1).replace("\n", "\n  ")
        yield f"{',' if i else ''}\n  {image}"
    unreadable = [
        {"index": i, "path": predictions.source.paths[i], "reason": reason} for i, reason in predictions.reasons.items()
    ]
    rest = {"given": predictions.given(), "left_out": predictions.left_out(), "unreadable": unreadable}
    yield f"\n ],{json.dumps(rest, indent=1)[1:]}\n"


def _write_parquet(out: Path, predictions: Predictions) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    types = (pa.int64(), pa.string(), pa.int64(), pa.float32(), pa.string())
    schema = pa.schema(zip(COLUMNS, types, strict=True))
    rows = predictions.rows()
    with publish(out) as file, parquet.ParquetWriter(file, schema) as writer:
        while chunk := list(islice(rows, ROW_GROUP)):
            index, path, *others = zip(*chunk, strict=True)
            # a name that is no UTF-8, which parquet cannot hold
            path = [name.encode("utf-8", "backslashreplace").decode() for name in path]
            columns = [pa.array(column, kind) for column, kind in zip((index, path, *others), types, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
