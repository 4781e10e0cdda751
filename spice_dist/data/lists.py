"""Images named by a list: .txt (a path a line), .csv (a column `path`), .parquet (paths, or the images themselves).

Relative paths start at the folder of the list. A list may come from Windows: UTF-8 or UTF-16 with a mark, any line end,
backslashes; a CSV with semicolons or tabs, and a header in any case. A column `label` counts as true labels only when
asked for. Parquet files with a column `image` of bytes, or of structs with a field `bytes`, are what Hugging Face data
sets are stored as; folders that `datasets.save_to_disk` wrote are read when that library is installed.
"""

import codecs
import csv
import io
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist.data.files import path_of_cell
from spice_dist.data.sources import MAX_CELL_BYTES, BadImage, Source, encode_labels, files_source, read_file
from spice_dist.errors import UserError

SUFFIXES = (".txt", ".csv", ".parquet")
SOUGHT = 20  # paths that are looked for before anything is decoded


def list_source(path: Path, *, with_labels: bool, follow_links: bool = False, trusted: bool = False) -> Source:
    """Open the images that `path` lists, in its order.

    Args:
        with_labels: with the column `label`.
        follow_links: read links too that point to files within the folder of the list.
        trusted: read files outside of that folder too.

    Raises:
        UserError: the list cannot be read, none of its first paths exists, or it names files outside of its folder and
            is not `trusted`.
    """
    readers = {".txt": _of_text, ".csv": _of_csv, ".parquet": partial(_of_parquet, trusted=trusted)}
    try:
        source, labels = readers[path.suffix.lower()](path)
        if source.file is not None:
            if not trusted:
                _require_inside(path, source.paths)
            _look_for(path, source)
            source = files_source(source.name, source.paths, path.parent, path.parent if follow_links else None)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read the list {str(path)!r}: {str(error).splitlines()[0]}") from error
    if not source.paths:
        raise UserError(f"the list {str(path)!r} names no image")
    if not with_labels:
        return source
    if labels is None:
        raise UserError(f"the list {str(path)!r} has no column 'label': add one, or do without labels")
    encoded, names = encode_labels(path, np.array([str(label).strip() for label in labels]), len(source.paths))
    return replace(source, labels=encoded, label_names=names)


def _require_inside(path: Path, names: list[str]) -> None:
    folders = {name: os.path.dirname(name) for name in names}
    outside = {folder for folder in set(folders.values()) if not _is_inside(path.parent, folder)}
    found = [name for name in names if folders[name] in outside]
    if found:
        raise UserError(
            f"the list {str(path)!r} names {len(found)} files outside of its folder, such as {found[0]!r}; give "
            "--trust-list if you know what it names"
        )


