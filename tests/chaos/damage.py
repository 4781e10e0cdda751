"""Damage every kind of file in a run folder, run a command on it, and count what becomes of that.

    python -m tests.chaos.damage --part 0/4 --out damage.jsonl      # a quarter of the cases; minutes
    python -m tests.chaos.damage --table damage.jsonl               # the table of tests/README.md

A case is good if its result is that of the whole folder, or if the command ends with one line. It is silent if the
result differs and the command succeeds.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 60  # after which a command hangs
NAMES = ("made again", "one line", "harmless", "silent", "traceback", "hang")
LOGS = ("events", ".owner.json")  # of TensorBoard; of a running process
SETTINGS = [
    *("--recipe", "digits", "--clusters", "10", "--labels", "array", "--workers", "0", "--threads", "1"),
    *("--checkpoint-seconds", "1e-9", "--set", "backbone.widths=(8,8,16,16)", "--set", "data.loader=torch"),
    *("--set", "moco.epochs=2", "--set", "moco.batch=64", "--set", "moco.queue=128", "--set", "spice_self.epochs=2"),
    *("--set", "spice_self.heads=2", "--set", "spice_semi.steps=4", "--set", "spice_semi.labelled=16"),
]


@dataclass(frozen=True)
class Case:
    """A file below the run folder, what is done to it, and the command that follows."""

    file: str
    damage: str
    command: str

    @property
    def kind(self) -> str:
        """The file without the number of its step."""
        return re.sub(r"/\d+/", "/STEP/", self.file)


def make_run(folder: Path, images: int = 200) -> Path:
    """Cluster some digits in `folder`/run, in seconds."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = (digits.images[:images] * 15.9).astype(np.uint8)
    np.savez(folder / "images.npz", images=pixels, labels=digits.target[:images])
    assert call("fit", folder, folder / "run")[0] == 0
    return folder / "run"


def call(command: str, data: Path, run: Path) -> tuple[int, str]:
    """Run a command on the folder; return its exit code and what it printed as errors."""
    from spice_dist import cli

    source = str(data / "images.npz")
    arguments = {
        "fit": ["fit", source, "--out", str(run), *SETTINGS],
        "export": ["export", str(run), "--to", "csv", str(run / "exported.csv")],
        "predict": ["predict", str(run), source, "--out", str(run / "predicted.csv")],
        "evaluate": ["evaluate", str(run)],
    }
    for name in ("predicted.csv", "exported.csv"):
        (run / name).unlink(missing_ok=True)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        code = report(run) if command == "report" else cli.main(arguments[command])
    return code, printed.getvalue()


def report(run: Path) -> int:
    """As the command, but with the map that `fit` makes: UMAP takes a minute."""
    from spice_dist.errors import UserError
    from spice_dist.report import write_report

    try:
        write_report(run)
    except UserError as error:
        print(f"spice-dist: {error}", file=sys.stderr)
        return 1
    return 0


def results(command: str, run: Path) -> list[object]:
    """What the command is for, without times."""
    if command in ("predict", "export"):
        return [(run / f"{command}ed.csv").read_bytes()]
    if command == "report":
        return [re.sub(rb"[\d.]+ s\b", b"", (run / "report.html").read_bytes())]
    metrics = json.loads((run / "metrics.json").read_text())
    metrics.pop("seconds")
    return [(run / "assignments.csv").read_bytes(), metrics]


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "emptied": lambda file, _: file.write_bytes(b""),
    "truncated": lambda file, _: os.truncate(file, file.stat().st_size // 2),
    "zeroed": lambda file, _: file.write_bytes(bytes(file.stat().st_size)),
    "deleted": lambda file, _: file.unlink(),
    "flip 1": lambda file, draw: flip(file, draw),
    "flip 2": lambda file, draw: flip(file, draw),
    "flip 3": lambda file, draw: flip(file, draw),
}


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cases(run: Path) -> list[Case]:
    """Every damage of every file before `fit`, and of what other commands read before these, in a drawn order."""
    files = [file.relative_to(run).as_posix() for file in sorted(run.rglob("*")) if file.is_file()]
    files = [file for file in files if not any(log in file for log in LOGS) and not file.endswith("ed.csv")]
    found = [Case(file, damage, "fit") for file in files for damage in DAMAGES]
    reading = {"predict": ("model/",), "report": ("", "data/", "features/"), "evaluate": ("",), "export": ("", "data/")}
    for command, read in reading.items():
        of_command = [file for file in files if (os.path.dirname(file) + "/" if "/" in file else "") in read]
        found += [Case(file, damage, command) for file in of_command for damage in DAMAGES]
    random.Random(0).shuffle(found)
    return found


def outcome(case: Case, whole: Path) -> tuple[str, str]:
    """Try a case on a copy of the folder beside the data; return one of NAMES, and what was printed."""
    with tempfile.TemporaryDirectory(dir=whole.parent) as folder:
        run = Path(folder) / "run"
        shutil.copytree(whole, run, symlinks=True)
        if case.command in ("predict", "export", "report"):
            assert call(case.command, whole.parent, run)[0] == 0
        before = results(case.command, run)
        DAMAGES[case.damage](run / case.file, random.Random(str(case)))
        if (run / case.file).exists() and (run / case.file).read_bytes() == (whole / case.file).read_bytes():
            return "harmless", "the same bytes"
        signal.signal(signal.SIGALRM, _hangs)
        signal.alarm(SECONDS)
        try:
            code, printed = call(case.command, whole.parent, run)
        except TimeoutError:
            return "hang", ""
        except BaseException:
            return "traceback", traceback.format_exc()
        finally:
            signal.alarm(0)
        if code:
            told = printed.strip().splitlines()[-1:]
            clear = "Traceback" not in printed and told and told[0].startswith("spice-dist: ")
            return ("one line" if clear else "traceback"), printed
        if results(case.command, run) != before:
            is_said = "damaged" in printed or "missing" in printed
            return ("one line" if is_said else "silent"), printed
        return ("made again" if "again" in printed or "set aside" in printed else "harmless"), printed


def _hangs(*_: object) -> None:
    raise TimeoutError


def table(records: list[dict[str, str]]) -> Iterator[str]:
    """Count the outcomes by kind of file, as Markdown."""
    yield f"| file | cases | {' | '.join(NAMES)} |"
    yield "|---|" + "---|" * (len(NAMES) + 1)
    kinds = sorted({record["kind"] for record in records})
    for kind in [*kinds, "all"]:
        counts = Counter(record["outcome"] for record in records if kind in (record["kind"], "all"))
        yield f"| {kind} | {sum(counts.values())} | {' | '.join(str(counts[name]) for name in NAMES)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1", help="I/N: every N-th case from the I-th on")
    parser.add_argument("--out", type=Path, help="a line for each case is added to this file")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after so long")
    parser.add_argument("--table", type=Path, help="print the table of the lines in this file")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table([json.loads(line) for line in options.table.read_text().splitlines()])))
        return
    part, parts = map(int, options.part.split("/"))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder))
        for case in cases(run)[part::parts]:
            if time.monotonic() - began > options.seconds:
                break
            name, printed = outcome(case, run)
            record = {"kind": case.kind, **case.__dict__, "outcome": name}
            if name in NAMES[3:]:
                print(case, name, printed, file=sys.stderr)
            with open(options.out, "a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
