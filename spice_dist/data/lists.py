"""Images named by a list: .txt (a path a line), .csv (a column `path`), .parquet (paths, or the images themselves).

Relative paths start at the folder of the list. A column `label` counts as true labels only when asked for. Parquet
files with a column `image` of bytes, or of structs with a field `bytes`, are what Hugging Face data sets are stored as;
folders that `datasets.save_to_disk` wrote are read when that library is installed.
"""

import csv
import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist.data.sources import MAX_FILE_BYTES, BadImage, Source, encode_labels, files_source, read_file
from spice_dist.errors import UserError

SUFFIXES = (".txt", ".csv", ".parquet")


def list_source(path: Path, *, with_labels: bool) -> Source:
    """Open the images that `path` lists, in its order; UserError if it cannot be read or lists none."""
    readers = {".txt": _of_text, ".csv": _of_csv, ".parquet": _of_parquet}
    try:
        source, labels = readers[path.suffix.lower()](path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read the list {str(path)!r}: {str(error).splitlines()[0]}") from error
    if not source.paths:
        raise UserError(f"the list {str(path)!r} names no image")
    if not with_labels:
        return source
    if labels is None:
        raise UserError(f"the list {str(path)!r} has no column 'label': add one, or do without labels")
    encoded, names = encode_labels(path, np.array([str(label) for label in labels]), len(source.paths))
    return replace(source, labels=encoded, label_names=names)


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `datasets.save_to_disk` wrote the folder."""
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def saved_dataset_source(folder: Path, *, with_labels: bool) -> Source:
    """Open a data set that `datasets.save_to_disk` wrote, with its column `label` if `with_labels`."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{str(folder)!r} is a Hugging Face data set: pip install datasets to read it") from error
    data: Any = datasets.load_from_disk(str(folder))
    kinds = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    if len(kinds) != 1:
        raise UserError(f"{str(folder)!r} must have one column of images, it has {len(kinds)}")
    images = data.cast_column(kinds[0], datasets.Image(decode=False))
    names = [f"{folder.name}/{i:07d}" for i in range(len(data))]
    source = Source(
        str(folder.absolute()),
        names,
        lambda i: _bytes_of(images[i][kinds[0]], folder),
        encoded=True,
        stamps=lambda i: str(data._fingerprint),
    )
    if not with_labels:
        return source
    if "label" not in data.features:
        raise UserError(f"{str(folder)!r} has no column 'label': do without labels")
    encoded, label_names = encode_labels(folder, np.array([str(label) for label in data["label"]]), len(names))
    return replace(source, labels=encoded, label_names=label_names)


def _of_text(path: Path) -> tuple[Source, None]:
    lines = [line.rstrip(b"\r") for line in path.read_bytes().split(b"\n")]
    return _of_paths(path, [os.fsdecode(line) for line in lines if line.strip()]), None


def _of_csv(path: Path) -> tuple[Source, list[str] | None]:
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file)
        if not rows.fieldnames or "path" not in rows.fieldnames:
            raise ValueError(f"it needs a column 'path', it has {', '.join(rows.fieldnames or []) or 'none'}")
        listed = [(row["path"], row.get("label")) for row in rows if row["path"]]
    labels = [label or "" for _, label in listed] if "label" in rows.fieldnames else None
    return _of_paths(path, [name for name, _ in listed]), labels


def _of_parquet(path: Path) -> tuple[Source, list[Any] | None]:
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(path)
    columns = file.schema_arrow.names
    labels = file.read(["label"])["label"].to_pylist() if "label" in columns else None
    if "image" not in columns:
        if "path" not in columns:
            raise ValueError(f"it needs a column 'path' or 'image', it has {', '.join(columns)}")
        return _of_paths(path, [str(name) for name in file.read(["path"])["path"].to_pylist()]), labels
    ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    names = [f"{path.name}/{i:07d}" for i in range(file.metadata.num_rows)]
    status = path.stat()
    return Source(
        str(path.absolute()),
        names,
        _parquet_reader(path, ends),
        encoded=True,
        stamps=lambda i: f"{status.st_size} {status.st_mtime_ns}",
    ), labels


def _parquet_reader(path: Path, ends: np.ndarray) -> Callable[[int], bytes]:
    """Return a function that reads image i; it caches the last few row groups."""
    import pyarrow.parquet as parquet

    @lru_cache(maxsize=4)
    def group(number: int) -> Any:
        return parquet.ParquetFile(path).read_row_group(number, columns=["image"])["image"]

    def read(i: int) -> bytes:
        number = int(np.searchsorted(ends, i, side="right"))
        first = int(ends[number - 1]) if number else 0
        try:
            return _bytes_of(group(number)[i - first].as_py(), path.parent)
        except OSError as error:
            raise BadImage(f"cannot read: {error}") from error

    return read


def _bytes_of(cell: Any, folder: Path) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None and isinstance(cell, dict) and cell.get("path"):
        return read_file(folder / cell["path"])
    if not isinstance(data, bytes) or not data:
        raise BadImage("no image in this row")
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"image of {len(data) >> 20} MiB, at most {MAX_FILE_BYTES >> 20} are read")
    return data


def _of_paths(listed_in: Path, names: list[str]) -> Source:
    return files_source(str(listed_in.absolute()), names, lambda i: listed_in.parent / names[i])
