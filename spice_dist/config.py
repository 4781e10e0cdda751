"""The whole configuration of a run, and its one way of being changed: by dotted names."""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spice_dist.errors import UserError
from spice_dist.methods.moco import MoCoConfig
from spice_dist.methods.reliable import ReliableConfig
from spice_dist.methods.spice_self import SpiceSelfConfig
from spice_dist.methods.spice_semi import SpiceSemiConfig
from spice_dist.task import Task


@dataclass(frozen=True)
class Config(Task):
    moco: MoCoConfig = field(default_factory=MoCoConfig)
    spice_self: SpiceSelfConfig = field(default_factory=SpiceSelfConfig)
    reliable: ReliableConfig = field(default_factory=ReliableConfig)
    spice_semi: SpiceSemiConfig = field(default_factory=SpiceSemiConfig)


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with fields replaced: override(config, {"moco.lr": 0.1}). Text is read as the field's type.

    Raises:
        UserError: no such field (the nearest name is offered), or a value of another type.
    """
    for name, value in changes.items():
        config = _replace(config, name.split("."), value, name)
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted name."""
    leaves: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{entry.name}.")
        else:
            leaves[prefix + entry.name] = value
    return leaves


def _replace(config: Any, path: list[str], value: Any, name: str) -> Any:
    types_of = typing.get_type_hints(type(config))
    if path[0] not in types_of:
        prefix = name[: len(name) - len(".".join(path))]
        near = difflib.get_close_matches(path[0], types_of, n=1)
        offer = f'; did you mean "{prefix}{near[0]}"?' if near else f"; there are {', '.join(sorted(types_of))}"
        raise UserError(f'there is no setting "{name}"{offer}')
    current = getattr(config, path[0])
    if dataclasses.is_dataclass(current):
        if len(path) == 1:
            raise UserError(f'"{name}" is a group of settings; name one of {", ".join(flatten(current, name + "."))}')
        return dataclasses.replace(config, **{path[0]: _replace(current, path[1:], value, name)})
    if len(path) > 1:
        raise UserError(f'there is no setting "{name}"; "{path[0]}" has no parts')
    return dataclasses.replace(config, **{path[0]: _convert(value, types_of[path[0]], name)})


def _convert(value: Any, wanted: Any, name: str) -> Any:
    if isinstance(value, str) and wanted is not str:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(f'"{name}" is {_name(wanted)}, not "{value}"') from None
    if typing.get_origin(wanted) is tuple:
        parts = typing.get_args(wanted)
        if isinstance(value, list | tuple):
            kinds = parts[:1] * len(value) if parts[-1] is ... else parts
            if len(kinds) == len(value):
                return tuple(_convert(item, kind, name) for item, kind in zip(value, kinds, strict=True))
    elif wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise UserError(f'"{name}" is {_name(wanted)}, not {value!r}')


def _name(wanted: Any) -> str:
    if isinstance(wanted, types.GenericAlias):
        return "a list such as " + str(tuple(1 if kind is int else 0.5 for kind in typing.get_args(wanted)[:2]))
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[wanted]
