"""Format values as text of a page."""

import json
import re

from markupsafe import Markup

# controls, lone surrogates, line separators, marks that turn the reading direction
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(value: object) -> object:
    """Replace unprintable characters of text by escapes; other values pass."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), value)


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def flatten(content: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested settings to (dotted name, value), as --set takes them."""
    rows = []
    for name, value in content.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict) and value and dotted.count(".") < 20:
            rows += flatten(value, f"{dotted}.")
        else:
            rows.append(
                (dotted, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
            )
    return rows
