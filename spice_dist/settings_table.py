"""Print every setting of a configuration: name = value, range, meaning."""

import dataclasses
import difflib
import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from spice_dist.errors import UserError

WIDTH = 120  # columns of the whole table
WIDEST = (52, 32)  # columns at most of names with values, and of ranges
BETWEEN = "  "  # separates columns


@dataclasses.dataclass(frozen=True)
class Group:
    name: str  # dotted; empty for the settings of the whole run
    meaning: str
    rows: tuple[tuple[str, str, str], ...]  # (name = value, range, meaning)


def settings_table(config: Any, group: str = "") -> str:
    """Tabulate the settings below `group`, such as "moco" or "spice_self.weak", or the setting `group`; "": all.

    Raises:
        UserError: there is no such group or setting; the message offers the nearest name.
    """
    every = list(_groups(config))
    names = [entry.name for entry in every if entry.name]
    if group in names or not group:
        shown = [entry for entry in every if not group or f"{entry.name}.".startswith(f"{group}.")]
        return "\n\n".join(_text(entry) for entry in shown)
    for entry in every:
        for row in entry.rows:
            if row[0].split(" = ")[0] == group:
                return _text(dataclasses.replace(entry, name="", meaning="", rows=(row,)))
    names += [row[0].split(" = ")[0] for entry in every for row in entry.rows]
    near = difflib.get_close_matches(group, names, n=2)
    offer = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(n for n in names if '.' not in n)}"
    raise UserError(f'there is no group of settings "{group}"; {offer}')


def _groups(config: Any, name: str = "", meaning: str = "the whole run") -> Iterator[Group]:
    """Yield a group with its own settings, then the groups in it."""
    rows, groups = [], []
    for entry in dataclasses.fields(config):
        value, declared = getattr(config, entry.name), entry.metadata["declaration"]
        dotted = f"{name}.{entry.name}" if name else entry.name
        if dataclasses.is_dataclass(value):
            groups.append((value, dotted, declared.meaning))
        else:
            rows.append((f"{dotted} = {_value(value)}", declared.range, declared.meaning))
    yield Group(name, meaning, tuple(rows))
    for group in groups:
        yield from _groups(*group)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) if value != "" else '""'


def _text(group: Group) -> str:
    widths = [min(most, max(len(row[at]) for row in group.rows)) for at, most in enumerate(WIDEST)]
    widths.append(WIDTH - sum(widths) - 2 * len(BETWEEN))
    lines = [f"{group.name}: {group.meaning}" if group.name else group.meaning] if group.meaning else []
    for row in group.rows:
        cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True) if width]
        spaces = [width for width in widths if width]
        for texts in zip_longest(*cells, fillvalue=""):
            lines.append(BETWEEN.join(text.ljust(space) for text, space in zip(texts, spaces, strict=True)).rstrip())
    return "\n".join(lines)
