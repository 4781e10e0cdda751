"""Make one table of what the scripts beside this file have counted, for tests/README.md.

    python -m tests.chaos.table punisher.jsonl kill_points.jsonl recovery.jsonl signals.xml

Files of results are JSON lines, of any script, and what `pytest --junitxml=NAME.xml` writes, with a NAME in TESTS.
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.chaos.damage import NAMES
from tests.chaos.omissions import CONSTANT, NOTICED, UNNOTICED
from tests.chaos.recovery import GOALS, percentiles

TESTS = {
    "signals": (
        "every signal at every point of a run on two Ray workers",
        "pytest -m slow tests/test_ray.py -k signal",
    ),
    "full_disk": ("full disks: tests", "pytest -k full_disk"),
    "hostile": (
        "damaged and hostile images, lists and packed files: tests",
        "pytest tests/data/test_{hard_inputs,beton,ingest}.py",
    ),
}
SCRIPT = "python -m tests.chaos."
Row = tuple[str, int, str, str]  # what was done, how often, what became of it, the command


def damage(records: list[dict[str, Any]]) -> Iterator[Row]:
    counts = Counter(record["outcome"] for record in records if "outcome" in record and "damage" in record)
    if counts:
        result = ", ".join(f"{counts[name]} {name}" for name in NAMES)
        yield "every damage of every kind of file, then a command", counts.total(), result, "damage"


def kill_points(records: list[dict[str, Any]]) -> Iterator[Row]:
    killed = [record for record in records if record.get("what") == "kill point" and record["killed"]]
    for on, option in (("one process", ""), ("two Ray workers", " --ray 15")):
        here = [record for record in killed if record["on"] == on]
        if here:
            equal = sum(not record["differ"] for record in here)
            stages = len({(record["chain"], record["stage"]) for record in here})
            what = f"SIGKILL at drawn points of {stages} stages, {on}; the same command again"
            yield what, len(here), f"{equal} end with the same bytes", f"kill_points{option}"


def punished(records: list[dict[str, Any]]) -> Iterator[Row]:
    for record in records:
        if record.get("what") == "punished":
            (counted, ran), (calm, hurt) = record["steps"], record["seconds"]
            result = f"{', '.join(record['differ']) + ' differ' if record['differ'] else 'the same bytes'}; "
            result += f"{counted} of {ran} steps counted; {calm:.0f} s without, {hurt:.0f} s with blows"
            what = f"blows on one run on two Ray workers, {record['starts']} starts"
            yield what, record["blows"], result, f"punisher --seed {record['seed']} --blows {record['blows']}"


def recovery(records: list[dict[str, Any]]) -> Iterator[Row]:
    for kind, goal in GOALS.items():
        here = [record for record in records if record.get("what") == "recovery" and record["kind"] == kind]
        if here:
            median, high = percentiles([record["seconds"] for record in here])
            loads = [record["load"] for record in here]
            result = f"trains again after {median:.0f} s (p50), {high:.0f} s (p95); goal {goal} s"
            result += f"; load {min(loads):.0f} to {max(loads):.0f} on 2 cores" * (max(loads) > 2 * 2)
            yield f"loss of a {kind}", len(here), result, f"recovery --of {kind}"


def omissions(records: list[dict[str, Any]]) -> Iterator[Row]:
    here = [record for record in records if record.get("what") == "omission"]
    counts = Counter(record["outcome"] for record in here)
    if here:
        result = ", ".join(f"{counts[name]} {name}" for name in (NOTICED, CONSTANT, UNNOTICED))
        loops = len({record["loop"] for record in here})
        yield f"a tensor of a checkpoint lost or frozen, in {loops} training loops", counts.total(), result, "omissions"


def tests(path: Path) -> Row:
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))  # noqa: S314  our own file
    count, failed = int(suite.attrib["tests"]), int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    what, command = TESTS[path.stem]
    return what, count, f"{count - failed - int(suite.attrib['skipped'])} pass", command


def table(files: list[Path]) -> Iterator[str]:
    """Yield the table as Markdown."""
    lines = [line for file in files if file.suffix == ".jsonl" for line in file.read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    yield "| what is done | n | result | command |"
    yield "|---|---|---|---|"
    for rows in (kill_points, punished, recovery, omissions, damage):
        for what, count, result, command in rows(records):
            yield f"| {what} | {count} | {result} | `{SCRIPT}{command}` |"
    for file in files:
        if file.suffix == ".xml":
            what, count, result, command = tests(file)
            yield f"| {what} | {count} | {result} | `{command}` |"


if __name__ == "__main__":
    print("\n".join(table([Path(name) for name in sys.argv[1:]])))
