"""The results of a sweep, made from its trials' folders: the table, the order by an objective, the best settings."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist import artifacts
from spice_dist.config import override, read_config
from spice_dist.data.checksums import require_whole
from spice_dist.data.files import csv_line, publish, publish_json, text_cell
from spice_dist.evaluate import clustering_accuracy
from spice_dist.objectives import COMBINED, OBJECTIVES, combined, consensus
from spice_dist.sweep.records import FINISHED, read_record
from spice_dist.sweep.report import Row, with_objective, write_sweep_report

FIRST_COLUMNS = ("number", "trial", "state", "reason", "seconds")


def rows(folder: Path) -> list[Row]:
    """Return a row for every trial, in the order in which they began: the fields of its record and its scores."""
    trials = []
    for trial in (folder / "trials").glob("*"):
        if record := read_record(trial):
            values = asdict(record)
            scores = values.pop("scores")
            trials.append({"trial": trial.name, **values, **scores})
    trials.sort(key=lambda row: (row["started"], row["trial"]))
    return [{"number": number, **row} for number, row in enumerate(trials)]


def best_first(trials: Sequence[Row], objective: str) -> list[Row]:
    """Order the finished trials by the objective, then the others as they came."""
    finished = [row for row in trials if row["state"] == FINISHED]
    others = [row for row in trials if row["state"] != FINISHED]
    if objective == COMBINED:
        values = combined(finished).tolist() if finished else []
    else:
        values = [OBJECTIVES[objective] * row.get(objective, float("-inf")) for row in finished]
    order = sorted(range(len(finished)), key=lambda place: (-values[place], place))
    return [finished[place] for place in order] + others


def with_accuracy(folder: Path, trials: Sequence[Row]) -> list[Row]:
    """Add the ACC of each clustering to its row, where there are true labels: for tables only."""
    extended = []
    for row in trials:
        clusters = folder / "trials" / row["trial"] / "clusters.npy"
        accuracy = clustering_accuracy(folder / "base", np.load(require_whole(clusters))) if clusters.exists() else None
        extended.append(row if accuracy is None else {**row, "acc": accuracy})
    return extended


def write_results(folder: Path, objective: str) -> list[Row]:
    """Write trials.csv, trials.parquet, report.html, and best.json if a finished trial has the objective.

    Returns the rows, the best first.
    """
    trials = best_first(write_tables(folder, with_consensus(folder, rows(folder))), objective)
    if comparable := with_objective(trials, objective):
        best = comparable[0]
        config = override(read_config(artifacts.sweep_file(folder)), best["settings"])
        contents = {"version": 1, "trial": best["trial"], "objective": objective, "config": asdict(config)}
        publish_json(artifacts.best_file(folder), contents)
    else:
        # left by an earlier call with another objective
        artifacts.best_file(folder).unlink(missing_ok=True)
    write_sweep_report(folder, trials, objective)
    return trials


def with_consensus(folder: Path, trials: Sequence[Row]) -> list[Row]:
    """Add the consensus: how far each finished trial agrees with the others."""
    finished = [row["trial"] for row in trials if row["state"] == FINISHED]
    if len(finished) < 2:
        return list(trials)
    clusterings = np.stack([np.load(require_whole(folder / "trials" / trial / "clusters.npy")) for trial in finished])
    scores = dict(zip(finished, consensus(clusterings).tolist(), strict=True))
    return [{**row, "consensus": scores[row["trial"]]} if row["trial"] in scores else row for row in trials]


def write_tables(folder: Path, trials: Sequence[Row]) -> list[Row]:
    """Write trials.csv and trials.parquet of these rows; return them with their ACC, where there are true labels."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    trials = with_accuracy(folder, trials)
    flat = [_flat(row) for row in trials]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with publish(folder / "trials.csv") as file:
        file.write(csv_line(names).encode())
        for row in flat:
            cells = (row.get(name, "") for name in names)
            file.write(csv_line(text_cell(cell) if isinstance(cell, str) else cell for cell in cells).encode())
    columns = {name: pa.array(_column([row.get(name) for row in flat])) for name in names}
    with publish(folder / "trials.parquet") as file:
        write_table(pa.table(columns), file)
    return trials


def _flat(row: Row) -> Row:
    first = {name: row[name] for name in FIRST_COLUMNS}
    scores = {name: value for name, value in row.items() if name not in (*FIRST_COLUMNS, "settings", "started")}
    return {**first, **row["settings"], **scores}


def _column(values: list[Any]) -> list[Any]:
    """Convert values of several types to text, as a column holds values of one type."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) <= 1:
        return values
    return [None if value is None else str(value) for value in values]
