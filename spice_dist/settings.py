"""Settings: fields of frozen dataclasses that declare their meaning and their possible values.

`check_ranges` refuses all other values. `spice-dist settings` prints the declarations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from spice_dist.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Declaration:
    """The meaning of a setting, and the bounds or choices of its value, or of each item of a tuple."""

    meaning: str
    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    choices: Sequence[str] = ()
    remedy: str = ""  # the end of a refusal; empty: made from the range

    def allows(self, value: Any) -> bool:
        """Tell whether the value is within the bounds or among the choices; NaN is within no bounds."""
        if isinstance(value, tuple):
            return all(self.allows(item) for item in value)
        if self.choices:
            return value in self.choices
        return (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    @property
    def range(self) -> str:
        """The possible values in words; empty if all values of the type are possible."""
        if self.choices:
            return ", ".join(self.choices)
        if self.least is not None and self.most is not None:
            return f"between {self.least} and {self.most}"
        lower = [f"above {self.above}"] * (self.above is not None) + [f"{self.least} or more"] * (
            self.least is not None
        )
        upper = [f"at most {self.most}"] * (self.most is not None)
        upper += [f"and less than {self.below}"] * (self.below is not None and self.below < math.inf)
        return ", ".join(lower + upper)

    def refusal(self, name: str, value: Any) -> str:
        """Return one line that names the setting and its value, and says what to give."""
        if self.choices:
            return f'{name} is "{value}"; {self.remedy or f"it can be {self.range}"}'
        if self.above is not None and not isinstance(value, tuple) and not value > self.above:
            return f"{name} is {value}; it must be above {self.above}"
        verb = "give" if self.least is not None and self.most is None and self.below != math.inf else "it must be"
        return f"{name} is {value}; {self.remedy or f'{verb} {self.range}'}"


def setting(
    default: T,
    meaning: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: Sequence[str] = (),
    remedy: str = "",
) -> T:
    """Make a dataclass field with a default and a `Declaration`: `epochs: int = setting(800, "passes", above=0)`."""
    declaration = Declaration(meaning, above, least, below, most, choices, remedy)
    return field(default=default, metadata={"declaration": declaration})


def declarations(config: Any) -> dict[str, Declaration]:
    """Return the declarations of a dataclass's fields by name."""
    return {entry.name: entry.metadata["declaration"] for entry in fields(config) if "declaration" in entry.metadata}


def check_ranges(group: str, config: Any, *names: str) -> None:
    """Raise a UserError that names the first of these settings, in this order, with a value that is not allowed.

    Args:
        group: the group of the names, such as "moco"; empty for settings of the whole run.
    """
    declared = declarations(config)
    for name in names:
        value = getattr(config, name)
        if not declared[name].allows(value):
            raise UserError(declared[name].refusal(f"{group}.{name}" if group else name, value))


def allowed(config: Any, name: str) -> bool:
    """Tell whether this setting's declaration allows its value."""
    return declarations(config)[name].allows(getattr(config, name))
