"""`assignments.csv`: the cluster of every image, one row each, in image order."""

import csv
import math
from array import array
from pathlib import Path

import numpy as np

from spice_dist.data.checksums import require_whole
from spice_dist.data.files import csv_line, path_cell, path_of_cell, publish
from spice_dist.errors import DamagedFile, UserError


def write_assignments(
    path: Path, names: list[str], cluster: np.ndarray, confidence: np.ndarray, reliable: np.ndarray | None
) -> None:
    """Writes index,path,cluster,confidence and, unless it is None, reliable: one row per image, in image order."""
    with publish(path) as file:
        header = ["index", "path", "cluster", "confidence"] + ["reliable"] * (reliable is not None)
        file.write(csv_line(header).encode())
        for index, name in enumerate(names):
            row = [index, path_cell(name), int(cluster[index]), f"{confidence[index]:.4f}"]
            file.write(csv_line(row + ([int(reliable[index])] if reliable is not None else [])).encode())


def read_assignments(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns cluster, confidence and reliable of every image, (N,) each. The rows must be in image order."""
    labels, confidence, reliable = array("q"), array("d"), array("b")
    line = 1
    try:
        with require_whole(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            for index, row in enumerate(csv.DictReader(file)):
                line = index + 2
                if int(row["index"]) != index:
                    raise ValueError(f"index {row['index']!r} where {index} was expected")
                labels.append(int(row["cluster"]))
                confidence.append(float(row["confidence"]))
                if not math.isfinite(confidence[-1]):
                    raise ValueError(f"confidence {row['confidence']!r}")
                reliable.append(row["reliable"].strip() == "1")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run has not finished; start the same command again") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, csv.Error) as error:
        raise DamagedFile(f"{path}, row {line}: {error}") from None
    if not labels:
        raise DamagedFile(f"{path}: no images")
    return np.array(labels, np.int64), np.array(confidence, np.float64), np.array(reliable, bool)


def read_names(path: Path, wanted: np.ndarray) -> dict[int, str]:
    """Returns the names of the images `wanted`, by index, in a second pass: millions of names never sit in memory."""
    indices, names = set(wanted.tolist()), {}
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        for index, row in enumerate(csv.DictReader(file)):
            if index in indices:
                names[index] = path_of_cell(row["path"])
    return names
