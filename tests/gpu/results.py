"""What the check has found so far: check.json and check.md, written anew after every row."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from spice_dist.data.files import publish, publish_json
from spice_dist.errors import UserError

TABLE, PAGE = "check.json", "check.md"
Numbers = dict[str, Any]


class OutOfTime(Exception):
    """A part's share of the time is used up; the next call goes on with it."""


class Results:
    """Rows by part and name, finished parts, and what was planned, kept in a folder and copied to another."""

    def __init__(self, folder: Path, copy: Path | None = None):
        self.folder, self.copy = folder, copy
        self.machine: Numbers = {}
        self.rows: list[dict[str, Any]] = []
        self.done: list[str] = []
        self.plans: dict[str, Any] = {}
        self.read()

    def read(self) -> None:
        """Take over what the file says: another process may have added to it."""
        if (self.folder / TABLE).exists():
            for name, value in json.loads((self.folder / TABLE).read_text()).items():
                setattr(self, name, value)

    def add(self, part: str, name: str, ok: bool, seconds: float = 0.0, **numbers: Any) -> None:
        """Add a row, or replace the one of this name."""
        row = {"part": part, "name": name, "ok": ok, "seconds": round(seconds, 2), **numbers}
        self.rows = [other for other in self.rows if (other["part"], other["name"]) != (part, name)] + [row]
        self.write()

    def row(self, part: str, name: str) -> Numbers | None:
        """Return the row if there is one that is no failure."""
        found = [row for row in self.rows if (row["part"], row["name"], row["ok"]) == (part, name, True)]
        return found[0] if found else None

    @contextmanager
    def measured(self, part: str, name: str, note: Callable[[], Numbers] = dict) -> Iterator[Numbers]:
        """Add a row at the end of the block, which fills its numbers; an exception is a row too and goes no further.

        Args:
            note: more numbers for the row of a failure.
        """
        numbers: Numbers = {}
        started = monotonic()
        try:
            yield numbers
        except OutOfTime:
            raise
        except Exception as error:
            self.add(part, name, False, monotonic() - started, **note(), error=in_one_line(error))
        else:
            self.add(part, name, numbers.pop("ok", True), monotonic() - started, **numbers)

    def finish(self, part: str) -> None:
        self.done.append(part)
        self.write()

    def write(self) -> None:
        content = {"machine": self.machine, "rows": self.rows, "done": self.done, "plans": self.plans}
        publish_json(self.folder / TABLE, content)
        with publish(self.folder / PAGE) as file:
            file.write(self.page().encode())
        if self.copy:
            for name in (TABLE, PAGE):
                shutil.copyfile(self.folder / name, self.copy / name)

    def page(self) -> str:
        """Return a Markdown table of all rows."""
        lines = [f"{name}: {value}  " for name, value in self.machine.items()]
        lines += ["", "| part | what | | seconds | numbers |", "|---|---|---|---|---|"]
        for row in self.rows:
            head = ("part", "name", "ok", "seconds")
            numbers = ", ".join(f"{name.replace('_', ' ')} {_shown(row[name])}" for name in row if name not in head)
            result = "ok" if row["ok"] else "**FAILED**"
            lines.append(f"| {row['part']} | {row['name']} | {result} | {row['seconds']} | {_cell(numbers)} |")
        return "\n".join([*lines, ""])


def in_one_line(error: BaseException) -> str:
    """Name the error with the first line of its message; a mistake of the user needs no name."""
    first = (str(error).splitlines() or [""])[0][:300]
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "; ".join(map(_shown, value)) or "none"
    return str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