def _is_inside(folder: Path, name: str) -> bool:
    """Return whether a name relative to a folder, links followed, stays in it."""
    root = os.path.realpath(folder)
    return os.path.commonpath([root, os.path.realpath(folder / name)]) == root


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `datasets.save_to_disk` wrote the folder."""
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def saved_dataset_source(folder: Path, *, with_labels: bool, trusted: bool = False) -> Source:
    """Open a data set that `datasets.save_to_disk` wrote, with its column `label` if `with_labels`.

    Only that of a `trusted` one may name files outside of its folder.
    """
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
        lambda i: _bytes_of(images[i][kinds[0]], folder, trusted),
        encoded=True,
        stamps=lambda i: str(data._fingerprint),
    )
    if not with_labels:
        return source
    if "label" not in data.features:
        raise UserError(f"{str(folder)!r} has no column 'label': do without labels")
    encoded, label_names = encode_labels(folder, np.array([str(label) for label in data["label"]]), len(names))
    return replace(source, labels=encoded, label_names=label_names)


def _text(path: Path) -> str:
    """Read a list; bytes that are no UTF-8 are escaped by surrogates. ValueError if it holds a NUL."""
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    text = data.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "strict")
    if "\0" in text:
        raise ValueError(f"line {text[: text.index(chr(0))].count(chr(10)) + 1} holds a NUL; save the list as UTF-8")
    return text


def _of_text(path: Path) -> tuple[Source, None]:
    text = _text(path)
    end = "\n" if "\n" in text else "\r"
    lines = (line.removesuffix("\r") for line in text.split(end))
    return _of_paths(path, [line for line in lines if line.strip()]), None


def _of_csv(path: Path) -> tuple[Source, list[str] | None]:
    text = _text(path)
    heading = text[: re.search(r"[\r\n]|$", text).start()]  # pyright: ignore[reportOptionalMemberAccess]
    for delimiter in ",;\t":
        columns = [column.strip().lower() for column in next(csv.reader([heading], delimiter=delimiter), [])]
        if "path" in columns:
            break
    else:
        raise ValueError(f"it needs a column 'path', it has {', '.join(heading.split(',')) or 'none'}")
    # strict: a quote that is never closed would make one path of all lines behind it
    is_spaced = f"{delimiter} " in heading
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=is_spaced, strict=True)
    next(rows)
    at, label_at = (columns.index(column) if column in columns else len(columns) for column in ("path", "label"))
    try:
        cells = [(_cell(row, at), _cell(row, label_at)) for row in rows if row]
    except csv.Error as error:
        raise ValueError(f'{error} at line {rows.line_num}; is a quote (") not closed?') from error
    labels = [label for _, label in cells] if label_at < len(columns) else None
    return _of_paths(path, [path_of_cell(name) for name, _ in cells]), labels


def _cell(row: list[str], at: int) -> str:
    """Return a cell; a short row lacks its last ones."""
    return row[at] if at < len(row) else ""


def _of_parquet(path: Path, trusted: bool) -> tuple[Source, list[Any] | None]:
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(path)
    columns = file.schema_arrow.names
    labels = file.read(["label"])["label"].to_pylist() if "label" in columns else None
    if "image" not in columns:
        if "path" not in columns:
            raise ValueError(f"it needs a column 'path' or 'image', it has {', '.join(columns)}")
        return _of_paths(path, [str(name or "") for name in file.read(["path"])["path"].to_pylist()]), labels
    ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    names = [f"{path.name}/{i:07d}" for i in range(file.metadata.num_rows)]
    status = path.stat()
    return Source(
        str(path.absolute()),
        names,
        _parquet_reader(path, ends, trusted),
        encoded=True,
        stamps=lambda i: f"{status.st_size} {status.st_mtime_ns}",
    ), labels


def _parquet_reader(path: Path, ends: np.ndarray, trusted: bool) -> Callable[[int], bytes]:
    """Return a function that reads image i; it caches the last few row groups."""
    import pyarrow.parquet as parquet

    @lru_cache(maxsize=4)
    def group(number: int) -> Any:
        return parquet.ParquetFile(path).read_row_group(number, columns=["image"])["image"]

    def read(i: int) -> bytes:
        number = int(np.searchsorted(ends, i, side="right"))
        first = int(ends[number - 1]) if number else 0
        try:
            return _bytes_of(group(number)[i - first].as_py(), path.parent, trusted)
        except OSError as error:
            raise BadImage(f"cannot read: {error}") from error

    return read


def _bytes_of(cell: Any, folder: Path, trusted: bool) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None and isinstance(cell, dict) and cell.get("path"):
        if not trusted and not _is_inside(folder, os.path.dirname(cell["path"])):
            raise BadImage(f"{cell['path']!r} lies outside of the folder of its list; give --trust-list to read it")
        return read_file(folder / cell["path"])
    if not isinstance(data, bytes) or not data:
        raise BadImage("no image in this row")
    if len(data) > MAX_CELL_BYTES:
        raise BadImage(f"image of {len(data) >> 20} MiB, at most {MAX_CELL_BYTES >> 20} are read")
    return data


def _of_paths(listed_in: Path, names: list[str]) -> Source:
    folder = listed_in.parent
    names = [_as_meant(name, folder) for name in names]
    return files_source(str(listed_in.absolute()), names, folder)


def _as_meant(name: str, folder: Path) -> str:
    """Return a path without the quotes, blanks, backslashes or ~ of other systems, if only so it names a file."""
    bare = name.strip()
    if bare[:1] == bare[-1:] == '"' and len(bare) > 1:
        bare = bare[1:-1]
    others = {bare, bare.replace("\\", "/"), os.path.expanduser(bare)} - {name}
    if not others or os.path.lexists(folder / name):
        return name
    return next((other for other in sorted(others) if os.path.lexists(folder / other)), name)


def _look_for(listed_in: Path, source: Source) -> None:
    """Raise ValueError if none of the first paths exists: they are likely relative to another folder."""
    assert source.file is not None
    first = source.paths[:SOUGHT]
    if first and not any(os.path.lexists(source.file(i)) for i in range(len(first))):
        raise ValueError(
            f"there is no {first[0]!r} at {str(source.file(0).absolute())!r}, nor the next ones: make the paths "
            f"absolute, or move the list into the folder that they start in"
        )
