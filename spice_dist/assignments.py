"""`assignments.csv`: the cluster of every image, one row each, in image order."""

import csv
import io
import math
from array import array
from pathlib import Path

import numpy as np

from spice_dist.data.files import csv_cell, publish, unguard
from spice_dist.errors import DamagedFile, UserError


def write_assignments(
    path: Path, names: list[str], cluster: np.ndarray, confidence: np.ndarray, reliable: np.ndarray | None
) -> None:
    """Writes index,path,cluster,confidence and, unless it is None, reliable: one row per image, in image order."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["index", "path", "cluster", "confidence"] + ["reliable"] * (reliable is not None))
    for index, name in enumerate(names):
        row = [index, csv_cell(name), int(cluster[index]), f"{confidence[index]:.4f}"]
        writer.writerow(row + ([int(reliable[index])] if reliable is not None else []))
    with publish(path) as file:
        file.write(table.getvalue().encode())


def read_assignments(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns cluster, confidence and reliable of every image, (N,) each. The rows must be in image order."""
    labels, confidence, reliable = array("q"), array("d"), array("b")
    line = 1
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
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
                names[index] = unguard(row["path"])
    return names
