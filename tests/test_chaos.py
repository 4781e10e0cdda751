"""The scripts of chaos/ that are not tested elsewhere: points that kill, and the table of what was counted."""

import json
import subprocess
import sys
from pathlib import Path

from tests.chaos.table import table


def test_a_run_is_killed_at_drawn_points_and_the_table_counts_those_that_end_with_the_same_bytes(tmp_path: Path):
    out = tmp_path / "points.jsonl"
    command = [sys.executable, "-m", "tests.chaos.kill_points", "--each", "2", "--chains", "imc_swav", "--out", out]
    subprocess.run(command, check=True, timeout=200)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["moment"] for record in records] == ["before", "file"]
    assert all(record["killed"] for record in records)
    with out.open("a") as file:
        file.write(json.dumps({**records[0], "differ": ["model"]}) + "\n")
    (row,) = list(table([out]))[2:]
    assert "| 3 | 2 end with the same bytes |" in row
