"""The groups as a table: CSV, or Parquet with a map and the features."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spice_dist import artifacts
from spice_dist.data.files import Progress, csv_line, path_cell, publish, text_cell
from spice_dist.errors import DamagedFile
from spice_dist.export.result import Result, read_result, utf8

ROWS = 4_096  # of a row group: with 2,000 features 33 MB
FITTED = 10_000  # rows at most that the axes of the map are computed from


def write_csv(run: Path, out: Path, progress: Progress) -> list[str]:
    """Write path,cluster,name,confidence,reliable, one row an image, safe to open in a spreadsheet."""
    result = read_result(run)
    with publish(out) as file:
        file.write(b"path,cluster,name,confidence,reliable\n")
        for rows, names in _chunks(result, progress):
            file.write(_lines(result, rows, names).encode())
    return [f"wrote {out}: {result.n:,} images"]


def write_parquet(run: Path, out: Path, progress: Progress) -> list[str]:
    """Write path, cluster, name, confidence, reliable and, where the run has features, x, y and embedding.

    The embedding is a list of fixed size of float32, which every reader has; its values are the float16 of
    features.npy. Memory: ROWS rows, FITTED rows for the axes, and the columns of the run without names and features.
    """
    import pyarrow.parquet as parquet

    result = read_result(run)
    features = _features(result)
    schema = _schema(None if features is None else features.shape[1])
    axes = None if features is None else principal_axes(features)
    with publish(out) as file, parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for rows, names in _chunks(result, progress):
            columns = _columns(result, rows, names)
            if features is not None and axes is not None:
                columns |= _feature_columns(np.asarray(features[rows], np.float32), *axes)
            writer.write_batch(_batch(columns, schema))
    about = "without features" if features is None else f"with {features.shape[1]} features each"
    return [f"wrote {out}: {result.n:,} images {about}; columns {', '.join(schema.names)}"]


def principal_axes(features: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D 2"]]:
    """Return the mean and the two main directions of at most FITTED rows; the largest entry of each is positive."""
    from sklearn.decomposition import PCA

    index = np.arange(len(features))
    if len(index) > FITTED:
        index = np.sort(np.random.default_rng(0).choice(index, FITTED, replace=False))
    rows = np.asarray(features[index], np.float32)
    if not np.isfinite(rows).all():
        raise DamagedFile("features.npy holds values that are not finite: make the run again")
    pca: Any = PCA(min(2, *rows.shape), svd_solver="covariance_eigh").fit(rows)
    directions = np.zeros((rows.shape[1], 2), np.float32)
    directions[:, : len(pca.components_)] = pca.components_.T
    return pca.mean_, directions


def _chunks(result: Result, progress: Progress) -> Iterator[tuple[slice, list[str]]]:
    """Yield rows of the run and their names, ROWS at a time."""
    names = result.names()
    for start in range(0, result.n, ROWS):
        rows = slice(start, min(start + ROWS, result.n))
        yield rows, list(itertools.islice(names, rows.stop - start))
        progress(rows.stop, result.n)
    next(names, None)  # reads to the end, where more names than images are an error


def _lines(result: Result, rows: slice, names: list[str]) -> str:
    lines = []
    columns = (result.cluster[rows].tolist(), result.confidence[rows].tolist(), result.reliable[rows].tolist())
    for name, cluster, confidence, reliable in zip(names, *columns, strict=True):
        label = text_cell(result.labels[cluster])
        lines.append(csv_line([path_cell(name), cluster, label, f"{confidence:.4f}", int(reliable)]))
    return "".join(lines)


def _features(result: Result) -> Float[np.ndarray, "N D"] | None:
    """Return the features, memory-mapped; None if the run has none."""
    path = artifacts.features_file(result.run)
    if not path.exists():
        return None
    features = artifacts.stored_features(result.run)
    if features.ndim != 2 or len(features) != result.n:
        raise DamagedFile(f"{path} has the shape {features.shape}, the run {result.n:,} images: make the run again")
    return features


def _schema(width: int | None) -> Any:
    import pyarrow as pa

    columns = [
        ("path", pa.string()),
        ("cluster", pa.int32()),
        ("name", pa.string()),
        ("confidence", pa.float32()),
        ("reliable", pa.bool_()),
    ]
    if width is not None:
        columns += [("x", pa.float32()), ("y", pa.float32()), ("embedding", pa.list_(pa.float32(), width))]
    return pa.schema(columns)


def _columns(result: Result, rows: slice, names: list[str]) -> dict[str, Any]:
    return {
        "path": [utf8(name) for name in names],
        "cluster": result.cluster[rows],
        "name": [result.labels[cluster] for cluster in result.cluster[rows].tolist()],
        "confidence": result.confidence[rows],
        "reliable": result.reliable[rows],
    }


def _feature_columns(
    rows: Float[np.ndarray, "n D"], mean: Float[np.ndarray, " D"], directions: Float[np.ndarray, "D 2"]
) -> dict[str, Any]:
    points = (rows - mean) @ directions
    return {"x": points[:, 0], "y": points[:, 1], "embedding": rows}


def _batch(columns: dict[str, Any], schema: Any) -> Any:
    import pyarrow as pa

    arrays = []
    for field in schema:
        values = columns[field.name]
        if field.name == "embedding":
            flat = pa.array(values.reshape(-1), pa.float32())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
        else:
            arrays.append(pa.array(values).cast(field.type))
    return pa.record_batch(arrays, schema=schema)
